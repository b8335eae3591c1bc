"""The policy itself, its adapters switched off, as the reference."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from lit_dpo.pairs import PairBatch, PairLogps
from lit_dpo.references.base import Reference
from lit_dpo.scoring.decoder import adapters_off
from lit_dpo.scoring.score import Scorer


@dataclass(eq=False)
class AdapterReference(Reference):
    """The policy itself with its LoRA adapters switched off: no second model in memory."""

    def check(self, policy: nn.Module) -> None:
        """Raise ValueError for a policy without adapters."""
        if not hasattr(policy, "peft_config"):
            raise ValueError(
                "`AdapterReference` needs a policy with adapters: set `adapter`, or use `FrozenReference` instead."
            )

    def score(self, policy: nn.Module, batch: PairBatch, scorer: Scorer) -> PairLogps:
        """Log-probs of a batch under the policy without its adapters."""
        with adapters_off(policy):
            return scorer(policy, batch)
