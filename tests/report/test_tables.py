"""Tables of the report, counted by hand."""

import pandas as pd

from scir.report import claims, tables as tabling
from scir.report.gather import answer_frame
from scir.statistics import derive

from helpers import response
from small_reports import NAMES, answers, gathered, model, pairs


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


# answers
def test_answers_by_hand():
    "Two prompts. The second answer to the first repeats one of its two bigrams."
    say = lambda i, prompt, ids, finished=True: response(prompt, i, prompt, ids=ids, finished=finished)
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
