import math

import pytest
import torch

from lit_dpo import ADPOLoss, DPOLoss
from tests.losses.values import close, neg_log_sigmoid, random_logps, token_logps


@pytest.mark.parametrize("beta", [0.01, 0.1, 2.0])
@pytest.mark.parametrize("segments", [1, 2, 3, 10])
def test_agrees_with_the_formula(beta, segments):
    policy, reference = random_logps(0, batch=20), random_logps(1, batch=20)
    terms, others = policy.split_tokens(), reference.split_tokens()
    expected = []
    for pair in range(20):
        sums = []
        for side in (0, 1):
            ratios = (terms[2 * pair + side] - others[2 * pair + side]).tolist()
            of_segment = [0.0] * segments
            for place, ratio in enumerate(ratios):  # token after token into the segment that it lies in
                s = next(s for s in range(segments) if place < (s + 1) * len(ratios) // segments)
                of_segment[s] += ratio
            sums.append(of_segment)
        expected.append(
            sum(neg_log_sigmoid(beta * (chosen - rejected)) for chosen, rejected in zip(*sums, strict=True))
        )
    assert ADPOLoss(beta=beta, segments=segments)(policy, reference).tolist() == close(expected)


def test_by_hand():
    # Five tokens in two segments end after 2 and 5, three after 1 and 3. Policy 0.5, -1 | 2, 0.5, -0.5 and -3 | 1, 1:
    # sums -0.5 against -3, and 2 against 2. log(1 + e^-2.5) + log(2) = 0.0788897 + 0.6931472.
    policy = token_logps([([0.5, -1.0, 2.0, 0.5, -0.5], [-3.0, 1.0, 1.0])])
    assert ADPOLoss(beta=1.0, segments=2)(policy, policy.zeros()).item() == pytest.approx(0.7720369, abs=1e-7)
    terms = ADPOLoss(beta=1.0, segments=2).terms(policy, policy.zeros())
    assert terms["segment_mean"].item() == pytest.approx(0.3860184, abs=1e-7)


def test_the_gradient_reaches_the_tokens_of_its_segment_alone():
    start = token_logps([([-1.0, -2.0, -3.0, -4.0], [-2.0, -2.0])])
    tokens = start.tokens.clone().requires_grad_()
    policy = type(start)(start.chosen, start.rejected, start.chosen_tokens, start.rejected_tokens, tokens=tokens)
    (grad,) = torch.autograd.grad(ADPOLoss(beta=1.0, segments=2)(policy, start.zeros()).sum(), tokens)
    first, second = 1 / (1 + math.exp(-3 + 2)), 1 / (1 + math.exp(-7 + 2))  # sigmoid of what the segment lacks
    assert grad.tolist() == pytest.approx([-first, -first, -second, -second, first, second], rel=1e-12)


def test_starts_at_log_2_a_segment():
    start = random_logps(0)
    value = ADPOLoss(segments=4)(start, start)
    assert value.tolist() == pytest.approx([4 * math.log(2)] * 5, rel=1e-15)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_one_segment_is_dpo_bit_for_bit(dtype):
    policy, reference = random_logps(0, dtype=dtype), random_logps(1, dtype=dtype)
    assert torch.equal(ADPOLoss(0.3, segments=1)(policy, reference), DPOLoss(beta=0.3)(policy, reference))


def test_fewer_tokens_than_segments_leave_some_empty():
    policy = token_logps([([-1.0], [-3.0])])
    expected = 3 * math.log(2) + neg_log_sigmoid(2.0)
    assert ADPOLoss(beta=1.0, segments=4)(policy, policy.zeros()).item() == pytest.approx(expected, rel=1e-15)


def test_options():
    assert ADPOLoss() == ADPOLoss(beta=0.1, segments=4)
    with pytest.raises(ValueError, match=r"^`beta` must be positive, got 0\.0\.$"):
        ADPOLoss(beta=0.0)
    for segments in (0, 1.5):
        with pytest.raises(ValueError, match=rf"^`segments` must be a whole number, at least 1, got {segments}\.$"):
            ADPOLoss(segments=segments)
