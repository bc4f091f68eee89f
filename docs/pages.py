"""Content generated from the repository's files: tables of kept runs, the recipe schema, the index of names."""

import ast, json, re, sys
from pathlib import Path

import pandas as pd

from build import ROOT, definitions, guides, library, module_of, notebooks, plain

sys.path.insert(0, str(ROOT))
from scir.runner import planner
from scir.recipe import ARMS, Recipe, field_names, load_recipe

KEPT = ROOT / "docs" / "results"
PROVENANCE = {"P": "from the paper", "S": "from a secondary source", "D": "our own decision"}


def table(columns: list, rows: list) -> str:
    """A Markdown table whose cells are Markdown."""
    return "\n".join("| " + " | ".join(map(str, r)) + " |" for r in [columns, ["---"] * len(columns), *rows])


# Kept runs


def kept(run: str, name: str) -> pd.DataFrame:
    return pd.read_csv(KEPT / run / f"{name}.csv", dtype=str).fillna("")


def headline() -> str:
    """The kept run's result in three sentences."""
    return " ".join((KEPT / "smol" / "headline.txt").read_text().split("\n")).strip()


def result_table() -> str:
    """Agreement and accuracy of every model of the kept run, on its own answers and on M_1's."""
    t = kept("smol", "inconsistency")
    t = t[t.set.str.startswith(("panel", "own"))]
    return table(list(t.columns), t.map(plain).values)


def verdicts() -> str:
    """The claims of the kept run: one row per claim, one column per set."""
    t = kept("smol", "claims")
    return table(list(t.columns), t.map(plain).values)


def manifests(run: str) -> list:
    return [json.loads(f.read_text()) for f in sorted((KEPT / run).glob("manifest*.json"))]


def hours(manifest: dict) -> float:
    return sum(s["seconds"] for s in manifest["steps"].values()) / 3600


def measured(run: str) -> str:
    """When, where and for how long a kept run ran, from its manifests."""
    found = manifests(run)
    steps = [s for m in found for s in m["steps"].values()]
    machine, day = steps[0]["machine"], max(s["finished"] for s in steps)[:10]
    took = " and ".join(filter(None, [", ".join(f"{hours(m):.2f}" for m in found[:-1]), f"{hours(found[-1]):.2f}"]))
    beside = ", run in parallel" if len(found) > 1 else ""
    return (
        f"*Measured* {day}: {took} hours of stages ({len(found)} seed{'s' * (len(found) > 1)}{beside}), "
        f"{machine['cores']} cores ({machine['processor']}), {machine['gpu'] or 'no GPU'}, "
        f"torch {steps[0]['versions']['torch']}."
    )


def stages(run: str) -> str:
    """Minutes per stage and seed."""
    found = manifests(run)
    sums = [
        pd.Series({k: s["seconds"] / 60 for k, s in m["steps"].items()})
        .groupby(lambda k: k.split(":")[0], sort=False)
        .sum()
        for m in found
    ]
    return table(
        ["stage", *(f"minutes, seed {m['seeds'][0]}" for m in found)],
        [[f"`{s}`", *(f"{x.get(s, 0):.1f}" for x in sums)] for s in sums[0].index],
    )


def report(run: str) -> str:
    """A stored report as a page without a table of contents; figures have a width, so they link to their full size."""
    text = (KEPT / run / "results.md").read_text()
    text = re.sub(
        r"!\[(.*?)\]\((\S+)\)\n\n\*(.*?)\*$",
        lambda m: f"```{{figure}} {run}/{m[2]}\n:alt: {m[1]}\n:width: 100%\n:figclass: wide\n\n{m[3]}\n```",
        text,
        flags=re.M,
    )
    files = ", ".join(
        f"[{f.name}]({run}/{f.name})" for f in sorted((KEPT / run).iterdir()) if f.suffix in (".csv", ".json", ".yaml")
    )
    said = f"Written by `scir report`, unchanged. {measured(run)} Files: {files}."
    return f"---\nhide-toc: true\n---\n\n# Report: {run}\n\n{said}\n\n{text}"


# Recipes


