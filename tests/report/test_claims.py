"""The verdict of each claim, on either side of its border."""

import numpy as np
import pytest

from scir.report import claims, compare as comparing, document, tables as tabling
from scir.report.compare import last
from scir.report.document import tables

from small_reports import answers, both, gathered, made, model, pairs, verdicts


@pytest.mark.parametrize(
    "ours, theirs, said",
    [
        (5, 40, "met"),
        (20, 40, "met"),
        (21, 40, "missed"),
        (2, 6, "not significant"),
        (40, 40, "missed"),
        (60, 40, "missed"),
        (0, 0, "missed"),
        (0, 3, "not significant"),
    ],
)
def test_at_most_half(ours, theirs, said):  # disagreements among 100 pairs
    g = gathered(pairs("sft", 1, *both(100, apart=theirs)), pairs("scir", 2, *both(100, apart=ours)))
    assert verdicts(g)["a", "held-out"] == said


@pytest.mark.parametrize("arm, letter", [("srlm", "b"), ("scir-no-consistency", "c")])
@pytest.mark.parametrize(
    "ours, theirs, said",
    [(5, 40, "met"), (30, 60, "met"), (36, 40, "not significant"), (40, 40, "missed"), (60, 40, "missed")],
)
def test_below_another_arm(arm, letter, ours, theirs, said):
    g = gathered(
        pairs("sft", 1, *both(100)), pairs(arm, 2, *both(100, apart=theirs)), pairs("scir", 2, *both(100, apart=ours))
    )
    assert verdicts(g)[letter, "held-out"] == said


def test_significant_needs_every_seed():
    apart = {"srlm": (50, 50, 3), "scir": (2, 2, 6)}
    g = gathered(
        *(pairs(a, 2, *both(60, apart=apart[a][s]), seed=s) for s in range(3) for a in apart),
        *(pairs("sft", 1, *both(60), seed=s) for s in range(3)),
    )
    row = claims.claim_numbers(g).query("claim == 'b'").iloc[0]
    assert row.verdict == "not significant" and row["agreeing seeds"] == "2 of 3" and row.p_holm < 0.01


def test_holm_is_over_all_tests_of_the_table():
    g = made(0, effect=True)
    t = claims.claim_numbers(g)
    tested = t[t.claim.isin(list("abcei") + ["k1", "k2", "k3"])]
    assert t[~t.index.isin(tested.index)].p_holm.isna().all()
    assert tested.p_holm.tolist() == pytest.approx(comparing.holm(tested.p))


@pytest.mark.parametrize("apart, first, said", [(0.2, 6, "met"), (0.2, 0.2, "missed"), (2, 6, "missed")])
def test_rank_correlation_claim(apart, first, said):
    rng = np.random.default_rng(0)
    truth, noise = rng.normal(size=(2, 200))
    g = gathered(*(pairs(a, t, truth, truth + k * noise) for a, t, k in (("sft", 1, first), ("scir", 2, apart))))
    assert verdicts(g)["d", "held-out"] == said


@pytest.mark.parametrize(
    "scir, srlm, said", [(0, 30, "met"), (28, 30, "not significant"), (30, 30, "missed"), (0, 0, "missed")]
)
def test_implicit_accuracy(scir, srlm, said):  # wrong ones of 200; M_1 has 60; both have to be beaten
    g = gathered(
        pairs("sft", 1, *both(200, wrong=60)),
        pairs("srlm", 2, *both(200, wrong=srlm)),
        pairs("scir", 2, *both(200, wrong=scir)),
    )
    assert verdicts(g)["e", "held-out"] == said


@pytest.mark.parametrize("wrong, said", [(10, "met"), (20, "met"), (23, "met"), (40, "missed")])
def test_judge_accuracy_is_read_without_adjustment(wrong, said):  # M_1: 20 of 200
    g = gathered(pairs("sft", 1, *both(200, wrong=20)), pairs("scir", 2, *both(200, wrong=wrong)))
    assert verdicts(g)["f", "held-out"] == said and claims.claim_numbers(g).query("claim == 'f'").p_holm.isna().all()


