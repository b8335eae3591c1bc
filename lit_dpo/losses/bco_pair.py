"""Binary Classifier Optimization on pairs."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from lit_dpo.losses.base import PreferenceLoss, check, log_ratios
from lit_dpo.pairs import PairLogps


@dataclass(frozen=True)
class BCOPairLoss(PreferenceLoss):
    """Classify each completion by itself: chosen ones as good, rejected ones as bad.

    The loss of a pair is `-logsigmoid(beta * r_w) - logsigmoid(-beta * r_l)`, an upper bound of DPO.
    It pins down the level of both rewards where DPO pins down their difference only, and is the quality term of Mixed
    Preference Optimization (`configs/mpo.yaml`). The full method shifts both rewards by their running mean; a loss per
    pair has none, and the shift here is 0, as in TRL 1.16.

    Source: Jung et al., Binary Classifier Optimization, https://arxiv.org/abs/2404.04656.

    Args:
        beta: Strength of the pull to the reference, above 0, in rewards per nat; bigger stays closer.

    Raises:
        ValueError: An option is out of its range.

    >>> import torch
    >>> from lit_dpo.pairs import PairLogps
    >>> policy = PairLogps(*torch.tensor([[-42.0], [-56.0], [20.0], [30.0]]))
    >>> reference = PairLogps(*torch.tensor([[-40.0], [-50.0], [20.0], [30.0]]))
    >>> round(BCOPairLoss(beta=0.1)(policy, reference).item(), 5)  # log(1 + exp(0.2)) + log(1 + exp(-0.6))
    1.23563
    """

    beta: float = 0.1

    def __post_init__(self) -> None:
        check(self.beta > 0, "beta", "positive", self.beta)

    def __call__(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        """Loss of each pair, shape `(batch,)`."""
        chosen, rejected = log_ratios(policy, reference)
        return -F.logsigmoid(self.beta * chosen) - F.logsigmoid(-self.beta * rejected)

    def formula(self) -> str:
        """The two classifications."""
        return f"-logsigmoid({self.beta} * r_w) - logsigmoid(-{self.beta} * r_l)"
