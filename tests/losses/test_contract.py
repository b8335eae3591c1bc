"""What every loss of the package must do, whatever its formula."""

import itertools
from dataclasses import FrozenInstanceError, dataclass, replace
from pathlib import Path

import pytest
import torch

import lit_dpo
from lit_dpo import (
    DPOLoss,
    DPOPLoss,
    IntermediateLoss,
    IPOLoss,
    PairLogps,
    PreferenceLoss,
    SFTLoss,
    WeightedLoss,
)
from lit_dpo.losses import implicit_rewards
from tests.losses.values import logps, random_logps

ROOT = Path(__file__).parents[2]

EXAMPLES = {
    DPOLoss: [DPOLoss(), DPOLoss(beta=0.5, label_smoothing=0.1)],
    IPOLoss: [IPOLoss(), IPOLoss(beta=0.5, length_normalize=False)],
    DPOPLoss: [DPOPLoss(), DPOPLoss(beta=0.1, penalty=5.0)],
    IntermediateLoss: [
        IntermediateLoss(layers=(1,)),
        IntermediateLoss(base=IPOLoss(), layers=(1, 2), combine="additive", weight=2.0, detach_head=True),
    ],
    SFTLoss: [SFTLoss()],
    WeightedLoss: [
        WeightedLoss(losses=(DPOLoss(), SFTLoss()), weights=(1.0, 0.5)),
        WeightedLoss(losses=(IntermediateLoss(base=DPOPLoss(), layers=(2,)), IPOLoss())),
    ],
}
LOSSES = [pytest.param(loss, id=f"{cls.__name__}-{i}") for cls, all_ in EXAMPLES.items() for i, loss in enumerate(all_)]
every_loss = pytest.mark.parametrize("loss", LOSSES)


def concrete_losses(cls=PreferenceLoss):
    found = set()
    for sub in cls.__subclasses__():
        found |= concrete_losses(sub)
        if sub.__module__.split(".")[0] == "lit_dpo" and not sub.__abstractmethods__:
            found.add(sub)
    return found


def with_grad(values):
    """The same log-probs as leaves of a graph, and those leaves."""
    layers = {k: with_grad(v)[0] for k, v in values.layers.items()}
    fresh = replace(
        values,
        chosen=values.chosen.clone().requires_grad_(),
        rejected=values.rejected.clone().requires_grad_(),
        layers=layers,
    )
    return fresh, leaves(fresh)


def leaves(values):
    return [values.chosen, values.rejected, *(leaf for v in values.layers.values() for leaf in leaves(v))]


def pick(values, order):
    """The pairs of ``values`` in another order."""
    names = ("chosen", "rejected", "chosen_tokens", "rejected_tokens")
    layers = {k: pick(v, order) for k, v in values.layers.items()}
    return replace(values, **{name: getattr(values, name)[order] for name in names}, layers=layers)


def test_every_loss_has_an_example():
    assert set(EXAMPLES) == concrete_losses()


@every_loss
def test_one_value_a_pair(loss):
    value = loss(random_logps(0, batch=5), random_logps(1, batch=5))
    assert value.shape == (5,)
    assert value.dtype == torch.float64
    assert loss(random_logps(0, dtype=torch.float32), random_logps(1, dtype=torch.float32)).dtype == torch.float32


@every_loss
def test_finite_at_extreme_log_probs(loss):
    corners = torch.tensor(list(itertools.product((-1e4, 0.0, 1e4), repeat=4))).T  # (4, 81)
    chosen, rejected, reference_chosen, reference_rejected = corners
    one = torch.ones(81, dtype=torch.int64)
    layer = PairLogps(rejected, chosen, one, one)
    policy, inputs = with_grad(PairLogps(chosen, rejected, one, one, {1: layer, 2: layer}))
    layer = PairLogps(reference_rejected, reference_chosen, one, one)
    reference = PairLogps(reference_chosen, reference_rejected, one, one, {1: layer, 2: layer})
    value = loss(policy, reference)
    assert value.isfinite().all()
    for grad in torch.autograd.grad(value.sum(), inputs, allow_unused=True):
        assert grad is None or grad.isfinite().all()


@every_loss
def test_raises_chosen_and_lowers_rejected_where_policy_is_reference(loss):
    start = random_logps(0)
    start = replace(start, layers=dict.fromkeys(start.layers, start))
    policy, _ = with_grad(start)
    grad_chosen, grad_rejected = torch.autograd.grad(
        loss(policy, start).sum(), (policy.chosen, policy.rejected), allow_unused=True
    )
    assert (grad_chosen < 0).all()
    if isinstance(loss, SFTLoss):
        assert grad_rejected is None or not grad_rejected.any()
    else:
        assert (grad_rejected > 0).all()


@every_loss
def test_no_gradient_reaches_the_reference(loss):
    policy, _ = with_grad(random_logps(0))
    reference, inputs = with_grad(random_logps(1))
    grads = torch.autograd.grad(loss(policy, reference).sum(), inputs, allow_unused=True)
    assert all(grad is None or not grad.any() for grad in grads)


