"""Steps side by side: two arms and two seeds at once are one run with one report, the same as one after another."""

import multiprocessing, os, re, subprocess, sys, time
from concurrent.futures import BrokenExecutor, Future
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest

from scir.recipe import load_recipe, notebook_folder
from scir.runner import parallel
from scir.runner.execute import notebook_of
from scir.runner.locks import is_locked
from scir.runner.manifest import now
from scir.runner.parallel import visible_gpus, run_step, run_parallel
from scir.runner.plan import Step, file_name, prerequisites, plan
from scir.runner.run import run_recipe
from scir.runner.state import State
from scir.runner.work import open_run, reason
from scir.store import hash_path, read_json

from helpers import ROOT


SWEEP = ("--set", "seeds=[0, 1]", "--set", "iterations=1")


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    "tiny, two arms, two seeds, two jobs; killed after its first steps, and begun again."
    folder = tmp_path_factory.mktemp("sweep") / "tiny"
    command = [
        str(Path(sys.executable).parent / "scir"),
        "run",
        "recipes/tiny.yaml",
        *SWEEP,
        "--jobs",
        "2",
        "--out",
        str(folder),
    ]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    first = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for line in first.stdout:
        if "evaluate:seed0/m1: to do" in line:
            break
    first.kill()
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, done.stdout


def test_a_sweep_is_resumed_and_is_one_run_with_one_report(sweep):
    folder, said = sweep
    assert "warm_start:seed0/m1: unchanged" in said and len(re.findall(": done(?!:)", said)) == len(
        read_json(folder / "manifest.json")["steps"]
    ) - said.count(": unchanged")
    models = pd.read_parquet(folder / "report/models.parquet")
    assert {(s, a) for s, a in zip(models.seed, models.arm)} >= {(s, a) for s in (0, 1) for a in ("srlm", "scir")}
    assert set(pd.read_csv(folder / "report/inconsistency.csv").model) == {"M_0", "M_1", "srlm M_2", "scir M_2"}


def test_a_sweep_gives_what_one_step_after_another_gives(sweep, tiny_run):
    for f in (
        "m1/adapter",
        "m1/responses.jsonl",
        "m1/scores.jsonl",
        "scir/m2/adapter",
        "scir/m2/preferences.jsonl",
        "srlm/m2/adapter",
        "scir/m2/evaluation/held-out.jsonl",
    ):
        assert hash_path(sweep[0] / "seed0" / f) == hash_path(tiny_run / "seed0" / f) != "absent", f


