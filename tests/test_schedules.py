"""The learning-rate schedule, step by step."""

import copy
import math

import pytest
import torch

from lit_dpo import WarmupDecay


def rates(total, steps=None, peak=1.0, **options):
    """The learning rate of every step of a run."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    schedule = WarmupDecay(optimizer, **options)
    schedule.bind(total)
    found = []
    for _ in range(steps or total):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def test_by_hand():
    linear = rates(7, warmup=3, decay="linear", peak=2.0)
    assert linear == pytest.approx([0.5, 1.0, 1.5, 2.0, 1.5, 1.0, 0.5])
    assert rates(6, warmup=2, decay="constant") == pytest.approx([1 / 3, 2 / 3, 1, 1, 1, 1])
    half = rates(4, warmup=0, decay="cosine", final=0.5)
    assert half == pytest.approx([0.5 + 0.25 * (1 + math.cos(math.pi * k / 4)) for k in range(4)])


def test_a_share_of_all_steps_is_rounded_up():
    assert rates(10, warmup=0.1) == rates(10, warmup=1)
    assert rates(11, warmup=0.1) == rates(11, warmup=2)


@pytest.mark.parametrize("decay", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup", [0, 0.1, 0.5, 5])
def test_it_rises_then_falls_and_every_step_moves(warmup, decay):
    found = rates(20, warmup=warmup, decay=decay)
    top = found.index(max(found))
    assert found[: top + 1] == sorted(found[: top + 1])
    assert found[top:] == sorted(found[top:], reverse=True)
    assert max(found) == 1.0
    assert min(found) > 0


def test_behind_the_end_it_stays():
    assert rates(4, steps=7, warmup=0, decay="linear", final=0.25)[4:] == [0.25] * 3


@pytest.mark.parametrize("total", [1, 2])
def test_the_shortest_runs_have_a_learning_rate(total):
    assert min(rates(total)) > 0


def test_its_state_continues():
    whole = rates(8, warmup=2)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = WarmupDecay(optimizer, warmup=2)
    schedule.bind(8)
    for _ in range(3):
        optimizer.step()
        schedule.step()
    states = copy.deepcopy((optimizer.state_dict(), schedule.state_dict()))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = WarmupDecay(optimizer, warmup=2)
    schedule.bind(8)
    optimizer.load_state_dict(states[0])
    schedule.load_state_dict(states[1])
    assert optimizer.param_groups[0]["lr"] == whole[3]
    optimizer.step()
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == whole[4]


@pytest.mark.parametrize(
    ("options", "name"), [({"warmup": -1}, "warmup"), ({"final": 1.5}, "final"), ({"decay": "cosin"}, "decay")]
)
def test_options_out_of_range(options, name):
    with pytest.raises(ValueError, match=f"`{name}` must be"):
        rates(3, **options)