@every_loss
def test_gradient_is_that_of_the_value(loss):
    start, reference = random_logps(2, batch=3), random_logps(3, batch=3)

    def of_tensors(chosen, rejected, *rest):
        between = {
            k: replace(v, chosen=c, rejected=r)
            for (k, v), c, r in zip(start.layers.items(), rest[0::2], rest[1::2], strict=True)
        }
        return loss(replace(start, chosen=chosen, rejected=rejected, layers=between), reference)

    _, inputs = with_grad(start)
    assert torch.autograd.gradcheck(of_tensors, inputs)


@every_loss
def test_pairs_do_not_mix(loss):
    policy, reference = random_logps(4), random_logps(5)
    order = torch.tensor([3, 0, 4, 1])
    assert torch.equal(loss(pick(policy, order), pick(reference, order)), loss(policy, reference)[order])


@every_loss
def test_survives_a_weights_only_checkpoint(loss, tmp_path):
    torch.save({"hyper_parameters": {"loss": loss}}, tmp_path / "x.ckpt")
    loaded = torch.load(tmp_path / "x.ckpt", weights_only=True)["hyper_parameters"]["loss"]
    assert type(loaded) is type(loss)
    assert loaded == loss
    policy, reference = random_logps(6), random_logps(7)
    assert torch.equal(loaded(policy, reference), loss(policy, reference))


@every_loss
def test_cannot_be_changed(loss):
    with pytest.raises(FrozenInstanceError):
        loss.beta = 1.0
    assert hash(loss) == hash(replace(loss))


@every_loss
def test_repr_is_the_expression_that_makes_it(loss):
    names = {}
    exec("from lit_dpo import *", names)
    assert eval(repr(loss), names) == loss


@every_loss
def test_resolve_keeps_what_is_resolved(loss):
    assert loss.resolve(blocks=2) == loss
    assert loss.resolve(blocks=2).layers == loss.layers


@every_loss
def test_parts_are_per_pair_too(loss):
    for name, value in loss.parts(random_logps(8), random_logps(9)).items():
        assert name.isidentifier()
        assert value.shape == (5,)


@pytest.mark.parametrize("loss", LOSSES)
def test_needs_reference_says_whether_it_does(loss):
    policy = random_logps(0)
    same = torch.equal(loss(policy, random_logps(1)), loss(policy, random_logps(2)))
    assert same is not loss.needs_reference


@pytest.mark.parametrize("cls", [DPOLoss, IPOLoss, DPOPLoss, IntermediateLoss, SFTLoss])
def test_one_stem_everywhere(cls):
    stem = cls.__name__.removesuffix("Loss").lower()
    assert cls.__module__ == f"lit_dpo.losses.{stem}"
    for path in (f"lit_dpo/losses/{stem}.py", f"tests/losses/test_{stem}.py", f"configs/{stem}.yaml"):
        assert (ROOT / path).is_file(), path
    assert getattr(lit_dpo, cls.__name__) is cls
    assert cls.__name__ in lit_dpo.__all__


def test_a_loss_of_ones_own_needs_only_a_call(tmp_path):
    @dataclass(frozen=True)
    class HingeLoss(PreferenceLoss):
        delta: float = 1.0

        def __call__(self, policy, reference):
            return (self.delta - policy.margin + reference.margin).relu()

    loss = HingeLoss(delta=2.0)
    assert (loss.beta, loss.layers, loss.detach_head, loss.needs_reference) == (1.0, (), False, True)
    assert loss(logps(0.5, 0.0), logps(0.0, 0.0)).tolist() == [1.5]
    assert loss.resolve(blocks=3) is loss
    assert loss.parts(logps(0.5, 0.0), logps(0.0, 0.0)) == {}
    assert HingeLoss not in concrete_losses()

    @dataclass(frozen=True)
    class WithBeta(PreferenceLoss):
        beta: float = 0.7

        def __call__(self, policy, reference):
            return policy.margin

    assert WithBeta().beta == 0.7
    assert WithBeta(beta=0.2).beta == 0.2

    with pytest.raises(TypeError, match="abstract"):
        PreferenceLoss()


def test_implicit_rewards_are_beta_times_the_log_ratios_and_detached():
    policy, _ = with_grad(logps([-10.0, -4.0], [-30.0, -5.0]))
    chosen, rejected = implicit_rewards(policy, logps([-12.0, -4.0], [-20.0, -7.0]), beta=0.5)
    assert chosen.tolist() == [1.0, 0.0]  # 0.5 * (-10 + 12), 0.5 * 0
    assert rejected.tolist() == [-5.0, 1.0]  # 0.5 * (-30 + 20), 0.5 * (-5 + 7)
    assert not chosen.requires_grad
    assert not rejected.requires_grad
