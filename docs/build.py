"""The docs site: notebooks and Markdown in, Sphinx pages out. `make docs` runs it.

nbdev reads the notebooks (directives, hidden cells and lines). We replace two of its steps:
- its front matter keeps only the title and summary of a first cell, and drops the equations below them;
- its `show_doc` executes every cell with an import, including examples that train models. We read signatures from the
  source instead, so nothing is executed and the site needs no model.
"""

import ast, base64, hashlib, io, re, shutil, subprocess, sys, tarfile, tokenize
from functools import cache
from pathlib import Path

import nbformat
from execnb.nbio import read_nb
from nbdev.process import NBProcessor
from nbdev.processors import filter_stream_, hide_, hide_line, rm_header_dash, strip_ansi

ROOT = Path(__file__).resolve().parent.parent
SOURCE, SITE, CACHE = ROOT / "_proc", ROOT / "_site", ROOT / "build" / "docs"
MATHJAX, MATHJAX_SHA512 = (
    "mathjax@3.2.2",
    "Bt+SSVU8eBG27zChVewOicYs7Xsdt40qm4+UpHyX7k0/O9NliPc+x77k1/FEsPsjKPZGJvtRZM1vO+geW0OhGw==",
)
PROCESSORS = [strip_ansi, hide_line, filter_stream_, rm_header_dash, hide_]


FOLDERS = ("", "data", "method", "model", "stages", "runner", "report", "export")  # of nbs/, same as in the library


def library() -> list:
    return [f for folder in FOLDERS for f in sorted((ROOT / "nbs" / folder).glob("[0-9][0-9]_*.ipynb"))]


def guides() -> list:
    return sorted(f for f in (ROOT / "nbs").glob("[!0-9_.]*.ipynb") if f.stem != "index")


def run_notebooks() -> list:
    return sorted((ROOT / "nbs" / "run").glob("[0-9]*.ipynb"))


def notebooks() -> dict:
    """Notebook -> page."""
    return {f: f"{f.parent.relative_to(ROOT / 'nbs') / f.name}" for f in (*guides(), *library(), *run_notebooks())}


# Markdown


def plain(text: str) -> str:
    """Text escaped for Markdown; `code` stays code, and --options become code, which keeps their dashes."""
    parts = re.split(r"(`[^`]*`|(?<![\w-])--[a-z][\w-]*)", " ".join(text.split()))
    return "".join(
        p if p.startswith("`") else f"`{p}`" if i % 2 else re.sub(r"([\\*_\[\]<>${}|~#])", r"\\\1", p)
        for i, p in enumerate(parts)
    )


@cache
def pages() -> dict:
    """File of the repository -> the page that shows it."""
    docs = {f.relative_to(ROOT): f.relative_to(ROOT / "docs") for f in (ROOT / "docs").glob("**/*.md")}
    kept = {Path(f"docs/results/{name}/results.md"): Path(f"results/{name}.md") for name in ("smol", "smol-full")}
    return {str(k): str(v) for k, v in (docs | kept | {f.relative_to(ROOT): p for f, p in notebooks().items()}).items()}


@cache
def names() -> dict:
    """Full name, and short name if it is unique -> full name."""
    full = [f"{module_of(f)}.{d['name']}" for f in library() for d in definitions(f)]
    short = [n.rsplit(".", 1)[1] for n in full]
    return {n: n for n in full} | {
        s: n for s, n in zip(short, full) if short.count(s) == 1 and re.search(r"_|[a-z][A-Z]", s)
    }


def link(code: str) -> str:
    """A file or library name in backticks, linked to its page."""
    if code in pages():
        return f"[`{code}`](/{pages()[code]})"
    if code in names():
        return f"{{py:obj}}`{code} <{names()[code]}>`"
    return f"`{code}`"


def linked(text: str) -> str:
    """Markdown with links on backticked files and names, except in code blocks, headings and links."""
    out, fence = [], ""
    for line in text.split("\n"):
        mark = re.match(r"\s*(`{3,}|~{3,}|:{3,})", line)
        if mark and not mark[1].startswith(":"):
            fence = "" if fence and mark[1].startswith(fence) else fence or mark[1]
        out.append(
            line
            if mark or fence or line.startswith("#")
            else re.sub(r"(?<![`\[}])`([\w./*-]+)`(?![`\]])", lambda m: link(m[1]), line)
        )
    return "\n".join(out)


def displayed(text: str) -> str:
    """Markdown with each displayed equation as a paragraph, as MyST needs; side-by-side equations are stacked."""

    def below(m):
        return (
            "\n\n$$"
            + (rf"\begin{{gathered}}{m[1]}\end{{gathered}}".replace(r"\qquad", r"\\") if r"\qquad" in m[1] else m[1])
            + "$$\n\n"
        )

    return re.sub(r"\n*^\$\$(.+?)\$\$[ \t]*$\n*", below, text, flags=re.M | re.S)


