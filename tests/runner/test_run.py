"""The whole tiny recipe through papermill, looked at from outside: files, tables, staleness, single notebooks."""

import json, os, subprocess
from contextlib import nullcontext

import pandas as pd
import nbformat, pytest, torch

from helpers import BIN, ENV, ROOT, scir


@pytest.fixture
def run(tiny_run):
    return tiny_run


def test_every_stage_left_an_executed_notebook(run):
    notebooks = sorted((run / "notebooks").glob("*.ipynb"))
    assert len(notebooks) == 22  # SFT, warm start; 3 + 2 in iteration 1; 6 + 2 in iteration 2; 6 evaluations; report
    for path in notebooks:
        cells = nbformat.read(path, 4).cells
        assert not [o for c in cells for o in c.get("outputs", []) if o.output_type == "error"], path
        assert any("parameters" in c.metadata.get("tags", []) for c in cells), path


def test_the_manifest_names_no_place_of_this_machine(run):
    text = (run / "manifest.json").read_text()
    assert str(run) not in text and str(ROOT) not in text and '"report/results.md"' in text


def test_printed_table_is_the_report(run):
    table = pd.read_csv(run / "report" / "inconsistency.csv")
    assert set(table.model) == {"M_0", "M_1", "srlm M_2", "srlm M_3", "scir M_2", "scir M_3"}
    printed = (run / "stdout.txt").read_text()
    assert (
        all(cell in printed for cell in table.inconsistency) and "## Claims" in (run / "report/results.md").read_text()
    )
    for name in ("inconsistency", "joint_panel", "splits_held-out", "training"):
        assert (run / "report" / f"{name}.png").stat().st_size > 5000 and (run / "report" / f"{name}.svg").exists()


def test_results_are_what_the_scores_say(run):
    from scir.statistics import frame
    from scir.store import Score, read_rows

    results = pd.read_csv(run / "report" / "summary.csv").set_index(["arm", "iteration", "set"])
    scores = read_rows(run / "seed0/scir/m2/evaluation/held-out.jsonl", Score)
    d = frame(scores)
    contradict = [(s.margins["generative"] > 0) != (s.margins["implicit"] > 0) for s in scores]
    assert results.loc[("scir", 2, "held-out"), "inconsistency"] == pytest.approx(sum(contradict) / len(contradict))
    right = [(s.margins["generative"] > 0) == (s.label == "a") for s in scores]
    assert results.loc[("scir", 2, "held-out"), "accuracy_generative"] == pytest.approx(sum(right) / len(right))
    assert list(d.right_generative) == right


def test_every_model_is_measured_against_the_same_reference(run):
    "Reference log-probs are taken over from M_1's evaluation; they must be those of the SFT model itself. M_0 has nothing before it."
    from scir.model.weights import for_scoring, load_tokenizer
    from scir.recipe import load_recipe
    from scir.method.scores import pair_logps, scored_pairs
    from scir.store import Score, read_rows

    os.chdir(ROOT)
    recipe = load_recipe(run / "recipe.yaml")
    rows = {n: read_rows(run / f"seed0/{n}/evaluation/held-out.jsonl", Score) for n in ("m0", "m1", "scir/m3")}
    sft = pair_logps(
        for_scoring(recipe.model, run / "seed0/sft/adapter"),
        scored_pairs(load_tokenizer(recipe.model), rows["m1"]),
        4096,
        "",
    )
    for base, first, last, reference in zip(*rows.values(), sft, strict=True):
        assert base.id == first.id == last.id and reference == pytest.approx(first.reference_logps, abs=1e-4)
        assert first.reference_logps == last.reference_logps and first.logps != last.logps
        assert base.reference_logps == pytest.approx(base.logps, abs=1e-4) and base.logps != pytest.approx(
            reference, abs=1e-2
        )


def test_adapters_load_in_peft_and_moved(run):
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    folder = run / "seed0/scir/m2/adapter"
    base = AutoModelForCausalLM.from_pretrained(ROOT / "data/models/tiny-random")
    PeftModel.from_pretrained(base, folder)
    weights = {
        n: load_file(run / n / "adapter/adapter_model.safetensors")
        for n in ("seed0/m1", "seed0/scir/m2", "seed0/srlm/m2")
    }
    assert all(t.dtype == torch.float32 for t in weights["seed0/m1"].values())
    changed = [k for k in weights["seed0/m1"] if not torch.equal(weights["seed0/m1"][k], weights["seed0/scir/m2"][k])]
    assert changed and any(not torch.equal(weights["seed0/scir/m2"][k], weights["seed0/srlm/m2"][k]) for k in changed)


