"""What the packaging files say of the same thing, and the wheel outside the checkout."""

import configparser, json, os, re, subprocess, sys, zipfile

import pytest, yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import scir


if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from helpers import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SETTINGS = configparser.ConfigParser()
SETTINGS.read(ROOT / "settings.ini")
SETTINGS = SETTINGS["DEFAULT"]
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text())
UNTESTED = {"gpu", "vllm"}  # extras that need a card


def pins():
    lines = [l.split("#")[0].strip() for l in (ROOT / "constraints.txt").read_text().splitlines()]
    return {
        r.name.lower().replace("_", "-"): next(iter(r.specifier)).version
        for r in map(Requirement, filter(None, lines))
        if not r.marker or r.marker.evaluate()
    }


def test_one_version():
    assert SETTINGS["version"] == scir.__version__ == CITATION["version"] and "version" in PROJECT["dynamic"]
    assert f"## {scir.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_settings_and_pyproject_agree():
    assert SETTINGS["description"] == PROJECT["description"] and SETTINGS["lib_name"] == PROJECT["name"]
    assert SETTINGS["keywords"].split() == PROJECT["keywords"]
    assert (
        SETTINGS["license"] == "apache2"
        and PROJECT["license"] == CITATION["license"] == "Apache-2.0"
        and "Apache License" in (ROOT / "LICENSE").read_text()
    )
    python = SpecifierSet(PROJECT["requires-python"])
    assert SETTINGS["min_python"] in python and f"3.{int(SETTINGS['min_python'].split('.')[1]) - 1}" not in python
    assert all(
        c.rpartition(" ")[2] in python
        for c in PROJECT["classifiers"]
        if c.startswith("Programming Language :: Python :: 3.")
    )
    assert SETTINGS["requirements"] == SETTINGS["dev_requirements"] == ""  # pyproject.toml alone names dependencies


@pytest.mark.parametrize("extra", ["", *sorted(PROJECT["optional-dependencies"].keys() - UNTESTED)])
def test_every_dependency_has_a_pin_that_satisfies_it(extra):
    wanted, pinned = (
        map(Requirement, PROJECT["optional-dependencies"][extra] if extra else PROJECT["dependencies"]),
        pins(),
    )
    for r in wanted:
        if r.name != "scir" and (not r.marker or r.marker.evaluate()):
            assert pinned.get(r.name.lower().replace("_", "-")) in r.specifier, r


def test_extras_are_those_that_the_docs_name():
    text = "".join(
        f.read_text() for f in (ROOT / "README.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("nbs/**/*.ipynb"))
    )
    named = {e for found in re.findall(r"scir\[([a-z,]+)\]", text) for e in found.split(",")}
    assert named and {"gpu", "vllm", "eval", "docs", "dev"} | named <= PROJECT["optional-dependencies"].keys()


def test_environment_is_the_project_with_its_constraints():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert environment["name"] == PROJECT["name"]
    conda, pip = (
        [d for d in environment["dependencies"] if isinstance(d, str)],
        next(d["pip"] for d in environment["dependencies"] if isinstance(d, dict)),
    )
    python = next(d for d in conda if d.startswith("python="))
    assert python.removeprefix("python=") in SpecifierSet(PROJECT["requires-python"])
    assert pip == ["-c constraints.txt", "-e .[dev]"]


def test_citation_is_complete():
    assert {"cff-version", "message", "title", "authors", "type"} <= CITATION.keys()
    assert CITATION["references"][0]["url"].endswith("2502.08922")


def test_contributing_names_commands_that_exist():
    text, make = (ROOT / "CONTRIBUTING.md").read_text(), (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"`?make ([a-z-]+)", text)):
        assert f"\n{target}:" in make, target
    for path in set(re.findall(r"`((?:nbs|tests|docs|data)/[\w./-]*)`", text)):
        assert (ROOT / path).exists(), path


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "-q",
            "--no-deps",
            "--no-build-isolation",
            "--disable-pip-version-check",
            "-w",
            str(folder),
            str(ROOT),
        ],
        check=True,
    )
    return next(folder.glob("*.whl"))


def test_wheel_holds_what_a_run_needs_and_no_more(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    shipped = {n.removeprefix("scir/shipped/") for n in names if n.startswith("scir/shipped/")}
    ours = {
        str(f.relative_to(ROOT))
        for pattern in ("recipes/*.yaml", "nbs/run/*.ipynb", "data/*.jsonl", "data/testbed/*")
        for f in ROOT.glob(pattern)
    }
    assert shipped == ours
    assert {str(f.relative_to(ROOT)) for f in ROOT.glob("scir/**/*.py")} == {n for n in names if n.endswith(".py")}


def test_wheel_runs_outside_the_checkout(wheel, tmp_path):
    "Its own environment is `make test-wheel`; here the package alone is another."
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    zipfile.ZipFile(wheel).extractall(site)
    scir_ = lambda *words: subprocess.run(
        [sys.executable, "-c", "from scir.cli import app; app()", *words],
        cwd=elsewhere,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"},
    )
    done = scir_("run", "recipes/tiny.yaml", "--set", "iterations=1")
    assert done.returncode == 0, done.stderr
    assert f"data/pairs.jsonl: no such file in {elsewhere}; using the one that comes with scir" in done.stdout
    manifest = json.loads((elsewhere / "data/runs/tiny/manifest.json").read_text())
    assert manifest["steps"]["report"]["commit"] is None and (elsewhere / "data/runs/tiny/report/results.md").exists()
    again = scir_("status", "data/runs/tiny")
    assert again.returncode == 0 and "stale" not in again.stdout and "missing" not in again.stdout, again.stdout
    assert not [f for f in site.rglob("*") if f.suffix == ".ipynb" and "runs" in f.parts]
    wrong = scir_("run", "recipes/absent.yaml")
    assert wrong.returncode == 1 and "recipes/tiny.yaml" in wrong.stderr and len(wrong.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("given", [{}, {"OMP_WAIT_POLICY": "ACTIVE"}, {"GOMP_SPINCOUNT": "7"}], ids=str)
def test_threads_do_not_spin_unless_the_user_says_so(given):
    "OpenMP reads this when torch is loaded, so it has to be there as soon as scir is."
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    env = {k: v for k, v in os.environ.items() if k not in names} | given
    code = f"import scir, sys, os; print([os.environ.get(n) for n in {names}], 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True)
    expected = given or {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000"}
    assert done.stdout.strip() == f"{[expected.get(n) for n in names]} False", done.stderr
