"""Odds Ratio Preference Optimization."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_dpo.losses.base import PreferenceLoss, check
from lit_dpo.pairs import PairLogps


@dataclass(frozen=True)
class ORPOLoss(PreferenceLoss):
    """Supervised fine-tuning that also raises the odds of chosen over rejected, with no reference.

    One stage from a base model does the work of two. With `a = logp / |y|`, the mean log-prob of a token, and the
    odds `e^a / (1 - e^a)`, the loss of a pair is
    `-a_w - weight * logsigmoid((a_w - a_l) - (log(1 - e^a_w) - log(1 - e^a_l)))`. Odds grow without bound as a
    reaches 0, so that a counts as at most -1e-6 inside them, which is our choice. Reward metrics are those of the
    summed log-probs.

    Source: Hong et al., ORPO, https://arxiv.org/abs/2403.07691. The supervised term runs over the completion, not over
    the prompt too as in TRL.

    Args:
        weight: Weight of the term of the odds, at least 0 (the paper's lambda); 0 is `SFTLoss`.

    Raises:
        ValueError: An option is out of its range.

    >>> import torch
    >>> from lit_dpo.pairs import PairLogps
    >>> policy = PairLogps(*torch.tensor([[-42.0], [-56.0], [20.0], [30.0]]))
    >>> reference = PairLogps(*torch.tensor([[-40.0], [-50.0], [20.0], [30.0]]))
    >>> round(ORPOLoss()(policy, reference).item(), 5)  # 2.1 + 0.1 * log(1 + exp(2.1 - 1.86667 + 0.16799 - 0.13063))
    2.18376
    """

    needs_reference: ClassVar[bool] = False

    weight: float = 0.1

    def __post_init__(self) -> None:
        check(self.weight >= 0, "weight", "at least 0", self.weight)

    def __call__(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        """Loss of each pair, shape `(batch,)`."""
        terms = self.terms(policy, reference)
        return terms["sft"] + self.weight * terms["odds"]

    def terms(self, policy: PairLogps, reference: PairLogps) -> dict[str, Tensor]:
        """The supervised term, and that of the odds before weighting."""
        means = policy.per_token()
        return {"sft": -means.chosen, "odds": -F.logsigmoid(_log_odds(means.chosen) - _log_odds(means.rejected))}

    def formula(self) -> str:
        """The supervised term and that of the odds."""
        odds = [f"logp_{y}/|y_{y}| - log(1 - exp(logp_{y}/|y_{y}|))" for y in "wl"]
        return f"-logp_w/|y_w| - {self.weight} * logsigmoid({odds[0]} - ({odds[1]}))"


def _log_odds(logp: Tensor) -> Tensor:
    logp = logp.clamp(max=-1e-6)
    return logp - torch.log(-torch.expm1(logp))
