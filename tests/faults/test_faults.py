"""One fault after the other, in whole runs: each is said in one line, and when it is mended the run ends like the one that had none."""

import json, os, re, shutil, signal, subprocess, sys, time

import nbformat, psutil, pytest

from scir.store import read_json

from harness import ENV, ROOT, SCIR, SHORT, command, equal, one_line
from helpers import said, server


pytestmark = pytest.mark.usefixtures("fault")


def state(run, key):
    found = dict(re.match(r"(\S+)\s+(.*)", l).groups() for l in command("status", run).stdout.splitlines()[:-1])
    return found[key]


def run_into(folder, *settings, **kw):
    return command("run", "recipes/tiny.yaml", "--out", folder, *SHORT, *settings, **kw)


def mended(run, short):
    done = run_into(run)
    assert done.returncode == 0, done.stderr[-2000:]
    equal(run, short)


# the disk ------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    "A file system of a given size, that can grow."
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(kilobytes, *options):
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", ",".join([f"size={kilobytes}k", *options]), "tmpfs", str(folder)],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
        return folder

    yield mount
    subprocess.run(["umount", "-l", str(folder)], capture_output=True)


@pytest.mark.parametrize("kilobytes", [4, 60, 250, 700, 1200])
def test_a_full_disk(small_disk, short, kilobytes):
    folder = small_disk(kilobytes)
    one_line(run_into(folder / "run"), "the disk is full: free some space and rerun")
    subprocess.run(["mount", "-o", "remount,size=100m", str(folder)], check=True)
    mended(folder / "run", short)


def test_a_read_only_file_system(small_disk, short):
    folder = small_disk(100_000)
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
    one_line(run_into(folder / "run"), "Read-only file system", "let this user write there")
    subprocess.run(["mount", "-o", "remount,rw", str(folder)], check=True)
    mended(folder / "run", short)


def test_a_run_that_becomes_read_only_is_still_read(small_disk, short):
    folder = small_disk(100_000)
    shutil.copytree(short, folder / "run")
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
    steps = len(read_json(short / "manifest.json")["steps"])
    assert command("status", folder / "run").stdout.splitlines()[-1] == f"{steps} done"
    assert command("verify", folder / "run").returncode == 0


# broken files ---------------------------------------------------------------


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.parquet"])
def test_truncated_data(tmp_path, name):
    import pandas as pd

    path = tmp_path / name
    rows = pd.read_json(ROOT / "data/pairs.jsonl", lines=True)
    rows.to_json(path, orient="records", lines=True) if name.endswith("l") else rows.to_parquet(path)
    path.write_bytes(path.read_bytes()[:-100])
    one_line(run_into(tmp_path / "run", "--set", f"data.pairs={path}"), name, "cannot be read")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "damage, file",
    [
        ("truncated", "seed0/m1/responses.jsonl"),
        ("truncated", "seed0/m1/scores.jsonl"),
        ("truncated", "seed0/scir/m2/adapter/adapter_model.safetensors"),
        ("truncated", "report/pairs.parquet"),
        ("gone", "seed0/scir/m2/preferences.jsonl"),
        ("gone", "seed0/m0/evaluation/held-out.jsonl"),
    ],
)
def test_a_broken_file_of_a_run_is_made_again(short, tmp_path, file, damage):
    run = tmp_path / "run"
    shutil.copytree(short, run)
    if damage == "gone":
        (run / file).unlink()
    else:
        os.truncate(run / file, (run / file).stat().st_size - 20)
    found = command("verify", run)
    assert (
        found.returncode == 1
        and any(l.startswith(file.split("/adapter_model")[0].split("/pairs.par")[0]) for l in found.stderr.splitlines())
        and "margins: " in found.stdout
    )
    mended(run, short)


