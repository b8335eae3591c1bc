"""Partitions, asked step by step: every row in exactly one step of those that are here."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lit_dpo import BySource, EasyToHard, HardToEasy, OneShot, Pool, RandomSplit

SOURCES = ["b", "a", "b", "c", "a", "b"]


def steps(partition, sources, margins=None):
    """What each step trains on, asked anew each time and in no order."""
    pool = Pool(sources, score=None if margins is None else lambda step: margins if step == 0 else 1 / 0)
    count = next(step for step in range(99) if partition.next(step, pool) is None)
    assert partition.next(count + 1, pool) is None
    return [partition.next(step, pool).tolist() for step in reversed(range(count))][::-1]


pools = st.lists(st.tuples(st.sampled_from("abc"), st.floats(-9, 9)), min_size=5, max_size=30)
partitions = st.one_of(
    st.builds(OneShot),
    st.builds(BySource),
    st.builds(RandomSplit, st.integers(1, 5), st.integers(0, 3)),
    st.builds(EasyToHard, st.one_of(st.none(), st.integers(1, 5))),
    st.builds(HardToEasy, st.one_of(st.none(), st.integers(1, 5))),
)


@given(pools, partitions)
def test_every_row_once_and_no_part_empty(pool, partition):
    sources, margins = zip(*pool, strict=True)
    parts = steps(partition, sources, torch.tensor(margins))
    assert sorted(row for part in parts for row in part) == list(range(len(pool)))
    assert all(parts)


def test_one_shot_is_one_part():
    assert steps(OneShot(), SOURCES) == [[0, 1, 2, 3, 4, 5]]


def test_by_source_keeps_the_order_given_to_the_data_module_unless_told_otherwise():
    assert steps(BySource(), SOURCES) == [[0, 2, 5], [1, 4], [3]]
    assert steps(BySource(order=["c", "a", "b"]), SOURCES) == [[3], [1, 4], [0, 2, 5]]


@pytest.mark.parametrize("order", [["a", "b"], ["a", "b", "d"], ["a", "b", "c", "c"]])
def test_by_source_wants_every_source_once(order):
    with pytest.raises(ValueError, match=rf"`order` names {', '.join(order)}, but the data have the sources b, a, c"):
        steps(BySource(order=order), SOURCES)


def test_random_parts_are_equal_and_drawn_by_seed():
    parts = steps(RandomSplit(parts=4, seed=1), ["x"] * 10)
    assert [len(part) for part in parts] == [3, 3, 2, 2]
    assert parts == steps(RandomSplit(parts=4, seed=1), ["x"] * 10)
    assert parts != steps(RandomSplit(parts=4, seed=2), ["x"] * 10)


def test_easy_to_hard_orders_sources_by_accuracy():
    # b is right in 1 of 3 (its mean margin is the largest, though), a in 1 of 2, c in 1 of 1.
    margins = torch.tensor([90.0, -1.0, -1.0, 0.1, 2.0, -3.0])
    assert steps(EasyToHard(), SOURCES, margins) == [[3], [1, 4], [0, 2, 5]]


def test_easy_to_hard_counts_a_tie_as_wrong_and_keeps_the_order_of_equals():
    assert steps(EasyToHard(), ["b", "a"], torch.tensor([0.0, 1.0])) == [[1], [0]]
    assert steps(EasyToHard(), ["b", "a"], torch.tensor([2.0, 1.0])) == [[0], [1]]


def test_easy_to_hard_cuts_the_pool_by_margin():
    margins = torch.tensor([0.5, -2.0, 3.0, 0.0, 7.0])
    assert steps(EasyToHard(parts=2), ["x"] * 5, margins) == [[0, 2, 4], [1, 3]]


@pytest.mark.parametrize("kind", [EasyToHard, HardToEasy])
def test_margins_need_a_policy(kind):
    with pytest.raises(ValueError, match="Margins need the policy that starts the step: run the partition through"):
        steps(kind(), SOURCES)


def test_a_pool_alone_has_neither_samples_nor_a_folder():
    with pytest.raises(ValueError, match="Samples need the policy that starts the step"):
        Pool(SOURCES).sample(["Hello"])
    with pytest.raises(ValueError, match="This pool has no folder: run the partition through `fit_stepwise`"):
        _ = Pool(SOURCES).folder


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 0}, "must be at least 1 and `temperature` at least 0, got 0, 256, 32 and 1.0"),
        ({"temperature": -1.0}, "`temperature` at least 0, got 1, 256, 32 and -1.0"),
        ({"temperature": 0.0, "samples": 2}, "At `temperature` 0 all samples are equal"),
    ],
)
def test_what_cannot_be_sampled(options, message):
    with pytest.raises(ValueError, match=message):
        Pool(SOURCES, generate=lambda *arguments: 1 / 0).sample(["Hello"], **options)


@pytest.mark.parametrize("kind", [RandomSplit, EasyToHard])
def test_numbers_of_parts(kind):
    with pytest.raises(ValueError, match="`parts` must be at least 1, got 0"):
        kind(parts=0)
    with pytest.raises(ValueError, match="`parts` is 7, but there are only 6 pairs"):
        steps(kind(parts=7), SOURCES)  # before a policy is asked


def test_hard_to_easy_begins_with_the_lowest_margins():
    margins = torch.tensor([4.0, -1.0, 3.0, -2.0, 1.0, 0.5])
    assert steps(HardToEasy(parts=3), ["x"] * 6, margins) == [[1, 3], [4, 5], [0, 2]]
    accuracies = torch.tensor([90.0, -1.0, -1.0, 0.1, 2.0, -3.0])  # b 1 of 3, a 1 of 2, c 1 of 1
    assert steps(HardToEasy(), SOURCES, accuracies) == [[0, 2, 5], [1, 4], [3]]
