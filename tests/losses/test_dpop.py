import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lit_dpo import DPOLoss, DPOPLoss
from tests.losses.values import logps, nats, neg_log_sigmoid, random_logps

betas = st.floats(1e-3, 10.0)
penalties = st.floats(0.0, 100.0)


def slow_dpop(policy, reference, beta, penalty):
    """The formula in Python numbers, pair by pair."""
    values = []
    for i in range(len(policy.chosen)):
        chosen_ratio = float(policy.chosen[i]) - float(reference.chosen[i])
        rejected_ratio = float(policy.rejected[i]) - float(reference.rejected[i])
        fallen = -chosen_ratio if chosen_ratio < 0 else 0.0
        values.append(neg_log_sigmoid(beta * (chosen_ratio - rejected_ratio - penalty * fallen)))
    return values


def loss_at(chosen_ratio, rejected_ratio, **options):
    """The loss of one pair with these log-ratios, as a number."""
    return DPOPLoss(**options)(logps(chosen_ratio, rejected_ratio), logps(0.0, 0.0)).item()


@pytest.mark.parametrize("beta", [0.01, 0.3])
@pytest.mark.parametrize("penalty", [0.0, 5.0, 50.0])
def test_agrees_with_the_formula(beta, penalty):
    policy, reference = random_logps(0, batch=20), random_logps(1, batch=20)
    value = DPOPLoss(beta=beta, penalty=penalty)(policy, reference)
    assert value.tolist() == pytest.approx(slow_dpop(policy, reference, beta, penalty), rel=1e-12)


def test_defaults_are_the_papers():
    assert DPOPLoss() == DPOPLoss(beta=0.3, penalty=50.0)


def test_log_2_where_policy_is_reference():
    assert DPOPLoss()(random_logps(0), random_logps(0)).tolist() == pytest.approx([math.log(2)] * 5, rel=1e-15)


def test_penalty_stands_inside_the_sigmoid_and_under_beta():
    # r_w = -2, r_l = -7, so h = 5; 3 nats a fallen nat take off 3 * 2 = 6, and 0.5 * (5 - 6) = -0.5:
    # log(1 + e^0.5) = log(2.6487213) = 0.9740770
    assert loss_at(-2.0, -7.0, beta=0.5, penalty=3.0) == pytest.approx(0.9740769842, abs=1e-10)


def test_gradient_by_hand_where_chosen_has_fallen():
    # The margin is m = beta * (r_w - r_l + penalty * r_w), so log(1 + e^-m) has the derivatives
    # -beta * (1 + penalty) * sigmoid(-m) in r_w and beta * sigmoid(-m) in r_l.
    # Here m = 0.5 * (-2 + 7 - 6) = -0.5, and sigmoid(0.5) = 0.6224593.
    policy = logps(-2.0, -7.0)
    policy.chosen.requires_grad_()
    policy.rejected.requires_grad_()
    value = DPOPLoss(beta=0.5, penalty=3.0)(policy, logps(0.0, 0.0))
    grads = torch.autograd.grad(value.sum(), (policy.chosen, policy.rejected))
    assert [g.item() for g in grads] == pytest.approx([-2.0 * 0.6224593312, 0.5 * 0.6224593312], rel=1e-9)


def test_options_are_checked():
    with pytest.raises(ValueError, match=r"^`beta` must be positive, got -0\.3\.$"):
        DPOPLoss(beta=-0.3)
    with pytest.raises(ValueError, match=r"^`penalty` must be at least 0, got -1\.0\.$"):
        DPOPLoss(penalty=-1.0)


@given(chosen=nats, rejected=nats, beta=betas, penalty=penalties)
def test_equals_dpo_while_chosen_has_not_fallen(chosen, rejected, beta, penalty):
    policy, reference = logps(abs(chosen), rejected), logps(0.0, 0.0)
    assert torch.equal(DPOPLoss(beta=beta, penalty=penalty)(policy, reference), DPOLoss(beta=beta)(policy, reference))


@given(values=st.tuples(nats, nats, nats, nats), beta=betas)
def test_without_penalty_equals_dpo(values, beta):
    policy, reference = logps(*values[:2]), logps(*values[2:])
    assert torch.equal(DPOPLoss(beta=beta, penalty=0.0)(policy, reference), DPOLoss(beta=beta)(policy, reference))


@given(values=st.tuples(nats, nats, nats, nats), shifts=st.tuples(nats, nats), beta=betas, penalty=penalties)
def test_shifting_policy_and_reference_alike_changes_nothing(values, shifts, beta, penalty):
    chosen, rejected, ref_chosen, ref_rejected = values
    up, down = shifts
    loss = DPOPLoss(beta=beta, penalty=penalty)
    plain = loss(logps(chosen, rejected), logps(ref_chosen, ref_rejected))
    shifted = loss(logps(chosen + up, rejected + down), logps(ref_chosen + up, ref_rejected + down))
    assert torch.equal(plain, shifted)


@given(chosen=nats, rejected=nats, beta=betas, penalty=penalties)
def test_beta_scales_the_ratios(chosen, rejected, beta, penalty):
    scaled = loss_at(beta * chosen, beta * rejected, beta=1.0, penalty=penalty)
    # Both sides round differently before the subtraction, by some 1e-16 of the largest term.
    size = beta * (abs(chosen) * (1 + penalty) + abs(rejected))
    assert loss_at(chosen, rejected, beta=beta, penalty=penalty) == pytest.approx(scaled, rel=1e-12, abs=1e-12 * size)


@given(chosen=nats, rejected=nats, beta=betas, penalty=penalties, more=st.floats(0.0, 100.0))
def test_never_below_dpo_and_grows_with_the_penalty(chosen, rejected, beta, penalty, more):
    value = loss_at(chosen, rejected, beta=beta, penalty=penalty)
    assert value >= loss_at(chosen, rejected, beta=beta, penalty=0.0)
    assert value <= loss_at(chosen, rejected, beta=beta, penalty=penalty + more)
