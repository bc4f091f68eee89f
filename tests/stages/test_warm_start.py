"""SFT, then the warm start against it: on the tiny model, with seed prompts and a grader of one's own. What each step learns from, which reference it has, and what the evaluation adds."""

import math, shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest, torch

from scir.data.load import better_side, evaluation_prompts, find_grader, grade, load_pairs, row_split, seed_prompts
from scir.method.labels import needed_rewards
from scir.method.rewards import View, longer, text_pair
from scir.method.scores import pair_logps
from scir.model.weights import for_scoring, load_tokenizer, tiny_model
from scir.recipe import adapters, load_recipe
from scir.runner.verify import verify
from scir.stages.evaluate import score_summary
from scir.stages.optimise import replayed, training_pairs
from scir.stages.sft import seed_pairs
from scir.stages.warm_start import read_seeds, relabel, run as warm_start, seed_row
from scir.statistics import metrics
from scir.store import Grade, Response, Score, SeedPair, hash_path, read_json, read_rows, write_rows

from helpers import scir


GRADER = "def score(prompt, answer):\n    return None if not answer.strip() else len(answer) % 3 / 2\n"
NODES = "m0", "m1", "scir/m2"


pytestmark = pytest.mark.usefixtures("at_root")


@pytest.fixture(scope="module")
def graded(tmp_path_factory):
    "recipes/tiny.yaml for one round of SCIR, with six seed prompts, a grader and replay; run once from outside."
    folder = tmp_path_factory.mktemp("graded")
    (folder / "grader.py").write_text(GRADER)
    settings = (
        f"data.grader={folder}/grader.py:score",
        "data.seed_prompts=6",
        "sampling.candidates=3",
        "warm_start.pairs_per_prompt=2",
        "train.replay=0.25",
        "sft.epochs=1",
        "arms=[scir]",
        "iterations=1",
    )
    done = scir("run", "recipes/tiny.yaml", "--out", folder / "run", *(w for s in settings for w in ("--set", s)))
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "run"


@pytest.fixture(scope="module")
def recipe(graded):
    return load_recipe(graded / "recipe.yaml")


@pytest.fixture
def grader(recipe):
    return find_grader(recipe.data.grader)


@pytest.fixture
def copy(graded, tmp_path):
    shutil.copytree(graded, tmp_path / "run")
    return tmp_path / "run"


def with_reference(recipe, name):
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"reference": name})})


def logps_of(recipe, adapter, pairs):
    return pair_logps(for_scoring(recipe.model, adapter), pairs, 4096, "")


def close(a, b):
    return torch.allclose(torch.tensor(a), torch.tensor(b), atol=1e-3)


# step 1 ---------------------------------------------------------------------


def test_sft_learns_all_good_answers_whatever_the_limit_of_pairs(graded, recipe):
    "`pair_limit` is about the second step."
    steps = read_json(graded / "manifest.json")["steps"]
    seeds = seed_pairs(load_tokenizer(recipe.model), recipe)[0]
    chosen = {(p.prompt, p.response_a if p.target else p.response_b) for p in seeds}
    assert steps["sft:seed0/sft"]["summary"]["answers"] == len(chosen) > recipe.data.pair_limit
    lines = read_rows(graded / "seed0/sft/metrics.jsonl")
    assert sum(l["loss_sft"] for l in lines[-5:]) < sum(l["loss_sft"] for l in lines[:5])


# step 2 ---------------------------------------------------------------------


