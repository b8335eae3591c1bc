"""What a reference is: where the log-probs come from that rewards are measured from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields

from lightning.pytorch import Trainer
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_dpo.models import Dtype
from lit_dpo.pairs import PairBatch, PairLogps
from lit_dpo.references.table import fingerprint
from lit_dpo.scoring.decoder import own_tensors
from lit_dpo.scoring.score import Scorer


@dataclass(frozen=True)
class Start:
    """What a reference may look at when a run starts.

    Args:
        trainer: Knows the processes, the device, the precision, and the data module.
        policy: The policy, in place and on its device; before the first step it has its starting weights unless a
            checkpoint was restored.
        reload: Loads the starting weights once more, as a model of its own.
        scorer: How the policy is scored, and what the loss wants to know.
    """

    trainer: Trainer
    policy: nn.Module
    reload: Callable[[], nn.Module]
    scorer: Scorer


@dataclass(frozen=True)
class Filling:
    """Ways to give a sharded model its weights; every process takes part.

    Args:
        from_first: Takes the model, and what loads its weights on the first process.
        from_shards: Takes a model to copy the shards of, and the model.
    """

    from_first: Callable[[nn.Module, Callable[[], nn.Module]], None]
    from_shards: Callable[[nn.Module, nn.Module], None]


@dataclass(eq=False)
class Reference(ABC):
    """The model that rewards are measured from: it never trains, and a subclass says where its log-probs come from.

    Subclass it as a dataclass with ``@dataclass(eq=False)``; the fields are its options, in Python and on the command
    line, and a subclass needs nothing but `score`. A field may hold another reference.

    The training module owns one and calls `build` once, `move` whenever it moves itself, and `score` once a batch. A
    reference is no `nn.Module`, and so it adds nothing to checkpoints, optimizers, or the policy's train and eval mode.
    """

    def build(self, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, dtype: Dtype) -> None:  # noqa: B027
        """Get ready, given the freshly loaded policy before adapters are attached to it."""

    def fill(self, policy: nn.Module, filling: Filling) -> None:  # noqa: B027
        """Get its weights, if `build` was given a policy without any, because they are sharded over processes.

        Args:
            policy: The policy with its weights, sharded, adapters attached.
            filling: How sharded models of its own get theirs.
        """

    def check(self, policy: nn.Module) -> None:  # noqa: B027
        """Raise ValueError if this reference cannot serve the finished policy, adapters attached."""

    def prepare(self, start: Start) -> None:  # noqa: B027
        """Do what must be done at the start of a run, when the policy is in place; see `Start`."""

    def models(self) -> list[nn.Module]:
        """Models of its own that live on the device, for strategies that shard."""
        return []

    def replace_models(self, function: Callable[[nn.Module], nn.Module]) -> None:  # noqa: B027
        """Let a strategy wrap each model of its own."""

    def identity(self) -> Mapping[str, object]:
        """What decides its values besides the rows and the policy's starting weights, for a cache; as plain values.

        Unless overridden: its class, its fields, and fingerprints of its `models`. Every process takes part.
        """
        options = {field.name: getattr(self, field.name) for field in fields(self) if field.init}
        named = {k: v.identity() if isinstance(v, Reference) else v for k, v in options.items()}
        models = [fingerprint(own_tensors(model)) for model in self.models()]
        return {"class": f"{type(self).__module__}.{type(self).__qualname__}", **named, "models": models}

    def move(self, function: Callable[[Tensor], Tensor], recurse: bool = True) -> None:
        """Apply a change of device or dtype to its own models."""
        for model in self.models():
            model._apply(function, recurse)

    @abstractmethod
    def score(self, policy: nn.Module, batch: PairBatch, scorer: Scorer) -> PairLogps:
        """Log-probs of a batch under the reference; the training module calls it without gradients.

        Args:
            policy: The model in training.
            batch: B pairs on its device.
            scorer: How the policy itself is scored; ``scorer(model, batch)`` scores another model in the same way.
                With `Scorer.per_token` the log-probs of single tokens are wanted too, and with `Scorer.layers` those
                at intermediate blocks.
        """
