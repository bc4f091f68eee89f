"""Differences between arms: on the same pairs of the same seeds, with intervals and Holm's adjustment."""

import numpy as np
import pandas as pd
import pytest

from scir.report import claims, compare as comparing, document, figures, tables as tabling
from scir.report.claims import significant
from scir.report.compare import compare, last, rate_gap
from scir.report.document import tables
from scir.statistics import rate

from small_reports import NAMES, answers, both, gathered, pairs, verdicts


def test_arms_meet_on_the_same_pair_of_the_same_seed():
    g = gathered(
        pairs("srlm", 2, "++++", "----"),
        pairs("scir", 2, "++++", "+++-"),
        pairs("scir", 2, "++++", "----", seed=1),
        pairs("scir", 2, "++", "--", seed=2),
        pairs("srlm", 2, "++++", "----", seed=2),
        pairs("srlm", 2, "++++", "++++", seed=1).iloc[::-1],
    )
    gap = compare(last(g), "scir", "srlm", lambda d: ~d.agree, "held-out")
    assert gap["n"] == 10 and gap["seeds"] == 3 and gap["prompts"] == 4, "seed 2 has two pairs in common"
    a, b = comparing.matched(last(g), "scir", "srlm", "held-out")
    assert (a.index == b.index).all()
    assert (a.agree.astype(int) - b.agree.astype(int)).groupby("seed").sum().to_dict() == {0: 3, 1: -4, 2: 0}
    assert gap["same_way"] < 3 and not significant(gap | {"low": 0.1, "high": 0.2}, 0)


def test_runs_are_never_pooled():
    g = gathered(
        pairs("srlm", 2, *both(30, apart=15), run="one"),
        pairs("scir", 2, *both(30), run="one"),
        pairs("sft", 1, *both(30), run="one"),
        pairs("srlm", 2, *both(30), run="two"),
        pairs("scir", 2, *both(30, apart=15), run="two"),
        pairs("sft", 1, *both(30), run="two"),
    )
    made = tables(g)
    t = made["comparisons"].query("quantity == 'inconsistency' and arms == 'scir - srlm'").set_index("run")
    assert t.difference.to_dict() == {"one": -0.5, "two": 0.5} and set(t.n) == {30}
    half = made["claims"][made["claims"].claim.str.startswith("b. ")].set_index("run")
    assert half["held-out"].to_dict() == {"one": "met", "two": "missed"}
    assert set(made["claim_numbers"].run) == set(made["inconsistency"].run) == {"one", "two"}
    assert [s.split(":")[0] for s in claims.headline(g)] == ["one", "two"]


def test_arms_are_compared_after_the_same_number_of_iterations():
    g = gathered(
        pairs("sft", 1, "++", "++"),
        pairs("srlm", 2, "++", "--"),
        *(pairs("scir", t, "++", "++", seed=s) for s, t in ((0, 2), (0, 3), (1, 2))),
    )
    assert set(zip(last(g).arm, last(g).iteration)) == {("sft", 1), ("scir", 2), ("srlm", 2)}
    assert set(comparing.comparisons(g)["iteration"]) == set(claims.claim_numbers(g)["iteration"]) == {"M_2"}


