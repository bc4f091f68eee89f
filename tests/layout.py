"""The layout in numbers, beside their limits and targets: `python tests/layout.py`; it exits 1 where a limit is passed."""

import ast, json, re, sys
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
LIMITS = {  # where we are: no change may pass them, and one that gets further lowers them
    "lines": 13150,
    "wider than 120": 0,
    "share of these, %": 0.0,
    "95% are within": 110,
    "functions over 25": 0,
    "import cycles": 0,
    "names defined twice": 0,
    "median code cell": 8,
    "shown per exported": 0.94,
}
TARGETS = dict(zip(LIMITS, (5000, 0, 0, 100, 0, 0, 0, 8, 1)))
AT_LEAST = "shown per exported"  # of all others, less is better
SAME = {"run"}  # every stage has one, with the same meaning


def modules() -> dict:
    "Sources by dotted name, without the index and the lists of names that nbdev generates."
    files = [f for f in sorted((ROOT / "scir").glob("**/*.py")) if f.name not in ("__init__.py", "_modidx.py")]
    name = lambda f: ".".join(f.relative_to(ROOT / "scir").with_suffix("").parts)
    return {name(f): re.sub(r"(?s)^__all__ = \[.*?\]\n", "", f.read_text(), flags=re.M) for f in files}


def counts(sources: list) -> dict:
    "Lines, their widths, and functions of more than 25 lines."
    lines = [line for s in sources for line in s.splitlines()]
    wide, widths = sum(len(line) > 120 for line in lines), sorted(len(line) for line in lines if line.strip())
    functions = [n for s in sources for n in ast.walk(ast.parse(s)) if isinstance(n, ast.FunctionDef)]
    return {
        "lines": len(lines),
        "wider than 120": wide,
        "share of these, %": round(100 * wide / len(lines), 1),
        "95% are within": widths[int(0.95 * (len(widths) - 1))],
        "functions over 25": sum(n.end_lineno - n.lineno >= 25 for n in functions),
    }


def imported(module: str, source: str) -> set:
    "Names below scir that a module imports, anywhere in it: other modules are among them."
    found = set()
    for n in ast.walk(ast.parse(source)):
        if isinstance(n, ast.Import):
            found |= {a.name for a in n.names}
        elif isinstance(n, ast.ImportFrom):
            base = ".".join(["scir", *module.split(".")][: -n.level] if n.level else []) + "." * bool(n.level)
            base = (base + (n.module or "")).rstrip(".")
            found |= {base, *(f"{base}.{a.name}" for a in n.names)}
    return {f.removeprefix("scir.") for f in found}


def cycles(sources: dict) -> list:
    "Groups of modules each of which imports every other, directly or through others."
    reach = {m: imported(m, s) & sources.keys() for m, s in sources.items()}
    for between in sources:
        for m in sources:
            reach[m] |= reach[between] if between in reach[m] else set()
    groups = {tuple(sorted(n for n in reach[m] if m in reach[n])) for m in sources if m in reach[m]}
    return sorted(", ".join(g) for g in groups)


def repeated(sources: dict) -> list:
    "Public functions and classes that two modules define; a command may be called as the function behind it."
    where = {}
    for m, s in sources.items():
        for n in ast.parse(s).body:
            if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and not n.name.startswith("_"):
                if not any("app.command" in ast.unparse(d) for d in n.decorator_list):
                    where.setdefault(n.name, []).append(m)
    return sorted(f"{n} ({', '.join(ms)})" for n, ms in where.items() if len(ms) > 1 and n not in SAME)


def cells() -> dict:
    "The code cells in the notebooks of method and stages: their lines, and how many show something."
    files = [f for folder in ("method", "stages") for f in sorted((ROOT / "nbs" / folder).glob("[0-9]*.ipynb"))]
    found = [c for f in files for c in json.loads(f.read_text())["cells"] if c["cell_type"] == "code"]
    sources = ["".join(c["source"]) for c in found]
    lengths = [sum(bool(x.strip()) and not x.startswith("#|") for x in s.splitlines()) for s in sources]
    exporting = sum("#| export" in s for s in sources)
    showing = sum(not any(w in s for w in ("#| export", "#| default_exp", "#| hide")) for s in sources)
    shown = {"exporting cells": exporting, "demonstrating cells": showing}
    return {"median code cell": median(n for n in lengths if n)} | shown | {AT_LEAST: round(showing / exporting, 2)}


def passed(found: dict) -> list:
    "The limits that are passed, a line each."
    worse = {k: found[k] < LIMITS[k] if k == AT_LEAST else found[k] > LIMITS[k] for k in LIMITS}
    return [f"layout: {k}: {found[k]} where the limit is {LIMITS[k]}" for k in LIMITS if worse[k]]


def main() -> int:
    sources, folders = modules(), {}
    for m, s in sources.items():
        folders.setdefault("/".join(["scir", *m.split(".")[:-1]]), []).append(s)
    tables = {f: counts(found) for f, found in folders.items()}
    row = lambda first, *rest: print(f"{first:20}" + "".join(f"{x:>20}" for x in rest))
    row("folder", *next(iter(tables.values())))
    for folder, found in tables.items():
        row(folder, *found.values())
    tangled, twice = cycles(sources), repeated(sources)
    found = counts([*sources.values()]) | {"import cycles": len(tangled), "names defined twice": len(twice)} | cells()
    row("\nin total", "now", "limit", "target")
    for k, n in found.items():
        row(k, n, LIMITS.get(k, "-"), TARGETS.get(k, "-"))
    print("\nimport cycles:", *tangled, "names defined twice:", *twice, sep="\n  ")
    print(*passed(found), sep="\n")
    return bool(passed(found))


if __name__ == "__main__":
    sys.exit(main())
