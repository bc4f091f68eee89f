"Who labels what: by hand, against brute force, and against what models really write."

import itertools, json, math, random
from functools import partial

import numpy as np
import pytest

from scir.method.labels import (
    agreed,
    best_against_worst,
    candidates,
    gather_rewards,
    labels,
    length_gap,
    needed_rewards,
    parse_vote,
    previous_rewards,
    ranking_consistency,
    mean_margins,
    vote,
    length_debiased,
)
from scir.model.decoding import generate
from scir.recipe import ARMS, LabelSpec, TrainSpec, parse_recipe
from scir.stages.consistency import preferences
from scir.stages.optimise import retained_fraction, preference_rows, replayed, run as optimise, training_pairs
from scir.store import Score, SeedPair, read_rows, write_rows

from helpers import response


def made(pair, generative, implicit=None, lengths=(1, 1), prompt="p", a=None, b=None):
    c, d = pair.split("-")
    return Score(
        id=f"{prompt}/{pair}",
        prompt_id=prompt,
        prompt="Q",
        response_a=a or c,
        response_b=b or d,
        ids_a=[1] * lengths[0],
        ids_b=[2] * lengths[1],
        logps=(-3, -4),
        reference_logps=(-6, -2),
        order_margins=(generative, -generative),
        verdict_mass=(1, 1),
        margins={"generative": generative, "implicit": generative if implicit is None else implicit},
    )


THREE = [made("0-1", 1.0, 1), made("0-2", 2.0, -1), made("1-2", 0.0, -1)]  # judge's totals: 0: +3, 1: -1, 2: -2

# choosing -----------------------------------------------------------------


@pytest.mark.parametrize(
    "label, expected",
    [("generative", [1, 1, 0, None]), ("implicit", [1, 0, 0, 1]), ("agreement-static", [1, -1, 0, -1])],
)
def test_labels_fixed_beforehand(label, expected):
    scores = [made("0-1", *m, prompt=f"p{k}") for k, m in enumerate([(1, 1), (1, -1), (-1, -1), (0, 1)])]
    found, _ = labels(scores, TrainSpec(label=label))
    assert [found.get(f"p{k}/0-1") for k in range(4)] == expected


def test_best_against_worst_by_hand(tokenizer, recipe):
    assert best_against_worst(THREE, mean_margins(THREE, "generative")) == {"p/0-2": 1.0}
    cyclic = [made("0-1", -0.5), made("0-2", 3.0), made("1-2", 0.0)]  # 0 is best on the whole, though 1 beat it
    assert best_against_worst(cyclic, mean_margins(cyclic, "generative")) == {"p/0-2": 1.0}
    pairs, notes = training_pairs(tokenizer, THREE, recipe.arm("srlm"))
    assert [p.target for p in pairs] == [1.0] and sum(notes["dropped"].values()) == 2


def test_no_reward_is_not_a_low_reward():
    assert best_against_worst(THREE, {"p/0": 5.0, "p/1": 1.0, "p/2": None}) == {"p/0-1": 1.0}
    assert (
        best_against_worst(THREE, {"p/0": None, "p/1": 1.0, "p/2": None})
        == {}
        == best_against_worst(THREE, {r: 2.0 for r in ("p/0", "p/1", "p/2")})
    )


def test_scir_keeps_every_pair_and_lists_those_agreed_on(tokenizer, recipe):
    scores = [made("0-1", 1, 1, prompt="p"), made("0-1", 1, -1, prompt="q"), made("0-1", -1, -1, prompt="r")]
    pairs, _ = training_pairs(tokenizer, scores, recipe.arm("scir"))
    assert len(pairs) == 3 and all(math.isnan(p.target) for p in pairs)
    rows = preference_rows(pairs, scores)
    assert (
        [(r["chosen"], r["rejected"]) for r in rows]
        == [("0", "1"), ("1", "0")]
        == [(r["chosen"], r["rejected"]) for r in preferences(scores)]
    )
    static, _ = training_pairs(tokenizer, scores, recipe.arm("scir-static"))
    assert [p.target for p in static] == [1, -1, 0] and preference_rows(static, scores) == rows


