import pytest

from lit_dpo import SPPOLoss
from tests.losses.values import at, close, gradient, numbers, random_logps


@pytest.mark.parametrize("beta", [0.001, 0.1, 2.0])
def test_agrees_with_the_formula(beta):
    policy, reference = random_logps(0, batch=20), random_logps(1, batch=20)
    eta = 1 / beta  # the paper's form: the target is eta * (P - 1/2), P being 1 and 0
    expected = [
        (r_w - eta * (1 - 0.5)) ** 2 + (r_l - eta * (0 - 0.5)) ** 2 for r_w, r_l, *_ in numbers(policy, reference)
    ]
    assert SPPOLoss(beta=beta)(policy, reference).tolist() == close(expected)


def test_by_hand():
    # Targets +5 and -5: (-2 - 5)^2 + (-6 + 5)^2 = 49 + 1, with slopes 2 * -7 and 2 * -1.
    assert SPPOLoss(beta=0.1)(*at(-2.0, -6.0)).item() == 50.0
    assert gradient(SPPOLoss(beta=0.1), *at(-2.0, -6.0)) == [-14.0, -2.0]


def test_it_is_zero_and_flat_at_its_targets():
    assert SPPOLoss(beta=0.1)(*at(5.0, -5.0)).item() == 0.0
    assert gradient(SPPOLoss(beta=0.1), *at(5.0, -5.0)) == [0.0, 0.0]


def test_options():
    assert SPPOLoss() == SPPOLoss(beta=0.001)
    with pytest.raises(ValueError, match=r"^`beta` must be positive, got 0\.0\.$"):
        SPPOLoss(beta=0.0)
