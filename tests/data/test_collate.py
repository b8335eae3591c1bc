"""The order of an epoch: every pair once, the same optimizer steps however they are cut up, plain means."""

import itertools
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from lit_dpo.data.dataset import BatchPlan, PairDataset
from lit_dpo.data.encode import Encoded
from lit_dpo.data.load import EncodedRow
from lit_dpo.data.sampler import PairSampler


def dataset(lengths):
    """A pair for each length, with tokens that tell where they belong."""
    rows = [
        EncodedRow(
            Encoded([10 * i] * n, [10 * i + 1] * (n + 1), [10 * i + 2]), source=f"s{i % 2}", row=f"file.jsonl:{i + 1}"
        )
        for i, n in enumerate(lengths)
    ]
    return PairDataset(rows)


def plans(data, rows=None, batch_size=2, world=1, accumulate=1, epoch=0, **options):
    """The plans of an epoch: one list a process."""
    rows = torch.arange(len(data)) if rows is None else torch.tensor(rows, dtype=torch.int64)
    samplers = [
        PairSampler(data, rows, batch_size, accumulate=accumulate, num_replicas=world, rank=rank, **options)
        for rank in range(world)
    ]
    for sampler in samplers:
        sampler.set_epoch(epoch)
    found = [list(sampler) for sampler in samplers]
    assert [len(sampler) for sampler in samplers] == [len(part) for part in found]
    return found


def steps_of(plans, accumulate):
    """For each optimizer step, the batches of all processes."""
    rounds = list(zip(*plans, strict=True))  # one batch of each process; strict, as all must make equally many
    starts = range(0, len(rounds), accumulate)
    return [[plan for part in rounds[start : start + accumulate] for plan in part] for start in starts]


def real(plan):
    weights = plan.weights or [1.0] * len(plan.rows)
    return [row for row, weight in zip(plan.rows, weights, strict=True) if weight]


lengths = st.lists(st.integers(1, 9), min_size=1, max_size=40)
counts = st.integers(1, 4)


@given(lengths, counts, counts, counts, st.booleans(), st.integers(0, 3))
def test_every_pair_once_and_equal_batches_everywhere(lengths, batch_size, accumulate, world, shuffle, epoch):
    parts = plans(dataset(lengths), None, batch_size, world, accumulate, epoch, shuffle=shuffle)
    assert sorted(row for part in parts for plan in part for row in real(plan)) == list(range(len(lengths)))
    for together in zip(*parts, strict=True):
        assert len({len(plan.rows) for plan in together}) == 1
        assert len(together[0].rows) <= batch_size


@given(lengths, st.sampled_from([1, 2, 4, 6, 8, 12]), st.booleans(), st.integers(0, 3))
def test_the_same_steps_however_they_are_cut(lengths, per_step, shuffle, epoch):
    data, seen = dataset(lengths), set()
    for batch_size, accumulate, world in itertools.product(range(1, per_step + 1), repeat=3):
        if batch_size * accumulate * world == per_step:
            parts = plans(data, None, batch_size, world, accumulate, epoch, shuffle=shuffle)
            steps = steps_of(parts, accumulate)
            seen.add(tuple(tuple(sorted(row for plan in step for row in real(plan))) for step in steps))
    assert len(seen) == 1


@given(lengths, counts, counts, counts, st.booleans())
def test_a_step_is_the_plain_mean_over_its_pairs(lengths, batch_size, accumulate, world, shuffle):
    """Lightning divides by A whatever happens, DDP by W, and the module takes the mean over a batch's slots."""
    losses = [Fraction(i * i + 1) for i in range(len(lengths))]
    parts = plans(dataset(lengths), None, batch_size, world, accumulate, shuffle=shuffle)
    for step in steps_of(parts, accumulate):
        total = Fraction(0)
        for plan in step:
            weights = plan.weights or [1.0] * len(plan.rows)
            terms = [Fraction(weight) * losses[row] for row, weight in zip(plan.rows, weights, strict=True)]
            total += sum(terms) / len(terms) / accumulate / world
        expected = [losses[row] for plan in step for row in real(plan)]
        assert float(total) == pytest.approx(float(sum(expected) / len(expected)), rel=1e-12)


def test_full_steps_have_no_weights_and_the_last_has_fillers():
    # 7 pairs, 2 x 2 a step: a full step, then one of three pairs in four slots.
    first, second = plans(dataset([5] * 7), batch_size=2, world=2)
    assert first == [BatchPlan([0, 3]), BatchPlan([4, 6], [4 / 3, 0.0])]
    assert second == [BatchPlan([1, 2]), BatchPlan([5, 6], [4 / 3, 4 / 3])]


