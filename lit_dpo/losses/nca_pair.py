"""Noise Contrastive Alignment on pairs."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from lit_dpo.losses.base import PreferenceLoss, check, log_ratios
from lit_dpo.pairs import PairLogps


@dataclass(frozen=True)
class NCAPairLoss(PreferenceLoss):
    """Tell each completion from noise by itself, so that the chosen one's likelihood does not fall.

    DPO fits the difference of two rewards; this fits each of them. The loss of a pair is
    `-logsigmoid(beta * r_w) - (logsigmoid(-beta * r_w) + logsigmoid(-beta * r_l)) / 2`. The chosen completion's terms
    alone are lowest at `beta * r_w = log 2`.

    Source: Chen et al., Noise Contrastive Alignment of Language Models, https://arxiv.org/abs/2402.05369.

    Args:
        beta: Strength of the pull to the reference, above 0, in rewards per nat; bigger stays closer.

    Raises:
        ValueError: An option is out of its range.

    >>> import torch
    >>> from lit_dpo.pairs import PairLogps
    >>> policy = PairLogps(*torch.tensor([[-42.0], [-56.0], [20.0], [30.0]]))
    >>> reference = PairLogps(*torch.tensor([[-40.0], [-50.0], [20.0], [30.0]]))
    >>> round(NCAPairLoss(beta=0.1)(policy, reference).item(), 5)  # 0.79814 + (0.59814 + 0.43749) / 2
    1.31595
    """

    beta: float = 0.01

    def __post_init__(self) -> None:
        check(self.beta > 0, "beta", "positive", self.beta)

    def __call__(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        """Loss of each pair, shape `(batch,)`."""
        chosen, rejected = log_ratios(policy, reference)
        chosen, rejected = self.beta * chosen, self.beta * rejected
        return -F.logsigmoid(chosen) - (F.logsigmoid(-chosen) + F.logsigmoid(-rejected)) / 2

    def formula(self) -> str:
        """The chosen completion against noise, and both as noise."""
        chosen, rejected = f"{self.beta} * r_w", f"{self.beta} * r_l"
        return f"-logsigmoid({chosen}) - 0.5 * logsigmoid(-{chosen}) - 0.5 * logsigmoid(-{rejected})"
