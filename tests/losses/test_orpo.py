import math

import pytest
import torch

from lit_dpo import ORPOLoss, SFTLoss
from tests.losses.values import at, close, gradient, logps, numbers, random_logps


@pytest.mark.parametrize("weight", [0.0, 0.1, 2.0])
def test_agrees_with_the_formula(weight):
    policy, reference = random_logps(0, batch=20), random_logps(1, batch=20)
    expected = []
    for _, _, p_w, p_l, n_w, n_l in numbers(policy, reference):
        prob_w, prob_l = math.exp(p_w / n_w), math.exp(p_l / n_l)  # of a token, in the geometric mean
        odds_ratio = (prob_w / (1 - prob_w)) / (prob_l / (1 - prob_l))
        expected.append(-p_w / n_w - weight * math.log(odds_ratio / (1 + odds_ratio)))
    assert ORPOLoss(weight=weight)(policy, reference).tolist() == close(expected)


def test_by_hand():
    # Mean log-probs -2 and -5/3, probabilities 0.1353353 and 0.1888756, odds 0.1565176 and 0.2328565, ratio 0.6721635:
    # log(1 + 1 / 0.6721635) = 0.9113720, and 2 + 0.1 * 0.9113720 = 2.0911372.
    policy, reference = at(0.0, 0.0)
    assert ORPOLoss()(policy, reference).item() == pytest.approx(2.0911372, abs=1e-7)
    terms = ORPOLoss().terms(policy, reference)
    assert {k: v.item() for k, v in terms.items()} == pytest.approx({"sft": 2.0, "odds": 0.911372}, abs=1e-6)
    # d log(odds) / da = 1 / (1 - probability): 0.1 * 0.5980277 * 1.1565176 / 20 on top of 1 / 20, and
    # 0.1 * 0.5980277 * 1.2328565 / 30.
    assert gradient(ORPOLoss(), policy, reference) == pytest.approx([-0.0534582, 0.0024576], abs=1e-6)


def test_without_weight_it_is_supervised_fine_tuning():
    policy = random_logps(0)
    assert torch.equal(ORPOLoss(weight=0.0)(policy, policy), SFTLoss()(policy, policy))


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_a_completion_of_probability_one_has_finite_odds(side):
    policy = logps(*((0.0, -4.0) if side == "chosen" else (-4.0, 0.0)), 4, 4, dtype=torch.float32)
    value = ORPOLoss()(policy, policy.zeros())
    assert value.isfinite().all()
    # log(odds) is log(1e6) at most, against log(e^-1 / (1 - e^-1)) = -0.5413249 of the other.
    gap = math.log(1e6) + 0.5413249
    expected = 0.0 if side == "chosen" else 1.0 + 0.1 * gap
    assert value.item() == pytest.approx(expected, abs=1e-4)


def test_options():
    assert ORPOLoss() == ORPOLoss(weight=0.1)
    assert ORPOLoss.needs_reference is False
    with pytest.raises(ValueError, match=r"^`weight` must be at least 0, got -0\.1\.$"):
        ORPOLoss(weight=-0.1)
