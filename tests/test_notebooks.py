"""What every library notebook keeps to, and what a stored output may hold; the tutorial runs."""

import json, os, re, subprocess, sys
from pathlib import Path

import nbformat, pytest

from scir.runner.state import notebook_hash
from scir.stages.files import STAGES

from helpers import ROOT


RUN = sorted((ROOT / "nbs/run").glob("*.ipynb"))
LIBRARY = [f for f in sorted((ROOT / "nbs").glob("**/[0-9]*.ipynb")) if f not in RUN]
TUTORIAL = ROOT / "nbs/getting_started.ipynb"
LONGEST = 75  # lines of a cell, empty ones left out: what is longer holds more than one idea


def cells(path):
    return nbformat.read(path, 4).cells


def code(path):
    return [c for c in cells(path) if c.cell_type == "code"]


def defines(cell):
    return (
        cell.cell_type == "code"
        and "#| export" in cell.source
        and re.search(r"^(@|def |class |async |[A-Za-z_, ]+ ?= )", cell.source, re.M)
    )


def images(path):
    return sum("image/png" in o.get("data", {}) for c in code(path) for o in c.outputs)


def prose(cell):
    return re.sub(r"^(#.*|> .*)$", "", cell.source, flags=re.M).strip() if cell.cell_type == "markdown" else ""


@pytest.mark.parametrize("path", LIBRARY, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_a_sentence_says_why_before_every_group_of_definitions(path):
    found = cells(path)
    bare = [
        c.source[:80] for before, c in zip(found, found[1:]) if defines(c) and not prose(before) and not defines(before)
    ]
    assert not bare, f"no prose in the cell before: {bare}"


@pytest.mark.parametrize("path", LIBRARY, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_a_cell_holds_one_idea(path):
    long = {
        c.source[:80]: n
        for c in cells(path)
        if defines(c) and (n := sum(bool(l.strip()) for l in c.source.splitlines())) > LONGEST
    }
    assert not long, f"more than {LONGEST} lines: {long}"


@pytest.mark.parametrize("path", [*LIBRARY, *RUN, TUTORIAL], ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_stored_outputs_are_of_a_run_without_error_or_place(path):
    outputs = [o for c in code(path) for o in c.outputs]
    assert not [o.ename for o in outputs if o.output_type == "error"]
    said = json.dumps(
        [o.get("text") or {k: v for k, v in o.get("data", {}).items() if not k.startswith("image/")} for o in outputs]
    )
    assert not (found := re.findall(r"(?:/home|/root|/tmp|/work|/Users)/[^\\s\"']*", said)), found


DRAWS = re.compile(r"plt\.|\.plot\(|plot_\w+\(|display\(Image")


@pytest.mark.parametrize("path", [*LIBRARY, *RUN, TUTORIAL], ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_what_draws_shows_its_figures(path):
    drawing = [c for c in code(path) if "#| export" not in c.source and DRAWS.search(c.source)]
    assert bool(drawing) == bool(images(path)), f"{len(drawing)} cells draw, {images(path)} figures are stored"


@pytest.mark.parametrize("path", [*RUN, TUTORIAL], ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_a_notebook_that_calls_defines_nothing_and_shows_what_came_out(path):
    assert not [c.source[:60] for c in code(path) if re.search(r"^(def|class|#\| export)", c.source, re.M)]
    assert (
        any("parameters" in c.metadata.get("tags", []) for c in code(path))
        and sum(bool(c.outputs) for c in code(path)) >= 2
    )


def test_every_stage_has_its_notebook():
    assert {s.notebook for s in STAGES.values()} == {p.stem for p in RUN}


def test_prose_and_outputs_of_a_run_notebook_make_nothing_stale(tmp_path):
    path, book = tmp_path / "x.ipynb", nbformat.read(RUN[0], 4)
    nbformat.write(book, path)
    first = notebook_hash(path)
    for c in book.cells:
        if c.cell_type == "code":
            c.outputs, c.execution_count = [nbformat.v4.new_output("stream", text="said")], 7
        else:
            c.source += " More."
    nbformat.write(book, path)
    assert notebook_hash(path) == first == notebook_hash(RUN[0])
    next(c for c in book.cells if c.cell_type == "code").source += "\n"
    nbformat.write(book, path)
    assert notebook_hash(path) != first and notebook_hash(tmp_path / "none.ipynb") == "absent"


def test_the_tutorial_runs_with_any_recipe(tmp_path):
    command = [
        str(Path(sys.executable).parent / "papermill"),
        str(TUTORIAL),
        str(tmp_path / "out.ipynb"),
        "--no-progress-bar",
        "-p",
        "recipe",
        "recipes/tiny.yaml",
        "-p",
        "run",
        str(tmp_path / "run"),
        "-y",
        "changes: {iterations: 1, arms: [scir]}",
    ]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert images(tmp_path / "out.ipynb") == images(TUTORIAL) and (tmp_path / "run/seed0/scir/m2/adapter").is_dir()
