"""What makes a finished stage stale: code that it calls, by its meaning."""

import subprocess, sys

import pytest

from scir.runner.staleness import code_of, dependencies, parse_package
from scir.runner.state import SOURCES, code_hashes
from scir.stages.files import STAGES

from helpers import edit


@pytest.mark.parametrize(
    "module, name, expected",
    [
        ("report.figures", "plot_headline", {"report"}),
        ("method.loss", "scir_loss", {"optimise"}),
        ("data.testbed", "prompts", set()),
        ("cli", "run", set()),
        ("stages.sample", "sample", {"warm_start", "sample", "evaluate", "align"}),
        ("stages.evaluate", "run", {"evaluate"}),
    ],
)
def test_a_stage_depends_on_what_it_calls_and_on_nothing_else(monkeypatch, module, name, expected):
    before = {s: code_hashes(s) for s in STAGES}
    edit(monkeypatch, module, name)
    assert {s for s in STAGES if code_hashes(s) != before[s]} == expected


def test_what_is_registered_is_reached():
    "The recipe names a reward model; no code does."
    assert {("method.rewards", "pointwise"), ("method.rewards", "longer")} <= dependencies(
        parse_package(SOURCES), "stages.judge", "run"
    )


SOURCE = """
from .b import helper, TABLE
LIMIT = 3
def stage(x):
    "Docstring."
    return helper(x) + LIMIT
def other(): return stage
"""
OTHER = """
def helper(x):
    other = x
    return other
TABLE = {}
def unused(): return 1
"""


@pytest.mark.parametrize(
    "old, new, changes",
    [
        ("Docstring", "Another", False),
        ("LIMIT = 3", "LIMIT = 3  # a comment", False),
        ("LIMIT = 3", "\n\nLIMIT = (3)", False),
        ("return stage", "return None", False),
        ("+ LIMIT", "- LIMIT", True),
        ("LIMIT = 3", "LIMIT = 4", True),
        ("other = x", "other = -x", True),
        ("return 1", "return 2", False),
        ("TABLE = {}", "TABLE = {1: 2}", False),
    ],
)
def test_meaning_is_what_counts(old, new, changes):
    assert (old in SOURCE) != (old in OTHER)
    now = code_of(parse_package({"a": SOURCE.replace(old, new), "b": OTHER.replace(old, new)}), "a", "stage")
    assert (now != code_of(parse_package({"a": SOURCE, "b": OTHER}), "a", "stage")) == changes


def test_imports_in_functions_and_whole_modules_are_followed():
    made = parse_package(
        {
            "a": "def stage():\n    from scir.b import helper as h\n    from scir import c\n    return h(c.x)",
            "b": "def helper(y): return y",
            "c": "x = 1\nprint(x)",
        }
    )
    assert dependencies(made, "a", "stage") == {("a", "stage"), ("b", "helper"), ("c", "x"), ("c", "")}


@pytest.mark.parametrize(
    "modules, loaded", [("stages.files, runner.state, runner.execute", False), ("runner.verify", True)]
)
def test_what_status_needs_does_not_load_torch(modules, loaded):
    code = "".join(f"import scir.{m}; " for m in modules.split(", ")) + "import sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == str(loaded), done.stderr
