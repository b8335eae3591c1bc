"""How often `lit-dpo compare` tells trainings of equal settings apart (A/A), and what it finds where they differ (A/B).

    python benchmarks/compare.py --out benchmarks/results

Every comparison has made-up data of its own, whose labels are noisy: in `utility` of `audit.py` a share of the training
labels is flipped. A tiny model of random weights is trained on them, and scores the validation rows, as `predict`
does. Two runs of equal settings differ in their seed, which draws the weights and the order of rows. They are compared
with one run of each setting (intervals over rows alone) and with several (over rows and seeds). A difference is found
where any of those that `compare` looks at is below 5 % after Holm's correction; an A/A that finds one is a false alarm.
The runs of an A/A are divided in two ways, which gives two comparisons a set, from the same runs.

The known effect of the A/B comparisons is the share of flipped labels: `--noise` under A, none under B.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from audit import made_up
from common import Record, append_lines, append_section, facts, markdown_table, report_path
from lightning.pytorch import Trainer

from lit_dpo import PreferenceDataModule, PreferenceModule
from lit_dpo.callbacks import PairPredictionWriter
from lit_dpo.tools.compare import Difference, Row, compare, read_predictions

MODEL = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 256, "tie_word_embeddings": True,
}  # fmt: skip


def write(path: Path, rows: Sequence[dict[str, str]], noise: float, draw: random.Random) -> Path:
    """Rows as a file, a share of their labels flipped."""
    swapped = {"prompt": "prompt", "chosen": "rejected", "rejected": "chosen"}
    noisy = ({k: row[swapped[k]] for k in row} if draw.random() < noise else row for row in rows)
    path.write_text("".join(json.dumps(row) + "\n" for row in noisy), encoding="utf-8")
    return path


def train(folder: Path, file: Path, seed: int, options: argparse.Namespace) -> dict[str, Row]:
    """One training, and what it says of the validation rows; those of an earlier call are taken up."""
    held_out, predictions = folder / "held_out.jsonl", folder / f"{file.stem}-{seed}-predictions.jsonl"
    if predictions.exists():
        return read_predictions(predictions)
    module = PreferenceModule(
        MODEL, tokenizer="quickstart", init_seed=seed, lr_scheduler=None,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=options.lr, weight_decay=0.0),
    )  # fmt: skip
    data = PreferenceDataModule(
        str(file), validation=str(held_out), predict=str(held_out), batch_size=16, max_length=128, seed=seed
    )
    trainer = Trainer(
        max_epochs=options.epochs, accelerator="cpu", logger=False, limit_val_batches=0, num_sanity_val_steps=0,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[PairPredictionWriter(str(predictions))],
    )  # fmt: skip
    trainer.fit(module, data)
    trainer.predict(module, data, return_predictions=False)
    return read_predictions(predictions)


def measure(kind: str, number: int, options: argparse.Namespace) -> list[Record]:
    """One set, its trainings, and their comparison with one run of each setting and with several."""
    draw = random.Random(f"{kind} {number}")
    rows = made_up("utility", options.rows + options.held_out, draw)
    with tempfile.TemporaryDirectory() as made:
        folder = options.folder / f"{kind.replace('/', '')}_{number}" if options.folder else Path(made)
        folder.mkdir(parents=True, exist_ok=True)
        write(folder / "held_out.jsonl", rows[options.rows :], 0.0, draw)
        a = write(folder / "a.jsonl", rows[: options.rows], options.noise, draw)
        b = write(folder / "b.jsonl", rows[: options.rows], 0.0, draw) if kind == "A/B" else a
        first = [train(folder, a, 1000 * number + seed, options) for seed in range(options.seeds)]
        second = [train(folder, b, 1000 * number + 500 + seed, options) for seed in range(options.seeds)]
    splits = [(first, second)]
    if kind == "A/A" and options.seeds > 1:  # the runs of both are equal in all but their seeds: divided in another way
        six = [*first, *second]
        splits.append((six[1::2], six[0::2]))
    records = []
    for runs in sorted({1, options.seeds}):
        for split, (one, other) in enumerate(splits):
            found = compare({"A": one[:runs], "B": other[:runs]}, seed=number)
            differences = {each.what: _told(each) for each in found}
            record = {"kind": kind, "number": number, "split": split, "runs": runs, "differences": differences}
            records.append({**record, "found": [each.what for each in found if each.found]})
    return records


def _told(each: Difference) -> dict[str, float]:
    return {name: float(getattr(each, name)) for name in ("rows", "difference", "low", "high", "p", "corrected")}


def line(kind: str, runs: int, records: Sequence[Record]) -> list[str]:
    """A line of the table."""
    accuracies = [record["differences"]["accuracy"] for record in records]
    counts = [sum(what in record["found"] for record in records) for what in ("accuracy", "log-prob chosen")]
    spread = float(np.std([each["difference"] for each in accuracies], ddof=1)) if len(accuracies) > 1 else 0.0
    half = float(np.mean([(each["high"] - each["low"]) / 2 for each in accuracies]))
    mean = float(np.mean([each["difference"] for each in accuracies]))
    cells = [kind, str(runs), str(len(records)), str(sum(bool(record["found"]) for record in records))]
    return [*cells, *map(str, counts), f"{mean:+.3f}", f"{spread:.3f}", f"{half:.3f}"]


HEADER = ["comparison", "runs of each", "comparisons", "with a difference", "in accuracy", "in log-prob chosen"]
HEADER += ["mean difference of accuracy", "its spread (s.d.)", "half the width of its interval"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--same", type=int, default=10, help="sets for A/A, each compared twice")
    parser.add_argument("--other", type=int, default=5, help="sets for A/B")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each setting where there are several")
    parser.add_argument("--rows", type=int, default=320)
    parser.add_argument("--held-out", type=int, default=200)
    parser.add_argument("--noise", type=float, default=0.3, help="share of training labels that are flipped")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--folder", type=Path, help="keep predictions here, and take those that are there already")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    records: list[Record] = []
    for kind, count in (("A/A", options.same), ("A/B", options.other)):
        for number in range(count):
            records += measure(kind, number, options)
            new = [r for r in records if (r["kind"], r["number"]) == (kind, number)]
            print(kind, number, [(r["runs"], r["found"]) for r in new], flush=True)
    groups = sorted({(record["kind"], record["runs"]) for record in records})
    lines = [line(*group, [r for r in records if (r["kind"], r["runs"]) == group]) for group in groups]
    table = markdown_table(HEADER, lines)
    print(table)
    if options.out is not None:
        about = facts("cpu", torch.get_num_threads()) | {"seed": "numbers of the comparisons"}
        append_lines(options.out / "compare.jsonl", [{**about, **record} for record in records])
        append_section(report_path(options.out, "compare", "cpu"), "Comparisons of runs", [table], about)


if __name__ == "__main__":
    main()
