"""How long trainings of the sweep in losses.py take with TRL: the same weights, pairs and updates, in turn with ours.

    python benchmarks/claims/sweep.py --work WORK --out benchmarks/claims/results

Needs TRL. Every training is timed from its configuration to its trained weights, reference log-probs included, on one
thread; imports are not. Ours reads the reference from one cache after the first training, and saves its checkpoint; TRL
precomputes it in each training and saves nothing.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

import losses
import support
import torch
from bases import Place, base
from claim import Mean
from commands import Config, Record, fit, logged, named, settings, write_rows
from common import append_lines, append_section, facts, markdown_table, report_path

TYPES = {"DPO": "sigmoid", "normalised DPO": "sigmoid_norm", "IPO": "ipo", "robust DPO": "robust", "hinge": "hinge"}
TYPES["APO-zero"] = "apo_zero"
"""Losses that TRL has too, by its names."""


def timed(train: Callable[[], float]) -> Record:
    """Wall and processor seconds of a training, and the loss of its last step."""
    wall, processor = time.perf_counter(), time.process_time()
    loss = train()
    return {"wall": time.perf_counter() - wall, "processor": time.process_time() - processor, "last": loss}


def ours(folder: Path, point: Config, start: Path, rows: Path, epochs: int) -> float:
    """Train by the command line."""
    cached = named("CachedReference", folder=str(folder.parent / "cache"))
    options = {"epochs": epochs, "seed": 0, "scale": "cpu", "rate": point["rate"], "reference": cached}
    return logged(fit(folder, settings(start, point["loss"], rows, **options)))[-1]["train/loss"]


def trls(folder: Path, kind: str, point: Config, start: Path, pairs: list[support.Row], epochs: int) -> float:
    """Train with `DPOTrainer`, its options those of `settings`."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    given = point["loss"]["init_args"]
    steps = -(-len(pairs) // 16) * epochs
    config = DPOConfig(
        output_dir=str(folder),
        loss_type=kind,
        beta=given["beta"],
        label_smoothing=given.get("label_smoothing", 0.1 if kind == "robust" else 0.0),
        precompute_ref_log_probs=True,
        per_device_train_batch_size=16,
        num_train_epochs=epochs,
        learning_rate=point["rate"],
        weight_decay=0.0,
        optim="adamw_torch",
        max_grad_norm=1.0,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=max(1, round(0.1 * steps)),
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        dataloader_pin_memory=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        model_init_kwargs={"dtype": "float32"},
    )
    trainer = DPOTrainer(str(start), args=config, train_dataset=Dataset.from_list(pairs))
    trainer.train()
    return float([line["loss"] for line in trainer.state.log_history if "loss" in line][-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of the supervised models, as of run.py")
    parser.add_argument("--scale", choices=["cpu", "smoke"], default="cpu")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    count, epochs, _ = losses.SIZES[given.scale]
    start, pairs = base(Place(given.work, None, given.scale), "support", 0).folder, support.pairs("mixed", count, 0)
    points = {name: next(p for p in losses.arms().values() if p["name"] == name) for name in TYPES}
    records: list[Record] = []
    for turn in range(-1, given.turns):  # the first one, which loads code on both sides, does not count
        with tempfile.TemporaryDirectory(prefix="sweep_") as work:
            rows = write_rows(Path(work), "mixed", pairs)
            for number, (name, kind) in enumerate(list(TYPES.items())[: None if turn >= 0 else 1]):
                sides: dict[str, Callable[[], float]] = {
                    "lit_dpo": lambda a=Path(work, f"{number}"), p=points[name], r=rows: ours(a, p, start, r, epochs),
                    "trl": lambda a=Path(work, f"t{number}"), k=kind, p=points[name]: trls(
                        a, k, p, start, pairs, epochs
                    ),
                }
                for side, train in sides.items():
                    record = {"turn": turn, "loss": name, "side": side, **timed(train)}
                    print(record, flush=True)
                    records += [record] if turn >= 0 else []
    about = facts("cpu", 1, 0)
    append_lines(given.out / "sweep.jsonl", [{**about, **record} for record in records])
    lines = []
    for side in ("lit_dpo", "trl"):
        turns = [[one for one in records if (one["side"], one["turn"]) == (side, turn)] for turn in range(given.turns)]
        sums = {key: Mean.of([sum(one[key] for one in of) for of in turns]) for key in ("processor", "wall")}
        lines.append([side, f"{len(TYPES)}", *(mean.text(1) for mean in sums.values())])
    table = markdown_table(["side", "trainings a turn", "processor seconds", "wall seconds"], lines)
    title = f"{len(TYPES)} trainings of the sweep, {count} pairs, {epochs} epochs, {given.turns} turns"
    append_section(report_path(given.out, "sweep", "cpu"), title, [table], about)


if __name__ == "__main__":
    main()
