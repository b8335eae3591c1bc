"""Speed and memory of a round by the number of its prompts: sampling, judging, pairing, and the first batch.

    python benchmarks/rounds_memory.py --prompts 1000 10000 40000 --out benchmarks/results

Each number of prompts runs in a process of its own, on one thread: the model of `sort3` (see sort3.py) after a little
training, 8 completions of each prompt, at most 9 tokens. The peak is of the memory that is resident, and the floor what
the process holds before the round.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from pathlib import Path
from typing import Any

import sort3
import torch
from common import (
    append_lines,
    append_section,
    facts,
    markdown_table,
    memory_bytes,
    report_path,
    reset_peak,
    run_child,
)

from lit_dpo import OnPolicy, PreferenceDataModule, PreferenceModule, Verifier
from lit_dpo.stepwise import fit_stepwise


class Measured(OnPolicy):
    """Notes memory before and after a round is made."""

    def next(self, step: int, pool: Any) -> Any:
        """See `OnPolicy`."""
        if step == 0:
            self.floor = memory_bytes("cpu", peak=False)
            reset_peak("cpu")
        found = super().next(step, pool)
        if step == 0:
            self.peak = memory_bytes("cpu")
        return found


def work(prompts: int, model: str, result: Path) -> None:
    """One round, in this process."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as work:
        folder, draw = Path(work), random.Random(prompts)
        fresh: dict[str, None] = {}
        while len(fresh) < prompts:
            fresh[sort3.ask(draw)] = None
        (folder / "prompts.txt").write_text("\n".join(fresh) + "\n")
        del fresh
        partition = Measured(str(folder / "prompts.txt"), Verifier(sort3.is_right), max_new_tokens=9)
        module = PreferenceModule(model, optimizer=sort3.optimizer(1e-3), lr_scheduler=None)
        rows = sort3.supervised(8, 0)
        data = PreferenceDataModule(rows, validation=rows, partition=partition, batch_size=32, max_length=32)

        def make_trainer(root: Path) -> Any:
            trainer = sort3.make_trainer(root, 1)
            trainer.fit_loop.epoch_loop.max_steps = 1
            return trainer

        fit_stepwise(module, data, make_trainer, folder / "run")
        told = json.loads((folder / "run" / "partition_0" / "round.json").read_text())
        size = sum(path.stat().st_size for path in (folder / "run" / "partition_0").glob("*.jsonl"))
    found = {"prompts": prompts, "floor": partition.floor, "peak": partition.peak, "peak_training": memory_bytes("cpu")}
    result.write_text(json.dumps({**found, "files": size, "round": told}))


def main() -> None:
    """Measure each number of prompts, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, nargs="+", default=[1000, 10000, 40000])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--model", help="of a worker")
    parser.add_argument("--result", type=Path, help="of a worker")
    given = parser.parse_args()
    if given.result is not None:
        work(given.prompts[0], given.model, given.result)
        return
    torch.set_num_threads(1)
    about, records = facts("cpu", 1, 0), []
    with tempfile.TemporaryDirectory() as folder:
        model = sort3.start(Path(folder), sort3.supervised(2000, 0), 0, epochs=3)
        for prompts in given.prompts:
            words = ["--prompts", str(prompts), "--model", model]
            records.append(run_child(__file__, words, Path(folder) / f"{prompts}.json", 1, 3600))
            assert "error" not in records[-1], records[-1]
            append_lines(given.out / "rounds_memory.jsonl", [about | records[-1]])
            print(records[-1], flush=True)
    header = ["prompts", "completions a second", "judged a second", "floor MB", "peak above it MB", "with training MB"]
    rows = []
    for record in records:
        told, floor = record["round"], record["floor"]
        judged = told["completions"] * told["finished"] - told["empty"] - told["duplicates"]
        speeds = [told["completions"] / told["seconds"]["sampling"], judged / told["seconds"]["judging"]]
        sizes = [floor, record["peak"] - floor, record["peak_training"] - floor]
        rows.append([f"{record['prompts']:,}", *(f"{v:,.0f}" for v in speeds), *(f"{v / 1e6:,.1f}" for v in sizes)])
    table = markdown_table(header, rows)
    print(table)
    append_section(report_path(given.out, "rounds_memory", "cpu"), "Rounds by the number of prompts", [table], about)


if __name__ == "__main__":
    main()
