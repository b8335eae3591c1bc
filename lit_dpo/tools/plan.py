"""What a run will do, told before its first step: batches, steps, validations and checkpoints."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lit_dpo.callbacks import LastCheckpoint
from lit_dpo.data import Partition, Pool, PreferenceDataModule
from lit_dpo.stepwise import NO_STEP


@dataclass(frozen=True)
class Plan:
    """What a run will do, as far as it is known before its first step; early stopping may end it sooner.

    Args:
        batches: Rows of the training batches of an epoch, on one process.
        tokens: Tokens of each.
        evaluated: Rows of the validation batches.
        epochs: How often each is gone through; the mean, where some are gone through once more than others.
        steps: Optimizer steps of the run.
        validations: How often all validation batches are gone through.
        before: Validation batches that are gone through before each fit; Lightning's sanity check.
        last: How often a checkpoint to resume from is written.
        best: How often one is written because it is among the best, if each validation is better than those before.
        pairs: How many the fits train on, one after the other: several in stepwise training.
        known: Whether this is what stepwise training will do; else all pairs are taken as one step.
    """

    batches: list[Any]
    tokens: list[int]
    evaluated: list[Any]
    epochs: list[float]
    steps: int
    validations: int
    before: int
    last: int
    best: int
    pairs: list[int]
    known: bool = True


def computed_tokens(batches: Iterable[Any], lengths: Tensor, padded: bool = False) -> list[int]:
    """Tokens that a forward pass over each batch computes.

    Args:
        batches: The rows of each, as numbers.
        lengths: Tokens of prompt, chosen and rejected of all rows, shape `(rows, 3)`.
        padded: Whether both completions of a pair are rows as long as the longest of the batch, with the prompt in
            each; else a batch is one line with each prompt once.
    """
    of_batches = [lengths[rows] for rows in batches]
    if padded:
        return [2 * len(found) * int((found[:, 0] + found[:, 1:].amax(1)).max()) for found in of_batches]
    return [int(found.sum()) for found in of_batches]


def planned(data: PreferenceDataModule, trainer: Trainer, callbacks: Sequence[Any] = (), saves: bool = False) -> Plan:
    """The plan of a run whose data are set up: of a fit, or of all fits of stepwise training.

    Where the steps of a partition are not known before training, all pairs are taken as one step.

    Args:
        data: What is trained on.
        trainer: Of the fit.
        callbacks: Of the fit, those that the configuration names.
        saves: Whether it writes checkpoints.

    Raises:
        ValueError: There is nothing that ends it, or a partition cannot divide the pairs.
    """
    if not data.stepwise:
        return _of_fit(data, trainer, callbacks, saves)
    training, fits = data.training, []
    everything = torch.arange(len(training.pool))
    steps = rows_of_steps(data.partition, training.pool_sources)
    for rows in steps or [everything]:
        training.use_rows(rows)
        fits.append(_of_fit(data, trainer, callbacks, saves))
    training.use_rows(everything)
    return replace(_one_after_the_other(fits), known=steps is not None)


def rows_of_steps(partition: Partition, sources: Sequence[str]) -> list[Tensor] | None:
    """Row numbers that each step trains on; `None` if they are not known before training.

    Args:
        partition: It is asked if it looks at the rows alone.
        sources: Name of the data source of each pair.

    Raises:
        ValueError: The pairs cannot be divided in this way.
    """
    if not partition.rows_alone:
        return None
    pool, steps = Pool(sources), list[Any]()
    while (rows := partition.next(len(steps), pool)) is not None:
        steps.append(rows)
    if not steps:
        raise ValueError(NO_STEP)
    return steps


def _one_after_the_other(fits: Sequence[Plan]) -> Plan:
    """The plan of several fits, which have their validation batches in common."""

    def joined(name: str) -> list[Any]:
        return list(chain.from_iterable(getattr(fit, name) for fit in fits))

    def summed(name: str) -> int:
        return sum(getattr(fit, name) for fit in fits)

    return Plan(
        joined("batches"),
        joined("tokens"),
        fits[0].evaluated,
        joined("epochs"),
        summed("steps"),
        summed("validations"),
        fits[0].before,
        summed("last"),
        summed("best"),
        joined("pairs"),
    )


def _of_fit(data: PreferenceDataModule, trainer: Trainer, callbacks: Sequence[Any], saves: bool) -> Plan:
    layout, loader = data.step_layout(), data.train_dataloader()
    count, accumulate = layout["batches"], layout["accumulate"]
    sampler: Any = loader.sampler
    batches = list(sampler)[:count]
    per_epoch = -(-count // accumulate)
    most, epochs = trainer.max_steps, trainer.max_epochs
    if epochs is None:
        epochs = 1000 if most == -1 else -1  # as Lightning has it
    if epochs == -1 and most == -1:
        raise ValueError("Nothing ends this run: set `--trainer.max_epochs`, or `--trainer.max_steps`.")
    steps = min(number for number in (most, epochs * per_epoch) if number >= 0)
    held: Any = data.val_dataloader()
    limit = trainer.limit_val_batches
    found = list(held.sampler) if held else []
    found = found[: limit if isinstance(limit, int) else int(len(found) * limit)]
    every = trainer.val_check_interval
    within = int(every) if isinstance(every, int) else max(1, int(count * every))
    if within % accumulate and within < count:  # validations come at the ends of optimizer steps
        within = max(accumulate, within // accumulate * accumulate)
    full, rest = divmod(steps, per_epoch)
    if (apart := trainer.check_val_every_n_epoch) is None:
        validations, after = divmod(full * count + rest * accumulate, within)
    else:
        validations = full // apart * (count // within) + ((full + 1) % apart == 0) * (rest * accumulate // within)
        of_last, done = (full + 1, rest * accumulate) if rest else (full, count)  # its number and its batches
        after = of_last % apart or done % within
    during = validations if found else 0
    regular = [c.every_n_steps for c in callbacks if isinstance(c, LastCheckpoint) and c.every_n_steps]
    last = during + bool(after or not found) + sum(steps // each for each in regular)
    ranking = sum(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    whole = trainer.num_sanity_val_steps == float("inf")
    return Plan(
        batches,
        computed_tokens([plan.rows for plan in batches], data.training.dataset.lengths),
        found,
        [steps / per_epoch] * len(batches),
        steps,
        validations + whole if found else 0,
        0 if whole else min(int(trainer.num_sanity_val_steps), len(found)),
        last if saves else 0,
        ranking * during if saves else 0,
        [len(data.training.rows)],
    )