def test_the_warm_start_learns_from_written_pairs_and_the_sft_models_own(graded, recipe, grader):
    rows, done = (
        read_rows(graded / "seed0/m1/seed_pairs.jsonl", SeedPair),
        read_json(graded / "manifest.json")["steps"]["warm_start:seed0/m1"]["summary"],
    )
    own, written = [r for r in rows if r.subset == "own"], [r for r in rows if r.subset != "own"]
    assert done["pairs"] == len(rows) and done["own"] == len(own) > 0 and len(written) == recipe.data.pair_limit
    asked, answers = (
        {p.prompt for p in seed_prompts(recipe.data)},
        read_rows(graded / "seed0/m1/seed_responses.jsonl", Response),
    )
    assert len(asked) == 6 and {r.prompt for r in answers} == asked and len(answers) == 18
    texts = {(r.prompt, tuple(r.response_ids)) for r in answers}
    for r in own:
        assert (
            r.label == better_side(grader, r.prompt, r.response_a, r.response_b)
            and {(r.prompt, tuple(r.ids_a)), (r.prompt, tuple(r.ids_b))} <= texts
        )
    assert all(sum(r.prompt == p for r in own) <= 2 for p in asked)
    known = {r.id: r for r in load_pairs("data/pairs.jsonl")[0]}
    for r in written:
        assert (
            {"a": r.response_a, "b": r.response_b}[r.label] == known[r.id].chosen
            and row_split(known[r.id]) == "train"
            and r.prompt not in evaluation_prompts(recipe.data)
        )


def test_no_tie_is_learned_from(graded, recipe, grader):
    "Ties are counted."
    rows, done = (
        read_rows(graded / "seed0/m1/seed_pairs.jsonl", SeedPair),
        read_json(graded / "manifest.json")["steps"]["warm_start:seed0/m1"]["summary"],
    )
    assert (
        all(better_side(grader, r.prompt, r.response_a, r.response_b) for r in rows if r.subset == "own")
        and done["dropped"]["tie by the grader"] > 0
    )


def test_prompts_of_the_warm_start_are_not_sampled_again(graded, recipe):
    asked = {p.prompt for p in seed_prompts(recipe.data)}
    later = {
        r["prompt"]
        for f in ("m1/responses.jsonl", *(f"{n}/evaluation/responses.jsonl" for n in NODES))
        for r in read_rows(graded / "seed0" / f)
    }
    assert len(later) == 12 and not asked & later


@pytest.mark.parametrize("reference", ["sft", "previous", "initial"])
def test_the_reference_of_the_warm_start(graded, recipe, tmp_path, monkeypatch, reference):
    "The SFT model, from which it starts, or M_0."
    shutil.copytree(graded / "seed0/sft", tmp_path / "seed0/sft")
    seen = {}

    def fit(model, tokenizer, pairs, loss, *args):
        model.eval()
        seen["pairs"], seen["metrics"] = pairs, loss(View(model, tokenizer, pairs, recipe))[1]
        return [{}]

    monkeypatch.setattr("scir.method.trainer.fit", fit)
    warm_start(with_reference(recipe, reference), tmp_path, "seed0/m1")
    found = [p.reference_logps for p in seen["pairs"]]
    sft, base = (logps_of(recipe, adapter, seen["pairs"]) for adapter in (graded / "seed0/sft/adapter", None))
    assert not close(sft, base) and close(found, base if reference == "initial" else sft)
    silent = abs(float(seen["metrics"]["loss_dpo"]) - math.log(2)) < 1e-4
    assert silent == (reference != "initial"), "the SFT model starts with an implicit margin of zero against itself"
    if reference == "sft":
        assert hash_path(tmp_path / "seed0/m1/seed_pairs.jsonl") == hash_path(graded / "seed0/m1/seed_pairs.jsonl")


def test_m1_was_trained_from_the_sft_model(graded):
    "At its first step the implicit margin is zero; afterwards it is not."
    lines = read_rows(graded / "seed0/m1/metrics.jsonl")
    assert (
        lines[0]["loss_dpo"] == pytest.approx(math.log(2), abs=1e-4) and abs(lines[-1]["loss_dpo"] - math.log(2)) > 1e-3
    )
    assert hash_path(graded / "seed0/m1/adapter") != hash_path(graded / "seed0/sft/adapter")


