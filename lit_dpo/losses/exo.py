"""Efficient Exact Optimization on pairs."""

import math
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from lit_dpo.losses.base import PreferenceLoss, check, log_ratios
from lit_dpo.pairs import PairLogps


@dataclass(frozen=True)
class EXOLoss(PreferenceLoss):
    """Match the policy's preference to a nearly certain one, in the direction of the KL that seeks modes.

    DPO minimises the divergence of the data's preference from the policy's; this takes the other direction, which is
    that of reinforcement learning. With `q = sigmoid(beta * (r_w - r_l))` and the preference
    `(1 - label_smoothing, label_smoothing)` of the label, the loss of a pair is
    `q * log(q / (1 - label_smoothing)) + (1 - q) * log((1 - q) / label_smoothing)`, which is 0 at
    `q = 1 - label_smoothing`.

    Source: Ji et al., Towards Efficient Exact Optimization, https://arxiv.org/abs/2402.00856, equation 16.

    Args:
        beta: Strength of the pull to the reference, above 0, in rewards per nat; bigger stays closer.
        label_smoothing: Probability the label leaves to the rejected completion, in (0, 0.5); the smaller, the steeper
            (the paper's epsilon).

    Raises:
        ValueError: An option is out of its range.

    >>> import torch
    >>> from lit_dpo.pairs import PairLogps
    >>> policy = PairLogps(*torch.tensor([[-42.0], [-56.0], [20.0], [30.0]]))
    >>> reference = PairLogps(*torch.tensor([[-40.0], [-50.0], [20.0], [30.0]]))
    >>> loss = EXOLoss(beta=0.1)
    >>> round(loss(policy, reference).item(), 5)  # 0.59869 * (-0.51302 + 0.001) + 0.40131 * (-0.91302 + 6.90776)
    2.09923
    """

    beta: float = 0.1
    label_smoothing: float = 1e-3

    def __post_init__(self) -> None:
        check(self.beta > 0, "beta", "positive", self.beta)
        check(0 < self.label_smoothing < 0.5, "label_smoothing", "in (0, 0.5)", self.label_smoothing)

    def __call__(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        """Loss of each pair, shape `(batch,)`."""
        chosen, rejected = log_ratios(policy, reference)
        margin, eps = self.beta * (chosen - rejected), self.label_smoothing
        right = margin.sigmoid() * (F.logsigmoid(margin) - math.log1p(-eps))
        return right + (-margin).sigmoid() * (F.logsigmoid(-margin) - math.log(eps))

    def formula(self) -> str:
        """The divergence of the policy's preference from the label's."""
        margin, eps = f"{self.beta} * (r_w - r_l)", self.label_smoothing
        right = f"sigmoid({margin}) * (logsigmoid({margin}) - log({1 - eps}))"
        return f"{right} + sigmoid(-{margin}) * (logsigmoid(-{margin}) - log({eps}))"
