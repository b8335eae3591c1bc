"""Length-desensitised DPO."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_dpo.losses.base import PreferenceLoss, check, log_ratios, token_log_ratios
from lit_dpo.pairs import PairLogps
from lit_dpo.scoring.logps import sum_by_completion


@dataclass(frozen=True)
class LDDPOLoss(PreferenceLoss):
    """DPO in which the tokens that make one completion longer than the other weigh less.

    The longer completion of a pair has the larger log-ratio by its length alone. Both keep their first
    `m = min(|y_w|, |y_l|)` tokens in full; the tokens after them count `alpha` times, under policy and reference
    alike. With `r' = r[:m] + alpha * r[m:]` the loss of a pair is `-logsigmoid(beta * (r_w' - r_l'))`.

    Source: Liu et al., Length Desensitization in DPO, https://arxiv.org/abs/2409.06411.

    Args:
        beta: Strength of the pull to the reference, above 0, in rewards per nat; bigger stays closer.
        alpha: Weight of the tokens beyond the shorter completion's length, in [0, 1]; 1 is plain DPO, 0 ignores them.

    Raises:
        ValueError: An option is out of its range, or (when called) there are no log-probs of single tokens.

    >>> import torch
    >>> from lit_dpo.pairs import PairLogps
    >>> policy = PairLogps(*torch.tensor([[-3.0], [-7.0], [2.0], [3.0]]), tokens=torch.tensor([-1.0, -2, -1, -2, -4]))
    >>> round(LDDPOLoss(beta=1.0)(policy, policy.zeros()).item(), 5)  # log(1 + exp(-(-3 + 1 + 2 + 0.5 * 4)))
    0.12693
    """

    needs_tokens: ClassVar[bool] = True

    beta: float = 0.1
    alpha: float = 0.5

    def __post_init__(self) -> None:
        check(self.beta > 0, "beta", "positive", self.beta)
        check(0 <= self.alpha <= 1, "alpha", "in [0, 1]", self.alpha)

    def __call__(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        """Loss of each pair, shape `(batch,)`."""
        lengths = policy.completion_lengths.long()  # (2B,)
        shared = torch.minimum(policy.chosen_tokens, policy.rejected_tokens).long().repeat_interleave(2)
        runs = torch.stack([shared, lengths - shared], dim=1).flatten()  # (4B,)
        first = sum_by_completion(token_log_ratios(policy, reference), runs)[0::2]  # (2B,)
        chosen, rejected = log_ratios(policy, reference)
        # r[:m] + alpha * r[m:], written so that alpha = 1 leaves r as it is, bit for bit
        chosen = self.alpha * chosen + (1 - self.alpha) * first[0::2]
        rejected = self.alpha * rejected + (1 - self.alpha) * first[1::2]
        return -F.logsigmoid(self.beta * (chosen - rejected))

    def formula(self) -> str:
        """Log-ratios over the common length in full, the rest in part."""
        chosen, rejected = (f"{r}[:m] + {self.alpha} * {r}[m:]" for r in ("r_w", "r_l"))
        return f"-logsigmoid({self.beta} * ({chosen} - ({rejected})))"
