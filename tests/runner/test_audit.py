"""What a run says of itself: states with reasons, locks, failures, checkpoints, verification."""

import json, os, platform, shutil, subprocess, sys, time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from scir.cli import app
from scir.method.trainer import SEAL, last_checkpoint
from scir.recipe import load_recipe
from scir.runner import manifest, state as states
from scir.runner.execute import notebook_of, notebook_finished
from scir.runner.locks import file_lock
from scir.runner.manifest import note_failure, start_manifest
from scir.runner.plan import Step, file_name
from scir.runner.run import run_recipe
from scir.runner.state import differences, state, status
from scir.runner.verify import verify
from scir.runner.work import do, do_step, open_run, reason, start_step
from scir.store import HASHES, Journal, Prompt, hash_path, read_json, read_rows, unfinished, write_rows

from helpers import ROOT, edit, edited, scir


SAMPLE = Step("sample", "seed0/m1")


@pytest.fixture
def copy(tiny_run, tmp_path, monkeypatch):
    "A finished run of its own, and its recipe."
    monkeypatch.chdir(ROOT)
    shutil.copytree(tiny_run, tmp_path / "run")
    return load_recipe(tmp_path / "run/recipe.yaml"), tmp_path / "run"


def names(recipe, run):
    return {step.key: s.name for step, s in status(recipe, run)}


def why(recipe, run, key):
    return next(s.why for step, s in status(recipe, run) if step.key == key)


def test_a_finished_run_is_done_wherever_it_lies(copy):
    assert set(names(*copy).values()) == {"done"} and len(names(*copy)) == 22


def test_a_parameter_makes_its_stages_stale_and_all_that_follow_and_none_before(copy):
    recipe, run = load_recipe(copy[1] / "recipe.yaml", ("train.learning_rate=0.002",)), copy[1]
    found = names(recipe, run)
    assert {k for k, v in found.items() if v == "done"} == {
        "sft:seed0/sft",
        "warm_start:seed0/m1",
        "sample:seed0/m1",
        "judge:seed0/m1",
        "consistency:seed0/m1",
        "evaluate:seed0/m0",
        "evaluate:seed0/m1",
    }
    assert why(recipe, run, "optimise:seed0/scir/m2") == "train.learning_rate was 0.001, is 0.002"
    assert (
        why(recipe, run, "sample:seed0/scir/m2") == "waits for optimise:seed0/scir/m2; skipped if that changes nothing"
    )


def test_data_model_code_and_outputs_are_named(copy, monkeypatch):
    recipe, run = copy
    hashes = {
        "data/pairs.jsonl": "evaluate:seed0/m0",
        "data/models/tiny-random": "judge:seed0/m1",
        "02_sample.ipynb": "sample:seed0/m1",
    }
    for end, key in hashes.items():
        with monkeypatch.context() as m:
            for name in ("hash_path", "notebook_hash"):
                m.setattr(
                    states,
                    name,
                    lambda p, end=end, plain=getattr(states, name): "other" if str(p).endswith(end) else plain(p),
                )
            assert names(recipe, run)[key] == "stale" and {
                "data/pairs.jsonl": "data/pairs.jsonl",
                "data/models/tiny-random": "tiny-random",
                "02_sample.ipynb": "02_sample",
            }[end] in why(recipe, run, key)
    with monkeypatch.context() as m:
        edit(m, "stages.judge", "run")
        assert (
            why(recipe, run, "judge:seed0/m1") == "the code of scir.stages.judge changed"
            and state(recipe, run, SAMPLE).name == "done"
        )
        edit(m, "stages.sample", "run")
        assert why(recipe, run, SAMPLE.key) == "the code of scir.stages.sample changed"
    (run / "seed0/m1/scores.jsonl").unlink()
    assert (
        why(recipe, run, "judge:seed0/m1") == "seed0/m1/scores.jsonl is gone"
        and names(recipe, run)["report"] == "stale"
        and names(recipe, run)["sample:seed0/m1"] == "done"
    )


