import pytest
import torch

from lit_dpo import DPOLoss, RDPOLoss
from tests.losses.values import at, close, gradient, logps, neg_log_sigmoid, numbers, random_logps


@pytest.mark.parametrize("beta", [0.01, 0.1, 2.0])
@pytest.mark.parametrize("alpha", [0.0, 0.01, 1.0])
def test_agrees_with_the_formula(beta, alpha):
    policy, reference = random_logps(0, batch=20), random_logps(1, batch=20)
    expected = [
        neg_log_sigmoid(beta * r_w + alpha * n_w - (beta * r_l + alpha * n_l))
        for r_w, r_l, _, _, n_w, n_l in numbers(policy, reference)
    ]
    assert RDPOLoss(beta=beta, alpha=alpha)(policy, reference).tolist() == close(expected)


def test_by_hand():
    # 0.1 * (-2 + 6) + 0.01 * (20 - 30) = 0.3 and log(1 + e^-0.3) = 0.5543552; sigmoid(-0.3) = 0.4255575.
    assert RDPOLoss()(*at(-2.0, -6.0)).item() == pytest.approx(0.5543552, abs=1e-7)
    assert gradient(RDPOLoss(), *at(-2.0, -6.0)) == pytest.approx([-0.0425557, 0.0425557], abs=1e-7)


def test_a_longer_chosen_completion_is_pushed_less():
    def push(chosen_tokens):
        values = logps(-40.0, -50.0, chosen_tokens, 30)
        return -gradient(RDPOLoss(alpha=0.1), values, values)[0]

    assert push(20) > push(30) > push(60)


def test_it_is_lowest_where_the_policy_is_the_optimum_of_the_penalised_reward():
    # Two completions of 3 and 7 tokens, rewards 1 and 0.4, a reference of 0.3 and 0.7. The policy that maximises
    # E[reward - alpha * length] - beta * KL is reference * exp((reward - alpha * length) / beta), normalised. Labels
    # that follow the rewards by Bradley and Terry prefer the first with probability sigmoid(0.6); under these the
    # expected loss has its minimum, over all policies, at that one.
    beta, alpha = 0.5, 0.05
    reference, rewards, tokens = torch.tensor([0.3, 0.7]).double(), torch.tensor([1.0, 0.4]).double(), (3, 7)
    optimum = reference * ((rewards - alpha * torch.tensor(tokens)) / beta).exp()
    optimum = (optimum / optimum.sum()).log().requires_grad_()
    first, second = optimum.unsqueeze(1)
    ref_first, ref_second = reference.log().unsqueeze(1)
    loss, prefers_first = RDPOLoss(beta=beta, alpha=alpha), torch.tensor(0.6).double().sigmoid()

    def pair(a, b, counts):
        return type(random_logps(0))(a, b, *torch.tensor(counts).view(2, 1))

    right = loss(pair(first, second, tokens), pair(ref_first, ref_second, tokens))
    wrong = loss(pair(second, first, tokens[::-1]), pair(ref_second, ref_first, tokens[::-1]))
    expected = (prefers_first * right + (1 - prefers_first) * wrong).sum()
    (grad,) = torch.autograd.grad(expected, optimum)
    assert grad.tolist() == pytest.approx([0.0, 0.0], abs=1e-7)


def test_without_penalty_it_is_dpo():
    policy, reference = random_logps(0), random_logps(1)
    assert torch.equal(RDPOLoss(beta=0.3, alpha=0.0)(policy, reference), DPOLoss(beta=0.3)(policy, reference))


def test_options():
    assert RDPOLoss() == RDPOLoss(beta=0.1, alpha=0.01)
    with pytest.raises(ValueError, match=r"^`beta` must be positive, got 0\.0\.$"):
        RDPOLoss(beta=0.0)
    with pytest.raises(ValueError, match=r"^`alpha` must be at least 0, got -0\.01\.$"):
        RDPOLoss(alpha=-0.01)
