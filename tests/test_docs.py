"""What the docs site is made from: the bridge, its pages, and links in docs/. No Sphinx, no browser."""

import ast, pkgutil, re, sys
from pathlib import Path

import nbformat, pytest, torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "docs"))
import build, pages
from scir.method.loss import scir_loss
from scir.stages.evaluate import score_summary

NOTEBOOK = [
    ("markdown", "# Bridges\n> What they carry.\n\nFirst $$a=1,\\qquad b=2$$"),
    ("code", "#| default_exp bridge"),
    ("code", "#| export\nimport re\nfrom pathlib import Path"),
    ("markdown", "See `nbs/method/03_loss.ipynb` and `scir_loss`.\n$$c=3$$\nDone."),
    ("code", "#| hide\nsecret = 1"),
    ("code", "#| echo: false\nprint(1)"),
    (
        "code",
        '#| export\nSPAN = 3  # in metres\n\ndef cross(load:float, # weight of *it*, kg\n          fast:bool=False)->float: # seconds\n    "Walk over; `fast` runs."\n    return load\n\ndef _hidden(): pass',
    ),
]


@pytest.fixture
def bridged(tmp_path, monkeypatch):
    "The notebook above as a page of the site."
    path, _ = tmp_path / "30_bridge.ipynb", (build.pages(), build.names())
    cell = {"markdown": nbformat.v4.new_markdown_cell, "code": nbformat.v4.new_code_cell}
    nbformat.write(nbformat.v4.new_notebook(cells=[cell[k](s) for k, s in NOTEBOOK]), path)
    monkeypatch.setattr(build, "ROOT", tmp_path)
    return build.bridge(path)


def test_the_bridge_keeps_what_a_reader_needs(bridged):
    "Title and introduction stay, hidden cells and bare imports go, equations are paragraphs, exported code is folded under its description."
    assert [c.cell_type for c in bridged.cells] == ["markdown", "markdown", "code", "markdown", "code"]
    intro, text, shown, described, source = bridged.cells
    assert (
        intro.source.startswith("# Bridges\n")
        and "`scir.bridge`" in intro.source
        and "\nWhat they carry." in intro.source
    )
    assert (
        text.source
        == "See [`nbs/method/03_loss.ipynb`](/method/03_loss.ipynb) and {py:obj}`scir_loss <scir.method.loss.scir_loss>`.\n\n$$c=3$$\n\nDone."
    )
    assert (
        shown.source == "print(1)"
        and shown.metadata.tags == ["remove-input"]
        and source.metadata.tags == ["hide-input"]
    )
    assert "#|" not in source.source and bridged.metadata.language_info.name == "python"


def test_signatures_and_comments_come_from_the_source(bridged):
    described = bridged.cells[3].source
    assert "{py:data} SPAN\n:module: scir.bridge\n:value: '3'\n\nin metres" in described
    assert "{py:function} cross(load: float, fast: bool=False) -> float" in described and "_hidden" not in described
    assert (
        ":param load: weight of \\*it\\*, kg\n:returns: seconds" in described and "Walk over; `fast` runs." in described
    )


def signature_of(source):
    "What the page of a module says of its last function."
    tree = ast.parse(source).body
    values = {n.targets[0].id: n.value for n in tree[:-1]}
    return build.signature(tree[-1], build.comments(source), values)[1:]


@pytest.mark.parametrize(
    "source, said, returned",
    [
        ("def load(file, # of rows\n         n=3): # rows\n    'Read.'", {"file": "of rows"}, "rows"),
        (
            "def load(file,\n         n=3, # at most\n        ): # yields rows\n    'Read.'",
            {"n": "at most"},
            "yields rows",
        ),
        ("def load(file,\n         n=3, # at most\n        ):\n    'Read.'", {"n": "at most"}, ""),
        ("def load(file): # rows\n    @cache\n    def inner(): pass", {}, "rows"),
        ("def load(file)->list: # rows\n    return [] # none", {}, "rows"),
        (
            "def load(file, # of rows\n         n:int=3 # at most\n        )->list: # rows\n    pass",
            {"file": "of rows", "n": "at most"},
            "rows",
        ),
    ],
)
def test_a_comment_is_on_the_argument_of_its_line_or_behind_the_bracket_on_what_is_returned(source, said, returned):
    assert signature_of(source) == (said, returned)


def test_help_is_found_behind_names():
    source = """FILE = "a file"
Out = Annotated[Path, typer.Option(help="to write")]
Rows = list
def load(file: Annotated[str, typer.Option(help=FILE)], more: Annotated[str, typer.Option(help=f"{FILE}, or none")], out: Out, rows: Rows): pass"""
    assert signature_of(source) == ({"file": "a file", "more": "a file, or none", "out": "to write"}, "")


@pytest.mark.parametrize("command", ["judge", "sample", "export", "run"])
def test_every_option_of_a_command_has_its_help_on_the_page(command):
    d = next(d for d in build.definitions(ROOT / "nbs/04_cli.ipynb") if d["name"] == command)
    arguments = {a.arg for a in d["node"].args.args}
    _, said, _ = build.signature(d["node"], d["notes"], d["values"])
    assert set(said) == arguments