def text_of(source: str) -> str:
    """A notebook's Markdown in MyST's form."""
    return linked(displayed(source))


# Definitions, from the source of exported cells


def comments(source: str) -> dict:
    """Line number -> comment."""
    return {
        t.start[0]: t.string.lstrip("# ").strip()
        for t in tokenize.generate_tokens(io.StringIO(source).readline)
        if t.type == tokenize.COMMENT
    }


def text_in(node, values: dict) -> str:
    """A string in the source, with names replaced by the module's values."""
    if isinstance(node, ast.JoinedStr):
        return "".join(text_in(v, values) for v in node.values)
    if isinstance(node, ast.FormattedValue):
        return text_in(node.value, values)
    return text_in(values[node.id], values) if isinstance(node, ast.Name) else node.value


def annotated(node, values: dict):
    """An annotation; a module-level alias of Annotated[...] is replaced by its definition."""
    there = values.get(getattr(node, "id", None))
    return there if isinstance(there, ast.Subscript) and getattr(there.value, "id", "") == "Annotated" else node


def help_of(annotation, values: dict) -> str:
    """The help text of a command's parameter, Annotated[T, typer.Option(help=...)]."""
    found = [k.value for n in ast.walk(annotation or ast.Pass()) for k in getattr(n, "keywords", []) if k.arg == "help"]
    return text_in(found[0], values) if found else ""


def bare(node):
    """T of an annotation Annotated[T, ...]."""
    more = isinstance(node, ast.Subscript) and getattr(node.value, "id", "") == "Annotated"
    return node.slice.elts[0] if more else node


def signature(
    f: ast.FunctionDef, notes: dict, values: dict = {}
) -> tuple:  # signature, {parameter: comment}, comment on the return value
    """A function's signature and its parameters' comments (for a command: their help texts)."""
    a, said, first = f.args, {}, f.body[0]
    body = min(n.lineno for n in (first, *getattr(first, "decorator_list", [])))
    closed = (
        f.returns.end_lineno if f.returns else max(f.lineno, body - 1)
    )  # the signature's last line; its comment describes the return value
    every = [*a.posonlyargs, *a.args, *([a.vararg] if a.vararg else []), *a.kwonlyargs, *([a.kwarg] if a.kwarg else [])]
    ends = [
        min((x.lineno for x in every[i + 1 :]), default=f.returns.lineno if f.returns else body)
        for i in range(len(every))
    ]
    for arg, end in zip(every, ends):
        lines = range(arg.lineno, max(end, arg.lineno + 1)) if arg.lineno > f.lineno or end > arg.lineno else ()
        arg.annotation = annotated(arg.annotation, values)
        said[arg.arg] = help_of(arg.annotation, values) or " ".join(
            notes[n] for n in lines if n in notes and n != closed
        )
        arg.annotation = bare(arg.annotation)
    text = f"({ast.unparse(a)})" + (f" -> {ast.unparse(f.returns)}" if f.returns else "")
    return text, {k: v for k, v in said.items() if v and k != "self"}, notes.get(closed, "")


def constant_of(call, place: int, name: str) -> str:
    """An argument of a call if it is a constant, else empty."""
    value = next(
        (k.value for k in call.keywords if k.arg == name), call.args[place] if len(call.args) > place else None
    )
    return str(value.value) if isinstance(value, ast.Constant) else ""


def fields(c: ast.ClassDef, notes: dict) -> list:  # (name, type, default, meaning)
    """A class's typed fields. A recipe field's meaning is in its `spec`, any other field's in its comment."""
    rows = []
    for n in c.body:
        if not isinstance(n, ast.AnnAssign):
            continue
        spec = isinstance(n.value, ast.Call) and getattr(n.value.func, "id", "") == "spec"
        default = n.value.args[0] if spec else n.value
        meaning = constant_of(n.value, 1, "text") if spec else notes.get(n.end_lineno, "")
        rows.append((n.target.id, ast.unparse(bare(n.annotation)), ast.unparse(default) if default else "", meaning))
    return rows


def definitions(path: Path) -> list:  # of dicts with name, kind, cell, node, notes, values
    """A notebook's exported definitions, in order; the first one wins if a name is defined twice."""
    found = {}
    for i, cell in enumerate(read_nb(path).cells):
        if cell.cell_type != "code" or not re.search(r"^#\|\s*exports?\b", cell.source, re.M):
            continue
        notes = comments(cell.source)
        for node in ast.parse(cell.source).body:
            for name, kind in defined(node):
                found.setdefault(name, {"name": name, "kind": kind, "cell": i, "node": node, "notes": notes})
    values = {
        n: d["node"].value
        for n, d in found.items()
        if isinstance(d["node"], ast.Assign) and defined(d["node"]) == [(n, "data")]
    }
    return [d | {"values": values} for d in found.values()]