# replay ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "parent, reference, expected",
    [
        ("seed0/m1", "sft", "seed0/sft"),
        ("seed0/m1", "previous", "seed0/sft"),
        ("seed0/m1", "initial", None),
        ("seed0/scir/m2", "sft", "seed0/sft"),
        ("seed0/scir/m2", "previous", "seed0/m1"),
        ("seed0/scir/m2", "initial", None),
    ],
)
def test_replayed_pairs_are_the_warm_starts_with_the_reference_of_the_others(
    graded, recipe, parent, reference, expected
):
    tokenizer, known = (
        load_tokenizer(recipe.model),
        {r.id: r for r in read_rows(graded / "seed0/m1/seed_pairs.jsonl", SeedPair)},
    )
    found = replayed(tokenizer, with_reference(recipe, reference), graded, parent, 12)
    assert len(found) == 4 and len({p.id for p in found}) == 4
    for p in found:
        assert (p.ids_a, p.ids_b, p.target) == (known[p.id].ids_a, known[p.id].ids_b, float(known[p.id].label == "a"))
    others = {
        name: logps_of(recipe, name and graded / name / "adapter", found) for name in ("seed0/sft", "seed0/m1", None)
    }
    assert [name for name, logps in others.items() if close([p.reference_logps for p in found], logps)] == [expected]
    assert adapters(with_reference(recipe, reference), graded, parent)[1] == (
        graded / expected / "adapter" if expected else None
    )


def test_a_round_replays_what_the_warm_start_wrote(graded):
    done, rows = (
        read_json(graded / "manifest.json")["steps"]["optimise:seed0/scir/m2"]["summary"],
        read_rows(graded / "seed0/scir/m2/preferences.jsonl"),
    )
    known = {r.id: r for r in read_rows(graded / "seed0/m1/seed_pairs.jsonl", SeedPair)}
    again = [r for r in rows if r["id"] in known]
    assert done["replayed"] == len(again) == round(done["pairs"] / 3)
    for r in again:
        assert r["chosen"] == {"a": known[r["id"]].response_a, "b": known[r["id"]].response_b}[known[r["id"]].label]


def test_seeds_come_back_from_their_file(graded, recipe):
    rows, tokenizer = read_rows(graded / "seed0/m1/seed_pairs.jsonl", SeedPair), load_tokenizer(recipe.model)
    for r, p in zip(rows, read_seeds(tokenizer, graded / "seed0/m1/seed_pairs.jsonl"), strict=True):
        assert (p.id, p.prompt, p.ids_a, p.ids_b, p.extra["label"], p.extra["subset"]) == (
            r.id,
            r.prompt,
            r.ids_a,
            r.ids_b,
            r.label,
            r.subset,
        ) and p.prompt_ids


# controls --------------------------------------------------------------------


def test_random_labels_say_nothing_and_are_replayed_as_they_are(graded, recipe):
    rows = read_seeds(load_tokenizer(recipe.model), graded / "seed0/m1/seed_pairs.jsonl") * 20
    pairs = [replace(p, id=str(i), extra=dict(p.extra)) for i, p in enumerate(rows)]
    known = [p.target for p in pairs]
    relabel(pairs, 0)
    kept = sum(p.target == k for p, k in zip(pairs, known)) / len(pairs)
    assert 0.4 < kept < 0.6
    again = [replace(p, extra={}) for p in pairs]
    relabel(again, 0)
    assert [p.target for p in again] == [p.target for p in pairs]
    assert all((seed_row(p).label == "a") == bool(p.target) and seed_row(p).subset == "random" for p in pairs)


def test_longer_ignores_the_policy(recipe):
    _, tokenizer = tiny_model()
    pairs = [
        text_pair(tokenizer, "1", "Name a colour.", "It is red.", "Red."),
        text_pair(tokenizer, "2", "Name a colour.", "Red.", "Blue."),
    ]
    assert longer(View(SimpleNamespace(device="cpu"), tokenizer, pairs, recipe)).tolist() == [2, 0]


