import math

import pytest

from lit_dpo import EXOLoss
from tests.losses.values import at, close, gradient, numbers, random_logps, sigmoid


@pytest.mark.parametrize("beta", [0.01, 0.1, 0.5])
@pytest.mark.parametrize("eps", [1e-3, 0.2])
def test_agrees_with_the_formula(beta, eps):
    policy, reference = random_logps(0, batch=20), random_logps(1, batch=20)
    expected = []
    for r_w, r_l, *_ in numbers(policy, reference):  # KL of (q, 1 - q) from (1 - eps, eps)
        model = (sigmoid(beta * (r_w - r_l)), sigmoid(beta * (r_l - r_w)))
        expected.append(sum(q * math.log(q / p) for q, p in zip(model, (1 - eps, eps), strict=True)))
    assert EXOLoss(beta=beta, label_smoothing=eps)(policy, reference).tolist() == close(expected)


def test_by_hand():
    # At h = 0 both probabilities are 1/2: log(1/2) - (log(0.999) + log(0.001)) / 2 = -0.6931472 + 3.4543779.
    assert EXOLoss()(*at(0.0, 0.0)).item() == pytest.approx(2.7612307, abs=1e-6)
    # dq/dm = 1/4 there, and the two terms differ by log(0.999 / 0.001) = 6.9067548: 0.1 * 6.9067548 / 4.
    assert gradient(EXOLoss(), *at(0.0, 0.0)) == pytest.approx([-0.1726689, 0.1726689], abs=1e-7)


def test_it_is_zero_and_flat_at_the_labels_log_odds():
    loss = EXOLoss(beta=0.5, label_smoothing=0.1)
    there = at(math.log(9) / 0.5, 0.0)
    assert loss(*there).item() == pytest.approx(0.0, abs=1e-14)
    assert gradient(loss, *there) == pytest.approx([0.0, 0.0], abs=1e-14)


def test_options():
    assert EXOLoss() == EXOLoss(beta=0.1, label_smoothing=1e-3)
    with pytest.raises(ValueError, match=r"^`beta` must be positive, got 0\.0\.$"):
        EXOLoss(beta=0.0)
    for eps in (0.0, 0.5):
        with pytest.raises(ValueError, match=rf"^`label_smoothing` must be in \(0, 0\.5\), got {eps}\.$"):
            EXOLoss(label_smoothing=eps)
