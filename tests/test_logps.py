import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lit_dpo.scoring.logps import sum_by_completion, token_logps

TOKENS, WIDTH, VOCABULARY = 11, 5, 23
HEADS = {
    "plain": {},
    "bias": {"with_bias": True},
    "scale": {"scale": 0.25},
    "softcap": {"softcap": 2.0},
    "all": {"with_bias": True, "scale": 1.7, "softcap": 3.0},
}
every_head = pytest.mark.parametrize("head", HEADS.values(), ids=HEADS.keys())


@pytest.fixture(params=[(3, 4), (11, 23), (1, 1), (100, 7)], ids=lambda t: f"tiles{t[0]}x{t[1]}")
def _tiles(request, monkeypatch):
    monkeypatch.setattr("lit_dpo.scoring.logps.TOKEN_TILE", request.param[0])
    monkeypatch.setattr("lit_dpo.scoring.logps.VOCAB_TILE", request.param[1])


@pytest.fixture
def _small_tiles(monkeypatch):
    monkeypatch.setattr("lit_dpo.scoring.logps.TOKEN_TILE", 4)
    monkeypatch.setattr("lit_dpo.scoring.logps.VOCAB_TILE", 8)


def made(with_bias=False, scale=1.0, softcap=None, dtype=torch.float64, seed=0):
    """Random hidden states, weight, targets and bias, and the two options."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(TOKENS, WIDTH, generator=generator, dtype=torch.float64)
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator, dtype=torch.float64)
    bias = torch.randn(VOCABULARY, generator=generator, dtype=torch.float64) if with_bias else None
    targets = torch.randint(VOCABULARY, (TOKENS,), generator=generator)
    targets[0], targets[-1] = 0, VOCABULARY - 1
    tensors = [None if t is None else t.to(dtype).requires_grad_() for t in (hidden, weight, bias)]
    return *tensors, targets, scale, softcap


def full_logps(hidden, weight, bias, targets, scale, softcap):
    """The same by `log_softmax` over all logits at once."""
    logits = torch.nn.functional.linear(hidden, weight, bias) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]


def value_and_grads(function, hidden, weight, bias, targets, scale, softcap):
    inputs = [t for t in (hidden, weight, bias) if t is not None]
    value = function(hidden, weight, bias, targets, scale, softcap)
    signs = torch.linspace(-1, 2, len(value), dtype=value.dtype)  # a different gradient for every token
    return value, *torch.autograd.grad((signs * value).sum(), inputs)


def tiled(hidden, weight, bias, targets, scale, softcap):
    return token_logps(hidden, weight, targets, bias, scale, softcap)


@every_head
@pytest.mark.usefixtures("_tiles")
def test_equals_log_softmax_in_value_and_gradient(head):
    inputs = made(**head)
    for ours, full in zip(value_and_grads(tiled, *inputs), value_and_grads(full_logps, *inputs), strict=True):
        assert ours.dtype == full.dtype == torch.float64
        assert ours.shape == full.shape
        assert (ours - full).abs().max() <= 1e-12


@every_head
@pytest.mark.usefixtures("_small_tiles")
def test_gradcheck(head):
    hidden, weight, bias, targets, scale, softcap = made(**head)
    inputs = (hidden, weight) if bias is None else (hidden, weight, bias)
    assert torch.autograd.gradcheck(lambda h, w, b=None: token_logps(h, w, targets, b, scale, softcap), inputs)


def test_by_hand():
    # Logits 0, log 2, log 5 have the sum of exponentials 1 + 2 + 5 = 8.
    hidden, weight = torch.tensor([[1.0]]), torch.tensor([[0.0], [math.log(2)], [math.log(5)]])
    for target, share in ((0, 1 / 8), (1, 2 / 8), (2, 5 / 8)):
        value = token_logps(hidden, weight, torch.tensor([target]))
        assert value.item() == pytest.approx(math.log(share), rel=1e-6)


@pytest.mark.usefixtures("_small_tiles")
def test_no_gradient_where_none_is_wanted():
    hidden, weight, bias, targets, scale, softcap = made(with_bias=True)
    _, full_hidden, full_weight, full_bias = value_and_grads(full_logps, hidden, weight, bias, targets, scale, softcap)

    signs = torch.linspace(-1, 2, TOKENS, dtype=torch.float64)
    frozen_head = (signs * token_logps(hidden, weight.detach(), targets, bias.detach())).sum()
    (grad,) = torch.autograd.grad(frozen_head, hidden)
    assert torch.allclose(grad, full_hidden, rtol=0, atol=1e-12)

    frozen_body = (signs * token_logps(hidden.detach(), weight, targets, bias)).sum()
    grads = torch.autograd.grad(frozen_body, (weight, bias))
    assert torch.allclose(grads[0], full_weight, rtol=0, atol=1e-12)
    assert torch.allclose(grads[1], full_bias, rtol=0, atol=1e-12)

    assert not token_logps(hidden.detach(), weight.detach(), targets).requires_grad
    with torch.no_grad():
        assert not token_logps(hidden, weight, targets).requires_grad


def test_second_derivatives_are_refused_rather_than_wrong():
    hidden, weight, _, targets, _, _ = made()
    (grad,) = torch.autograd.grad(token_logps(hidden, weight, targets).sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(grad.square().sum(), hidden)


@every_head
@pytest.mark.usefixtures("_small_tiles")
def test_float32_and_bfloat16_are_close_to_float64(head):
    exact = value_and_grads(full_logps, *made(**head))
    single = value_and_grads(tiled, *made(**head, dtype=torch.float32))
    assert single[0].dtype == torch.float32
    for ours, full in zip(single, exact, strict=True):
        assert torch.allclose(ours.double(), full, rtol=1e-5, atol=1e-5)

    half_inputs = made(**head, dtype=torch.bfloat16)
    half = value_and_grads(tiled, *half_inputs)
    assert half[0].dtype == torch.float32  # whatever the model's dtype
    assert [g.dtype for g in half[1:]] == [torch.bfloat16] * (len(half) - 1)
    widened = [t.detach().double().requires_grad_() if isinstance(t, torch.Tensor) else t for t in half_inputs[:3]]
    exact = value_and_grads(full_logps, *widened, *half_inputs[3:])
    for ours, full in zip(half, exact, strict=True):
        assert torch.allclose(ours.double(), full, rtol=2e-2, atol=4e-2)


@pytest.mark.usefixtures("_small_tiles")
def test_autocast_runs_products_in_bfloat16_and_the_rest_in_float32():
    inputs = made(with_bias=True, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ours = value_and_grads(tiled, *inputs)
    assert [t.dtype for t in ours] == [torch.float32] * 4  # gradients in the dtype of what they belong to
    hidden, weight, bias, targets, _, _ = inputs
    assert torch.equal(ours[0], token_logps(hidden.bfloat16(), weight, targets, bias))
    exact = value_and_grads(full_logps, *inputs)
    for mine, full in zip(ours, exact, strict=True):
        assert torch.allclose(mine, full, rtol=2e-2, atol=5e-2)


@pytest.mark.usefixtures("_small_tiles")
def test_huge_logits_stay_finite():
    hidden, weight, _, targets, _, _ = made(dtype=torch.float32)
    value, *grads = value_and_grads(tiled, hidden, weight, None, targets, 1e4, None)
    assert value.isfinite().all()
    assert all(grad.isfinite().all() for grad in grads)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_no_tensor_of_tokens_times_vocabulary(softcap, monkeypatch):
    monkeypatch.setattr("lit_dpo.scoring.logps.TOKEN_TILE", 8)
    monkeypatch.setattr("lit_dpo.scoring.logps.VOCAB_TILE", 16)
    tokens, width, vocabulary = 64, 3, 100
    hidden = torch.randn(tokens, width, requires_grad=True)
    weight, bias = torch.randn(vocabulary, width, requires_grad=True), torch.randn(vocabulary, requires_grad=True)
    targets = torch.randint(vocabulary, (tokens,))
    with Largest() as largest:
        token_logps(hidden, weight, targets, bias, 0.5, softcap).sum().backward()
    assert largest.elements <= vocabulary * width  # 300, of 6,400 logits in all
    with Largest() as largest:
        full_logps(hidden, weight, bias, targets, 0.5, softcap)
    assert largest.elements == tokens * vocabulary  # the recorder does see such a tensor


def test_sums_by_completion():
    logps = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0], dtype=torch.float64, requires_grad=True)
    sums = sum_by_completion(logps, torch.tensor([1, 3, 2]))
    assert sums.tolist() == [1.0, 14.0, 48.0]
    (grad,) = torch.autograd.grad((sums * torch.tensor([1.0, 10.0, 100.0])).sum(), logps)
    assert grad.tolist() == [1.0, 10.0, 10.0, 10.0, 100.0, 100.0]
    values = torch.randn(6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: sum_by_completion(x, torch.tensor([1, 3, 2])), values)