def defined(node) -> list:  # (name, kind)
    """Public names defined by a statement."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        made = [(node.name, "function")]
    elif isinstance(node, ast.ClassDef):
        made = [(node.name, "class")]
    else:
        made = (
            [
                (t.id, "data")
                for t in getattr(node, "targets", [getattr(node, "target", None)])
                for t in getattr(t, "elts", [t])
                if isinstance(t, ast.Name)
            ]
            if isinstance(node, (ast.Assign, ast.AnnAssign))
            else []
        )
    return [(n, k) for n, k in made if not n.startswith("_")]


def module_of(path: Path) -> str | None:
    """The module exported from a notebook."""
    found = re.search(
        r"^#\|\s*default_exp\s+(\S+)", "\n".join(c.source for c in read_nb(path).cells if c.cell_type == "code"), re.M
    )
    return f"scir.{found[1]}" if found else None


def described(d: dict, module: str) -> str:
    """A definition as a directive of Sphinx's Python domain, so that index and search include it."""
    node, notes, inside = d["node"], d["notes"], []
    text, options = d["name"], [f":module: {module}"]
    if d["kind"] == "function":
        shown, said, returned = signature(node, notes, d["values"])
        text += shown
        inside = [plain(ast.get_docstring(node) or ""), *params(said, returned)]
    elif d["kind"] == "class":
        inside = [plain(ast.get_docstring(node) or ""), field_table(fields(node, notes)), *methods(node, notes, module)]
    else:
        value = ast.unparse(node.value) if node.value else ""
        if value and len(value) <= 90 and not isinstance(node.value, ast.Tuple):
            options.append(":value: '" + value.replace("'", "''") + "'")
        inside = [plain(notes.get(node.end_lineno, ""))]
    return directive(f"py:{d['kind']}", text, options, inside)


def directive(kind: str, text: str, options: list, inside: list) -> str:
    fence = "`" * (6 if kind in ("py:class", "py:function", "py:data") else 4)
    return "\n".join([f"{fence}{{{kind}}} {text}", *options, "", "\n\n".join(filter(None, inside)), fence])


def params(said: dict, returned: str) -> list:
    """A field list of parameters."""
    field = "yields" if returned.startswith("yields ") else "returns"
    rows = [f":param {k}: {plain(v)}" for k, v in said.items()] + (
        [f":{field}: {plain(returned.removeprefix('yields '))}"] if returned else []
    )
    return ["\n".join(rows)] if rows else []


def field_table(rows: list) -> str:
    """A class's fields as a table."""
    if not rows:
        return ""
    code = lambda s: "`" + s.replace("|", "\\|").replace("\n", " ") + "`" if s and len(s) <= 60 else "…" if s else ""
    return "| field | type | default | meaning |\n|---|---|---|---|\n" + "\n".join(
        f"| `{n}` | {code(t)} | {code(v)} | {plain(m)} |" for n, t, v, m in rows
    )


def methods(c: ast.ClassDef, notes: dict, module: str) -> list:
    """A class's public methods and properties that have a docstring."""
    out = []
    for f in c.body:
        marks = {ast.unparse(x).split("(")[0] for x in getattr(f, "decorator_list", [])}
        if (
            not isinstance(f, ast.FunctionDef)
            or f.name.startswith("_")
            or marks & {"field_validator", "model_validator"}
            or not ast.get_docstring(f)
        ):
            continue
        f.args.args = f.args.args[1:]
        text, said, returned = signature(f, notes)
        prop = bool(marks & {"property", "cached_property"})
        out.append(
            directive(
                "py:property" if prop else "py:method",
                f"{c.name}.{f.name}" + ("" if prop else text),
                [f":module: {module}"],
                [plain(ast.get_docstring(f)), *params(said, returned)],
            )
        )
    return out


# Notebooks


def heading(source: str, path: Path, module: str | None) -> str:
    """A first cell: title, source of the page, summary as a paragraph, and the rest."""
    title, _, rest = source.partition("\n")
    where = (f"`{module}`, " if module else "") + f"from `{path.relative_to(ROOT)}`"
    return f"{title}\n\n{{.origin}}\n{where}\n\n" + text_of(re.sub(r"^> ?", "", rest.lstrip("\n"), flags=re.M))