def test_agreed_is_what_the_loss_calls_agreed():
    import torch
    from scir.method.loss import agreed_side

    scores = [made("0-1", g, i) for g, i in itertools.product((-2, -0.1, 0, 0.1, 2), repeat=2)]
    mask, side = agreed_side(torch.tensor([list(s.margins.values()) for s in scores]).T)
    assert [agreed(s) for s in scores] == [float(x) if m else None for m, x in zip(mask, side)]


def test_candidate_ids_survive_slashes_and_dashes_in_prompt_ids():
    assert candidates(made("3-12", 1, prompt="a/b-c/d-1")) == ("a/b-c/d-1/3", "a/b-c/d-1/12")


# dice ---------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_dice_takes_length_off(seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(3, 60, (40, 2))
    scores = [
        made("0-1", 1, float(0.1 * (a - b) + rng.normal()), (a, b), prompt=f"p{k}")
        for k, (a, b) in enumerate(lengths.tolist())
    ]
    plain, _ = labels(scores, TrainSpec(label="implicit"))
    debiased, notes = labels(scores, TrainSpec(label="implicit", length_debias=True))
    assert length_gap(scores, plain) > 5 and abs(length_gap(scores, debiased)) < 3 and notes["alpha"] > 0
    grid = min(
        abs(
            length_gap(
                scores,
                best_against_worst(
                    scores,
                    {
                        r: v - a * l
                        for (r, v), l in zip(mean_margins(scores, "implicit").items(), lengths.ravel().tolist())
                    },
                ),
            )
        )
        for a in np.linspace(0, 0.5, 200)
    )
    assert abs(length_gap(scores, debiased)) <= grid + 1.5


def test_dice_leaves_a_reward_that_prefers_short_answers_alone():
    scores = [made("0-1", 1, float(b - a), (a, b), prompt=str(k)) for k, (a, b) in enumerate([(3, 9), (9, 3), (5, 20)])]
    assert length_debiased(scores, mean_margins(scores, "implicit"))[1] == 0


# cream --------------------------------------------------------------------


def test_ranking_consistency_is_the_share_of_pairs_ordered_alike():
    rng = random.Random(0)
    for _ in range(20):
        now, before = ({f"p/{c}": rng.random() for c in range(5)} for _ in range(2))
        alike = [(now[a] > now[b]) == (before[a] > before[b]) for a, b in itertools.combinations(now, 2)]
        assert ranking_consistency(now, before) == pytest.approx(sum(alike) / len(alike))


def test_ranking_consistency_averages_over_prompts_and_knows_when_it_knows_nothing():
    now, before = {"p/0": 1, "p/1": 2, "q/0": 1, "q/1": 2}, {"p/0": 1, "p/1": 2, "q/0": 2, "q/1": 1}
    assert (
        ranking_consistency(now, before) == 0.5
        and ranking_consistency({"p/0": 1}, {"p/0": 1}) == 0.5
        and ranking_consistency(now, {r: 0 for r in now}) == 0.5
    )


def test_cream_labels_are_soft_and_its_loss_is_the_mixture(tokenizer, recipe):
    import torch
    from scir.method.loss import scir_loss

    rewards = {"p/0": {"previous": 3.0}, "p/1": {"previous": 2.0}, "p/2": {"previous": 1.0}}
    three = [made("0-1", 1, 1), made("0-2", 1, 2), made("1-2", 1, -1)]  # implicit: 0 > 2 > 1; before: 0 > 1 > 2
    found, notes = labels(three, TrainSpec(label="cream"), rewards)
    assert (
        notes["consistency"] == pytest.approx(2 / 3)
        and found == {"p/0-2": pytest.approx(2 / 3)}
        or found == {"p/0-1": pytest.approx(2 / 3)}
    )
    m, c = torch.tensor([0.7]), notes["consistency"]
    loss = scir_loss({"implicit": m}, m, lambda_consistency=0, lambda_confidence=0, target=torch.tensor([c])).loss
    assert loss.item() == pytest.approx(c * math.log(1 + math.exp(-0.7)) + (1 - c) * math.log(1 + math.exp(0.7)))
    pairs, _ = training_pairs(tokenizer, three, recipe.arm("cream"), rewards)
    assert preference_rows(pairs, three)[0]["confidence"] == pytest.approx(2 / 3)


