"""The hinge loss of SLiC and RSO."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from lit_dpo.losses.base import PreferenceLoss, check, log_ratios
from lit_dpo.pairs import PairLogps


@dataclass(frozen=True)
class HingeLoss(PreferenceLoss):
    """Raise the chosen completion over the rejected one up to a fixed margin, then stop.

    The loss of a pair is `max(0, 1 - beta * (r_w - r_l))`. A pair whose reward margin has reached 1 has no gradient
    any more, where DPO goes on pushing.

    Source: Zhao et al., SLiC-HF, https://arxiv.org/abs/2305.10425, in the form with a reference of Liu et al.,
    Statistical Rejection Sampling, https://arxiv.org/abs/2309.06657.

    Args:
        beta: Strength of the pull to the reference, above 0, in rewards per nat; bigger stays closer. The margin is
            reached at `1 / beta` nats.

    Raises:
        ValueError: An option is out of its range.

    >>> import torch
    >>> from lit_dpo.pairs import PairLogps
    >>> policy = PairLogps(*torch.tensor([[-42.0], [-56.0], [20.0], [30.0]]))
    >>> reference = PairLogps(*torch.tensor([[-40.0], [-50.0], [20.0], [30.0]]))
    >>> round(HingeLoss(beta=0.1)(policy, reference).item(), 5)  # 1 - 0.1 * (-2 + 6)
    0.6
    """

    beta: float = 0.1

    def __post_init__(self) -> None:
        check(self.beta > 0, "beta", "positive", self.beta)

    def __call__(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        """Loss of each pair, shape `(batch,)`."""
        chosen, rejected = log_ratios(policy, reference)
        return F.relu(1 - self.beta * (chosen - rejected))

    def formula(self) -> str:
        """What the reward margin lacks to 1."""
        return f"max(0, 1 - {self.beta} * (r_w - r_l))"
