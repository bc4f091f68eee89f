"""The report on tables small enough to count by hand: rates, intervals, differences, rules, figures, and what is kept of a run."""
import json, shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt
from scipy.stats import t as student

import scir.report as report
from scir.consistency import derive, rate
from scir.recipe import ARMS, dump_recipe, parse_recipe
from scir.consistency import grouped
from scir.report import Gathered, course, gather, last, share_gap, sure, tables
from scir.store import Score, write_json, write_rows, write_text

NAMES = ["generative", "implicit"]
FIGURES = {"inconsistency", "retained", "joint_panel", "splits_held-out", "calibration_held-out", "training", "flip_rate", "verdict_mass"}

def pairs(arm, iteration, judge, implicit, set="held-out", seed=0, run="r", label="a", prompts=None, mass=.9):
    "A row per pair from strings of + and -; a number is the margin itself. Side a is right."
    value = lambda v: {"+": 1.0, "-": -1.0}.get(v, v)
    return pd.DataFrame([{"run": run, "seed": seed, "arm": arm, "iteration": iteration, "set": set, "id": f"i{k}", "prompt": (prompts or [f"p{k}" for k in range(len(judge))])[k], "subset": "", "label": label,
                          "tokens_a": 4 + k % 3, "tokens_b": 5, "m_ab": value(j), "m_ba": -value(j), "mass": mass, "likelihood": 1.0, "generative": value(j), "implicit": value(i)} for k, (j, i) in enumerate(zip(judge, implicit, strict=True))])

def model(arm, iteration, seed=0, run="r", **kw):
    trained = {"retained": None, "steps": None} if iteration < 2 else {"retained": .5, "steps": 4}
    return {"run": run, "seed": seed, "arm": arm, "iteration": iteration, "mean_tokens": 20.0, "finished": 1.0, "empty": 0, "distinct_2": .5, "pairs": 8, **trained, "win_rate": None, "win_rate_low": None, "win_rate_high": None, "length_controlled": None} | kw

def gathered(*frames, models=None, steps=None):
    d = pd.concat(frames, ignore_index=True)
    models = models or [model(a, t, s, r) for r, s, a, t in d[["run", "seed", "arm", "iteration"]].drop_duplicates().itertuples(index=False)]
    return Gathered(derive(d, NAMES), pd.DataFrame(models), pd.DataFrame(steps or [], columns=None if steps else ["run", "seed", "arm", "iteration", "step"]), NAMES)

def both(n, wrong=0, apart=0): # judge and implicit strings: `wrong` agreed and wrong, then `apart` on which only the judge is wrong, the rest right
    return "-" * (wrong + apart) + "+" * (n - wrong - apart), "-" * wrong + "+" * (n - wrong)

def verdicts(g): return {(c.claim, c.set): c.verdict for c in report.claims(g).itertuples()}

def found(g, part, name="held-out"): return {v for (c, s), v in verdicts(g).items() if part in c and s == name}

@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")

# intervals

def test_one_pair_per_prompt_is_wilson_and_copies_add_nothing():
    hits = [1] * 13 + [0] * 7
    assert grouped(hits, range(20)) == rate(hits) | {"prompts": 20}
    thrice = grouped(hits * 3, list(range(20)) * 3)
    assert thrice["n"] == 60 and thrice["prompts"] == 20 and thrice["value"] == .65
    assert thrice["low"] < rate(hits)["low"] and thrice["high"] > rate(hits)["high"] and thrice["high"] - thrice["low"] < 1.15 * (rate(hits)["high"] - rate(hits)["low"])

def test_grouped_by_hand():
    "Prompts with 3 of 3, 0 of 1 and 1 of 2: p = 4/6, residuals 1, -2/3, -1/3; variance of the mean (14/9)(3/2)/36 = 7/108."
    r, p, z2 = grouped([1, 1, 1, 0, 1, 0], list("aaabcc")), 2 / 3, student.ppf(.975, 2) ** 2
    n = p * (1 - p) / (7 / 108)
    centre, half = (p + z2 / 2 / n) / (1 + z2 / n), np.sqrt(z2 / n * (p * (1 - p) + z2 / 4 / n)) / (1 + z2 / n)
    assert (r["low"], r["high"]) == pytest.approx((centre - half, centre + half)) and r["value"] == pytest.approx(p)

