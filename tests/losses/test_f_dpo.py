import math

import pytest
import torch

from lit_dpo import DPOLoss, FDPOLoss
from tests.losses.values import at, close, gradient, neg_log_sigmoid, numbers, random_logps, with_tokens

# f' of each divergence in the probability ratio u, from its generator f, by a central difference.
GENERATORS = {
    "js": lambda u: u * math.log(u) - (u + 1) * math.log((u + 1) / 2),
    "forward_kl": lambda u: -math.log(u),
    "alpha": lambda u: (u**0.3 - 0.3 * u - 0.7) / (0.3 * (0.3 - 1)),  # alpha 0.3
}


def made(divergence, beta=0.1):
    return FDPOLoss(beta=beta, divergence=divergence, alpha=0.3 if divergence == "alpha" else None)


@pytest.mark.parametrize("divergence", GENERATORS)
def test_scores_are_the_derivative_of_the_generator(divergence):
    f = GENERATORS[divergence]

    def slope(u):
        return (f(u * (1 + 1e-5)) - f(u * (1 - 1e-5))) / (2e-5 * u)

    for r_w, r_l in ((0.0, 0.0), (0.3, -0.4), (-1.5, -2.0), (1.0, 2.0)):
        expected = neg_log_sigmoid(0.7 * (slope(math.exp(r_w)) - slope(math.exp(r_l))))
        assert made(divergence, beta=0.7)(*at(r_w, r_l)).item() == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("beta", [0.01, 0.1])
@pytest.mark.parametrize("divergence", GENERATORS)
def test_agrees_with_the_formula(divergence, beta):
    policy, reference = (with_tokens(v, 0.1 * v.tokens) for v in (random_logps(0, 20), random_logps(1, 20)))
    score = {
        "js": lambda u: math.log(2 * u / (1 + u)),
        "forward_kl": lambda u: 1 - 1 / u,
        "alpha": lambda u: (1 - u**-0.7) / 0.7,
    }[divergence]
    expected = [
        neg_log_sigmoid(beta * (score(math.exp(r_w)) - score(math.exp(r_l))))
        for r_w, r_l, *_ in numbers(policy, reference)
    ]
    assert made(divergence, beta)(policy, reference).tolist() == close(expected)


def test_by_hand():
    # log(sigmoid(-2)) = -2.1269280 and log(sigmoid(-6)) = -6.0024757, which are 3.8755477 apart:
    # log(1 + e^-0.3875548) = 0.5180283.
    assert FDPOLoss()(*at(-2.0, -6.0)).item() == pytest.approx(0.5180283, abs=1e-7)
    # sigmoid(-0.3875548) = 0.4043061, times 0.1, times sigmoid(2) = 0.8807971 and sigmoid(6) = 0.9975274.
    assert gradient(FDPOLoss(), *at(-2.0, -6.0)) == pytest.approx([-0.0356111, 0.0403306], abs=1e-6)


def test_the_forward_kl_saturates():
    # -e^2 + e^6 = 396.04, and e^-39.604 = 6.3e-18 is what the loss has left.
    assert FDPOLoss(divergence="forward_kl")(*at(-2.0, -6.0)).item() == pytest.approx(6.3e-18, rel=0.01)


def test_alpha_lies_between_forward_and_reverse_kl():
    policy, reference = at(-0.5, -1.5)
    near_one = FDPOLoss(divergence="alpha", alpha=1 - 1e-7)(policy, reference).item()
    assert near_one == pytest.approx(DPOLoss()(policy, reference).item(), rel=1e-7)
    near_zero = FDPOLoss(divergence="alpha", alpha=1e-9)(policy, reference).item()
    assert near_zero == pytest.approx(FDPOLoss(divergence="forward_kl")(policy, reference).item(), rel=1e-7)


def test_alpha_left_out_is_a_half():
    policy, reference = at(-0.5, -1.5)
    half = FDPOLoss(divergence="alpha", alpha=0.5)
    assert torch.equal(FDPOLoss(divergence="alpha")(policy, reference), half(policy, reference))


def test_options():
    assert FDPOLoss() == FDPOLoss(beta=0.1, divergence="js", alpha=None)
    with pytest.raises(ValueError, match=r"^`beta` must be positive, got 0\.0\.$"):
        FDPOLoss(beta=0.0)
    with pytest.raises(ValueError, match=r"^`divergence` must be `js`, `forward_kl` or `alpha`, got kl\.$"):
        FDPOLoss(divergence="kl")
    with pytest.raises(ValueError, match=r"^`alpha` must be left out unless `divergence` is `alpha`, got 0\.5\.$"):
        FDPOLoss(alpha=0.5)
    for alpha in (0.0, 1.0):
        with pytest.raises(ValueError, match=rf"^`alpha` must be in \(0, 1\), got {alpha}\.$"):
            FDPOLoss(divergence="alpha", alpha=alpha)
