"""Autoregressive DPO."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_dpo.losses.base import PreferenceLoss, check, log_ratios, token_log_ratios
from lit_dpo.pairs import PairLogps
from lit_dpo.scoring.logps import sum_by_completion


@dataclass(frozen=True)
class ADPOLoss(PreferenceLoss):
    """DPO on each of several equal segments of the completions, added up.

    DPO compares whole completions; here the first segment of the chosen one is compared with the first of the rejected
    one, and so on, so that a lead in one place does not make up for a loss in another. With u the share of a segment's
    tokens in the log-ratio, the loss of a pair is `-sum_s logsigmoid(beta * (u_w[s] - u_l[s]))`; it starts at
    `segments * log(2)`.

    Source: Oi et al., Autoregressive Direct Preference Optimization, https://arxiv.org/abs/2602.09533, its adaptive
    family. The default number of segments is our choice, and so is where they end: segment s of n tokens in m segments
    ends after `floor(s * n / m)`. Segments are empty where there are fewer tokens than segments, and an empty one
    adds nothing to u.

    Args:
        beta: Strength of the pull to the reference, above 0, in rewards per nat; bigger stays closer.
        segments: Number of segments of each completion, at least 1; 1 is plain DPO, more compare finer.

    Raises:
        ValueError: An option is out of its range, or (when called) there are no log-probs of single tokens.

    >>> import torch
    >>> from lit_dpo.pairs import PairLogps
    >>> policy = PairLogps(*torch.tensor([[-3.0], [-7.0], [2.0], [3.0]]), tokens=torch.tensor([-1.0, -2, -1, -2, -4]))
    >>> loss = ADPOLoss(beta=1.0, segments=2)
    >>> round(loss(policy, policy.zeros()).item(), 5)  # -logsigmoid(-1 + 1) - logsigmoid(-2 + 6)
    0.7113
    """

    needs_tokens: ClassVar[bool] = True

    beta: float = 0.1
    segments: int = 4

    def __post_init__(self) -> None:
        check(self.beta > 0, "beta", "positive", self.beta)
        whole = self.segments >= 1 and self.segments == int(self.segments)
        check(whole, "segments", "a whole number, at least 1", self.segments)

    def __call__(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        """Loss of each pair, shape `(batch,)`."""
        if self.segments == 1:  # the completion, whose sum is at hand
            chosen, rejected = log_ratios(policy, reference)
            return -F.logsigmoid(self.beta * (chosen - rejected))
        ends = torch.arange(self.segments + 1, device=policy.chosen.device)
        ends = ends * policy.completion_lengths.long()[:, None] // self.segments  # (2B, segments + 1)
        sums = sum_by_completion(token_log_ratios(policy, reference), ends.diff(dim=1).flatten())
        chosen, rejected = sums.view(-1, 2, self.segments).unbind(1)  # (batch, segments) each
        return -F.logsigmoid(self.beta * (chosen - rejected)).sum(1)

    def terms(self, policy: PairLogps, reference: PairLogps) -> dict[str, Tensor]:
        """The mean over segments, which compares runs with different numbers of them."""
        return {"segment_mean": self(policy, reference) / self.segments}

    def formula(self) -> str:
        """One logistic loss a segment."""
        return f"sum(-logsigmoid({self.beta} * (r_w[s] - r_l[s])) for s in segments({self.segments}))"
