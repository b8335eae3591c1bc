import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lit_dpo import DPOLoss
from tests.losses.values import at, close, gradient, logps, nats, neg_log_sigmoid, numbers, of_config, random_logps

betas = st.floats(1e-3, 10.0)
smoothings = st.floats(0.0, 0.5, exclude_max=True)


def slow_dpo(policy, reference, beta, eps=0.0):
    """The formula in Python numbers, pair by pair."""
    values = []
    for i in range(len(policy.chosen)):
        chosen_ratio = float(policy.chosen[i]) - float(reference.chosen[i])
        rejected_ratio = float(policy.rejected[i]) - float(reference.rejected[i])
        margin = beta * (chosen_ratio - rejected_ratio)
        values.append((1 - eps) * neg_log_sigmoid(margin) + eps * neg_log_sigmoid(-margin))
    return values


def loss_at(h, **options):
    """The loss of one pair whose log-ratio difference is ``h``, as a number."""
    return DPOLoss(**options)(logps(h, 0.0), logps(0.0, 0.0)).item()


@pytest.mark.parametrize("beta", [0.01, 0.1, 2.0])
@pytest.mark.parametrize("eps", [0.0, 0.1, 0.4])
def test_agrees_with_the_formula(beta, eps):
    policy, reference = random_logps(0, batch=20), random_logps(1, batch=20)
    value = DPOLoss(beta=beta, label_smoothing=eps)(policy, reference)
    assert value.tolist() == pytest.approx(slow_dpo(policy, reference, beta, eps), rel=1e-12)


@pytest.mark.parametrize("eps", [0.0, 0.1, 0.3])
def test_log_2_where_policy_is_reference(eps):
    start = random_logps(0)
    value = DPOLoss(beta=0.7, label_smoothing=eps)(start, start)
    assert value.tolist() == pytest.approx([math.log(2)] * 5, rel=1e-15)


def test_by_hand():
    # r_w = -10 + 20 = 10, r_l = -30 + 20 = -10, h = 20, and 0.1 * 20 = 2:
    # -log(1 / (1 + e^-2)) = log(1 + 0.1353353) = 0.1269280
    policy, reference = logps(-10.0, -30.0), logps(-20.0, -20.0)
    assert DPOLoss(beta=0.1)(policy, reference).item() == pytest.approx(0.1269280110, abs=1e-10)
    # With labels swapped for a tenth of the pairs: 0.9 * 0.1269280 + 0.1 * (0.1269280 + 2) = 0.3269280
    smooth = DPOLoss(beta=0.1, label_smoothing=0.1)(policy, reference)
    assert smooth.item() == pytest.approx(0.3269280110, abs=1e-10)


def test_gradient_by_hand():
    # d/dh of log(1 + exp(-beta h)) is -beta * sigmoid(-beta h): at h = 0 that is -beta / 2 to chosen, +beta / 2 to
    # rejected.
    policy = logps(-5.0, -5.0)
    policy.chosen.requires_grad_()
    policy.rejected.requires_grad_()
    grads = torch.autograd.grad(DPOLoss(beta=0.1)(policy, logps(-5.0, -5.0)).sum(), (policy.chosen, policy.rejected))
    assert [g.item() for g in grads] == pytest.approx([-0.05, 0.05], rel=1e-12)


@pytest.mark.parametrize(("eps", "margin", "lowest"), [(0.1, 2.1972, 0.3251), (0.3, 0.8473, 0.6109)])
def test_smoothed_loss_is_lowest_at_the_log_odds(eps, margin, lowest):
    # The derivative in the margin m is eps * sigmoid(m) - (1 - eps) * sigmoid(-m); it is zero where
    # e^m = (1 - eps) / eps. There sigmoid(m) = 1 - eps, and the loss is the entropy of a coin that falls so.
    beta, low, high = 0.1, -100.0, 100.0
    for _ in range(200):  # ternary search over h
        one, two = low + (high - low) / 3, high - (high - low) / 3
        if loss_at(one, beta=beta, label_smoothing=eps) < loss_at(two, beta=beta, label_smoothing=eps):
            high = two
        else:
            low = one
    assert beta * low == pytest.approx(math.log((1 - eps) / eps), abs=1e-6)
    assert beta * low == pytest.approx(margin, abs=1e-4)
    entropy = -(1 - eps) * math.log(1 - eps) - eps * math.log(eps)
    assert loss_at(low, beta=beta, label_smoothing=eps) == pytest.approx(entropy, rel=1e-12)
    assert entropy == pytest.approx(lowest, abs=1e-4)


