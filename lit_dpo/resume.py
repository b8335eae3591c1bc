"""Exact resume: random numbers that depend on the step alone, and counters that fit another number of processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info

from lit_dpo.pair_data import pair_data
from lit_dpo.version import __version__


@contextmanager
def seeded(device: torch.device, *numbers: int) -> Iterator[None]:
    """Random numbers that depend on these numbers alone; the generators outside stay as they are."""
    seed = 0
    for number in numbers:
        seed = (seed * 6364136223846793005 + number + 1442695040888963407) % (1 << 63)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def rescale(loops: dict[str, Any], old: dict[str, int], new: dict[str, int]) -> None:
    """Turn the counters of batches in a checkpoint into those of a run that cuts optimizer steps differently.

    Args:
        loops: `checkpoint["loops"]`, changed in place.
        old: `pairs_per_step`, `accumulate` (batches a step) and `batches` (an epoch) of the run that saved.
        new: The same of this run.

    Raises:
        ValueError: An optimizer step would hold another number of pairs, so that no order of rows could be kept.
    """
    if old["pairs_per_step"] != new["pairs_per_step"]:
        raise ValueError(
            f"The checkpoint was made with {old['pairs_per_step']} pairs an optimizer step and this run has "
            f"{new['pairs_per_step']}: change `batch_size` or `accumulate_grad_batches` so that batch size times "
            "processes times accumulation is the same."
        )
    if old == new:
        return
    progress = loops["fit_loop"]["epoch_loop.batch_progress"]

    def converted(ready: int) -> int:
        epochs, rest = divmod(ready, old["batches"])
        steps = -(-rest // old["accumulate"])
        return epochs * new["batches"] + min(steps * new["accumulate"], new["batches"])

    for counts in (progress["total"], progress["current"]):
        ready = counts["ready"]
        counts.update({name: converted(ready) - (ready - value) for name, value in counts.items()})


def validate_between_steps(trainer: Trainer) -> None:
    """Move validations to the ends of optimizer steps, and say so.

    There a checkpoint holds all there is; in the middle of a step, half of it is in the gradients.
    """
    interval, every = trainer.val_check_batch, trainer.accumulate_grad_batches
    if isinstance(interval, int) and interval % every and interval < trainer.num_training_batches:
        trainer.val_check_batch = max(every, interval // every * every)
        rank_zero_info(f"Validation every {trainer.val_check_batch} batches, whole optimizer steps of {every}.")


def step_layout(trainer: Trainer) -> dict[str, int] | None:
    """How optimizer steps of a fit are cut into batches, if the data module can tell."""
    data = pair_data(trainer)
    return data.step_layout() if data is not None and trainer.state.fn == "fit" else None


def run_facts(trainer: Trainer) -> dict[str, Any]:
    """What a checkpoint and its model card tell of a run so far, as plain values."""
    data = pair_data(trainer)
    metrics = {name: float(v) for name, v in trainer.callback_metrics.items() if name.startswith("val/")}
    packages = {"lit_dpo": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    return {
        "chat_template": None if data is None else data.chat_template,
        "data": None if data is None else data.sources,
        "step": trainer.global_step,
        "step_layout": step_layout(trainer),
        "metrics": metrics,
        "versions": {name: str(version) for name, version in packages.items()},
    }


def fit_counters(trainer: Trainer, checkpoint: dict[str, Any], old: dict[str, int] | None) -> None:
    """Fit the counters of a checkpoint to this run's processes; say so if changed rows cannot be noticed.

    Args:
        trainer: Of the fit that resumes.
        checkpoint: Its counters are changed in place.
        old: The `step_layout` of the run that saved.

    Raises:
        ValueError: To go on, the run would need another number of pairs an optimizer step.
    """
    if type(trainer.datamodule).__qualname__ not in checkpoint:  # type: ignore[attr-defined]
        rank_zero_info("The checkpoint keeps nothing of its rows, so whether they have changed cannot be noticed.")
    layout = step_layout(trainer)
    if layout is not None and old is not None:
        rescale(checkpoint["loops"], old, layout)