def test_every_recorded_hash_of_a_sweep_holds(sweep):
    done = subprocess.run(
        [str(Path(sys.executable).parent / "scir"), "verify", str(sweep[0])], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


class At:
    "An executor whose jobs end one by one, when their turn comes."

    def __init__(self, failing=()):
        self.order, self.most, self.open, self.failing = [], 0, {}, failing

    def submit(self, function, run, step, notebooks):
        assert not {s for s in prerequisites(self.recipe)[step]} - {s for s in self.order}, (
            f"{step.key} before what it needs"
        )
        self.open[step], self.most = Future(), max(self.most, len(self.open) + 1)
        at, job = self, self.open[step]

        class Job:
            def done(_):
                if step == next(iter(at.open)):
                    at.order.append(step)
                return step in at.order

            def result(_):
                at.open.pop(step)
                if step.key in at.failing:
                    raise ValueError("no luck")

        return Job()


@pytest.fixture
def scheduled(monkeypatch):
    def go(at, jobs=3):
        recipe = at.recipe = load_recipe(ROOT / "recipes/tiny.yaml", ("seeds=[0,1]",))
        monkeypatch.setattr(parallel, "step_state", lambda *a: State("missing"))
        run_parallel(recipe, Path("x"), plan(recipe), at, jobs)
        return recipe

    return go


def test_steps_wait_for_what_they_need_and_no_longer(scheduled):
    at = At()
    recipe = scheduled(at)
    assert sorted(at.order) == sorted(plan(recipe)) and at.order[-1] == Step("report") and at.most == 3
    assert [s.key for s in at.order[:2]] == ["sft:seed0/sft", "sft:seed1/sft"]  # not after all of seed 0


def test_what_a_failed_step_is_not_needed_for_is_done(scheduled, capsys):
    at = At(failing=("optimise:seed0/scir/m2",))
    with pytest.raises(RuntimeError, match=r"steps not done; optimise:seed0/scir/m2: no luck$"):
        scheduled(at)
    done = {s.key for s in at.order}
    assert (
        "evaluate:seed1/scir/m3" in done
        and "evaluate:seed0/srlm/m3" in done
        and "evaluate:seed0/scir/m2" not in done
        and "report" not in done
    )
    assert "evaluate:seed0/scir/m2: failed: needs optimise:seed0/scir/m2" in capsys.readouterr().out


def test_gpus_are_those_that_this_process_may_use(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    assert visible_gpus() == ["2", "5"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    assert visible_gpus() == ["0", "1", "2"]


def test_gpus_are_dealt_out_among_the_processes(monkeypatch):
    "And each ends with the process that started it."
    owners = []
    monkeypatch.setattr(parallel, "exit_with", owners.append)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    taken, found = multiprocessing.get_context("spawn").Value("i", 0), []
    for _ in range(3):
        parallel._job(["2", "5"], taken, 7)
        found.append(os.environ["CUDA_VISIBLE_DEVICES"])
    assert found == ["2", "5", "2"] and owners == [7] * 3


def test_a_process_that_is_killed_leaves_others_to_go_on(tmp_path):
    with parallel.job_executor(tmp_path, 2) as at:
        with pytest.raises(BrokenExecutor) as killed:
            at.submit(os._exit, 1).result()
        assert "killed, probably out of memory; rerun, with fewer --jobs if needed" in reason(killed.value)
        assert at.submit(divmod, 17, 5).result() == (3, 2)


def script(folder, text):
    (folder / "script.py").write_text(text)
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "script.py"], cwd=folder, env=env, capture_output=True, text=True, timeout=200
    )


CTRL_C = """
import os, signal, time
from pathlib import Path
from scir.runner.plan import Step
from scir.runner.parallel import job_executor, run_step
if __name__ == "__main__":
    os.setpgrp()
    with job_executor(Path("run"), 2) as at:
        jobs = [at.submit(run_step, Path("run"), Step("report"), Path("nowhere")) for _ in range(2)]
        try:
            os.killpg(0, signal.SIGINT)  # as a terminal does, while both are at their imports
            time.sleep(9)
        except KeyboardInterrupt: print(*(type(j.exception()).__name__ for j in jobs))
"""


def test_ctrl_c_is_heard_without_tracebacks(tmp_path):
    done = script(tmp_path, CTRL_C)
    assert (done.stdout, done.stderr) == ("KeyboardInterrupt KeyboardInterrupt\n", "")


SIGNALLED = """
import signal, time
from pathlib import Path
from scir.runner.parallel import job_executor, ctrl_c_allowed
def sleep():
    with ctrl_c_allowed(): time.sleep(600)
if __name__ == "__main__":
    try:
        with job_executor(Path("run"), 1) as at:
            job = at.submit(sleep)
            signal.raise_signal(signal.SIGINT)  # to this process alone, as kill -INT does
    except KeyboardInterrupt: print(type(job.exception()).__name__)
"""


def test_jobs_do_not_outlast_a_command_that_is_interrupted_alone(tmp_path):
    done = script(tmp_path, SIGNALLED)
    assert (done.stdout, done.stderr) == ("KeyboardInterrupt\n", "")


def test_settings_of_a_cluster_are_submitits(tmp_path, monkeypatch):
    asked = []

    class Executor:
        def __init__(self, *args, **kw):
            asked.append((args, kw))

        def update_parameters(self, **kw):
            asked.append(kw)

    monkeypatch.setitem(sys.modules, "submitit", SimpleNamespace(AutoExecutor=Executor))
    with parallel.job_executor(
        tmp_path / "x", 2, {"cluster": "slurm", "timeout_min": 5, "slurm_partition": "gpu"}
    ) as at:
        assert isinstance(at, Executor)
    assert asked == [
        ((tmp_path / "x/.jobs",), {"cluster": "slurm"}),
        {"name": "scir-x", "timeout_min": 5, "slurm_partition": "gpu"},
    ]


def test_a_cluster_is_not_ignored_where_one_job_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    asked = []
    monkeypatch.setattr("scir.runner.run.job_executor", lambda *a: asked.append(a) or nullcontext())
    monkeypatch.setattr("scir.runner.run.run_parallel", lambda *a: None)
    run_recipe(load_recipe("recipes/tiny.yaml"), tmp_path, cluster={"cluster": "slurm"})
    assert asked == [(tmp_path, 1, {"cluster": "slurm"})]


def test_a_job_of_an_earlier_command_is_waited_for(tmp_path, monkeypatch, capsys):
    "submitit's local cluster, a process per job; Slurm takes the same calls. The command was killed and begun again."
    pytest.importorskip("submitit")
    monkeypatch.chdir(ROOT)
    recipe, run = open_run("recipes/tiny.yaml", str(tmp_path))
    step = plan(recipe)[0]
    with parallel.job_executor(run, 1, {"cluster": "local", "timeout_min": 5}) as at:
        at.submit(run_step, run, step, notebook_folder())
        until = time.time() + 60
        while not (run / "notebooks").exists() and time.time() < until:
            time.sleep(0.1)
        assert is_locked(run, f"{file_name(step)}.job")
        begun = now()
        run_parallel(recipe, run, [step], at, 1)
    assert capsys.readouterr().out.endswith("sft:seed0/sft: done\n") and parallel.step_state(
        recipe, run, step
    ) == State("done")
    assert read_json(notebook_of(run, step))["metadata"]["papermill"]["start_time"] <= begun  # not executed again


def test_a_failed_job_of_a_cluster_is_one_line():
    utils = pytest.importorskip("submitit.core.utils")
    trace = "Job (task=0) failed during processing with trace:\n----------------------\nTraceback (most recent call last):\n  File x\nValueError: no luck\n\n----------------------\n"
    assert (
        reason(utils.FailedJobError(f"{trace}You can check full logs with 'job.stderr(0)'or at paths:\n  - x"))
        == "ValueError: no luck"
    )
    assert (
        reason(utils.UncompletedJobError("Job 7 not requeued because: timed-out"))
        == "Job 7 not requeued because: timed-out"
    )