def test_the_predecessor_ranks_by_log_prob_per_token_if_it_is_the_base(recipe):
    s = [made("0-1", 1, lengths=(3, 4))]
    assert previous_rewards(s, recipe) == {"p/0": -2.0, "p/1": -0.5}
    assert previous_rewards(s, recipe, {"p/0": -5.0, "p/1": -4.0}) == {
        "p/0": pytest.approx(5 * 1 / 3),
        "p/1": pytest.approx(5 * -2 / 4),
    }


# votes --------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, points",
    [
        ("It answers. Score: 4", 4),
        ("score: 0", 0),
        ("**Score: 5**", 5),
        ("Total score is 3.5", 3.5),
        ("Score: 4/5", 4),
        ("Score: 4 / 5 points", 4),
        ("Score: 2 out of 5", 2),
        ("Score - 3", 3),
        ("SCORE=1", 1),
        ("Score: 1\nOn reflection\nScore: 4", 4),
        ("Score:\n3", 3),
        ("Score: 6", None),
        ("Score: -1", None),
        ("Score: 8/10", None),
        ("Score: 55", None),
        ("Score: 4/50", None),
        ("Score: N", None),
        ("Score: four", None),
        ("", None),
        ("5", None),
        ("I would score this highly.", None),
        ("The answer scores well on 3 counts", None),
        ("Score: 4.", 4),
        ("Score: nan", None),
        ("Score: \u0663", None),
        ("\x00", None),
        ("score" * 5000, None),
    ],
)
def test_votes_in_words(text, points):
    assert parse_vote(text) == points


def test_votes_are_kept_with_their_texts_and_continued(policy, tokenizer, recipe, tmp_path):
    rows = [response(candidate=c, text=f"text {c}") for c in range(3)]
    spec, engine = LabelSpec(votes=2, vote_tokens=4), partial(generate, policy, tokenizer)
    whole = vote(engine, tokenizer, rows, spec, None, 4, tmp_path / "votes.jsonl")
    said = (tmp_path / "votes.jsonl").read_text()
    assert set(whole) == {"p/0", "p/1", "p/2"} and len(said.splitlines()) == 6
    fixed = [json.loads(l) for l in said.splitlines()]
    for row, points in zip(fixed, (2.0, None, None, None, 4.0, 1.0)):
        row["points"] = points
    (tmp_path / "votes.partial.jsonl").write_text("".join(json.dumps(r) + "\n" for r in fixed) + '{"id": "p/')
    assert vote(engine, tokenizer, rows, spec, None, 4, tmp_path / "votes.jsonl") == {
        "p/0": 2.0,
        "p/1": None,
        "p/2": 2.5,
    }


# what an arm needs, and what it does with nothing -------------------------


def test_only_what_an_arm_needs_is_gathered():
    recipe = parse_recipe({"arms": list(ARMS), "labels": {"external": "tiny-reward"}})
    assert (
        needed_rewards(recipe, None) == ["votes", "previous", "external"]
        and needed_rewards(recipe, "cream") == ["previous"]
        and needed_rewards(recipe, "scir") == []
    )
    assert needed_rewards(parse_recipe({"arms": ["sft", "srlm", "dice", "scir"]}), None) == []
    rows = [response(text="r")]
    found, summary = gather_rewards(["votes"], {"votes": lambda: {"p/0": None}, "external": lambda: 1 / 0}, rows)
    assert found[0].rewards == {"votes": None} and summary == {"without votes": 1, "responses": 1}


