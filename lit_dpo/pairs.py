"""The two values everything else exchanges: a batch of pairs, and the log-probs of its completions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True)
class PairBatch:
    """A padding-free batch of preference pairs on one line of tokens, `[P C R][P C R]...`.

    The prompt of a pair stands once; the chosen and the rejected completion follow it as two branches. A token
    sees the earlier tokens of its own pair that are prompt or of its own branch, and positions restart at the
    prompt's end for the rejected branch, so the log-probs and gradients are those of separately encoded sequences.

    Args:
        input_ids: Token ids, shape `(tokens,)`, int64.
        position_ids: Positions, shape `(tokens,)`, int64.
        lengths: Tokens of prompt, chosen, rejected, shape `(batch, 3)`, each at least 1.
        row_ids: Index of each pair in its data set, shape `(batch,)`, int64.
        weights: Weight of each pair in the mean over pairs, shape `(batch,)`; `None` means 1. A pair of weight 0
            is a filler: it is scored, so that every process does equal work, and counts nowhere.
        shape: The rows of `lengths` as Python integers, read from `lengths` when left out. It travels with the
            batch so that no later step needs to wait for the device.
        columns: Numbers of the rows, each of shape `(batch,)`, float32, by the name of their column. One called
            `weight` multiplies the loss of its pair.
        scored: Whether a token of a completion counts, shape `(tokens,)`, bool; `None` means that all do. One that
            does not, such as a tool's answer between two turns of the assistant, is seen by the tokens behind it.
        scored_shape: Scored tokens of chosen and rejected, as Python integers, read from `scored` when left out.

    Raises:
        ValueError: A column has not one number a pair, or a completion has no scored token.
    """

    input_ids: Tensor
    position_ids: Tensor
    lengths: Tensor
    row_ids: Tensor
    weights: Tensor | None = None
    shape: tuple[tuple[int, int, int], ...] = ()
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    scored: Tensor | None = None
    scored_shape: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        if not self.shape:
            object.__setattr__(self, "shape", tuple((p, c, r) for p, c, r in self.lengths.tolist()))
        if not self.scored_shape:
            object.__setattr__(self, "scored_shape", self._count_scored())
        for name, column in self.columns.items():
            if column.shape != (len(self),):
                raise ValueError(
                    f"The column `{name}` must have one number for each of {len(self)} pairs, got a tensor of shape "
                    f"{tuple(column.shape)}."
                )

    def __len__(self) -> int:
        return len(self.shape)

    @classmethod
    def from_lists(
        cls,
        pairs: Sequence[tuple[Sequence[int], Sequence[int], Sequence[int]]],
        row_ids: Sequence[int] | None = None,
        weights: Sequence[float] | None = None,
        columns: Mapping[str, Sequence[float]] | None = None,
    ) -> PairBatch:
        """Lay out token-id lists `(prompt, chosen, rejected)` as one flat batch.

        A token of a completion that is not scored stands as `~id`, which is negative: `~5` is token 5 as context.

        Raises:
            ValueError: A prompt or completion is empty, there is no pair at all, or a column has not one number a pair.

        >>> batch = PairBatch.from_lists([([1, 2], [3, 4], [5])])
        >>> batch.input_ids.tolist(), batch.position_ids.tolist()
        ([1, 2, 3, 4, 5], [0, 1, 2, 3, 2])
        >>> batch.sources.tolist(), batch.targets.tolist(), batch.sequences.tolist()
        ([1, 2, 1], [3, 4, 5], [0, 0, 1])
        """
        if not pairs or not all(segment for pair in pairs for segment in pair):
            raise ValueError("A batch needs at least one pair, and each prompt and completion at least one token.")
        return cls.from_tokens(
            torch.tensor([i for pair in pairs for segment in pair for i in segment]),
            torch.tensor([[len(segment) for segment in pair] for pair in pairs]),
            torch.arange(len(pairs)) if row_ids is None else torch.tensor(row_ids),
            None if weights is None else torch.tensor(weights),
            {name: torch.tensor(column, dtype=torch.float32) for name, column in (columns or {}).items()},
        )

    @classmethod
    def from_tokens(
        cls,
        input_ids: Tensor,
        lengths: Tensor,
        row_ids: Tensor,
        weights: Tensor | None = None,
        columns: Mapping[str, Tensor] | None = None,
    ) -> PairBatch:
        """A batch from its line of tokens, which lies in the host's memory; see the class for shapes.

        As in `from_lists`, a token that is not scored stands as `~id`.

        >>> batch = PairBatch.from_tokens(torch.tensor([1, 2, 3, 4, 5]), torch.tensor([[2, 2, 1]]), torch.tensor([7]))
        >>> batch.position_ids
        tensor([0, 1, 2, 3, 2])
        """
        total = lengths.sum(1)
        place = torch.arange(len(input_ids)) - (total.cumsum(0) - total).repeat_interleave(total)
        chosen = lengths[:, 1].repeat_interleave(total)
        rejected_start = (lengths[:, 0] + lengths[:, 1]).repeat_interleave(total)
        position_ids = place - torch.where(place >= rejected_start, chosen, 0)
        input_ids, scored = input_ids.long(), None
        if bool((input_ids < 0).any()):
            is_completion = place >= lengths[:, 0].repeat_interleave(total)
            scored = (input_ids >= 0) & is_completion
            input_ids = torch.where(input_ids < 0, ~input_ids, input_ids)
        return cls(input_ids, position_ids, lengths, row_ids, weights, columns=columns or {}, scored=scored)

    def _count_scored(self) -> tuple[tuple[int, int], ...]:
        if self.scored is None:
            return tuple((c, r) for _, c, r in self.shape)
        sides = self.scored.split([size for pair in self.shape for size in pair])
        counts = tuple((int(c.sum()), int(r.sum())) for c, r in zip(sides[1::3], sides[2::3], strict=True))
        if not all(c and r for c, r in counts):
            raise ValueError("Each completion needs at least one scored token: give one, or leave the pair out.")
        return counts

    def to(self, device: torch.device | str, non_blocking: bool = True) -> PairBatch:
        """The same batch on another device; asynchronous from pinned memory."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PairBatch:
        """The same batch in page-locked host memory (called by a `DataLoader` with `pin_memory=True`)."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, function: object) -> PairBatch:
        assert callable(function)
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        columns = {name: function(column) for name, column in self.columns.items()}
        return replace(self, columns=columns, **{k: function(v) for k, v in values.items() if isinstance(v, Tensor)})

    def split(self, max_tokens: int) -> list[PairBatch]:
        """The same pairs in batches of at most so many tokens each, in their order; a longer pair stands alone.

        >>> batch = PairBatch.from_lists([([1], [2], [3]), ([4], [5], [6, 7]), ([8], [9], [0])])
        >>> [part.shape for part in batch.split(7)]
        [((1, 1, 1), (1, 1, 2)), ((1, 1, 1),)]
        """
        sizes = [sum(pair) for pair in self.shape]
        counts: list[int] = []  # of pairs
        held = 0
        for size in sizes:
            if counts and held + size <= max_tokens:
                counts[-1] += 1
                held += size
            else:
                counts.append(1)
                held = size
        if len(counts) == 1:
            return [self]
        shapes = [self.shape[end - count : end] for count, end in zip(counts, accumulate(counts), strict=True)]
        tokens = [sum(map(sum, shape)) for shape in shapes]
        weights = [None] * len(counts) if self.weights is None else self.weights.split(counts)
        cut = {name: column.split(counts) for name, column in self.columns.items()}
        parts = (
            self.input_ids.split(tokens),
            self.position_ids.split(tokens),
            self.lengths.split(counts),
            self.row_ids.split(counts),
            weights,
            shapes,
            [{name: columns[i] for name, columns in cut.items()} for i in range(len(counts))],
            [None] * len(counts) if self.scored is None else self.scored.split(tokens),
            [self.scored_shape[end - count : end] for count, end in zip(counts, accumulate(counts), strict=True)],
        )
        return [PairBatch(*values) for values in zip(*parts, strict=True)]

    @property
    def longest(self) -> int:
        """Tokens of the longest single sequence, prompt and one completion together."""
        return max(p + max(c, r) for p, c, r in self.shape)

    @property
    def completion_lengths(self) -> Tensor:
        """Scored tokens of the 2B completions in the order chosen 0, rejected 0, chosen 1, ..., shape (2B,)."""
        if self.scored is None:
            return self.lengths[:, 1:].flatten()
        ends = self.lengths.flatten().cumsum(0)  # (3B,)
        before = torch.cat([ends.new_zeros(1), self.scored.cumsum(0)])[torch.cat([ends.new_zeros(1), ends])]
        return before.diff().view(-1, 3)[:, 1:].flatten()

    @cached_property
    def sequences(self) -> Tensor:
        """Which of the 2B completions each scored token belongs to, shape (scored tokens,)."""
        counts = self.completion_lengths
        order = torch.arange(len(counts), device=counts.device)
        return order.repeat_interleave(counts, output_size=sum(map(sum, self.scored_shape)))

    @cached_property
    def _starts(self) -> Tensor:
        """Flat index of the first token of each of the 2B completions, shape (2B,)."""
        prompt, chosen, _ = self.lengths.unbind(1)
        total = self.lengths.sum(1)
        pair_start = total.cumsum(0) - total
        return torch.stack([pair_start + prompt, pair_start + prompt + chosen], dim=1).flatten()

    @cached_property
    def _within(self) -> Tensor:
        """Place of each scored token in its completion, from 0, shape (scored tokens,)."""
        return self._places - self._starts[self.sequences]

    @cached_property
    def _places(self) -> Tensor:
        """Flat index of each scored token, shape (scored tokens,)."""
        numbers = torch.arange(len(self.sequences), device=self.lengths.device)
        if self.scored is not None:  # the place of the n-th one; `nonzero` would wait for the device
            return torch.searchsorted(self.scored.cumsum(0), numbers + 1)
        counts = self.completion_lengths
        return numbers + (self._starts - (counts.cumsum(0) - counts))[self.sequences]

    @cached_property
    def targets(self) -> Tensor:
        """Token ids to predict: every scored token of a completion, shape (scored tokens,)."""
        return self.input_ids[self._places]

    @cached_property
    def sources(self) -> Tensor:
        """Flat index of the hidden state that predicts each target, shape (scored tokens,).

        For a completion's first token that is the prompt's last token, on both branches.
        """
        chosen = self.lengths[:, 1]
        jump = torch.stack([torch.zeros_like(chosen), chosen], dim=1).flatten()  # rejected steps over chosen
        return self._places - 1 - torch.where(self._within == 0, jump[self.sequences], 0)


@dataclass(frozen=True)
class PairLogps:
    """Log-probs of both completions of each pair, summed over the completion's tokens, in nats.

    Args:
        chosen: Log-prob of the chosen completion given the prompt, shape `(batch,)`, float32 or float64.
        rejected: The same for the rejected completion, shape `(batch,)`.
        chosen_tokens: Scored tokens, the end-of-sequence token included, shape `(batch,)`.
        rejected_tokens: The same for the rejected completion, shape `(batch,)`.
        layers: The same at intermediate decoder blocks, by 1-based block number.
        tokens: Log-prob of each single completion token, shape `(completion tokens,)`, in the order chosen 0,
            rejected 0, chosen 1, ...; the tokens of a completion add up to its sum. `None` unless asked for.
        columns: Numbers that came with the rows, each of shape `(batch,)`, by column name.
    """

    chosen: Tensor
    rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    layers: Mapping[int, PairLogps] = field(default_factory=dict)
    tokens: Tensor | None = None
    columns: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def cat(cls, parts: Sequence[PairLogps]) -> PairLogps:
        """The log-probs of several batches as those of one, in their order.

        Raises:
            ValueError: Some of the batches have log-probs of single tokens, and others have none.
        """
        tokens = [part.tokens for part in parts if part.tokens is not None]
        if tokens and len(tokens) < len(parts):
            raise ValueError(
                "Only some of these batches have log-probs of single tokens: score all with `per_token`, or none."
            )
        return cls(
            torch.cat([part.chosen for part in parts]),
            torch.cat([part.rejected for part in parts]),
            torch.cat([part.chosen_tokens for part in parts]),
            torch.cat([part.rejected_tokens for part in parts]),
            {layer: cls.cat([part.layers[layer] for part in parts]) for layer in parts[0].layers},
            torch.cat(tokens) if tokens else None,
            {name: torch.cat([part.columns[name] for part in parts]) for name in parts[0].columns},
        )

    @property
    def completion_lengths(self) -> Tensor:
        """Tokens of each of the 2B completions in the order chosen 0, rejected 0, chosen 1, ..., shape (2B,)."""
        return torch.stack([self.chosen_tokens, self.rejected_tokens], dim=1).flatten()

    def split_tokens(self) -> list[Tensor]:
        """Log-probs of the tokens of each of the 2B completions, in the order of `completion_lengths`.

        It waits for the device, which has to tell the lengths.

        Raises:
            ValueError: There are no log-probs of single tokens.

        >>> pair = PairLogps(*torch.tensor([[-3.0], [-4.0], [2.0], [1.0]]), tokens=torch.tensor([-1.0, -2.0, -4.0]))
        >>> [part.tolist() for part in pair.split_tokens()]
        [[-1.0, -2.0], [-4.0]]
        """
        if self.tokens is None:
            raise ValueError(
                "There are no log-probs of single tokens here: score the batch with `per_token`; a loss that reads "
                "them declares `needs_tokens = True`."
            )
        return list(self.tokens.split([int(n) for n in self.completion_lengths.tolist()]))

    @property
    def margin(self) -> Tensor:
        """`chosen - rejected`, shape (batch,)."""
        return self.chosen - self.rejected

    def per_token(self) -> PairLogps:
        """The same log-probs as means over the completion's tokens instead of sums.

        Log-probs of single tokens are divided alike, so that they still add up to their completion's value.
        """
        tokens = self.tokens
        if tokens is not None:
            counts = self.completion_lengths
            tokens = tokens / counts.repeat_interleave(counts.long(), output_size=len(tokens))
        return replace(
            self,
            chosen=self.chosen / self.chosen_tokens,
            rejected=self.rejected / self.rejected_tokens,
            layers={k: v.per_token() for k, v in self.layers.items()},
            tokens=tokens,
        )

    def detach(self) -> PairLogps:
        """The same values, cut off from the graph."""
        layers = {k: v.detach() for k, v in self.layers.items()}
        tokens = None if self.tokens is None else self.tokens.detach()
        return replace(self, chosen=self.chosen.detach(), rejected=self.rejected.detach(), layers=layers, tokens=tokens)

    def zeros(self) -> PairLogps:
        """Log-probs of zero for the same pairs: the reference of a loss that needs none."""
        layers = {k: v.zeros() for k, v in self.layers.items()}
        zero = torch.zeros_like(self.chosen)
        tokens = None if self.tokens is None else torch.zeros_like(self.tokens)
        return replace(self, chosen=zero, rejected=zero, layers=layers, tokens=tokens)