# evaluation -----------------------------------------------------------------


def test_every_models_answers_are_scored(graded, grader):
    for node in NODES:
        answers, grades = (
            read_rows(graded / "seed0" / node / "evaluation/responses.jsonl", Response),
            read_rows(graded / "seed0" / node / "evaluation/grades.jsonl", Grade),
        )
        assert [(g.id, g.prompt_id, g.score) for g in grades] == [
            (r.id, r.prompt_id, grade(grader, r.prompt, r.response)) for r in answers
        ] and len(grades) == 12
        kept = read_json(graded / "seed0" / node / "evaluation/metrics.json")["answers"]
        assert {k: kept[k] for k in ("score", "success")} == score_summary(grades) and 0 <= kept["score"] <= 1


def test_every_model_but_m1_judges_its_own_answers(graded):
    "M_1's are the panel, which all judge."
    panels = []
    for node in NODES:
        folder = graded / "seed0" / node / "evaluation"
        texts = {(r.prompt, r.response) for r in read_rows(folder / "responses.jsonl", Response)}
        panels.append([(s.id, s.response_a, s.response_b) for s in read_rows(folder / "panel.jsonl", Score)])
        assert (
            (folder / "own.jsonl").exists() == (node != "m1") == ("own" in read_json(folder / "metrics.json")["sets"])
        )
        for s in read_rows(folder / ("panel.jsonl" if node == "m1" else "own.jsonl"), Score):
            assert {(s.prompt, s.response_a), (s.prompt, s.response_b)} <= texts
    assert panels[0] == panels[1] == panels[2]


def test_own_pairs_are_measured_against_the_models_reference(graded, recipe):
    "Which no other model has read for them."
    from scir.method.scores import scored_pairs

    for node, reference in (("m0", None), ("scir/m2", graded / "seed0/sft/adapter")):
        rows = read_rows(graded / "seed0" / node / "evaluation/own.jsonl", Score)
        assert close(
            [s.reference_logps for s in rows],
            logps_of(recipe, reference, scored_pairs(load_tokenizer(recipe.model), rows)),
        )


def test_a_tie_has_no_label_and_breaks_no_metric(graded, grader):
    ties = 0
    for node in NODES:
        kept = read_json(graded / "seed0" / node / "evaluation/metrics.json")["sets"]
        for name in {"panel", "own"} & {*kept}:
            rows = read_rows(graded / "seed0" / node / "evaluation" / f"{name}.jsonl", Score)
            assert [s.label for s in rows] == [better_side(grader, s.prompt, s.response_a, s.response_b) for s in rows]
            decided, ties = sum(s.label is not None for s in rows), ties + sum(s.label is None for s in rows)
            assert kept[name].get("labelled", 0) == decided and kept[name]["flip_rate"]["n"] == len(rows)
            if decided:
                assert kept[name]["accuracy_generative"]["n"] == decided
            bare = [s.model_copy(update={"label": None}) for s in rows]
            assert not [k for k in metrics(bare) if k.startswith("accuracy")]
    assert ties > 0 and all(
        s.label is None or s.label in "ab" for s in read_rows(graded / "seed0/m1/scores.jsonl", Score)
    )


def test_no_round_trains_on_the_graders_labels(graded, recipe):
    "All of them turned over, every arm chooses the same sides; only the count of correct labels is another."
    scores, tokenizer = read_rows(graded / "seed0/m1/scores.jsonl", Score), load_tokenizer(recipe.model)
    turned = [s.model_copy(update={"label": {"a": "b", "b": "a", None: "a"}[s.label]}) for s in scores]
    assert any(s.label for s in scores)
    for arm in ("scir", "scir-static", "scir-no-gate", "srlm", "dice"):
        assert not needed_rewards(recipe, arm)
        one, other = (
            {p.id: p.target for p in training_pairs(tokenizer, rows, recipe.arm(arm))[0]} for rows in (scores, turned)
        )
        assert one.keys() == other.keys() and all(
            a == other[i] or math.isnan(a) and math.isnan(other[i]) for i, a in one.items()
        ), arm
    assert 0 <= read_json(graded / "manifest.json")["steps"]["optimise:seed0/scir/m2"]["summary"]["correct_labels"] <= 1


