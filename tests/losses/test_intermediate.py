import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lit_dpo import ADPOLoss, DPOLoss, DPOPLoss, IntermediateLoss, IPOLoss, ODPOLoss, SFTLoss
from tests.losses.values import logps, nats, neg_log_sigmoid, random_logps


def ratio(policy, reference, i):
    chosen = float(policy.chosen[i]) - float(reference.chosen[i])
    return chosen - (float(policy.rejected[i]) - float(reference.rejected[i]))


def slow_intermediate(policy, reference, beta, layers, weight, additive=False):
    """The formula over DPO in Python numbers, pair by pair."""
    values = []
    for i in range(len(policy.chosen)):
        last = neg_log_sigmoid(beta * ratio(policy, reference, i))
        between = 0.0
        for k in layers:
            between += neg_log_sigmoid(beta * ratio(policy.layers[k], reference.layers[k], i)) / len(layers)
        values.append((1.0 if additive else 1 - weight) * last + weight * between)
    return values


@pytest.mark.parametrize("layers", [(2,), (1, 2), (2, 5, 3)])
@pytest.mark.parametrize("weight", [0.3, 1.0])
@pytest.mark.parametrize("combine", ["convex", "additive"])
def test_agrees_with_the_formula(layers, weight, combine):
    policy, reference = (random_logps(seed, batch=20, layers=(1, 2, 3, 5)) for seed in (0, 1))
    loss = IntermediateLoss(DPOLoss(beta=0.2), layers, weight, combine)
    expected = slow_intermediate(policy, reference, 0.2, layers, weight, combine == "additive")
    assert loss(policy, reference).tolist() == pytest.approx(expected, rel=1e-12)


def test_by_hand():
    # Last layer: h = 20, 0.1 * 20 = 2, 0.1269280. Layer 1: h = 0, log 2 = 0.6931472. Layer 2: h = -20,
    # 0.1269280 + 2 = 2.1269280. Mean of the layers 1.4100376; 0.7 * 0.1269280 + 0.3 * 1.4100376 = 0.5118609.
    flat = logps(0.0, 0.0)
    policy = logps(20.0, 0.0, layers={1: flat, 2: logps(-20.0, 0.0)})
    reference = logps(0.0, 0.0, layers={1: flat, 2: flat})
    loss = IntermediateLoss(layers=(1, 2))
    assert loss(policy, reference).item() == pytest.approx(0.5118608865, abs=1e-9)
    # Added instead of mixed: 0.1269280 + 0.3 * 1.4100376 = 0.5499393
    added = IntermediateLoss(layers=(1, 2), combine="additive")
    assert added(policy, reference).item() == pytest.approx(0.5499392898, abs=1e-9)
    terms = loss.terms(policy, reference)
    assert {k: round(v.item(), 6) for k, v in terms.items()} == {"last": 0.126928, "layers": 1.410038}


def test_defaults_are_the_papers():
    loss = IntermediateLoss()
    assert (loss.base, loss.layers, loss.weight, loss.combine) == (DPOLoss(), (0.6875,), 0.3, "convex")
    assert not loss.detach_head


@pytest.mark.parametrize("base", [DPOLoss(), DPOLoss(label_smoothing=0.1), DPOPLoss()])
def test_log_2_where_policy_is_reference(base):
    start = random_logps(0)
    value = IntermediateLoss(base, layers=(1, 2))(start, start)
    assert value.tolist() == pytest.approx([math.log(2)] * 5, rel=1e-14)


@pytest.mark.parametrize("combine", ["convex", "additive"])
@pytest.mark.parametrize("base", [DPOLoss(), IPOLoss(), DPOPLoss(), SFTLoss()])
def test_weight_zero_is_the_base_exactly_and_looks_at_no_layer(base, combine):
    policy, reference = random_logps(0, layers=()), random_logps(1, layers=())
    loss = IntermediateLoss(base, layers=(1,), weight=0.0, combine=combine)
    assert torch.equal(loss(policy, reference), base(policy, reference))
    assert loss.terms(policy, reference) == {}


def test_weight_one_is_the_layer_exactly():
    policy, reference = random_logps(0), random_logps(1)
    value = IntermediateLoss(layers=(2,), weight=1.0)(policy, reference)
    assert torch.equal(value, DPOLoss()(policy.layers[2], reference.layers[2]))


