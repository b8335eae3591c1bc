"""DPO-Shift."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from lit_dpo.losses.base import PreferenceLoss, check, log_ratios
from lit_dpo.pairs import PairLogps


@dataclass(frozen=True)
class DPOShiftLoss(PreferenceLoss):
    """DPO with the rejected completion's log-ratio scaled down, so that the chosen one falls less.

    Chosen and rejected completions resemble each other, and DPO lowers both. A little less weight on the rejected one
    gives up some margin for likelihood of the chosen one. The loss of a pair is
    `-logsigmoid(beta * (r_w - rejected_weight * r_l))`.

    Source: Yang et al., DPO-Shift, https://arxiv.org/abs/2502.07599, with a fixed factor.

    Args:
        beta: Strength of the pull to the reference, above 0, in rewards per nat; bigger stays closer.
        rejected_weight: Factor on the rejected log-ratio, in (0, 1] (the paper's lambda); 1 is plain DPO.

    Raises:
        ValueError: An option is out of its range.

    >>> import torch
    >>> from lit_dpo.pairs import PairLogps
    >>> policy = PairLogps(*torch.tensor([[-42.0], [-56.0], [20.0], [30.0]]))
    >>> reference = PairLogps(*torch.tensor([[-40.0], [-50.0], [20.0], [30.0]]))
    >>> round(DPOShiftLoss(beta=0.1)(policy, reference).item(), 5)  # log(1 + exp(-0.1 * (-2 + 0.95 * 6)))
    0.52516
    """

    beta: float = 0.1
    rejected_weight: float = 0.95

    def __post_init__(self) -> None:
        check(self.beta > 0, "beta", "positive", self.beta)
        check(0 < self.rejected_weight <= 1, "rejected_weight", "in (0, 1]", self.rejected_weight)

    def __call__(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        """Loss of each pair, shape `(batch,)`."""
        chosen, rejected = log_ratios(policy, reference)
        return -F.logsigmoid(self.beta * (chosen - self.rejected_weight * rejected))

    def formula(self) -> str:
        """The rejected log-ratio carries its factor."""
        return f"-logsigmoid({self.beta} * (r_w - {self.rejected_weight} * r_l))"
