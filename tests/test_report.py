"""The report on tables small enough to count by hand: rates, differences, claims, figures, and what is kept."""

import json, shutil
from functools import cache

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt
from scipy.stats import t as student

from scir.report import claims, compare as comparing, document, figures, gather as gathering, tables as tabling
from scir.report.gather import AT, Gathered, answer_frame
from scir.report.compare import compare, last, rate_gap
from scir.report.claims import significant
from scir.report.gather import gather
from scir.statistics import derive, grouped, rate
from scir.recipe import ARMS, all_nodes, dump_recipe, parse_recipe
from scir.report.figures import training_curve
from scir.report.document import tables
from scir.store import Grade, Response, Score, write_json, write_rows, write_text

NAMES = ["generative", "implicit"]
FIGURES = {
    "headline",
    "inconsistency",
    "own_accuracy",
    "retained",
    "joint_panel",
    "joint_own",
    "length",
    "splits_held-out",
    "calibration_held-out",
    "calibration_panel",
    "training",
    "flip_rate",
}


def pairs(arm, iteration, judge, implicit, set="held-out", seed=0, run="r", label="a", prompts=None, mass=0.9):
    "A row per pair from strings of + and -; a number is the margin itself. Side a is right."
    value = lambda v: {"+": 1.0, "-": -1.0}.get(v, v)
    return pd.DataFrame(
        [
            {
                "run": run,
                "seed": seed,
                "arm": arm,
                "iteration": iteration,
                "set": set,
                "id": f"i{k}",
                "prompt": (prompts or [f"p{k}" for k in range(len(judge))])[k],
                "subset": "",
                "label": label,
                "tokens_a": 4 + k % 3,
                "tokens_b": 5,
                "m_ab": value(j),
                "m_ba": -value(j),
                "mass": mass,
                "likelihood": 1.0,
                "generative": value(j),
                "implicit": value(i),
            }
            for k, (j, i) in enumerate(zip(judge, implicit, strict=True))
        ]
    )


def model(arm, iteration, seed=0, run="r", **kw):
    trained = {"retained": None, "steps": None} if iteration < 2 else {"retained": 0.5, "steps": 4}
    return {
        "run": run,
        "seed": seed,
        "arm": arm,
        "iteration": iteration,
        "mean_tokens": 20.0,
        "finished": 1.0,
        "empty": 0,
        "distinct_2": 0.5,
        "pairs": 8,
        **trained,
        "win_rate": None,
        "win_rate_low": None,
        "win_rate_high": None,
        "length_controlled": None,
    } | kw


def answers(arm, iteration, scores, seed=0, run="r", **kw):  # one answer per prompt
    score = np.array([np.nan if s is None else s for s in scores], float)
    success = np.where(np.isnan(score), np.nan, score == 1)
    return pd.DataFrame(
        {
            "run": run,
            "seed": seed,
            "arm": arm,
            "iteration": iteration,
            "id": [f"p{k}/0" for k in range(len(scores))],
            "prompt": [f"p{k}" for k in range(len(scores))],
            "tokens": 20,
            "finished": True,
            "score": score,
            "success": success,
            "bigrams": 19,
            "new_bigrams": 15,
        }
        | kw
    )


def gathered(*frames, models=None, steps=None, answered=()):
    d = pd.concat(frames, ignore_index=True)
    models = models or [model(a, t, s, r) for r, s, a, t in d[AT].drop_duplicates().itertuples(index=False)]
    answered = (
        pd.concat(answered, ignore_index=True) if len(answered) else pd.DataFrame(columns=[*AT, *gathering.ANSWER])
    )
    steps = pd.DataFrame(steps or [], columns=None if steps else [*AT, "step"])
    return Gathered(derive(gathering.with_own(d), NAMES), pd.DataFrame(models), steps, answered, NAMES)


def both(n, wrong=0, apart=0):  # judge and implicit; the first `wrong` both wrong, then `apart` the judge only
    return "-" * (wrong + apart) + "+" * (n - wrong - apart), "-" * wrong + "+" * (n - wrong)


def verdicts(g):  # (claim's letter, set) -> verdict
    t = claims.claims(claims.claim_numbers(g))
    return {(r["claim"].split(".")[0], s): r[s] for r in t.to_dict("records") for s in t.columns[1:]}


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


# intervals


def test_one_pair_per_prompt_is_wilson_and_copies_add_nothing():
    hits = [1] * 13 + [0] * 7
    assert grouped(hits, range(20)) == rate(hits) | {"prompts": 20}
    thrice = grouped(hits * 3, list(range(20)) * 3)
    assert thrice["n"] == 60 and thrice["prompts"] == 20 and thrice["value"] == 0.65
    assert thrice["low"] < rate(hits)["low"] and thrice["high"] > rate(hits)["high"]
    assert thrice["high"] - thrice["low"] < 1.15 * (rate(hits)["high"] - rate(hits)["low"])


