"""Models that Fabric has wrapped are scored as the models inside are, under Fabric's precision and through its DDP."""

import copy

import lightning as L
import pytest
import torch
from torch import nn

from lit_dpo import DPOLoss, PairBatch, score
from tests.models import tiny_model

BATCH = PairBatch.from_lists([([1, 2, 3], [4, 5], [6]), ([7], [8], [9, 10, 11, 12]), ([2, 3], [1], [2, 2])])


def gradients(model, logps):
    (DPOLoss()(logps, logps.zeros()).mean()).backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("max_tokens", [None, 9])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_log_probs_and_gradients_are_those_of_autocast(precision, max_tokens):
    plain = tiny_model("llama")
    wrapped = L.Fabric(accelerator="cpu", devices=1, precision=precision).setup(copy.deepcopy(plain))
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
        expected = score(plain, BATCH, (1,), max_tokens=max_tokens, per_token=True)
    found = score(wrapped, BATCH, (1,), max_tokens=max_tokens, per_token=True)
    assert torch.equal(found.tokens, expected.tokens)
    assert torch.equal(found.layers[1].rejected, expected.layers[1].rejected)
    assert all(map(torch.equal, gradients(wrapped, found), gradients(plain, expected)))
    assert torch.equal(score(wrapped, BATCH).chosen, score(plain, BATCH).chosen) == (precision == "32-true")


@pytest.fixture
def ddp():
    fabric = L.Fabric(accelerator="cpu", devices=1, strategy="ddp")
    fabric.launch()
    yield fabric
    torch.distributed.destroy_process_group()


def test_gradients_go_through_ddp(ddp):
    plain = tiny_model("llama")
    wrapped = ddp.setup(copy.deepcopy(plain))
    seen, outer = [], wrapped._forward_module
    outer.register_comm_hook(None, lambda state, bucket: noted(seen, bucket))
    found = score(wrapped, BATCH, max_tokens=9)
    assert torch.equal(found.chosen, score(plain, BATCH, max_tokens=9).chosen)
    assert all(map(torch.equal, gradients(wrapped, found), gradients(plain, score(plain, BATCH, max_tokens=9))))
    assert sum(seen) == sum(parameter.numel() for parameter in plain.parameters())
    ids = torch.tensor([[1, 2, 3]])
    assert wrapped(input_ids=ids).logits.shape == (1, 3, plain.config.vocab_size)  # its forward is its own again


def noted(seen, bucket):
    seen.append(bucket.buffer().numel())
    done = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done


def test_what_it_cannot_go_through_is_refused_in_one_sentence():
    wrapped = L.Fabric(accelerator="cpu", devices=1).setup(tiny_model("llama"))
    wrapped._forward_module = nn.Sequential(wrapped._original_module)
    with pytest.raises(ValueError, match="scored as it is or in DDP, not in Sequential: use the strategy `ddp`"):
        score(wrapped, BATCH)
