"""Ordered partitions: every row in exactly one part."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lit_dpo import BySource, EasyToHard, HardToEasy, OneShot, RandomSplit

SOURCES = ["b", "a", "b", "c", "a", "b"]


def lists(parts):
    return [part.tolist() for part in parts]


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
    parts = lists(partition.split(sources, torch.tensor(margins)))
    assert sorted(row for part in parts for row in part) == list(range(len(pool)))
    assert all(parts)


def test_one_shot_is_one_part():
    assert lists(OneShot().split(SOURCES)) == [[0, 1, 2, 3, 4, 5]]


def test_by_source_keeps_the_order_given_to_the_data_module_unless_told_otherwise():
    assert lists(BySource().split(SOURCES)) == [[0, 2, 5], [1, 4], [3]]
    assert lists(BySource(order=["c", "a", "b"]).split(SOURCES)) == [[3], [1, 4], [0, 2, 5]]


@pytest.mark.parametrize("order", [["a", "b"], ["a", "b", "d"], ["a", "b", "c", "c"]])
def test_by_source_wants_every_source_once(order):
    with pytest.raises(ValueError, match=rf"`order` names {', '.join(order)}, but the data have the sources b, a, c"):
        BySource(order=order).split(SOURCES)


def test_random_parts_are_equal_and_drawn_by_seed():
    parts = lists(RandomSplit(parts=4, seed=1).split(["x"] * 10))
    assert [len(part) for part in parts] == [3, 3, 2, 2]
    assert parts == lists(RandomSplit(parts=4, seed=1).split(["x"] * 10))
    assert parts != lists(RandomSplit(parts=4, seed=2).split(["x"] * 10))


def test_easy_to_hard_orders_sources_by_accuracy():
    # b is right in 1 of 3 (its mean margin is the largest, though), a in 1 of 2, c in 1 of 1.
    margins = torch.tensor([90.0, -1.0, -1.0, 0.1, 2.0, -3.0])
    assert lists(EasyToHard().split(SOURCES, margins)) == [[3], [1, 4], [0, 2, 5]]


def test_easy_to_hard_counts_a_tie_as_wrong_and_keeps_the_order_of_equals():
    assert lists(EasyToHard().split(["b", "a"], torch.tensor([0.0, 1.0]))) == [[1], [0]]
    assert lists(EasyToHard().split(["b", "a"], torch.tensor([2.0, 1.0]))) == [[0], [1]]


def test_easy_to_hard_cuts_the_pool_by_margin():
    margins = torch.tensor([0.5, -2.0, 3.0, 0.0, 7.0])
    assert lists(EasyToHard(parts=2).split(["x"] * 5, margins)) == [[0, 2, 4], [1, 3]]


def test_easy_to_hard_needs_margins():
    assert EasyToHard.needs_margins
    with pytest.raises(ValueError, match="needs the starting model's margins: run it through `fit_stepwise`"):
        EasyToHard().split(SOURCES)


@pytest.mark.parametrize("kind", [RandomSplit, EasyToHard])
def test_numbers_of_parts(kind):
    with pytest.raises(ValueError, match="`parts` must be at least 1, got 0"):
        kind(parts=0)
    with pytest.raises(ValueError, match="`parts` is 7, but there are only 6 pairs"):
        kind(parts=7).split(SOURCES, torch.zeros(6))


def test_hard_to_easy_begins_with_the_lowest_margins():
    margins = torch.tensor([4.0, -1.0, 3.0, -2.0, 1.0, 0.5])
    assert lists(HardToEasy(parts=3).split(["x"] * 6, margins)) == [[1, 3], [4, 5], [0, 2]]
    accuracies = torch.tensor([90.0, -1.0, -1.0, 0.1, 2.0, -3.0])  # b 1 of 3, a 1 of 2, c 1 of 1
    assert lists(HardToEasy().split(SOURCES, accuracies)) == [[0, 2, 5], [1, 4], [3]]
    assert HardToEasy.needs_margins
    with pytest.raises(ValueError, match="`HardToEasy` needs the starting model's margins: run it"):
        HardToEasy().split(["x"])
