"""Log-probs of single tokens: those of the model's own logits, whatever way they are scored, kept and gathered."""

from typing import ClassVar

import pytest
import torch

from lit_dpo import (
    ADPOLoss,
    CachedReference,
    DPOLoss,
    FrozenReference,
    IntermediateLoss,
    LDDPOLoss,
    LoRA,
    PairBatch,
    PairLogps,
    PreferenceLoss,
    Scorer,
    score,
)
from tests import runs
from tests.models import tiny_model

pytestmark = runs.QUIET
PAIRS = [([1, 2, 3], [4, 5], [6]), ([7], [8], [9, 10, 11, 12]), ([5] * 9, [4, 4], [3]), ([2, 3], [1], [2, 2])]
BATCH = PairBatch.from_lists(PAIRS)
WAYS = {
    "flat": {"form": "flat"},
    "padded": {"form": "padded"},
    "flat parts": {"form": "flat", "max_tokens": 14},
    "padded parts": {"form": "padded", "max_tokens": 1},
}


def expected_tokens(model, pairs):
    """Of each completion one after the other, chosen first: one sequence at a time, through the model's own logits."""
    found = []
    for prompt, *completions in pairs:
        for completion in completions:
            logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
            found.append(logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0])
    return found


def gradients(model, values):
    """Of a sum in which every token has a weight of its own."""
    model.zero_grad()
    (values * torch.linspace(-1, 2, len(values), dtype=values.dtype)).sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_they_are_those_of_one_sequence_at_a_time(way, checkpointing):
    model = tiny_model("llama", "float64").train()
    wanted = torch.cat(expected_tokens(model, PAIRS))
    wanted_gradients = gradients(model, wanted)
    if checkpointing:
        older = model.gradient_checkpointing_enable  # the one name in transformers 5.17
        getattr(model, "activation_checkpointing_enable", older)({"use_reentrant": False})
    found = Scorer(per_token=True, **WAYS[way])(model, BATCH)
    torch.testing.assert_close(found.tokens, wanted, rtol=0, atol=1e-10)
    for name, gradient in gradients(model, found.tokens).items():
        torch.testing.assert_close(gradient, wanted_gradients[name], rtol=0, atol=1e-10, msg=name)


@pytest.mark.parametrize("way", WAYS)
def test_every_layer_has_its_own_and_they_add_up(way):
    model = tiny_model("llama", "float64")
    found = score(model, BATCH, (1, 2), per_token=True, **WAYS[way])
    without = score(model, BATCH, (1, 2), **WAYS[way])
    assert without.tokens is without.layers[1].tokens is None
    for ours, plain in ((found, without), *((found.layers[k], without.layers[k]) for k in (1, 2))):
        sums = [part.sum() for part in ours.split_tokens()]
        torch.testing.assert_close(torch.stack(sums[0::2]), plain.chosen, rtol=0, atol=1e-12)
        torch.testing.assert_close(torch.stack(sums[1::2]), plain.rejected, rtol=0, atol=1e-12)
        assert torch.equal(ours.chosen, plain.chosen)
    assert (found.tokens - found.layers[1].tokens).abs().max() > 1e-3


def test_sequences_scored_row_by_row_have_them_too():
    """Those of a model whose positions depend on the length."""
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = tiny_model("llama", "float64", rope_parameters=rope, max_position_embeddings=8).eval()
    with torch.no_grad():
        found = score(model, BATCH, per_token=True)
        assert BATCH.longest > 8
        for row, ours in enumerate(found.split_tokens()):
            fresh = tiny_model("llama", "float64", rope_parameters=rope, max_position_embeddings=8).eval()
            fresh.load_state_dict(model.state_dict())
            (wanted,) = expected_tokens(fresh, [(PAIRS[row // 2][0], PAIRS[row // 2][1 + row % 2])])
            torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-4)


def trained(loss, reference=None, steps=3, train="quickstart", **options):
    """Weights after a few steps, and the metrics."""
    module = runs.module(lr=0.1, loss=loss, reference=reference, **options)
    run = runs.fit(module, runs.data(train, batch_size=4), max_steps=steps, log_every_n_steps=1)
    return runs.weights(module.policy), {k: float(v) for k, v in run.callback_metrics.items() if "tokens" not in k}


@pytest.mark.every(3)
@pytest.mark.parametrize("loss", [ADPOLoss(segments=1), LDDPOLoss(alpha=1.0)], ids=["adpo", "lddpo"])
@pytest.mark.parametrize("options", [{}, {"max_tokens": 60, "form": "padded"}], ids=["flat", "padded parts"])
def test_the_special_case_of_a_loss_over_tokens_is_dpo_bit_for_bit(loss, options):
    weights, metrics = trained(loss, **options)
    expected, values = trained(DPOLoss(), **options)
    assert runs.same(weights, expected)
    assert metrics["train/loss"] == values["train/loss"]
    assert metrics["train/loss"] != pytest.approx(0.6931, abs=1e-3)  # it has moved


@pytest.mark.every(2)
@pytest.mark.parametrize(
    ("base", "adapter"), [(ADPOLoss(), None), (LDDPOLoss(beta=0.5), LoRA(rank=2))], ids=["adpo", "lddpo with lora"]
)
def test_a_cached_reference_keeps_them(base, adapter, tmp_path):
    """It trains what a live reference trains; a cache of sums is completed, and then serves losses without tokens."""
    loss = IntermediateLoss(base, layers=(1,))
    options = {"train": runs.pairs_file(tmp_path, 14), "adapter": adapter}
    expected, _ = trained(loss, **options)
    counts = []
    for each in (IntermediateLoss(layers=(1,)), loss, loss, base, DPOLoss()):
        reference = CachedReference(str(tmp_path / "cache"))
        weights, _ = trained(each, reference, steps=3 if each is loss else 0, **options)
        counts.append((reference.scored > 0, reference.reused > 0))
        if each is loss:
            torch.testing.assert_close(weights, expected, rtol=0, atol=1e-6)
    assert counts == [(True, False), (True, False), (False, True), (False, True), (False, True)]


class TokensAsked(PreferenceLoss):
    """Notes whether tokens came along."""

    seen: ClassVar[list[tuple[bool, bool]]] = []

    def __call__(self, policy: PairLogps, reference: PairLogps) -> torch.Tensor:
        self.seen.append((policy.tokens is None, reference.tokens is None))
        return policy.chosen - reference.chosen


@pytest.mark.parametrize("asked", [False, True])
@pytest.mark.parametrize("kind", ["frozen", "cached", "adapter"])
def test_tokens_come_to_policy_and_reference_where_the_loss_says_so_and_nowhere_else(kind, asked, tmp_path):
    loss = type("Asking", (TokensAsked,), {"needs_tokens": asked, "seen": [], "__module__": __name__})()
    reference = {"frozen": FrozenReference(), "cached": CachedReference(str(tmp_path)), "adapter": None}[kind]
    adapter = LoRA(rank=2) if kind == "adapter" else None
    trained(loss, reference, steps=1, train=runs.pairs_file(tmp_path, 4), adapter=adapter)
    assert set(loss.seen) == {(not asked, not asked)}


def test_options_out_of_range_are_refused_in_one_sentence():
    with pytest.raises(ValueError, match="`form` must be one of auto, flat, padded, got 'flatt'"):
        Scorer(form="flatt")
    with pytest.raises(ValueError, match="`max_tokens` must be at least 1, got 0"):
        Scorer(max_tokens=0)
