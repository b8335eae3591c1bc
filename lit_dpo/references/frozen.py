"""A second model as the reference: a frozen copy of the policy, or another model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_dpo.models import Dtype, ModelDescription, empty_model, load_model
from lit_dpo.pairs import PairBatch, PairLogps
from lit_dpo.pretrained import Loading
from lit_dpo.references.base import Filling, Reference
from lit_dpo.scoring.score import Scorer


@dataclass(eq=False)
class FrozenReference(Reference):
    """A second model: a frozen copy of the policy as it starts, or another model.

    Args:
        model: Hub name, folder or description of the reference; `None` is a copy of the policy's starting weights.
            It must share the policy's tokenizer.
    """

    model: str | ModelDescription | None = None

    def __post_init__(self) -> None:
        self._built: nn.Module | None = None
        self._how: tuple[int, Loading] = (0, Loading())

    def keep(self, model: str | ModelDescription, seed: int, loading: Loading) -> None:
        """Stay at a model in all steps of a run: the first one, loaded as the policy was.

        Args:
            model: Hub name, folder or description.
            seed: Of the random weights of a description.
            loading: Revision, attention and quantization.
        """
        self.model, self._how = model, (seed, loading)

    def build(self, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, dtype: Dtype) -> None:
        """Copy or load the model and freeze it."""
        if self.model is None:
            model = copy.deepcopy(policy)
        else:
            self._load = partial(load_model, self.model, tokenizer, dtype, *self._how)
            empty = policy.device.type == "meta"
            model = empty_model(self.model, tokenizer, dtype, self._how[1]) if empty else self._load()
        self._built = model.requires_grad_(False).eval()

    def fill(self, policy: nn.Module, filling: Filling) -> None:
        """Copy the policy's own shards, or read the other model."""
        assert self._built is not None
        if self.model is None:
            filling.from_shards(policy, self._built)
        else:
            filling.from_first(self._built, self._load)

    def models(self) -> list[nn.Module]:
        """The frozen model."""
        return [] if self._built is None else [self._built]

    def replace_models(self, function: Callable[[nn.Module], nn.Module]) -> None:
        """Wrap the frozen model."""
        assert self._built is not None
        self._built = function(self._built).eval()

    def score(self, policy: nn.Module, batch: PairBatch, scorer: Scorer) -> PairLogps:
        """Log-probs of a batch under the frozen model."""
        if self._built is None:
            raise RuntimeError("The reference has not been built: `build` comes before `score`.")
        return scorer(self._built, batch)
