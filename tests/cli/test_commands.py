"""Help, exit codes and JSON of every command."""

import json, os, re, shlex, shutil, signal, subprocess, sys, time
from pathlib import Path

import pandas as pd
import pytest
from typer.main import get_command
from typer.testing import CliRunner

from scir import __version__
from scir.cli import app, stdout_to_stderr
from scir.export.benchmarks import EXPORTS
from scir.export.folders import FOLDERS

from commands import PLAIN, TINY, one_line, works
from helpers import ROOT, SCIR


pytestmark = pytest.mark.usefixtures("at_root")


def test_help_has_an_example_of_each():
    said = works("export", "--help")
    assert all(f"--to {to}" in said for to in FOLDERS | EXPORTS) and "scir judge --model" in " ".join(
        works("judge", "--help").split()
    )


def test_fit_reward_says_how_good_it_is_and_is_a_reward_model(tmp_path):
    from scir.model.outside import reward_scores

    done = CliRunner().invoke(
        app,
        [
            "fit-reward",
            "--model",
            "data/models/tiny-random",
            "--pairs",
            "data/pairs.jsonl",
            "--limit",
            "40",
            "--out",
            str(tmp_path / "reward"),
        ],
    )
    assert done.exit_code == 0 and "pairs: 40" in done.output and "cross-validated: " in done.output
    assert len(reward_scores(str(tmp_path / "reward"), [("Q", "one"), ("Q", "two")])) == 2
    wrong = CliRunner().invoke(
        app,
        [
            "fit-reward",
            "--model",
            "data/models/tiny-random",
            "--pairs",
            "data/pairs.jsonl",
            "--split",
            "tests",
            "--out",
            str(tmp_path / "other"),
        ],
    )
    assert wrong.exit_code == 2 and "--split tests" in wrong.output and not (tmp_path / "other").exists()


COMMANDS = get_command(app).commands


LONG = {
    "scir run recipes/smol.yaml --set name=mine --set train.beta=0.2",
}  # a quarter of an hour each


def helped(*args, width=400):
    return subprocess.run(
        [SCIR, *args, "--help"], capture_output=True, text=True, env=PLAIN | {"COLUMNS": str(width)}, check=True
    ).stdout


def examples(name):
    "The examples in a command's help, as they are typed."
    lines = [l.strip().removeprefix("Examples: ") for l in re.sub(r"\\\s*\n\s*", "", helped(name)).splitlines()]
    return [l for l in lines if l.startswith(f"scir {name} ") or l == f"scir {name}"]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_examples_that_parse_and_every_parameter_its_help(name):
    found = examples(name)
    assert found and all(p.help for p in COMMANDS[name].params)
    for line in found:
        assert COMMANDS[name].make_context(name, shlex.split(line)[2:]).params


def test_help_fits_80_columns_and_examples_can_be_copied():
    for name in COMMANDS:
        text = helped(name, width=80)
        assert max(map(len, text.splitlines())) <= 80
        for line in COMMANDS[name].epilog.splitlines():
            assert line.strip() in [l.strip() for l in text.splitlines()], (name, line)


@pytest.fixture(scope="module")
def project(tmp_path_factory, tiny_run):
    "The project's folder as the examples expect it, with the tiny run in it."
    here = tmp_path_factory.mktemp("project")
    for name in ("nbs", "recipes", "docs", "constraints.txt", "data/pairs.jsonl", "data/prompts.jsonl"):
        (here / name).parent.mkdir(exist_ok=True)
        (here / name).symlink_to(ROOT / name)
    shutil.copytree(tiny_run, here / "data/runs/tiny")
    return here