@pytest.mark.parametrize(
    "judge, implicit, said",
    [
        ("-" * 30 + "+" * 170, "+" * 140 + "-" * 30 + "+" * 30, "met"),  # wrong on different pairs
        ("-" * 2 + "+" * 10, "+" * 10 + "-" * 2, "not significant"),  # 8 of 8 against 10 of 12
        ("-" * 60 + "+" * 140, "-" * 60 + "+" * 140, "missed"),  # they never differ
        ("+" * 60 + "-" * 140, "-" * 60 + "-" * 140, "missed"),
    ],
)  # right only where the other is not
def test_agreed_against_alone(judge, implicit, said):
    g = gathered(pairs("sft", 1, judge, implicit), pairs("scir", 2, judge, implicit))
    assert verdicts(g)["g", "held-out"] == said


def test_agreed_with_nothing_agreed():
    g = gathered(
        pairs("sft", 1, "+" * 20, "-" * 20),
        pairs("scir", 2, "+" * 20, "-" * 20),
        pairs("scir-no-gate", 2, "+" * 20, "-" * 20),
    )
    assert not {"g", "k2"} & {c for c, _ in verdicts(g)}
    tables(g)


@pytest.mark.parametrize(
    "scir, srlm, said",
    [
        ((0.8, 0.7), (0.7, 0.6), "met"),
        ((0.8, 0.5), (0.6, 0.6), "not significant"),
        ((0.5, 0.5), (0.6, 0.6), "missed"),
        ((0.5, None), (0.4, None), "met"),
        ((None, None), (0.4, 0.4), None),
    ],
)
def test_correct_labels(scir, srlm, said):  # per seed
    frames = [pairs(a, t, "++", "++", seed=s) for s in (0, 1) for a, t in (("sft", 1), ("srlm", 2), ("scir", 2))]
    models = [model("sft", 1, s, correct_labels=None) for s in (0, 1)]
    models += [model(a, 2, s, correct_labels=v[s]) for a, v in (("srlm", srlm), ("scir", scir)) for s in (0, 1)]
    assert verdicts(gathered(*frames, models=models)).get(("h", "overall")) == said


def test_strict_success():
    frames = pairs("sft", 1, "++", "++"), pairs("srlm", 2, "++", "++"), pairs("scir", 2, "++", "++")
    of = lambda arm, t, good: answers(arm, t, [1] * good + [0.5] * (60 - good))
    run = lambda srlm, scir: gathered(*frames, answered=[of("sft", 1, 10), of("srlm", 2, srlm), of("scir", 2, scir)])
    said = lambda srlm, scir: verdicts(run(srlm, scir))["i", "overall"]
    assert (said(20, 50), said(48, 50), said(50, 50), said(55, 50)) == ("met", "not significant", "missed", "missed")
    assert ("i", "overall") not in verdicts(gathered(*frames, answered=[answers("scir", 2, [None] * 3)]))


@pytest.mark.parametrize(
    "change, said",
    [
        ({}, "met"),
        ({"mean_tokens": 10, "distinct_2": 0.4}, "met"),
        ({"mean_tokens": 40, "distinct_2": 0.6, "finished": 0.8}, "met"),
        ({"mean_tokens": 9.9}, "missed"),
        ({"mean_tokens": 40.1}, "missed"),
        ({"distinct_2": 0.39}, "missed"),
        ({"distinct_2": 0.61}, "missed"),
        ({"finished": 0.79}, "missed"),
        ({"mean_tokens": np.nan}, None),
    ],
)
def test_collapse(change, said):
    "One bad model of several seeds and iterations is enough."
    g = gathered(
        pairs("sft", 1, "+", "+"),
        models=[
            model("sft", 1),
            model("sft", 1, 1),
            model("scir", 2),
            model("scir", 2, 1, **change),
            model("scir", 3),
            model("scir", 3, 1),
            model("srlm", 2),
        ],
    )
    assert claims.collapse_claim(g)[0].ours["fine"] == (said == "met") if said else claims.collapse_claim(g) == []


@pytest.mark.parametrize(
    "models", [[model("scir", 2)], [model("sft", 1, mean_tokens=0.0, distinct_2=0.0), model("scir", 2)]]
)
def test_collapse_without_m1s_answers(models):
    assert claims.collapse_claim(gathered(pairs("scir", 2, "+", "+"), models=models)) == []