def test_preference_sets_have_the_columns_others_read(run):
    for arm in ("srlm", "scir"):
        for path in (run / f"seed0/{arm}/m2").glob("preferences.jsonl"):
            for row in map(json.loads, path.open()):
                assert {"prompt", "chosen", "rejected"} <= set(row) and row["chosen"] != row["rejected"]
    scores = [json.loads(l) for l in (run / "seed0/m1/scores.jsonl").open()]
    assert len(list((run / "seed0/srlm/m2/preferences.jsonl").open())) == len(scores)
    agreed = [json.loads(l)["id"] for l in (run / "seed0/m1/agreed.jsonl").open()]
    assert agreed == [json.loads(l)["id"] for l in (run / "seed0/scir/m2/preferences.jsonl").open()]


def test_sampled_ids_are_the_ids_scored(run):
    said = {
        (r["prompt_id"], tuple(r["response_ids"])) for r in map(json.loads, (run / "seed0/m1/responses.jsonl").open())
    }
    for s in map(json.loads, (run / "seed0/m1/scores.jsonl").open()):
        assert {(s["prompt_id"], tuple(s["ids_a"])), (s["prompt_id"], tuple(s["ids_b"]))} <= said


def test_manifest_says_what_was_run(run):
    m = json.loads((run / "manifest.json").read_text())
    assert m["reference"] == "sft" and m["seeds"] == [0] and len(m["model_hash"]) == 16
    assert len(m["steps"]) == 22
    for step in m["steps"].values():
        assert (
            step["versions"]["torch"] == torch.__version__
            and step["seconds"] >= 0
            and step["outputs"]
            and "absent" not in step["outputs"].values()
        )


def test_a_finished_run_is_not_done_again_and_a_change_redoes_what_depends_on_it(run):
    again = scir("run", "recipes/tiny.yaml", "--out", run)
    assert again.returncode == 0 and again.stdout.count(": unchanged") == 22
    from scir.runner.state import state
    from scir.runner.plan import plan
    from scir.recipe import load_recipe

    os.chdir(ROOT)

    def stale(*settings):
        recipe = load_recipe("recipes/tiny.yaml", settings)
        return {s.key for s in plan(recipe) if state(recipe, run, s).name != "done"}

    assert stale() == set()
    assert {k.split(":")[0] for k in stale("train.learning_rate=2.0e-3")} == {
        "optimise"
    }  # and, once done, what reads its files
    assert {k.split(":")[0] for k in stale("train.beta=0.2")} == {"warm_start", "judge", "optimise", "evaluate"}
    assert {k.split(":")[0] for k in stale("sampling.temperature=0.5")} == {"warm_start", "sample", "evaluate"}
    scores = run / "seed0/m1/scores.jsonl"
    kept = scores.read_text()
    try:
        scores.write_text(kept.replace("0.", "1.", 1))
        assert {"judge:seed0/m1", "consistency:seed0/m1", "optimise:seed0/scir/m2"} <= stale()
    finally:
        scores.write_text(kept)
    assert stale() == set()


def test_staleness_follows_what_is_called():
    from scir.runner.state import SOURCES, code_hashes
    from scir.stages.files import STAGES
    from scir.runner.staleness import dependencies, parse_package

    package = parse_package(SOURCES)
    reach = {stage: dependencies(package, f"stages.{stage}", "run") for stage in STAGES}
    assert {
        ("method.loss", "scir_loss"),
        ("method.rewards", "implicit"),
        ("model.logprobs", "response_logps"),
        ("method.trainer", "fit"),
        ("model.weights", "for_training"),
    } <= reach["optimise"]
    assert {("stages.sample", "sample"), ("data.load", "prompt_pool")} <= reach["sample"] and {
        ("method.rewards", "generative"),
        ("method.judge", "judge_ids"),
    } <= reach["judge"]
    assert ("method.loss", "scir_loss") not in reach["judge"] and not {"method.loss", "method.trainer"} & code_hashes(
        "report"
    ).keys()


