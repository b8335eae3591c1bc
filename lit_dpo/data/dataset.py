"""Encoded pairs in compact storage."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lit_dpo.data.load import EncodedRow
from lit_dpo.pairs import PairBatch

DIGEST = 16  # bytes of a row's hash


@dataclass(frozen=True)
class BatchPlan:
    """Which pairs make up one batch of one process.

    Args:
        rows: Row numbers in the data set.
        weights: Their weights in the mean over pairs; ``None`` means 1 each.
    """

    rows: list[int]
    weights: list[float] | None = None


class PairDataset(Dataset[PairBatch]):
    """Encoded pairs in one int32 tensor; indexed by a `BatchPlan`, it gives a `PairBatch`.

    Args:
        rows: The encoded rows, all with numbers of the same columns.

    Attributes:
        columns: The rows' numbers, each of shape ``(rows,)``, float64, by column name.
    """

    def __init__(self, rows: Sequence[EncodedRow]) -> None:
        segments = [(row.encoded.prompt, row.encoded.chosen, row.encoded.rejected) for row in rows]
        self.lengths = torch.tensor([[len(part) for part in pair] for pair in segments])  # (rows, 3)
        self.tokens = torch.tensor([i for pair in segments for part in pair for i in part], dtype=torch.int32)
        total = self.lengths.sum(1)
        self.starts = total.cumsum(0) - total
        self.sources = [row.source for row in rows]
        self.origins = [row.row for row in rows]
        self.prompts = [row.encoded.prompt_key for row in rows]  # equal where the uncut prompts are
        self.columns = {
            name: torch.tensor([row.values[name] for row in rows], dtype=torch.float64)
            for name in sorted(rows[0].values if rows else ())
        }
        self._digests: list[bytes] = []

    def __len__(self) -> int:
        return len(self.sources)

    def pair(self, row: int) -> tuple[list[int], list[int], list[int]]:
        """Token ids of prompt, chosen, rejected of a row."""
        start, lengths = int(self.starts[row]), self.lengths[row].tolist()
        prompt, chosen, rejected = self.tokens[start : start + sum(lengths)].split(lengths)
        return prompt.tolist(), chosen.tolist(), rejected.tolist()

    def digest(self, row: int, swapped: bool = False, numbers: bool = True) -> bytes:
        """A hash of a row's token ids, their boundaries, and its numbers with their columns' names.

        Args:
            row: The row's number.
            swapped: Hash the row with its completions in each other's place.
            numbers: Whether the numbers count.
        """
        start, (prompt, chosen, rejected) = int(self.starts[row]), self.lengths[row].tolist()
        tokens, middle = self.tokens[start : start + prompt + chosen + rejected].numpy(), prompt + chosen
        parts = [tokens[:prompt], tokens[prompt:middle], tokens[middle:]]
        if swapped:
            parts = [parts[0], parts[2], parts[1]]
        found = hashlib.blake2b(str([len(part) for part in parts]).encode(), digest_size=DIGEST)
        for part in parts:
            found.update(part.tobytes())
        for name, column in self.columns.items() if numbers else ():
            found.update(repr((name, float(column[row]))).encode())
        return found.digest()

    def digests(self, numbers: bool = True) -> list[bytes]:
        """The hash of every row, in order, computed at the first call; see `digest`."""
        if self.columns and not numbers:
            return [self.digest(row, numbers=False) for row in range(len(self))]
        self._digests = self._digests or [self.digest(row) for row in range(len(self))]
        return self._digests

    def plain_batches(self, rows: Tensor, size: int = 256) -> Iterator[PairBatch]:
        """These rows in their order, in batches of any size; for looking at them, not for training."""
        for chunk in rows.split(size):
            yield self[BatchPlan(chunk.tolist())]

    def __getitem__(self, plan: BatchPlan) -> PairBatch:
        rows = torch.tensor(plan.rows)
        lengths = self.lengths[rows]
        spans = zip(self.starts[rows].tolist(), lengths.sum(1).tolist(), strict=True)
        tokens = torch.cat([self.tokens[start : start + size] for start, size in spans])
        weights = None if plan.weights is None else torch.tensor(plan.weights)
        columns = {name: column[rows].float() for name, column in self.columns.items()}
        return PairBatch.from_tokens(tokens, lengths, rows, weights, columns)