@pytest.mark.parametrize(
    "arm, judge, implicit, letter, said",
    [
        ("scir-static", *both(60, apart=30), "k3", "met"),
        ("scir-static", *both(60, apart=11), "k3", "not significant"),
        ("scir-static", *both(60), "k3", "missed"),
        ("scir-no-confidence", [0.1] * 60, [0.1] * 60, "k1", "met"),
        ("scir-no-confidence", [9.0] * 60, [9.0] * 60, "k1", "missed"),
        ("scir-no-gate", [-2.0] * 30 + [1.0] * 30, [1.0] * 60, "k2", "met"),
        ("scir-no-gate", *both(60), "k2", "missed"),
    ],
)
def test_ablations(arm, judge, implicit, letter, said):
    scir = both(60, apart=10) if letter != "k1" else both(60)
    g = gathered(pairs("sft", 1, *both(60)), pairs("scir", 2, *scir), pairs(arm, 2, judge, implicit))
    v = verdicts(g)
    assert v[letter, "held-out"] == said and not {c for c, _ in v if c[0] == "k"} - {letter}
    assert set(tabling.ablation_table(g).arm) == {arm}


@pytest.mark.parametrize("letter, arm", [("k1", "scir-no-confidence"), ("k2", "scir-no-gate"), ("k3", "scir-static")])
def test_ablations_on_own_answers(letter, arm):
    "On own answers an arm has other pairs; entropy is compared prompt by prompt."
    judge = [0.1] * 60 if letter == "k1" else [-2.0] * 40 + [1.0] * 20
    rows = ("sft", 1, *both(60)), ("scir", 2, *both(60)), (arm, 2, judge, [0.1] * 60)
    there = [(s, *row) for s in ("panel", "own") for row in rows if (row[0], s) != ("sft", "own")]
    g = gathered(*(pairs(a, t, j, i, set=s) for s, a, t, j, i in there))
    assert verdicts(g)[letter, "own"] == "met"


def test_wrong_labels_by_hand():
    "no-gate trains on all 8 pairs, 3 of them wrong; scir on the 5 on which it agrees, 1 of them wrong: 3/8 - 1/5."
    gate = pairs("scir-no-gate", 2, [-3, -3, -1, -0.5, 1, 1, 1, 1.0], [1, 1, -1, 1, 1, 1, 1, 1.0])
    g = gathered(gate, pairs("scir", 2, "-++++---", "-++++++" + "+"), pairs("sft", 1, *both(8)))
    ours, theirs, m = claims.ablation_gap(last(g), "scir-no-gate", "wrong labels", "held-out")
    assert ours["value"] == 3 / 8 and theirs["value"] == 1 / 5 and m["difference"] == pytest.approx(3 / 8 - 1 / 5)
    assert m["n"] == 5 and m["low"] < 0 < m["high"]
    row = tabling.ablation_table(g).iloc[0]
    assert row["arm - scir"].startswith("+17.5 [") and row.measure.startswith("wrong training labels")
    assert row.without == "agreement gate"


def test_an_arm_that_did_not_train_decides_nothing():
    frames = (
        pairs("sft", 1, *both(60, apart=40)),
        pairs("srlm", 2, *both(60, apart=40)),
        pairs("scir", 2, *both(60)),
        pairs("scir-no-consistency", 2, *both(60, apart=40)),
    )
    models = lambda **steps: (
        [model("sft", 1)]
        + [model(a, 2, steps=steps.get(a.replace("-", "_"), 4)) for a in ("srlm", "scir", "scir-no-consistency")]
    )
    at = lambda g: {c: v for (c, s), v in verdicts(g).items() if s == "held-out"}
    g = gathered(*frames, models=models())
    assert at(g)["a"] == at(g)["b"] == at(g)["c"] == "met" and claims.untrained_arms(g) == set()
    g = gathered(*frames, models=models(srlm=0))
    assert at(g)["b"] == at(g)["e"] == "-" and at(g)["a"] == "met"
    assert claims.claim_numbers(g).verdict.str.contains("no pairs to train on: srlm").any()
    assert set(verdicts(gathered(*frames, models=models(scir=0))).values()) == {"-"}


