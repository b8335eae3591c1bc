import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lit_dpo import IPOLoss
from tests.losses.values import logps, nats, random_logps

betas = st.floats(1e-3, 10.0)
lengths = st.integers(1, 1000)


def slow_ipo(policy, reference, beta, mean):
    """The formula in Python numbers, pair by pair."""
    values = []
    for i in range(len(policy.chosen)):
        chosen_ratio = float(policy.chosen[i]) - float(reference.chosen[i])
        rejected_ratio = float(policy.rejected[i]) - float(reference.rejected[i])
        if mean:
            chosen_ratio /= int(policy.chosen_tokens[i])
            rejected_ratio /= int(policy.rejected_tokens[i])
        values.append((chosen_ratio - rejected_ratio - 0.5 / beta) ** 2)
    return values


@pytest.mark.parametrize("beta", [0.01, 0.1, 2.0])
@pytest.mark.parametrize("mean", [True, False])
def test_agrees_with_the_formula(beta, mean):
    policy, reference = random_logps(0, batch=20), random_logps(1, batch=20)
    value = IPOLoss(beta=beta, length_normalize=mean)(policy, reference)
    assert value.tolist() == pytest.approx(slow_ipo(policy, reference, beta, mean), rel=1e-12)


@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize(("beta", "start"), [(0.1, 25.0), (0.5, 1.0), (1.0, 0.25)])
def test_one_over_four_beta_squared_where_policy_is_reference(beta, start, mean):
    value = IPOLoss(beta=beta, length_normalize=mean)(random_logps(0), random_logps(0))
    assert value.tolist() == pytest.approx([start] * 5, rel=1e-14)


def test_by_hand():
    # Chosen has 4 tokens: r_w = -12 + 8 = -4, per token -1. Rejected has 6: r_l = -30 + 12 = -18, per token -3.
    # The target 1 / (2 * 0.1) is 5. Means: h = -1 + 3 = 2, (2 - 5)^2 = 9. Sums: h = -4 + 18 = 14, (14 - 5)^2 = 81.
    policy, reference = logps(-12.0, -30.0, 4, 6), logps(-8.0, -12.0, 4, 6)
    assert IPOLoss(beta=0.1)(policy, reference).item() == pytest.approx(9.0, rel=1e-14)
    assert IPOLoss(beta=0.1, length_normalize=False)(policy, reference).item() == pytest.approx(81.0, rel=1e-14)


@pytest.mark.parametrize(("mean", "chosen"), [(True, 8.0), (False, 2.0)])
def test_zero_and_flat_at_the_target(mean, chosen):
    # beta 0.25 puts the target at 2: with 4 tokens that is a log-ratio of 8 in sum for 2 a token.
    policy, reference = logps(chosen, 0.0, 4, 4), logps(0.0, 0.0, 4, 4)
    policy.chosen.requires_grad_()
    policy.rejected.requires_grad_()
    value = IPOLoss(beta=0.25, length_normalize=mean)(policy, reference)
    grads = torch.autograd.grad(value.sum(), (policy.chosen, policy.rejected))
    assert [value.item(), *(g.item() for g in grads)] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("beta", [0.0, -1.0])
def test_beta_must_be_positive(beta):
    with pytest.raises(ValueError, match=rf"^`beta` must be positive, got {beta}\.$"):
        IPOLoss(beta=beta)


@given(values=st.tuples(nats, nats, nats, nats), shifts=st.tuples(nats, nats), beta=betas)
def test_shifting_policy_and_reference_alike_changes_nothing(values, shifts, beta):
    chosen, rejected, ref_chosen, ref_rejected = values
    up, down = shifts
    loss = IPOLoss(beta=beta, length_normalize=False)
    plain = loss(logps(chosen, rejected), logps(ref_chosen, ref_rejected))
    shifted = loss(logps(chosen + up, rejected + down), logps(ref_chosen + up, ref_rejected + down))
    assert torch.equal(plain, shifted)


@given(h=nats, beta=betas)
def test_grows_with_the_squared_distance_from_the_target(h, beta):
    loss = IPOLoss(beta=beta, length_normalize=False)
    above, below = (loss(logps(0.5 / beta + side * h, 0.0), logps(0.0, 0.0)).item() for side in (1, -1))
    assert above == pytest.approx(h * h, rel=1e-9, abs=1e-9)
    assert below == pytest.approx(h * h, rel=1e-9, abs=1e-9)


@given(h=nats, tokens=lengths, beta=betas)
def test_length_does_not_matter_per_token(h, tokens, beta):
    loss = IPOLoss(beta=beta)
    one = loss(logps(h, 0.0), logps(0.0, 0.0)).item()
    many = loss(logps(h * tokens, 0.0, tokens, tokens), logps(0.0, 0.0, tokens, tokens)).item()
    assert many == pytest.approx(one, rel=1e-12)