def test_an_interrupted_try_is_continued_only_if_nothing_changed(tmp_path):
    from scir.runner.plan import Step
    from scir.runner.work import start_step
    from scir.runner.manifest import start_manifest
    from scir.recipe import load_recipe

    os.chdir(ROOT)
    step, part = Step("sample", "seed0/m1"), tmp_path / "seed0/m1/responses.partial.jsonl"
    recipe, changed = load_recipe("recipes/tiny.yaml"), load_recipe("recipes/tiny.yaml", ("sampling.temperature=0.5",))
    start_manifest(recipe, tmp_path)
    start_step(recipe, tmp_path, step)
    part.parent.mkdir(parents=True)
    part.write_text("{}")
    start_step(recipe, tmp_path, step)
    assert part.exists()
    start_step(changed, tmp_path, step)
    assert not part.exists()


def test_one_notebook_works_alone(tmp_path):
    done = subprocess.run(
        [
            str(BIN / "papermill"),
            "nbs/run/03_judge.ipynb",
            str(tmp_path / "out.ipynb"),
            "-p",
            "run",
            str(tmp_path / "run"),
            "--no-progress-bar",
        ],
        cwd=ROOT,
        env=ENV,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "run/seed0/m1/scores.jsonl").exists() and not (tmp_path / "run/seed0/scir").exists()


@pytest.mark.parametrize(
    "args, said",
    [
        (("run", "recipes/absent.yaml"), "no such recipe"),
        (
            ("run", "recipes/tiny.yaml", "--set", "train.betta=1"),
            "train.betta is not a field; the nearest is train.beta",
        ),
        (("run", "recipes/tiny.yaml", "--set", "train.beta=soft"), "train.beta"),
        (("report", "data/nothing"), "not a run directory"),
        (("report", "data/a", "data/b"), "--out"),
        (("run", "recipes/tiny.yaml", "--set", "arms=[external]"), "labels.external"),
        (("judge", "--model", "tiny-random", "--pairs", "absent.jsonl"), "no such file"),
    ],
)
def test_errors_are_one_line(args, said):
    done = scir(*args)
    assert (
        done.returncode == 1
        and said in done.stderr
        and "Traceback" not in done.stderr
        and len(done.stderr.strip().splitlines()) == 1
    )


BROKEN = """
import scir.stages.warm_start
def supervised(*args): raise ValueError("nothing to learn from")
scir.stages.sft.supervised = supervised
"""


def test_a_failing_stage_leaves_its_notebook_and_one_line(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(BROKEN)
    done = scir(
        "run",
        "recipes/tiny.yaml",
        "--out",
        tmp_path / "run",
        env=ENV | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ENV.get('PYTHONPATH', '')}"},
    )
    assert done.returncode == 1 and "scir: ValueError: nothing to learn from" in done.stderr
    cells = nbformat.read(tmp_path / "run/notebooks/sft-seed0-sft.ipynb", 4).cells
    assert any(o.output_type == "error" for c in cells for o in c.get("outputs", []))