def test_two_arms_meet_where_both_have_been():
    "srlm went as far as scir, an ablation stopped one round earlier: each is compared with scir of its own round."
    at = lambda arm, wrong: [pairs(arm, t, *both(60, wrong=w)) for t, w in wrong.items()]
    g = gathered(
        pairs("sft", 1, *both(60)), *at("scir", {2: 10, 3: 20}), *at("srlm", {2: 0, 3: 20}), *at("scir-static", {2: 10})
    )
    t = comparing.comparisons(g).query("quantity == 'judge accuracy'").set_index(["iteration", "arms"])
    after_one = {"scir - M_1": -0.167, "scir - srlm": -0.167, "scir - scir-static": 0}
    assert t.difference.round(3).loc["M_2"].to_dict() == after_one
    assert t.difference.round(3).loc["M_3"].to_dict() == {"scir - M_1": -0.333, "scir - srlm": 0}
    numbers = claims.claim_numbers(g)
    assert numbers[numbers.claim == "k3"]["iteration"].tolist() == ["M_2"]
    assert numbers[numbers.claim == "f"]["iteration"].tolist() == ["M_2", "M_3"]
    assert claims.claims(numbers).model.unique().tolist() == ["M_2", "M_3"]
    assert set(figures.contrasted(g, "held-out")[0].iteration) == {1, 3}
    assert set(tabling.ablation_table(g)["iteration"]) == {"M_2"}
    shown = [("sft", 1), ("srlm", 2), ("srlm", 3), ("scir", 2), ("scir", 3), ("scir-static", 2)]
    assert list(figures.every_round(g)) == shown
    assert all(set(zip(d.arm, d.iteration)) == {m} for m, d in figures.every_round(g).items())


def test_no_width_is_no_certainty():
    g = gathered(pairs("srlm", 2, "++++", "----"), pairs("scir", 2, "++++", "++++"), pairs("sft", 1, "++++", "----"))
    gap = compare(last(g), "scir", "srlm", lambda d: ~d.agree, "held-out")
    assert gap["difference"] == -1 and gap["low"] == -1 and gap["high"] == pytest.approx(-1 + rate([0] * 4)["high"])
    assert gap["p"] == 0.125
    assert verdicts(g)["b", "held-out"] == "not significant"


@pytest.mark.parametrize(
    "low, high, p, same, is_firm",
    [
        (0.1, 0.2, 0.009, 2, True),
        (-0.2, -0.1, 0.009, 2, True),
        (-0.1, 0.2, 0.001, 2, False),
        (0.1, 0.2, 0.01, 2, False),
        (0.1, 0.2, np.nan, 2, False),
        (0.1, 0.2, 0.001, 1, False),
    ],
)
def test_firm(low, high, p, same, is_firm):
    assert significant({"low": low, "high": high, "seeds": 2, "same_way": same}, p) == is_firm


def test_holm():
    assert comparing.holm([0.5, 0.9]) == [1, 1]
    assert comparing.holm([0.01, np.nan, 0.04])[::2] == [0.02, 0.04] and np.isnan(comparing.holm([0.01, np.nan])[1])
    assert comparing.holm([]) == []
    g = gathered(
        *(pairs(a, 2, *both(12, apart=k)) for a, k in (("scir", 0), ("srlm", 6), ("dice", 1))),
        pairs("sft", 1, *both(12)),
    )
    c = comparing.comparisons(g).query("quantity == 'inconsistency'").set_index("arms")
    assert c.loc["scir - srlm", "p"] == 0.03125
    assert c.loc["scir - M_1", "p"] == 1


def test_rate_gap_of_independent_rates_is_newcombes():
    "Newcombe 1998, method 10, table II: 56/70 against 48/80 is .2 [.0524, .3339]; few agreed pairs make no certainty."
    rows = lambda k, n, who: pd.DataFrame(
        {"hit": [1.0] * k + [0.0] * (n - k), "prompt": [f"{who}{i}" for i in range(n)], "run": "r", "seed": 0}
    )
    gap = rate_gap(rows(56, 70, "a"), rows(48, 80, "b"))
    assert (gap["difference"], gap["low"], gap["high"]) == pytest.approx((0.2, 0.0524, 0.3339), abs=1e-4)
    assert gap["p"] < 0.05 and gap["n"] == 80
    assert rate_gap(rows(48, 80, "b"), rows(56, 70, "a"))["low"] == pytest.approx(-0.3339, abs=1e-4)
    few = rate_gap(rows(5, 12, "x"), rows(0, 4, "x"))
    same = rate_gap(rows(4, 9, "a"), rows(4, 9, "a"))
    assert same["difference"] == 0 and same["high"] - same["low"] < 0.2, "what both miss alike cancels"
    assert few["low"] < 0 and few["p"] > 0.05 and rate_gap(rows(0, 0, "a"), rows(1, 2, "b")) == {}
    assert rate_gap(rows(1, 2, "a"), rows(1, 2, "a")) | {"low": 0, "high": 0} == {
        "difference": 0,
        "low": 0,
        "high": 0,
        "p": 1,
        "n": 2,
        "prompts": 2,
        "seeds": 1,
        "same_way": 1,
    }


