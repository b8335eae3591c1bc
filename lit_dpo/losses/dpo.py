"""Direct Preference Optimization."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from lit_dpo.losses.base import PreferenceLoss, check, log_ratios
from lit_dpo.pairs import PairLogps


@dataclass(frozen=True)
class DPOLoss(PreferenceLoss):
    """Raise the chosen completion over the rejected one, measured from the reference model.

    The loss of a pair with ``h = r_w - r_l``, the difference of its two policy-to-reference log-ratios, is
    ``-(1 - label_smoothing) * logsigmoid(beta * h) - label_smoothing * logsigmoid(-beta * h)``. Without smoothing it
    falls for ever as h grows; with smoothing (conservative DPO) its minimum lies at the reward margin
    ``log((1 - label_smoothing) / label_smoothing)``.

    Source: Rafailov et al., Direct Preference Optimization, https://arxiv.org/abs/2305.18290; smoothing from the
    authors' note "A note on DPO with noisy preferences".

    Args:
        beta: Strength of the pull to the reference, above 0, in rewards per nat; bigger stays closer.
        label_smoothing: Assumed share of pairs whose labels are swapped, in [0, 0.5).

    Raises:
        ValueError: An option is out of its range.

    >>> import torch
    >>> from lit_dpo.pairs import PairLogps
    >>> policy = PairLogps(*torch.tensor([[-10.0], [-30.0], [5.0], [5.0]]))
    >>> reference = PairLogps(*torch.tensor([[-20.0], [-20.0], [5.0], [5.0]]))
    >>> round(DPOLoss(beta=0.1)(policy, reference).item(), 4)  # -log(sigmoid(0.1 * 20))
    0.1269
    """

    beta: float = 0.1
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        check(self.beta > 0, "beta", "positive", self.beta)
        check(0 <= self.label_smoothing < 0.5, "label_smoothing", "in [0, 0.5)", self.label_smoothing)

    def __call__(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        """Loss of each pair, shape ``(batch,)``."""
        chosen, rejected = log_ratios(policy, reference)
        margin = self.beta * (chosen - rejected)
        if self.label_smoothing == 0:
            return -F.logsigmoid(margin)
        return -(1 - self.label_smoothing) * F.logsigmoid(margin) - self.label_smoothing * F.logsigmoid(-margin)