def test_a_killed_run_leaves_no_process_and_goes_on(tmp_path):
    "kill -9 in the middle of training; nothing goes on writing; the next try resumes and ends like the run that nobody killed."
    import signal, time
    import psutil

    args = [
        str(BIN / "scir"),
        "run",
        "recipes/tiny.yaml",
        "--out",
        str(tmp_path / "run"),
        "--set",
        "warm_start.epochs=12",
        "--set",
        "iterations=1",
    ]
    first = subprocess.Popen(
        args, cwd=ROOT, env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    folder = tmp_path / "run/seed0/m1/checkpoints"
    deadline = time.time() + 120
    while not list(folder.glob("checkpoint-*/trainer_state.json")) and time.time() < deadline:
        time.sleep(0.05)
    started = psutil.Process(first.pid).children(recursive=True)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    assert started and not psutil.wait_procs(started, timeout=10)[1], "a process of the killed run is still there"
    before = sorted(p.name for p in folder.iterdir())
    time.sleep(1)
    assert before and before == sorted(p.name for p in folder.iterdir()) and not (folder.parent / "adapter").exists()
    again = subprocess.run(args, cwd=ROOT, env=ENV, capture_output=True, text=True)
    assert again.returncode == 0 and "resuming from" in again.stdout, again.stderr[-2000:]


@pytest.fixture(scope="module")
def every_arm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "arms"
    done = scir("run", "recipes/tiny-arms.yaml", "--out", folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_every_arm_runs_and_is_reported(every_arm):
    from scir.recipe import ARMS

    table = pd.read_csv(every_arm / "report/summary.csv")
    assert set(table.arm) == {"base", *ARMS}
    weights = {
        a: (every_arm / f"seed0/{a}/m2/adapter/adapter_model.safetensors").read_bytes() for a in ARMS if a != "sft"
    }
    first = (every_arm / "seed0/m1/adapter/adapter_model.safetensors").read_bytes()
    steps = json.loads((every_arm / "manifest.json").read_text())["steps"]
    for arm, blob in weights.items():
        assert (blob != first) == (steps[f"optimise:seed0/{arm}/m2"]["summary"]["steps"] > 0), arm
    trained = [a for a in weights if weights[a] != first]
    assert {"srlm", "dice", "cream", "external", "scir"} <= set(trained) and len({weights[a] for a in trained}) == len(
        trained
    )


def test_votes_and_rewards_are_kept(every_arm):
    rewards = [json.loads(l)["rewards"] for l in (every_arm / "seed0/m1/rewards.jsonl").open()]
    votes = [json.loads(l) for l in (every_arm / "seed0/m1/votes.jsonl").open()]
    assert (
        rewards
        and len(votes) == len(rewards)
        and all(set(r) == {"votes", "previous", "external"} and r["external"] is not None for r in rewards)
    )
    assert sum(v["points"] is not None for v in votes) == sum(r["votes"] is not None for r in rewards)


def test_win_rates_are_against_m1s_answers(every_arm):
    duels = [json.loads(l) for l in (every_arm / "seed0/scir/m2/alignment/duels.jsonl").open()]
    first = {
        r["id"]: r["response"] for r in map(json.loads, (every_arm / "seed0/m1/evaluation/responses.jsonl").open())
    }
    assert duels and all(d["reference"] == first[d["id"]] for d in duels)
    m = json.loads((every_arm / "seed0/scir/m2/alignment/metrics.json").read_text())
    by = pd.DataFrame(duels).groupby("instruction").preference.mean()
    assert m["win_rate"] == pytest.approx(by.mean()) and m["win_rate_n"] == len(by) == 4
    assert (
        "scir M_2" in pd.read_csv(every_arm / "report/alignment.csv").model.tolist()
        and not (every_arm / "seed0/m1/alignment").exists()
    )


def test_a_second_round_of_the_baselines_asks_its_own_predecessor(tmp_path):
    done = scir(
        "run",
        "recipes/tiny-arms.yaml",
        "--out",
        tmp_path,
        "--set",
        "arms=[cream]",
        "--set",
        "iterations=2",
        "--set",
        "alignment.judge=null",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = {
        n: {r["id"]: r["rewards"]["previous"] for r in map(json.loads, (tmp_path / f"seed0/{n}/rewards.jsonl").open())}
        for n in ("m1", "cream/m2")
    }
    scores = [json.loads(l) for l in (tmp_path / "seed0/cream/m2/scores.jsonl").open()]
    s = scores[0]
    prompt, _, both = s["id"].rpartition("/")
    before = [rows["cream/m2"][f"{prompt}/{c}"] for c in both.split("-")]
    assert before[0] != before[1] and all(abs(b) < 50 for b in before)
    from scir.model.weights import for_scoring, load_tokenizer
    from scir.recipe import load_recipe
    from scir.method.scores import response_table, scored_pairs
    from scir.store import Score

    os.chdir(ROOT)
    recipe = load_recipe(tmp_path / "recipe.yaml")
    table = response_table(
        for_scoring(recipe.model, tmp_path / "seed0/m1/adapter"),
        scored_pairs(load_tokenizer(recipe.model), [Score.model_validate(s)]),
        4096,
        "",
    )
    assert before == pytest.approx(
        [
            5 * (table[f"{prompt}/{c}"] - r) / len(ids)
            for c, r, ids in zip(both.split("-"), s["reference_logps"], (s["ids_a"], s["ids_b"]))
        ],
        abs=1e-4,
    )


def test_what_a_step_reads_beside_the_run_decides_too(tmp_path, monkeypatch):
    "An evaluation set takes its prompts out of the warm start; a refitted reward model labels and judges anew."
    from scir.runner.plan import Step
    from scir.runner.state import inputs
    from scir.recipe import parse_recipe

    monkeypatch.chdir(ROOT)
    reward, known = tmp_path / "reward", tmp_path / "known.jsonl"
    reward.mkdir()
    (reward / "model.safetensors").write_text("1")
    known.write_text(json.dumps({"prompt": "P", "chosen": "a", "rejected": "b"}))
    recipe = lambda **data: parse_recipe(
        {
            "arms": ["external", "scir"],
            "model": {"name": "tiny-random"},
            "labels": {"external": str(reward)},
            "alignment": {"judge": f"reward:{reward}"},
            "data": data,
        }
    )
    steps = [
        Step("sft", "seed0/sft"),
        Step("warm_start", "seed0/m1"),
        Step("sample", "seed0/m1"),
        Step("label", "seed0/m1"),
        Step("align", "seed0/scir/m2"),
    ]
    marks = lambda **data: [inputs(recipe(**data), tmp_path, s) for s in steps]
    changed = lambda one, other: [s.stage for s, a, b in zip(steps, one, other) if a != b]
    bare, named = marks(), marks(labelled_sets={"known": str(known)})
    assert changed(bare, marks()) == [] and changed(bare, named) == [
        "sft",
        "warm_start",
        "sample",
        "align",
    ]  # align: another evaluation
    known.write_text(json.dumps({"prompt": "Q", "chosen": "a", "rejected": "b"}))
    assert changed(named, marks(labelled_sets={"known": str(known)})) == ["sft", "warm_start", "sample"]
    (reward / "model.safetensors").write_text("22")
    assert changed(bare, marks()) == ["label", "align"]


def test_outputs_to_beat_decide_about_the_win_rate(tmp_path, monkeypatch):
    from scir.runner.plan import Step
    from scir.runner.state import inputs
    from scir.recipe import parse_recipe

    monkeypatch.chdir(ROOT)
    reference = tmp_path / "reference.jsonl"
    recipe = parse_recipe(
        {"model": {"name": "tiny-random"}, "alignment": {"judge": "reward:tiny-reward", "reference": str(reference)}}
    )
    reference.write_text('{"instruction": "q", "output": "a"}')
    before = inputs(recipe, tmp_path, Step("align", "seed0/scir/m2"))
    reference.write_text('{"instruction": "q", "output": "b"}')
    now = inputs(recipe, tmp_path, Step("align", "seed0/scir/m2"))
    assert [k for k in now if now[k] != before[k]] == [f"data {reference}"] and "file seed0/scir/m2/adapter" in now


@pytest.mark.parametrize(
    "avx, amx, dtype", [(True, False, "bfloat16"), (False, True, "bfloat16"), (False, False, "float32")]
)
def test_auto_dtype_is_what_the_machine_is_fast_in_and_stays_with_the_run(tmp_path, monkeypatch, avx, amx, dtype):
    from scir.runner.work import open_run
    from scir.recipe import load_recipe

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name, value in (("avx512_bf16", avx), ("amx_tile", amx)):
        monkeypatch.setattr(torch.cpu, f"_is_{name}_supported", lambda value=value: value)
    (tmp_path / "auto.yaml").write_text("name: auto\nmodel: {name: tiny-random}\n")
    recipe, run = open_run(tmp_path / "auto.yaml", tmp_path / "run")
    assert (
        recipe.model.dtype == dtype
        and load_recipe(run / "recipe.yaml").model.dtype == dtype
        and json.loads((run / "manifest.json").read_text())["model"]["dtype"] == dtype
    )
    for name in ("avx512_bf16", "amx_tile"):
        monkeypatch.setattr(torch.cpu, f"_is_{name}_supported", lambda: dtype == "float32")  # another machine
    assert open_run(tmp_path / "auto.yaml", tmp_path / "run")[0].model.dtype == dtype


@pytest.mark.parametrize(
    "message, deaths, tries",
    [
        ("Kernel died before replying to kernel_info", 1, 2),
        ("Kernel died before replying to kernel_info", 9, 3),
        ("Kernel died", 9, 1),
    ],
)
def test_a_kernel_that_never_began_is_started_again(monkeypatch, message, deaths, tries):
    "And one that did its work is not."
    import papermill
    from scir.runner.execute import execute_in_kernel

    asked = []

    def execute(*args, kernel_manager_class):
        asked.append(args)
        if len(asked) <= deaths:
            raise RuntimeError(message)

    monkeypatch.setattr(papermill, "execute_notebook", execute)
    with nullcontext() if deaths < tries else pytest.raises(RuntimeError, match=message):
        execute_in_kernel("a notebook")
    assert asked == [("a notebook",)] * tries
