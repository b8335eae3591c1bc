"""What every loss of the package must do, whatever its formula."""

import doctest
import importlib
import itertools
import math
import re
from dataclasses import FrozenInstanceError, dataclass, replace
from pathlib import Path

import pytest
import torch

import lit_dpo
from lit_dpo import (
    ADPOLoss,
    APODownLoss,
    APOZeroLoss,
    BCOPairLoss,
    CPOLoss,
    DPOLoss,
    DPOPLoss,
    DPOShiftLoss,
    EXOLoss,
    FDPOLoss,
    HingeLoss,
    IntermediateLoss,
    IPOLoss,
    LDDPOLoss,
    MinorDPOLoss,
    NCAPairLoss,
    ODPOLoss,
    ORPOLoss,
    PairLogps,
    PreferenceLoss,
    RDPOLoss,
    RobustDPOLoss,
    SFTLoss,
    SimPOLoss,
    SPPOLoss,
    WeightedLoss,
)
from lit_dpo.losses import implicit_rewards
from tests.losses.values import logps, of_config, random_logps, with_tokens

ROOT = Path(__file__).parents[2]

EXAMPLES = {
    DPOLoss: [
        DPOLoss(),
        DPOLoss(beta=0.5, label_smoothing=0.1),
        DPOLoss(beta=5.0, label_smoothing=0.1, length_normalize=True),
    ],
    IPOLoss: [IPOLoss(), IPOLoss(beta=0.5, length_normalize=False)],
    DPOPLoss: [DPOPLoss(), DPOPLoss(beta=0.1, penalty=5.0)],
    IntermediateLoss: [
        IntermediateLoss(layers=(1,)),
        IntermediateLoss(base=IPOLoss(), layers=(1, 2), combine="additive", weight=2.0, detach_head=True),
    ],
    SFTLoss: [SFTLoss(), SFTLoss(length_normalize=False)],
    WeightedLoss: [
        WeightedLoss(losses=(DPOLoss(), SFTLoss()), weights=(1.0, 0.5)),
        WeightedLoss(losses=(IntermediateLoss(base=DPOPLoss(), layers=(2,)), IPOLoss())),
        WeightedLoss(losses=(IntermediateLoss(base=ADPOLoss(), layers=(1,)), ODPOLoss(), BCOPairLoss())),
    ],
    RobustDPOLoss: [RobustDPOLoss(), RobustDPOLoss(beta=0.5, label_smoothing=0.3)],
    HingeLoss: [HingeLoss(), HingeLoss(beta=0.01)],
    SimPOLoss: [SimPOLoss(), SimPOLoss(beta=10.0, gamma_beta_ratio=0.0)],
    CPOLoss: [CPOLoss(), CPOLoss(beta=0.5, sft_weight=0.25)],
    ORPOLoss: [ORPOLoss(), ORPOLoss(weight=2.0)],
    APOZeroLoss: [APOZeroLoss(), APOZeroLoss(beta=0.5)],
    APODownLoss: [APODownLoss(), APODownLoss(beta=0.5)],
    BCOPairLoss: [BCOPairLoss(), BCOPairLoss(beta=0.5)],
    NCAPairLoss: [NCAPairLoss(), NCAPairLoss(beta=0.5)],
    SPPOLoss: [SPPOLoss(), SPPOLoss(beta=0.1)],
    EXOLoss: [EXOLoss(), EXOLoss(beta=0.5, label_smoothing=0.2)],
    FDPOLoss: [
        FDPOLoss(),
        FDPOLoss(divergence="forward_kl"),
        FDPOLoss(beta=0.5, divergence="alpha"),
        FDPOLoss(divergence="alpha", alpha=0.9),
    ],
    RDPOLoss: [RDPOLoss(), RDPOLoss(beta=0.5, alpha=0.2)],
    MinorDPOLoss: [MinorDPOLoss(), MinorDPOLoss(beta=0.5)],
    DPOShiftLoss: [DPOShiftLoss(), DPOShiftLoss(beta=0.5, rejected_weight=0.5)],
    ADPOLoss: [ADPOLoss(), ADPOLoss(beta=0.5, segments=1), ADPOLoss(segments=3)],
    LDDPOLoss: [LDDPOLoss(), LDDPOLoss(beta=0.5, alpha=1.0), LDDPOLoss(alpha=0.0)],
    ODPOLoss: [ODPOLoss(), ODPOLoss(beta=0.5, alpha=0.3), ODPOLoss(scaling="linear")],
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
    """The same log-probs as a graph over those of the single tokens, and these, at every layer."""
    inputs = [tokens.clone().requires_grad_() for tokens in all_tokens(values)]
    return over(values, inputs), inputs


def all_tokens(values):
    return [values.tokens, *(tokens for v in values.layers.values() for tokens in all_tokens(v))]


def over(values, tokens):
    """These pairs, with the log-probs of single tokens in the order of `all_tokens`."""
    rest = iter(tokens)

    def made(values):
        outer = with_tokens(values, next(rest))
        return replace(outer, layers={k: made(v) for k, v in values.layers.items()})

    return made(values)


def pick(values, order):
    """The pairs of ``values`` in another order."""
    names = ("chosen", "rejected", "chosen_tokens", "rejected_tokens")
    parts = values.split_tokens()
    return replace(
        values,
        **{name: getattr(values, name)[order] for name in names},
        layers={k: pick(v, order) for k, v in values.layers.items()},
        tokens=torch.cat([parts[2 * i + side] for i in order.tolist() for side in (0, 1)]),
        columns={name: column[order] for name, column in values.columns.items()},
    )


def test_every_loss_has_an_example():
    assert set(EXAMPLES) == concrete_losses()


@every_loss
def test_one_value_a_pair(loss):
    value = loss(random_logps(0, batch=5), random_logps(1, batch=5))
    assert value.shape == (5,)
    assert value.dtype == torch.float64
    assert loss(random_logps(0, dtype=torch.float32), random_logps(1, dtype=torch.float32)).dtype == torch.float32


def one_token_each(chosen, rejected):
    """Pairs of one token a completion, and two layers at which chosen and rejected have changed places."""
    one = torch.ones(len(chosen), dtype=torch.int64)
    columns = {"score_chosen": chosen, "score_rejected": rejected}

    def made(chosen, rejected, layers):
        tokens = torch.stack([chosen, rejected], dim=1).flatten()
        return PairLogps(chosen, rejected, one, one, layers, tokens, columns)

    return made(chosen, rejected, {k: made(rejected, chosen, {}) for k in (1, 2)})


@every_loss
def test_finite_at_extreme_log_probs(loss):
    corners = torch.tensor(list(itertools.product((-1e4, 0.0, 1e4), repeat=4))).T  # (4, 81)
    chosen, rejected, reference_chosen, reference_rejected = corners
    policy, inputs = with_grad(one_token_each(chosen, rejected))
    reference = one_token_each(reference_chosen, reference_rejected)
    value = loss(policy, reference)
    assert value.isfinite().all()
    for grad in torch.autograd.grad(value.sum(), inputs, allow_unused=True):
        assert grad is None or grad.isfinite().all()


@every_loss
def test_raises_chosen_and_lowers_rejected_where_policy_is_reference(loss):
    start = random_logps(0)
    start = replace(start, layers=dict.fromkeys(start.layers, start))
    policy, inputs = with_grad(start)
    grads = torch.autograd.grad(loss(policy, start).sum(), inputs, allow_unused=True)
    grad = sum(grad for grad in grads if grad is not None)  # the layers are the same here
    sums = with_tokens(start, grad)  # of the gradients on each completion's tokens
    assert (sums.chosen < 0).all() or (isinstance(loss, APODownLoss) and not sums.chosen.any())
    assert (sums.rejected > 0).all() or (isinstance(loss, SFTLoss | MinorDPOLoss) and not sums.rejected.any())


@every_loss
def test_no_gradient_reaches_the_reference(loss):
    policy, _ = with_grad(random_logps(0))
    reference, inputs = with_grad(random_logps(1))
    grads = torch.autograd.grad(loss(policy, reference).sum(), inputs, allow_unused=True)
    assert all(grad is None or not grad.any() for grad in grads)


@pytest.mark.every(2)
@every_loss
def test_gradient_is_that_of_the_value(loss):
    start, reference = random_logps(2, batch=3), random_logps(3, batch=3)

    def of_tokens(*tokens):
        return loss(over(start, tokens), reference)

    _, inputs = with_grad(start)
    assert torch.autograd.gradcheck(of_tokens, inputs)


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
    assert eval(repr(loss), {name: getattr(lit_dpo, name) for name in lit_dpo.__all__}) == loss


@every_loss
def test_resolve_keeps_what_is_resolved(loss):
    assert loss.resolve(blocks=2) == loss
    assert loss.resolve(blocks=2).layers == loss.layers


@every_loss
def test_parts_are_per_pair_too(loss):
    for name, value in loss.terms(random_logps(8), random_logps(9)).items():
        assert name.isidentifier()
        assert value.shape == (5,)


@pytest.mark.parametrize("loss", LOSSES)
def test_needs_reference_says_whether_it_does(loss):
    policy = random_logps(0)
    same = torch.equal(loss(policy, random_logps(1)), loss(policy, random_logps(2)))
    assert same is not loss.needs_reference


@every_loss
def test_needs_tokens_and_columns_say_whether_it_does(loss):
    policy, reference = random_logps(0), random_logps(1)
    expected = loss(policy, reference)

    def without(values, **empty):
        layers = {k: without(v, **empty) for k, v in values.layers.items()}
        return replace(values, layers=layers, **empty)

    if loss.needs_tokens:
        if loss != ADPOLoss(beta=0.5, segments=1):  # needs the sums alone
            with pytest.raises(ValueError, match=r"^This loss needs the log-prob of every token, of policy and ref"):
                loss(without(policy, tokens=None), without(reference, tokens=None))
    else:
        assert torch.equal(loss(without(policy, tokens=None), without(reference, tokens=None)), expected)
    columns = {name: policy.columns[name] for name in loss.columns}
    assert torch.equal(loss(replace(policy, columns=columns), replace(reference, columns={})), expected)
    for name in loss.columns:
        fewer = {other: column for other, column in columns.items() if other != name}
        with pytest.raises(ValueError, match=rf"^This loss needs the number `{name}` of every row"):
            loss(replace(policy, columns=fewer), reference)


def evaluated(formula, policy, reference, pair):
    """The number that a printed formula gives for one pair, by Python's own arithmetic."""
    parts, others = policy.split_tokens(), reference.split_tokens()

    def log_sigmoid(x):
        return -max(-x, 0.0) - math.log1p(math.exp(-abs(x)))

    names = {"logsigmoid": log_sigmoid, "sigmoid": lambda x: math.exp(log_sigmoid(x)), "exp": math.exp}
    names |= {"log": math.log, "max": max, "sum": sum}
    for side, y in enumerate("wl"):
        tokens = parts[2 * pair + side].tolist()
        ratios = (parts[2 * pair + side] - others[2 * pair + side]).tolist()
        names |= {f"logp_{y}": math.fsum(tokens), f"r_{y}": math.fsum(ratios), f"n_{y}": len(tokens)}
        names |= {f"tokens_{y}": ratios}
    names |= {name: column[pair].item() for name, column in policy.columns.items()}
    names["m"] = min(names["n_w"], names["n_l"])
    names["segments"] = lambda m: [
        tuple(slice(n * s // m, n * (s + 1) // m) for n in (names["n_w"], names["n_l"])) for s in range(m)
    ]
    code = formula.replace("|y_w|", "n_w").replace("|y_l|", "n_l")
    for side, y in enumerate("wl"):
        code = re.sub(rf"r_{y}\[s\]", f"math.fsum(tokens_{y}[s[{side}]])", code)
        code = re.sub(rf"r_{y}\[(.*?)\]", rf"math.fsum(tokens_{y}[\1])", code)
    return eval(code, names | {"math": math})


@every_loss
def test_the_formula_is_what_is_computed(loss):
    formula = loss.formula()
    assert "\n" not in formula
    assert formula != repr(loss)
    if loss.layers:
        assert "mean over layers" in formula
        return
    policy, reference = (with_tokens(values, 0.1 * values.tokens) for values in (random_logps(0), random_logps(1)))
    values = loss(policy, reference).tolist()
    assert [evaluated(formula, policy, reference, pair) for pair in range(5)] == pytest.approx(values, rel=1e-9)


@pytest.mark.parametrize("cls", EXAMPLES, ids=lambda cls: cls.__name__)
def test_the_example_of_the_docstring_is_right(cls):
    module = importlib.import_module(cls.__module__)
    tests = [test for test in doctest.DocTestFinder().find(module) if test.examples]
    assert tests
    for test in tests:
        assert doctest.DocTestRunner().run(test).failed == 0


@pytest.mark.parametrize("cls", sorted(set(EXAMPLES) - {WeightedLoss}, key=str), ids=lambda cls: cls.__name__)
def test_one_stem_everywhere(cls):
    package, stem = cls.__module__.rsplit(".", 1)
    assert package == "lit_dpo.losses"
    assert stem.replace("_", "") == cls.__name__.removesuffix("Loss").lower()
    for path in (f"lit_dpo/losses/{stem}.py", f"tests/losses/test_{stem}.py", f"configs/{stem}.yaml"):
        assert (ROOT / path).is_file(), path
    assert getattr(lit_dpo, cls.__name__) is cls
    assert cls.__name__ in lit_dpo.__all__


@pytest.mark.parametrize("cls", sorted(set(EXAMPLES) - {WeightedLoss}, key=str), ids=lambda cls: cls.__name__)
def test_the_config_writes_out_the_defaults(cls):
    assert of_config(cls.__module__.rsplit(".", 1)[1]) == cls()


def test_a_loss_of_ones_own_needs_only_a_call(tmp_path):
    @dataclass(frozen=True)
    class OwnLoss(PreferenceLoss):
        delta: float = 1.0

        def __call__(self, policy, reference):
            return (self.delta - policy.margin + reference.margin).relu()

    loss = OwnLoss(delta=2.0)
    assert (loss.beta, loss.layers, loss.detach_head, loss.needs_reference) == (1.0, (), False, True)
    assert loss(logps(0.5, 0.0), logps(0.0, 0.0)).tolist() == [1.5]
    assert loss.resolve(blocks=3) is loss
    assert loss.terms(logps(0.5, 0.0), logps(0.0, 0.0)) == {}
    assert (loss.needs_tokens, loss.columns) == (False, ())
    assert loss.formula() == repr(loss)
    assert OwnLoss not in concrete_losses()

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
    policy = logps([-10.0, -4.0], [-30.0, -5.0])
    for tensor in (policy.chosen, policy.rejected):
        tensor.requires_grad_()
    chosen, rejected = implicit_rewards(policy, logps([-12.0, -4.0], [-20.0, -7.0]), beta=0.5)
    assert chosen.tolist() == [1.0, 0.0]  # 0.5 * (-10 + 12), 0.5 * 0
    assert rejected.tolist() == [-5.0, 1.0]  # 0.5 * (-30 + 20), 0.5 * (-5 + 7)
    assert not chosen.requires_grad
    assert not rejected.requires_grad
