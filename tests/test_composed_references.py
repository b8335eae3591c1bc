"""References made of references, one's own among them: they train, are cached, checkpointed, resumed and exported."""

from dataclasses import dataclass, field, replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from lit_dpo import (
    AdapterReference,
    ADPOLoss,
    CachedReference,
    FrozenReference,
    LoRA,
    PairBatch,
    PairLogps,
    PreferenceModule,
    Reference,
    Scorer,
)
from lit_dpo.callbacks import ExportModel
from tests import runs

pytestmark = runs.QUIET
OTHER = {**runs.LLAMA, "intermediate_size": 64}
THIRD = {**runs.LLAMA, "num_hidden_layers": 1}


def mean(first: PairLogps, second: PairLogps, weight: float) -> PairLogps:
    def mixed(name):
        return (1 - weight) * getattr(first, name) + weight * getattr(second, name)

    tokens = None if first.tokens is None else mixed("tokens")
    layers = {k: mean(first.layers[k], second.layers[k], weight) for k in first.layers}
    return replace(first, chosen=mixed("chosen"), rejected=mixed("rejected"), layers=layers, tokens=tokens)


@dataclass(eq=False)
class Mixture(Reference):
    """A geometric mean of two references.

    Args:
        first: One.
        second: The other.
        weight: Share of the other.
    """

    first: Reference = field(default_factory=FrozenReference)
    second: Reference = field(default_factory=FrozenReference)
    weight: float = 0.5

    def build(self, policy, tokenizer, dtype):
        for part in (self.first, self.second):
            part.build(policy, tokenizer, dtype)

    def models(self):
        return [*self.first.models(), *self.second.models()]

    def score(self, policy: torch.nn.Module, batch: PairBatch, scorer: Scorer) -> PairLogps:
        return mean(self.first.score(policy, batch, scorer), self.second.score(policy, batch, scorer), self.weight)


@dataclass(eq=False)
class Uniform(Reference):
    """Every token as likely as any other, and none by itself."""

    def score(self, policy: torch.nn.Module, batch: PairBatch, scorer: Scorer) -> PairLogps:
        assert not torch.is_grad_enabled()
        _, chosen, rejected = batch.lengths.unbind(1)
        return PairLogps(-5.0 * chosen, -5.0 * rejected, chosen, rejected)


def mixture(weight=0.25):
    return Mixture(FrozenReference(OTHER), FrozenReference(THIRD), weight)


def trained(reference, folder=None, steps=3, **options):
    module = runs.module(lr=0.1, reference=reference, **options.pop("module", {}))
    data = runs.data(options.pop("train", "quickstart"), batch_size=4)
    run = runs.fit(module, data, folder, max_steps=steps, log_every_n_steps=1, **options)
    return module, run


@pytest.fixture
def pairs(tmp_path):
    return runs.pairs_file(tmp_path, 16)


@pytest.mark.parametrize(
    "loss", [{}, pytest.param({"loss": ADPOLoss(segments=2)}, marks=pytest.mark.slow)], ids=["dpo", "tokens"]
)
def test_a_cached_mixture_trains_what_the_live_one_does_and_is_reused_by_all_that_it_is(loss, tmp_path, pairs):
    live, _ = trained(mixture(), train=pairs, module=loss)
    counts = []
    for reference in (mixture(), mixture(), mixture(0.3), None, mixture().first, mixture()):
        cached = CachedReference(str(tmp_path / "cache"), of=reference)
        module, _ = trained(cached, train=pairs, module=loss)
        counts.append((cached.scored, cached.reused))
        if len(counts) in (1, 2, 6):
            torch.testing.assert_close(
                runs.weights(module.policy), runs.weights(live.policy), rtol=0, atol=1e-6, msg=str(len(counts))
            )
        elif len(counts) > 2:
            assert not torch.allclose(module.policy.lm_head.weight, live.policy.lm_head.weight, rtol=0, atol=1e-6)
    new, old = (16, 0), (0, 16)
    assert counts == [new, old, new, new, new, old]


def test_its_checkpoint_loads_without_running_anything_resumes_and_is_exported(tmp_path, pairs):
    cache = str(tmp_path / "cache")
    whole, _ = trained(CachedReference(cache, of=mixture()), train=pairs, steps=4)
    _, run = trained(CachedReference(cache, of=mixture()), tmp_path, train=pairs, steps=2, callbacks=[ExportModel()])
    path = tmp_path / "half.ckpt"
    run.save_checkpoint(path)
    exported = runs.weights(AutoModelForCausalLM.from_pretrained(tmp_path / "export"))
    state = torch.load(path, weights_only=True)
    assert runs.same(exported, {k.removeprefix("policy."): v for k, v in state["state_dict"].items()})
    module = PreferenceModule.load_from_checkpoint(
        path, weights_only=True, optimizer=lambda p: torch.optim.SGD(p, lr=0.1), lr_scheduler=None
    )
    found = module.reference
    assert (type(found), found.folder, type(found.of), found.of.weight) == (CachedReference, cache, Mixture, 0.25)
    assert (found.of.first.model, found.of.second.model) == (OTHER, THIRD)
    again = runs.module(lr=0.1, reference=CachedReference(cache, of=mixture()))
    rest = runs.trainer(max_steps=4, log_every_n_steps=1)
    rest.fit(again, runs.data(pairs, batch_size=4), ckpt_path=path, weights_only=True)
    assert runs.same(runs.weights(again.policy), runs.weights(whole.policy))


def test_a_cached_adapter_reference_is_the_policy_without_its_adapters(tmp_path, pairs):
    options = {"train": pairs, "module": {"adapter": LoRA(rank=2)}}
    weights = []
    for number, of in enumerate((None, AdapterReference())):
        cached = CachedReference(str(tmp_path / str(number)), of=of)
        weights.append(runs.weights(trained(cached, **options)[0].policy))
    assert runs.same(*weights)


def test_one_method_is_all_that_a_reference_of_ones_own_needs(tmp_path, pairs):
    live, _ = trained(Uniform(), train=pairs)
    cached, _ = trained(CachedReference(str(tmp_path / "cache"), of=Uniform()), train=pairs)
    assert runs.same(runs.weights(cached.policy), runs.weights(live.policy))
    with pytest.raises(TypeError, match="abstract method"):
        type("Nothing", (Reference,), {})()


@pytest.mark.parametrize("kind", ["live", "cached"])
def test_a_reference_without_the_tokens_that_a_loss_needs_is_refused(kind, tmp_path, pairs):
    reference = Uniform() if kind == "live" else CachedReference(str(tmp_path / "cache"), of=Uniform())
    with pytest.raises(ValueError, match=r"single tokens|log-prob of every token"):
        trained(reference, train=pairs, module={"loss": ADPOLoss()})


def test_what_cannot_be_kept_is_refused_in_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="`of` must be a reference that is not cached itself, got CachedReference"):
        CachedReference(of=CachedReference())
    with pytest.raises(ValueError, match="`of` must be a reference that is not cached itself, got 'cache'"):
        CachedReference(of="cache")

    class Older(Uniform):
        def __init__(self, count=3):
            self.count = count

    with pytest.raises(ValueError, match=r"`Older` must be a dataclass.*put `@dataclass"):
        runs.module(reference=Older(5))
