"""Direct Preference Optimization."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from lit_dpo.losses.base import PreferenceLoss, check, log_ratios
from lit_dpo.pairs import PairLogps


@dataclass(frozen=True)
class DPOLoss(PreferenceLoss):
    """Raise the chosen completion over the rejected one, measured from the reference model.

    The loss of a pair with `h = r_w - r_l`, the difference of its two policy-to-reference log-ratios, is
    `-(1 - label_smoothing) * logsigmoid(beta * h) - label_smoothing * logsigmoid(-beta * h)`. Without smoothing it
    falls for ever as h grows; with smoothing (conservative DPO) its minimum lies at the reward margin
    `log((1 - label_smoothing) / label_smoothing)`. With `length_normalize`, h is the difference of the two log-ratios
    per token, `r_w / |y_w| - r_l / |y_l|`, so that a long completion weighs no more than a short one; beta is then
    some fifty times larger (Tulu 3 and OLMo 3 take 5). Reward metrics stay those of the sums.

    Source: Rafailov et al., Direct Preference Optimization, https://arxiv.org/abs/2305.18290; smoothing from the
    authors' note "A note on DPO with noisy preferences"; length normalisation from Lambert et al., Tulu 3,
    https://arxiv.org/abs/2411.15124.

    Args:
        beta: Strength of the pull to the reference, above 0, in rewards per nat (per nat per token with
            `length_normalize`); bigger stays closer.
        label_smoothing: Assumed share of pairs whose labels are swapped, in [0, 0.5).
        length_normalize: Take h from means over the completion's tokens instead of sums.

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
    length_normalize: bool = False

    def __post_init__(self) -> None:
        check(self.beta > 0, "beta", "positive", self.beta)
        check(0 <= self.label_smoothing < 0.5, "label_smoothing", "in [0, 0.5)", self.label_smoothing)

    def __call__(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        """Loss of each pair, shape `(batch,)`."""
        if self.length_normalize:
            policy, reference = policy.per_token(), reference.per_token()
        chosen, rejected = log_ratios(policy, reference)
        margin = self.beta * (chosen - rejected)
        if self.label_smoothing == 0:
            return -F.logsigmoid(margin)
        return -(1 - self.label_smoothing) * F.logsigmoid(margin) - self.label_smoothing * F.logsigmoid(-margin)

    def formula(self) -> str:
        """The logistic loss of the margin, and of its opposite where labels are smoothed."""
        h = "(r_w/|y_w| - r_l/|y_l|)" if self.length_normalize else "(r_w - r_l)"
        eps = self.label_smoothing
        if eps == 0:
            return f"-logsigmoid({self.beta} * {h})"
        return f"-{round(1 - eps, 12)} * logsigmoid({self.beta} * {h}) - {eps} * logsigmoid(-{self.beta} * {h})"
