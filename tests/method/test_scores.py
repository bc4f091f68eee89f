import math

import numpy as np
import pytest, torch

from scir.statistics import by_quantile, ece, frame, grouped, metrics, paired, rate, reliability, sign_flip
from scir.model.logprobs import response_logps
from scir.stages.optimise import assert_reference, pair_loss
from scir.recipe import RecipeError
from scir.method.rewards import REWARDS, View, margins, reward, text_pair
from scir.method.scores import candidate_pairs, labelled_pairs, score, set_reference
from scir.store import LabelledPair, Response, Score, read_rows
from scir.stages.warm_start import warm_start_loss

THREE = ("generative", "implicit", "pointwise")


def swapped(tokenizer, p):
    return text_pair(
        tokenizer,
        p.id,
        p.prompt,
        p.response_b,
        p.response_a,
        reference_logps=p.reference_logps[::-1],
        target=1 - p.target,
        extra=p.extra,
    )


@pytest.fixture
def yes_no(policy, tokenizer, monkeypatch):
    "Bytes have no single token for Yes and No: let Y and N stand for them."
    monkeypatch.setattr("scir.method.rewards.YES_NO", ("Y", "N"))


@pytest.fixture
def three(recipe):
    return recipe.model_copy(update={"rewards": THREE})


@pytest.mark.parametrize("rewards", [("generative", "implicit"), THREE])
def test_swapping_the_pair_negates_every_margin(policy, tokenizer, pairs, recipe, yes_no, tmp_path, rewards):
    recipe = recipe.model_copy(update={"rewards": rewards})
    set_reference(policy, pairs, 4096)
    one = score(policy, tokenizer, pairs, recipe, tmp_path / "a.jsonl")
    two = score(policy, tokenizer, [swapped(tokenizer, p) for p in pairs], recipe, tmp_path / "b.jsonl")
    for a, b in zip(one, two):
        assert tuple(a.margins) == rewards and all(abs(v) > 1e-5 for v in a.margins.values())
        assert {k: -v for k, v in a.margins.items()} == pytest.approx(b.margins, abs=1e-5)
        assert a.order_margins == pytest.approx(b.order_margins[::-1], abs=1e-5) and a.margins[
            "generative"
        ] == pytest.approx((a.order_margins[0] - a.order_margins[1]) / 2)
        assert a.margins["implicit"] == pytest.approx(
            5
            * ((a.logps[0] - a.reference_logps[0]) / len(a.ids_a) - (a.logps[1] - a.reference_logps[1]) / len(a.ids_b)),
            abs=1e-4,
        )
        assert all(0 < m <= 1 for m in a.verdict_mass)


def test_third_reward_model_takes_part_in_the_loss(make_policy, tokenizer, pairs, three, yes_no):
    model = make_policy()
    set_reference(model, pairs, 4096)
    for p in pairs:
        p.target = math.nan
    view = View(model, tokenizer, pairs, three)
    loss, found = pair_loss(view, three.train)
    loss.backward()
    m = torch.stack(list(margins(view).values()))
    assert (
        m.shape == (3, 8)
        and found["abs_margin_pointwise"] > 0
        and all(p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)
    )
    assert found["retained"] == ((m > 0).all(0) | (m < 0).all(0)).float().mean()


def test_warm_start_loss_is_symmetric_and_knows_the_label(policy, tokenizer, pairs, recipe):
    set_reference(policy, pairs, 4096)
    loss = lambda rows: warm_start_loss(View(policy, tokenizer, rows, recipe), recipe.warm_start)
    (one, terms), (two, swapped_terms) = loss(pairs), loss([swapped(tokenizer, p) for p in pairs])
    assert one.item() == pytest.approx(two.item(), abs=1e-5) and {
        k: float(v) for k, v in terms.items()
    } == pytest.approx({k: float(v) for k, v in swapped_terms.items()}, abs=1e-5)
    chosen = [p.ids_a if p.target else p.ids_b for p in pairs]
    logps = response_logps(policy, [p.prompt_ids for p in pairs], chosen)
    assert terms["loss_sft"].item() == pytest.approx(
        sum(-l.item() / len(c) for l, c in zip(logps, chosen)) / 8, abs=1e-4
    )
    for p in pairs:
        p.target = 1 - p.target
    wrong = loss(pairs)[1]
    for k in ("loss_sft", "loss_judge", "loss_dpo"):
        assert abs(wrong[k] - terms[k]) > 1e-4
    for k in ("accuracy_generative", "accuracy_implicit"):
        assert wrong[k] + terms[k] == 1


def test_a_new_reward_model_is_a_function_and_a_name(policy, tokenizer, pairs, recipe, monkeypatch):
    monkeypatch.delitem(REWARDS, "longer", raising=False)

    @reward
    def longer(view):
        return (view.lengths[:, 0] - view.lengths[:, 1]).float()

    try:
        assert margins(View(policy, tokenizer, pairs, recipe.model_copy(update={"rewards": ("longer", "generative")})))[
            "longer"
        ].tolist() == [len(p.ids_a) - len(p.ids_b) for p in pairs]
    finally:
        del REWARDS["longer"]


def test_unknown_reward_model_lists_the_known(policy, tokenizer, pairs, recipe):
    with pytest.raises(RecipeError, match="magic.*generative, implicit, pointwise"):
        margins(View(policy, tokenizer, pairs, recipe.model_copy(update={"rewards": ("generative", "magic")})))