def code_cell(cell, directives: dict, module: str | None, made: list) -> list:
    """A code cell for the reader: exported definitions are documented, with their source folded."""
    source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M).strip()
    kept = nbformat.v4.new_code_cell(source, outputs=[nbformat.from_dict(dict(o)) for o in cell.get("outputs", [])])
    if "default_exp" in directives or not source:
        return []
    if directives.get("echo:", [""])[0] == "false":
        kept.metadata.tags = ["remove-input"]
    if not directives.keys() & {"export", "exports"}:
        return [kept]
    if all(isinstance(n, (ast.Import, ast.ImportFrom)) for n in ast.parse(source).body):
        return []
    kept.metadata.tags = ["hide-input"]
    return [nbformat.v4.new_markdown_cell("\n\n".join(described(d, module) for d in made))] * bool(made) + [kept]


def bridge(path: Path):
    """One of our notebooks as a plain notebook that myst-nb can render."""
    found, module, cells = definitions(path), module_of(path), []
    raw = read_nb(path)
    for i, cell in enumerate(raw.cells):
        cell["place"] = i
    reader = NBProcessor(nb=raw, procs=PROCESSORS)
    reader.process()
    for cell in reader.nb.cells:
        if cell.cell_type == "markdown":
            cells.append(
                nbformat.v4.new_markdown_cell(
                    text_of(cell.source) if cell["place"] else heading(cell.source, path, module)
                )
            )
        elif cell.cell_type == "code":
            cells += code_cell(cell, cell.directives_, module, [d for d in found if d["cell"] == cell["place"]])
    for i, cell in enumerate(cells):
        cell.id = f"c{i}"
    info = {
        "kernelspec": {"name": "python3", "display_name": "python3", "language": "python"},
        "language_info": {"name": "python", "pygments_lexer": "ipython3"},
    }
    return nbformat.v4.new_notebook(cells=cells, metadata=info)


# Building


def mathjax() -> Path:
    """MathJax's self-contained file, from npm; cached outside the site, with the archive's hash checked."""
    archive = CACHE / f"{MATHJAX.replace('@', '-')}.tgz"
    if not archive.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        if not shutil.which("npm"):
            sys.exit("docs: npm not found; it downloads MathJax; install it (Debian: apt install npm)")
        done = subprocess.run(
            ["npm", "pack", MATHJAX, "--silent", "--pack-destination", str(CACHE)], capture_output=True, text=True
        )
        if done.returncode:
            sys.exit(f"docs: npm pack {MATHJAX} failed: {' '.join((done.stderr or done.stdout).split())[:200]}")
    if base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode() != MATHJAX_SHA512:
        sys.exit(f"docs: {archive} is not the tested {MATHJAX} (hash differs); delete it and rerun")
    with tarfile.open(archive) as t:
        (CACHE / "tex-svg.js").write_bytes(t.extractfile("package/es5/tex-svg.js").read())
    return CACHE / "tex-svg.js"


def write_source() -> None:
    """Write all pages to the folder that Sphinx reads."""
    from pages import MADE, extra

    shutil.rmtree(SOURCE, ignore_errors=True)
    shutil.copytree(ROOT / "docs", SOURCE, ignore=shutil.ignore_patterns("*.py", "__pycache__", "*.parquet"))
    for run in (SOURCE / "results").glob("*/results.md"):
        run.unlink()
    for path, page in notebooks().items():
        (SOURCE / page).parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(bridge(path), SOURCE / page)
    for page, text in extra().items():
        (SOURCE / page).parent.mkdir(exist_ok=True)
        (SOURCE / page).write_text(text)
    for page in SOURCE.glob("**/*.md"):
        page.write_text(
            linked(
                re.sub(
                    r"^<!-- made: (\w+)(.*?) -->$", lambda m: MADE[m[1]](*m[2].split()), page.read_text(), flags=re.M
                )
            )
        )
    (SOURCE / "_static").mkdir(exist_ok=True)
    for file in (mathjax(), ROOT / "docs" / "style.css"):
        shutil.copy(file, SOURCE / "_static")


if __name__ == "__main__":
    write_source()
    for folder in (SITE, CACHE / "html"):
        shutil.rmtree(folder, ignore_errors=True)
    options = ["-W", "--keep-going", "-q", "-b", "html", "-c", str(ROOT / "docs"), "-d", str(CACHE / "doctrees"), "-E"]
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", *options, str(SOURCE), str(CACHE / "html")]
    )  # myst-nb also writes files beside the pages
    if done.returncode:
        sys.exit(done.returncode)
    shutil.move(CACHE / "html", SITE)
    print(f"docs: {len(list(SITE.glob('**/*.html')))} pages, {(SITE / 'index.html').relative_to(ROOT)}")
