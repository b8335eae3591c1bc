import pytest
import torch

from lit_dpo import DPOLoss, LDDPOLoss
from tests.losses.values import close, neg_log_sigmoid, random_logps, token_logps


@pytest.mark.parametrize("beta", [0.01, 0.1, 2.0])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_agrees_with_the_formula(beta, alpha):
    policy, reference = random_logps(0, batch=20), random_logps(1, batch=20)
    expected = []
    for pair in range(20):
        parts = [values.split_tokens()[2 * pair + side].tolist() for values in (policy, reference) for side in (0, 1)]
        shorter = min(len(part) for part in parts)
        policy_w, policy_l, reference_w, reference_l = (
            sum(value if place < shorter else alpha * value for place, value in enumerate(part)) for part in parts
        )
        expected.append(neg_log_sigmoid(beta * (policy_w - reference_w - policy_l + reference_l)))
    assert LDDPOLoss(beta=beta, alpha=alpha)(policy, reference).tolist() == close(expected)


def test_by_hand():
    # Two tokens in common: chosen -1 - 2 = -3; rejected -1 - 2 and half of -4, -5. log(1 + e^-2) = 0.1269280.
    policy = token_logps([([-1.0, -2.0], [-1.0, -2.0, -4.0])])
    assert LDDPOLoss(beta=1.0)(policy, policy.zeros()).item() == pytest.approx(0.126928, abs=1e-6)


def test_the_gradient_on_the_surplus_is_alpha_of_that_on_the_rest():
    start = token_logps([([-1.0, -2.0], [-1.0, -2.0, -4.0])])
    tokens = start.tokens.clone().requires_grad_()
    parts = tokens.split([2, 3])
    sums = [part.sum().view(1) for part in parts]
    policy = type(start)(*sums, start.chosen_tokens, start.rejected_tokens, tokens=tokens)
    (grad,) = torch.autograd.grad(LDDPOLoss(beta=1.0, alpha=0.25)(policy, start.zeros()).sum(), tokens)
    slope = grad[0].item()
    assert slope < 0
    assert grad.tolist() == pytest.approx([slope, slope, -slope, -slope, -0.25 * slope], rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_alpha_1_is_dpo_bit_for_bit(dtype):
    policy, reference = random_logps(0, dtype=dtype), random_logps(1, dtype=dtype)
    assert torch.equal(LDDPOLoss(0.3, alpha=1.0)(policy, reference), DPOLoss(beta=0.3)(policy, reference))


def test_completions_of_one_length_make_it_dpo():
    policy = token_logps([([-1.0, -2.0], [-3.0, -2.5]), ([-4.0], [-0.5])])
    value = LDDPOLoss(alpha=0.5)(policy, policy.zeros())
    assert value.tolist() == close(DPOLoss()(policy, policy.zeros()).tolist())


def test_options():
    assert LDDPOLoss() == LDDPOLoss(beta=0.1, alpha=0.5)
    with pytest.raises(ValueError, match=r"^`beta` must be positive, got 0\.0\.$"):
        LDDPOLoss(beta=0.0)
    for alpha in (-0.1, 1.1):
        with pytest.raises(ValueError, match=rf"^`alpha` must be in \[0, 1\], got {alpha}\.$"):
            LDDPOLoss(alpha=alpha)