def test_reward_models_need_not_include_the_implicit_one(policy, tokenizer, pairs, recipe, yes_no, tmp_path):
    set_reference(policy, pairs, 4096)
    assert_reference(
        score(
            policy,
            tokenizer,
            pairs,
            recipe.model_copy(update={"rewards": ("generative", "pointwise")}),
            tmp_path / "s.jsonl",
        )
    )


def test_a_label_stands_in_every_arm_and_its_absence_asks_the_models(policy, tokenizer, pairs, recipe):
    set_reference(policy, pairs, 4096)

    def loss(target, arm):
        for p in pairs:
            p.target = target
        return pair_loss(View(policy, tokenizer, pairs, recipe), recipe.arm(arm))[0].item()

    for arm in ("scir", "srlm"):
        assert loss(0.0, arm) != loss(1.0, arm)
    asked, penalty = loss(math.nan, "scir"), loss(-1.0, "scir")
    assert penalty < asked < max(loss(0.0, "scir"), loss(1.0, "scir")) and loss(-1.0, "srlm") == 0


def test_score_does_not_depend_on_the_batch_and_goes_on_after_a_kill(
    policy, tokenizer, pairs, recipe, tmp_path, monkeypatch
):
    from scir.method import scores as module

    read, rows = [], module._rows
    monkeypatch.setattr(module, "_rows", lambda view: (read.append(len(view.pairs)), rows(view))[1])
    set_reference(policy, pairs, 4096)
    whole = score(policy, tokenizer, pairs, recipe, tmp_path / "a.jsonl")
    small = recipe.model_copy(update={"judge": recipe.judge.model_copy(update={"batch_tokens": 1})})
    data = "".join(s.model_dump_json() + "\n" for s in whole[3:5])
    (tmp_path / "b.partial.jsonl").write_text(data + '{"id": "p7", "pro')
    read.clear()
    for a, b in zip(whole, score(policy, tokenizer, pairs, small, tmp_path / "b.jsonl"), strict=True):
        assert a.id == b.id and a.margins == pytest.approx(b.margins, abs=1e-4) and a.ids_a == b.ids_a
    assert len(read_rows(tmp_path / "b.jsonl", Score)) == 8
    assert read == [1] * (len(pairs) - 2)  # the two that were there are not read again


# pairs --------------------------------------------------------------------


def response(prompt, c, text):
    return Response(
        id=f"{prompt}/{c}",
        prompt_id=prompt,
        prompt="Q",
        candidate=c,
        response=text,
        response_ids=[c + 1, c + 2],
        finished=False,
        seed=0,
    )


def test_useless_candidate_pairs_are_dropped_and_counted(tokenizer):
    pairs, dropped = candidate_pairs(
        tokenizer,
        [
            response("p", 0, "x"),
            response("p", 1, "x "),
            response("p", 2, " "),
            response("p", 3, "y"),
            response("q", 0, "z"),
        ],
    )
    assert [p.id for p in pairs] in (["p/0-3", "p/1-3"], ["p/1-3", "p/0-3"]) and dropped == {
        "equal responses": 1,
        "empty response": 3,
    }


def test_pairs_per_prompt_are_fixed_by_the_seed(tokenizer):
    rows = [response(p, c, f"text {c}") for p in "pqrs" for c in range(4)]
    one, again, other = (
        [x.id for x in candidate_pairs(tokenizer, r, 2, s)[0]] for r, s in ((rows, 0), (rows[::-1], 0), (rows, 1))
    )
    assert one == again != other and len(one) == 8 and len(candidate_pairs(tokenizer, rows)[0]) == 24


def test_long_labelled_pairs_are_dropped_and_counted(tokenizer):
    rows = [
        LabelledPair(id=str(i), prompt=p, chosen=c, rejected="no")
        for i, (p, c) in enumerate([("Q", "yes"), ("Q" * 90, "yes"), ("Q", "y" * 90)])
    ]
    pairs, dropped = labelled_pairs(tokenizer, rows, 80, 50)
    assert len(pairs) == 1 and dropped == {"prompt too long": 1, "response too long": 1}
    with pytest.raises(ValueError, match="max_prompt_tokens") as e:
        labelled_pairs(tokenizer, rows, 3, 3)
    assert "\n" not in str(e.value)


def test_chosen_side_is_no_constant_and_label_target_agree(tokenizer):
    pairs, _ = labelled_pairs(
        tokenizer, [LabelledPair(id=str(i), prompt="Q", chosen="good", rejected="bad") for i in range(60)], 99, 99
    )
    assert 15 < sum(p.target for p in pairs) < 45
    for p in pairs:
        assert (p.response_a == "good") == (p.target == 1) == (p.extra["label"] == "a")


def test_limit_counts_the_pairs_that_fit(tokenizer):
    rows = [
        LabelledPair(id=str(i), prompt="Q" * (90 if i % 2 else 1), chosen="good", rejected="bad") for i in range(20)
    ]
    pairs, dropped = labelled_pairs(tokenizer, rows, 60, 60, limit=4)
    assert [p.id for p in pairs] == ["0", "2", "4", "6"] and dropped == {"prompt too long": 3}


# labels -------------------------------------------------------------------


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


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_are_no_rows(policy, tokenizer, pairs, recipe, tmp_path, monkeypatch, value):
    "JSON has no word for them: they would be read as nothing."
    import scir.method.scores as module

    monkeypatch.setattr(module, "margins", lambda view: {k: v + value for k, v in margins(view).items()})
    with pytest.raises(FloatingPointError, match="pair p.: a log-prob or margin is not finite"):
        score(policy, tokenizer, pairs, recipe, tmp_path / "s.jsonl")
    assert (tmp_path / "s.partial.jsonl").read_text() == ""
