"""lit_dpo's side of the throughput benchmark: in a Trainer through its public interface, and in a plain loop."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from common import Record, StepClock, now
from flops import Work
from torch.utils.data import DataLoader
from workers import CHECKED_STEPS, Run, Settings, Triple, adamw, identity, reference_record, step_means

from lit_dpo import (
    CachedReference,
    DPOLoss,
    FrozenReference,
    IntermediateLoss,
    PairBatch,
    PreferenceDataModule,
    PreferenceLoss,
    PreferenceModule,
    score,
)
from lit_dpo.data.dataset import BatchPlan
from lit_dpo.models import load_model
from lit_dpo.tokenizers import load_tokenizer


class FixedOrder(PreferenceDataModule):
    """The rows of the file as they stand, `batch_size` at a time."""

    def train_dataloader(self) -> DataLoader[PairBatch]:
        """Consecutive rows."""
        dataset = super().train_dataloader().dataset
        size = self.batch_size
        plans = [BatchPlan(list(range(i, i + size))) for i in range(0, len(dataset), size)]  # type: ignore[arg-type]
        return DataLoader(dataset, batch_size=None, sampler=plans)


def train_lit_dpo(run: Run, settings: Settings, steps: int) -> Record:
    """Train with `PreferenceModule` in a Trainer; see `workers.train`."""

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if len(losses) < CHECKED_STEPS * run.micro_batches:
                losses.append(float(outputs["loss"]) * run.micro_batches)  # Lightning has divided it
            if (batch_idx + 1) % run.micro_batches == 0:
                clock.step()

    losses: list[float] = []
    clock = StepClock(settings.warmup, settings.device)
    # A cache in an empty folder: a filled one would cost nothing.
    reference = CachedReference(folder=tempfile.mkdtemp(dir=settings.folder)) if run.cached else FrozenReference()
    scoring = _timed(reference, "prepare", settings.device) if run.cached else [(0.0, 0.0)]
    module = PreferenceModule(
        model=settings.model,
        loss=_loss(run, settings),
        reference=reference,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, **adamw(settings)),
        lr_scheduler=None,
        dtype=settings.dtype,
    )
    data = _data(run, settings)
    trainer = L.Trainer(
        max_steps=steps,
        accumulate_grad_batches=run.micro_batches,
        accelerator="cpu" if settings.device == "cpu" else "gpu",
        devices=1,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        log_every_n_steps=10,  # as TRL's default
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Watch()],
    )
    trainer.fit(module, data)
    batches = list(data.train_dataloader())
    return _record(run, settings, steps, batches, losses, clock, scoring) | {"reference": type(reference).__name__}


def train_bare(run: Run, settings: Settings, steps: int) -> Record:
    """The same mathematics in the plainest loop that does it: no Trainer, no metrics, no guard."""
    model = load_model(settings.model, dtype=settings.dtype).to(settings.device).train()
    data = _data(run, settings)
    data.tokenizer = load_tokenizer(settings.model)
    data.setup("fit")
    batches = list(data.train_dataloader())
    loss, losses, clock = _loss(run, settings), [], StepClock(settings.warmup, settings.device)
    before = now(settings.device)
    with torch.no_grad():
        references = [score(model, batch.to(settings.device), loss.layers) for batch in batches]
    after = now(settings.device)
    optimizer = torch.optim.AdamW(model.parameters(), **adamw(settings))
    for batch, reference in zip(data.train_dataloader(), references[:steps], strict=False):
        value = loss(score(model, batch.to(settings.device), loss.layers), reference).mean()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        if len(losses) < CHECKED_STEPS:
            losses.append(float(value.detach()))
        clock.step()
    scoring = [(after[0] - before[0], after[1] - before[1])]
    return _record(run, settings, steps, batches, losses, clock, scoring) | {"reference": "a list"}


def _loss(run: Run, settings: Settings) -> PreferenceLoss:
    loss = DPOLoss(beta=settings.beta)
    if not run.layers:
        return loss
    depths = tuple(i / (run.layers + 1) for i in range(1, run.layers + 1))
    return IntermediateLoss(base=loss, layers=depths)


def _data(run: Run, settings: Settings) -> FixedOrder:
    return FixedOrder(
        train=str(settings.rows(run.order)),
        validation=str(settings.rows("validation")),  # the shortest pair: no validation runs, but one is read
        batch_size=settings.batch // run.micro_batches,
        eval_batch_size=settings.batch,
        max_length=settings.max_length,
    )


def _record(
    run: Run,
    settings: Settings,
    steps: int,
    batches: Sequence[PairBatch],
    losses: list[float],
    clock: StepClock,
    scoring: Sequence[tuple[float, float]],
) -> Record:
    timed = batches[settings.warmup * run.micro_batches : steps * run.micro_batches]
    return {
        "losses": step_means(losses, run.micro_batches),
        **clock.record(),
        **reference_record(scoring, settings.steps * settings.batch),
        **identity([_flat_triples(batch) for batch in batches], run.micro_batches),
        "timed_pairs": (steps - settings.warmup) * settings.batch,
        "computed_tokens": sum(batch.input_ids.numel() for batch in timed),
        "real_tokens": sum(2 * p + c + r for batch in timed for p, c, r in batch.shape),
        "completion_tokens": sum(Work.flat(batch.shape).head_tokens for batch in timed),
        "attended": sum(Work.flat(batch.shape).attended for batch in timed),
    }


def _timed(owner: Any, method: str, device: str) -> list[tuple[float, float]]:
    """Have every call of a method of one object add its wall and CPU seconds to the returned list."""
    spent: list[tuple[float, float]] = []
    original = getattr(owner, method)

    def timed(*args: Any, **kwargs: Any) -> Any:
        before = now(device)
        try:
            return original(*args, **kwargs)
        finally:
            after = now(device)
            spent.append((after[0] - before[0], after[1] - before[1]))

    setattr(owner, method, timed)
    return spent


def _flat_triples(batch: PairBatch) -> list[Triple]:
    parts = batch.input_ids.split([size for pair in batch.shape for size in pair])
    lists = [part.tolist() for part in parts]
    return [(lists[i], lists[i + 1], lists[i + 2]) for i in range(0, len(lists), 3)]
