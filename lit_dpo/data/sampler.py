"""The batches of an epoch: which pairs share an optimizer step, and how it is cut."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import DistributedSampler

from lit_dpo.data.dataset import BatchPlan, PairDataset

_WINDOW = 16  # optimizer steps sorted by length together: long enough to group, short enough to stay shuffled


class PairSampler(DistributedSampler[BatchPlan]):
    """The batches of an epoch for one of several processes.

    Which pairs share an optimizer step depends on seed, epoch and the pairs per step alone, not on how these are cut
    into micro-batches or shared among processes. An incomplete last step is filled with pairs of weight zero, so that
    all processes make equally many equal batches. Its real pairs, as those of a step that `limit` cuts, are weighted
    so that the step is still the plain mean over them. Pairs of similar length share a step; the order of steps is
    random.

    (A subclass of `DistributedSampler`, because Lightning replaces any other sampler by its own.)

    Args:
        dataset: The pairs.
        rows: Row numbers to draw from.
        batch_size: Pairs of one process in one batch.
        shuffle: Random order, new in each epoch; otherwise long pairs come first.
        seed: Seed of the random order.
        accumulate: Batches per optimizer step.
        num_replicas: Number of processes.
        rank: Number of this process.
        limit: Batches of an epoch that will be asked for; `None` means all.

    Attributes:
        start: Batches of the next epoch to leave out at its beginning, to resume in its middle.
    """

    def __init__(
        self,
        dataset: PairDataset,
        rows: Tensor,
        batch_size: int,
        shuffle: bool = False,
        seed: int = 0,
        accumulate: int = 1,
        num_replicas: int = 1,
        rank: int = 0,
        limit: int | None = None,
    ) -> None:
        super().__init__(dataset, num_replicas, rank, shuffle, seed)
        self.rows, self.batch_size, self.accumulate, self.limit = rows, batch_size, accumulate, limit
        self.sizes = dataset.lengths.sum(1)
        self.start = 0

    def __len__(self) -> int:
        per_batch = self.batch_size * self.num_replicas
        full, rest = divmod(len(self.rows), per_batch * self.accumulate)
        return full * self.accumulate + -(-rest // per_batch)

    def __iter__(self) -> Iterator[BatchPlan]:
        left_out, self.start = self.start, 0
        steps, rest = divmod(left_out, self.accumulate)
        numbered = itertools.islice(enumerate(self.steps()), steps, None)
        plans = (plan for number, step in numbered for plan in self._share(step.tolist(), number))
        yield from itertools.islice(plans, rest, None)

    def steps(self) -> list[Tensor]:
        """Row numbers of each optimizer step of this epoch, over all processes, shape `(pairs,)`."""
        per_step = self.batch_size * self.num_replicas * self.accumulate
        if not self.shuffle:
            return self._chunks(self._by_length(self.rows), per_step)
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = self.rows[torch.randperm(len(self.rows), generator=generator)]
        full = len(order) // per_step * per_step
        windows = order[:full].split(_WINDOW * per_step) if full else ()
        steps = [step for window in windows for step in self._chunks(self._by_length(window), per_step)]
        steps = [steps[i] for i in torch.randperm(len(steps), generator=generator)]
        return steps + self._chunks(self._by_length(order[full:]), per_step)

    def _by_length(self, rows: Tensor) -> Tensor:
        return rows[self.sizes[rows].argsort(descending=True, stable=True)]

    @staticmethod
    def _chunks(rows: Tensor, size: int) -> list[Tensor]:
        return list(rows.split(size)) if len(rows) else []

    def _share(self, step: list[int], number: int) -> Iterator[BatchPlan]:
        """This process's batches of the n-th optimizer step: equally many pairs and nearly as many tokens in each."""
        batches = -(-len(step) // (self.batch_size * self.num_replicas))
        slots = batches * self.num_replicas
        size = -(-len(step) // slots)
        # Long pairs come first, so dealing to and fro, like cards, balances the tokens.
        starts = range(0, slots * size, slots)
        dealt = [[n + (slots - 1 - slot if n // slots % 2 else slot) for n in starts] for slot in range(slots)]
        used = slots if self.limit is None else min(slots, (self.limit - number * self.accumulate) * self.num_replicas)
        real = sum(place < len(step) for places in dealt[: max(0, used)] for place in places)
        weight = size * self.accumulate * self.num_replicas / max(1, real)
        rows = step + [step[-1]] * (slots * size - len(step))  # fillers at the end
        weights = [weight] * len(step) + [0.0] * (len(rows) - len(step))
        for places in dealt[self.rank :: self.num_replicas]:
            mine = [weights[place] for place in places]
            yield BatchPlan([rows[place] for place in places], None if set(mine) == {1.0} else mine)