def test_paired_accuracy_uses_the_decided_pairs():
    label = ["a"] * 3 + [None] * 3
    rows = ("scir", 2, "++++++"), ("sft", 1, "--+---")
    g = gathered(*(pairs(a, t, "+" * 6, i, set="panel").assign(label=label) for a, t, i in rows))
    gap = comparing.difference(last(g), "scir", "sft", "accuracy_implicit", "panel")
    assert gap["n"] == 3 and gap["difference"] == pytest.approx(2 / 3)
    assert comparing.difference(last(g), "scir", "sft", "inconsistency", "panel")["n"] == 6


def test_m1s_own_answers_are_the_panel():
    g = gathered(
        pairs("sft", 1, "++++", "++--", set="panel"),
        pairs("scir", 2, "++++", "++++", set="panel"),
        pairs("scir", 2, "+++", "++-", set="own"),
    )
    found = tabling.summary(g).set_index(["arm", "set"]).inconsistency.to_dict()
    assert found == {("sft", "own"): 0.5, ("scir", "own"): 1 / 3, ("sft", "panel"): 0.5, ("scir", "panel"): 0}
    gap = comparing.difference(last(g), "scir", "sft", "inconsistency", "own")
    assert gap["difference"] == pytest.approx(1 / 3 - 0.5) and gap["n"] == 4, "rates are compared"
    assert set(document.kept_tables(g)["pairs"].query("arm == 'sft'").set) == {"panel"}
    assert "own" not in set(gathered(pairs("sft", 1, "++", "++", set="panel")).pairs.set)


def test_rank_correlation_is_that_of_the_seeds():
    "One seed agrees perfectly, one is reversed; ranks over both, whose scales differ, would say something else."
    up, ten = [float(x) for x in range(1, 11)], [10.0 * x for x in range(1, 11)]
    g = gathered(pairs("sft", 1, up, up), pairs("sft", 1, ten, ten[::-1], seed=1))
    m = comparing.measure(g.pairs, "rank_correlation", NAMES)
    assert m["value"] == pytest.approx(0) and (m["least"], m["most"]) == pytest.approx((-1, 1))
    assert m["low"] <= 0 <= m["high"]
    alone = comparing.measure(g.pairs[g.pairs.seed == 0], "rank_correlation", NAMES)
    assert alone["value"] == pytest.approx(1)
    assert comparing.measure(gathered(pairs("base", 0, up, [0.0] * 10)).pairs, "rank_correlation", NAMES) == {}
    assert tabling.inconsistency_table(tabling.summary(g)).iloc[0]["rank correlation"].endswith("(-1.00-1.00)")


def test_answers_are_compared_over_prompts():
    "Two answers to p0 count as one prompt; a prompt that one arm lacks is left out."
    one = pd.concat([answers("scir", 2, [1, 1, 1]), answers("scir", 2, [0])], ignore_index=True)
    g = gathered(pairs("sft", 1, "+", "+"), pairs("scir", 2, "+", "+"), answered=[one, answers("sft", 1, [0, 1])])
    gap = comparing.answer_gap(g, "scir", "sft", "success")
    assert gap["difference"] == pytest.approx((0.5 + 0) / 2) and gap["n"] == gap["prompts"] == 2
    t = comparing.comparisons(g).query("set == 'answers'").set_index("quantity")
    assert set(t.index) == {"strict success", "score", "finished", "tokens"}
    assert t.loc["strict success", "arms"] == "scir - M_1"