def recipe(name: str) -> str:
    """A recipe file, folded."""
    text = (ROOT / "recipes" / f"{name}.yaml").read_text()
    return f"<details><summary>recipes/{name}.yaml</summary>\n\n```yaml\n{text}```\n\n</details>"


def provenance() -> str:
    """Every recipe field with its provenance, section by section."""
    out, rows = [], [(n, f, f.json_schema_extra or {}) for n, f in field_names().items()]
    counts = pd.Series([x.get("provenance", "D") for *_, x in rows]).value_counts()
    out.append(
        f"{len(rows)} fields: " + ", ".join(f"{counts.get(k, 0)} {v} (**{k}**)" for k, v in PROVENANCE.items()) + "."
    )
    for section in dict.fromkeys(n.rpartition(".")[0] for n, *_ in rows):
        said = Recipe.model_fields[section].annotation.__doc__ if section else "One experiment."
        part = [
            (f"`{n}`", code(f.default), x.get("unit", ""), f"**{x.get('provenance', 'D')}**", plain(f.description))
            for n, f, x in rows
            if n.rpartition(".")[0] == section
        ]
        out.append(
            f"## {section or 'Top level'}\n\n{plain(said)}\n\n"
            + table(["field", "default", "unit", "provenance", "meaning"], part)
        )
    return "\n\n".join(out)


def code(value) -> str:
    """A default value, shortened."""
    text = " ".join(str(list(value) if isinstance(value, tuple) else value).split()).replace("|", "\\|")
    return "none" if value is None else f"`{text}`" if 0 < len(text) <= 60 else f"`{text[:50]}`…" if text else "empty"


def arms() -> str:
    """Each arm and the fields it changes."""
    shown = lambda changes: (
        ", ".join(f"`{k}: {str(v).lower() if isinstance(v, bool) else v}`" for k, v in (changes or {}).items())
        or "stays at M_1"
    )
    return table(["arm", "what it changes in `train`"], [(f"`{a}`", shown(c)) for a, c in ARMS.items()])


# Estimated cost of the large recipe: shapes from the planner, assumed rates

ASSUMED_RATES = {"decoded": 500, "read": 6000, "trained": 1500}  # tokens a second on a data-centre GPU (A100 or H100)


def memory() -> str:
    """Peak GPU memory of each stage of recipes/mistral-7b.yaml."""
    r = load_recipe(ROOT / "recipes" / "mistral-7b.yaml")
    wider = r.model_copy(update={"model": r.model.model_copy(update={"gradient_checkpointing": False})})
    whole = r.model_copy(update={"model": r.model.model_copy(update={"quantize": None})})
    columns = {"as in the recipe": r, "without checkpointing": wider, "bfloat16 weights": whole}
    rows = [
        [f"`{s}`", *(f"{planner.peak(s, x, planner.assumed_sizes(x), 'cuda') / 1e9:.1f}" for x in columns.values())]
        for s in planner.MEASURED
    ]
    return table(["peak, GB", *columns], rows)


def gpu() -> str:
    """The table that `make gpu-check` wrote on a machine with a GPU, or a line that says there is none yet."""
    kept_table = KEPT / "gpu" / "gpu.md"
    if kept_table.exists():
        return kept_table.read_text().strip()
    return "*Not measured yet.* On a machine with one NVIDIA GPU, `make gpu-check` measures it in ten minutes."


def effort() -> str:
    """Tokens and hours per stage of recipes/mistral-7b.yaml."""
    r = load_recipe(ROOT / "recipes" / "mistral-7b.yaml")
    todo = planner.planned_tasks(r, planner.assumed_sizes(r))
    rows = [
        (
            f"`{w.stage}`",
            w.kind,
            f"{w.rows:,.0f}",
            f"{w.tokens / 1e6:.1f}",
            ASSUMED_RATES[w.kind],
            f"{w.tokens / ASSUMED_RATES[w.kind] / 3600:.1f}",
        )
        for w in todo
    ]
    total, assumed = sum(w.tokens / ASSUMED_RATES[w.kind] for w in todo) / 3600, planner.assumed_sizes(r)
    return "\n\n".join(
        [
            table(["stage", "kind", "rows", "million tokens", "tokens/s, assumed", "hours"], rows),
            f"Total: {total:.0f} hours. This assumes prompts of {assumed.prompts[0]} tokens, "
            f"answers of {assumed.answer:.0f} "
            f"(half the limit), {len(assumed.seeds)} seed pairs, and these rates, none of which was measured. "
            "Half the rates would double the time; answers that fill the limit would nearly double it.",
        ]
    )


