"""Gates: export and clean leave the tree as it is, and README.md is what nbs/index.ipynb renders to."""

import shutil, subprocess, sys, tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def readme() -> str:
    """nbs/index.ipynb as Markdown; outputs as indented blocks, no images."""
    from nbconvert import MarkdownExporter

    text, _ = MarkdownExporter(exclude_input=True).from_filename(str(ROOT / "nbs" / "index.ipynb"))
    return "\n".join(line.rstrip() for line in text.strip().splitlines()) + "\n"


def snapshot(folder: Path) -> dict:
    """Contents of the exported modules and the notebooks."""
    files = [*folder.glob("scir/**/*.py"), *folder.glob("nbs/**/*.ipynb")]
    return {f.relative_to(folder): f.read_bytes() for f in files if ".ipynb_checkpoints" not in f.parts}


def export_gate() -> list:
    """Files that nbdev_export or nbdev_clean would change, found on a copy of the tree."""
    with tempfile.TemporaryDirectory() as d:
        copy = Path(d) / "scir"
        for part in ("nbs", "scir"):
            shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
        for file in ("settings.ini", "pyproject.toml", "README.md"):
            shutil.copy(ROOT / file, copy)
        before = snapshot(copy)
        for command in ("nbdev_export", "nbdev_clean"):
            subprocess.run([str(Path(sys.executable).parent / command)], cwd=copy, check=True)
        after = snapshot(copy)
    return sorted(str(f) for f in before.keys() | after.keys() if before.get(f) != after.get(f))


def chatter() -> list:
    """Notebooks whose stored outputs hold warnings, and with them paths of the machine they ran on."""
    import nbformat

    return [
        f"{f.name}: a stored output is stderr; execute it again without warnings"
        for f in sorted(ROOT.glob("nbs/**/*.ipynb"))
        if any(o.get("name") == "stderr" for c in nbformat.read(f, 4).cells for o in c.get("outputs", []))
    ]


if __name__ == "__main__":
    if "--write-readme" in sys.argv:
        (ROOT / "README.md").write_text(readme())
        sys.exit()
    faults = [f"{f}: not what nbdev_export and nbdev_clean make; run `make export`" for f in export_gate()] + chatter()
    shown = ROOT / "README.md"
    if not shown.exists() or shown.read_text() != readme():
        faults.append("README.md: not what nbs/index.ipynb renders to; run `make export`")
    print("\n".join(faults) or "gates: export, clean and README leave the tree unchanged")
    sys.exit(bool(faults))
