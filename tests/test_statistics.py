"""Rates with intervals, paired differences and calibration, beside values worked out by hand."""

import math

import numpy as np
import pytest
from scipy.stats import t as student

from scir.statistics import by_quantile, ece, frame, grouped, metrics, paired, rate, reliability, sign_flip
from scir.store import Score


def made(id, g, i, label=None, orders=None, prompt="p", lengths=(1, 1), **kw):
    return Score(
        id=id,
        prompt_id=prompt,
        prompt="Q",
        response_a=kw.get("a", "a"),
        response_b=kw.get("b", "b"),
        ids_a=kw.get("ids_a", [1] * lengths[0]),
        ids_b=kw.get("ids_b", [2] * lengths[1]),
        logps=(0, 0),
        reference_logps=(0, 0),
        order_margins=orders or (g, -g),
        verdict_mass=(0.5, 0.7),
        margins={"generative": g, "implicit": i},
        label=label,
    )


# consistency --------------------------------------------------------------
@pytest.mark.parametrize(
    "hits, n, low, high", [(8, 10, 0.4902, 0.9433), (0, 10, 0, 0.2775), (10, 10, 0.7225, 1), (50, 100, 0.4038, 0.5962)]
)
def test_wilson_interval(hits, n, low, high):
    r = rate([True] * hits + [False] * (n - hits))
    assert r == {"value": hits / n, "low": pytest.approx(low, abs=1e-4), "high": pytest.approx(high, abs=1e-4), "n": n}


def test_rate_of_nothing():
    assert rate([])["value"] is None


def test_paired_by_hand():
    r = paired([1, 1, 1, 1, 1, 0, 0, 1], [0, 0, 0, 0, 0, 0, 1, 1])  # 5 against 1: two-sided p = 2 (6 + 1) / 2^6
    assert (
        r["difference"] == 0.5
        and r["p"] == pytest.approx(14 / 64)
        and r["n"] == 8
        and -0.2 < r["low"] < 0.3
        and 0.7 < r["high"] <= 1
    )
    assert paired([1, 0], [1, 0]) == {"difference": 0, "low": 0, "high": 0, "p": 1, "n": 2, "prompts": 2}


def test_seeds_and_pairs_of_one_prompt_are_no_new_evidence():
    first, second = [1, 1, 0, 1, 0, 1, 1, 0, 1, 1], [0, 1, 0, 0, 0, 1, 0, 0, 1, 0]
    once, thrice = paired(first, second), paired(first * 3, second * 3, list(range(10)) * 3)
    assert (
        thrice["n"] == 30
        and thrice["prompts"] == 10
        and all(thrice[k] == pytest.approx(once[k]) for k in ("difference", "low", "high", "p"))
    )
    wide, narrow = grouped(first * 3, list(range(10)) * 3), rate(first * 3)
    assert wide["value"] == pytest.approx(narrow["value"]) and wide["high"] - wide["low"] > 1.3 * (
        narrow["high"] - narrow["low"]
    )
    assert grouped(first, range(10)) == rate(first) | {"prompts": 10}


def test_one_difference_alone_decides_nothing():
    assert sign_flip(np.array([0, 2.0, 0])) == sign_flip(np.array([0.0, 1, 0])) == sign_flip(np.zeros(3)) == 1


def test_permutation_test_is_mcnemar_where_that_applies():
    each = np.array([1.0] * 9 + [-1.0] * 3 + [0.0] * 5)
    exact, drawn = (
        sign_flip(each),
        sign_flip(each * 0.5),
    )  # the same differences in another unit take the permutation path
    assert exact == pytest.approx(2 * sum(math.comb(12, k) for k in range(4)) / 2**12) and drawn == pytest.approx(
        exact, abs=0.03
    )