@pytest.mark.parametrize("beta", [0.0, -0.1, math.nan])
def test_beta_must_be_positive(beta):
    with pytest.raises(ValueError, match=rf"^`beta` must be positive, got {beta}\.$"):
        DPOLoss(beta=beta)


@pytest.mark.parametrize("eps", [-0.1, 0.5, 1.0, math.nan])
def test_smoothing_must_leave_the_labels_right_more_often_than_not(eps):
    with pytest.raises(ValueError, match=rf"^`label_smoothing` must be in \[0, 0\.5\), got {eps}\.$"):
        DPOLoss(label_smoothing=eps)


@given(values=st.tuples(nats, nats, nats, nats), shifts=st.tuples(nats, nats), beta=betas, eps=smoothings)
def test_shifting_policy_and_reference_alike_changes_nothing(values, shifts, beta, eps):
    chosen, rejected, ref_chosen, ref_rejected = values
    up, down = shifts
    loss = DPOLoss(beta=beta, label_smoothing=eps)
    plain = loss(logps(chosen, rejected), logps(ref_chosen, ref_rejected))
    shifted = loss(logps(chosen + up, rejected + down), logps(ref_chosen + up, ref_rejected + down))
    assert torch.equal(plain, shifted)


@given(h=nats, beta=betas)
def test_swapping_the_pair_adds_the_margin(h, beta):
    gap = loss_at(-h, beta=beta) - loss_at(h, beta=beta)
    assert gap == pytest.approx(beta * h, rel=1e-12, abs=1e-12)


@given(h=nats, beta=betas)
def test_beta_scales_h(h, beta):
    assert loss_at(h, beta=beta) == pytest.approx(loss_at(beta * h, beta=1.0), rel=1e-12, abs=1e-300)


@given(h=nats, beta=betas, eps=smoothings)
def test_smoothing_mixes_the_loss_with_that_of_the_swapped_pair(h, beta, eps):
    mixed = (1 - eps) * loss_at(h, beta=beta) + eps * loss_at(-h, beta=beta)
    assert loss_at(h, beta=beta, label_smoothing=eps) == pytest.approx(mixed, rel=1e-12, abs=1e-300)


@given(h=nats, more=st.floats(1e-3, 100.0), beta=betas)
def test_falls_as_h_grows(h, more, beta):
    assert loss_at(h + more, beta=beta) <= loss_at(h, beta=beta)


# -- length-normalised ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.1, 5.0])
@pytest.mark.parametrize("eps", [0.0, 0.1])
def test_normalised_it_agrees_with_the_formula(beta, eps):
    policy, reference = random_logps(0, batch=20), random_logps(1, batch=20)
    expected = []
    for r_w, r_l, _, _, n_w, n_l in numbers(policy, reference):
        margin = beta * (r_w * n_l - r_l * n_w) / (n_w * n_l)
        expected.append((1 - eps) * neg_log_sigmoid(margin) + eps * neg_log_sigmoid(-margin))
    loss = DPOLoss(beta=beta, label_smoothing=eps, length_normalize=True)
    assert loss(policy, reference).tolist() == close(expected)


def test_normalised_by_hand():
    # 5 * (-2 / 20 + 6 / 30) = 0.5 and log(1 + e^-0.5) = 0.4740770; sigmoid(-0.5) = 0.3775407, times 5/20 and 5/30.
    loss = DPOLoss(beta=5.0, length_normalize=True)
    assert loss(*at(-2.0, -6.0)).item() == pytest.approx(0.4740770, abs=1e-7)
    assert gradient(loss, *at(-2.0, -6.0)) == pytest.approx([-0.0943852, 0.0629235], abs=1e-7)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_normalised_by_one_token_it_is_plain_dpo_bit_for_bit(dtype):
    policy, reference = logps([-3.0, -0.1], [-2.0, -7.3], dtype=dtype), logps([-2.5, -1.0], [-2.2, -0.3], dtype=dtype)
    normalised = DPOLoss(beta=0.3, length_normalize=True)
    assert torch.equal(normalised(policy, reference), DPOLoss(beta=0.3)(policy, reference))


def test_the_shipped_config_of_the_normalised_form():
    assert of_config("dpo_norm") == DPOLoss(beta=5.0, length_normalize=True)


def test_formula():
    assert DPOLoss(5.0, length_normalize=True).formula() == "-logsigmoid(5.0 * (r_w/|y_w| - r_l/|y_l|))"
    assert DPOLoss().formula() == "-logsigmoid(0.1 * (r_w - r_l))"
    smooth = "-0.9 * logsigmoid(0.1 * (r_w - r_l)) - 0.1 * logsigmoid(-0.1 * (r_w - r_l))"
    assert DPOLoss(label_smoothing=0.1).formula() == smooth
