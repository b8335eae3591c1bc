"""A preference loss at intermediate layers."""

from dataclasses import dataclass, field, replace
from typing import Literal, Self

import torch
from torch import Tensor

from lit_dpo.losses.base import PreferenceLoss, check, per_pair, refuse_functions
from lit_dpo.losses.dpo import DPOLoss
from lit_dpo.pairs import PairLogps


@dataclass(frozen=True)
class IntermediateLoss(PreferenceLoss):
    """A loss at the last layer mixed with the same loss at intermediate layers.

    Layer k's log-probs come from `head(final_norm(h_k))`, h_k being the output of the k-th decoder block; there are
    no new parameters. The loss of a pair is `(1 - weight) * L(last) + weight * mean_k L(layer k)`, where L is `base`
    and each layer is measured against the same layer of the reference.

    Source: Intermediate Direct Preference Optimization, https://arxiv.org/abs/2408.02923. The paper leaves three
    points open, and the defaults are our choice: the two terms form a convex combination, the reference term uses the
    same layer, and the gradient flows into final norm and head.

    Args:
        base: The loss applied at every layer.
        layers: Where: 1-based block numbers (22 is the output of the 22nd block), or depths in (0, 1] such as 0.6875,
            rounded to the nearest block. At least one.
        weight: Share of the intermediate term, in [0, 1]; 0 equals `base` exactly, 1 looks at no last layer.
        combine: `convex` as above; `additive` is `L(last) + weight * mean_k L(layer k)`, any weight >= 0.
        detach_head: Keep the intermediate term's gradient out of final norm and head.

    Raises:
        ValueError: An option is out of its range, or (by `resolve`) a layer lies outside the decoder.

    >>> IntermediateLoss(layers=(0.6875,)).resolve(blocks=32).layers
    (22,)
    """

    base: PreferenceLoss = field(default_factory=DPOLoss)
    layers: tuple[int | float, ...] = (0.6875,)
    weight: float = 0.3
    combine: Literal["convex", "additive"] = "convex"
    detach_head: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        check(len(self.layers) > 0, "layers", "at least one block number or depth", self.layers)
        check(self.combine in ("convex", "additive"), "combine", "`convex` or `additive`", self.combine)
        if self.combine == "convex":
            check(0 <= self.weight <= 1, "weight", "in [0, 1]", self.weight)
        check(self.weight >= 0, "weight", "at least 0", self.weight)
        refuse_functions("base", self.base)
        check(not self.base.layers, "base", "a loss without intermediate layers of its own", self.base)

    @property
    def needs_reference(self) -> bool:  # type: ignore[override]
        """As `base` says."""
        return self.base.needs_reference

    @property
    def needs_rejected(self) -> bool:  # type: ignore[override]
        """As `base` says."""
        return self.base.needs_rejected

    @property
    def needs_tokens(self) -> bool:  # type: ignore[override]
        """As `base` says."""
        return self.base.needs_tokens

    @property
    def columns(self) -> tuple[str, ...]:  # type: ignore[override]
        """Those of `base`."""
        return self.base.columns

    @property
    def beta(self) -> float:
        """The beta of `base`."""
        return self.base.beta

    def resolve(self, blocks: int) -> Self:
        """This loss with every depth turned into the number of the nearest of `blocks` decoder blocks."""
        numbers = tuple(dict.fromkeys(_block_number(layer, blocks) for layer in self.layers))
        return replace(self, layers=numbers)

    def __call__(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        """Loss of each pair, shape `(batch,)`."""
        if self.weight == 0:
            return self.base(policy, reference)
        terms = self._terms(policy, reference)
        last_weight = 1 - self.weight if self.combine == "convex" else 1.0
        return last_weight * terms["last"] + self.weight * terms["layers"]

    def terms(self, policy: PairLogps, reference: PairLogps) -> dict[str, Tensor]:
        """The loss at the last layer, and its mean over the intermediate ones."""
        return self._terms(policy, reference) if self.weight else {}

    def formula(self) -> str:
        """That of `base`, at the last layer and over the others."""
        base = self.base.formula()
        if self.weight == 0:
            return base
        last_weight = round(1 - self.weight, 12) if self.combine == "convex" else 1.0
        layers = ", ".join(map(str, self.layers))
        return f"{last_weight} * ({base}) + {self.weight} * (mean over layers {layers} of {base})"

    def _terms(self, policy: PairLogps, reference: PairLogps) -> dict[str, Tensor]:
        def at(values: PairLogps, layer: int) -> PairLogps:
            return replace(values.layers[layer], columns=values.columns)

        between = [per_pair(self.base, at(policy, int(k)), at(reference, int(k))) for k in self.layers]
        return {"last": per_pair(self.base, policy, reference), "layers": torch.stack(between).mean(0)}


def _block_number(layer: int | float, blocks: int) -> int:
    if isinstance(layer, float) and 0 < layer <= 1:
        return max(1, round(layer * blocks))
    if layer != int(layer) or not 1 <= layer <= blocks:
        raise ValueError(
            f"`layers` holds {layer}, but the decoder has {blocks} blocks: "
            f"give block numbers from 1 to {blocks}, or depths in (0, 1]."
        )
    return int(layer)
