"""A reference that follows the policy: every few optimizer steps it takes over a share of its weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lit_dpo.losses.base import check
from lit_dpo.pairs import PairBatch, PairLogps
from lit_dpo.references.base import Reference, Start
from lit_dpo.references.frozen import FrozenReference
from lit_dpo.scoring.decoder import own_tensors
from lit_dpo.scoring.score import Scorer


@dataclass(eq=False)
class SyncedReference(Reference):
    """A second model that starts as the policy does and follows it, every `every` optimizer steps.

    Then each of its weights becomes `(1 - mix) * reference + mix * policy`. A `mix` of 1 copies the policy (TR-DPO's
    hard update), a smaller one is its soft update, and with `every` 1 the reference is an exponential moving average of
    the policy. Steps are optimizer steps, whatever the accumulation, and are counted from the start of the run. With
    LoRA the adapters are folded into what is mixed, so that the reference is a whole model then too. The weights stand
    in the checkpoints: a resumed run goes on exactly, and a validation of a checkpoint measures from the reference that
    it was written with. They are mixed in the weights' own dtype; in bfloat16 a small share of a small change is
    rounded away. In stepwise training each step starts with the reference at the policy that the step starts from.

    Source: Gorbatovski et al., TR-DPO, https://arxiv.org/abs/2404.09656. The defaults are the paper's for the soft
    update; it takes beta 0.05.

    Args:
        every: Optimizer steps from one update to the next, at least 1.
        mix: Share of the policy's weights in an update, in (0, 1].

    Raises:
        ValueError: An option is out of its range; or the models are wrapped by `FSDPStrategy`.
    """

    moves: ClassVar[bool] = True
    every: int = 512
    mix: float = 0.6

    def __post_init__(self) -> None:
        check(self.every >= 1, "every", "at least 1", self.every)
        check(0 < self.mix <= 1, "mix", "in (0, 1]", self.mix)
        self._copy = FrozenReference()

    def parts(self) -> list[Reference]:
        """The copy of the policy."""
        return [self._copy]

    def check(self, policy: nn.Module) -> None:
        """Raise ValueError if an adapter sits on anything but the weight of a layer."""
        for path, layer in _adapted(policy):
            if not isinstance(getattr(layer.get_base_layer(), "weight", None), Tensor):
                raise ValueError(
                    f"`SyncedReference` cannot fold the adapter on `{path}` into its weights: leave it out of the "
                    "adapter's `target_modules`, or use `FrozenReference`."
                )

    def prepare(self, start: Start) -> None:
        """Put its modules in the modes of the policy's, which were found to make nothing random."""
        modes = {_plain(name): module.training for name, module in start.policy.named_modules()}
        for model in self.models():
            for name, module in model.named_modules():
                module.training = modes[name]

    def replace_models(self, function: Callable[[nn.Module], nn.Module]) -> None:
        """Refuse to be wrapped: the wrapper of FSDP1 holds no single weights that could be mixed."""
        raise ValueError("`SyncedReference` does not work with FSDP1: use `--trainer.strategy fsdp2`.")

    def score(self, policy: nn.Module, batch: PairBatch, scorer: Scorer) -> PairLogps:
        """Log-probs of a batch under the reference as it is now."""
        return self._copy.score(policy, batch, scorer)

    @torch.no_grad()
    def follow(self, policy: nn.Module, step: int) -> None:
        """Take over a share of the policy's weights, if it is time."""
        if step % self.every:
            return
        (model,) = self.models()
        ours = dict(own_tensors(model))
        for name, weight in _trained(policy):
            _local(ours[name]).lerp_(_local(weight, ours[name]), self.mix)


def _trained(policy: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The policy's weights that training changes, adapters folded in, by the names they have without adapters."""
    if not hasattr(policy, "peft_config"):
        yield from policy.named_parameters()
    for path, layer in _adapted(policy):
        weight = layer.get_base_layer().weight
        delta = sum(layer.get_delta_weight(adapter) for adapter in layer.active_adapters)
        yield f"{path}.weight", (weight + delta).to(weight.dtype)


def _adapted(policy: nn.Module) -> Iterator[tuple[str, Any]]:
    """The layers with adapters, if there are any, by the names they have without."""
    for path, module in policy.named_modules():
        if hasattr(module, "get_delta_weight"):
            yield _plain(path), module


def _plain(path: str) -> str:
    """The name that a module has in a model without adapters."""
    return path.removeprefix("base_model.model").removeprefix(".").replace(".base_layer", "")


def _local(tensor: Tensor, like: Tensor | None = None) -> Tensor:
    """This process's own share of a sharded tensor, cut as another is; any other tensor itself."""
    if like is not None and hasattr(like, "placements"):
        tensor = tensor.redistribute(placements=like.placements)  # type: ignore[attr-defined]
    return getattr(tensor, "_local_tensor", tensor)
