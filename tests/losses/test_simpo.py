import pytest

from lit_dpo import SimPOLoss
from tests.losses.values import at, close, gradient, neg_log_sigmoid, numbers, random_logps


@pytest.mark.parametrize("beta", [0.1, 2.5, 10.0])
@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.6])
def test_agrees_with_the_formula(beta, ratio):
    policy, reference = random_logps(0, batch=20), random_logps(1, batch=20)
    expected = [
        neg_log_sigmoid(beta * p_w / n_w - beta * p_l / n_l - beta * ratio)
        for _, _, p_w, p_l, n_w, n_l in numbers(policy, reference)
    ]
    assert SimPOLoss(beta=beta, gamma_beta_ratio=ratio)(policy, reference).tolist() == close(expected)


def test_by_hand():
    # Means -40 / 20 = -2 and -50 / 30 = -5/3: 2.5 * (-2 + 5/3 - 0.5) = -25/12, log(1 + e^(25/12)) = 2.2006847.
    assert SimPOLoss()(*at(0.0, 0.0)).item() == pytest.approx(2.2006847, abs=1e-7)
    # The slope is sigmoid(25/12) = 0.8892727, times 2.5 / 20 and 2.5 / 30.
    assert gradient(SimPOLoss(), *at(0.0, 0.0)) == pytest.approx([-0.1111591, 0.0741061], abs=1e-7)


def test_only_the_means_count():
    policy, reference = at(0.0, 0.0)
    longer = type(policy)(2 * policy.chosen, policy.rejected, 2 * policy.chosen_tokens, policy.rejected_tokens)
    assert SimPOLoss()(longer, reference).item() == SimPOLoss()(policy, reference).item()


def test_options():
    assert SimPOLoss() == SimPOLoss(beta=2.5, gamma_beta_ratio=0.5)
    assert SimPOLoss.needs_reference is False
    with pytest.raises(ValueError, match=r"^`beta` must be positive, got 0\.0\.$"):
        SimPOLoss(beta=0.0)
    with pytest.raises(ValueError, match=r"^`gamma_beta_ratio` must be at least 0, got -0\.5\.$"):
        SimPOLoss(gamma_beta_ratio=-0.5)
