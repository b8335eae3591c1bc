"""A batch in parts is the batch: log-probs, gradients and runs, in less memory."""

import itertools
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.strategies import FSDPStrategy

from lit_dpo import DPOLoss, IntermediateLoss, LoRA, PairBatch, score
from lit_dpo.scoring import parts as parts_module
from tests import runs
from tests.models import tiny_model

pytestmark = runs.QUIET
segments = st.lists(st.integers(1, 99), min_size=1, max_size=6)
PAIRS = [([1, 2, 3], [4, 5], [6]), ([7], [8], [9, 10, 11, 12]), ([5] * 9, [4, 4], [3]), ([2, 3], [1], [2, 2])]
BATCH = PairBatch.from_lists(PAIRS, row_ids=[3, 1, 4, 2], weights=[1.0, 0.5, 2.0, 0.0])


@given(pairs=st.lists(st.tuples(segments, segments, segments), min_size=1, max_size=7), most=st.integers(1, 60))
@settings(max_examples=300)
def test_a_split_batch_has_the_same_pairs_within_the_budget(pairs, most):
    weights = [float(i) for i in range(len(pairs))]
    batch = PairBatch.from_lists(pairs, weights=weights)
    parts = batch.split(most)
    assert [pair for part in parts for pair in part.shape] == list(batch.shape)
    for name in ("input_ids", "position_ids", "lengths", "row_ids", "weights"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(batch, name))
    assert all(len(part.input_ids) <= most or len(part) == 1 for part in parts)
    for one, next_one in itertools.pairwise(parts):  # no part could have taken the next pair too
        assert len(one.input_ids) + sum(next_one.shape[0]) > most
    assert PairBatch.from_lists(pairs).split(most)[0].weights is None


def weighted_sum(logps):
    weights = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=logps.chosen.dtype)
    total = (weights * logps.chosen).sum() - (weights**2 * logps.rejected).sum()
    return total + sum((0.3 * weights * (layer.chosen + 2 * layer.rejected)).sum() for layer in logps.layers.values())


@pytest.mark.parametrize("form", ["flat", "padded"])
@pytest.mark.parametrize("most", [1, 9, 14, 1000])
def test_log_probs_and_gradients_are_those_of_the_whole(form, most):
    model = tiny_model("llama", "float64").train()
    calls = []
    model.model.layers[0].register_forward_hook(lambda *_: calls.append(None))
    found = []
    for run, budget in ((score, {}), (score, {"max_tokens": most})):
        model.zero_grad()
        calls.clear()
        logps = run(model, BATCH, layers=(1,), form=form, **budget)
        weighted_sum(logps).backward()
        found.append((logps, {name: p.grad.clone() for name, p in model.named_parameters()}))
    parts = len(BATCH.split(most))
    assert len(calls) == 2 * parts - 1  # the last part's activations are kept
    (whole, whole_grads), (again, grads) = found
    for name in ("chosen", "rejected", "chosen_tokens", "rejected_tokens"):
        assert torch.allclose(getattr(again, name), getattr(whole, name), rtol=0, atol=1e-10)
        assert torch.allclose(getattr(again.layers[1], name), getattr(whole.layers[1], name), rtol=0, atol=1e-10)
    for name, grad in whole_grads.items():
        assert (grads[name] - grad).abs().max() <= 1e-10 * max(1, grad.abs().max())


def test_only_one_part_is_kept_for_the_backward_pass():
    model = tiny_model("llama").train()
    batch = PairBatch.from_lists([([1] * 40, [2] * 10, [3] * 10)] * 8)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def kept(run):
        sizes = {}

        def keep(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                sizes[storage.data_ptr()] = (tensor, storage.nbytes())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            run(model, batch)
        return sum(size for _, size in sizes.values())

    parts = kept(lambda *args: score(*args, max_tokens=60))
    assert parts < 0.2 * kept(score)  # an eighth, and each part's inputs


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing. is deprecated")
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_dropout_draws_the_same_masks_again(device):
    model = LoRA(rank=2, dropout=0.5).attach(tiny_model("llama")).train().to(device)
    drawn = []
    for name, module in model.named_modules():
        if "layers.0.self_attn.q_proj.lora_dropout.default" in name:
            module.register_forward_hook(lambda module, args, out: drawn.append(out == 0))
    score(model, BATCH.to(device), max_tokens=14).chosen.sum().backward()
    parts = len(BATCH.split(14))
    assert parts > 2
    assert len(drawn) == 2 * parts - 1
    for first, second in zip(drawn[: parts - 1], reversed(drawn[parts:]), strict=True):
        assert torch.equal(first, second)
    assert not torch.equal(drawn[0], torch.zeros_like(drawn[0]))


def test_the_checkpoint_is_shown_the_device(monkeypatch):
    """It looks for tensors among its arguments, not inside of batches, to know whose random state to keep."""
    shown = []
    monkeypatch.setattr(parts_module, "checkpoint", lambda run, *args, **kw: shown.append(args[0]) or run(*args))
    score(tiny_model("llama"), BATCH, max_tokens=14)
    assert shown
    assert all(isinstance(tensor, torch.Tensor) for tensor in shown)


@pytest.mark.slow
def test_gradients_of_parts_add_up_in_float32_under_autocast():
    """With one bfloat16 copy of the weights for all parts, their gradients would be summed in bfloat16."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda size: torch.randint(3, 50, (size,), generator=generator).tolist()  # noqa: E731
    batch = PairBatch.from_lists([(draw(6), draw(4), draw(5)) for _ in range(64)])
    model = tiny_model("llama", initializer_range=0.05).train()

    def gradient(run, mixed):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            logps = run(model, batch)
        (logps.chosen - 0.5 * logps.rejected).sum().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    truth = gradient(score, False)
    in_parts = partial(score, max_tokens=15)
    whole, parts = (float((gradient(run, True) - truth).norm() / truth.norm()) for run in (score, in_parts))
    assert parts < 1.1 * whole  # else 1.5 times


@pytest.mark.every(3)
@pytest.mark.parametrize("adapter", [None, LoRA(rank=2, dropout=0.5)], ids=["full", "lora with dropout"])
@pytest.mark.parametrize("loss", [DPOLoss(), IntermediateLoss(layers=(1,))], ids=lambda x: type(x).__name__)
def test_a_run_in_parts_is_the_run(tmp_path, loss, adapter):
    pairs, found = runs.pairs_file(tmp_path, 16), []
    for most in (None, 10_000, 60):
        module = runs.module(loss=loss, adapter=adapter, max_tokens=most, lr=0.1)
        run = runs.fit(module, runs.data(pairs), max_steps=3)
        found.append((runs.weights(module.policy), float(run.callback_metrics["val/loss"])))
    (whole, value), (within, same), (parts, close) = found
    assert runs.same(within, whole)
    assert same == value
    if adapter is None:  # dropout draws other masks for parts, but the same ones again in their backward pass
        torch.testing.assert_close(parts, whole, rtol=0, atol=1e-5)
        assert close == pytest.approx(value, abs=1e-5)


def test_it_is_refused_where_it_cannot_serve():
    with pytest.raises(ValueError, match="`max_tokens` must be at least 1, got 0"):
        runs.module(max_tokens=0)
    for sharded in ("mesh", "FSDP1"):
        module = runs.module(max_tokens=60)
        if sharded == "mesh":
            module._device_mesh = {}
        else:
            module._trainer = SimpleNamespace(strategy=FSDPStrategy.__new__(FSDPStrategy))
        with pytest.raises(ValueError, match="`max_tokens` is not for sharded models"):
            module.configure_model()
