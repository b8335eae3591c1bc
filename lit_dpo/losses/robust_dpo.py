"""Robust DPO."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from lit_dpo.losses.base import PreferenceLoss, check, log_ratios
from lit_dpo.pairs import PairLogps


@dataclass(frozen=True)
class RobustDPOLoss(PreferenceLoss):
    """DPO made unbiased where a known share of the labels is swapped.

    Swapped labels bias DPO. With `h = r_w - r_l` and the share `eps` of swapped labels, the loss of a pair is
    `(-(1 - eps) * logsigmoid(beta * h) + eps * logsigmoid(-beta * h)) / (1 - 2 * eps)`; its mean over noisy labels
    is DPO's over clean ones. Unlike the smoothed DPO it has no minimum: it falls for ever as h grows.

    Source: Chowdhury et al., Provably Robust DPO, https://arxiv.org/abs/2403.00409.

    Args:
        beta: Strength of the pull to the reference, above 0, in rewards per nat; bigger stays closer.
        label_smoothing: Share of pairs whose labels are swapped, in [0, 0.5); 0 is plain DPO.

    Raises:
        ValueError: An option is out of its range.

    >>> import torch
    >>> from lit_dpo.pairs import PairLogps
    >>> policy = PairLogps(*torch.tensor([[-42.0], [-56.0], [20.0], [30.0]]))
    >>> reference = PairLogps(*torch.tensor([[-40.0], [-50.0], [20.0], [30.0]]))
    >>> round(RobustDPOLoss(beta=0.1)(policy, reference).item(), 5)  # (0.9 * 0.51302 - 0.1 * 0.91302) / 0.8
    0.46302
    """

    beta: float = 0.1
    label_smoothing: float = 0.1

    def __post_init__(self) -> None:
        check(self.beta > 0, "beta", "positive", self.beta)
        check(0 <= self.label_smoothing < 0.5, "label_smoothing", "in [0, 0.5)", self.label_smoothing)

    def __call__(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        """Loss of each pair, shape `(batch,)`."""
        chosen, rejected = log_ratios(policy, reference)
        margin, eps = self.beta * (chosen - rejected), self.label_smoothing
        return (-(1 - eps) * F.logsigmoid(margin) + eps * F.logsigmoid(-margin)) / (1 - 2 * eps)

    def formula(self) -> str:
        """What swapped labels add is taken off again."""
        margin, eps = f"{self.beta} * (r_w - r_l)", self.label_smoothing
        terms = f"-{round(1 - eps, 12)} * logsigmoid({margin}) + {eps} * logsigmoid(-{margin})"
        return f"({terms}) / {round(1 - 2 * eps, 12)}"
