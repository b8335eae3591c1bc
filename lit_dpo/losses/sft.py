"""Supervised fine-tuning on the chosen completion."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lit_dpo.losses.base import PreferenceLoss
from lit_dpo.pairs import PairLogps


@dataclass(frozen=True)
class SFTLoss(PreferenceLoss):
    """Negative log-likelihood of the chosen completion, in nats per token unless told otherwise.

    The supervised stage before preference tuning, or (in a `WeightedLoss`) a term that keeps the chosen completion
    likely. It looks at no reference, so none is built, and not at the rejected completion, which is left out of
    training: alone it takes about half the time, more with long prompts. In validation both are scored, and reward
    metrics compare plain log-probs.

    The mean runs over the tokens of a pair first and over pairs second, so that every pair counts the same; trainers
    that average over all tokens of a batch weigh long completions more.

    Source: the usual language-modelling loss, as the supervised stage of https://arxiv.org/abs/2305.18290, section 3.

    Args:
        length_normalize: Take the mean over the completion's tokens; else their sum, in nats, which weighs long
            completions more. Some methods add the sum to a preference loss, with a small weight (`configs/rpo.yaml`).

    >>> import torch
    >>> from lit_dpo.pairs import PairLogps
    >>> policy = PairLogps(*torch.tensor([[-10.0], [-30.0], [5.0], [5.0]]))
    >>> SFTLoss()(policy, policy.zeros()).item()  # 10 nats over 5 tokens
    2.0
    """

    needs_reference: ClassVar[bool] = False
    needs_rejected: ClassVar[bool] = False

    length_normalize: bool = True

    def __call__(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        """Loss of each pair, shape `(batch,)`."""
        return -(policy.per_token() if self.length_normalize else policy).chosen

    def formula(self) -> str:
        """Minus the log-prob, of a token or of the completion."""
        return "-logp_w/|y_w|" if self.length_normalize else "-logp_w"
