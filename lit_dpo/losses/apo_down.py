"""Anchored Preference Optimization, the variant down."""

from dataclasses import dataclass

from torch import Tensor

from lit_dpo.losses.base import PreferenceLoss, check, log_ratios
from lit_dpo.pairs import PairLogps


@dataclass(frozen=True)
class APODownLoss(PreferenceLoss):
    """Lower both completions, the rejected one more.

    It fits data whose chosen completions are worse than what the model writes already, and which still tell the worse
    from the worst. The loss of a pair is `sigmoid(beta * r_w) + 1 - sigmoid(beta * (r_w - r_l))`; where the policy is
    the reference, the gradient on the chosen completion is 0. `APOZeroLoss` is for better chosen completions.

    Source: D'Oosterlinck et al., Anchored Preference Optimization, https://arxiv.org/abs/2408.06266, equation 8.

    Args:
        beta: Strength of the pull to the reference, above 0, in rewards per nat; bigger stays closer.

    Raises:
        ValueError: An option is out of its range.

    >>> import torch
    >>> from lit_dpo.pairs import PairLogps
    >>> policy = PairLogps(*torch.tensor([[-42.0], [-56.0], [20.0], [30.0]]))
    >>> reference = PairLogps(*torch.tensor([[-40.0], [-50.0], [20.0], [30.0]]))
    >>> round(APODownLoss(beta=0.1)(policy, reference).item(), 5)  # 1 / (1 + exp(0.2)) + 1 - 1 / (1 + exp(-0.4))
    0.85148
    """

    beta: float = 0.1

    def __post_init__(self) -> None:
        check(self.beta > 0, "beta", "positive", self.beta)

    def __call__(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        """Loss of each pair, shape `(batch,)`."""
        chosen, rejected = log_ratios(policy, reference)
        return (self.beta * chosen).sigmoid() + 1 - (self.beta * (chosen - rejected)).sigmoid()

    def formula(self) -> str:
        """The anchored chosen completion, and the margin."""
        return f"sigmoid({self.beta} * r_w) + 1 - sigmoid({self.beta} * (r_w - r_l))"
