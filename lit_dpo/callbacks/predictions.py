"""Predictions as a file: one JSON object a pair."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_info

from lit_dpo.checkpoints.durable import new_file, put, refuse_unwritable_file
from lit_dpo.pair_data import pair_data


class PairPredictionWriter(BasePredictionWriter):
    """Write rewards and log-probs of every predicted pair to a jsonl file, in the order of the data.

    Each line holds `row` (`file:line`), `row_id`, `reward_chosen`, `reward_rejected`, `margin`, and
    log-probs in nats: `logp_chosen`, `logp_rejected`, the reference's `reference_logp_chosen` and
    `reference_logp_rejected`, and with `--model.predict_tokens true` lists of one number a token:
    `tokens_chosen`, `tokens_rejected`, `reference_tokens_chosen` and `reference_tokens_rejected`; and the lengths
    `chosen_tokens` and `rejected_tokens`.

    Args:
        path: The file, which appears whole at the end of the run; nothing may be there.

    Attributes:
        overwrite: Replace a file. (No argument, so that no configuration file can say so.)

    Raises:
        FileExistsError: (at the start of the run) Something is at `path`.
        OSError: (then, too) It cannot be written there.
    """

    def __init__(self, path: str = "predictions.jsonl") -> None:
        super().__init__("epoch")
        self.path = Path(path)
        self.overwrite = False
        self._run = ""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find what is in the way now, and not after scoring."""
        if stage != "predict":
            return
        self._run = trainer.strategy.broadcast(uuid.uuid4().hex)
        plain = self.path.is_file() and not self.path.is_symlink()
        if trainer.strategy.broadcast(os.path.lexists(self.path) and not (plain and self.overwrite)):
            remedy = "name another file, or add `--overwrite`" if plain else "name a file"
            raise FileExistsError(f"`{self.path}` exists already: {remedy}.")
        refuse_unwritable_file(self.path)

    def write_on_epoch_end(
        self, trainer: Trainer, pl_module: LightningModule, predictions: Sequence[Any], batch_indices: Sequence[Any]
    ) -> None:
        """Write this process's part, and let the first process join the parts."""
        rows = [_rows(batch) for batch in predictions]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _write(self._part(trainer.global_rank), [row for batch in rows for row in batch])
        trainer.strategy.barrier("predictions")
        if trainer.is_global_zero:
            self._join(trainer)
        trainer.strategy.barrier("predictions joined")

    def _join(self, trainer: Trainer) -> None:
        parts = [self._part(rank) for rank in range(trainer.world_size)]
        rows = [json.loads(line) for part in parts for line in part.read_text(encoding="utf-8").splitlines()]
        rows = sorted({row["row_id"]: row for row in rows}.values(), key=lambda row: row["row_id"])
        if data := pair_data(trainer):
            origins = data.origin([row["row_id"] for row in rows])
            rows = [{"row": origin, **row} for origin, row in zip(origins, rows, strict=True)]
        whole = self._part(trainer.world_size)
        _write(whole, rows)
        if os.path.lexists(self.path) and not self.overwrite:
            raise FileExistsError(f"`{self.path}` has appeared meanwhile, so the predictions are in `{whole}`.")
        put(whole, self.path)
        for part in parts:
            part.unlink()
        rank_zero_info(f"Wrote {len(rows)} predictions to {self.path}")

    def _part(self, rank: int) -> Path:
        return self.path.with_name(f".{self.path.name}.{self._run}.{rank}.part")


def _rows(batch: dict[str, Any]) -> list[dict[str, Any]]:
    columns = [
        column.tolist() if hasattr(column, "tolist") else [v.tolist() for v in column] for column in batch.values()
    ]
    return [dict(zip(batch, values, strict=True)) for values in zip(*columns, strict=True)]


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    with new_file(path) as file:
        file.writelines(f"{json.dumps(row)}\n".encode() for row in rows)
