"""What is found out about a model before its first step, by what it does rather than by its name.

Which form serves it, and whether training mode draws random numbers. `scoring/sizes.py` compares it with the rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from lit_dpo.pairs import PairBatch
from lit_dpo.scoring.decoder import DecoderParts, adapters_off, decoder_parts
from lit_dpo.scoring.inputs import PAIR_ATTENTION, padded
from lit_dpo.scoring.logps import sum_by_completion
from lit_dpo.scoring.score import (
    SHARDED_METHOD,
    BatchForm,
    flat_attention,
    flat_obstacle,
    own_attention,
    score,
)

_EXACT = (torch.float32, torch.float64)
_FAILURES = (NotImplementedError, TypeError, RuntimeError, ValueError, IndexError)


@torch.inference_mode(False)  # a validation is in it, and the audit takes gradients
def choose_form(model: nn.Module, form: BatchForm = "auto") -> tuple[BatchForm, str | None]:
    """Audit the scoring of a few made-up pairs against the model's own logits, and settle the form.

    The flat line must also keep branches and pairs apart, whatever the size of the effect, and a pair must not depend
    on its place on the line.

    Returns:
        `auto` or `padded`, and the reason where the flat line does not serve.

    Raises:
        ValueError: The form asked for, or every form, gives other log-probs than the model itself.
    """
    parts = decoder_parts(model)
    batch = _made_up(parts, [(3, 2, 1), (1, 1, 4), (4, 2, 2)])
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        if form != "padded":
            reason = flat_obstacle(model, batch) or _flat_problem(model, parts, batch)
            if reason is None:
                return "auto", None
            if form == "flat":
                raise ValueError(f"The flat form cannot serve this model: {reason}. Use `form: padded` or `auto`.")
        else:
            reason = "the padded form was asked for"
        try:
            problem = _difference(model, parts, batch, "padded")
        except _FAILURES as error:
            raise ValueError(
                f"{type(parts.model).__name__} cannot be scored: it fails on a few tokens ({_first_line(error)})."
            ) from error
        if problem is not None:
            raise ValueError(f"{type(parts.model).__name__} cannot be scored: {problem}.")
        return "padded", reason
    finally:
        for module, training in modes:
            module.training = training


def calm(model: nn.Module, form: BatchForm = "auto") -> list[str]:
    """Switch off what makes training mode score otherwise than evaluation mode, so that nothing is random in it.

    A few made-up pairs are scored in both modes. If random numbers are drawn or log-probs differ, the classes of
    modules that cause it are found one by one, and from then on run as in evaluation mode: router noise, layer drop,
    dropout under whatever name. Adapters are off meanwhile, so that their dropout, which was asked for, stays.

    Returns:
        Names of the classes that were switched off; none for most models.

    Raises:
        ValueError: It cannot be switched off.
    """
    parts = decoder_parts(model)
    name = type(parts.model).__name__
    batch = _made_up(parts, [(3, 2, 1), (4, 2, 3)])
    modules = [module for path, module in model.named_modules() if "lora_" not in path]
    modes = [(module, module.training) for module in model.modules()]
    try:
        with adapters_off(model):
            model.eval()
            quiet, drawn = _scored(model, batch, form, 1)
            if drawn and not _alike(quiet, _scored(model, batch, form, 2)[0]):
                raise ValueError(
                    f"{name} gives random log-probs even in evaluation mode: set what makes them so to 0 in its config."
                )

            def noisy() -> bool:
                found, drawn = _scored(model, batch, form, 3)
                return drawn or not _alike(found, quiet)

            model.train()
            if not noisy():
                return []
            culprits = []
            for kind in dict.fromkeys(map(type, modules)):
                for module in model.modules():
                    module.training = type(module) is kind
                if noisy():
                    culprits.append(kind)
            for module in modules:
                if type(module) in culprits:
                    module.register_forward_pre_hook(_into_evaluation)
                    module.register_forward_hook(_out_of_evaluation, always_call=True)
            model.train()
            if noisy():
                raise ValueError(
                    f"{name} scores otherwise in training mode than in evaluation mode, and that could not be switched "
                    "off: set its dropout, noise and layer drop to 0 in its config."
                )
            return [kind.__name__ for kind in culprits]
    finally:
        for module, training in modes:
            module.training = training


def _made_up(parts: DecoderParts, lengths: Sequence[tuple[int, int, int]], seed: int = 0) -> PairBatch:
    generator = torch.Generator().manual_seed(seed)
    vocabulary = min(1000, parts.model.config.get_text_config().vocab_size)
    pairs = [[torch.randint(vocabulary, (n,), generator=generator).tolist() for n in pair] for pair in lengths]
    return PairBatch.from_lists([(p, c, r) for p, c, r in pairs]).to(next(parts.model.parameters()).device)


def _first_line(error: Exception) -> str:
    return [*str(error).strip().splitlines(), type(error).__name__][0]


# -- the form -------------------------------------------------------------------------------------------------------


def _flat_problem(model: nn.Module, parts: DecoderParts, batch: PairBatch) -> str | None:
    """What the flat line gets wrong, if anything."""
    try:
        return _difference(model, parts, batch, "flat") or _crossing(model, parts, batch) or _displacement(model, parts)
    except _FAILURES as error:
        return f"its decoder does not take the flat line ({_first_line(error)})"


@torch.no_grad()
def _difference(model: nn.Module, parts: DecoderParts, batch: PairBatch, form: BatchForm) -> str | None:
    """Compare scoring with the model's own logits over one sequence at a time; say what differs, if anything."""
    own_attention(model)
    ids, mask, sources = padded(batch)
    counts = batch.completion_lengths.tolist()
    logps, exact = [], True
    for row, places in enumerate(sources.split(counts)):
        logits = model(input_ids=ids[row : row + 1, : int(mask[row].sum())], use_cache=False).logits[0]
        exact = logits.dtype in _EXACT
        logps.append(logits[places - row * batch.longest].double().log_softmax(-1))
    values = torch.cat(logps).gather(1, batch.targets[:, None])[:, 0]
    expected = sum_by_completion(values, batch.completion_lengths)
    got = score(model, batch, form=form)
    gaps = (torch.stack([got.chosen, got.rejected], 1).flatten() - expected).abs()
    limits = 1e-3 * expected.abs().clamp(min=1) if exact else torch.full_like(expected, 0.5)
    worst = int((gaps / limits).nan_to_num(torch.inf).argmax())
    if gaps[worst] <= limits[worst]:
        return None
    return (
        f"its log-probs in the {form} form differ from its own logits by {float(gaps[worst]):.3g} nats "
        f"(limit {float(limits[worst]):.2g})"
    )


