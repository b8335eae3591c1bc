"""Length-regularised DPO."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from lit_dpo.losses.base import PreferenceLoss, check, log_ratios
from lit_dpo.pairs import PairLogps


@dataclass(frozen=True)
class RDPOLoss(PreferenceLoss):
    """DPO that asks less of a pair whose chosen completion is the longer one.

    A penalty of `alpha` rewards a token in what the policy maximises, `E[reward - alpha * |y|] - beta * KL`, gives
    each completion the reward `beta * r + alpha * |y|`, up to a constant of the prompt. The loss of a pair is
    `-logsigmoid(beta * (r_w - r_l) + alpha * (|y_w| - |y_l|))`: a longer chosen completion has part of its lead
    already and is pushed less. Some public code has this sign reversed.

    Source: Park et al., Disentangling Length from Quality in DPO, https://arxiv.org/abs/2403.19159; also the loss of
    iterative length-regularised DPO, https://arxiv.org/abs/2406.11817. The sign is derived from the objective above.

    Args:
        beta: Strength of the pull to the reference, above 0, in rewards per nat; bigger stays closer.
        alpha: Rewards a token of length costs, at least 0; 0 is plain DPO.

    Raises:
        ValueError: An option is out of its range.

    >>> import torch
    >>> from lit_dpo.pairs import PairLogps
    >>> policy = PairLogps(*torch.tensor([[-42.0], [-56.0], [20.0], [30.0]]))
    >>> reference = PairLogps(*torch.tensor([[-40.0], [-50.0], [20.0], [30.0]]))
    >>> round(RDPOLoss(beta=0.1)(policy, reference).item(), 5)  # log(1 + exp(-0.1 * 4 - 0.01 * (20 - 30)))
    0.55436
    """

    beta: float = 0.1
    alpha: float = 0.01

    def __post_init__(self) -> None:
        check(self.beta > 0, "beta", "positive", self.beta)
        check(self.alpha >= 0, "alpha", "at least 0", self.alpha)

    def __call__(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        """Loss of each pair, shape `(batch,)`."""
        chosen, rejected = log_ratios(policy, reference)
        longer = (policy.chosen_tokens - policy.rejected_tokens).to(chosen.dtype)
        return -F.logsigmoid(self.beta * (chosen - rejected) + self.alpha * longer)

    def formula(self) -> str:
        """The lead in length stands beside the margin."""
        return f"-logsigmoid({self.beta} * (r_w - r_l) + {self.alpha} * (|y_w| - |y_l|))"