def test_grouped_by_hand():
    "Prompts with 3 of 3, 0 of 1 and 1 of 2: p = 4/6, residuals 1, -2/3, -1/3; variance (14/9)(3/2)/36 = 7/108."
    r, p, z2 = grouped([1, 1, 1, 0, 1, 0], list("aaabcc")), 2 / 3, student.ppf(0.975, 2) ** 2
    n = p * (1 - p) / (7 / 108)
    centre, half = (p + z2 / 2 / n) / (1 + z2 / n), np.sqrt(z2 / n * (p * (1 - p) + z2 / 4 / n)) / (1 + z2 / n)
    assert (r["low"], r["high"]) == pytest.approx((centre - half, centre + half)) and r["value"] == pytest.approx(p)


@pytest.mark.parametrize("hits, prompts", [([0] * 60, 30), ([1] * 60, 30), ([1, 0] * 30, 30)])
def test_an_interval_of_equal_prompts_has_the_width_of_its_prompts(hits, prompts):
    r = grouped(hits, [i // 2 for i in range(60)])
    assert (
        r["high"] - r["low"]
        > rate(hits[::2] if hits[0] == hits[1] else [1, 0] * 15)["high"]
        - rate(hits[::2] if hits[0] == hits[1] else [1, 0] * 15)["low"]
    )


def test_edges_of_grouped():
    assert grouped([], []) == {"value": None, "low": None, "high": None, "n": 0, "prompts": 0}
    one = grouped([1, 1, 0, 1], ["a"] * 4)
    assert one["low"] < 0.05 and one["high"] > 0.95 and one["value"] == 0.75


def test_grouped_covers():
    rng, inside = np.random.default_rng(0), 0
    for _ in range(400):
        p = rng.beta(1, 3, 24)  # mean 1/4; six pairs a prompt
        r = grouped(rng.random((24, 6)).ravel() < np.repeat(p, 6), np.repeat(np.arange(24), 6))
        inside += r["low"] <= 0.25 <= r["high"]
    assert 0.92 < inside / 400 < 0.98


# rates


def test_summary_by_hand():
    "Two seeds of four pairs. Seed 0: judge ++-+, implicit +--+: one contradiction; seed 1: ++++ and ----: four."
    s = tabling.summary(gathered(pairs("sft", 1, "++-+", "+--+"), pairs("sft", 1, "++++", "----", seed=1))).iloc[0]
    assert s.inconsistency == 5 / 8 and (s.inconsistency_least, s.inconsistency_most) == (0.25, 1)
    assert s.inconsistency_n == 8 and s.inconsistency_prompts == 4 and s.seeds == 2 and s.pairs == 4
    assert s.accuracy_generative == 7 / 8 and s.accuracy_implicit == 2 / 8 and s.accuracy_agreed == 2 / 3
    assert s.accuracy_agreed_n == 3
    assert (s.accuracy_agreed_least, s.accuracy_agreed_most) == (2 / 3, 2 / 3), (
        "a seed without an agreed pair has no share"
    )
    assert s.accuracy_likelihood == 1 and s.flip_rate == 0 and s.inconsistency_likelihood == 1 / 8
    row = tabling.reward_table(
        tabling.summary(gathered(pairs("sft", 1, "++-+", "+--+"), pairs("sft", 1, "++++", "----", seed=1)))
    ).iloc[0]
    assert row["accuracy on agreed pairs"].startswith("67% of 3 [") and row["judge accuracy"].startswith("88% [")
    assert row["judge accuracy"].endswith("(75%-100%)")


def test_what_cannot_be_said_is_left_out():
    g = gathered(pairs("base", 0, "+-+-", [0.0] * 4), pairs("sft", 1, "+-+-", "+-+-", set="panel", label=None))
    s = tabling.summary(g).set_index("set")
    assert pd.isna(s.loc["held-out", "inconsistency"]) and s.loc["held-out", "accuracy_generative"] == 0.5
    assert "accuracy_implicit" not in s
    assert pd.isna(s.loc["panel", "accuracy_generative"]) and s.loc["panel", "inconsistency"] == 0
    made = tabling.inconsistency_table(tabling.summary(g))
    assert made.inconsistency.tolist()[1] == "-" and made.model.tolist() == ["M_1", "M_0"]


def test_a_third_reward_model_is_shown():
    d = pairs("sft", 1, "++-+", "+--+").assign(pointwise=[1.0, -1, -1, 1])
    g = gathered(pairs("sft", 1, "+", "+"))._replace(
        pairs=derive(d, [*NAMES, "pointwise"]), rewards=[*NAMES, "pointwise"]
    )
    assert tabling.reward_table(tabling.summary(g)).iloc[0]["pointwise accuracy"].startswith("50%")
    panel = g._replace(pairs=g.pairs.assign(set="panel"))
    assert claims.headline(panel)[0].startswith(
        "On pairs of M_1's own answers, the internal reward models disagree on 25%"
    )


# differences


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
    assert document.compared_iterations(g) == " Compared with scir: srlm at M_2."


def test_two_arms_meet_where_both_have_been():
    "srlm went as far as scir, an ablation stopped one round earlier: each is compared with scir of its own round."
    at = lambda arm, wrong: [pairs(arm, t, *both(60, wrong=w)) for t, w in wrong.items()]
    g = gathered(
        pairs("sft", 1, *both(60)), *at("scir", {2: 10, 3: 20}), *at("srlm", {2: 0, 3: 20}), *at("scir-static", {2: 10})
    )
    t = comparing.comparisons(g).query("quantity == 'judge accuracy'").set_index("arms")
    assert t["iteration"].to_dict() == {"scir - M_1": "M_3", "scir - srlm": "M_3", "scir - scir-static": "M_2"}
    assert t.difference.round(3).to_dict() == {"scir - M_1": -0.333, "scir - srlm": 0, "scir - scir-static": 0}
    assert document.compared_iterations(g) == " Compared with scir: srlm at M_3; scir-static at M_2."
    assert set(figures.contrasted(g, "held-out")[0].iteration) == {1, 3}
    assert set(tabling.ablation_table(g)["iteration"]) == {"M_2"}
    assert {a: d.iteration.max() for a, d in figures.latest(g).items()} == {
        "sft": 1,
        "srlm": 3,
        "scir": 3,
        "scir-static": 2,
    }
    said = [line for line in tabling.strongest(comparing.comparisons(g)) if line.startswith("judge accuracy")]
    assert said[0].startswith("judge accuracy, held-out: strongest competitor: M_1 (scir - M_1 = -33.3 [")
    assert said[0].endswith(" points, significant)")


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


def test_holm_within_a_family():
    t = comparing.with_holm(pd.DataFrame({"set": list("aab"), "p": [0.01, 0.04, 0.03]}), ["set"])
    assert t.p_holm.tolist() == [0.02, 0.04, 0.03] and list(t.columns) == ["set", "p", "p_holm"]
    assert comparing.holm([0.5, 0.9]) == [1, 1]
    assert comparing.holm([0.01, np.nan, 0.04])[::2] == [0.02, 0.04] and np.isnan(comparing.holm([0.01, np.nan])[1])
    assert comparing.holm([]) == []
    g = gathered(
        *(pairs(a, 2, *both(12, apart=k)) for a, k in (("scir", 0), ("srlm", 6), ("dice", 1))),
        pairs("sft", 1, *both(12)),
    )
    c = comparing.comparisons(g).query("quantity == 'inconsistency'").set_index("arms")
    assert c.loc["scir - srlm", "p"] == 0.03125 and c.loc["scir - srlm", "p_holm"] == pytest.approx(3 * 0.03125)
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


def test_ties_count_for_agreement_but_not_for_accuracy():
    "Of four pairs the grader decides two; the two models disagree on one decided and one undecided pair."
    d = pairs("sft", 1, "+-++", "+-+-", set="panel").assign(label=["a", "b", None, None])
    d.loc[1, "implicit"] = 1.0
    g = gathered(d)
    s = tabling.summary(g).iloc[0]
    assert s.inconsistency == 0.5 and s.inconsistency_n == 4 and s.inconsistency_labelled == 0.5
    assert s.inconsistency_labelled_n == 2
    assert s.accuracy_generative == 1 and s.accuracy_implicit == 0.5 and s.accuracy_agreed == 1
    assert s.accuracy_agreed_n == 1 and s.labelled == 2
    assert tabling.reward_table(tabling.summary(g)).iloc[0]["set"] == "panel, 4 pairs, 2 labelled"


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


# answers


def test_answers_by_hand():
    "Two prompts. The second answer to the first repeats one of its two bigrams."
    say = lambda i, prompt, ids, finished=True: Response(
        id=f"{prompt}/{i}",
        prompt_id=prompt,
        prompt=prompt,
        candidate=i,
        response="x",
        response_ids=ids,
        finished=finished,
        seed=0,
    )
    d = answer_frame(
        [say(0, "p", [1, 2, 3]), say(1, "p", [2, 3, 4]), say(0, "q", [1, 2], False)],
        {"p/0": 1.0, "p/1": 0.5, "q/0": None},
    )
    assert d.bigrams.tolist() == [2, 2, 1] and d.new_bigrams.tolist() == [2, 1, 1] and d.tokens.tolist() == [3, 3, 2]
    assert d.success.tolist()[:2] == [1, 0]
    assert d.score.isna().tolist() == d.success.isna().tolist() == [False, False, True]
    row = tabling.answer_cells(d.assign(seed=0))
    assert row["strict success"].startswith("50% [") and row["mean score"].startswith("0.75 [")
    assert row["finished"].startswith("67% [")
    assert row["tokens"].startswith("2.7 [") and row["distinct-2"].startswith("0.80 [") and "(" not in row["tokens"]


def test_answers_without_a_grader():
    g = gathered(pairs("sft", 1, "++", "++"), answered=[answers("sft", 1, [None, None])])
    row = tabling.policy_table(g).iloc[0]
    assert row["strict success"] == row["mean score"] == row["correct labels"] == "-"
    assert row.tokens == "20.0 [20.0, 20.0]"
    assert not len(tabling.policy_table(gathered(pairs("sft", 1, "++", "++"))))


def test_answers_are_compared_over_prompts():
    "Two answers to p0 count as one prompt; a prompt that one arm lacks is left out."
    one = pd.concat([answers("scir", 2, [1, 1, 1]), answers("scir", 2, [0])], ignore_index=True)
    g = gathered(pairs("sft", 1, "+", "+"), pairs("scir", 2, "+", "+"), answered=[one, answers("sft", 1, [0, 1])])
    gap = comparing.answer_gap(g, "scir", "sft", "success")
    assert gap["difference"] == pytest.approx((0.5 + 0) / 2) and gap["n"] == gap["prompts"] == 2
    t = comparing.comparisons(g).query("set == 'answers'").set_index("quantity")
    assert set(t.index) == {"strict success", "score", "finished", "tokens"}
    assert t.loc["strict success", "arms"] == "scir - M_1"


# alignment


def test_alignment_by_hand():
    won = dict(win_rate_low=0.4, win_rate_high=0.8, length_controlled=0.55)
    g = gathered(
        pairs("sft", 1, "+", "+"),
        models=[
            model("sft", 1),
            model("scir", 2, win_rate=0.6, **won),
            model("scir", 2, seed=1, win_rate=0.7, **won | {"win_rate_high": 0.9}),
            model("srlm", 2, win_rate=0.5, **won),
        ],
    )
    t = tabling.alignment_table(g).set_index("model")
    assert t.loc["scir M_2", "win rate"] == "65% [40, 85] (60%-70%)"
    assert t.loc["scir M_2", "length-controlled"] == "55% (55%-55%)" and t.loc["srlm M_2", "win rate"] == "50% [40, 80]"
    elsewhere = t["published (second-hand)"]
    assert list(t.index) == ["scir M_2", "srlm M_2"] and elsewhere["scir M_2"].startswith("14.51 (LC win rate")
    assert "11.37" not in elsewhere["srlm M_2"] and "12.58" in elsewhere["srlm M_2"]
    assert "15.38" in elsewhere["srlm M_2"]
    assert "9.94 as srlm M_1" in tabling.reported("sft", 1) and tabling.reported("scir", 5) == "-"


def test_reported_numbers_say_where_they_are_from():
    t = tabling.reported_table()
    assert t.source.str.contains("second-hand|notes").all()
    assert t[t.arm == "scir"].source.str.contains("second-hand").all() and len(t) == 5
    assert t.iloc[0]["values"] == "14.51, 18.49, 24.92" and t.iloc[0]["iterations"] == "M_2 to M_4"


# claims


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


# a run with an effect, and one without

EFFECT = {
    "sft": (1, 3.0, 0.4, 0.3),
    "srlm": (2, 1.5, 0.7, 0.45),
    "scir": (2, 0.3, 1.2, 0.75),
    "scir-no-consistency": (2, 1.2, 0.8, 0.5),
    "scir-no-confidence": (2, 0.3, 0.6, 0.7),
    "scir-no-gate": (2, 0.6, 0.5, 0.6),
    "scir-static": (2, 1.3, 1.0, 0.6),
}  # apart, knowing, success


@cache
def made(seed, effect, prompts=60, per=3, seeds=2):
    "Margins around a hidden truth, two of three pairs labelled; without an effect, models differ in noise only."
    rng, frames, answered, models = np.random.default_rng(seed), [], [], []
    for s, (arm, (t, *what)) in ((s, n) for s in range(seeds) for n in EFFECT.items()):
        apart, knows, success = what if effect else EFFECT["sft"][1:]
        for name in ("held-out", "panel", *["own"] * (t > 1)):
            truth = np.random.default_rng([seed, s, len(name)] + [len(arm)] * (name == "own")).choice(
                [-1, 1], prompts * per
            )
            shared = rng.normal(0, 1, prompts * per)
            judge, implicit = (knows * truth + shared + apart * rng.normal(0, 1, prompts * per) for _ in range(2))
            d = pairs(arm, t, judge, implicit, set=name, seed=s, prompts=[f"p{k // per}" for k in range(prompts * per)])
            label = np.where(truth > 0, "a", "b").astype(object)
            label[::3] = None
            frames.append(d.assign(label=label))
        answered.append(answers(arm, t, rng.random(prompts) < success, seed=s))
        models.append(model(arm, t, s, correct_labels=knows / 1.3 if effect else rng.random()))
    return gathered(*frames, models=models, answered=answered)


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
    assert answers == f"Answers that the grader scores as fully correct: {good.sft:.0%} for M_1, {later}"
    plain = gathered(
        pairs("sft", 1, "++", "+-", set="panel", label=None), pairs("scir", 2, "++", "++", set="panel", label=None)
    )
    start = "On pairs of M_1's own answers, the judge and the implicit reward disagree on"
    assert claims.headline(plain) == [f"{start} 50% for M_1 and 0% after SCIR."]
    assert claims.headline(gathered(pairs("base", 0, "+", [0.0]))) == []


def test_the_first_screen_is_above_the_appendix():
    g = made(1, effect=True)
    made_tables = tables(g)
    text = document.document(
        made_tables,
        claims.headline(g),
        document.size(g, made_tables["summary"]),
        [("headline", "headline", ""), ("joint_own", "joint_own", "")],
    )
    top, rest = text.split("## Appendix\n")
    assert (
        top.index("![How often the judge") < top.index(claims.headline(g)[0]) < top.index("## Claims")
        and "joint_own" not in top
    )
    assert sum(line.startswith("| --- |") for line in top.splitlines()) == 1
    assert "2 seeds; pairs per seed: own 180 (120 labelled), panel 180 (120 labelled)" in rest
    assert "Fewer than three" not in top
    assert "\n| claim | overall | own | panel | held-out |\n" in top
    assert "nan" not in text and "None" not in text


# figures


def steps(arm, iteration, retained, seed=0, **kw):
    return [
        {
            "run": "r",
            "seed": seed,
            "arm": arm,
            "iteration": iteration,
            "step": i + 1,
            "retained": r,
            "loss_dpo": 0.7,
            "loss_consistency": 0.0,
            "loss_confidence": 0.6,
        }
        | kw
        for i, r in enumerate(retained)
    ]


def test_courses_by_hand():
    g = gathered(
        pairs("sft", 1, "+", "+"),
        models=[
            model("scir", 2, retained=0.75),
            model("scir", 2, 1, retained=0.25),
            model("scir", 3, retained=0.5),
            model("srlm", 2, retained=0.2),
        ],
        steps=steps("scir", 2, [0.5, 1.0], inconsistency=0.5)
        + steps("scir", 2, [0, 0.5], 1, inconsistency=0.5)
        + steps("scir", 3, [0.5], inconsistency=0.5)
        + steps("srlm", 2, [1.0, 1.0]),
    )
    c = training_curve(g, "scir", "retained")
    assert (
        c.step.tolist() == [1, 2, 3] and c.value.tolist() == [0.25, 0.75, 0.5] and c.end.tolist() == [False, True, True]
    )
    assert training_curve(g, "srlm", "retained").value.tolist() == [0.2, 0.2], (
        "of all scored pairs, not of those it chose"
    )
    assert training_curve(g, "srlm", "loss_consistency").empty and training_curve(g, "srlm", "loss_confidence").empty
    assert len(training_curve(g, "scir", "loss_consistency")) == 3 and len(training_curve(g, "srlm", "loss_dpo")) == 2
    assert training_curve(g, "scir", "absent").empty


def test_panels():
    assert figures.families(ARMS) == {
        "methods": ["srlm", "srlm-pointwise", "dice", "cream", "external", "scir"],
        "ablations": ["scir", "scir-no-consistency", "scir-no-confidence", "scir-no-gate", "scir-static"],
    }
    assert figures.families(["sft"]) == {"methods": []} and figures.families(["scir"]) == {"methods": ["scir"]}
    assert list(figures.families(["scir-static"])) == ["ablations"] and set(figures.STYLE) == {"base", *ARMS}
    for arms in figures.families(ARMS).values():
        assert len({figures.STYLE[a][0] for a in arms}) == len(arms)


def test_figures_of_little():
    for g in (
        gathered(pairs("base", 0, "+-", [0.0, 0.0])),
        gathered(pairs("sft", 1, "++", "++")),
        gathered(pairs("sft", 1, "++", "+-", label=None).assign(tokens_a=5)),
    ):
        drawn = document.figures(g, tabling.summary(g))
        assert not {"retained", "training"} & set(drawn)
        assert ("inconsistency" in drawn) == (g.pairs.arm.iloc[0] != "base")
    g = gathered(pairs("sft", 1, "+-", "+-"), pairs("scir", 2, "+-", "+-"))
    figure = figures.plot_sets(tabling.summary(g), "inconsistency", "rate")
    assert [t.get_text() for t in figure.axes[0].get_xticklabels()] == ["M_1", "M_2"]
    assert {t.get_text() for t in figure.axes[0].get_legend().get_texts()} == {"scir", "up to M_1"}


def test_every_figure_has_a_caption():
    for name in (*FIGURES, "training_ablations", "joint_held-out"):
        assert document.caption(name)
    assert document.caption("retained") != document.caption("inconsistency")
    assert document.caption("joint_panel").startswith("Judge against implicit")


# a run's files

RECIPE = {"name": "made", "arms": ["srlm", "scir", "scir-no-gate"], "iterations": 1}


def scores(shift, n=8, label="a", **more):
    return [
        Score(
            id=f"i{k}",
            prompt_id=f"p{k % 4}",
            prompt=f"Say {k % 4}.",
            response_a="x",
            response_b="y",
            ids_a=[1] * (3 + k),
            ids_b=[1] * 5,
            logps=(-3.0 - k, -4.0),
            reference_logps=(-3.0, -4.0),
            order_margins=(k - 3.5 + shift, 3.0 - k),
            verdict_mass=(0.9, 0.8),
            margins={"generative": k - 3.3 + shift, "implicit": shift * (2.9 - k) / 7, **more},
            label=label,
        )
        for k in range(n)
    ]


def responses(node, n=8):
    "Two answers to each of four prompts; the first of a trained model is perfect."
    rows = [
        Response(
            id=f"p{k % 4}/{k // 4}",
            prompt_id=f"p{k % 4}",
            prompt=f"Say {k % 4}.",
            candidate=k // 4,
            response="x",
            response_ids=[1, 2, 3 + k],
            finished=k != 3,
            seed=0,
        )
        for k in range(n)
    ]
    good = [k < 4 and node.count("/") == 2 for k in range(n)]
    return rows, [Grade(id=r.id, prompt_id=r.prompt_id, score=1.0 if ok else 0.5) for r, ok in zip(rows, good)]


def write_evaluation(folder, k, node, recipe, graded):
    own = {"own": "a" if graded else None} if not node.endswith("m1") else {}
    sets = {"held-out": "a", "panel": "a" if graded else None} | own
    for name, label in sets.items():
        rows = scores(k * 0.7, label=label, **{r: 1.0 for r in recipe.rewards[2:]})
        if name != "held-out":
            rows[0].label = None
        write_rows(folder / f"{name}.jsonl", rows)
    said, grades = responses(node)
    write_rows(folder / "responses.jsonl", said)
    if graded:
        write_rows(folder / "grades.jsonl", grades)
    write_json(
        folder / "metrics.json",
        {
            "answers": {"mean_tokens": 20.0 + k, "finished": 0.5, "empty": 0, "distinct_2": 0.5},
            "sets": {s: {} for s in sets},
        },
    )


def make_run(folder, graded=True, **kw):
    recipe = parse_recipe(RECIPE | kw)
    write_text(folder / "recipe.yaml", dump_recipe(recipe))
    summary = {"pairs": 8, "retained": 0.5, "steps": 2} | ({"correct_labels": 0.75} if graded else {})
    write_json(
        folder / "manifest.json",
        {"steps": {f"optimise:{n}": {"summary": summary} for n in all_nodes(recipe) if n.count("/") == 2}},
    )
    for k, node in enumerate(all_nodes(recipe)):
        arm, t = gathering.coordinates(folder, node)["arm"], gathering.coordinates(folder, node)["iteration"]
        write_evaluation(folder / node / "evaluation", k, node, recipe, graded)
        if t > 1:
            write_rows(
                folder / node / "metrics.jsonl",
                [
                    {
                        k: v
                        for k, v in row.items()
                        if k in ("step", "retained", "loss_dpo", "loss_consistency", "inconsistency")
                    }
                    for row in steps(arm, t, [0.5, 0.7], **{"inconsistency": 0.4} if arm != "srlm" else {})
                ],
            )
            write_json(
                folder / node / "alignment" / "metrics.json",
                {
                    "win_rate": 0.5 + k / 100,
                    "win_rate_low": 0.4,
                    "win_rate_high": 0.7,
                    "win_rate_n": 9,
                    "length_controlled": None,
                    "judge": "j",
                    "reference": "m1",
                },
            )
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = make_run(tmp_path_factory.mktemp("runs") / "made")
    document.report(folder)
    return folder


@pytest.fixture
def quick(monkeypatch):
    "Figures are drawn, but written as an empty file."
    monkeypatch.setattr(
        document, "_save", lambda fig, path, title: (fig.suptitle(title), path.with_suffix(".png").touch())
    )


def kept_files(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.suffix in (".csv", ".md", ".png", ".parquet")}


def test_results_hold_every_table_figure_and_caption(run):
    out = run / "report"
    text = (out / "results.md").read_text()
    for name in (
        "claims",
        "claim_numbers",
        "inconsistency",
        "reward_models",
        "policy",
        "alignment",
        "ablation",
        "comparisons",
        "reported",
    ):
        t = pd.read_csv(out / f"{name}.csv", dtype=str, keep_default_na=False)
        assert len(t) and all(str(r.iloc[0]) in text for _, r in t.iterrows()), name
        if name != "comparisons":
            assert "| " + " | ".join(t.columns) + " |" in text, name
    assert document.CAPTION in text
    assert all(
        (out / f"{n}.png").stat().st_size > 5000 and (out / f"{n}.svg").exists() and f"]({n}.png)" in text
        for n in FIGURES
    )
    images = [line for line in text.splitlines() if line.startswith("![")]
    assert (
        text.startswith("![How often the judge")
        and "(headline.png)" in images[0]
        and "(inconsistency.png)" in images[1]
    )
    assert sorted(p.stem for p in out.glob("*.png")) == sorted(i.split("](")[1][:-5] for i in images)


def test_the_headline_is_printed_last(run, tmp_path, capsys, quick):
    document.report(run, tmp_path / "out")
    said = capsys.readouterr().out.splitlines()
    assert said == claims.headline(gather([run])) == (tmp_path / "out/headline.txt").read_text().splitlines()
    assert len(said) == 3


def test_graded_answers_are_gathered_and_kept(run):
    g, kept = gather([run]), pd.read_parquet(run / "report/answers.parquet")
    pd.testing.assert_frame_equal(g.answers, kept)
    assert len(kept) == 8 * 5
    assert kept.groupby("arm").success.mean().to_dict() == {
        "base": 0,
        "sft": 0,
        "srlm": 0.5,
        "scir": 0.5,
        "scir-no-gate": 0.5,
    }
    assert (
        set(kept.prompt) == set(g.pairs.prompt) and g.models.set_index("arm").correct_labels.to_dict()["scir"] == 0.75
    )
    policy = pd.read_csv(run / "report/policy.csv").set_index("model")
    assert policy.loc["scir M_2", "strict success"].startswith("50% [")
    assert policy.loc["scir M_2", "correct labels"] == "75%" and policy.loc["M_1", "correct labels"] == "-"


def test_a_run_without_a_grader(tmp_path, quick):
    made = make_run(tmp_path / "plain", graded=False)
    document.report(made)
    numbers = pd.read_csv(made / "report/claim_numbers.csv")
    assert not {"h", "i"} & set(numbers.claim) and set(numbers[numbers.claim == "e"].set) == {"held-out"}
    assert {"own", "panel"} <= set(numbers[numbers.claim == "a"].set)
    assert pd.read_csv(made / "report/policy.csv")["strict success"].eq("-").all()
    assert "On the set held-out" in (made / "report/headline.txt").read_text()


def test_numbers_are_the_files(run):
    s = pd.read_csv(run / "report/summary.csv").set_index(["arm", "iteration", "set"])
    d = [x for x in scores(2 * 0.7)]  # base, m1, srlm
    apart = [(x.margins["generative"] > 0) != (x.margins["implicit"] > 0) for x in d]
    row = s.loc[("srlm", 2, "panel")]
    assert row.inconsistency == np.mean(apart) and row.inconsistency_prompts == 4 and row.labelled == 7
    assert row.inconsistency_labelled == np.mean(apart[1:])
    assert row.accuracy_generative == np.mean([x.margins["generative"] > 0 for x in d[1:]])
    assert pd.read_csv(run / "report/alignment.csv").set_index("model").loc["srlm M_2", "win rate"] == "52% [40, 70]"


def test_a_kept_report_makes_the_same_again(run, tmp_path):
    before, bare = kept_files(run / "report"), tmp_path / "bare"
    shutil.copytree(run, bare)
    shutil.rmtree(bare / "seed0")
    document.report(bare)
    after = kept_files(bare / "report")
    assert set(after) == set(before)
    assert {n for n in before if before[n] != after[n] and not n.endswith(".parquet")} == set()


def test_a_folder_of_tables_and_recipe_is_enough(run, tmp_path, quick):
    before, flat = kept_files(run / "report"), tmp_path / "flat"
    shutil.copytree(run / "report", flat)
    shutil.copy(run / "recipe.yaml", flat)
    document.report(flat, tmp_path / "again")
    assert all(kept_files(tmp_path / "again")[n] == b for n, b in before.items() if n.endswith((".csv", ".md")))


def test_several_runs_side_by_side(run, tmp_path, quick):
    other = make_run(tmp_path / "other", name="other", arms=["scir"], seeds=[0, 1])
    document.report([run, other], tmp_path / "out")
    out = tmp_path / "out"
    for name in ("inconsistency", "reward_models", "alignment", "comparisons", "claims", "claim_numbers", "policy"):
        assert set(pd.read_csv(out / f"{name}.csv").run) == {"made", "other"}, name
    assert (out / "made-inconsistency.png").exists() and (out / "other-inconsistency.png").exists()
    assert (out / "results.md").read_text().count("![Inconsistency by iteration") == 2
    assert (out / "made-headline.png").exists()
    alone, side = pd.read_csv(run / "report/claims.csv"), pd.read_csv(out / "claims.csv").query("run == 'made'")
    side = side.drop(columns="run").reset_index(drop=True)
    pd.testing.assert_frame_equal(alone, side)


def test_runs_of_one_name_are_seeds(run, tmp_path):
    second = make_run(tmp_path / "second", seeds=[1])
    g = gather([run, second])
    assert set(g.models.seed) == {0, 1}
    assert tabling.summary(g).set_index(["arm", "set"]).loc[("scir", "panel"), "seeds"] == 2
    with pytest.raises(ValueError, match="run made, seed 0: M_0 is in two of the folders") as e:
        gather([run, run])
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "prepare, said",
    [
        (lambda p: p.mkdir(), "not a run directory"),
        (lambda p: write_text(p / "recipe.yaml", dump_recipe(parse_recipe(RECIPE))), "no evaluated model"),
    ],
)
def test_errors_name_the_folder(tmp_path, prepare, said):
    prepare(tmp_path / "x")
    with pytest.raises(ValueError, match=said) as e:
        document.report(tmp_path / "x")
    assert str(tmp_path / "x") in str(e.value) and "\n" not in str(e.value) and not (tmp_path / "x/report").exists()


def test_runs_that_do_not_fit(run, tmp_path):
    with pytest.raises(ValueError, match="--out"):
        document.report([run, run])
    third = make_run(tmp_path / "third", rewards=["generative", "implicit", "pointwise"], name="third")
    with pytest.raises(ValueError, match="different reward models"):
        document.report([run, third], tmp_path / "out")


def test_what_is_missing_is_said_and_old_figures_go(run, tmp_path, capsys):
    again = shutil.copytree(run, tmp_path / "again")
    document.report(again)
    assert gathering.unevaluated(again) == "" and (again / "report/joint_panel.png").exists()
    gone = sorted(again.glob("seed*/*/m2"))[-1]
    shutil.rmtree(gone)
    for f in again.glob("seed*/**/evaluation/panel.jsonl"):
        f.unlink()
    for f in again.glob("seed*/**/evaluation/metrics.json"):
        found = json.loads(f.read_text())
        found["sets"].pop("panel")
        write_json(f, found)
    (again / "report/mine.png").write_text("not the report's")
    with open(again / "report/results.md", "a") as f:
        f.write("![](mine.png)")
    document.report(again)
    line = f"again: not evaluated, so missing from the tables: {gone.relative_to(again).as_posix()}."
    assert line in capsys.readouterr().out and line in (again / "report/results.md").read_text()
    assert not list((again / "report").glob("joint_panel.*")) and (again / "report/mine.png").exists()
    assert (again / "report/joint_held-out.png").exists()


@pytest.mark.parametrize("pairs", ["labelled", "plain"])
def test_an_older_kept_report_without_answers(run, tmp_path, quick, pairs):
    "A report kept before answers were gathered has no answers.parquet, no own answers and no correct_labels."
    old = shutil.copytree(run / "report", tmp_path / "old")
    shutil.copy(run / "recipe.yaml", old)
    (old / "answers.parquet").unlink()
    d = pd.read_parquet(old / "pairs.parquet")
    d = d[d.set != "own"] if pairs == "labelled" else d[d.set != "own"].assign(label=None)
    d.to_parquet(old / "pairs.parquet")
    pd.read_parquet(old / "models.parquet").drop(columns="correct_labels").to_parquet(old / "models.parquet")
    document.report(old, tmp_path / "out")
    letters = set(pd.read_csv(tmp_path / "out/claim_numbers.csv").claim)
    assert "a" in letters and not {"h", "i"} & letters and ("e" in letters) == (pairs == "labelled")
    assert not len(gather([tmp_path / "old"]).answers)
