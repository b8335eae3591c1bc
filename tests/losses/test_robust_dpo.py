import math

import pytest
import torch

from lit_dpo import DPOLoss, RobustDPOLoss
from tests.losses.values import at, close, gradient, neg_log_sigmoid, numbers, random_logps


@pytest.mark.parametrize("beta", [0.01, 0.1, 2.0])
@pytest.mark.parametrize("eps", [0.0, 0.1, 0.4])
def test_agrees_with_the_formula(beta, eps):
    policy, reference = random_logps(0, batch=20), random_logps(1, batch=20)
    expected = []
    for r_w, r_l, *_ in numbers(policy, reference):
        right, wrong = neg_log_sigmoid(beta * (r_w - r_l)), neg_log_sigmoid(-beta * (r_w - r_l))
        expected.append(((1 - eps) * right - eps * wrong) / (1 - 2 * eps))
    assert RobustDPOLoss(beta=beta, label_smoothing=eps)(policy, reference).tolist() == close(expected)


def test_by_hand():
    # h = -2 + 6 = 4 and 0.1 * 4 = 0.4: log(1 + e^-0.4) = 0.5130153 for the label as it stands, 0.4 more for its
    # opposite, 0.9130153. (0.9 * 0.5130153 - 0.1 * 0.9130153) / 0.8 = 0.4630153.
    assert RobustDPOLoss()(*at(-2.0, -6.0)).item() == pytest.approx(0.4630152, abs=1e-7)
    # The slope in the margin is -(0.9 * sigmoid(-0.4) + 0.1 * sigmoid(0.4)) / 0.8 = -(0.3611811 + 0.0598688) / 0.8.
    assert gradient(RobustDPOLoss(), *at(-2.0, -6.0)) == pytest.approx([-0.0526312, 0.0526312], abs=1e-7)


def test_its_mean_over_swapped_labels_is_dpo():
    policy, reference = random_logps(0), random_logps(1)
    loss, eps = RobustDPOLoss(beta=0.3, label_smoothing=0.2), 0.2

    def swapped(values):
        return type(values)(values.rejected, values.chosen, values.rejected_tokens, values.chosen_tokens)

    mean = (1 - eps) * loss(policy, reference) + eps * loss(swapped(policy), swapped(reference))
    assert mean.tolist() == close(DPOLoss(beta=0.3)(policy, reference).tolist())


def test_without_swapped_labels_it_is_dpo():
    policy, reference = random_logps(0), random_logps(1)
    assert torch.equal(RobustDPOLoss(0.3, 0.0)(policy, reference), DPOLoss(0.3)(policy, reference))


def test_options():
    assert RobustDPOLoss() == RobustDPOLoss(beta=0.1, label_smoothing=0.1)
    with pytest.raises(ValueError, match=r"^`beta` must be positive, got 0\.$"):
        RobustDPOLoss(beta=0)
    for eps in (-0.1, 0.5, math.nan):
        with pytest.raises(ValueError, match=rf"^`label_smoothing` must be in \[0, 0\.5\), got {eps}\.$"):
            RobustDPOLoss(label_smoothing=eps)