def test_the_batches_of_a_step_hold_nearly_equally_many_tokens():
    # Lengths 8 ... 1 dealt to two processes: 8 + 5 + 4 + 1 and 7 + 6 + 3 + 2 are 18 each.
    data = dataset(range(1, 9))
    first, second = plans(data, batch_size=4, world=2)
    tokens = [sum(int(data.lengths[row].sum()) for row in plan.rows) for [plan] in (first, second)]
    assert tokens[0] == tokens[1]


def test_an_incomplete_step_takes_no_more_batches_than_it_needs():
    # 9 pairs, 2 x 4 a step: the last step is one batch of one pair, which Lightning still divides by 4.
    [part] = plans(dataset([5] * 9), batch_size=2, accumulate=4)
    assert part[4:] == [BatchPlan([8], [4.0])]


def test_order_is_new_each_epoch_and_the_same_again_for_the_same_seed():
    data = dataset(range(1, 33))
    epochs = [plans(data, shuffle=True, epoch=epoch) for epoch in range(4)]
    assert len({str(epoch) for epoch in epochs}) == 4
    assert plans(data, shuffle=True, epoch=2) == epochs[2]
    assert plans(data, shuffle=True, seed=5, epoch=0) != epochs[0]
    assert plans(data, shuffle=False, epoch=1) == plans(data, shuffle=False, epoch=0)


def test_pairs_of_similar_length_share_a_step_and_steps_come_in_random_order():
    data = dataset([1 + i % 8 for i in range(64)])
    [part] = plans(data, batch_size=8, shuffle=True)
    sizes = [{int(data.lengths[row, 0]) for row in plan.rows} for plan in part]
    assert all(len(size) == 1 for size in sizes)
    order = [min(size) for size in sizes]
    assert order != sorted(order)
    assert order != sorted(order, reverse=True)


def test_evaluation_goes_from_long_to_short():
    [part] = plans(dataset([3, 9, 1, 9, 5]), batch_size=2)
    assert [plan.rows for plan in part] == [[1, 3], [4, 0], [2]]


def test_only_the_given_rows_are_drawn():
    [part] = plans(dataset([3] * 10), rows=[7, 2, 5], batch_size=2, shuffle=True)
    assert sorted(row for plan in part for row in real(plan)) == [2, 5, 7]


def test_no_rows_make_no_batches():
    assert plans(dataset([3]), rows=[], batch_size=2, world=2, shuffle=True) == [[], []]


def test_a_plan_becomes_a_batch():
    batch = dataset([2, 1, 3])[BatchPlan([2, 0], [1.5, 0.0])]
    assert batch.input_ids.tolist() == [20] * 3 + [21] * 4 + [22] + [0] * 2 + [1] * 3 + [2]
    assert batch.shape == ((3, 4, 1), (2, 3, 1))
    assert batch.row_ids.tolist() == [2, 0]
    assert batch.weights.tolist() == [1.5, 0.0]
    assert batch.input_ids.dtype == torch.int64


def test_workers_bring_the_same_batches_in_the_same_order():
    data = dataset(range(1, 12))

    def batches(workers):
        sampler = PairSampler(data, torch.arange(11), 4, shuffle=True)
        return list(DataLoader(data, batch_size=None, sampler=sampler, num_workers=workers))

    for alone, helped in zip(batches(0), batches(2), strict=True):
        assert torch.equal(alone.input_ids, helped.input_ids)
        assert alone.row_ids.tolist() == helped.row_ids.tolist()
        assert alone.shape == helped.shape


@given(lengths, counts, counts, counts, st.integers(1, 30), st.integers(0, 5))
def test_a_step_that_a_limit_cuts_is_the_plain_mean_over_what_is_left_of_it(
    lengths, batch_size, accumulate, world, limit, start
):
    """And a pass that begins in its middle has the same weights."""
    data, options = dataset(lengths), {"shuffle": True, "limit": limit}
    parts = [part[:limit] for part in plans(data, None, batch_size, world, accumulate, **options)]
    for step in steps_of(parts, accumulate):
        # What the Trainer makes of it: a mean over each batch, a sum over batches divided by `accumulate`, a mean over
        # processes. Every pair has to count the same, and all of them together 1.
        shares = [
            Fraction(weight) / (len(plan.rows) * accumulate * world)
            for plan in step
            for weight in plan.weights or [1.0] * len(plan.rows)
        ]
        count = sum(share != 0 for share in shares)
        assert all(float(share) == pytest.approx(1 / count) for share in shares if share)
    for rank, part in enumerate(parts):
        sampler = PairSampler(
            data, torch.arange(len(data)), batch_size, True, 0, accumulate, num_replicas=world, rank=rank, limit=limit
        )
        sampler.start = start
        assert list(sampler)[: max(0, limit - start)] == part[start:]
