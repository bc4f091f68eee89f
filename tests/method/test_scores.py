import math

import pytest, torch

from scir.method.rewards import REWARDS, View, margins, reward, text_pair
from scir.method.scores import candidate_pairs, labelled_pairs, score, set_reference
from scir.model.logprobs import response_logps
from scir.recipe import RecipeError
from scir.stages.optimise import assert_reference, pair_loss
from scir.stages.warm_start import warm_start_loss
from scir.store import LabelledPair, Score, read_rows

from helpers import response

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


def answer(prompt, c, text):
    return response(prompt, c, text=text, ids=[c + 1, c + 2], finished=False)


def test_useless_candidate_pairs_are_dropped_and_counted(tokenizer):
    pairs, dropped = candidate_pairs(
        tokenizer,
        [
            answer("p", 0, "x"),
            answer("p", 1, "x "),
            answer("p", 2, " "),
            answer("p", 3, "y"),
            answer("q", 0, "z"),
        ],
    )
    assert [p.id for p in pairs] in (["p/0-3", "p/1-3"], ["p/1-3", "p/0-3"]) and dropped == {
        "equal responses": 1,
        "empty response": 3,
    }


def test_pairs_per_prompt_are_fixed_by_the_seed(tokenizer):
    rows = [answer(p, c, f"text {c}") for p in "pqrs" for c in range(4)]
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


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_are_no_rows(policy, tokenizer, pairs, recipe, tmp_path, monkeypatch, value):
    "JSON has no word for them: they would be read as nothing."
    import scir.method.scores as module

    monkeypatch.setattr(module, "margins", lambda view: {k: v + value for k, v in margins(view).items()})
    with pytest.raises(FloatingPointError, match="pair p.: a log-prob or margin is not finite"):
        score(policy, tokenizer, pairs, recipe, tmp_path / "s.jsonl")
    assert (tmp_path / "s.partial.jsonl").read_text() == ""
