import math

import pytest, torch
from torch.distributions import Bernoulli, kl_divergence

from scir.method.judge import average_orders
from scir.method.loss import agreed_side, dpo_loss, entropy, implicit_margin, scir_loss, symmetric_kl


def rand(*shape, seed=0, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tau": 0.7},
        {"agreement": False},
        {"target": torch.tensor([1, 0, math.nan, 0.3, 1, -1], dtype=torch.float64)},
    ],
)
def test_gradient_is_that_of_finite_differences(options):
    judge, third, logps, reference = (
        x.requires_grad_() for x in (rand(6), rand(6, seed=1), rand(6, 2, seed=2, scale=9), rand(6, 2, seed=3, scale=9))
    )

    def loss(judge, third, logps):
        m = implicit_margin(logps, reference.detach(), 0.1, torch.full((6, 2), 2.0))
        return scir_loss(
            {"generative": judge, "implicit": m, "third": third}, m, lambda_confidence=0.3, moves="both", **options
        ).loss

    assert torch.autograd.gradcheck(loss, (judge, third, logps))


def test_swapping_the_pair_changes_nothing():
    g, i, target = rand(8), rand(8, seed=1), torch.tensor([1.0, 0, 1, -1, 0.25, math.nan, 1, 0])
    for t in (None, target):
        one = scir_loss({"g": g, "i": i}, i, tau=0.6, target=t)
        two = scir_loss({"g": -g, "i": -i}, -i, tau=0.6, target=None if t is None else torch.where(t < 0, t, 1 - t))
        torch.testing.assert_close(one.loss, two.loss)
        assert torch.equal(one.mask, two.mask)
    torch.testing.assert_close(
        scir_loss({"g": g, "i": i}, i, agreement=False).loss, scir_loss({"g": -g, "i": -i}, -i, agreement=False).loss
    )


def test_no_agreeing_pair_gives_a_connected_zero():
    g, i = torch.tensor([1.0, -2.0], requires_grad=True), torch.tensor([-1.0, 1.0], requires_grad=True)
    out = scir_loss({"g": g, "i": i}, i, lambda_consistency=0.0, lambda_confidence=0.0)
    assert out.loss == 0 and not out.mask.any() and out.metrics["margin"] == 0
    out.loss.backward()
    assert torch.equal(i.grad, torch.zeros(2)) and torch.equal(g.grad, torch.zeros(2))


def test_dpo_term_is_the_mean_over_all_pairs_of_the_batch():
    g, i = torch.tensor([1.0, 1, 1, -1]), torch.tensor([2.0, 3, -1, 1])
    out = scir_loss({"g": g, "i": i}, i, lambda_consistency=0.0, lambda_confidence=0.0)
    assert out.loss.item() == pytest.approx((math.log1p(math.exp(-2)) + math.log1p(math.exp(-3))) / 4, abs=1e-6)
    assert (
        out.mask.tolist() == [True, True, False, False]
        and out.metrics["retained"] == 0.5
        and out.metrics["inconsistency"] == 0.5
    )


def test_label_is_decided_anew_from_the_margins_of_this_step():
    g = torch.tensor([0.1, 0.1], requires_grad=True)
    i = torch.tensor([1.0, -1.0])
    assert scir_loss({"g": g, "i": i}, i).mask.tolist() == [True, False]
    with torch.no_grad():
        g -= 1
    assert scir_loss({"g": g, "i": i}, i).mask.tolist() == [False, True]
    assert agreed_side(torch.stack([g, i]))[1].tolist() == [0, 0]


def test_a_tie_is_no_agreement():
    assert agreed_side(torch.zeros(2, 3))[0].tolist() == [False] * 3


@pytest.mark.parametrize("tau, moves", [(0.9, False), (0.5, True)])
def test_closed_gate_stops_the_penalty_gradient(tau, moves):
    g, i = torch.tensor([1.0], requires_grad=True), torch.tensor([-0.5], requires_grad=True)
    scir_loss({"g": g, "i": i}, i, lambda_confidence=0.0, tau=tau, moves="both").loss.backward()
    assert bool(g.grad.abs() > 0) == bool(i.grad.abs() > 0) == moves


