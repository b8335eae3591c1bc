"""Anchored Preference Optimization, the variant zero."""

from dataclasses import dataclass

from torch import Tensor

from lit_dpo.losses.base import PreferenceLoss, check, log_ratios
from lit_dpo.pairs import PairLogps


@dataclass(frozen=True)
class APOZeroLoss(PreferenceLoss):
    """Raise the chosen completion and lower the rejected one, each measured from the reference.

    DPO fixes only the difference of the two, so that both may fall. Here each has an anchor of its own: the loss of a
    pair is `1 - sigmoid(beta * r_w) + sigmoid(beta * r_l)`. It fits data whose chosen completions are better than
    what the model writes; `APODownLoss` is for the others. SmolLM3 was trained with this one.

    Source: D'Oosterlinck et al., Anchored Preference Optimization, https://arxiv.org/abs/2408.06266, equation 7.

    Args:
        beta: Strength of the pull to the reference, above 0, in rewards per nat; bigger stays closer.

    Raises:
        ValueError: An option is out of its range.

    >>> import torch
    >>> from lit_dpo.pairs import PairLogps
    >>> policy = PairLogps(*torch.tensor([[-42.0], [-56.0], [20.0], [30.0]]))
    >>> reference = PairLogps(*torch.tensor([[-40.0], [-50.0], [20.0], [30.0]]))
    >>> round(APOZeroLoss(beta=0.1)(policy, reference).item(), 5)  # 1 - 1 / (1 + exp(0.2)) + 1 / (1 + exp(0.6))
    0.90418
    """

    beta: float = 0.1

    def __post_init__(self) -> None:
        check(self.beta > 0, "beta", "positive", self.beta)

    def __call__(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        """Loss of each pair, shape `(batch,)`."""
        chosen, rejected = log_ratios(policy, reference)
        return 1 - (self.beta * chosen).sigmoid() + (self.beta * rejected).sigmoid()

    def formula(self) -> str:
        """One anchored term a completion."""
        return f"1 - sigmoid({self.beta} * r_w) + sigmoid({self.beta} * r_l)"