SEEDS = [
    SeedPair(
        id=f"s{k}",
        prompt=f"seed {k}",
        response_a="xa",
        response_b="xb",
        ids_a=[5, 6, k],
        ids_b=[5, 7],
        label="ab"[k % 2],
    )
    for k in range(12)
]


@pytest.fixture
def parent(make_policy, tmp_path):
    "M_1 of a run, its SFT model and the pairs of its warm start."
    from scir.method.trainer import save_adapter

    m1 = tmp_path / "seed0/m1"
    for folder, scale in ((m1, 0.05), (tmp_path / "seed0/sft", 0.02)):
        folder.mkdir(parents=True)
        save_adapter(make_policy(scale), folder / "adapter")
    write_rows(m1 / "seed_pairs.jsonl", SEEDS)
    return m1


def test_with_no_pair_the_model_stays_and_says_so(parent, recipe, tmp_path, capsys):
    write_rows(parent / "scores.jsonl", [made("0-1", 0.0, 1.0)])
    done = optimise(recipe, tmp_path, "seed0/srlm/m2")
    assert (
        done["pairs"] == done["steps"] == 0
        and done["retained"] == 0
        and "no pair to train on" in capsys.readouterr().out
    )
    assert all(
        (tmp_path / "seed0/srlm/m2/adapter" / f).read_bytes() == (parent / "adapter" / f).read_bytes()
        for f in ("adapter_model.safetensors", "adapter_config.json")
    )
    assert (
        read_rows(tmp_path / "seed0/srlm/m2/metrics.jsonl") == []
        and read_rows(tmp_path / "seed0/srlm/m2/preferences.jsonl") == []
    )


def test_half_of_dice_is_replayed_labelled_pairs(parent, recipe, tmp_path, tokenizer):
    scores = [made("0-1", 1.0, float(k - 2.5), lengths=(3, 3), prompt=f"p{k}", a="xy", b="yx") for k in range(6)]
    write_rows(parent / "scores.jsonl", scores)
    done = optimise(
        recipe.model_copy(update={"train": recipe.train.model_copy(update={"batch_size": 4})}),
        tmp_path,
        "seed0/dice/m2",
    )
    rows = read_rows(tmp_path / "seed0/dice/m2/preferences.jsonl")
    assert (done["pairs"], done["replayed"], len(rows), done["steps"]) == (6, 6, 12, 3)
    known = {s.id: s for s in SEEDS}
    for r in rows[6:]:
        assert (r["chosen"], r["rejected"]) == (("xa", "xb") if known[r["id"]].label == "a" else ("xb", "xa")) and r[
            "prompt"
        ] == known[r["id"]].prompt
    again = replayed(tokenizer, recipe.model_copy(update={"train": recipe.arm("dice")}), tmp_path, "seed0/m1", 6)
    assert [p.id for p in again] == [r["id"] for r in rows[6:]] and all(any(p.reference_logps) for p in again)


def test_replayed_pairs_are_none_of_the_scored_ones_that_were_retained(parent, recipe, tmp_path):
    write_rows(
        parent / "scores.jsonl",
        [made("0-1", 1.0, 1.0 if k < 5 else -1.0, lengths=(3, 3), prompt=f"p{k}", a="xy", b="yx") for k in range(8)],
    )
    spec = recipe.train.model_copy(update={"batch_size": 4, "replay": 0.5})
    done = optimise(recipe.model_copy(update={"train": spec}), tmp_path, "seed0/scir-static/m2")
    assert (done["pairs"], done["replayed"]) == (8, 8) and done["retained"] == pytest.approx(5 / 8), (
        "of 8 scored pairs 5 agree"
    )
    lines = read_rows(tmp_path / "seed0/scir-static/m2/metrics.jsonl")
    assert sum(l["replayed"] for l in lines) / len(lines) == 0.5 and sum(l["retained"] for l in lines) / len(
        lines
    ) == pytest.approx(13 / 16)
    assert (
        retained_fraction([{"retained": 1.0, "replayed": 1.0}]) == 0
        and retained_fraction([{"retained": 0.5}, {"retained": 1.0}]) == 0.75
    )