# calibration --------------------------------------------------------------
def test_reliability_and_ece_by_hand():
    m = [
        made(str(k), math.log(0.8 / 0.2) * s, 1, label)
        for k, (s, label) in enumerate([(1, "a"), (1, "b"), (-1, "b"), (-1, "b")])
    ]  # four at 80%, three right
    t = reliability(frame(m), "generative")
    assert (
        len(t) == 1
        and t.value[0] == 0.75
        and t.confidence[0] == pytest.approx(0.8)
        and t.n[0] == 4
        and ece(t) == pytest.approx(0.05)
    )


def test_a_calibrated_model_has_little_ece_and_a_boaster_much():
    rng = np.random.default_rng(0)
    g = rng.normal(size=4000) * 2

    def of(scale):
        return ece(
            reliability(
                frame(
                    [
                        made(str(k), scale * x, 1, "a" if rng.random() < 1 / (1 + np.exp(-x)) else "b")
                        for k, x in enumerate(g)
                    ]
                ),
                "generative",
            )
        )

    assert of(1) < 0.03 and of(4) > 0.1


SCORES = [
    made("1", 2, 1, "a"),
    made("2", -1, 1, "a", orders=(3, 5)),
    made("3", -1, -3, "a", orders=(-3, -1), lengths=(5, 1)),
    made("4", 1, 2, "b", orders=(-1, -3)),
]


def H(m):
    p = 1 / (1 + math.exp(-m))
    return -p * math.log(p) - (1 - p) * math.log(1 - p)


def test_metrics_by_hand():
    m = metrics(SCORES)
    value = {k: v["value"] if isinstance(v, dict) else v for k, v in m.items()}
    assert value == pytest.approx(
        {
            "flip_rate": 0.75,
            "verdict_mass": 0.6,
            "abs_margin_generative": 1.25,
            "abs_margin_implicit": 1.75,
            "inconsistency": 0.25,
            "accuracy_generative": 0.25,
            "accuracy_implicit": 0.5,
            "accuracy_agreed": 1 / 3,
            "accuracy_mean": 0.25,
            "accuracy_likelihood": 0,
            "inconsistency_likelihood": 0.5,
            "labelled": 4,
            "inconsistency_labelled": 0.25,
            "rank_correlation": 0.5,
            "entropy": np.mean([H(x) for s in SCORES for x in s.margins.values()]),
            "ece_generative": m["ece_generative"],
            "ece_implicit": m["ece_implicit"],
        }
    )
    assert m["accuracy_agreed"]["n"] == 3


def test_unlabelled_pairs_have_no_accuracy():
    bare = [s.model_copy(update={"label": None}) for s in SCORES]
    assert not [k for k in metrics(bare) if k.startswith(("accuracy", "ece", "labelled"))]


def test_a_pair_without_label_counts_for_agreement_and_not_for_accuracy():
    "A tie by the grader."
    with_tie, without = metrics([made("1", 2, 1), *SCORES]), metrics(SCORES)
    same = [k for k in without if k.startswith(("accuracy", "ece"))]
    assert {k: with_tie[k] for k in same} == {k: without[k] for k in same} and with_tie["labelled"] == without[
        "labelled"
    ] == 4
    assert with_tie["inconsistency"]["n"] == 5 and with_tie["inconsistency"]["value"] == pytest.approx(0.2)


def test_silent_reward_model_is_not_counted_as_inconsistent():
    m = metrics([made("1", 2, 0, "a"), made("2", -1, 1e-6, "b")])
    assert "inconsistency" not in m and "accuracy_implicit" not in m and m["accuracy_generative"]["value"] == 1


def test_a_tie_is_a_contradiction_and_no_hit():
    d = frame([made("1", 0, 1, "a"), made("2", 0, 0, "b")])
    assert not d.agree.any() and not d.right_generative.any()


@pytest.mark.parametrize("column", ["confidence", "length_difference"])
def test_quantile_bins_hold_every_pair(column):
    assert by_quantile(frame(SCORES), column).n.sum() == 4 and by_quantile(
        frame(SCORES[:2] * 3), "length_difference"
    ).n.tolist() == [6]
    d = frame(SCORES)
    assert by_quantile(d, column)[column][0].startswith(
        f"{d[column].min():.3g} to "
    )  # not just below the least, where quantiles begin


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