def test_gate_opens_for_one_confident_model():
    g, i = torch.tensor([4.0], requires_grad=True), torch.tensor([-0.5], requires_grad=True)
    scir_loss({"g": g, "i": i}, i, lambda_confidence=0.0, tau=0.9, moves="both").loss.backward()
    assert g.grad.abs() > 0 and i.grad.abs() > 0


def test_entropy_and_symmetric_kl_are_those_of_torch():
    a, b = rand(50, scale=4), rand(50, seed=1, scale=4)
    p, q = Bernoulli(logits=a), Bernoulli(logits=b)
    torch.testing.assert_close(entropy(a), p.entropy())
    torch.testing.assert_close(symmetric_kl(a, b), (kl_divergence(p, q) + kl_divergence(q, p)) / 2)


def test_large_margins_stay_finite():
    m = torch.tensor([500.0, -500.0], requires_grad=True)
    scir_loss({"g": m, "i": -m}, m).loss.backward()
    assert m.grad.isfinite().all()


def test_soft_label_is_a_mixture():
    m = rand(4)
    torch.testing.assert_close(
        dpo_loss(m, torch.full((4,), 0.3)),
        0.3 * dpo_loss(m, torch.ones(4)) + 0.7 * dpo_loss(m, torch.zeros(4)),
        atol=1e-6,
        rtol=1e-6,
    )


def test_length_normalised_margin_is_per_token():
    m = implicit_margin(torch.tensor([[-10.0, -9.0]]), torch.tensor([[-20.0, -12.0]]), 0.5, torch.tensor([[5, 3]]))
    assert m.item() == pytest.approx(0.5 * (10 / 5 - 3 / 3))


def test_constant_position_bias_cancels():
    ab, ba = rand(9), rand(9, seed=1)
    torch.testing.assert_close(average_orders(ab + 3.7, ba + 3.7), average_orders(ab, ba))
    torch.testing.assert_close(average_orders(ba, ab), -average_orders(ab, ba))


def test_fixed_labels_stand_and_the_others_are_asked_now():
    g, i = torch.tensor([1.0, 1, -1, 1, 1]), torch.tensor([1.0, -1, -1, 1, -1])
    out = scir_loss(
        {"g": g, "i": i},
        i,
        lambda_consistency=0.0,
        lambda_confidence=0.0,
        target=torch.tensor([math.nan, math.nan, 1.0, -1.0, 0.0]),
    )
    assert out.mask.tolist() == [True, False, True, False, True]
    expected = [
        math.log1p(math.exp(-1)),
        math.log1p(math.exp(1)),
        math.log1p(math.exp(-1)),
    ]  # a by agreement; a, against both models; b, by its label
    assert out.loss.item() == pytest.approx(sum(expected) / 5, abs=1e-6)


def test_the_more_confident_model_teaches_and_the_value_is_the_same():
    g, i = torch.tensor([2.0, 0.1, -1.0], requires_grad=True), torch.tensor([-0.5, 3.0, -1.0], requires_grad=True)
    one, both = (
        scir_loss({"g": g, "i": i}, i.detach(), lambda_confidence=0.0, moves=m) for m in ("less_confident", "both")
    )
    assert one.loss.item() == pytest.approx(both.loss.item())
    one.loss.backward()
    assert (
        g.grad.tolist()[0] == 0 and i.grad.tolist()[1] == 0 and g.grad[1] < 0 and i.grad[0] < 0
    )  # each follows the more confident one


def test_a_named_model_moves_alone():
    g, i = torch.tensor([2.0, 0.1, -1.0], requires_grad=True), torch.tensor([-0.5, 3.0, -1.0], requires_grad=True)
    scir_loss({"g": g, "i": i}, i.detach(), lambda_confidence=0.0, moves="i").loss.backward()
    assert g.grad.abs().sum() == 0 and i.grad[0] < 0 < i.grad[1]
