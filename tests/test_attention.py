import itertools
import warnings

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from lit_dpo.scoring import attention
from lit_dpo.scoring.attention import pair_attention
from tests.oracles import dense_attention, sees

SHAPES = {
    "chosen alone": ((3, 2, 0), (1, 4, 0)),
    "one without rejected": ((3, 2, 0), (2, 1, 3)),
    "one pair": ((3, 2, 4),),
    "shortest": ((1, 1, 1),),
    "several": ((2, 1, 3), (1, 4, 1), (5, 2, 2)),
}
OPTIONS = {
    "plain": {},
    "scale": {"scale": 0.7},
    "softcap": {"softcap": 1.5},
    "both": {"scale": 0.7, "softcap": 1.5},
}


def made(shape, heads=4, key_heads=4, width=6, value_width=6, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    tokens = sum(map(sum, shape))
    sizes = ((heads, width), (key_heads, width), (key_heads, value_width))
    return [
        (2 * torch.randn(1, h, tokens, w, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()
        for h, w in sizes
    ]


def value_and_grads(function, inputs):
    value = function(*inputs)
    weights = torch.linspace(-1, 2, value.numel(), dtype=value.dtype).view_as(value)
    return value, *torch.autograd.grad((weights * value).sum(), inputs)


def test_the_rule_by_hand():
    # P P C R: each sees itself and the prompt before it, and R does not see C.
    assert sees(((2, 1, 1),)).int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 0, 1]]


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("key_heads", [4, 2, 1])
def test_equals_dense_attention_in_value_and_gradient(shape, options, key_heads):
    inputs = made(shape, key_heads=key_heads)
    fast = value_and_grads(lambda q, k, v: pair_attention(q, k, v, shape, **options), inputs)
    slow = value_and_grads(lambda q, k, v: dense_attention(q, k, v, sees(shape), **options), inputs)
    for ours, dense in zip(fast, slow, strict=True):
        assert ours.shape == dense.shape
        assert (ours - dense).abs().max() <= 1e-12


def flash_kernel(query, key, value, calls, dropout, scale):
    """What the flash kernel promises, in plain torch: call by call, grouped heads, causal, aligned to the last key."""
    assert dropout == 0.0
    assert len(query) == calls.query_ends[-1]
    assert len(key) == len(value) == calls.key_ends[-1]
    group, out = query.shape[1] // key.shape[1], torch.zeros_like(query)
    query_ends, key_ends = calls.query_ends.tolist(), calls.key_ends.tolist()
    assert calls.longest_query == max(b - a for a, b in itertools.pairwise(query_ends))
    assert calls.longest_key == max(b - a for a, b in itertools.pairwise(key_ends))
    for (q0, q1), (k0, k1) in zip(itertools.pairwise(query_ends), itertools.pairwise(key_ends), strict=True):
        for place in range(q0, q1):
            last = k1 - (q1 - place)  # the last query sees the last key
            for head in range(query.shape[1]):
                keys, values = key[k0 : last + 1, head // group], value[k0 : last + 1, head // group]
                weights = (keys @ query[place, head] * (scale or query.shape[2] ** -0.5)).softmax(0)
                out[place, head] = weights @ values
    return out


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize("key_heads", [4, 1])
def test_one_call_for_all_pairs_equals_dense_attention(monkeypatch, shape, scale, key_heads):
    monkeypatch.setattr(attention, "_flash_serves", lambda *tensors: True)
    monkeypatch.setattr(attention, "_flash", flash_kernel)
    inputs = made(shape, key_heads=key_heads)
    fast = value_and_grads(lambda q, k, v: pair_attention(q, k, v, shape, scale), inputs)
    slow = value_and_grads(lambda q, k, v: dense_attention(q, k, v, sees(shape), scale), inputs)
    for ours, dense in zip(fast, slow, strict=True):
        assert ours.shape == dense.shape
        assert (ours - dense).abs().max() <= 1e-12


def test_the_flash_kernel_is_asked_with_its_own_names():
    """Nothing runs it without a GPU, but PyTorch checks an operator's arguments before it looks for a kernel."""
    calls = attention._calls(((2, 1, 1),), torch.device("cpu"))
    tensors = [torch.zeros(n, 1, 8, dtype=torch.bfloat16) for n in (4, 6, 6)]
    with pytest.raises(NotImplementedError, match="CPU"):
        attention._flash(*tensors, calls, 0.0, None)
    assert not attention._flash_serves(*tensors)


def aligned_to_the_start(query, key, value, calls, dropout, scale):
    """A kernel whose first query sees the first key, as ROCm's."""
    out = torch.zeros_like(query)
    ends = [itertools.pairwise(ends.tolist()) for ends in (calls.query_ends, calls.key_ends)]
    for (q0, q1), (k0, _) in zip(*ends, strict=True):
        for place in range(q0, q1):
            keys, values = key[k0 : k0 + place - q0 + 1], value[k0 : k0 + place - q0 + 1]
            weights = torch.einsum("khw,hw->hk", keys, query[place]).softmax(1)
            out[place] = torch.einsum("hk,khw->hw", weights, values)
    return out


def refuses(*args):
    raise RuntimeError("no kernel image")


class Gradientless(torch.autograd.Function):
    @staticmethod
    def forward(ctx, out):
        return out.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * torch.nan


def right_but_for_its_gradient(*args):
    return Gradientless.apply(flash_kernel(*args))


@pytest.mark.parametrize(
    ("kernel", "said"),
    [
        (flash_kernel, None),
        (aligned_to_the_start, "differs: by "),
        (right_but_for_its_gradient, "differs: by 0.0%, nan%"),
        (refuses, "refuses: no kernel image"),
    ],
)
def test_the_kernel_is_compared_before_it_is_used(monkeypatch, kernel, said):
    monkeypatch.setattr(attention, "_flash", kernel)
    monkeypatch.setattr(attention, "_DISTRUSTED", set())
    check = attention._flash_agrees.__wrapped__
    with warnings.catch_warnings(record=True) as caught, torch.inference_mode():
        warnings.simplefilter("always")
        agrees = check(torch.device("cpu"), torch.float32, 2, 2, 8)
    assert agrees == (said is None)
    assert len(caught) == (said is not None), [str(warning.message) for warning in caught]
    assert all(said in str(warning.message) for warning in caught)


def test_the_comparison_leaves_a_checkpoint_around_it_alone(monkeypatch):
    """The first call of all may stand in a checkpointed block, which counts the tensors that are kept."""
    monkeypatch.setattr(attention, "_flash", flash_kernel)
    monkeypatch.setattr(attention, "flash_here", lambda device: True)
    attention._flash_agrees.cache_clear()
    made = [torch.randn(1, 2, 4, 8, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    out = checkpoint(lambda *tensors: pair_attention(*tensors, ((2, 1, 1),)), *made, use_reentrant=False)
    out.sum().backward()
    assert attention._flash_agrees.cache_info().misses == 1
    attention._flash_agrees.cache_clear()
    assert made[0].grad.isfinite().all()


def test_attention_runs_on_the_meta_device():
    tensors = [torch.zeros(1, 2, 4, 8, device="meta") for _ in range(3)]
    assert pair_attention(*tensors, ((2, 1, 1),)).shape == (1, 2, 4, 8)


def test_autocast_reaches_attention_that_is_not_pytorchs(monkeypatch):
    """transformers' rotary embedding turns queries and keys back to float32 under autocast, but not values."""
    seen = []
    monkeypatch.setattr(attention, "_flash_serves", lambda *tensors: seen.append([t.dtype for t in tensors]))
    query, key, value = (torch.randn(1, 2, 4, 8) for _ in range(3))
    with torch.autocast("cpu", torch.bfloat16):
        out = pair_attention(query, key, value.bfloat16(), ((2, 1, 1),))
    assert seen == [[torch.bfloat16] * 3]
    assert out.dtype == torch.bfloat16


def test_values_may_have_another_width():
    shape = ((2, 3, 1), (1, 1, 2))
    inputs = made(shape, key_heads=2, value_width=3)
    out = pair_attention(*inputs, shape)
    assert out.shape == (1, 4, 10, 3)
    assert (out - dense_attention(*inputs, sees(shape))).abs().max() <= 1e-12


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_half_precision_stays_half_and_close(softcap):
    shape = SHAPES["several"]
    inputs = made(shape, key_heads=2, dtype=torch.bfloat16)
    out = pair_attention(*inputs, shape, softcap=softcap)
    assert out.dtype == torch.bfloat16
    exact = dense_attention(*(x.double() for x in inputs), sees(shape), softcap=softcap)
    assert torch.allclose(out.double(), exact, rtol=2e-2, atol=1e-1)


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_dropout_drops_weights_and_keeps_their_mean(softcap):
    shape = ((40, 20, 30),)
    query, key, _ = (x.detach() for x in made(shape))
    ones = torch.ones_like(key)  # without dropout every output is 1
    assert torch.allclose(pair_attention(query, key, ones, shape, softcap=softcap), ones)
    out = torch.stack([pair_attention(query, key, ones, shape, softcap=softcap, dropout=0.5) for _ in range(20)])
    for segment in out.split(shape[0], 3):
        assert segment.std() > 0.1
        assert segment.mean().item() == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("changed", ["P", "C", "R"])
def test_no_other_pair_and_no_other_branch_is_seen(changed):
    """Change one segment of the middle pair; the outputs that change are those that may see it."""
    shape = ((2, 2, 2), (3, 2, 4), (1, 2, 1))
    inputs = [x.detach() for x in made(shape)]
    before = pair_attention(*inputs, shape)
    start = {"P": 6, "C": 9, "R": 11}[changed]
    inputs[1][:, :, start], inputs[2][:, :, start] = 5.0, 5.0
    after = pair_attention(*inputs, shape)
    moved = (before != after).flatten(0, 1).any(-1).any(0)
    assert torch.equal(moved, sees(shape)[:, start])


def test_a_mask_made_in_inference_mode_serves_training():
    """Masks are kept between calls; Lightning validates in inference mode, whose tensors no graph may hold."""
    shape = ((31, 7, 11),)
    query, key, value = (torch.randn(1, 2, 49, 8, requires_grad=True) for _ in range(3))
    with torch.inference_mode():
        pair_attention(query, key, value, shape)
    pair_attention(query, key, value, shape).sum().backward()
    assert query.grad is not None