def test_options_in_plain_text_keep_their_dashes():
    assert build.plain("e.g. --set a_b=1, `--as is`, a--b") == "e.g. `--set` a\\_b=1, `--as is`, a--b"


def test_what_a_generator_yields_is_not_said_to_be_returned():
    assert build.params({}, "yields rows") == [":yields: rows"] and build.params({}, "rows") == [":returns: rows"]


def test_every_library_notebook_is_a_page_and_every_public_name_is_described():
    made = build.notebooks()
    assert {
        str(f.relative_to(ROOT / "nbs"))
        for f in (ROOT / "nbs").glob("**/*.ipynb")
        if ".ipynb_checkpoints" not in f.parts
    } - {"index.ipynb"} == set(made.values())
    listed = pages.api()
    for path in build.library():
        module = build.module_of(path)
        exported = re.search(
            r"__all__ = \[(.*?)\]", (ROOT / module.replace(".", "/")).with_suffix(".py").read_text(), re.S
        )[1]
        assert set(re.findall(r"'(\w+)'", exported)) == {d["name"] for d in build.definitions(path)}, module
        assert all(f"`{n} <{module}.{n}>`" in listed for n in re.findall(r"'(\w+)'", exported))


def test_links_in_docs_lead_to_files():
    made, dead = {"index.md", "genindex", *build.pages().values(), *pages.extra()}, []
    for file in (ROOT / "docs").glob("**/*.md"):
        if file.parent.parent.name == "results":
            continue
        for target in re.findall(r"\]\(([^)#\s]+)", re.sub(r"```.*?```", "", file.read_text(), flags=re.S)):
            there = (file.parent / target).resolve()
            if "://" not in target and not there.exists() and str(there.relative_to(ROOT / "docs")) not in made:
                dead.append(f"{file.name}: {target}")
    assert not dead


def test_what_pages_ask_for_is_made():
    asked = [
        m.split()
        for f in (ROOT / "docs").glob("**/*.md")
        for m in re.findall(r"^<!-- made: (.*?) -->$", f.read_text(), re.M)
    ]
    assert {a[0] for a in asked} <= set(pages.MADE) and ["result_table"] in asked
    table = pages.result_table()
    kept = (ROOT / "docs/results/smol/inconsistency.csv").read_text()
    rows = [line for line in kept.splitlines()[1:] if line.lstrip('"').startswith(("panel", "own"))]
    cells = re.findall(r"M_\d \| (.*?) \|", table.replace("\\", ""))
    assert (
        len(rows) == table.count("\n") - 1 == len(cells) > 3
        and "held-out" not in table
        and all(v in kept for v in cells)
    )


def test_the_estimate_follows_the_recipe():
    "Numbers that can be counted otherwise: parameters of the 7B shape, answers and their tokens; a row for every stage."
    from scir.runner.planner import MEASURED, skeleton
    from scir.recipe import load_recipe

    shape = skeleton(load_recipe(ROOT / "recipes/mistral-7b.yaml"), "cuda", adapted=False)
    assert abs(sum(p.numel() for p in shape.parameters()) - 7.24e9) < 0.01e9
    assert (
        "| `sample` | decoded | 100,000 | 25.6 |" in pages.effort()
    )  # 5 models x 5000 prompts x 4 answers of 256 tokens
    sizes = [[float(x) for x in line.split("|")[2:-1]] for line in pages.memory().splitlines()[2:]]
    assert len(sizes) == len(MEASURED) and all(0 < as_it_is < min(others) for as_it_is, *others in sizes[:1])


def in_code(name: str, fields: set, columns: dict) -> bool:
    "Whether a name of the glossary is a recipe field, a field of a file, or an object of the library."
    file, _, field = name.partition(": ")
    if field:
        return field in columns[file]
    if not name.startswith("scir."):
        return name in fields
    try:
        pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        return False
    return True


def test_every_code_name_in_the_glossary_exists():
    from scir import store
    from scir.recipe import field_names
    from scir.report.compare import MEASURES

    margins = {f"m_{r}": torch.zeros(1) for r in "GI"}
    score, seed = store.Score.model_fields.keys(), store.SeedPair.model_fields.keys()
    columns = dict.fromkeys(("scores.jsonl", "panel.jsonl", "own.jsonl", "held-out.jsonl"), score)
    columns |= {"seed_pairs.jsonl": seed, "metrics.jsonl": scir_loss(margins, torch.zeros(1)).metrics.keys()}
    columns["metrics.json"] = {
        *MEASURES,
        "rank_correlation",
        *score_summary([store.Grade(id="", prompt_id="", score=1)]),
    }
    text = (ROOT / "docs/glossary.md").read_text()
    named = re.findall(r"`([^`]+)`", " ".join(re.findall(r"^Code: (.*?)$(?=\n\n|\n?\Z)", text, re.M | re.S)))
    assert len(named) > 40
    assert [n for n in named if not in_code(n, field_names(), columns)] == []


def test_files_that_the_docs_name_exist():
    missing = {
        f"{page.name}: {path}"
        for page in (*ROOT.glob("*.md"), ROOT / "data/README.md", *ROOT.glob("docs/**/*.md"))
        for path in re.findall(r"`((?:nbs|scir|tests|docs|recipes)/[\w./-]+)`", page.read_text())
        if not (ROOT / path).exists()
    }
    assert not missing
