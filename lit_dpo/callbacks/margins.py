"""The margin of every row in every epoch, as it was before the optimizer step that the row took part in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lit_dpo.checkpoints.durable import replace_file
from lit_dpo.module import PreferenceModule
from lit_dpo.pair_data import pair_data

FILE = "margins.jsonl"
"""In a run's folder: a line a row, written at the end of every epoch."""
_KINDS = {"epoch": torch.int32, "row": torch.int32, "margin": torch.float32, "reference": torch.float32}
_KINDS |= {"longer": torch.int32}


class RecordMargins(Callback):
    """Record the margin of every training row in every epoch, for `lit-dpo audit` to find doubtful labels.

    The values are those that training computes anyway, as seen before the row's optimizer step, each once per row and
    epoch, whatever the accumulation and the number of processes. Checkpoints hold what was recorded so far, 20 bytes a
    row and epoch, so a resumed run goes on exactly. At the end of every epoch, and of training, `margins.jsonl` in
    the run's folder gets a line a row: `row` (`file:line`), `row_id`, `margins` (chosen minus rejected
    log-prob under the policy, nats, one an epoch), `reference_margin` (the same under the reference, zero without
    one) and `length_difference` (tokens of the chosen completion minus those of the rejected one).
    """

    def __init__(self) -> None:
        self._trainer: Trainer | None = None
        self._batches: list[dict[str, Tensor]] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin anew; what a checkpoint holds is taken up after this."""
        self._trainer, self._batches = trainer, []

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the values of this batch where they are; nothing waits for the device."""
        assert isinstance(pl_module, PreferenceModule)
        seen = pl_module.last_pairs
        assert seen is not None
        columns = {
            "epoch": torch.full_like(seen.row_ids, trainer.current_epoch),
            "row": seen.row_ids,
            "margin": seen.policy.margin,
            "reference": seen.reference.margin,
            "longer": seen.policy.chosen_tokens - seen.policy.rejected_tokens,
        }
        # A filler of weight 0 repeats a row of its step; it is told by its row number, below zero.
        if seen.weights is not None:
            columns["row"] = torch.where(seen.weights != 0, seen.row_ids, -1)
        self._batches.append({name: column.detach().to(_KINDS[name]) for name, column in columns.items()})

    # -- what is kept -------------------------------------------------------------------------------------------------

    def _table(self) -> dict[str, Tensor]:
        """What this process has recorded, on the CPU, shape `(values,)` each."""
        names = _KINDS.items()
        if not self._batches:
            return {name: torch.empty(0, dtype=kind) for name, kind in names}
        table = {name: torch.cat([batch[name].cpu() for batch in self._batches]) for name, _ in names}
        self._batches = [{name: column[table["row"] >= 0] for name, column in table.items()}]
        return self._batches[0]

    def _gathered(self) -> dict[str, Tensor]:
        """What all processes have recorded, on each of them, ordered by epoch and row; all take part."""
        table, trainer = self._table(), self._trainer
        if trainer is not None and trainer.world_size > 1:
            tables: list[Any] = [None] * trainer.world_size
            torch.distributed.all_gather_object(tables, table)
            table = {name: torch.cat([other[name] for other in tables]) for name in _KINDS}
        order = (table["epoch"].long() << 32 | table["row"].long()).argsort(stable=True)
        return {name: column[order] for name, column in table.items()}

    def state_dict(self) -> dict[str, Any]:
        """What was recorded so far; every process takes part."""
        return dict(self._gathered())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it up, the first process for all."""
        first = self._trainer is None or self._trainer.is_global_zero
        self._batches = [{name: state_dict[name] for name in _KINDS}] if first else []

    # -- the file -----------------------------------------------------------------------------------------------------

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file."""
        self._write(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file, for a run that ends in the middle of an epoch."""
        self._write(trainer)

    def _write(self, trainer: Trainer) -> None:
        table = self._gathered()
        folder = Path(
            trainer.log_dir or trainer.default_root_dir
        )  # asked by all processes, for Lightning broadcasts it
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        rows: dict[int, dict[str, Any]] = {}
        for row, margin, reference, longer in zip(
            *(table[name].tolist() for name in ("row", "margin", "reference", "longer")), strict=True
        ):
            line = rows.setdefault(row, {"row_id": row, "margins": []})
            line["margins"].append(margin)
            line |= {"reference_margin": reference, "length_difference": longer}
        numbers, data = sorted(rows), pair_data(trainer)
        origins = [f"row {row}" for row in numbers] if data is None else data.origin(numbers, training=True)
        folder.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps({"row": origin, **rows[n]}) for origin, n in zip(origins, numbers, strict=True)]
        with replace_file(folder / FILE) as file:
            file.writelines(f"{line}\n".encode() for line in lines)