# Names


def api() -> str:
    """All public names, by module."""
    out = []
    for path in library():
        module = module_of(path)
        rows = [
            (
                f"{{py:obj}}`{d['name']} <{module}.{d['name']}>`",
                {"data": "value"}.get(d["kind"], d["kind"]),
                plain((doc(d).split("\n") or [""])[0]),
            )
            for d in definitions(path)
        ]
        out.append(f"## {module}\n\nFrom `{path.relative_to(ROOT)}`.\n\n" + table(["name", "kind", "summary"], rows))
    return "\n\n".join(out)


def doc(d: dict) -> str:
    """A definition's docstring, or a value's comment."""
    return (ast.get_docstring(d["node"]) or "") if d["kind"] != "data" else d["notes"].get(d["node"].end_lineno, "")


def picture(wide: str, narrow: str) -> str:
    """A drawing for wide screens and one for phones; the style sheet shows the one that fits."""
    drawn = "".join(
        f'<div class="picture {kind}">\n{(ROOT / "docs" / name).read_text()}</div>\n'
        for kind, name in (("wide", wide), ("narrow", narrow))
    )
    return f"```{{raw}} html\n{drawn}```"


def howtos() -> str:
    """The how-to pages, the most used ones first."""
    first = ["model", "prompts", "pairs", "reward", "judge", "outside-judge"]
    return "\n".join(
        f"howto/{n}"
        for n in sorted(
            (f.stem for f in (ROOT / "docs" / "howto").glob("*.md")),
            key=lambda n: (first.index(n) if n in first else len(first), n),
        )
    )


FOLDERS = {  # folder of nbs/ and of the library -> page title, summary
    "experiment": (
        "The experiment",
        "The recipe of an experiment, the files that stages exchange, the statistics, and the command line.",
    ),
    "data": (
        "Data",
        "Prompts and labelled pairs: the layouts that are read, conversations, and the testbed.",
    ),
    "model": ("Models", "Weights and adapters, token ids, log-probabilities, and decoding."),
    "stages": (
        "Stages",
        "What each stage does, from SFT to the report. Each stage has a run notebook of the same number and name.",
    ),
    "run": (
        "Run notebooks",
        "One per stage: parameters, one call, a table, a plot. papermill executes them.",
    ),
    "runner": (
        "Running",
        "Which stages to run, why a stage is stale, and how notebooks are executed, in sequence or in parallel.",
    ),
    "report": ("Report", "Tables, claims and figures across runs, arms and seeds."),
    "export": ("Export", "Adapters, merged models, preference sets and benchmark files for other tools."),
}


def folder_page(folder: str) -> str:
    """The page of a folder of notebooks."""
    title, said = FOLDERS[folder]
    inside = [
        p
        for p in notebooks().values()
        if str(Path(p).parent) == folder.replace("experiment", ".") and Path(p).name[0].isdigit()
    ]
    below = "\n".join(f"/{p.removesuffix('.ipynb')}" for p in inside)
    return f"# {title}\n\n{said}\n\n```{{toctree}}\n:maxdepth: 1\n\n{below}\n```\n"


def extra() -> dict:  # page -> text
    """Pages that have no Markdown source in docs/."""
    log = ROOT / "CHANGELOG.md"
    folders = {f"{folder}/index.md": folder_page(folder) for folder in FOLDERS}
    return (
        folders
        | {f"results/{run}.md": report(run) for run in ("smol", "smol-full")}
        | ({"changelog.md": log.read_text()} if log.exists() else {})
    )


MADE = {
    f.__name__: f
    for f in (
        headline,
        result_table,
        verdicts,
        measured,
        stages,
        recipe,
        provenance,
        arms,
        memory,
        effort,
        gpu,
        api,
        picture,
        howtos,
    )
}
MADE |= {
    "guides": lambda: "\n".join(f.stem for f in guides()),
    "changelog": lambda: "changelog" if (ROOT / "CHANGELOG.md").exists() else "",
}