OTHERS = ("--push", "alpaca_eval.json", "question.jsonl", "allenai/")  # somebody else's place or file


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_run(project, name):
    for line in examples(name):
        if line in LONG or any(word in line for word in OTHERS):
            continue
        done = subprocess.run(
            [SCIR, *shlex.split(line.replace("smollm2-135m-instruct", "tiny-random"))[1:]],
            cwd=project,
            env=PLAIN,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0 and done.stdout, (line, done.stderr[-2000:])
        if "--json" in line.split():
            json.loads(done.stdout)


def test_json_and_nothing_else(project):
    ask = lambda *args: subprocess.run([SCIR, *args, "--json"], cwd=project, env=PLAIN, capture_output=True, text=True)
    ran, stands, checked, made = (
        json.loads(ask(*args).stdout)
        for args in (
            ("run", "recipes/tiny.yaml"),
            ("status", "data/runs/tiny"),
            ("verify", "data/runs/tiny"),
            ("report", "data/runs/tiny"),
        )
    )
    assert (
        ran["run"] == "data/runs/tiny"
        and ran["steps"] == stands["steps"]
        and stands["counts"] == {"done": len(stands["steps"])}
        and {"step", "state", "why"} == set(stands["steps"][0])
    )
    table = pd.read_csv(project / "data/runs/tiny/report/inconsistency.csv")
    assert pd.DataFrame(ran["tables"]["inconsistency"]).equals(table) and ran["tables"] == made["tables"]
    assert checked["faults"] == [] and all(n["right"] == n["of"] > 0 for n in checked["checks"].values())


def test_a_damaged_run_is_said_in_json_too(project, tmp_path):
    shutil.copytree(project / "data/runs/tiny", tmp_path / "run")
    (tmp_path / "run/seed0/m1/scores.jsonl").unlink()
    done = subprocess.run(
        [SCIR, "verify", tmp_path / "run", "--json"], cwd=project, env=PLAIN, capture_output=True, text=True
    )
    assert (
        done.returncode == 1
        and {"check": "files", "what": "seed0/m1/scores.jsonl", "fault": "is gone (judge:seed0/m1)"}
        in json.loads(done.stdout)["faults"]
    )


def test_what_is_printed_on_the_way_goes_to_stderr_under_json(capfd):
    with stdout_to_stderr(True):
        print("said by us")
        subprocess.run(["echo", "said by another program"])
    with stdout_to_stderr(False):
        print("shown")
    found = capfd.readouterr()
    assert found.out == "shown\n" and "said by us" in found.err and "said by another program" in found.err


@pytest.mark.parametrize(
    "args, code, words",
    [
        (("--version",), 0, (f"scir {__version__}",)),
        (("--help",), 0, ("Exit codes", "130")),
        ((), 2, ("Usage: scir",)),
        (("jugde",), 2, ("'judge'", "scir --help")),
        (("--nothing",), 2, ("--nothing", "scir --help")),
        (("judge",), 2, ("--model", "scir judge --help")),
        (("judge", "--limit", "x"), 2, ("--limit", "scir judge --help")),
        (("sample", "--model", TINY, "--prompts", "p.jsonl", "--candidates", "0"), 2, ("--candidates",)),
        (("doctor", "--set", "train.beta=1"), 2, ("--recipe",)),
        (("doctor", "--gpu", "24"), 2, ("--recipe",)),
        (("status", "data/absent"), 1, ("not a run directory", "scir run")),
        (("run", "recipes/absent.yaml"), 1, ("recipes/",)),
        *(
            (("run", "recipes/absent.yaml", *more.split()), 2, (words, "scir run --help"))
            for more, words in (
                ("--jobs 2 --processes 2", "use one or the other"),
                ("--cluster cluster=local", "with --jobs"),
                ("--jobs 2 --cluster slurm --dry-run", "--cluster slurm: must be KEY=VALUE"),
                ("--jobs 2 --cluster timeout_min=[", "--cluster: invalid YAML value"),
                ("--jobs 0", "--jobs"),
                ("--processes 0", "--processes"),
            )
        ),
    ],
)
def test_exit_codes(args, code, words):
    done = CliRunner().invoke(app, args, prog_name="scir")
    assert done.exit_code == code and all(w in done.output for w in words), done.output
    if code and args:
        assert done.stdout == "" and len(done.stderr.strip().splitlines()) == 1 and done.stderr.startswith("scir: ")


@pytest.mark.parametrize("name", COMMANDS)
def test_debug_shows_the_traceback_of_every_command(name, monkeypatch, tmp_path):
    given = {
        "run": ["recipes/tiny.yaml"],
        "status": ["r"],
        "report": ["r"],
        "verify": ["r"],
        "judge": ["--model", TINY, "--pairs", "p"],
        "sample": ["--model", TINY, "--prompts", "p"],
        "export": [TINY, "--to", "mt_bench", "--data", "d", "--out", str(tmp_path / "o")],
        "fit-reward": ["--model", TINY, "--pairs", "p", "--out", "o"],
        "doctor": [],
        "testbed": ["--out", str(tmp_path / "t")],
    }[name]
    where = {
        "run": "runner.run.run_recipe",
        "status": "recipe.own_recipe",
        "verify": "recipe.own_recipe",
        "report": "report.document.report",
        "fit-reward": "data.load.load_pairs",
        "doctor": "cli.examine",
        "testbed": "data.testbed.write_testbed",
    }

    def broken(*a, **kw):
        raise LookupError("lost")

    monkeypatch.setattr(f"scir.{where.get(name, 'runner.work.silence_libraries')}", broken)
    plain, debug = (CliRunner().invoke(app, [name, *given, *more]) for more in ([], ["--debug"]))
    assert plain.exit_code == 1 and plain.stderr == "scir: lost\n" and isinstance(debug.exception, LookupError)


def test_a_package_that_is_missing_names_the_way_out(monkeypatch):
    def broken(*a):
        raise ModuleNotFoundError("No module named 'trl'", name="trl")

    monkeypatch.setattr("scir.cli.examine", broken)
    one_line(("doctor",), "No module named 'trl'", "pip install trl", "scir doctor")


def test_ctrl_c_of_a_run_is_one_line_and_the_run_goes_on(tmp_path):
    with open(tmp_path / "out", "w") as out, open(tmp_path / "err", "w") as err:
        process = subprocess.Popen(
            [SCIR, "run", "recipes/tiny.yaml", "--out", tmp_path / "run", "--set", "iterations=1"],
            cwd=ROOT,
            env=PLAIN,
            stdout=out,
            stderr=err,
            start_new_session=True,
        )
        deadline = time.time() + 60
        while "sft" not in (tmp_path / "out").read_text() and time.time() < deadline:
            time.sleep(0.1)
        time.sleep(2)  # the fork server is at its imports
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        assert process.wait(60) == 130
    said = (tmp_path / "err").read_text().splitlines()
    assert (
        said[-1] == "scir: interrupted; rerun the same command to resume"
        and "Traceback" not in " ".join(said)
        and (tmp_path / "run/manifest.json").exists()
    )


@pytest.mark.parametrize("args", [("status", "data/runs/tiny"), ("--help",), ("run", "recipes/tiny.yaml")])
def test_a_reader_that_leaves_is_no_fault(project, args):
    done = subprocess.Popen(
        [SCIR, *args], cwd=project, env=PLAIN, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    done.stdout.close()
    assert done.stderr.read() == "" and done.wait(60) == 1


def test_another_broken_pipe_is_a_fault(monkeypatch):
    def broken(*a):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("scir.runner.run.run_recipe", broken)
    one_line(("run", "recipes/tiny.yaml"), "Broken pipe")


def test_help_is_there_at_once():
    imported = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys\nfrom scir.cli import app\ntry: app(['--help'])\nexcept SystemExit: print(*sys.modules)",
        ],
        capture_output=True,
        text=True,
        env=PLAIN,
    ).stdout
    assert (
        not {"torch", "transformers", "pandas", "pydantic", "numpy"} & set(imported.split()[-1000:])
        and "scir.cli" in imported
    )
    took = []
    for _ in range(3):
        started = time.perf_counter()
        helped()
        took.append(time.perf_counter() - started)
    assert min(took) < 0.5


