import pytest
import torch
from hypothesis import given

from lit_dpo import DPOLoss, MinorDPOLoss
from tests.losses.values import at, close, gradient, nats, neg_log_sigmoid, numbers, random_logps


@pytest.mark.parametrize("beta", [0.01, 0.1, 2.0])
def test_agrees_with_the_formula(beta):
    policy, reference = random_logps(0, batch=20), random_logps(1, batch=20)
    expected = [neg_log_sigmoid(beta * (r_w - r_l if r_l > 0 else r_w)) for r_w, r_l, *_ in numbers(policy, reference)]
    assert MinorDPOLoss(beta=beta)(policy, reference).tolist() == close(expected)


def test_by_hand():
    # The rejected one has fallen and drops out: log(1 + e^0.2) = 0.7981389, slope 0.1 * sigmoid(0.2) = 0.0549834.
    assert MinorDPOLoss()(*at(-2.0, -6.0)).item() == pytest.approx(0.7981389, abs=1e-7)
    assert gradient(MinorDPOLoss(), *at(-2.0, -6.0)) == pytest.approx([-0.0549834, 0.0], abs=1e-7)


@given(chosen=nats, rejected=nats)
def test_equals_dpo_while_rejected_has_not_fallen(chosen, rejected):
    policy, reference = at(chosen, abs(rejected))
    assert torch.equal(MinorDPOLoss(beta=0.3)(policy, reference), DPOLoss(beta=0.3)(policy, reference))


def test_options():
    assert MinorDPOLoss() == MinorDPOLoss(beta=0.1)
    with pytest.raises(ValueError, match=r"^`beta` must be positive, got 0\.0\.$"):
        MinorDPOLoss(beta=0.0)