def test_the_next_status_reads_only_what_changed(copy, monkeypatch):
    "Hashes are kept in the run. A damaged file of them costs time only, and `verify` does not trust them."
    recipe, run = copy
    before, responses = status(recipe, run), run / "seed0/m1/responses.jsonl"
    with monkeypatch.context() as m:
        HASHES.clear()
        m.setattr(states, "stage_code", lambda sources: pytest.fail("parsed again"))
        m.setattr("scir.store._hash", lambda path, files: pytest.fail("read again"))
        assert status(recipe, run) == before
    (run / ".hashes.json").write_text("[1")
    HASHES.clear()
    assert status(recipe, run) == before
    times, text = responses.stat(), responses.read_text()
    responses.write_text(text[:-2] + "?\n")
    os.utime(responses, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert status(recipe, run) == before and faults(run)["files"] == ["seed0/m1/responses.jsonl"]
    responses.write_text(text + "\n")
    assert why(recipe, run, SAMPLE.key) == "seed0/m1/responses.jsonl has changed since it was written"


def test_an_older_manifest_is_stale(copy):
    recipe, run = copy
    manifest = read_json(run / "manifest.json")
    del manifest["steps"][SAMPLE.key]["inputs"]
    (run / "manifest.json").write_text(json.dumps(manifest))
    assert "earlier version" in why(recipe, run, SAMPLE.key)


def test_differences_are_phrases():
    before = {"field a": 1, "field b": 2, "data d": "x", "file f": "x", "code m": "x", "notebook n": "x"}
    assert differences(before, before) == []
    assert differences(
        before, {"field a": 5, "field c": 3, "data d": "y", "file f": "absent", "code m": "z", "notebook n": "z"}
    ) == [
        "a was 1, is 5",
        "c is new",
        "d changed",
        "f is gone",
        "the code of scir.m changed",
        "notebook n changed",
        "b is no longer used",
    ]


def test_a_failure_is_noted_until_the_next_try(copy, monkeypatch):
    recipe, run = copy

    def fails(*a):
        raise OSError(28, "No space left on device")

    (run / "seed0/m1/responses.jsonl").write_text("gone")
    with monkeypatch.context() as m:
        m.setattr("scir.stages.sample.run", fails)
        with pytest.raises(OSError):
            do("sample", recipe, run, "seed0/m1")
    assert (
        names(recipe, run)[SAMPLE.key] == "failed"
        and "No space left" in why(recipe, run, SAMPLE.key)
        and "rerun" in why(recipe, run, SAMPLE.key)
    )
    do("sample", recipe, run, "seed0/m1")
    assert set(names(recipe, run).values()) == {"done"}


def test_an_interrupted_step_says_what_it_has(copy):
    recipe, run = copy
    rows = (run / "seed0/m1/responses.jsonl").read_text().splitlines(True)
    (run / "seed0/m1/responses.jsonl").unlink()
    start_step(recipe, run, SAMPLE)
    unfinished(run / "seed0/m1/responses.jsonl").write_text("".join(rows[:5]))
    assert (
        names(recipe, run)[SAMPLE.key] == "missing"
        and why(recipe, run, SAMPLE.key) == "interrupted; will resume after 5 rows"
    )
    assert "interrupted" in scir("status", run).stdout


def test_a_part_that_was_whole_is_not_made_again(copy, monkeypatch):
    "An evaluation that is killed after its answers keeps them, under an unfinished name, and leaves none behind."
    recipe, run = copy
    step, answers = Step("evaluate", "seed0/m1"), run / "seed0/m1/evaluation/responses.jsonl"
    kept = answers.read_text()
    (run / "seed0/m1/evaluation/metrics.json").unlink()
    start_step(recipe, run, step)
    assert not answers.exists() and not unfinished(answers).exists()  # nothing of an older try
    answers.write_text(kept)
    monkeypatch.setattr(
        "scir.model.decoding.generate",
        lambda model, tokenizer, jobs, spec: iter(()) if not jobs else pytest.fail("sampled again"),
    )
    do_step(recipe, run, step)
    assert (
        answers.read_text() == kept
        and not list((run / "seed0/m1").rglob("*.partial.jsonl"))
        and names(recipe, run)[step.key] == "done"
    )


def test_files_that_are_written_at_once_leave_no_unfinished_ones(copy):
    recipe, run = copy
    step = Step("consistency", "seed0/m1")
    (run / "seed0/m1/consistency/metrics.json").unlink()
    start_step(recipe, run, step)
    (run / "seed0/m1/agreed.jsonl").write_text("{}\n")  # killed between its two outputs
    do_step(recipe, run, step)
    assert not list(run.rglob("*.partial.jsonl")) and set(names(recipe, run).values()) == {"done"}


def test_litter_of_a_kill_is_swept_and_nothing_else(copy):
    recipe, run = copy
    for f in ("seed0/m1/.scores.partial.jsonl.1.tmp", "report/.x.csv.1.tmp", ".mine.tmp"):
        (run / f).write_text("half")
    (run / "seed0/m1/.adapter.tmp").mkdir()
    for step in (Step("warm_start", "seed0/m1"), Step("judge", "seed0/m1"), Step("report")):
        start_step(recipe, run, step)
    assert [f.name for f in run.rglob("*.tmp")] == [".mine.tmp"]


def test_litter_of_what_is_at_work_is_left(copy, monkeypatch):
    "The manifest's is swept by who may write it, a notebook's when nobody executes it."
    recipe, run = copy
    litter = {
        run / f
        for f in (
            ".manifest.json.1.tmp",
            ".recipe.yaml.1.tmp",
            "notebooks/.judge-seed0-m1.ipynb.1.tmp",
            "notebooks/.sample-seed0-m1.ipynb.1.tmp",
        )
    }
    for f in litter:
        f.write_text("half")
    for name in ("start_manifest", "run_in_order"):
        monkeypatch.setattr(f"scir.runner.run.{name}", lambda *a: None)
    with file_lock(run, "judge-seed0-m1.job", 0, "x"):
        run_recipe(recipe, run)
    assert {*run.rglob("*.tmp")} == litter - {run / "notebooks/.sample-seed0-m1.ipynb.1.tmp"}
    with manifest.manifest_of(run):
        assert {f.name for f in run.rglob("*.tmp")} == {".judge-seed0-m1.ipynb.1.tmp"}


def test_code_that_changed_under_a_process_is_not_taken_for_the_new(copy, monkeypatch):
    "A kernel or a fork server that was started before an edit would do the step with the old code."
    recipe, run = copy
    now = states.SOURCES | {"stages.judge": states.SOURCES["stages.judge"] + "# a comment"}
    monkeypatch.setattr(states, "read_sources", lambda folder: now)
    states.check_code("judge")  # only a comment was edited, or a function that judging does not call
    now = edited(now, "stages.judge", "run")
    with pytest.raises(
        RuntimeError, match="the code of scir.stages.judge changed since this process started; restart it"
    ):
        start_step(recipe, run, Step("judge", "seed0/m1"))
    assert (run / "seed0/m1/scores.jsonl").exists()


def test_a_run_of_another_recipe_is_left_alone(copy):
    done = scir("run", "recipes/tiny.yaml", "--set", "name=other", "--out", copy[1])
    assert (
        done.returncode == 1
        and "belongs to recipe 'tiny', not 'other'" in done.stderr
        and set(names(*copy).values()) == {"done"}
    )


def test_a_notebook_does_not_change_the_recipe_of_a_run_at_work(holder, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    start_manifest(load_recipe("recipes/tiny.yaml", ("iterations=1",)), tmp_path)
    other = holder("run")
    with pytest.raises(RuntimeError, match=f"a `scir run` is using it .process {other.pid}"):
        open_run("recipes/tiny.yaml", str(tmp_path))
    assert load_recipe(tmp_path / "recipe.yaml").iterations == 1
    assert open_run(None, str(tmp_path))[0].iterations == 1  # as the run's own kernels do


def test_what_fails_after_the_work_is_noted_too(copy, monkeypatch):
    recipe, run = copy
    (run / "seed0/m1/responses.jsonl").unlink()

    def full(*a):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as m:
        m.setattr("scir.runner.work.record", full)
        with pytest.raises(OSError):
            do("sample", recipe, run, "seed0/m1")
    assert "No space left" in why(recipe, run, SAMPLE.key)


def test_an_unfinished_notebook_is_executed_again_and_its_step_is_not_done_again(copy):
    recipe, run = copy
    book = notebook_of(run, SAMPLE)
    assert notebook_finished(run, SAMPLE)
    half = json.loads(book.read_text())
    next(c for c in half["cells"][::-1] if c["cell_type"] == "code")["execution_count"] = None
    book.write_text(json.dumps(half))
    assert not notebook_finished(run, SAMPLE)
    before = read_json(run / "manifest.json")["steps"]
    done = scir("run", "recipes/tiny.yaml", "--out", run)
    assert (
        done.returncode == 0
        and "sample:seed0/m1: done: but its notebook is missing or incomplete; executing it again" in done.stdout
        and done.stdout.count(": unchanged") == 21
    )
    assert notebook_finished(run, SAMPLE) and read_json(run / "manifest.json")["steps"] == before


def rehearsed(monkeypatch, run, *words):
    monkeypatch.setattr(sys, "argv", ["scir", "run", "recipes/tiny.yaml", "--out", str(run), "--dry-run", *words])
    return CliRunner().invoke(app, sys.argv[1:])


def test_a_rehearsal_says_what_the_run_would_do(copy, monkeypatch):
    recipe, run = copy
    notebook_of(run, SAMPLE).unlink()
    said = rehearsed(monkeypatch, run).stdout
    assert (
        f"{SAMPLE.key}: done: but its notebook is missing" in said
        and said.count(": unchanged") == 21
        and "\non each of two machines: torchrun" in said
    )
    told = json.loads(rehearsed(monkeypatch, run, "--json", "--jobs", "2").stdout)
    assert {s["state"] for s in told["steps"]} == {"done"} and [s["step"] for s in told["steps"] if s["why"]] == [
        SAMPLE.key
    ]
    assert Path(told["run"]) == run and told["commands"] == {
        "on this machine": f"scir run recipes/tiny.yaml --out {run} --json --jobs 2"
    }  # steps side by side are not for several machines


@pytest.mark.parametrize(
    "setting, words",
    [
        ("arms=[external]", "labels.external"),
        ("name=other", "belongs to recipe 'tiny'"),
        ("judge.verdicts=[First, Second]", "'First' is not a single token"),
    ],
)
def test_a_rehearsal_refuses_what_the_run_would(copy, monkeypatch, setting, words):
    found = rehearsed(monkeypatch, copy[1], "--set", setting)
    assert found.exit_code == 1 and words in found.stderr and len(found.stderr.splitlines()) == 1


def test_an_interrupted_step_whose_inputs_changed_begins_anew(copy):
    recipe, run = copy
    (run / "seed0/m1/responses.jsonl").unlink()
    start_step(recipe, run, SAMPLE)
    unfinished(run / "seed0/m1/responses.jsonl").write_text("{}\n" * 5)
    changed = load_recipe(run / "recipe.yaml", ("sampling.temperature=0.5",))
    assert (
        why(changed, run, SAMPLE.key) == "inputs changed since it started; will restart"
        and why(recipe, run, SAMPLE.key) == "interrupted; will resume after 5 rows"
    )
    with file_lock(run, file_name(SAMPLE), 0, "x"):
        assert why(recipe, run, SAMPLE.key) == "running"


def test_unanswered_questions_leave_a_step_incomplete_and_are_asked_again(copy, monkeypatch):
    recipe, run = copy
    asked = []

    def call(recipe, run, node):
        asked.append(node)
        write_rows(run / node / "responses.jsonl", [{}])
        return {"unanswered": 2 if len(asked) == 1 else 0}

    monkeypatch.setattr("scir.stages.sample.run", call)
    (run / "seed0/m1/responses.jsonl").unlink()
    do("sample", recipe, run, "seed0/m1")
    assert state(recipe, run, SAMPLE) == ("incomplete", "2 questions without an answer; the next run asks them again")
    monkeypatch.setattr("scir.stages.judge.run", lambda *a: {})
    do("judge", recipe, run, "seed0/m1")
    assert len(asked) == 1  # good enough for what comes after
    do("sample", recipe, run, "seed0/m1")
    assert len(asked) == 2 and state(recipe, run, SAMPLE).name == "done"


# locks ---------------------------------------------------------------------

HOLD = "import sys, time; from pathlib import Path; from scir.runner.locks import file_lock\nwith file_lock(Path(sys.argv[1]), sys.argv[2], 0, 'x'):\n    print('held', flush=True); time.sleep(60)"


@pytest.fixture
def holder(tmp_path):
    def hold(what):
        p = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(tmp_path), what], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        held.append(p)
        assert p.stdout.readline() == "held\n"
        return p

    held = []
    yield hold
    for p in held:
        p.kill()


def test_the_second_run_says_so_and_stops(holder, tmp_path):
    other = holder("run")
    done = scir("run", "recipes/tiny.yaml", "--out", tmp_path)
    assert (
        done.returncode == 1
        and f"another `scir run` is using it (process {other.pid}); wait for it or stop it" in done.stderr
        and len(done.stderr.strip().splitlines()) == 1
    )
    assert not (tmp_path / "manifest.json").exists()
    other.kill()
    other.wait()
    with file_lock(tmp_path, "run", 0, "x"):
        pass  # the system frees what a killed process held


def test_an_owner_on_another_machine_is_named_with_it(tmp_path):
    with file_lock(tmp_path, "run", 0, "x"):
        assert (tmp_path / ".locks/run.owner").read_text() == f"{os.getpid()} on {platform.node()}"
        (tmp_path / ".locks/run.owner").write_text("7 on elsewhere")
        with pytest.raises(RuntimeError, match="x .process 7 on elsewhere.;"), file_lock(tmp_path, "run", 0, "x"):
            pass


def test_two_kernels_do_not_do_a_step_at_once(holder, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    recipe = load_recipe("recipes/tiny.yaml")
    start_manifest(recipe, tmp_path)
    monkeypatch.setattr(
        "scir.runner.work.file_lock", lambda run, what, wait, busy, plain=file_lock: plain(run, what, 0.2, busy)
    )
    other = holder(file_name(SAMPLE))
    with pytest.raises(RuntimeError, match=f"another process is running {SAMPLE.key} .process {other.pid}"):
        do_step(recipe, tmp_path, SAMPLE)
    assert read_json(tmp_path / "manifest.json")["begun"] == {}


# kept files ----------------------------------------------------------------


def test_a_damaged_line_of_an_unfinished_file_costs_its_row_only(tmp_path, capsys):
    rows = [Prompt(id=str(i), prompt="x") for i in range(5)]
    write_rows(tmp_path / "a.partial.jsonl", rows)
    text = (tmp_path / "a.partial.jsonl").read_bytes().split(b"\n")
    (tmp_path / "a.partial.jsonl").write_bytes(b"\n".join([text[0], text[1][:7], b"\0" * 9, *text[2:4], text[4][:-3]]))
    journal = Journal(tmp_path / "a.jsonl", Prompt)
    assert sorted(journal.done) == ["0", "2", "3"] and "2 of 5 lines cannot be read" in capsys.readouterr().out
    for i in ("1", "4"):
        journal.add(Prompt(id=i, prompt="x"))
    assert journal.finish([r.id for r in rows]) == rows == read_rows(tmp_path / "a.jsonl", Prompt)


def test_a_damaged_manifest_is_one_line(tmp_path):
    (tmp_path / "recipe.yaml").write_text((ROOT / "recipes/tiny.yaml").read_text())
    (tmp_path / "manifest.json").write_text('{"steps": {')
    done = scir("run", "recipes/tiny.yaml", "--out", tmp_path)
    assert (
        done.returncode == 1 and "manifest.json: damaged" in done.stderr and len(done.stderr.strip().splitlines()) == 1
    )


@pytest.mark.parametrize("damage", ["cut", "gone", "unsealed", "grown"])
def test_the_newest_whole_checkpoint_is_taken(tmp_path, damage):
    for n in (5, 10):
        folder = tmp_path / f"checkpoint-{n}"
        folder.mkdir()
        for name in ("optimizer.pt", "trainer_state.json"):
            (folder / name).write_text("12345")
        (folder / SEAL).write_text(json.dumps({"optimizer.pt": 5, "trainer_state.json": 5}))
    assert last_checkpoint(tmp_path).endswith("checkpoint-10")
    newest = tmp_path / "checkpoint-10"
    {
        "cut": lambda: (newest / "optimizer.pt").write_text("1"),
        "gone": lambda: (newest / "optimizer.pt").unlink(),
        "unsealed": lambda: (newest / SEAL).unlink(),
        "grown": lambda: (newest / "x").write_text(""),
    }[damage]()
    assert last_checkpoint(tmp_path).endswith("checkpoint-5") and not newest.exists()


@pytest.mark.parametrize(
    "text, said",
    [
        ("[Errno 28] No space left on device", "the disk is full: free some space"),
        ("Error while serializing: I/O error: StorageFull", "the disk is full"),
        ("[Errno 13] Permission denied: 'x'", "let this user write there"),
        ("[Errno 30] Read-only file system: 'x'", "let this user write there"),
        ("other", "other"),
    ],
)
def test_what_helps_is_said_where_it_is_known(text, said):
    assert said in reason(RuntimeError(text)) and "\n" not in reason(RuntimeError(text + "\nmore"))


def test_no_secret_is_kept(copy, monkeypatch):
    recipe, run = copy
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghij")
    note_failure(run, SAMPLE, "the hub refuses hf_abcdefghij")
    assert "refuses ***" in (run / "manifest.json").read_text() and "hf_abc" not in reason(ValueError("hf_abcdefghij"))


# verify --------------------------------------------------------------------


def touched(run, file, change):
    "Change a file and, as a forger would, its hash in the manifest."
    path = run / file
    path.write_text(change(path.read_text()))
    text, m = (run / "manifest.json").read_text(), read_json(run / "manifest.json")
    old = next(s["outputs"][file] for s in m["steps"].values() if file in s["outputs"])
    (run / "manifest.json").write_text(text.replace(old, hash_path(path)))


def faults(run):
    return {name: [what for what, fault in found if fault] for name, found in verify(run).items()}


def test_a_run_that_nobody_touched_verifies(copy):
    assert not any(faults(copy[1]).values()) and {k: len(v) > 7 for k, v in verify(copy[1]).items()} == dict.fromkeys(
        ("files", "inputs", "margins"), True
    )
    done = CliRunner().invoke(app, ["verify", str(copy[1])])
    assert done.exit_code == 0 and "files: 59 of 59 correct" in done.stdout


def test_a_touched_file_is_found(copy):
    with (copy[1] / "seed0/scir/m2/adapter/adapter_config.json").open("a") as f:
        f.write(" ")
    assert faults(copy[1])["files"] == ["seed0/scir/m2/adapter"]
    done = CliRunner().invoke(app, ["verify", str(copy[1])])
    assert (
        done.exit_code == 1
        and "seed0/scir/m2/adapter: has changed since it was written (optimise:seed0/scir/m2)" in done.stderr
    )


def margin(text):
    rows = [json.loads(l) for l in text.splitlines()]
    rows[3]["margins"]["implicit"] = -rows[3]["margins"]["implicit"] - 1
    return "".join(json.dumps(r) + "\n" for r in rows)


def test_a_forged_margin_is_found(copy):
    touched(copy[1], "seed0/scir/m2/evaluation/held-out.jsonl", margin)
    found = faults(copy[1])
    assert not found["files"] and len(found["margins"]) == 1


def test_forged_scores_are_another_input(copy):
    path = copy[1] / "seed0/m1/scores.jsonl"
    path.write_text(path.read_text().replace('"subset":""', '"subset":"x"', 1))
    m = read_json(copy[1] / "manifest.json")
    m["steps"]["judge:seed0/m1"]["outputs"]["seed0/m1/scores.jsonl"] = hash_path(path)
    (copy[1] / "manifest.json").write_text(json.dumps(m))
    assert not faults(copy[1])["files"] and any("optimise:seed0/scir/m2" in w for w in faults(copy[1])["inputs"])


def test_margins_are_those_of_the_settings_they_were_made_with(copy):
    start_manifest(load_recipe(copy[1] / "recipe.yaml", ("train.beta=0.7",)), copy[1])
    assert not faults(copy[1])["margins"] and faults(copy[1])["files"] == []


@pytest.mark.parametrize(
    "file, judged",
    [
        ("seed0/m1/scores.jsonl", True),
        ("seed0/m0/evaluation/held-out.jsonl", True),
        ("seed0/m0/evaluation/metrics.json", False),
        ("seed0/scir/m2/evaluation/responses.jsonl", False),
    ],
)
def test_a_truncated_file_is_a_line_among_the_others(copy, file, judged):
    path = copy[1] / file
    path.write_bytes(path.read_bytes()[:-30])
    found = faults(copy[1])
    assert file in found["files"] and bool(found["margins"]) == judged and len(verify(copy[1])["margins"]) > 50


@pytest.mark.parametrize(
    "file",
    [
        "seed0/m0/evaluation/held-out.jsonl",
        "seed0/m0/evaluation/responses.jsonl",
        "seed0/m0/evaluation/metrics.json",
        "seed0/m1/scores.jsonl",
    ],
)
@pytest.mark.parametrize("text", ["", "[]\n", "null\n", '{"answers": null, "sets": {}}\n'])
def test_an_emptied_or_odd_file_does_not_stop_verify(copy, file, text):
    (copy[1] / file).write_text(text)
    found = faults(copy[1])
    assert found["files"] == [file] and len(found) == 3


def test_an_older_notebook_of_a_step_done_again_is_executed_again(copy):
    recipe, run = copy
    (run / "seed0/m1/responses.jsonl").unlink()
    time.sleep(1.1)
    do("sample", recipe, run, "seed0/m1")
    assert not notebook_finished(run, SAMPLE)


def test_verify_takes_a_path_from_where_one_stands(copy, monkeypatch):
    monkeypatch.chdir(copy[1].parent)
    monkeypatch.setattr("scir.recipe.root", lambda run=None: ROOT)
    assert CliRunner().invoke(app, ["verify", "run"]).exit_code == 0


def test_status_outside_a_checkout(copy, monkeypatch):
    monkeypatch.chdir(copy[1].parent)
    (Path("data") / "models").mkdir(parents=True, exist_ok=True)
    (Path("data") / "models" / "tiny-random").symlink_to(ROOT / "data" / "models" / "tiny-random")
    done = CliRunner().invoke(app, ["status", "run"])
    assert done.exit_code == 0 and "missing" not in done.stdout and "stale" not in done.stdout


@pytest.mark.parametrize("command", ["status", "verify"])
def test_no_run_is_one_line(tmp_path, command):
    done = CliRunner().invoke(app, [command, str(tmp_path / "absent")])
    assert done.exit_code == 1 and "not a run directory" in done.stderr and len(done.stderr.strip().splitlines()) == 1
