"""Reference log-probs as a table: which rows, and who scored them.

An entry belongs to a row by its *content*, so row order, subsets and partitions do not matter, and a changed row
misses. A `TensorStore` holds one table for each scorer, named by weights, configuration and numerics.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from lit_dpo.pairs import PairBatch

_BLOCK = 1 << 20


def content_keys(batch: PairBatch) -> Tensor:
    """A 128-bit hash of each pair's token ids and boundaries, shape ``(batch, 2)`` int64.

    Computed with tensor operations on the batch's device, without waiting for it.
    """
    total = batch.lengths.sum(1)
    pair = torch.arange(len(batch), device=total.device).repeat_interleave(total, output_size=len(batch.input_ids))
    place = torch.arange(len(pair), device=pair.device) - (total.cumsum(0) - total)[pair]
    prompt, chosen, _ = batch.lengths[pair].unbind(1)
    segment = (place >= prompt).long() + (place >= prompt + chosen)
    keys = []
    for seed in (1, 2):
        terms = (batch.input_ids + 1) * (_mix(place * 4 + segment + (seed << 40)) | 1)
        start = (batch.lengths * _mix(torch.arange(3, device=pair.device) + (seed << 50))).sum(1)
        keys.append(start.index_add(0, pair, terms))  # integer sums wrap around and do not depend on the order
    return torch.stack(keys, 1)


def fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """A hash of named tensors: any changed value, name, shape or dtype gives another; 32 hex digits."""
    record = {}
    for name, tensor in tensors:
        whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # a sharded one, by all processes
        record[name] = (str(tensor.dtype), list(tensor.shape), _hash(whole.detach()))
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:32]


def _hash(tensor: Tensor) -> int:
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    words = tensor.contiguous().flatten().view(kind)
    weights = _mix(torch.arange(min(len(words), _BLOCK), device=words.device)) | 1
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    for number, block in enumerate(words.split(_BLOCK)):
        odd = _mix(torch.tensor(number + (3 << 40), device=words.device)) | 1
        total += odd * ((block.long() + 1) * weights[: len(block)]).sum()
    return int(total)


def _mix(values: Tensor) -> Tensor:
    """The splitmix64 finaliser on int64, which wraps around: a fixed pseudo-random word for each value."""
    values = values * -7046029254386353131
    values = (values ^ ((values >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    values = (values ^ ((values >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    return values ^ ((values >> 31) & 0x1FFFFFFFF)


class LogpsTable:
    """Log-probs of rows by content key, for the last layer and intermediate ones.

    Args:
        keys: Content keys, shape ``(rows, 2)`` int64.
        columns: ``last`` and ``layer.K`` -> log-probs of chosen and rejected, shape ``(rows, 2)``; NaN where not known.
    """

    def __init__(self, keys: Tensor, columns: Mapping[str, Tensor]) -> None:
        order = keys[:, 0].argsort(stable=True)
        self.keys = keys[order]
        self.columns = {name: values[order] for name, values in columns.items()}
        self._first = self.keys[:, 0].contiguous()

    def __len__(self) -> int:
        return len(self.keys)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> LogpsTable:
        """The table that `tensors` has written.

        Raises:
            ValueError: Their shapes or types are not those of a table.
        """
        if wrong := cls.problem(tensors):
            raise ValueError(wrong)
        return cls(tensors["keys"], {name: values for name, values in tensors.items() if name != "keys"})

    @staticmethod
    def problem(tensors: Mapping[str, Tensor]) -> str | None:
        """Why these are not what `tensors` writes, if they are not."""
        keys = tensors.get("keys")
        if keys is None or keys.dtype != torch.int64 or keys.shape[1:] != (2,):
            return "it has no keys of rows"
        columns = {name: values for name, values in tensors.items() if name != "keys"}
        if not columns or any(v.shape != keys.shape or not v.is_floating_point() for v in columns.values()):
            return "its columns do not fit its keys"
        return None

    def tensors(self) -> dict[str, Tensor]:
        """Everything in it, to be stored."""
        return {"keys": self.keys, **self.columns}

    def to(self, device: torch.device) -> LogpsTable:
        """The same table on another device."""
        return LogpsTable(self.keys.to(device), {name: v.to(device) for name, v in self.columns.items()})

    def find(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Row numbers of keys, shape ``(n,)``, and whether each is really there, shape ``(n,)``."""
        if not len(self):
            return keys[:, 0] * 0, keys[:, 0] != keys[:, 0]
        rows = torch.searchsorted(self._first, keys[:, 0].contiguous()).clamp(max=len(self) - 1)
        return rows, (self.keys[rows] == keys).all(1)

    def known(self, keys: Tensor, columns: Iterable[str]) -> Tensor:
        """Whether every one of these columns is known for each key, shape ``(n,)``."""
        rows, known = self.find(keys)
        for name in columns:
            values = self.columns.get(name)
            known = known & (False if values is None or not len(self) else ~values[rows].isnan().any(1))
        return known

    def merged(self, other: LogpsTable) -> LogpsTable:
        """Both tables' rows; where both know a value, the other's."""
        keys = torch.unique(torch.cat([self.keys, other.keys]), dim=0)
        columns = {}
        for name in dict.fromkeys([*self.columns, *other.columns]):
            columns[name] = torch.full((len(keys), 2), torch.nan, dtype=next(iter(other.columns.values())).dtype)
            for table in (self, other):
                rows, there = table.find(keys)
                if name in table.columns and len(table):
                    values = table.columns[name][rows].to(columns[name])
                    there = there & ~values.isnan().any(1)
                    columns[name] = torch.where(there[:, None], values, columns[name])
        return LogpsTable(keys, columns)
