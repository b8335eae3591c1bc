import pytest

from lit_dpo import HingeLoss
from tests.losses.values import at, close, gradient, numbers, random_logps


@pytest.mark.parametrize("beta", [0.01, 0.1, 2.0])
def test_agrees_with_the_formula(beta):
    policy, reference = random_logps(0, batch=20), random_logps(1, batch=20)
    expected = [max(0.0, 1 - beta * (r_w - r_l)) for r_w, r_l, *_ in numbers(policy, reference)]
    assert HingeLoss(beta=beta)(policy, reference).tolist() == close(expected)


def test_by_hand():
    # The margin is 0.1 * (-2 + 6) = 0.4, which lacks 0.6 to 1; each nat moves it by 0.1.
    assert HingeLoss()(*at(-2.0, -6.0)).item() == pytest.approx(0.6)
    assert gradient(HingeLoss(), *at(-2.0, -6.0)) == pytest.approx([-0.1, 0.1])


def test_it_is_over_where_the_margin_is_one():
    loss = HingeLoss(beta=0.25)
    assert loss(*at(4.0, 0.0)).item() == 0.0
    assert loss(*at(3.0, -1.5)).item() == 0.0
    assert gradient(loss, *at(3.0, -1.5)) == [0.0, 0.0]
    assert loss(*at(3.0, -0.5)).item() == 0.125


def test_options():
    assert HingeLoss() == HingeLoss(beta=0.1)
    with pytest.raises(ValueError, match=r"^`beta` must be positive, got -1\.$"):
        HingeLoss(beta=-1)
