"""DPO with an offset."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_dpo.losses.base import PreferenceLoss, check, column, log_ratios
from lit_dpo.pairs import PairLogps


@dataclass(frozen=True)
class ODPOLoss(PreferenceLoss):
    """DPO that asks for a lead as large as the gap between the scores of the two completions.

    Not every chosen completion is better by the same amount. The rows say by how much, in their columns
    `score_chosen` and `score_rejected`. With the offset `D = alpha * log(score_chosen - score_rejected)` the
    loss of a pair is `-logsigmoid(beta * (r_w - r_l) - D)`; with `scaling` `linear`, D is alpha times the gap.

    The logarithm asks less and less as the gap closes. A pair whose gap is 0 or below has no offset at all: its loss is
    0, which is the limit and our choice, and the share of such pairs is logged as `loss/without_gap`.

    Source: Amini et al., Direct Preference Optimization with an Offset, https://arxiv.org/abs/2402.10571; alpha and
    the logarithm as in the authors' code.

    Args:
        beta: Strength of the pull to the reference, above 0, in rewards per nat; bigger stays closer.
        alpha: Size of the offset, at least 0; 0 is plain DPO.
        scaling: `log` or `linear`: what the offset makes of the gap.

    Raises:
        ValueError: An option is out of its range, or (when called) a column of scores is missing.

    >>> import torch
    >>> from lit_dpo.pairs import PairLogps
    >>> scores = {"score_chosen": torch.tensor([8.0]), "score_rejected": torch.tensor([7.5])}
    >>> policy = PairLogps(*torch.tensor([[-42.0], [-56.0], [20.0], [30.0]]), columns=scores)
    >>> reference = PairLogps(*torch.tensor([[-40.0], [-50.0], [20.0], [30.0]]))
    >>> loss = ODPOLoss(beta=0.1, scaling="linear")
    >>> round(loss(policy, reference).item(), 5)  # log(1 + exp(-(0.1 * 4 - 0.5)))
    0.7444
    """

    columns: ClassVar[tuple[str, ...]] = ("score_chosen", "score_rejected")

    beta: float = 0.1
    alpha: float = 1.0
    scaling: Literal["log", "linear"] = "log"

    def __post_init__(self) -> None:
        check(self.beta > 0, "beta", "positive", self.beta)
        check(self.alpha >= 0, "alpha", "at least 0", self.alpha)
        check(self.scaling in ("log", "linear"), "scaling", "`log` or `linear`", self.scaling)

    def __call__(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        """Loss of each pair, shape `(batch,)`."""
        chosen, rejected = log_ratios(policy, reference)
        margin, gap = self.beta * (chosen - rejected), _gap(policy)
        if self.alpha == 0:
            return -F.logsigmoid(margin)
        if self.scaling == "linear":
            return -F.logsigmoid(margin - self.alpha * gap)
        offset = self.alpha * torch.where(gap > 0, gap, 1).log()
        return torch.where(gap > 0, -F.logsigmoid(margin - offset), 0)

    def terms(self, policy: PairLogps, reference: PairLogps) -> dict[str, Tensor]:
        """With the logarithm: 1 for a pair whose scores do not put the chosen completion first, else 0."""
        gap = _gap(policy)
        return {"without_gap": (gap <= 0).to(gap.dtype)} if self.scaling == "log" else {}

    def formula(self) -> str:
        """The margin minus the offset."""
        gap = "score_chosen - score_rejected"
        gap = f"log({gap})" if self.scaling == "log" else f"({gap})"
        return f"-logsigmoid({self.beta} * (r_w - r_l) - {self.alpha} * {gap})"


def _gap(policy: PairLogps) -> Tensor:
    return column(policy, "score_chosen") - column(policy, "score_rejected")
