import pytest

from lit_dpo import APODownLoss
from tests.losses.values import at, close, gradient, numbers, random_logps, sigmoid


@pytest.mark.parametrize("beta", [0.01, 0.1, 2.0])
def test_agrees_with_the_formula(beta):
    policy, reference = random_logps(0, batch=20), random_logps(1, batch=20)
    expected = [sigmoid(beta * r_w) + sigmoid(-beta * (r_w - r_l)) for r_w, r_l, *_ in numbers(policy, reference)]
    assert APODownLoss(beta=beta)(policy, reference).tolist() == close(expected)


def test_by_hand():
    # sigmoid(-0.2) = 0.4501660 and 1 - sigmoid(0.4) = 0.4013123.
    assert APODownLoss()(*at(-2.0, -6.0)).item() == pytest.approx(0.8514783, abs=1e-6)
    # The slopes are 0.2475166 for the anchor and 0.2402607 for the margin: 0.1 * (0.2475166 - 0.2402607) on chosen.
    assert gradient(APODownLoss(), *at(-2.0, -6.0)) == pytest.approx([0.00072559, 0.02402607], abs=1e-7)


def test_chosen_stays_at_first_and_falls_once_the_margin_is_won():
    assert gradient(APODownLoss(), *at(0.0, 0.0))[0] == 0.0
    assert gradient(APODownLoss(), *at(0.0, -20.0))[0] > 0
    assert gradient(APODownLoss(), *at(0.0, -20.0))[1] > 0


def test_options():
    assert APODownLoss() == APODownLoss(beta=0.1)
    with pytest.raises(ValueError, match=r"^`beta` must be positive, got 0\.0\.$"):
        APODownLoss(beta=0.0)
