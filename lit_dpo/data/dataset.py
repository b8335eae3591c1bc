"""Encoded pairs, and batches of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lit_dpo.data.load import EncodedRow
from lit_dpo.data.token_blocks import Array
from lit_dpo.data.token_store import TokenStore
from lit_dpo.data.token_writer import TokenWriter, digest
from lit_dpo.pairs import PairBatch

DIGEST = 16  # bytes of a row's hash


@dataclass(frozen=True)
class BatchPlan:
    """Which pairs make up one batch of one process.

    Args:
        rows: Row numbers in the data set.
        weights: Their weights in the mean over pairs; `None` means 1 each.
    """

    rows: list[int]
    weights: list[float] | None = None


class Origins(Sequence[str]):
    """Where rows come from, such as `path/file.jsonl:17`; each text is put together when it is asked for."""

    def __init__(self, store: TokenStore) -> None:
        self._store = store

    def __len__(self) -> int:
        return len(self._store)

    def __getitem__(self, row):  # type: ignore[no-untyped-def]
        """The location of one row, or of several as a list."""
        if isinstance(row, slice):
            return [self._store.place(number) for number in range(*row.indices(len(self)))]
        return self._store.place(range(len(self))[row])


class PairDataset(Dataset[PairBatch]):
    """Encoded pairs in a `TokenStore`; indexed by a `BatchPlan`, it gives a `PairBatch`.

    Args:
        rows: Where the rows are; or the rows themselves, all with numbers of the same columns, to be held in memory.
        report: What became of the rows that were read, in words.

    Attributes:
        lengths: Tokens of prompt, chosen and rejected, shape `(rows, 3)`, int64.
        origins: Where each row comes from.
        columns: The rows' numbers, each of shape `(rows,)`, float64, by column name.
    """

    def __init__(self, rows: Sequence[EncodedRow] | TokenStore, report: str = "") -> None:
        if not isinstance(rows, TokenStore):
            writer = TokenWriter()
            for row in rows:
                writer.append(row)
            rows = writer.finish()
        self.store, self.report = rows, report
        self.lengths = torch.from_numpy(rows.lengths)
        self.origins = Origins(rows)
        names, values = rows.names.values, rows.column("values")
        self.columns = {name: torch.from_numpy(values[:, i].copy()) for i, name in enumerate(names)}

    def __len__(self) -> int:
        return len(self.store)

    @property
    def sources(self) -> list[str]:
        """Name of the data set that each row is from."""
        return [self.store.names.sources[number] for number in self.store.column("source").tolist()]

    @property
    def prompts(self) -> Array:
        """A hash of each row's prompt before it was cut, equal where the prompts are; shape `(rows, 2)` uint64."""
        return self.store.column("prompt")

    @property
    def largest_id(self) -> int:
        """The largest token id of all rows."""
        return int(self.store.column("largest").max())

    def pair(self, row: int) -> tuple[list[int], list[int], list[int]]:
        """Token ids of prompt, chosen, rejected of a row."""
        prompt, chosen, rejected = self.store.parts(row)
        return prompt.tolist(), chosen.tolist(), rejected.tolist()

    def content_keys(self, rows: Tensor) -> Tensor:
        """What reference log-probs of these rows are found by, shape `(n, 2)` int64; as `references.content_keys`."""
        return torch.from_numpy(self.store.column("content")[rows.numpy()])

    def swapped_digest(self, row: int, numbers: bool = True) -> bytes:
        """The hash that a row would have with its completions in each other's place; see `digest_bytes`."""
        prompt, chosen, rejected = self.store.parts(row)
        columns = self.columns.items() if numbers else ()
        return digest((prompt, rejected, chosen), {name: float(column[row]) for name, column in columns})

    def digest_bytes(self, numbers: bool = True) -> bytes:
        """The hashes of all rows in their order, 16 bytes each: of token ids, boundaries, and numbers with their names.

        Args:
            numbers: Whether the numbers count.
        """
        return self.store.column("digest" if numbers else "plain").tobytes()

    def plain_batches(self, rows: Tensor, size: int = 256) -> Iterator[PairBatch]:
        """These rows in their order, in batches of any size; for looking at them, not for training."""
        for chunk in rows.split(size):
            yield self[BatchPlan(chunk.tolist())]

    def __getitem__(self, plan: BatchPlan) -> PairBatch:
        rows = torch.tensor(plan.rows)
        tokens = torch.from_numpy(self.store.ids(plan.rows))
        weights = None if plan.weights is None else torch.tensor(plan.weights)
        columns = {name: column[rows].float() for name, column in self.columns.items()}
        return PairBatch.from_tokens(tokens, self.lengths[rows], rows, weights, columns)
