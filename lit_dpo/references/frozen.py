"""A second model as the reference: a frozen copy of the policy, or another model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_dpo.models import Dtype, ModelDescription, empty_model, load_model
from lit_dpo.pairs import PairBatch, PairLogps
from lit_dpo.references.base import Filling, Reference
from lit_dpo.scoring.score import Scorer


class FrozenReference(Reference):
    """A second model: a frozen copy of the policy as it starts, or another model.

    Args:
        model: Hub name, folder or description of the reference; ``None`` is a copy of the policy's starting weights.
            It must share the policy's tokenizer.
    """

    def __init__(self, model: str | ModelDescription | None = None) -> None:
        self.source = model
        self.model: nn.Module | None = None

    @property
    def options(self) -> dict[str, Any]:
        """Which model."""
        return {"model": self.source}

    def build(self, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, dtype: Dtype) -> None:
        """Copy or load the model and freeze it."""
        if self.source is None:
            model = copy.deepcopy(policy)
        else:
            model = (empty_model if policy.device.type == "meta" else load_model)(self.source, tokenizer, dtype)
            self._load = partial(load_model, self.source, tokenizer, dtype)
        self.model = model.requires_grad_(False).eval()

    def fill(self, policy: nn.Module, filling: Filling) -> None:
        """Copy the policy's own shards, or read the other model."""
        assert self.model is not None
        if self.source is None:
            filling.from_shards(policy, self.model)
        else:
            filling.from_first(self.model, self._load)

    def models(self) -> list[nn.Module]:
        """The frozen model."""
        return [] if self.model is None else [self.model]

    def replace_models(self, function: Callable[[nn.Module], nn.Module]) -> None:
        """Wrap the frozen model."""
        assert self.model is not None
        self.model = function(self.model).eval()

    def score(self, policy: nn.Module, batch: PairBatch, scorer: Scorer) -> PairLogps:
        """Log-probs of a batch under the frozen model."""
        if self.model is None:
            raise RuntimeError("The reference has not been built: `build` comes before `score`.")
        return scorer(self.model, batch)
