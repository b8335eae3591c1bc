import pytest
import torch

from lit_dpo import DPOLoss, DPOShiftLoss
from tests.losses.values import at, close, gradient, neg_log_sigmoid, numbers, random_logps


@pytest.mark.parametrize("beta", [0.01, 0.1, 2.0])
@pytest.mark.parametrize("factor", [0.5, 0.95, 1.0])
def test_agrees_with_the_formula(beta, factor):
    policy, reference = random_logps(0, batch=20), random_logps(1, batch=20)
    expected = [neg_log_sigmoid(beta * r_w - factor * beta * r_l) for r_w, r_l, *_ in numbers(policy, reference)]
    assert DPOShiftLoss(beta=beta, rejected_weight=factor)(policy, reference).tolist() == close(expected)


def test_by_hand():
    # 0.1 * (-2 + 0.95 * 6) = 0.37: log(1 + e^-0.37) = 0.5251629; 0.1 * sigmoid(-0.37) = 0.0408541 and 0.95 of it.
    assert DPOShiftLoss()(*at(-2.0, -6.0)).item() == pytest.approx(0.525163, abs=1e-6)
    assert gradient(DPOShiftLoss(), *at(-2.0, -6.0)) == pytest.approx([-0.0408541, 0.0388114], abs=1e-7)


def test_without_shift_it_is_dpo():
    policy, reference = random_logps(0), random_logps(1)
    assert torch.equal(DPOShiftLoss(0.3, 1.0)(policy, reference), DPOLoss(beta=0.3)(policy, reference))


def test_options():
    assert DPOShiftLoss() == DPOShiftLoss(beta=0.1, rejected_weight=0.95)
    with pytest.raises(ValueError, match=r"^`beta` must be positive, got 0\.0\.$"):
        DPOShiftLoss(beta=0.0)
    for factor in (0.0, 1.5):
        with pytest.raises(ValueError, match=rf"^`rejected_weight` must be in \(0, 1\], got {factor}\.$"):
            DPOShiftLoss(rejected_weight=factor)
