"""A weighted sum of losses."""

from dataclasses import dataclass, replace
from itertools import chain
from typing import Self

import torch
from torch import Tensor

from lit_dpo.losses.base import PreferenceLoss, check, per_pair, refuse_functions
from lit_dpo.pairs import PairLogps


@dataclass(frozen=True)
class WeightedLoss(PreferenceLoss):
    """A weighted sum of other losses, such as DPO plus a supervised term; each of them is logged under its name.

    The loss of a pair is `sum_i weights[i] * losses[i]`. Reward metrics use the beta of the first loss that looks at
    the reference.

    Source: DPO with a supervised term, for example https://arxiv.org/abs/2404.19733, equation 1. That one, MPO and RPO
    are such sums, in the configurations `irpo`, `mpo` and `rpo`.

    Args:
        losses: The losses to sum, at least one.
        weights: One weight for each loss, each at least 0; empty means 1 for all.

    Raises:
        ValueError: The numbers of losses and weights differ, or a weight is negative.

    >>> import torch
    >>> from lit_dpo import DPOLoss, PairLogps, SFTLoss
    >>> same = PairLogps(*torch.tensor([[-10.0], [-30.0], [5.0], [5.0]]))
    >>> loss = WeightedLoss(losses=(DPOLoss(), SFTLoss()), weights=(1.0, 0.5))
    >>> round(loss(same, same).item(), 4)  # log(2) + 0.5 * 10 / 5
    1.6931
    """

    losses: tuple[PreferenceLoss, ...]
    weights: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "losses", tuple(self.losses))
        object.__setattr__(self, "weights", tuple(self.weights) or (1.0,) * len(self.losses))
        refuse_functions("losses", *self.losses)
        check(len(self.losses) > 0, "losses", "at least one loss", self.losses)
        check(
            len(self.weights) == len(self.losses),
            "weights",
            f"{len(self.losses)} numbers, one a loss",
            self.weights,
        )
        check(min(self.weights) >= 0, "weights", "at least 0", self.weights)
        wants = {loss.detach_head for loss in self.losses if loss.layers}
        check(len(wants) < 2, "losses", "losses that agree on `detach_head` if they have layers", self.losses)

    @property
    def needs_reference(self) -> bool:  # type: ignore[override]
        """Whether any of its losses does."""
        return any(loss.needs_reference for loss in self.losses)

    @property
    def needs_rejected(self) -> bool:  # type: ignore[override]
        """Whether any part does."""
        return any(loss.needs_rejected for loss in self.losses)

    @property
    def needs_tokens(self) -> bool:  # type: ignore[override]
        """Whether any of its losses does."""
        return any(loss.needs_tokens for loss in self.losses)

    @property
    def columns(self) -> tuple[str, ...]:  # type: ignore[override]
        """The columns of all its losses, each once."""
        return tuple(dict.fromkeys(chain.from_iterable(loss.columns for loss in self.losses)))

    @property
    def beta(self) -> float:
        """The beta of the first loss that looks at the reference, else of the first."""
        return next((loss for loss in self.losses if loss.needs_reference), self.losses[0]).beta

    @property
    def layers(self) -> tuple[int | float, ...]:
        """The layers of all its losses, each once."""
        return tuple(dict.fromkeys(chain.from_iterable(loss.layers for loss in self.losses)))

    @property
    def detach_head(self) -> bool:
        """Whether the losses with intermediate layers train the output head through the last layer alone."""
        return any(loss.detach_head for loss in self.losses)

    def resolve(self, blocks: int) -> Self:
        """This sum with each of its losses resolved."""
        return replace(self, losses=tuple(loss.resolve(blocks) for loss in self.losses))

    def __call__(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        """Loss of each pair, shape `(batch,)`."""
        values = [w * per_pair(loss, policy, reference) for w, loss in zip(self.weights, self.losses, strict=True)]
        return torch.stack(values).sum(0)

    def terms(self, policy: PairLogps, reference: PairLogps) -> dict[str, Tensor]:
        """The value of each loss before weighting, by class name in lower case without `Loss`."""
        names = [type(loss).__name__.removesuffix("Loss").lower() for loss in self.losses]
        unique = [name if names.count(name) == 1 else f"{name}_{i}" for i, name in enumerate(names)]
        return {name: per_pair(loss, policy, reference) for name, loss in zip(unique, self.losses, strict=True)}

    def formula(self) -> str:
        """The weighted sum of the formulas of its losses."""
        return " + ".join(f"{w} * ({loss.formula()})" for w, loss in zip(self.weights, self.losses, strict=True))
