import math

import pytest

from lit_dpo import NCAPairLoss
from tests.losses.values import at, close, gradient, neg_log_sigmoid, numbers, random_logps


@pytest.mark.parametrize("beta", [0.01, 0.1, 2.0])
def test_agrees_with_the_formula(beta):
    policy, reference = random_logps(0, batch=20), random_logps(1, batch=20)
    expected = [
        neg_log_sigmoid(beta * r_w) + 0.5 * neg_log_sigmoid(-beta * r_w) + 0.5 * neg_log_sigmoid(-beta * r_l)
        for r_w, r_l, *_ in numbers(policy, reference)
    ]
    assert NCAPairLoss(beta=beta)(policy, reference).tolist() == close(expected)


def test_by_hand():
    # log(1 + e^0.2) = 0.7981389, log(1 + e^-0.2) = 0.5981389, log(1 + e^-0.6) = 0.4374880.
    assert NCAPairLoss(beta=0.1)(*at(-2.0, -6.0)).item() == pytest.approx(1.3159523, abs=1e-6)
    # Chosen: 0.1 * (-sigmoid(0.2) + sigmoid(-0.2) / 2); rejected: 0.1 * sigmoid(-0.6) / 2.
    grads = gradient(NCAPairLoss(beta=0.1), *at(-2.0, -6.0))
    assert grads == pytest.approx([-0.0324751, 0.0177172], abs=1e-7)


def test_the_chosen_completion_rests_at_a_reward_of_log_2():
    loss = NCAPairLoss(beta=0.5)
    assert gradient(loss, *at(math.log(2) / 0.5, 3.0))[0] == pytest.approx(0.0, abs=1e-15)


def test_options():
    assert NCAPairLoss() == NCAPairLoss(beta=0.01)
    with pytest.raises(ValueError, match=r"^`beta` must be positive, got 0\.0\.$"):
        NCAPairLoss(beta=0.0)
