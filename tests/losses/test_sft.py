import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lit_dpo import SFTLoss
from tests.losses.values import logps, nats, random_logps


def test_agrees_with_the_formula():
    policy = random_logps(0, batch=20)
    expected = [-float(policy.chosen[i]) / int(policy.chosen_tokens[i]) for i in range(20)]
    assert SFTLoss()(policy, policy.zeros()).tolist() == pytest.approx(expected, rel=1e-15)


def test_by_hand():
    # 10 nats over 5 tokens are 2 nats a token; 3 nats over 1 token are 3. Each pair counts alike.
    policy = logps([-10.0, -3.0], [-1.0, -1.0], [5, 1], [1, 1])
    assert SFTLoss()(policy, policy.zeros()).tolist() == [2.0, 3.0]


def test_the_sum_by_hand():
    policy = logps([-10.0, -3.0], [-1.0, -1.0], [5, 1], [1, 1])
    assert SFTLoss(length_normalize=False)(policy, policy.zeros()).tolist() == [10.0, 3.0]


def test_gradient_is_one_over_the_tokens():
    policy = logps(-10.0, -30.0, 5, 5)
    policy.chosen.requires_grad_()
    (grad,) = torch.autograd.grad(SFTLoss()(policy, policy.zeros()).sum(), policy.chosen)
    assert grad.item() == -0.2


def test_needs_no_reference():
    assert SFTLoss.needs_reference is False
    assert SFTLoss().beta == 1.0


@given(chosen=nats, tokens=st.integers(1, 1000), others=st.tuples(nats, nats, nats))
def test_only_the_chosen_completion_under_the_policy_counts(chosen, tokens, others):
    rejected, ref_chosen, ref_rejected = others
    value = SFTLoss()(logps(chosen, rejected, tokens), logps(ref_chosen, ref_rejected, tokens))
    assert value.item() == -chosen / tokens