# verify ---------------------------------------------------------------------


def faults(run):
    return {name: [what for what, fault in found if fault] for name, found in verify(run).items()}


def test_a_graded_run_verifies_with_its_labels(graded):
    found = verify(graded)
    assert not any(faults(graded).values()) and list(found) == [
        "files",
        "inputs",
        "margins",
        "labels",
    ]
    of = lambda end: [what for what, _ in found["labels"] if end in what]
    assert (
        len(of("grades.jsonl")) == 36
        and of("own.jsonl")
        and of("panel.jsonl")
        and of("m1/scores.jsonl")
        and len(of("seed_pairs.jsonl"))
        == read_json(graded / "manifest.json")["steps"]["warm_start:seed0/m1"]["summary"]["own"]
    )


@pytest.mark.parametrize(
    "file, field",
    [
        ("seed0/m1/seed_pairs.jsonl", "label"),
        ("seed0/scir/m2/evaluation/own.jsonl", "label"),
        ("seed0/m1/scores.jsonl", "label"),
        ("seed0/m0/evaluation/grades.jsonl", "score"),
    ],
)
def test_a_forged_label_is_found(copy, file, field):
    rows = read_rows(copy / file)
    row = next(r for r in rows if r[field] is not None and r.get("subset") in ("own", "", None))
    row[field] = {"label": {"a": "b", "b": "a"}, "score": {0: 1, 0.5: 1, 1: 0}}[field][row[field]]
    write_rows(copy / file, rows)
    found = faults(copy)
    assert found["files"] == [file] and [w for w in found["labels"]] == [f"{file}, {row['id']}"]


@pytest.mark.parametrize(
    "file", ["seed0/m1/seed_pairs.jsonl", "seed0/m0/evaluation/grades.jsonl", "seed0/m0/evaluation/own.jsonl"]
)
@pytest.mark.parametrize("text", ["[]\n", '{"id": 1}\n', "null\n"])
def test_an_odd_file_of_labels_does_not_stop_verify(copy, file, text):
    (copy / file).write_text(text)
    found = faults(copy)
    assert found["files"] == [file] and file in found["labels"]


def test_lost_scores_are_found(copy):
    file = "seed0/m0/evaluation/grades.jsonl"
    write_rows(copy / file, read_rows(copy / file)[:-1])
    assert faults(copy)["labels"] == [file]


def test_a_grader_that_is_gone_is_a_line_of_verify(copy):
    text = (copy / "recipe.yaml").read_text()
    name = load_recipe(copy / "recipe.yaml").data.grader
    (copy / "recipe.yaml").write_text(text.replace(name, "absent.py:score"))
    assert faults(copy)["labels"] == ["data.grader"]


# status ---------------------------------------------------------------------


def test_a_grader_that_changed_makes_its_stages_stale(graded, tmp_path, recipe):
    "By its content."
    from scir.runner.state import status
    from scir.runner.plan import Step
    from scir.runner.state import state

    file = Path(recipe.data.grader.rpartition(":")[0])
    assert {s.name for _, s in status(recipe, graded)} == {"done"}
    try:
        file.write_text(GRADER.replace("% 3", "% 4"))
        found = {
            step.stage for step, _ in status(recipe, graded) if "grader.py changed" in state(recipe, graded, step).why
        }
        assert found == {"warm_start", "judge", "evaluate"}
    finally:
        file.write_text(GRADER)
    assert (
        "sft:seed0/sft" in scir("status", graded).stdout
        and state(recipe, graded, Step("sft", "seed0/sft")).name == "done"
    )
