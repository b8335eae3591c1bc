"""Metrics of a pair, against values worked out by hand, and their mean, whatever the batches."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_dpo import DPOLoss, IntermediateLoss, PairLogps, SFTLoss, WeightedLoss
from lit_dpo.metrics import PairMeans, pair_metrics

# Four pairs: better on both sides, worse on both, exactly tied, and right in order although both fell.
POLICY = [[-8.0, -12.0, -10.0, -11.0], [-25.0, -18.0, -20.0, -26.0]]
REFERENCE = [[-10.0, -10.0, -10.0, -10.0], [-20.0, -20.0, -20.0, -10.0]]


def logps(chosen, rejected, layers=None):
    chosen, rejected = torch.tensor(chosen), torch.tensor(rejected)
    return PairLogps(chosen, rejected, torch.full_like(chosen, 5), torch.full_like(chosen, 10), layers or {})


def measured(loss, policy, reference):
    return pair_metrics(loss, loss(policy, reference), policy, reference)


def test_values_by_hand():
    values = measured(DPOLoss(beta=0.5), logps(*POLICY), logps(*REFERENCE))
    assert {name: value.tolist() for name, value in values.items() if name != "loss"} == {
        "rewards/chosen": [1.0, -1.0, 0.0, -0.5],
        "rewards/rejected": [-2.5, 1.0, 0.0, -8.0],
        "rewards/margins": [3.5, -2.0, 0.0, 7.5],
        "rewards/accuracies": [1.0, 0.0, 0.5, 1.0],
        "rewards/ties": [0.0, 0.0, 1.0, 0.0],
        "logps/chosen": POLICY[0],
        "logps/rejected": POLICY[1],
        "displacement": [0.0, 1.0, 0.0, 1.0],
        "reference/margins": [10.0, 10.0, 10.0, 0.0],
        "reference/accuracies": [1.0, 1.0, 1.0, 0.5],
        "length/longer": [0.0, 0.0, 0.0, 0.0],
        "length/longer_won": [0.0, 0.0, 0.0, 0.0],
        "length/shorter": [1.0, 1.0, 1.0, 1.0],
        "length/shorter_won": [1.0, 0.0, 0.5, 1.0],
    }
    assert values["loss"].tolist() == pytest.approx([math.log1p(math.exp(-m)) for m in (3.5, -2.0, 0.0, 7.5)])


def test_a_loss_without_reference_has_no_metrics_of_one():
    policy = logps(*POLICY)
    values = measured(SFTLoss(), policy, policy.zeros())
    assert not any("reference" in name or name == "displacement" for name in values)
    assert values["rewards/chosen"].tolist() == POLICY[0]


def test_parts_of_a_loss_are_there_under_its_names():
    policy, reference = logps(*POLICY), logps(*REFERENCE)
    values = measured(WeightedLoss((DPOLoss(), SFTLoss()), (1.0, 2.0)), policy, reference)
    assert values["loss/sft"].tolist() == pytest.approx([1.6, 2.4, 2.0, 2.2])
    torch.testing.assert_close(values["loss"], values["loss/dpo"] + 2 * values["loss/sft"])

    policy, reference = logps(*POLICY, {1: logps(*REFERENCE)}), logps(*REFERENCE, {1: logps(*REFERENCE)})
    values = measured(IntermediateLoss(layers=(1,)), policy, reference)
    assert values["loss/layers"].tolist() == pytest.approx([math.log(2)] * 4)


def test_nothing_holds_a_graph():
    policy, reference = logps(*POLICY), logps(*REFERENCE)
    policy.chosen.requires_grad_()
    loss = WeightedLoss((DPOLoss(), SFTLoss()))
    assert not any(value.requires_grad for value in measured(loss, policy, reference).values())


def test_a_nan_is_neither_right_nor_wrong():
    values = measured(DPOLoss(), logps([math.nan], [-1.0]), logps([-1.0], [-1.0]))
    assert math.isnan(values["rewards/accuracies"].item())
    assert values["rewards/ties"].item() == 0


@settings(max_examples=100)
@given(st.lists(st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=5), min_size=1, max_size=6))
def test_means_do_not_depend_on_the_batches(batches):
    flat = [value for batch in batches for value in batch]
    means = PairMeans()
    for batch in batches:
        means.update({"a": torch.tensor(batch), "b": -torch.tensor(batch)})
    expected = math.fsum(flat) / len(flat)
    values = means.compute()
    assert values["a"].item() == pytest.approx(expected, rel=1e-6, abs=1e-9)
    assert values["b"].item() == -values["a"].item()


def test_a_filler_counts_nowhere_and_a_weight_is_no_count():
    means = PairMeans()
    means.update({"a": torch.tensor([1.0, 2.0])}, weights=torch.tensor([4.0, 0.5]))
    means.update({"a": torch.tensor([6.0, math.nan])}, weights=torch.tensor([1.0, 0.0]))
    assert means.compute()["a"].item() == 3.0


def test_a_million_pairs_lose_no_digit():
    means = PairMeans()
    for _ in range(1000):
        means.update({"a": torch.full((1000,), 0.1)})
    assert means.compute()["a"].item() == torch.tensor(0.1).item()


def test_reset_forgets():
    means = PairMeans()
    means.update({"a": torch.tensor([1.0])})
    means.reset()
    means.update({"b": torch.tensor([2.0, 4.0])})
    assert {name: value.item() for name, value in means.compute().items()} == {"b": 3.0}
    assert means.state_dict() == {}
