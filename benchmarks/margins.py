"""What recording the margins of training rows costs: the share of a step that `RecordMargins` takes.

    python benchmarks/margins.py --out benchmarks/results

A run with the callback, on the smallest two shapes of `throughput.py`. Timed are the callback's own calls: what it
keeps after each backward pass, what it gathers for each checkpoint, and the file that it writes after each epoch.
A step is the median time from the end of a batch to the end of the next; there is no validation.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from check import write_rows
from common import Record, append_lines, append_section, facts, markdown_table, report_path
from flops import SHAPES
from lightning.pytorch import Callback, Trainer

from lit_dpo import PreferenceDataModule, PreferenceModule
from lit_dpo.callbacks import LastCheckpoint, RecordMargins

KEPT, FILES, STATES = "kept", "files", "states"


class Timed(RecordMargins):
    """The callback, with a clock around each of its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds = dict.fromkeys((KEPT, FILES, STATES), 0.0)

    def _add(self, what: str, function: Callable[..., Any], *args: Any) -> Any:
        began = time.perf_counter()
        found = function(*args)
        self.seconds[what] += time.perf_counter() - began
        return found

    def on_after_backward(self, *args: Any) -> None:
        """Keep the values of a batch."""
        self._add(KEPT, super().on_after_backward, *args)

    def state_dict(self) -> dict[str, Any]:
        """Gather for a checkpoint."""
        return self._add(STATES, super().state_dict)

    def on_train_epoch_end(self, *args: Any) -> None:
        """Write the file."""
        self._add(FILES, super().on_train_epoch_end, *args)

    def on_train_end(self, *args: Any) -> None:
        """Write the file."""
        self._add(FILES, super().on_train_end, *args)


class Clock(Callback):
    """Notes when each training batch ended."""

    def __init__(self) -> None:
        self.marks: list[float] = []

    def on_train_batch_end(self, *args: Any) -> None:
        """Note the time."""
        self.marks.append(time.perf_counter())


def measure(shape: str, options: argparse.Namespace) -> Record:
    """One run."""
    wanted = SHAPES[shape]
    config = {
        "model_type": wanted.model_type, "hidden_size": wanted.hidden, "intermediate_size": wanted.intermediate,
        "num_hidden_layers": wanted.layers, "num_attention_heads": wanted.heads, "max_position_embeddings": 1024,
        "num_key_value_heads": wanted.kv_heads, "tie_word_embeddings": wanted.tied,
    }  # fmt: skip
    recorder, clock = Timed(), Clock()
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        write_rows(folder / "rows.jsonl", options.rows, seed=0)
        trainer = Trainer(
            default_root_dir=folder / "run", max_epochs=options.epochs, accelerator="cpu", logger=False,
            num_sanity_val_steps=0, enable_progress_bar=False, enable_model_summary=False,
            callbacks=[clock, recorder, LastCheckpoint()],
        )  # fmt: skip
        data = PreferenceDataModule(
            str(folder / "rows.jsonl"), validation_fraction=0, batch_size=options.batch, max_length=512
        )
        trainer.fit(PreferenceModule(config, tokenizer="quickstart"), data)
    steps, between = len(clock.marks), sorted(b - a for a, b in zip(clock.marks, clock.marks[1:], strict=False))
    cost = sum(recorder.seconds.values()) / steps
    step = between[len(between) // 2]
    milliseconds = {name: 1000 * value / steps for name, value in recorder.seconds.items()}
    return {"shape": shape, "steps": steps, "step_ms": 1000 * step, **milliseconds, "share": cost / step}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["tiny", "S"], choices=list(SHAPES))
    parser.add_argument("--rows", type=int, default=320)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(options.threads)
    records = [measure(shape, options) for shape in options.shapes]
    head = ["shape", "steps", "a step, ms", "kept, ms", "for checkpoints, ms", "file, ms", "share of a step"]
    lines = [
        [r["shape"], str(r["steps"]), f"{r['step_ms']:.1f}", *(f"{r[name]:.3f}" for name in (KEPT, STATES, FILES)),
         f"{r['share']:.2%}"]
        for r in records
    ]  # fmt: skip
    table = markdown_table(head, lines)
    print(table)
    if options.out is not None:
        about = facts("cpu", options.threads, seed=0)
        append_lines(options.out / "margins.jsonl", [{**about, **record} for record in records])
        append_section(report_path(options.out, "margins", "cpu"), "Cost of recorded margins", [table], about)


if __name__ == "__main__":
    main()