def test_a_damaged_manifest(short, tmp_path):
    shutil.copytree(short, tmp_path / "run")
    os.truncate(tmp_path / "run/manifest.json", 1000)
    one_line(run_into(tmp_path / "run"), "manifest.json: damaged", "remove it")
    (tmp_path / "run/manifest.json").unlink()
    mended(tmp_path / "run", short)


def waited_for(run, pattern, process):
    until = time.time() + 120
    while not list(run.glob(pattern)) and process.poll() is None and time.time() < until:
        time.sleep(0.005)


LONG = ("--set", "warm_start.epochs=12")


def test_half_written_checkpoints(tmp_path):
    "Killed in training; then the newest checkpoint loses the end of a file, and the one before is taken."
    run = tmp_path / "run"
    whole = run_into(tmp_path / "whole", *LONG)
    assert whole.returncode == 0
    process = subprocess.Popen(
        [SCIR, "run", "recipes/tiny.yaml", "--out", str(run), *SHORT, *LONG],
        cwd=ROOT,
        env=ENV,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    waited_for(run, "seed0/m1/checkpoints/checkpoint-*/files.json", process)
    time.sleep(0.5)
    for p in [*psutil.Process(process.pid).children(recursive=True), process]:
        p.kill()
    process.wait()
    newest = max(
        (run / "seed0/m1/checkpoints").glob("checkpoint-*/optimizer.pt"),
        key=lambda f: int(f.parent.name.rpartition("-")[2]),
    )
    os.truncate(newest, newest.stat().st_size // 2)
    done = run_into(run, *LONG)
    assert (
        done.returncode == 0
        and f"{newest.parent.name}: incomplete, removed" in done.stdout
        and "resuming from" in done.stdout
    ), done.stderr[-2000:]
    equal(run, tmp_path / "whole")


# memory ----------------------------------------------------------------------

MEMORY = """
import resource, sys
from scir.model.weights import for_scoring, load_tokenizer, save_tiny
from scir.recipe import parse_recipe
from scir.method.rewards import text_pair
from scir.method.scores import score, set_reference
from pathlib import Path
folder = Path(sys.argv[1])
recipe = parse_recipe({"model": {"name": str(save_tiny(folder/"model")), "dtype": "float32"}, "judge": {"batch_tokens": 10**6}})
model, tokenizer = for_scoring(recipe.model), load_tokenizer(recipe.model)
pairs = [text_pair(tokenizer, f"p{i}", f"Question {i}? " + "x" * 900, "a" * 300, "b" * 300, extra={"prompt_id": f"p{i}"}) for i in range(64)]
set_reference(model, pairs[:1], 10**6)
if sys.argv[2] == "little":
    now = int(next(l for l in open("/proc/self/status") if l.startswith("VmSize")).split()[1]) * 1024
    resource.setrlimit(resource.RLIMIT_AS, (now + 250 * 2**20,) * 2)
set_reference(model, pairs, 10**6)
score(model, tokenizer, pairs, recipe, folder/f"{sys.argv[2]}.jsonl")
"""


def test_memory_runs_out_in_earnest(tmp_path):
    "The system refuses memory to a process that judges with far too large a budget."
    done = {
        how: subprocess.run(
            [sys.executable, "-c", MEMORY, str(tmp_path), how], cwd=ROOT, env=ENV, capture_output=True, text=True
        )
        for how in ("enough", "little")
    }
    assert all(d.returncode == 0 for d in done.values()), done["little"].stderr[-2000:]
    assert "out of memory: batches of at most" in done["little"].stdout and "out of memory" not in done["enough"].stdout
    rows = [[json.loads(l) for l in (tmp_path / f"{how}.jsonl").open()] for how in ("enough", "little")]
    assert len(rows[0]) == len(rows[1]) == 64 and all(
        a["margins"] == pytest.approx(b["margins"], abs=1e-3) for a, b in zip(*rows)
    )


def test_a_kernel_that_is_killed(short, tmp_path):
    run = tmp_path / "run"
    process = subprocess.Popen(
        [SCIR, "run", "recipes/tiny.yaml", "--out", str(run), *SHORT],
        cwd=ROOT,
        env=ENV,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    waited_for(run, "seed0/m1/checkpoints/checkpoint-*", process)
    kernel = next(p for p in psutil.Process(process.pid).children(recursive=True) if p.ppid() != process.pid)
    kernel.send_signal(signal.SIGKILL)
    process.returncode = process.wait(60)
    one_line(
        subprocess.CompletedProcess([], process.returncode, "", process.stderr.read()),
        "warm_start:seed0/m1: its kernel was killed",
        "rerun",
    )
    assert "failed" in state(run, "warm_start:seed0/m1")
    errors = [
        o.evalue
        for c in nbformat.read(run / "notebooks/warm_start-seed0-m1.ipynb", 4).cells
        for o in c.get("outputs", [])
        if o.output_type == "error"
    ]
    assert len(errors) == 1 and "its kernel was killed" in errors[0]
    mended(run, short)


# training --------------------------------------------------------------------


def test_a_loss_that_is_not_finite(tmp_path):
    run, settings = tmp_path / "run", ("--set", "warm_start.learning_rate=1.0e+30", "--set", "warm_start.epochs=4")
    one_line(run_into(run, *settings), "FloatingPointError", "at step", "rows ['", "learning rate")
    assert state(run, "warm_start:seed0/m1").startswith("failed") and list(
        run.glob("seed0/m1/checkpoints/checkpoint-*/files.json")
    )
    cells = nbformat.read(run / "notebooks/warm_start-seed0-m1.ipynb", 4).cells
    assert any("FloatingPointError" in "".join(o.get("traceback", [])) for c in cells for o in c.get("outputs", []))


# servers ---------------------------------------------------------------------

BROKEN = [(429, '{"error": "slow down"}', 0), (500, "{}", 0), (200, "<html>busy</html>", 0)]


def test_a_server_that_breaks_down_and_comes_back_shakily(short, tmp_path):
    "Three answers, then busy, broken or garbled; later two of three requests fail. What was answered is not asked again."
    run, later, answers = tmp_path / "run", [], []
    shutil.copytree(short, run)

    def reply(n, body, headers):
        if n % 3 if later else len(answers) >= 3:
            return BROKEN[n % 3]
        answers.append(body)
        return 200, said("A"), 0

    def steps():
        return {k: s for k, s in read_json(run / "manifest.json")["steps"].items() if k.startswith("align")}

    with server(reply) as (url, seen):
        settings = ("--set", f"alignment.judge={url}")
        done = run_into(run, *settings)
        assert done.returncode == 0 and "align:seed0/scir/m2 is incomplete: " in done.stdout
        first, lacking = len(answers), sum(s["summary"]["unanswered"] for s in steps().values())
        assert first >= 3 and lacking == sum(sum(s["summary"]["failures"].values()) for s in steps().values()) > 0
        assert all(state(run, k).startswith("incomplete") for k in steps())
        later.append(True)
        for _ in range(3):
            assert run_into(run, *settings).returncode == 0
            if all(state(run, k) == "done" for k in steps()):
                break
    assert state(run, "report") == "done"
    assert len(answers) == first + lacking
    assert not sum(s["summary"]["invalid"] for s in steps().values())


def test_a_server_that_refuses_the_key(short, tmp_path):
    shutil.copytree(short, tmp_path / "run")
    with server(lambda *_: (401, "{}", 0)) as (url, _):
        done = run_into(
            tmp_path / "run", "--set", f"alignment.judge={url}", env={"OPENAI_API_KEY": "sk-a-very-secret-key"}
        )
    one_line(done, "the server answers 401", "OPENAI_API_KEY")
    assert (
        not [f for f in (tmp_path / "run").rglob("*") if f.is_file() and b"sk-a-very" in f.read_bytes()]
        and "sk-a-very" not in done.stdout + done.stderr
    )
