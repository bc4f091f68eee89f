"""kill -9 at random moments; each run ends, byte for byte, like the one that nobody killed."""

import os, random, signal, subprocess, time
from concurrent.futures import ThreadPoolExecutor

import psutil, pytest

from scir.recipe import load_recipe
from scir.runner.plan import plan
from scir.store import read_json

from harness import ENV, ROOT, SCIR, TALLY, equal


def started(recipe, folder):
    return subprocess.Popen(
        [SCIR, "run", recipe, "--out", str(folder)],
        cwd=ROOT,
        env=ENV,
        stdout=open(f"{folder}.log", "a"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def kill(process, victim):
    "kill -9: the run, the kernel that does the work, or all at once."
    try:
        below = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        below = []
    kernels = [p for p in below if p.name() != "git" and p.children() == [] and p.ppid() != process.pid]
    chosen = {"run": [process], "kernel": kernels or [process], "all": [process, *below]}[victim]
    for p in chosen:
        try:
            os.kill(p.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    process.wait(
        900
    )  # with its kernel dead it ends by itself, or goes on to its end where that kernel had done its work


def manifest(folder):
    try:
        return read_json(folder / "manifest.json", {})
    except ValueError:
        pytest.fail("a manifest is whole or not there")


def at_work(folder):
    "What a run is busy with."
    return next(iter(manifest(folder).get("begun", {})), "between steps").partition(":")[0]


def wait_for_whole_batches(process, folder):
    "Wait while a run samples in bfloat16: resumed responses then differ, because they depend on their batch."
    while process.poll() is None and any(folder.rglob("responses*.partial.jsonl")):
        if load_recipe(folder / "recipe.yaml").model.dtype == "float32":
            break
        time.sleep(0.01)


def killed_again_and_again(name, folder, times, delay, seed):
    "Start a run, kill it at a random step and a random while later, start it again; in the end let it end. The moments are spread over the whole run."
    rng, kills = random.Random(seed), 0
    for target in sorted(rng.randrange(len(plan(load_recipe(ROOT / f"recipes/{name}.yaml")))) for _ in range(times)):
        process = started(f"recipes/{name}.yaml", folder)
        while process.poll() is None and len(manifest(folder).get("steps", {})) < target:
            time.sleep(0.01)
        if rng.random() < 0.7:  # most of a tiny run is the starting of kernels: aim at their work
            while process.poll() is None and at_work(folder) == "between steps":
                time.sleep(0.002)
        time.sleep(rng.uniform(0, delay))
        wait_for_whole_batches(process, folder)
        if process.poll() is not None:
            break
        TALLY[name, at_work(folder)] += 1
        TALLY[f"{name} tried"] += 1
        kills += 1
        kill(process, rng.choice(("run", "kernel", "all")))
    last = started(f"recipes/{name}.yaml", folder)
    assert last.wait(1800) == 0, open(f"{folder}.log").read()[-3000:]
    return kills


def test_tiny_survives_thirty_kills(tiny, tmp_path):
    def chain(n):
        kills = killed_again_and_again("tiny", tmp_path / f"tiny{n}", 6, 0.3, n)
        equal(tmp_path / f"tiny{n}", tiny)
        TALLY["tiny survived"] += kills
        return kills

    done, n = 0, 0
    with ThreadPoolExecutor(2) as pool:
        while done < 30:
            done += sum(pool.map(chain, range(n, n + 2)))
            n += 2
    assert TALLY["tiny survived"] == TALLY["tiny tried"] == done >= 30


def test_smol_survives_five_kills(tmp_path):
    "The real model. The uninterrupted run goes on beside it, on the other core."

    def whole():
        return started("recipes/smol.yaml", tmp_path / "whole").wait(3600)

    with ThreadPoolExecutor(2) as pool:
        reference = pool.submit(whole)
        kills = pool.submit(killed_again_and_again, "smol", tmp_path / "smol", 5, 30, 0)
        assert kills.result() == 5 and reference.result() == 0
    equal(tmp_path / "smol", tmp_path / "whole")
    TALLY["smol survived"] += 5
