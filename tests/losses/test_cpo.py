import pytest
import torch

from lit_dpo import CPOLoss, DPOLoss, SFTLoss, WeightedLoss
from tests.losses.values import at, close, gradient, neg_log_sigmoid, numbers, random_logps


@pytest.mark.parametrize("beta", [0.01, 0.1, 2.0])
@pytest.mark.parametrize("weight", [0.0, 1.0, 3.0])
def test_agrees_with_the_formula(beta, weight):
    policy, reference = random_logps(0, batch=20), random_logps(1, batch=20)
    expected = [
        neg_log_sigmoid(beta * (p_w - p_l)) - weight * p_w / n_w
        for _, _, p_w, p_l, n_w, _ in numbers(policy, reference)
    ]
    assert CPOLoss(beta=beta, sft_weight=weight)(policy, reference).tolist() == close(expected)


def test_by_hand():
    # 0.1 * (-40 + 50) = 1 and log(1 + e^-1) = 0.3132617; 40 nats over 20 tokens are 2.
    policy, reference = at(0.0, 0.0)
    assert CPOLoss()(policy, reference).item() == pytest.approx(2.3132617, abs=1e-7)
    terms = CPOLoss().terms(policy, reference)
    assert {k: v.item() for k, v in terms.items()} == pytest.approx({"preference": 0.3132617, "sft": 2.0}, abs=1e-7)
    # sigmoid(-1) = 0.2689414, times 0.1, and 1 / 20 from the supervised term.
    assert gradient(CPOLoss(), policy, reference) == pytest.approx([-0.0768941, 0.0268941], abs=1e-7)


def test_it_is_dpo_over_a_uniform_reference_and_a_supervised_term():
    policy = random_logps(0)
    whole = WeightedLoss((DPOLoss(beta=0.3), SFTLoss()), (1.0, 0.5))
    assert torch.equal(CPOLoss(beta=0.3, sft_weight=0.5)(policy, policy.zeros()), whole(policy, policy.zeros()))


def test_options():
    assert CPOLoss() == CPOLoss(beta=0.1, sft_weight=1.0)
    assert CPOLoss.needs_reference is False
    with pytest.raises(ValueError, match=r"^`beta` must be positive, got 0\.0\.$"):
        CPOLoss(beta=0.0)
    with pytest.raises(ValueError, match=r"^`sft_weight` must be at least 0, got -1\.0\.$"):
        CPOLoss(sft_weight=-1.0)
