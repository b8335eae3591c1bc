"""Reference log-probs as a table: which rows, and who scored them.

An entry belongs to a row by its *content*, so row order, subsets and partitions do not matter, and a changed row
misses. A `TensorStore` holds one table for each scorer, named by weights, configuration and numerics.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from lit_dpo.pairs import PairBatch

_BLOCK = 1 << 20
_TOKENS, _COUNTS = "tokens.", "counts."  # names of stored tensors begin so


def content_keys(batch: PairBatch) -> Tensor:
    """A 128-bit hash of each pair's token ids, boundaries and scored tokens, shape `(batch, 2)` int64.

    Computed with tensor operations on the batch's device, without waiting for it.
    """
    total = batch.lengths.sum(1)
    pair = torch.arange(len(batch), device=total.device).repeat_interleave(total, output_size=len(batch.input_ids))
    place = torch.arange(len(pair), device=pair.device) - (total.cumsum(0) - total)[pair]
    prompt, chosen, _ = batch.lengths[pair].unbind(1)
    segment = (place >= prompt).long() + (place >= prompt + chosen)
    ids = batch.input_ids
    if batch.scored is not None:  # a token that is not scored counts as another one
        ids = torch.where(batch.scored | (segment == 0), ids, ~ids - 1)
    keys = []
    for seed in (1, 2):
        terms = (ids + 1) * (_mix(place * 4 + segment + (seed << 40)) | 1)
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


class TokenLogps(NamedTuple):
    """Log-probs of single tokens, as many a row as its completions have.

    Args:
        values: Those of all rows one after the other, shape `(tokens,)`.
        counts: How many each row has, shape `(rows,)` int64; 0 where they are not known.
    """

    values: Tensor
    counts: Tensor

    def take(self, rows: Tensor) -> TokenLogps:
        """Those of some rows, in their order."""
        counts = self.counts[rows]
        starts = self.counts.cumsum(0) - self.counts
        places = torch.arange(int(counts.sum()), device=rows.device)
        shift = starts[rows] - (counts.cumsum(0) - counts)
        return TokenLogps(self.values[places + shift.repeat_interleave(counts)], counts)

    def of_batch(self, rows: Tensor, there: Tensor, batch: PairBatch) -> Tensor:
        """Those of a batch's completion tokens; NaN where they are not known. It does not wait for the device.

        Args:
            rows: Row number of each pair, shape `(batch,)`.
            there: Whether it is that pair's row, shape `(batch,)`.
            batch: B pairs.
        """
        counts = batch.completion_lengths.view(-1, 2).sum(1)
        pairs = batch.sequences // 2  # of each token
        places = torch.arange(len(pairs), device=rows.device)
        starts = self.counts.cumsum(0) - self.counts
        places = (places + (starts[rows] - (counts.cumsum(0) - counts))[pairs]).clamp(max=len(self.values) - 1)
        known = there & (self.counts[rows] == counts)
        return torch.where(known[pairs], self.values[places], torch.nan)


class LogpsTable:
    """Log-probs of rows by content key, for the last layer and intermediate ones.

    Args:
        keys: Content keys, shape `(rows, 2)` int64.
        columns: `last` and `layer.K` -> log-probs of chosen and rejected, shape `(rows, 2)`; NaN where not known.
        tokens: The same names -> log-probs of single tokens, where these were asked for.
    """

    def __init__(
        self, keys: Tensor, columns: Mapping[str, Tensor], tokens: Mapping[str, TokenLogps] | None = None
    ) -> None:
        order = keys[:, 0].argsort(stable=True)
        self.keys = keys[order]
        self.columns = {name: values[order] for name, values in columns.items()}
        self.tokens = {name: values.take(order) for name, values in (tokens or {}).items()}
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
        names = [name.removeprefix(_COUNTS) for name in tensors if name.startswith(_COUNTS)]
        tokens = {name: TokenLogps(tensors[_TOKENS + name], tensors[_COUNTS + name]) for name in names}
        columns = {name: v for name, v in tensors.items() if name != "keys" and not name.startswith((_TOKENS, _COUNTS))}
        return cls(tensors["keys"], columns, tokens)

    @staticmethod
    def problem(tensors: Mapping[str, Tensor]) -> str | None:
        """Why these are not what `tensors` writes, if they are not."""
        keys = tensors.get("keys")
        if keys is None or keys.dtype != torch.int64 or keys.shape[1:] != (2,):
            return "it has no keys of rows"
        columns = {name: v for name, v in tensors.items() if name != "keys" and not name.startswith((_TOKENS, _COUNTS))}
        if not columns or any(v.shape != keys.shape or not v.is_floating_point() for v in columns.values()):
            return "its columns do not fit its keys"
        if {name.removeprefix(_TOKENS).removeprefix(_COUNTS) for name in tensors} - {"keys", *columns}:
            return "it has tokens of a layer that it does not have"
        for name in columns:
            values, counts = tensors.get(_TOKENS + name), tensors.get(_COUNTS + name)
            if values is None and counts is None:
                continue
            if (
                values is None
                or counts is None
                or not values.is_floating_point()
                or counts.dtype != torch.int64
                or counts.shape != keys.shape[:1]
                or values.shape != (int(counts.sum()),)
                or bool((counts < 0).any())
            ):
                return "its tokens do not fit its keys"
        return None

    def tensors(self) -> dict[str, Tensor]:
        """Everything in it, to be stored."""
        tokens = {_TOKENS + name: found.values for name, found in self.tokens.items()}
        counts = {_COUNTS + name: found.counts for name, found in self.tokens.items()}
        return {"keys": self.keys, **self.columns, **tokens, **counts}

    def to(self, device: torch.device) -> LogpsTable:
        """The same table on another device."""
        tokens = {name: TokenLogps(*(v.to(device) for v in found)) for name, found in self.tokens.items()}
        return LogpsTable(self.keys.to(device), {name: v.to(device) for name, v in self.columns.items()}, tokens)

    def find(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Row numbers of keys, shape `(n,)`, and whether each is really there, shape `(n,)`."""
        if not len(self):
            return keys[:, 0] * 0, keys[:, 0] != keys[:, 0]
        rows = torch.searchsorted(self._first, keys[:, 0].contiguous()).clamp(max=len(self) - 1)
        return rows, (self.keys[rows] == keys).all(1)

    def known(self, keys: Tensor, columns: Iterable[str], per_token: bool = False) -> Tensor:
        """Whether every one of these columns is known for each key, and with `per_token` its tokens; shape `(n,)`."""
        rows, known = self.find(keys)
        for name in columns:
            values, tokens = self.columns.get(name), self.tokens.get(name)
            known = known & (False if values is None or not len(self) else ~values[rows].isnan().any(1))
            if per_token:
                known = known & (False if tokens is None or not len(self) else tokens.counts[rows] > 0)
        return known

    def merged(self, other: LogpsTable) -> LogpsTable:
        """Both tables' rows; where both know a value, the other's."""
        keys = torch.unique(torch.cat([self.keys, other.keys]), dim=0)
        columns, tokens = {}, {}
        for name in dict.fromkeys([*self.columns, *other.columns]):
            columns[name] = torch.full((len(keys), 2), torch.nan, dtype=next(iter(other.columns.values())).dtype)
            for table in (self, other):
                rows, there = table.find(keys)
                if name in table.columns and len(table):
                    values = table.columns[name][rows].to(columns[name])
                    there = there & ~values.isnan().any(1)
                    columns[name] = torch.where(there[:, None], values, columns[name])
        for name in dict.fromkeys([*self.tokens, *other.tokens]):
            have = [table for table in (self, other) if name in table.tokens and len(table)]
            none = torch.zeros(1, dtype=torch.int64)  # one more row, without tokens
            every = TokenLogps(
                torch.cat([table.tokens[name].values.to(columns[name]) for table in have]),
                torch.cat([none, *(table.tokens[name].counts for table in have)]),
            )
            picked, before = torch.zeros(len(keys), dtype=torch.int64), 1
            for table in have:
                rows, there = table.find(keys)
                picked = torch.where(there & (table.tokens[name].counts[rows] > 0), before + rows, picked)
                before += len(table)
            tokens[name] = every.take(picked)
        return LogpsTable(keys, columns, tokens)


def joined(blocks: list[LogpsTable]) -> list[LogpsTable]:
    """Blocks as few tables, one for each set of columns; of equal keys the first counts."""
    kinds: dict[tuple[str, ...], list[LogpsTable]] = {}
    for block in blocks:
        kinds.setdefault((*block.columns, "tokens:", *block.tokens), []).append(block)
    found = []
    for same in kinds.values():
        unique, first = first_of_each(torch.cat([block.keys for block in same]))
        columns = {name: torch.cat([block.columns[name] for block in same])[first] for name in same[0].columns}
        tokens = {}
        for name in same[0].tokens:
            values, counts = (torch.cat(part) for part in zip(*(block.tokens[name] for block in same), strict=True))
            tokens[name] = TokenLogps(values, counts).take(first)
        found.append(LogpsTable(unique, columns, tokens))
    return found


def first_of_each(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct keys, shape `(n, 2)`, and where each stands first, shape `(n,)`."""
    unique, inverse = torch.unique(keys, dim=0, return_inverse=True)
    places = torch.full((len(unique),), len(keys)).scatter_reduce(0, inverse, torch.arange(len(keys)), "amin")
    return unique, places
