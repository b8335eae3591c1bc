import pytest

from lit_dpo import APOZeroLoss
from tests.losses.values import at, close, gradient, numbers, random_logps, sigmoid


@pytest.mark.parametrize("beta", [0.01, 0.1, 2.0])
def test_agrees_with_the_formula(beta):
    policy, reference = random_logps(0, batch=20), random_logps(1, batch=20)
    expected = [sigmoid(-beta * r_w) + sigmoid(beta * r_l) for r_w, r_l, *_ in numbers(policy, reference)]
    assert APOZeroLoss(beta=beta)(policy, reference).tolist() == close(expected)


def test_by_hand():
    # 1 - sigmoid(-0.2) = 0.5498340 and sigmoid(-0.6) = 0.3543437.
    assert APOZeroLoss()(*at(-2.0, -6.0)).item() == pytest.approx(0.9041777, abs=1e-6)
    # The slope of a sigmoid s is s * (1 - s): 0.2475166 and 0.2287842, times 0.1.
    assert gradient(APOZeroLoss(), *at(-2.0, -6.0)) == pytest.approx([-0.02475166, 0.02287842], abs=1e-7)


def test_each_completion_has_its_own_anchor():
    loss = APOZeroLoss(beta=0.5)
    assert gradient(loss, *at(1.0, 0.0))[1] == gradient(loss, *at(-3.0, 0.0))[1]
    assert gradient(loss, *at(1.0, 0.0))[0] == gradient(loss, *at(1.0, 5.0))[0]


def test_options():
    assert APOZeroLoss() == APOZeroLoss(beta=0.1)
    with pytest.raises(ValueError, match=r"^`beta` must be positive, got 0\.0\.$"):
        APOZeroLoss(beta=0.0)