@pytest.mark.parametrize("arms", [(), ("srlm",), ("scir",), ("scir-no-gate",), ("dice", "scir-static")])
def test_no_claim_without_its_arms(arms):
    g = gathered(
        pairs("sft", 1, *both(20, wrong=4, apart=3)), *(pairs(a, 2, *both(20, wrong=4, apart=3)) for a in arms)
    )
    made, letters = tables(g), {c for c, _ in verdicts(g)}
    assert letters == (set("adfgj") if arms == ("scir",) else set())
    assert bool(len(made["comparisons"])) == ("scir" in arms) and not len(made["ablation"])
    assert set(document.figures(g, made["summary"])) >= {"headline", "inconsistency", "calibration_held-out"}
    assert ("No claim can be tested" in document.document(made, claims.headline(g), "", [])) == (not letters)


def test_arms_without_a_seed_in_common():
    g = gathered(
        pairs("sft", 1, *both(20)),
        pairs("sft", 1, *both(20), seed=1),
        pairs("srlm", 2, *both(20)),
        pairs("scir", 2, *both(20), seed=1),
        pairs("scir-no-gate", 2, *both(20)),
    )
    made = tables(g)
    assert "scir - srlm" not in set(made["comparisons"].arms) and not {"b", "k2"} & {c for c, _ in verdicts(g)}
    assert not len(made["ablation"])


def test_a_known_effect_meets_the_claims():
    v = verdicts(made(1, effect=True))
    assert {k: v[k] for k in v if k[0] in "abcdei"} == {
        k: "-" if (k[0] == "i") != (k[1] == "overall") else "met" for k in v if k[0] in "abcdei"
    }
    assert {v[c, s] for c in "fj" for s in ("own", "panel", "held-out", "overall")} == {"met", "-"}
    assert v["h", "overall"] == "met"
    assert v["k3", "own"] == v["k3", "panel"] == "met"


def test_without_an_effect_nothing_significant_is_found():
    "Some thirty tests a run: Holm keeps all of them quiet; nothing is halved, and no rank correlation reached."
    for seed in range(2):
        t = claims.claim_numbers(made(seed, effect=False))
        assert not (t[t.claim.isin([*"abcdei", "k1", "k2", "k3"])].verdict == "met").any(), seed
        assert (t.p_holm.dropna() > 0.01).all()


def test_headline_is_generated_from_the_numbers():
    g = made(1, effect=True)
    first, answers, second = claims.headline(g)
    s = tabling.summary(g).set_index(["arm", "set"])
    before, srlm, scir = (f"{s.loc[(a, 'panel'), 'inconsistency']:.0%}" for a in ("sft", "srlm", "scir"))
    start = "On pairs of M_1's own answers, the judge and the implicit reward disagree on"
    later = f"{srlm} after self-rewarding training and {scir} after SCIR."
    assert first == f"{start} {before} for M_1, {later}"
    right = f"{s.loc[('sft', 'own'), 'accuracy_generative']:.0%}"
    start = "On each model's own answers, judge accuracy is"
    assert second.startswith(f"{start} {right} for M_1, ")
    good = g.answers.groupby("arm").success.mean()
    later = f"{good.srlm:.0%} after self-rewarding training and {good.scir:.0%} after SCIR."
    assert answers == f"The fraction of fully correct answers is {good.sft:.0%} for M_1, {later}"
    plain = gathered(
        pairs("sft", 1, "++", "+-", set="panel", label=None), pairs("scir", 2, "++", "++", set="panel", label=None)
    )
    start = "On pairs of M_1's own answers, the judge and the implicit reward disagree on"
    assert claims.headline(plain) == [f"{start} 50% for M_1 and 0% after SCIR."]
    assert claims.headline(gathered(pairs("base", 0, "+", [0.0]))) == []


def test_headline_after_every_round():
    arms = {"sft": (1, 30), "srlm": (2, 25), "scir": (2, 12)}
    g = gathered(
        *(pairs(a, t, *both(60, apart=k), set="panel") for a, (t, k) in arms.items()),
        *(pairs(a, 3, *both(60, apart=k), set="panel") for a, k in (("srlm", 20), ("scir", 6))),
    )
    said = claims.headline(g)[0]
    one = "after round 1, 42% under self-rewarding training and 20% under SCIR"
    two = "after round 2, 33% under self-rewarding training and 10% under SCIR"
    assert said.endswith(f"disagree on 50% for M_1; {one}; {two}.")