def test_a_shell_can_complete():
    words = {"COMP_WORDS": "scir ver", "COMP_CWORD": "1", "_SCIR_COMPLETE": "complete_bash"}
    assert subprocess.run([SCIR], env=PLAIN | words, capture_output=True, text=True).stdout.split() == ["verify"]


def test_a_run_tells_where_it_is_from_where_it_was_called(project):
    (project / "data/deep").mkdir(exist_ok=True)
    done = subprocess.run(
        [SCIR, "run", "../../recipes/tiny.yaml", "--json"],
        cwd=project / "data/deep",
        env=PLAIN,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout)
    assert Path(told["run"]) == project / "data/runs/tiny" and {s["state"] for s in told["steps"]} == {"done"}


def test_a_rehearsal_tells_where_the_run_is_from_where_it_was_called(project, monkeypatch):
    monkeypatch.chdir(project / "data")
    done = CliRunner().invoke(app, ["run", "../recipes/tiny.yaml", "--dry-run", "--json"])
    assert json.loads(done.stdout)["run"] == "runs/tiny"


def documented_runs() -> list:  # arguments
    "The `scir run` commands of README and of the results page."
    text = "\n".join((ROOT / page).read_text(encoding="utf-8") for page in ("README.md", "docs/results.md"))
    lines = text.replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("scir run recipes/")]


@pytest.mark.parametrize("words", documented_runs(), ids=lambda words: words[3])
def test_documented_runs_have_a_plan(words):
    done = CliRunner().invoke(app, [*words, "--dry-run"])
    assert done.exit_code == 0, done.output
