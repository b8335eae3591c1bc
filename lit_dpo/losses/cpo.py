"""Contrastive Preference Optimization."""

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from lit_dpo.losses.base import PreferenceLoss, check
from lit_dpo.pairs import PairLogps


@dataclass(frozen=True)
class CPOLoss(PreferenceLoss):
    """DPO without a reference, held in place by a supervised term.

    A uniform reference drops out of DPO, which saves the second model; the negative log-likelihood of the chosen
    completion keeps the policy near the preferred data instead. The loss of a pair is
    `-logsigmoid(beta * (logp_w - logp_l)) - sft_weight * logp_w / |y_w|`.

    Source: Xu et al., Contrastive Preference Optimization, https://arxiv.org/abs/2401.08417. The supervised term is
    per token, as in TRL; its mean runs over the tokens of a pair first and over pairs second.

    Args:
        beta: Rewards per nat, above 0; bigger sharpens the preference term.
        sft_weight: Weight of the supervised term, at least 0.

    Raises:
        ValueError: An option is out of its range.

    >>> import torch
    >>> from lit_dpo.pairs import PairLogps
    >>> policy = PairLogps(*torch.tensor([[-42.0], [-56.0], [20.0], [30.0]]))
    >>> reference = PairLogps(*torch.tensor([[-40.0], [-50.0], [20.0], [30.0]]))
    >>> round(CPOLoss()(policy, reference).item(), 5)  # log(1 + exp(-0.1 * (-42 + 56))) + 42 / 20
    2.32042
    """

    needs_reference: ClassVar[bool] = False

    beta: float = 0.1
    sft_weight: float = 1.0

    def __post_init__(self) -> None:
        check(self.beta > 0, "beta", "positive", self.beta)
        check(self.sft_weight >= 0, "sft_weight", "at least 0", self.sft_weight)

    def __call__(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        """Loss of each pair, shape `(batch,)`."""
        terms = self.terms(policy, reference)
        return terms["preference"] + self.sft_weight * terms["sft"]

    def terms(self, policy: PairLogps, reference: PairLogps) -> dict[str, Tensor]:
        """The preference term, and the supervised one before weighting."""
        return {"preference": -F.logsigmoid(self.beta * policy.margin), "sft": -policy.per_token().chosen}

    def formula(self) -> str:
        """The preference term and the supervised one."""
        return f"-logsigmoid({self.beta} * (logp_w - logp_l)) - {self.sft_weight} * logp_w/|y_w|"
