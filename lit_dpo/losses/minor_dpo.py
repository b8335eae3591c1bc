"""MinorDPO."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from lit_dpo.losses.base import PreferenceLoss, check, log_ratios
from lit_dpo.pairs import PairLogps


@dataclass(frozen=True)
class MinorDPOLoss(PreferenceLoss):
    """DPO that stops pushing a rejected completion once it has fallen below the reference.

    DPO can lower the rejected completion without end, and drags the policy away with it. The loss of a pair is
    `-logsigmoid(beta * (r_w - max(0, r_l)))`; it equals DPO wherever `r_l >= 0`, and has no gradient on the
    rejected completion elsewhere, nor where the policy is the reference.

    Source: Xie et al., Minor DPO Reject Penalty to Increase Training Robustness, https://arxiv.org/abs/2408.09834, as
    two public codes agree on it.

    Args:
        beta: Strength of the pull to the reference, above 0, in rewards per nat; bigger stays closer.

    Raises:
        ValueError: An option is out of its range.

    >>> import torch
    >>> from lit_dpo.pairs import PairLogps
    >>> policy = PairLogps(*torch.tensor([[-42.0], [-56.0], [20.0], [30.0]]))
    >>> reference = PairLogps(*torch.tensor([[-40.0], [-50.0], [20.0], [30.0]]))
    >>> round(MinorDPOLoss(beta=0.1)(policy, reference).item(), 5)  # log(1 + exp(0.1 * 2)): r_l is below 0
    0.79814
    """

    beta: float = 0.1

    def __post_init__(self) -> None:
        check(self.beta > 0, "beta", "positive", self.beta)

    def __call__(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        """Loss of each pair, shape `(batch,)`."""
        chosen, rejected = log_ratios(policy, reference)
        return -F.logsigmoid(self.beta * (chosen - F.relu(rejected)))

    def formula(self) -> str:
        """A fallen rejected completion drops out."""
        return f"-logsigmoid({self.beta} * (r_w - max(0, r_l)))"
