"""On one GPU: what the CPU cannot show. Run with ``pytest -m gpu``."""

import pytest
import torch

from lit_dpo import PairBatch, score
from lit_dpo.scoring import attention
from tests import interrupted, runs
from tests.oracles import dense_attention, sees

pytestmark = [*runs.QUIET, pytest.mark.gpu]


@pytest.fixture
def deterministic(monkeypatch):
    """PyTorch's own switch for kernels whose sums have a fixed order."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("strategy", ["auto", "fsdp2", "fsdp"])
@pytest.mark.parametrize("lora", [False, True])
def test_a_run_on_a_gpu_resumes_bit_for_bit(tmp_path, deterministic, strategy, lora):
    options = {"file": runs.pairs_file(tmp_path, 25), "accelerator": "gpu", "strategy": strategy, "lora": lora}
    folder = tmp_path / "run"
    folder.mkdir()
    module = interrupted.train(folder, options)
    expected, weights = interrupted.entries(folder / "log.jsonl"), held(module)
    (folder / "log.jsonl").unlink()
    again = interrupted.train(folder, options, folder / "checkpoints" / "previous.ckpt")
    found = interrupted.entries(folder / "log.jsonl")
    assert found
    assert found == expected[-len(found) :]
    assert runs.same(held(again), weights)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("key_heads", [4, 2, 1])
@pytest.mark.parametrize("width", [64, 128])
def test_one_flash_call_for_all_pairs_equals_dense_attention(dtype, key_heads, width):
    shape = ((17, 9, 30), (1, 1, 1), (5, 40, 41))
    generator = torch.Generator().manual_seed(0)
    tokens = sum(map(sum, shape))
    made = [torch.randn(1, tokens, h, width, generator=generator) for h in (4, key_heads, key_heads)]
    inputs = [x.transpose(1, 2) for x in made]  # as a transformers model lays them out
    weights = torch.randn(1, 4, tokens, width, generator=generator)
    exact = [x.clone().requires_grad_() for x in inputs]
    expected = dense_attention(*exact, sees(shape))
    half = [x.to("cuda", dtype).requires_grad_() for x in inputs]
    assert attention._flash_serves(*half)
    got = attention.pair_attention(*half, shape)
    assert got.dtype == dtype
    assert torch.allclose(got.float().cpu(), expected, atol=3e-2)
    expected_grads = torch.autograd.grad((weights * expected).sum(), exact)
    grads = torch.autograd.grad((weights.to("cuda", dtype) * got).sum(), half)
    for ours, theirs in zip(grads, expected_grads, strict=True):
        assert (ours.float().cpu() - theirs).norm() <= 2e-2 * theirs.norm()


@pytest.mark.parametrize("autocast", [False, True])
def test_scoring_takes_the_flash_kernel_and_obeys_its_switch(monkeypatch, autocast):
    called = []
    real = attention._flash
    monkeypatch.setattr(attention, "_flash", lambda *args: called.append(1) or real(*args))
    module = runs.module()
    module.configure_model()
    policy = module.policy.to("cuda", torch.float32 if autocast else torch.bfloat16)
    batch = PairBatch.from_lists([([1, 2, 3], [4, 5], [6]), ([7], [8], [9, 10, 11])]).to("cuda")
    found = {}
    for flash in (True, False):
        torch.backends.cuda.enable_flash_sdp(flash)
        called.clear()
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            found[flash] = score(policy, batch, form="flat").chosen
        assert bool(called) == flash
    torch.backends.cuda.enable_flash_sdp(True)
    assert torch.allclose(found[True], found[False], atol=0.3)


def held(module):
    """What a process holds of the policy."""
    return {
        name: p.to_local() if hasattr(p, "to_local") else p.detach().clone() for name, p in module.named_parameters()
    }


@pytest.mark.parametrize("strategy", ["fsdp2", "fsdp"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_sharding_strategies_train_what_one_device_trains(tmp_path, strategy, precision):
    values = []
    for chosen in ("auto", strategy):
        module, data = runs.module(lr=0.1), runs.data(runs.pairs_file(tmp_path), batch_size=4)
        run = runs.fit(module, data, max_steps=3, accelerator="gpu", strategy=chosen, precision=precision)
        values.append({k: float(v) for k, v in run.callback_metrics.items() if k.startswith("val/")})
    assert values[1] == pytest.approx(values[0], rel=2e-2 if precision == "bf16-mixed" else 1e-4, abs=2e-2)
