"""What the module and its callbacks ask of a data module."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from lit_dpo.pairs import PairBatch


@runtime_checkable
class PairData(Protocol):
    """What the module and its callbacks ask of a data module besides loaders of `PairBatch`.

    `PreferenceDataModule` is one. A data module that is none trains, too. Its rows have no names in messages and
    predictions, cannot be scored before a run, and a resumed run must have as many processes as before.
    """

    @property
    def sources(self) -> Mapping[str, object]:
        """What the pairs of each stage come from, as plain values, for the record."""

    @property
    def chat_template(self) -> str | None:
        """The chat template in the place of the tokenizer's own, if there is one."""

    @property
    def values(self) -> Sequence[str]:
        """Names of the columns in `PairBatch.columns`."""

    def step_layout(self) -> dict[str, int]:
        """How optimizer steps are cut into batches: `pairs_per_step`, `accumulate`, `batches` of an epoch."""

    def origin(self, row_ids: Sequence[int], training: bool = False) -> list[str]:
        """Where rows of the prediction set, or of the training set, come from, as `file:line`."""

    def reference_sets(self, stage: str) -> Iterable[tuple[Any, Tensor, Callable[[Tensor], Iterable[PairBatch]]]]:
        """What a stage will see: data set, row numbers, and a function from row numbers to a loader."""


def pair_data(trainer: object) -> PairData | None:
    """The data module of a Trainer, if it answers what `PairData` asks."""
    data = getattr(trainer, "datamodule", None)
    return data if isinstance(data, PairData) else None