def _crossing(model: nn.Module, parts: DecoderParts, batch: PairBatch) -> str | None:
    """Say if log-probs depend on another branch or pair: the gradient is exactly 0 wherever they do not."""
    if hasattr(model, SHARDED_METHOD):  # its gradients go through whole backward passes only; `_displacement` is left
        return None
    leaves: list[Tensor] = []

    def cut(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        leaves.append(output.detach().requires_grad_())
        return leaves[-1].clone()

    handle = parts.model.get_input_embeddings().register_forward_hook(cut)
    try:
        with torch.enable_grad():
            logps = score(model, batch, form="flat")
            pair = 1
            start = sum(sum(sizes) for sizes in batch.shape[:pair])
            prompt, chosen, rejected = batch.shape[pair]
            branch = start + prompt + chosen
            for value, other in (
                (logps.chosen[pair], (branch, rejected)),
                (logps.rejected[pair], (branch - chosen, chosen)),
            ):
                foreign = torch.ones(len(batch.input_ids), dtype=torch.bool, device=batch.input_ids.device)
                foreign[start : branch + rejected] = False
                foreign[other[0] : sum(other)] = True
                lines = [leaf for leaf in leaves if leaf.shape[:2] == (1, len(foreign))]
                for gradient in torch.autograd.grad(value, lines, retain_graph=True, allow_unused=True):
                    if gradient is not None and bool((gradient[0, foreign] != 0).any()):
                        return "its log-probs depend on another branch or pair of the line"
    finally:
        handle.remove()
    return None


@torch.no_grad()
def _displacement(model: nn.Module, parts: DecoderParts) -> str | None:
    """Say if what attention works on depends on the place on the line, neighbours, or the other branch.

    A pair is looked at once alone, and once far down a line of a few hundred tokens, with another chosen completion.
    """
    line = _made_up(parts, [(2, 3, 2), (4, 1, 1)] * 20 + [(3, 2, 3)])
    (pair,) = line.split(1)[-1:]
    alone = PairBatch.from_lists(
        [(pair.input_ids[:3].tolist(), pair.input_ids[[0, 2, 1, 4]].tolist(), pair.input_ids[5:].tolist())]
    ).to(pair.input_ids.device)
    far = len(line.input_ids) - 8  # prompt at 0 to 2, rejected completion at 5 to 7
    places = ([far, far + 1, far + 2, far + 5, far + 6, far + 7], [0, 1, 2, 7, 8, 9])
    found = [_attended(model, batch, rows) for batch, rows in zip((line, alone), places, strict=True)]
    for there, here in zip(*found, strict=True):
        gap = float((there.double() - here.double()).norm() / here.double().norm().clamp(min=1e-30))
        if not gap <= (1e-3 if here.dtype in _EXACT else 0.1):
            return f"what it computes depends on the place on the line (by {gap:.1%} in the states of its attention)"
    return None


def _attended(model: nn.Module, batch: PairBatch, rows: list[int]) -> list[Tensor]:
    """Queries, keys and values of these tokens of the line, each of shape (heads, rows, width), layer by layer."""
    found: list[Tensor] = []

    def noted(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Any:
        found.extend(tensor[0][:, rows] for tensor in (query, key, value))
        return flat_attention(module, query, key, value, *args, **options)

    AttentionInterface.register(PAIR_ATTENTION, noted)
    try:
        score(model, batch, form="flat")
    finally:
        AttentionInterface.register(PAIR_ATTENTION, flat_attention)
    return found


# -- randomness -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _scored(model: nn.Module, batch: PairBatch, form: BatchForm, seed: int) -> tuple[Tensor, bool]:
    """Log-probs, shape (2, batch), and whether random numbers were drawn for them."""
    device = batch.input_ids.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        before = _random_state(device)
        logps = score(model, batch, form=form)
        drawn = not torch.equal(before, _random_state(device))
    return torch.stack([logps.chosen, logps.rejected]), drawn


def _random_state(device: torch.device) -> Tensor:
    state = torch.get_rng_state()
    return torch.cat([state, torch.cuda.get_rng_state(device)]) if device.type == "cuda" else state


def _alike(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-5, atol=1e-5, equal_nan=True)


def _into_evaluation(module: nn.Module, args: Any) -> None:
    module._mode_outside, module.training = module.training, False  # type: ignore[assignment]


def _out_of_evaluation(module: nn.Module, args: Any, output: Any) -> None:
    module.training = bool(module._mode_outside)