@pytest.mark.parametrize("hits, prompts", [([0] * 60, 30), ([1] * 60, 30), ([1, 0] * 30, 30)])
def test_an_interval_of_equal_prompts_has_the_width_of_its_prompts(hits, prompts):
    r = grouped(hits, [i // 2 for i in range(60)])
    assert r["high"] - r["low"] > rate(hits[::2] if hits[0] == hits[1] else [1, 0] * 15)["high"] - rate(hits[::2] if hits[0] == hits[1] else [1, 0] * 15)["low"]

def test_edges_of_grouped():
    assert grouped([], []) == {"value": None, "low": None, "high": None, "n": 0, "prompts": 0}
    one = grouped([1, 1, 0, 1], ["a"] * 4)
    assert one["low"] < .05 and one["high"] > .95 and one["value"] == .75

def test_grouped_covers():
    rng, inside = np.random.default_rng(0), 0
    for _ in range(400):
        p = rng.beta(1, 3, 24)  # mean 1/4; six pairs a prompt
        r = grouped(rng.random((24, 6)).ravel() < np.repeat(p, 6), np.repeat(np.arange(24), 6))
        inside += r["low"] <= .25 <= r["high"]
    assert .92 < inside / 400 < .98

# rates

def test_summary_by_hand():
    "Two seeds of four pairs. Seed 0: judge ++-+, implicit +--+: one contradiction; seed 1: ++++ and ----: four."
    s = report.summary(gathered(pairs("sft", 1, "++-+", "+--+"), pairs("sft", 1, "++++", "----", seed=1))).iloc[0]
    assert s.inconsistency == 5 / 8 and (s.inconsistency_least, s.inconsistency_most) == (.25, 1) and s.inconsistency_n == 8 and s.inconsistency_prompts == 4 and s.seeds == 2 and s.pairs == 4
    assert s.accuracy_generative == 7 / 8 and s.accuracy_implicit == 2 / 8 and s.accuracy_agreed == 2 / 3 and s.accuracy_agreed_n == 3
    assert (s.accuracy_agreed_least, s.accuracy_agreed_most) == (2 / 3, 2 / 3), "a seed without an agreed pair has no share"
    assert s.accuracy_likelihood == 1 and s.flip_rate == 0 and s.inconsistency_likelihood == 1 / 8
    row = report.reward_table(report.summary(gathered(pairs("sft", 1, "++-+", "+--+"), pairs("sft", 1, "++++", "----", seed=1)))).iloc[0]
    assert row["right where agreed"].startswith("67% of 3 [") and row["judge right"].startswith("88% [") and row["judge right"].endswith("(75% to 100%)")

def test_what_cannot_be_said_is_left_out():
    g = gathered(pairs("base", 0, "+-+-", [0.0] * 4), pairs("sft", 1, "+-+-", "+-+-", set="panel", label=None))
    s = report.summary(g).set_index("set")
    assert pd.isna(s.loc["held-out", "inconsistency"]) and s.loc["held-out", "accuracy_generative"] == .5 and "accuracy_implicit" not in s
    assert pd.isna(s.loc["panel", "accuracy_generative"]) and s.loc["panel", "inconsistency"] == 0
    made = report.inconsistency_table(report.summary(g))
    assert made.inconsistency.tolist()[0] == "-" and made.model.tolist() == ["M_0, untrained", "M_1 = sft"]

def test_a_third_reward_model_is_shown():
    d = pairs("sft", 1, "++-+", "+--+").assign(pointwise=[1.0, -1, -1, 1])
    g = Gathered(derive(d, [*NAMES, "pointwise"]), pd.DataFrame([model("sft", 1)]), pd.DataFrame(columns=["run", "seed", "arm", "iteration", "step"]), [*NAMES, "pointwise"])
    assert report.reward_table(report.summary(g)).iloc[0]["pointwise right"].startswith("50%")

# differences

def test_arms_meet_on_the_same_pair_of_the_same_seed():
    g = gathered(pairs("srlm", 2, "++++", "----"), pairs("scir", 2, "++++", "+++-"), pairs("scir", 2, "++++", "----", seed=1), pairs("scir", 2, "++", "--", seed=2), pairs("srlm", 2, "++++", "----", seed=2),
                 pairs("srlm", 2, "++++", "++++", seed=1).iloc[::-1])
    gap = report.compare(last(g), "scir", "srlm", lambda d: ~d.agree, "held-out")
    assert gap["n"] == 10 and gap["seeds"] == 3 and gap["prompts"] == 4, "seed 2 has two pairs in common"
    a, b = report.matched(last(g), "scir", "srlm", "held-out")
    assert (a.index == b.index).all() and (a.agree.astype(int) - b.agree.astype(int)).groupby("seed").sum().to_dict() == {0: 3, 1: -4, 2: 0}
    assert gap["same_way"] < 3 and sure(gap | {"low": .1, "high": .2, "p": 0}) == 0

def test_runs_are_never_pooled():
    g = gathered(pairs("srlm", 2, *both(30, apart=15), run="one"), pairs("scir", 2, *both(30), run="one"), pairs("sft", 1, *both(30), run="one"),
                 pairs("srlm", 2, *both(30), run="two"), pairs("scir", 2, *both(30, apart=15), run="two"), pairs("sft", 1, *both(30), run="two"))
    made = tables(g)
    t = made["comparisons"].query("quantity == 'inconsistency' and arms == 'scir minus srlm'").set_index("run")
    assert t.difference.to_dict() == {"one": -.5, "two": .5} and set(t.n) == {30}
    assert dict(made["claims"][made["claims"].claim.str.contains("half as often as srlm")][["run", "verdict"]].to_numpy()) == {"one": "met", "two": "not met"}
    assert set(made["alignment"].run) == set(made["inconsistency"].run) == {"one", "two"}
    text = report.words(g, made["summary"], made["claims"])
    assert text.index("### one") < text.index("### two") and text.count("Size: 1 seed;") == 2

def test_arms_are_compared_after_the_same_number_of_iterations():
    g = gathered(pairs("sft", 1, "++", "++"), *(pairs("scir", t, "++", "++", seed=s) for s, t in ((0, 2), (0, 3), (1, 2))), pairs("srlm", 2, "++", "--"))
    assert set(zip(last(g).arm, last(g).iteration)) == {("sft", 1), ("scir", 2), ("srlm", 2)}
    text = report.words(g, report.summary(g), report.claims(g))
    assert "compared as M_2" in text and "Some arms went on to M_3" in text

def test_two_arms_meet_where_both_have_been():
    "srlm went as far as scir, an ablation stopped one round earlier: each is compared with scir of its own round."
    at = lambda arm, wrong: [pairs(arm, t, *both(60, wrong=w)) for t, w in wrong.items()]
    g = gathered(pairs("sft", 1, *both(60)), *at("scir", {2: 10, 3: 20}), *at("srlm", {2: 0, 3: 20}), *at("scir-static", {2: 10}))
    t = report.comparisons(g).query("quantity == 'judge right'").set_index("arms")
    assert t["as"].to_dict() == {"scir minus sft": "M_3", "scir minus srlm": "M_3", "scir minus scir-static": "M_2"}
    assert t.difference.round(3).to_dict() == {"scir minus sft": -.333, "scir minus srlm": 0, "scir minus scir-static": 0}
    text = report.words(g, report.summary(g), report.claims(g))
    assert "srlm as M_3; scir-static as M_2." in text and "went on" not in text
    assert set(report.contrasted(g, "held-out")[0].iteration) == {1, 3} and set(report.ablation_table(g)["as"]) == {"M_2"}
    best = report.claims(g).set_index("claim").evidence["judge right: scir at least as often as every other arm"]
    assert best.startswith("67%") and "scir less sft -33 points" in best

def test_no_width_is_no_certainty():
    g = gathered(pairs("srlm", 2, "++++", "----"), pairs("scir", 2, "++++", "++++"), pairs("sft", 1, "++++", "----"))
    gap = report.compare(last(g), "scir", "srlm", lambda d: ~d.agree, "held-out")
    assert gap["difference"] == -1 and gap["low"] == -1 and gap["high"] == pytest.approx(-1 + rate([0] * 4)["high"]) and gap["p"] == .125 and sure(gap) == 0
    assert found(g, "half as often") == {"not decided"}

@pytest.mark.parametrize("gap, tests, sign", [({"low": .1, "high": .2, "p": .01}, 1, 1), ({"low": -.2, "high": -.1, "p": .01}, 1, -1), ({"low": -.1, "high": .2, "p": .01}, 1, 0),
                                               ({"low": .1, "high": .2, "p": .06}, 1, 0), ({"low": .1, "high": .2, "p": .01}, 6, 0), ({"low": .1, "high": .2, "p": np.nan}, 1, 0), ({"low": np.nan, "high": np.nan, "p": .01}, 1, 0)])
def test_sure(gap, tests, sign): assert sure(gap | {"seeds": 1, "same_way": 1}, tests) == sign

def test_holm_within_a_family():
    t = report.with_holm(pd.DataFrame({"set": list("aab"), "p": [.01, .04, .03]}), ["set"])
    assert t.p_holm.tolist() == [.02, .04, .03] and list(t.columns) == ["set", "p", "p_holm"] and report.holm([.5, .9]) == [1, 1]
    g = gathered(*(pairs(a, 2, *both(12, apart=k)) for a, k in (("scir", 0), ("srlm", 6), ("dice", 1))), pairs("sft", 1, *both(12)))
    c = report.comparisons(g).query("quantity == 'inconsistency'").set_index("arms")
    assert c.loc["scir minus srlm", "p"] == .03125 and c.loc["scir minus srlm", "p_holm"] == pytest.approx(3 * .03125) and c.loc["scir minus sft", "p"] == 1

def test_share_gap_of_independent_shares_is_newcombes():
    "Newcombe 1998, method 10, table II: 56/70 against 48/80 is .2 [.0524, .3339]; few agreed pairs make no certainty."
    rows = lambda k, n, who: pd.DataFrame({"hit": [1.0] * k + [0.0] * (n - k), "prompt": [f"{who}{i}" for i in range(n)], "run": "r", "seed": 0})
    gap = share_gap(rows(56, 70, "a"), rows(48, 80, "b"))
    assert (gap["difference"], gap["low"], gap["high"]) == pytest.approx((.2, .0524, .3339), abs=1e-4) and gap["p"] < .05 and gap["n"] == 80
    assert share_gap(rows(48, 80, "b"), rows(56, 70, "a"))["low"] == pytest.approx(-.3339, abs=1e-4)
    few = share_gap(rows(5, 12, "x"), rows(0, 4, "x"))
    same = share_gap(rows(4, 9, "a"), rows(4, 9, "a"))
    assert same["difference"] == 0 and same["high"] - same["low"] < .2, "what both miss alike cancels"
    assert few["low"] < 0 and few["p"] > .05 and share_gap(rows(0, 0, "a"), rows(1, 2, "b")) == {}
    assert share_gap(rows(1, 2, "a"), rows(1, 2, "a")) | {"low": 0, "high": 0} == {"difference": 0, "low": 0, "high": 0, "p": 1, "n": 2, "prompts": 2, "seeds": 1, "same_way": 1}

# alignment

def test_alignment_by_hand():
    won = dict(win_rate_low=.4, win_rate_high=.8, length_controlled=.55)
    g = gathered(pairs("sft", 1, "+", "+"), models=[model("sft", 1), model("scir", 2, win_rate=.6, **won), model("scir", 2, seed=1, win_rate=.7, **won | {"win_rate_high": .9}), model("srlm", 2, win_rate=.5, **won, retained=.25), model("scir", 5)])
    t = report.alignment_table(g).set_index("model")
    assert t.loc["scir M_2", "win rate"] == "65% [40, 85] (60% to 70%)" and t.loc["scir M_2", "length-controlled"] == "55% (55% to 55%)" and t.loc["srlm M_2", "win rate"] == "50% [40, 80]"
    assert t.loc["M_1 = sft", "win rate"] == "-" and t.loc["srlm M_2", "trained on"] == "25% of its pairs" and t.loc["M_1 = sft", "trained on"] == "-"
    elsewhere = t["reported, second-hand"]
    assert elsewhere["scir M_2"].startswith("14.51 (LC win rate") and "11.37" not in elsewhere["srlm M_2"] and "12.58" in elsewhere["srlm M_2"] and "15.38" in elsewhere["srlm M_2"] and elsewhere["scir M_5"] == "-"
    assert "9.94 as srlm M_1" in elsewhere["M_1 = sft"] and "14.51" not in elsewhere["M_1 = sft"]

def test_reported_numbers_say_where_they_are_from():
    t = report.reported_table()
    assert t.source.str.contains("second-hand|notes").all() and t[t.arm == "scir"].source.str.contains("second-hand").all() and len(t) == 5
    assert t.iloc[0]["values"] == "14.51, 18.49, 24.92" and t.iloc[0]["of"] == "M_2 to M_4"

# rules

@pytest.mark.parametrize("right, said", [(60, "met"), (40, "not decided"), (35, "not decided"), (20, "not met"), (47, "met")])
def test_above_chance(right, said): # of 70; 43 of 70 is the first whose interval leaves out a half
    g = gathered(pairs("sft", 1, *["+" * right + "-" * (70 - right)] * 2))
    assert found(g, "the judge is right") == found(g, "the implicit reward is right") == {said}

def test_above_chance_asks_held_out_labels_of_m1():
    assert verdicts(gathered(pairs("sft", 1, *both(50), set="panel", label=None))) == verdicts(gathered(pairs("base", 0, *both(50)))) == verdicts(gathered(pairs("sft", 1, *both(50), label=None))) == {}
    silent = gathered(pairs("sft", 1, "+" * 50, [0.0] * 50))
    assert list(verdicts(silent)) == [("after the warm start the judge is right on more than half", "held-out")]

def test_rules_ask_every_labelled_set_by_itself():
    g = gathered(*(pairs(a, t, *both(70, wrong=wrong, apart=apart), set=name) for a, t, apart in (("sft", 1, 0), ("scir", 2, 0)) for name, wrong in (("held-out", 5), ("hard", 60))))
    v = verdicts(g)
    assert {k: x for k, x in v.items() if "the judge is right" in k[0]} == {("after the warm start the judge is right on more than half", s): x for s, x in (("held-out", "met"), ("hard", "not met"))}
    assert {name for what, name in v if "half as often as sft" in what} == {"held-out", "hard"}
    g = gathered(*(pairs(a, t, *both(70, apart=apart), set=name) for a, t, apart in (("sft", 1, 0), ("scir", 2, 0), ("scir-no-consistency", 2, 30)) for name in ("held-out", "hard")))
    assert {(name, x) for (what, name), x in verdicts(g).items() if "without the consistency term" in what} == {("held-out", "met"), ("hard", "met")}

@pytest.mark.parametrize("ours, theirs, said", [(5, 40, "met"), (18, 40, "met"), (35, 60, "not decided"), (5, 12, "not decided"), (19, 36, "not decided"), (16, 30, "not decided"), (40, 40, "not met"), (60, 40, "not met"), (0, 0, "not decided"), (0, 3, "not decided"), (30, 36, "not met")])
def test_halved(ours, theirs, said):
    g = gathered(pairs("sft", 1, *both(100, apart=theirs)), pairs("srlm", 2, *both(100, apart=theirs)), pairs("scir", 2, *both(100, apart=ours)))
    assert found(g, "half as often as srlm") == found(g, "half as often as sft") == {said}

def test_halved_needs_every_seed():
    g = gathered(*(pairs(a, 2, *both(60, apart=k), seed=s) for s in range(3) for a, k in (("srlm", (50, 50, 3)[s]), ("scir", (2, 2, 6)[s]))), *(pairs("sft", 1, *both(60), seed=s) for s in range(3)))
    assert found(g, "half as often as srlm") == {"not decided"} and report.claims(g).evidence.str.contains("in 2 of 3 seeds: a difference that is not sure").any()

@pytest.mark.parametrize("scir, srlm, said", [(0, 30, "met"), (10, 10, "met"), (11, 10, "not decided"), (30, 5, "not met")])
def test_most_accurate(scir, srlm, said): # wrong ones of 200, both models
    g = gathered(pairs("sft", 1, *both(200, wrong=40)), pairs("srlm", 2, *both(200, wrong=srlm)), pairs("scir", 2, *both(200, wrong=scir)))
    assert found(g, "judge right: scir") == found(g, "implicit right: scir") == {said}

def test_as_accurate_on_few_pairs_is_left_open():
    few = gathered(pairs("sft", 1, *both(12, wrong=5)), pairs("scir", 2, *both(12, wrong=5)))
    assert found(few, "at least as often as every other") == {"not decided"}, "equal on 12 pairs"

def test_best_other_arm_counts():
    g = gathered(pairs("sft", 1, *both(200, wrong=60)), pairs("dice", 2, *both(200, wrong=2)), pairs("srlm", 2, *both(200, wrong=50)), pairs("scir", 2, *both(200, wrong=30)))
    assert found(g, "judge right: scir") == {"not met"} and report.claims(g).evidence.str.contains("nearest or ahead is dice").any()

@pytest.mark.parametrize("judge, implicit, said", [
    ("-" * 30 + "+" * 170, "+" * 140 + "-" * 30 + "+" * 30, "met"),  # wrong on different pairs
    ("-" * 2 + "+" * 10, "+" * 10 + "-" * 2, "not decided"),  # 8 of 8 against 10 of 12
    ("-" * 60 + "+" * 140, "-" * 60 + "+" * 140, "not decided"),  # they never differ
    ("+" * 60 + "-" * 140, "-" * 60 + "-" * 140, "not met")])  # right only where the other is not
def test_agreed_against_alone(judge, implicit, said):
    g = gathered(pairs("sft", 1, judge, implicit), pairs("scir", 2, judge, implicit))
    assert found(g, "right more often where its models agree") == {said}

def test_agreed_with_nothing_agreed():
    g = gathered(pairs("sft", 1, "+" * 20, "-" * 20), pairs("scir", 2, "+" * 20, "-" * 20), pairs("scir-no-gate", 2, "+" * 20, "-" * 20))
    assert found(g, "right more often where") == found(g, "wrong labels") == set()
    tables(g)

@pytest.mark.parametrize("tokens, distinct, said", [(20, .5, "met"), (10, .4, "met"), (40, .6, "met"), (9.9, .5, "not met"), (40.1, .5, "not met"), (20, .39, "not met"), (20, .61, "not met"), (np.nan, .5, "not decided")])
def test_collapse(tokens, distinct, said):
    "One bad model of several seeds and iterations is enough."
    g = gathered(pairs("sft", 1, "+", "+"), models=[model("sft", 1), model("sft", 1, 1), model("scir", 2), model("scir", 2, 1, mean_tokens=tokens, distinct_2=distinct), model("scir", 3), model("scir", 3, 1), model("srlm", 2)])
    assert found(g, "scir does not collapse", "") == {said} and found(g, "srlm does not collapse", "") == {"met"}

def test_collapse_without_m1s_answers():
    for models in ([model("scir", 2)], [model("sft", 1, mean_tokens=0.0, distinct_2=0.0), model("scir", 2)]):
        assert found(gathered(pairs("scir", 2, "+", "+"), models=models), "does not collapse", "") == {"not decided"}

@pytest.mark.parametrize("arm, judge, implicit, part, said", [
    ("scir-no-consistency", *both(60, apart=30), "without the consistency term", "met"), ("scir-no-consistency", *both(60), "without the consistency term", "not met"),
    ("scir-no-consistency", *both(60, apart=11), "without the consistency term", "not decided"), ("scir-static", *both(60, apart=30), "labels asked again", "met"),
    ("scir-no-confidence", [.1] * 60, [.1] * 60, "without the confidence term", "met"), ("scir-no-confidence", [9.0] * 60, [9.0] * 60, "without the confidence term", "not met"), ("scir-no-confidence", [1.0] * 60, [1.0] * 60, "without the confidence term", "not decided"),
    ("scir-no-gate", [-2.0] * 30 + [1.0] * 30, [1.0] * 60, "without the agreement gate", "met"), ("scir-no-gate", *both(60), "without the agreement gate", "not decided")])
def test_ablations(arm, judge, implicit, part, said):
    scir = both(60, apart=10) if part != "without the confidence term" else both(60)
    g = gathered(pairs("sft", 1, *both(60)), pairs("scir", 2, *scir), pairs(arm, 2, judge, implicit))
    assert found(g, part) == {said} and not [c for c, _ in verdicts(g) if "without" in c and part not in c]
    assert part.split("the ")[-1] in set(report.ablation_table(g).without) or part == "labels asked again"

def test_wrong_labels_by_hand():
    "no-gate trains on all 8 pairs, mean margin wrong on 3; scir on the 5 on which it agrees, 1 of them wrong: 3/8 - 1/5."
    gate = pairs("scir-no-gate", 2, [-3, -3, -1, -.5, 1, 1, 1, 1.0], [1, 1, -1, 1, 1, 1, 1, 1.0])
    g = gathered(gate, pairs("scir", 2, "-++++---", "-++++++" + "+"), pairs("sft", 1, *both(8)))
    m = report.moved(last(g), "scir-no-gate", "wrong labels", "held-out")
    assert m["difference"] == pytest.approx(3 / 8 - 1 / 5) and m["n"] == 5 and m["low"] < 0 < m["high"]
    row = report.ablation_table(g).iloc[0]
    assert row["difference to scir"].startswith("+0.17 [") and row.measure.startswith("wrong labels") and row.without == "agreement gate"

def test_an_arm_that_did_not_train_decides_nothing():
    frames = pairs("sft", 1, *both(60, apart=40)), pairs("srlm", 2, *both(60, apart=40)), pairs("scir", 2, *both(60)), pairs("scir-no-consistency", 2, *both(60, apart=40))
    models = lambda **steps: [model("sft", 1)] + [model(a, 2, steps=steps.get(a.replace("-", "_"), 4)) for a in ("srlm", "scir", "scir-no-consistency")]
    g = gathered(*frames, models=models())
    assert found(g, "half as often as srlm") == found(g, "without the consistency") == {"met"} and report.idle(g) == set()
    g = gathered(*frames, models=models(srlm=0))
    assert found(g, "half as often as srlm") == {"not decided"} and found(g, "half as often as sft") == {"met"} and found(g, "srlm does not collapse", "") == {"not decided"}
    g = gathered(*frames, models=models(scir=0))
    assert {v for (c, s), v in verdicts(g).items() if "scir" in c or "without" in c} - {"not decided"} == {"met"} and found(g, "half as often as sft") == found(g, "without the consistency") == {"not decided"}
    assert report.claims(g).evidence.str.contains("scir found no pair to train on, so its model is M_1").any()

@pytest.mark.parametrize("arms", [(), ("srlm",), ("scir",), ("scir-no-gate",), ("dice", "scir-static")])
def test_no_rule_without_its_arms(arms):
    g = gathered(pairs("sft", 1, *both(20, wrong=4, apart=3)), *(pairs(a, 2, *both(20, wrong=4, apart=3)) for a in arms))
    made = tables(g)
    said = " ".join(c for c, _ in verdicts(g))
    assert ("scir's internal models" in said) == ("scir is right" in said) == ("scir" in arms) and "without" not in said and ("srlm's" in said) == (set(arms) >= {"scir", "srlm"})
    assert bool(len(made["comparisons"])) == ("scir" in arms) and not len(made["ablation"]) and len(made["alignment"]) == 1 + len(arms)
    assert report.words(g, made["summary"], made["claims"]).count("does not collapse:") == len(arms)
    assert set(report.figures(g, made["summary"])) >= {"inconsistency", "calibration_held-out"}

def test_arms_without_a_seed_in_common():
    g = gathered(pairs("sft", 1, *both(20)), pairs("sft", 1, *both(20), seed=1), pairs("srlm", 2, *both(20)), pairs("scir", 2, *both(20), seed=1), pairs("scir-no-gate", 2, *both(20)))
    made = tables(g)
    assert "scir minus srlm" not in set(made["comparisons"].arms) and not found(g, "as srlm's") and not len(made["ablation"])

def test_words_say_what_they_rest_on():
    g = gathered(*(pairs(a, t, *both(40), seed=s) for s in (0, 1) for a, t in (("sft", 1), ("scir", 2))))
    text = report.words(g, report.summary(g), report.claims(g))
    assert "2 seeds; 40 pairs in held-out" in text and "Fewer than three seeds" in text and f"{len(report.claims(g))} rules were asked" in text and "by chance" in text
    assert text.index("**Shown**") < text.index("after the warm start the judge") and "**Looked for and not found**" not in text

# figures

def steps(arm, iteration, retained, seed=0, **kw): return [{"run": "r", "seed": seed, "arm": arm, "iteration": iteration, "step": i + 1, "retained": r, "loss_dpo": .7, "loss_consistency": 0.0, "loss_confidence": .6} | kw for i, r in enumerate(retained)]

def test_courses_by_hand():
    g = gathered(pairs("sft", 1, "+", "+"), models=[model("scir", 2, retained=.75), model("scir", 2, 1, retained=.25), model("scir", 3, retained=.5), model("srlm", 2, retained=.2)],
                 steps=steps("scir", 2, [.5, 1.0], inconsistency=.5) + steps("scir", 2, [0, .5], 1, inconsistency=.5) + steps("scir", 3, [.5], inconsistency=.5) + steps("srlm", 2, [1.0, 1.0]))
    c = course(g, "scir", "retained")
    assert c.step.tolist() == [1, 2, 3] and c.value.tolist() == [.25, .75, .5] and c.end.tolist() == [False, True, True]
    assert course(g, "srlm", "retained").value.tolist() == [.2, .2], "of all scored pairs, not of those it chose"
    assert course(g, "srlm", "loss_consistency").empty and course(g, "srlm", "loss_confidence").empty and len(course(g, "scir", "loss_consistency")) == 3 and len(course(g, "srlm", "loss_dpo")) == 2
    assert course(g, "scir", "absent").empty

def test_panels():
    assert report.families(ARMS) == {"methods": ["srlm", "srlm-pointwise", "dice", "cream", "external", "scir"], "ablations": ["scir", "scir-no-consistency", "scir-no-confidence", "scir-no-gate", "scir-static"]}
    assert report.families(["sft"]) == {"methods": []} and report.families(["scir"]) == {"methods": ["scir"]} and list(report.families(["scir-static"])) == ["ablations"] and set(report.STYLE) == {"base", *ARMS}
    for arms in report.families(ARMS).values(): assert len({report.STYLE[a][0] for a in arms}) == len(arms)

def test_figures_of_little():
    for g in (gathered(pairs("base", 0, "+-", [0.0, 0.0])), gathered(pairs("sft", 1, "++", "++")), gathered(pairs("sft", 1, "++", "+-", label=None).assign(tokens_a=5))):
        drawn = report.figures(g, report.summary(g))
        assert not {"retained", "training"} & set(drawn) and ("inconsistency" in drawn) == (g.pairs.arm.iloc[0] != "base")
    g = gathered(pairs("sft", 1, "+-", "+-"), pairs("scir", 2, "+-", "+-"))
    figure = report.plot_inconsistency(report.summary(g))
    assert [t.get_text() for t in figure.axes[0].get_xticklabels()] == ["M_1", "M_2"] and {t.get_text() for t in figure.axes[0].get_legend().get_texts()} == {"scir", "until M_1"}

def test_every_figure_has_a_caption():
    for name in (*FIGURES, "training_ablations", "joint_held-out"): assert report.caption(name)
    assert report.caption("retained") != report.caption("inconsistency") and report.caption("joint_panel").startswith("Judge against implicit")

# a run's files

RECIPE = {"name": "made", "arms": ["srlm", "scir", "scir-no-gate"], "iterations": 1}

def scores(shift, n=8, label="a", **more):
    return [Score(id=f"i{k}", prompt_id=f"p{k % 4}", prompt=f"Say {k % 4}.", response_a="x", response_b="y", ids_a=[1] * (3 + k), ids_b=[1] * 5, logps=(-3.0 - k, -4.0), reference_logps=(-3.0, -4.0), order_margins=(k - 3.5 + shift, 3.0 - k),
                  verdict_mass=(.9, .8), margins={"generative": k - 3.3 + shift, "implicit": shift * (2.9 - k) / 7, **more}, label=label) for k in range(n)]

def make_run(folder, **kw):
    recipe = parse_recipe(RECIPE | kw)
    write_text(folder/"recipe.yaml", dump_recipe(recipe))
    write_json(folder/"manifest.json", {"steps": {f"optimise:{n}": {"summary": {"pairs": 8, "retained": .5, "steps": 2}} for n in report.all_nodes(recipe) if n.count("/") == 2}})
    for k, node in enumerate(report.all_nodes(recipe)):
        arm, t = report.coordinates(folder, node)["arm"], report.coordinates(folder, node)["iteration"]
        for name, label in (("held-out", "a"), ("panel", None)): write_rows(folder/node/"evaluation"/f"{name}.jsonl", scores(k * .7, label=label, **{r: 1.0 for r in recipe.rewards[2:]}))
        write_json(folder/node/"evaluation"/"metrics.json", {"answers": {"mean_tokens": 20.0 + k, "finished": .5, "empty": 0, "distinct_2": .5}, "sets": {"held-out": {}, "panel": {}}})
        if t > 1:
            write_rows(folder/node/"metrics.jsonl", [{k: v for k, v in row.items() if k in ("step", "retained", "loss_dpo", "loss_consistency", "inconsistency")} for row in steps(arm, t, [.5, .7], **{"inconsistency": .4} if arm != "srlm" else {})])
            write_json(folder/node/"alignment"/"metrics.json", {"win_rate": .5 + k / 100, "win_rate_low": .4, "win_rate_high": .7, "win_rate_n": 9, "length_controlled": None, "judge": "j", "reference": "m1"})
    return folder

@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = make_run(tmp_path_factory.mktemp("runs")/"made")
    report.report(folder)
    return folder

def kept_files(folder): return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.suffix in (".csv", ".md", ".png", ".parquet")}

def test_results_hold_every_table_figure_and_caption(run):
    out = run/"report"
    text = (out/"results.md").read_text()
    for name in ("inconsistency", "reward_models", "alignment", "ablation", "comparisons", "reported"):
        t = pd.read_csv(out/f"{name}.csv", dtype=str, keep_default_na=False)
        assert len(t) and "| " + " | ".join(t.columns) + " |" in text, name
        assert all(r.iloc[0] in text for _, r in t.iterrows())
    assert all(f"- {r.claim}{f' ({r.set})' if r.set else ''}: {r.evidence}" in text for r in pd.read_csv(out/"claims.csv", keep_default_na=False).itertuples())
    assert report.CAPTION in text and all((out/f"{n}.png").stat().st_size > 5000 and (out/f"{n}.svg").exists() and f"]({n}.png)" in text for n in FIGURES)
    images = [line for line in text.splitlines() if line.startswith("![")]
    assert text.startswith("![Inconsistency per iteration") and "(inconsistency.png)" in images[0] and "(retained.png)" in images[1]
    assert sorted(p.stem for p in out.glob("*.png")) == sorted(i.split("](")[1][:-5] for i in images)

def test_numbers_are_the_files(run):
    s = pd.read_csv(run/"report/summary.csv").set_index(["arm", "iteration", "set"])
    d = [x for x in scores(2 * .7)]  # base, m1, srlm
    apart = [(x.margins["generative"] > 0) != (x.margins["implicit"] > 0) for x in d]
    assert s.loc[("srlm", 2, "panel"), "inconsistency"] == np.mean(apart) and s.loc[("srlm", 2, "panel"), "inconsistency_prompts"] == 4 and pd.isna(s.loc[("srlm", 2, "panel"), "accuracy_generative"])
    assert pd.read_csv(run/"report/alignment.csv").set_index("model").loc["srlm M_2", "win rate"] == "52% [40, 70]"

def test_a_kept_report_makes_the_same_again(run, tmp_path):
    before, bare = kept_files(run/"report"), tmp_path/"bare"
    shutil.copytree(run, bare)
    shutil.rmtree(bare/"seed0")
    report.report(bare)
    after = kept_files(bare/"report")
    assert set(after) == set(before) and {n for n in before if before[n] != after[n] and not n.endswith(".parquet")} == set()

@pytest.fixture
def quick(monkeypatch):
    "Figures are drawn, but written as an empty file."
    monkeypatch.setattr(report, "_save", lambda fig, path, title: (fig.suptitle(title), path.with_suffix(".png").touch()))

def test_a_folder_of_tables_and_recipe_is_enough(run, tmp_path, quick):
    before, flat = kept_files(run/"report"), tmp_path/"flat"
    shutil.copytree(run/"report", flat)
    shutil.copy(run/"recipe.yaml", flat)
    report.report(flat, tmp_path/"again")
    assert all(kept_files(tmp_path/"again")[n] == b for n, b in before.items() if n.endswith((".csv", ".md")))

def test_several_runs_side_by_side(run, tmp_path, quick):
    other = make_run(tmp_path/"other", name="other", arms=["scir"], seeds=[0, 1])
    report.report([run, other], tmp_path/"out")
    out = tmp_path/"out"
    for name in ("inconsistency", "reward_models", "alignment", "comparisons", "claims"): assert set(pd.read_csv(out/f"{name}.csv").run) == {"made", "other"}, name
    assert (out/"made-inconsistency.png").exists() and (out/"other-inconsistency.png").exists() and (out/"results.md").read_text().count("![Inconsistency per iteration") == 2
    alone, side = pd.read_csv(run/"report/claims.csv"), pd.read_csv(out/"claims.csv").query("run == 'made'").drop(columns="run").reset_index(drop=True)
    pd.testing.assert_frame_equal(alone, side)

def test_runs_of_one_name_are_seeds(run, tmp_path):
    second = make_run(tmp_path/"second", seeds=[1])
    g = gather([run, second])
    assert set(g.models.seed) == {0, 1} and report.summary(g).set_index(["arm", "set"]).loc[("scir", "panel"), "seeds"] == 2
    with pytest.raises(ValueError, match="run made, seed 0: M_0, untrained comes twice") as e: gather([run, run])
    assert "\n" not in str(e.value)

@pytest.mark.parametrize("prepare, said", [(lambda p: p.mkdir(), "not a run directory"), (lambda p: write_text(p/"recipe.yaml", dump_recipe(parse_recipe(RECIPE))), "no evaluated model")])
def test_errors_name_the_folder(tmp_path, prepare, said):
    prepare(tmp_path/"x")
    with pytest.raises(ValueError, match=said) as e: report.report(tmp_path/"x")
    assert str(tmp_path/"x") in str(e.value) and "\n" not in str(e.value) and not (tmp_path/"x/report").exists()

def test_runs_that_do_not_fit(run, tmp_path):
    with pytest.raises(ValueError, match="--out"): report.report([run, run])
    third = make_run(tmp_path/"third", rewards=["generative", "implicit", "pointwise"], name="third")
    with pytest.raises(ValueError, match="different reward models"): report.report([run, third], tmp_path/"out")

def test_what_is_lacking_is_said_and_old_figures_go(run, tmp_path, capsys):
    again = shutil.copytree(run, tmp_path/"again")
    report.report(again)
    assert report.unevaluated(again) == "" and (again/"report/joint_panel.png").exists()
    gone = sorted(again.glob("seed*/*/m2"))[-1]
    shutil.rmtree(gone)
    for f in again.glob("seed*/**/evaluation/panel.jsonl"): f.unlink()
    for f in again.glob("seed*/**/evaluation/metrics.json"):
        found = json.loads(f.read_text())
        found["sets"].pop("panel")
        write_json(f, found)
    (again/"report/mine.png").write_text("not the report's")
    with open(again/"report/results.md", "a") as f: f.write("![](mine.png)")
    report.report(again)
    line = f"Not evaluated in again, so not in the tables: {gone.relative_to(again).as_posix()}."
    assert line in capsys.readouterr().out and line in (again/"report/results.md").read_text()
    assert not list((again/"report").glob("joint_panel.*")) and (again/"report/mine.png").exists() and (again/"report/joint_held-out.png").exists()

@pytest.mark.parametrize("name", ["smol", "smol-full"])
def test_the_kept_runs_are_made_again_from_their_tables(name, tmp_path):
    kept = Path(__file__).parents[1]/"docs/results"/name
    report.report(kept, tmp_path)
    for table in ("inconsistency", "reward_models", "comparisons", "claims", "alignment", "ablation"): assert (tmp_path/f"{table}.csv").read_text() == (kept/f"{table}.csv").read_text(), table
