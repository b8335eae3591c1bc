"""What a reference is: where the log-probs come from that rewards are measured from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

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

    Subclass it as a dataclass with `@dataclass(eq=False)`; the fields are its options, in Python and on the command
    line, and a subclass needs nothing but `score`. A field may hold another reference or a list of them; what a
    subclass does not override is done by each of these in turn.

    The training module owns one and calls `build` once, `move` whenever it moves itself, `score` once a batch, and
    `follow` after every optimizer step. A reference is no `nn.Module`, and so it adds nothing to optimizers or to the
    policy's train and eval mode; to checkpoints it adds its models' weights if it `moves`.

    Attributes:
        moves: True for a reference whose models change while the policy trains. Their weights are kept in checkpoints,
            and no cache can keep its values.
    """

    moves: ClassVar[bool] = False

    def parts(self) -> list[Reference]:
        """References that it is made of: those in its fields, alone or in a list."""
        values = [getattr(self, field.name, None) for field in fields(self)]
        lists = [list(value) if isinstance(value, list | tuple) else [value] for value in values]
        return [part for values in lists for part in values if isinstance(part, Reference)]

    def moving(self) -> list[Reference]:
        """Which of itself and its parts, at any depth, `moves`."""
        return [*([self] if self.moves else []), *(found for part in self.parts() for found in part.moving())]

    def build(self, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, dtype: Dtype) -> None:
        """Get ready, given the freshly loaded policy before adapters are attached to it."""
        for part in self.parts():
            part.build(policy, tokenizer, dtype)

    def fill(self, policy: nn.Module, filling: Filling) -> None:
        """Get its weights, if `build` was given a policy without any, because they are sharded over processes.

        Args:
            policy: The policy with its weights, sharded, adapters attached.
            filling: How sharded models of its own get theirs.
        """
        for part in self.parts():
            part.fill(policy, filling)

    def check(self, policy: nn.Module) -> None:
        """Raise ValueError if this reference cannot serve the finished policy, adapters attached."""
        for part in self.parts():
            part.check(policy)

    def prepare(self, start: Start) -> None:
        """Do what must be done at the start of a run, when the policy is in place; see `Start`."""
        for part in self.parts():
            part.prepare(start)

    def follow(self, policy: nn.Module, step: int) -> None:
        """Take note of an optimizer step of the policy, the first of a run being 1."""
        for part in self.parts():
            part.follow(policy, step)

    def models(self) -> list[nn.Module]:
        """Models of its own that live on the device, for strategies that shard."""
        return [model for part in self.parts() for model in part.models()]

    def replace_models(self, function: Callable[[nn.Module], nn.Module]) -> None:
        """Let a strategy wrap each model of its own."""
        for part in self.parts():
            part.replace_models(function)

    def identity(self) -> Mapping[str, object]:
        """What decides its values besides the rows and the policy's starting weights, for a cache; as plain values.

        Unless overridden: its class, its fields, and fingerprints of its `models`. Every process takes part.
        """

        def plain(value: Any) -> Any:
            if isinstance(value, list | tuple):
                return [plain(inner) for inner in value]
            return value.identity() if isinstance(value, Reference) else value

        named = {field.name: plain(getattr(self, field.name)) for field in fields(self) if field.init}
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
            scorer: How the policy itself is scored; `scorer(model, batch)` scores another model in the same way.
                With `Scorer.per_token` the log-probs of single tokens are wanted too, and with `Scorer.layers` those
                at intermediate blocks.
        """


def refuse_incomplete(reference: Reference | None, logps: PairLogps, scorer: Scorer) -> None:
    """Raise ValueError if a reference has not given all log-probs that a scorer asks for."""
    every = (logps, *logps.layers.values())
    lacks_tokens = scorer.per_token and any(found.tokens is None for found in every)
    if lacks_tokens or logps.layers.keys() != set(map(int, scorer.layers)):
        raise ValueError(
            f"`{type(reference).__name__}` gives no log-probs of single tokens or of intermediate layers, which the "
            "loss needs: let its `score` give all that the scorer asks for, or use another reference."
        )


def scored_by(reference: Reference, policy: nn.Module, batch: PairBatch, scorer: Scorer) -> PairLogps:
    """What a reference scores, which must be one log-prob a pair and side.

    Raises:
        ValueError: It is something else, as of a reference from a user's file.
    """
    found: object = reference.score(policy, batch, scorer)
    wanted = (len(batch.lengths),)
    if not isinstance(found, PairLogps):
        got = f"a {type(found).__name__}"
    elif wrong := [tuple(side.shape) for side in (found.chosen, found.rejected) if side.shape != wanted]:
        got = f"log-probs of shape {wrong[0]}"
    else:
        return found
    raise ValueError(
        f"`{type(reference).__name__}.score` must return a `PairLogps` with one log-prob a pair and side, shape "
        f"{wanted}, got {got}."
    )
