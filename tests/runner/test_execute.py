"""How a run notebook is executed."""

import subprocess, sys

from helpers import ROOT


def test_papermill_comes_without_the_grammar_of_jsonschema():
    "The grammar takes a second of every run; whoever needs it can still import it."
    code = (
        "import sys; from scir.runner.execute import load_papermill as load; load(); "
        "print('jsonschema' in sys.modules, 'rfc3987_syntax' in sys.modules, load().__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["True", "False", "papermill"], done.stderr
