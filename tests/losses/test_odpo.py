import math
from dataclasses import replace

import pytest
import torch

from lit_dpo import DPOLoss, IntermediateLoss, ODPOLoss
from tests.losses.values import at, close, gradient, neg_log_sigmoid, numbers, random_logps


def scored(values, chosen, rejected):
    return replace(values, columns={"score_chosen": torch.tensor(chosen), "score_rejected": torch.tensor(rejected)})


@pytest.mark.parametrize("scaling", ["log", "linear"])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_agrees_with_the_formula(scaling, alpha):
    policy, reference = random_logps(0, batch=20), random_logps(1, batch=20)
    chosen, rejected = (policy.columns[name].tolist() for name in ("score_chosen", "score_rejected"))
    expected = []
    for (r_w, r_l, *_), better, worse in zip(numbers(policy, reference), chosen, rejected, strict=True):
        gap = math.log(better - worse) if scaling == "log" else better - worse
        expected.append(neg_log_sigmoid(0.1 * (r_w - r_l) - alpha * gap))
    assert ODPOLoss(alpha=alpha, scaling=scaling)(policy, reference).tolist() == close(expected)


@pytest.mark.parametrize(("scaling", "gap"), [("linear", 0.5), ("log", math.exp(0.5))])
def test_by_hand(scaling, gap):
    # An offset of 0.5: 0.1 * (-2 + 6) - 0.5 = -0.1 and log(1 + e^0.1) = 0.7443967; 0.1 * sigmoid(0.1) = 0.0524979.
    policy, reference = at(-2.0, -6.0)
    policy = scored(policy, [gap], [0.0])
    assert ODPOLoss(scaling=scaling)(policy, reference).item() == pytest.approx(0.7443967, abs=1e-7)
    assert gradient(ODPOLoss(scaling=scaling), policy, reference) == pytest.approx([-0.0524979, 0.0524979], abs=1e-7)


def test_whole_numbers_are_scores_too():
    policy, reference = at(-2.0, -6.0)
    assert ODPOLoss()(scored(policy, [9], [8]), reference).item() == DPOLoss()(policy, reference).item()  # log(1) = 0


def test_a_pair_without_a_gap_is_left_alone_and_counted():
    values = random_logps(0, batch=3)
    policy = scored(values, [5.0, 5.0, 5.0], [4.0, 5.0, 6.0])
    inputs = policy.chosen.clone().requires_grad_()
    value = ODPOLoss()(replace(policy, chosen=inputs), values.zeros())
    (grad,) = torch.autograd.grad(value.sum(), inputs)
    assert value[0] > 0
    assert value[1:].tolist() == grad[1:].tolist() == [0.0, 0.0]
    assert ODPOLoss().terms(policy, values)["without_gap"].tolist() == [0.0, 1.0, 1.0]
    assert ODPOLoss(scaling="linear").terms(policy, values) == {}


def test_without_offset_it_is_dpo():
    policy, reference = random_logps(0), random_logps(1)
    assert torch.equal(ODPOLoss(beta=0.3, alpha=0.0)(policy, reference), DPOLoss(beta=0.3)(policy, reference))


def test_intermediate_layers_know_the_scores():
    policy, reference = random_logps(0, layers=(1,)), random_logps(1, layers=(1,))
    loss = IntermediateLoss(base=ODPOLoss(), layers=(1,), weight=1.0)
    expected = ODPOLoss()(replace(policy.layers[1], columns=policy.columns), reference.layers[1])
    assert torch.equal(loss(policy, reference), expected)
    assert loss.columns == ODPOLoss.columns


def test_options():
    assert ODPOLoss() == ODPOLoss(beta=0.1, alpha=1.0, scaling="log")
    with pytest.raises(ValueError, match=r"^`beta` must be positive, got 0\.0\.$"):
        ODPOLoss(beta=0.0)
    with pytest.raises(ValueError, match=r"^`alpha` must be at least 0, got -1\.0\.$"):
        ODPOLoss(alpha=-1.0)
    with pytest.raises(ValueError, match=r"^`scaling` must be `log` or `linear`, got ratio\.$"):
        ODPOLoss(scaling="ratio")
