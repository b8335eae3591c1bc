"""`lit-dpo check`: whether a fit would run, and what memory, time and disk space it takes; nothing is left behind."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from rich.text import Text
from torch import OutOfMemoryError

from lit_dpo.data import PreferenceDataModule
from lit_dpo.models import empty_model
from lit_dpo.module import PreferenceModule
from lit_dpo.references.cached import CachedReference
from lit_dpo.references.frozen import FrozenReference
from lit_dpo.stepwise import refuse_settings
from lit_dpo.tools import page
from lit_dpo.tools.before import nearest, set_up, without_news, writable
from lit_dpo.tools.given import Finding, about_data, about_settings
from lit_dpo.tools.measured import Measuring, StartReference, TooLargeError
from lit_dpo.tools.memory import Memory, size
from lit_dpo.tools.plan import Plan, planned

_GIB = 2**30
_FAST = 1e-5  # learning rate above which full fine-tuning is known to destroy a model
_ERRORS = (ValueError, OSError, FloatingPointError, ImportError, MisconfigurationException)
_COLOURS = {"fine": "green", "warning": "yellow", "fails": "bold red", "estimate": "cyan"}


def check(
    module: PreferenceModule,
    data: PreferenceDataModule,
    trainer: Trainer,
    make_trainer: Callable[..., Trainer],
    callbacks: Sequence[Any] = (),
    saves: bool = True,
    memory: float | None = None,
) -> int:
    """Print what is found out about a fit, a line each.

    Args:
        module: What would be trained; afterwards it has gone a few steps at learning rate 0.
        data: Not set up yet.
        trainer: Of the fit, without loggers and callbacks.
        make_trainer: Makes a Trainer of the same configuration, with options of its own.
        callbacks: Of the fit; none is run.
        saves: Whether the fit writes checkpoints.
        memory: GiB that the run may take; `None` is what the machine has left.

    Returns:
        The exit status: 0 if all is fine, 1 if something is known to go wrong often, 2 if the fit would fail.

    Raises:
        ValueError: `memory` is not above 0.
    """
    if memory is not None and memory <= 0:
        raise ValueError(f"`--memory` must be above 0 GiB, got {memory}.")
    console, levels = page.terminal(), {"fine"}
    for finding in _findings(module, data, trainer, make_trainer, callbacks, saves, memory):
        levels.add(finding.level)
        line = Text.assemble((f"{finding.level:9}", _COLOURS[finding.level]), finding.text)
        console.print(line, soft_wrap=not console.is_terminal)
    return 2 if "fails" in levels else 1 if "warning" in levels else 0


def _findings(
    module: PreferenceModule,
    data: PreferenceDataModule,
    trainer: Trainer,
    make_trainer: Callable[..., Trainer],
    callbacks: Sequence[Any],
    saves: bool,
    memory: float | None,
) -> Iterator[Finding]:
    device = trainer.strategy.root_device
    used = Memory(device)
    base = used.now
    room = used.room if memory is None else int(memory * _GIB)
    cached = module.reference if isinstance(module.reference, CachedReference) else None
    measuring: Measuring | None = None
    try:
        if data.stepwise:
            refuse_settings(module, data.partition)
        with without_news():
            set_up(module, data, trainer)
            plan = planned(data, trainer, callbacks, saves)
        yield from about_data(module, data, plan)
        yield from about_settings(module, trainer)
        least = _least(module)
        if room is not None and base + sum(least.values()) > room:
            yield _memory(module, data, trainer, plan, least, room, base)
            return
        if cached is not None:
            module.reference = StartReference(cached.of)
        root = nearest(Path(trainer.default_root_dir))
        place = root if saves and "://" not in trainer.default_root_dir and writable(root) else None
        measuring = Measuring(plan, min(2, trainer.accumulate_grad_batches), used, room, place)
        measuring.interval = trainer.log_every_n_steps  # type: ignore[attr-defined]
        _measure(module, data, make_trainer, measuring)
    except OutOfMemoryError:
        yield Finding("fails", f"memory: a batch does not fit into {_gib(room or 0)}: halve `--data.batch_size`")
        return
    except _ERRORS as error:
        yield Finding("fails", " ".join(str(error).split()))
        return
    yield from _started(module, measuring, cached)
    yield from _rate(module, measuring)
    yield from _disk(Path(trainer.default_root_dir), measuring, callbacks, saves, data.stepwise)
    peak = max(measuring.peak, measuring.extrapolated)
    yield _memory(module, data, trainer, plan, measuring.parts, room, base, peak)
    yield from _time(measuring)


def _measure(
    module: PreferenceModule, data: PreferenceDataModule, make_trainer: Callable[..., Trainer], measuring: Measuring
) -> None:
    """Train a few batches on one process, at learning rate 0."""
    training, validating = measuring.loaders(data)
    data.train_dataloader = lambda: training  # type: ignore[method-assign]
    data.val_dataloader = lambda: validating  # type: ignore[method-assign]
    alone: dict[str, Any] = {"strategy": "auto", "devices": 1, "num_nodes": 1}
    whole: dict[str, Any] = {"max_epochs": 1, "max_steps": -1, "max_time": None, "fast_dev_run": False}
    whole |= {"limit_train_batches": 1.0, "limit_val_batches": 1.0, "num_sanity_val_steps": 0, "min_epochs": None}
    whole |= {"val_check_interval": 1.0, "check_val_every_n_epoch": 1, "min_steps": None, "log_every_n_steps": 1}
    with without_news(), suppress(TooLargeError):
        trainer = make_trainer(**alone, **whole, accumulate_grad_batches=measuring.accumulate, callbacks=[measuring])
        trainer.fit(module, datamodule=data)


# -- the first step ---------------------------------------------------------------------------------------------------


def _rate(module: PreferenceModule, found: Measuring) -> Iterator[Finding]:
    pretrained = not isinstance(module.model, dict)
    if pretrained and module.adapter is None and found.rate > _FAST:
        remedy = "set `--model.optimizer.lr` to 1e-6 or below 1e-5, or train an `adapter`"
        text = f"learning rate {found.rate:g}: full fine-tuning above {_FAST:g} is known to destroy a model"
        yield Finding("warning", f"{text}: {remedy}")
    else:
        yield Finding("fine", f"learning rate {found.rate:g}")


def _started(module: PreferenceModule, found: Measuring, cached: CachedReference | None) -> Iterator[Finding]:
    """Policy against reference before the first step, the loss and its gradient, and randomness."""
    assert found.losses is not None
    value, at_start = found.losses
    norms = [row["train/grad_norm"] for row in module.history if "train/grad_norm" in row]
    text = f"a batch went forward and backward: loss {value:.4f}, gradient norm {norms[0]:.3g}, finite"
    yield Finding("fine", text)
    other = getattr(cached.of if cached else module.reference, "model", None) is not None
    if found.gap is None:
        yield Finding("fine", "the loss has no reference, so that nothing is compared before the first step")
    elif found.gap <= 1e-2 and abs(value - at_start) <= 1e-3 * max(1.0, abs(at_start)):
        text = f"policy equals reference before the first step, within {found.gap:.1g} nats"
        yield Finding("fine", f"{text}: the loss has its value there, {at_start:.4f}")
    elif other:
        text = f"the reference is another model: up to {found.gap:.3g} nats from the policy before the first step"
        yield Finding("fine", f"{text}, so that the loss starts at {value:.4f}")
    else:
        text = f"policy and reference differ by up to {found.gap:.3g} nats before the first step"
        remedy = "rewards do not start at 0; use `FrozenReference`, unless this is meant"
        yield Finding("warning", f"{text}, the loss is {value:.4f} where it would be {at_start:.4f}: {remedy}")
    dropout = getattr(module.adapter, "dropout", 0.0)
    if found.drawn and not dropout:
        yield Finding(
            "warning", "scoring in training mode draws random numbers: set the model's dropout and noise to 0"
        )
    else:
        asked = f" but those of the adapter's dropout {dropout:g}, which was asked for" if dropout else ""
        yield Finding("fine", f"no random numbers are drawn in training mode{asked}")


# -- what it takes ----------------------------------------------------------------------------------------------------


def _gib(count: float) -> str:
    return f"{count / _GIB:.{'2f' if count >= _GIB / 10 else '2g'}} GiB"


def _least(module: PreferenceModule) -> dict[str, int]:
    """Bytes that a run with AdamW takes besides activations, found out without loading the model."""
    if not isinstance(module.model, str | dict) or module.loading.quantization is not None:
        return {}
    weights = size(list(empty_model(module.model, module.tokenizer, module.dtype_name, module.loading).parameters()))
    trained = weights if module.adapter is None else 0
    second = weights if isinstance(module.reference, FrozenReference) else 0
    return {"weights": weights, "reference": second, "gradients": trained, "optimizer": 2 * trained}


def _memory(
    module: PreferenceModule,
    data: PreferenceDataModule,
    trainer: Trainer,
    plan: Plan,
    parts: dict[str, int],
    room: int | None,
    base: int,
    peak: int | None = None,
) -> Finding:
    """What it takes: `peak`, or where that was not measured at least its parts; all in bytes."""
    activations = 0 if peak is None else max(0, peak - base - sum(parts.values()))
    named = ", ".join(f"{name} {_gib(count)}" for name, count in {**parts, "activations": activations}.items() if count)
    most = f"at least {_gib(base + sum(parts.values()))}" if peak is None else f"{_gib(peak)} at most"
    text = f"memory: {most} ({named}, the program itself {_gib(base)})"
    if room is None or (peak or room + 1) <= room:
        return Finding("estimate", text)
    changes = _lighter(module, data, trainer, parts, activations, plan)
    return Finding("fails", f"{text}, and there are {_gib(room)}: {_advice(changes)}")


def _advice(changes: Sequence[tuple[str, float, str]]) -> str:
    told = (
        f"`{option}` saves {f'about {_gib(saved)}' if saved else 'memory too'}{more}" for option, saved, more in changes
    )
    return "; ".join(told) or "use a smaller model"


def _lighter(
    module: PreferenceModule,
    data: PreferenceDataModule,
    trainer: Trainer,
    parts: dict[str, int],
    activations: int,
    plan: Plan,
) -> list[tuple[str, float, str]]:
    """Changes that save memory, the largest first: options, bytes saved (0 if not known), and what else they do."""
    found: list[tuple[str, float, str]] = []
    if module.adapter is None:
        saved: float = sum(parts.get(name, 0) for name in ("reference", "gradients", "optimizer"))
        found.append(("--model.adapter '{rank: 16}'", saved, ", and trains low-rank adapters at a higher rate"))
    if isinstance(module.reference, FrozenReference):
        more = ", and scores every row once before training"
        found.append(("--model.reference CachedReference", parts.get("reference", 0), more))
    if not activations:  # the weights alone are too much, which no smaller batch changes
        return sorted(found, key=lambda change: -change[1])
    if data.batch_size > 1:
        half = -(-data.batch_size // 2)
        option = f"--data.batch_size {half} --trainer.accumulate_grad_batches {2 * trainer.accumulate_grad_batches}"
        found.append((option, activations * (1 - half / data.batch_size), ", with the same optimizer steps"))
    lengths = data.training.dataset.lengths[data.training.rows].sum(1)
    longest, most = int(lengths.max()), max(plan.tokens)
    if module.max_tokens is None and most > 1.5 * longest:
        saved = activations * (1 - longest / most)
        found.append((f"--model.max_tokens {longest}", saved, ", and takes up to a third more time"))
    if not module.gradient_checkpointing:
        found.append(("--model.gradient_checkpointing true", 0, ", and takes a third more time"))
    return sorted(found, key=lambda change: -change[1])


def _time(found: Measuring) -> Iterator[Finding]:
    if not found.updates:
        return
    training, validating, saving = found.seconds()
    plan, whole = found.plan, _long(training + validating + saving)
    text = f"time: about {whole} from the first batch to the last checkpoint, {plan.steps} steps; {_long(training)} of "
    text += f"training, {training / max(1, plan.steps):.3g} s a step"
    if plan.validations:
        text += f", {_long(validating)} for {plan.validations} validations"
    if plan.last + plan.best:
        text += f", {_long(saving)} for {'up to ' * bool(plan.best)}{plan.last + plan.best} checkpoints"
    if found.swing is not None:
        text += f"; the same batches took up to {found.swing:.0%} more or less when they came again"
    if found.reference_pass:
        when = "before it" if len(plan.pairs) == 1 else f"before the {len(plan.pairs)} steps, together"
        text += f"; {when} up to {_long(found.reference_pass)} for the reference's pass over the rows"
    yield Finding("estimate", text)


def _long(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:.3g} h"


def _disk(folder: Path, found: Measuring, callbacks: Sequence[Any], saves: bool, stepwise: bool) -> Iterator[Finding]:
    if not saves or "://" in str(folder):
        yield Finding("fine", "no checkpoints are written to a local disk")
        return
    existing = nearest(folder)
    if not writable(existing):
        yield Finding("fails", f"`{existing}` cannot be written to: set `--trainer.default_root_dir`")
        return
    kept = sum(max(1, callback.save_top_k) for callback in callbacks if isinstance(callback, ModelCheckpoint))
    one, steps = found.parts["weights"] + found.parts["optimizer"], len(found.plan.pairs)
    needed, free = one * ((2 + kept) * steps + bool(kept)), shutil.disk_usage(existing).free
    each = "" if steps == 1 else f" of each of {steps} steps"
    each = each if found.plan.known else " of one step"
    best = f" and {kept} of the best" if kept else ""
    text = f"checkpoints of {_gib(one)} (the last two{best}{each}{', and one being written' if kept else ''})"
    if stepwise:
        needed += found.parts["weights"] * steps
        text += f" and {steps} export{'s' * (steps > 1)}" + ("" if found.plan.known else "; those of all steps stay")
    text = f"disk: {_gib(needed)} for {text}"
    if needed > free:
        remedy = "free some, or set `--trainer.default_root_dir` to another disk"
        yield Finding("fails", f"{text}, and `{existing}` has {_gib(free)} left: {remedy}")
    else:
        yield Finding("fine", f"{text}, of {_gib(free)} left")