def test_per_token_means_reach_the_layers():
    policy, reference = random_logps(0), random_logps(1)
    value = IntermediateLoss(IPOLoss(), layers=(2,), weight=1.0)(policy, reference)
    assert torch.equal(value, IPOLoss()(policy.layers[2], reference.layers[2]))


@given(values=st.tuples(*[nats] * 8), shifts=st.tuples(*[nats] * 4), weight=st.floats(0, 1))
def test_shifting_policy_and_reference_alike_changes_nothing(values, shifts, weight):
    def made(values, shifts):
        return logps(values[0] + shifts[0], values[1] + shifts[1], layers={1: logps(values[2] + shifts[2], values[3])})

    loss = IntermediateLoss(layers=(1,), weight=weight)
    plain = loss(made(values[:4], (0, 0, 0)), made(values[4:], (0, 0, 0)))
    assert torch.equal(loss(made(values[:4], shifts), made(values[4:], shifts)), plain)


@pytest.mark.parametrize(
    ("layers", "blocks", "expected"),
    [
        ((0.6875,), 32, (22,)),  # the paper's layer
        ((22,), 32, (22,)),
        ((0.6875,), 3, (2,)),  # 2.06
        ((1,), 32, (1,)),  # the first block ...
        ((1.0,), 32, (32,)),  # ... and the full depth
        ((0.001,), 32, (1,)),
        ((22.0,), 32, (22,)),
        ((0.25, 0.5, 0.75), 8, (2, 4, 6)),
        ((0.5, 4, 0.45), 8, (4,)),  # one block named three times counts once
        ((3, 1), 3, (3, 1)),
    ],
)
def test_depths_become_block_numbers(layers, blocks, expected):
    resolved = IntermediateLoss(layers=layers).resolve(blocks)
    assert resolved.layers == expected
    assert all(type(layer) is int for layer in resolved.layers)
    assert resolved.resolve(blocks) == resolved


@pytest.mark.parametrize("layer", [0, -1, 33, 1.5, 0.0, -0.5])
def test_a_layer_outside_the_decoder_is_refused_with_the_number_of_blocks(layer):
    with pytest.raises(ValueError, match=rf"`layers` holds {layer}, but the decoder has 32 blocks: .* from 1 to 32"):
        IntermediateLoss(layers=(layer,)).resolve(32)


def test_options_are_checked():
    with pytest.raises(ValueError, match=r"^`layers` must be at least one block number or depth, got \(\)\.$"):
        IntermediateLoss(layers=())
    with pytest.raises(ValueError, match=r"^`weight` must be in \[0, 1\], got 1\.5\.$"):
        IntermediateLoss(weight=1.5)
    with pytest.raises(ValueError, match=r"^`weight` must be at least 0, got -0\.1\.$"):
        IntermediateLoss(weight=-0.1, combine="additive")
    with pytest.raises(ValueError, match=r"^`combine` must be `convex` or `additive`, got sum\.$"):
        IntermediateLoss(combine="sum")
    with pytest.raises(ValueError, match=r"^`base` must be a loss without intermediate layers of its own, got "):
        IntermediateLoss(base=IntermediateLoss())
    assert IntermediateLoss(weight=1.5, combine="additive").weight == 1.5


def test_beta_and_need_of_a_reference_are_those_of_the_base():
    assert IntermediateLoss(DPOLoss(beta=0.4)).beta == 0.4
    assert IntermediateLoss(DPOLoss()).needs_reference
    assert not IntermediateLoss(SFTLoss()).needs_reference


def test_lists_as_read_from_yaml_become_tuples():
    assert IntermediateLoss(layers=[1, 2]) == IntermediateLoss(layers=(1, 2))


def test_needs_what_its_base_needs():
    assert IntermediateLoss(ADPOLoss()).needs_tokens
    assert not IntermediateLoss(DPOLoss()).needs_tokens
    assert IntermediateLoss(ODPOLoss()).columns == ("score_chosen", "score_rejected")
    assert IntermediateLoss(DPOLoss()).columns == ()


def test_formula_is_that_of_the_base_at_each_layer():
    base = "-logsigmoid(0.1 * (r_w - r_l))"
    loss = IntermediateLoss(layers=(22, 24))
    assert loss.formula() == f"0.7 * ({base}) + 0.3 * (mean over layers 22, 24 of {base})"
    added = IntermediateLoss(layers=(0.5,), combine="additive", weight=2.0)
    assert added.formula() == f"1.0 * ({base}) + 2.0 * (mean over layers 0.5 of {base})"
    assert IntermediateLoss(layers=(22,), weight=0.0).formula() == base
