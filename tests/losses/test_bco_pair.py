import pytest

from lit_dpo import BCOPairLoss, DPOLoss
from tests.losses.values import at, close, gradient, neg_log_sigmoid, numbers, random_logps


@pytest.mark.parametrize("beta", [0.01, 0.1, 2.0])
def test_agrees_with_the_formula(beta):
    policy, reference = random_logps(0, batch=20), random_logps(1, batch=20)
    expected = [
        neg_log_sigmoid(beta * r_w) + neg_log_sigmoid(-beta * r_l) for r_w, r_l, *_ in numbers(policy, reference)
    ]
    assert BCOPairLoss(beta=beta)(policy, reference).tolist() == close(expected)


def test_by_hand():
    # log(1 + e^0.2) = 0.7981389 for the fallen chosen one, log(1 + e^-0.6) = 0.4374880 for the rejected one.
    assert BCOPairLoss()(*at(-2.0, -6.0)).item() == pytest.approx(1.2356269, abs=1e-6)
    # 0.1 * sigmoid(0.2) and 0.1 * sigmoid(-0.6).
    assert gradient(BCOPairLoss(), *at(-2.0, -6.0)) == pytest.approx([-0.0549834, 0.0354344], abs=1e-7)


def test_it_lies_above_dpo():
    policy, reference = random_logps(0, batch=50), random_logps(1, batch=50)
    assert (BCOPairLoss(beta=0.1)(policy, reference) > DPOLoss(beta=0.1)(policy, reference)).all()


def test_options():
    assert BCOPairLoss() == BCOPairLoss(beta=0.1)
    with pytest.raises(ValueError, match=r"^`beta` must be positive, got 0\.0\.$"):
        BCOPairLoss(beta=0.0)
