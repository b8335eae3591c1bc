import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lit_dpo import ADPOLoss, BCOPairLoss, DPOLoss, DPOPLoss, IntermediateLoss, IPOLoss, ODPOLoss, SFTLoss, WeightedLoss
from tests.losses.values import at, logps, nats, of_config, random_logps


def test_by_hand():
    # DPO: r_w = 10, r_l = -10, 0.1 * 20 = 2, 0.1269280. SFT: 10 nats over 5 tokens, 2. 1 * 0.1269280 + 0.5 * 2.
    policy, reference = logps(-10.0, -30.0, 5, 5), logps(-20.0, -20.0, 5, 5)
    loss = WeightedLoss(losses=(DPOLoss(beta=0.1), SFTLoss()), weights=(1.0, 0.5))
    assert loss(policy, reference).item() == pytest.approx(1.1269280110, abs=1e-10)
    terms = loss.terms(policy, reference)
    assert list(terms) == ["dpo", "sft"]
    assert [v.item() for v in terms.values()] == pytest.approx([0.1269280110, 2.0], abs=1e-10)


@pytest.mark.parametrize(
    ("config", "loss", "at_start"),
    [
        # log(2) = 0.6931472 for DPO, twice that for BCO, and 40 nats over 20 tokens for the supervised term.
        (
            "mpo",
            WeightedLoss((DPOLoss(beta=0.1), BCOPairLoss(beta=0.1), SFTLoss()), (0.8, 0.2, 1.0)),
            0.8 * 0.6931472 + 0.2 * 1.3862944 + 2.0,
        ),
        # The authors' code subtracts eta * beta times the summed log-prob, with eta 0.005 and beta 0.01.
        (
            "rpo",
            WeightedLoss((DPOLoss(beta=0.01), SFTLoss(length_normalize=False)), (1.0, 0.005 * 0.01)),
            0.6931472 + 0.005 * 0.01 * 40.0,
        ),
        ("irpo", WeightedLoss((DPOLoss(beta=0.1), SFTLoss()), (1.0, 1.0)), 0.6931472 + 2.0),
    ],
)
def test_methods_that_are_configs(config, loss, at_start):
    assert of_config(config) == loss
    assert loss(*at(0.0, 0.0)).item() == pytest.approx(at_start, abs=1e-6)


def test_weights_default_to_one():
    loss = WeightedLoss(losses=(DPOLoss(), IPOLoss(), SFTLoss()))
    assert loss.weights == (1.0, 1.0, 1.0)
    policy, reference = random_logps(0), random_logps(1)
    total = [sum(values) for values in zip(*(part(policy, reference).tolist() for part in loss.losses), strict=True)]
    assert loss(policy, reference).tolist() == pytest.approx(total, rel=1e-14)


@given(values=st.tuples(nats, nats, nats, nats), weights=st.tuples(st.floats(0, 10), st.floats(0, 10)))
def test_is_linear_in_the_weights(values, weights):
    policy, reference = logps(*values[:2]), logps(*values[2:])
    loss = WeightedLoss(losses=(DPOLoss(), IPOLoss()), weights=weights)
    expected = weights[0] * DPOLoss()(policy, reference) + weights[1] * IPOLoss()(policy, reference)
    assert torch.allclose(loss(policy, reference), expected, rtol=1e-12, atol=0)


def test_one_part_of_weight_one_is_that_part():
    policy, reference = random_logps(0), random_logps(1)
    assert torch.equal(WeightedLoss(losses=(DPOLoss(),))(policy, reference), DPOLoss()(policy, reference))


def test_lists_as_read_from_yaml_become_tuples():
    assert WeightedLoss(losses=[DPOLoss()], weights=[2.0]) == WeightedLoss(losses=(DPOLoss(),), weights=(2.0,))


def test_parts_of_one_class_are_numbered():
    loss = WeightedLoss(losses=(DPOLoss(), SFTLoss(), DPOLoss(beta=0.5)))
    assert list(loss.terms(random_logps(0), random_logps(1))) == ["dpo_0", "sft", "dpo_2"]


def test_needs_a_reference_if_a_part_does():
    assert WeightedLoss(losses=(SFTLoss(), DPOLoss())).needs_reference
    assert not WeightedLoss(losses=(SFTLoss(),)).needs_reference


def test_needs_tokens_and_columns_if_a_part_does():
    loss = WeightedLoss(losses=(SFTLoss(), ADPOLoss(), ODPOLoss(), ODPOLoss(alpha=0.5)))
    assert loss.needs_tokens
    assert loss.columns == ("score_chosen", "score_rejected")
    assert not WeightedLoss(losses=(SFTLoss(), DPOLoss())).needs_tokens
    assert WeightedLoss(losses=(SFTLoss(), DPOLoss())).columns == ()


def test_formula_is_the_sum_of_the_parts():
    loss = WeightedLoss(losses=(DPOLoss(), SFTLoss()), weights=(0.8, 1.0))
    assert loss.formula() == "0.8 * (-logsigmoid(0.1 * (r_w - r_l))) + 1.0 * (-logp_w/|y_w|)"


def test_beta_is_that_of_the_first_part_with_a_reference():
    assert WeightedLoss(losses=(SFTLoss(), DPOLoss(beta=0.4), IPOLoss(beta=0.2))).beta == 0.4
    assert WeightedLoss(losses=(SFTLoss(),)).beta == 1.0


def test_layers_are_those_of_the_parts_each_once_and_resolve_reaches_them():
    terms = (
        DPOLoss(),
        IntermediateLoss(layers=(2, 0.5), detach_head=True),
        IntermediateLoss(base=IPOLoss(), layers=(2,), detach_head=True),
    )
    loss = WeightedLoss(losses=terms, weights=(1.0, 2.0, 3.0))
    assert loss.layers == (2, 0.5)
    assert loss.detach_head
    resolved = loss.resolve(blocks=6)
    assert resolved.layers == (2, 3)
    assert resolved.weights == (1.0, 2.0, 3.0)
    policy, reference = random_logps(0, layers=(2, 3)), random_logps(1, layers=(2, 3))
    expected = terms[0](policy, reference) + sum(
        w * p.resolve(6)(policy, reference) for w, p in ((2.0, terms[1]), (3.0, terms[2]))
    )
    assert torch.allclose(resolved(policy, reference), expected, rtol=1e-14, atol=0)
    assert not WeightedLoss(losses=(DPOLoss(), DPOPLoss())).detach_head


def test_options_are_checked():
    with pytest.raises(ValueError, match=r"^`losses` must be at least one loss, got \(\)\.$"):
        WeightedLoss(losses=())
    with pytest.raises(ValueError, match=r"^`weights` must be 2 numbers, one a loss, got \(1\.0,\)\.$"):
        WeightedLoss(losses=(DPOLoss(), SFTLoss()), weights=(1.0,))
    with pytest.raises(ValueError, match=r"^`weights` must be at least 0, got \(1\.0, -1\.0\)\.$"):
        WeightedLoss(losses=(DPOLoss(), SFTLoss()), weights=(1.0, -1.0))
    with pytest.raises(ValueError, match=r"^`losses` must be losses that agree on `detach_head`"):
        WeightedLoss(losses=(IntermediateLoss(), IntermediateLoss(layers=(1,), detach_head=True)))
