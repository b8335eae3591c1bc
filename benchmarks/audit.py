"""How well `lit-dpo audit` finds flipped labels, on made-up sets and on any others.

    python benchmarks/audit.py --out benchmarks/results
    python benchmarks/audit.py --sets DATA/hh_harmless/train.jsonl.gz --epochs 4 --out benchmarks/results

Of each set a share of the labels is flipped, a tiny model of random weights is trained with `RecordMargins`, and the
rows are ranked as the audit ranks them. Shown is the AUROC of that ranking, as the mean over seeds with its 95 %
interval (Student's t), and which share of the flipped rows stands among as many rows at the top as there are flipped
ones.

Made-up sets: in `utility` each word has a hidden value, and of two completions the one with the higher sum is chosen;
in `style` the chosen completion is polite. `length` ranks by which completion is longer, without any training.
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
from common import Record, append_lines, append_section, facts, markdown_table, report_path
from lightning.pytorch import Trainer

from lit_dpo import PreferenceDataModule, PreferenceModule
from lit_dpo.callbacks import RecordMargins
from lit_dpo.data.read import read_rows
from lit_dpo.data.rows import parse_row
from lit_dpo.tools.audit import recorded
from lit_dpo.tools.runs import find_run, shown

MODEL = {
    "model_type": "llama", "hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 512, "tie_word_embeddings": True,
}  # fmt: skip
WORDS = [
    f"{first}{second}" for first in ("am", "cop", "riv", "tim") for second in ("ber", "per", "er", "ing", "es", "al")
]
STUDENT = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776}  # 97.5 % quantile for so many seeds


def made_up(name: str, count: int, draw: random.Random) -> list[dict[str, str]]:
    """Rows of a set, their labels right."""
    utility = {word: draw.gauss(0, 1) for word in WORDS}
    rows = []
    for number in range(count):
        first, second = ([draw.choice(WORDS) for _ in range(6)] for _ in range(2))
        if name == "utility":
            first, second = sorted((first, second), key=lambda words: -sum(utility[word] for word in words))
        else:
            first = [draw.choice(("Gladly,", "Certainly,", "With pleasure:")), *first]
            second = [draw.choice(("No,", "Whatever,", "Go away:")), *second]
        texts = {"chosen": " " + " ".join(first), "rejected": " " + " ".join(second)}
        rows.append({"prompt": f"Question {number}: say something.", **texts})
    return rows


def rows_of(name: str, count: int, draw: random.Random) -> list[dict[str, str]]:
    """Rows of a made-up set, or a random choice of those of a file."""
    if name in ("utility", "style"):
        return made_up(name, count, draw)
    pairs = [parse_row(row, "set", where) for where, row in read_rows(name)]
    draw.shuffle(pairs)
    texts = ({"prompt": shown(p.prompt), "chosen": shown(p.chosen), "rejected": shown(p.rejected)} for p in pairs)
    return [{**row, "chosen": " " + row["chosen"], "rejected": " " + row["rejected"]} for row in texts][:count]


def auroc(scores: Sequence[float], flipped: Sequence[bool]) -> float:
    """Share of pairs of a flipped and a good row in which the flipped one has the lower score; a tie is one half."""
    bad, good = (np.array([s for s, f in zip(scores, flipped, strict=True) if f == kind]) for kind in (True, False))
    return float(((bad[:, None] < good) + 0.5 * (bad[:, None] == good)).mean())


def measure(name: str, share: float, seed: int, options: argparse.Namespace) -> Record:
    """Flip, train, rank."""
    draw = random.Random(f"{name} {share} {seed}")
    rows = rows_of(name, options.rows, draw)
    flipped = set(draw.sample(range(len(rows)), round(share * len(rows))))
    swapped = {"chosen": "rejected", "rejected": "chosen", "prompt": "prompt"}
    rows = [{k: row[swapped[k]] for k in row} if n in flipped else row for n, row in enumerate(rows)]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "pairs.jsonl")
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        module = PreferenceModule(
            MODEL, tokenizer="quickstart", init_seed=seed, lr_scheduler=None,
            optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=options.lr, weight_decay=0.0),
        )  # fmt: skip
        data = PreferenceDataModule(
            str(file), validation_fraction=0, batch_size=16, max_length=options.max_length, seed=seed, on_bad_row="skip"
        )
        run = Path(folder, "version_0")
        Trainer(
            default_root_dir=run, max_epochs=options.epochs, accelerator="cpu", logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            callbacks=[RecordMargins()],
        ).fit(module, data)  # fmt: skip
        suspects = recorded(find_run(run))
    scores = [suspect.area for suspect in suspects]
    labels = [int(suspect.row.rpartition(":")[2]) - 1 in flipped for suspect in suspects]
    longer = [float(suspect.length_difference or 0) for suspect in suspects]
    top = np.argsort(scores)[: sum(labels)]
    return {
        "set": Path(name).parent.name or name, "flipped": share, "seed": seed, "rows": len(scores),
        "auroc": auroc(scores, labels), "found": float(np.mean([labels[n] for n in top])),
        "length": auroc(longer, labels),
    }  # fmt: skip


def interval(values: Sequence[float]) -> str:
    """Mean and half the width of its 95 % interval."""
    half = STUDENT[len(values)] * float(np.std(values, ddof=1)) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return f"{np.mean(values):.2f} ± {half:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", default=["utility", "style"])
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--max-length", type=int, default=256, help="tokens; rows with a longer prompt are left out")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seeds", type=int, default=3, choices=[1, *STUDENT])
    parser.add_argument("--flipped", type=float, nargs="+", default=[0.1, 0.2])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    lines, records = [], []
    for name in options.sets:
        for share in options.flipped:
            found = [measure(name, share, seed, options) for seed in range(options.seeds)]
            records += found
            values = [interval([record[key] for record in found]) for key in ("auroc", "found", "length")]
            lines.append([found[0]["set"], f"{share:.0%}", str(found[0]["rows"]), *values])
            print(*lines[-1], sep=" | ", flush=True)
    table = markdown_table(["set", "flipped", "rows", "AUROC", "found at the top", "AUROC of length"], lines)
    print(table)
    if options.out is not None:
        about = {
            **facts("cpu", torch.get_num_threads(), None, *options.sets),
            "seed": f"0 to {options.seeds - 1}",
        }
        append_lines(options.out / "audit.jsonl", [{**about, **record} for record in records])
        append_section(report_path(options.out, "audit", "cpu"), "Flipped labels found", [table], about)


if __name__ == "__main__":
    main()
