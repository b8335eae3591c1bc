"""Speed and memory of a round by the number of its prompts: sampling, judging, pairing, and the first batch.

    python benchmarks/rounds_memory.py --prompts 1000 10000 40000 --out benchmarks/results
    python benchmarks/rounds_memory.py --partitions Filtered SelfPlay --out benchmarks/results

Each number of prompts runs in a process of its own, on one thread: the model of `sort3` (see sort3.py) after a little
training, completions of at most 9 tokens; 8 of each prompt on-policy and active, 2 discriminated, 1 otherwise. The peak
is of the memory that is resident, and the floor what the process holds before the round.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
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

from lit_dpo import (
    Active,
    Discriminated,
    Discriminator,
    Filtered,
    OnPolicy,
    PreferenceDataModule,
    PreferenceModule,
    SelfPlay,
    Verifier,
)
from lit_dpo.rounds.base import Rounds
from lit_dpo.stepwise import fit_stepwise


class Measured(Rounds):
    """Notes memory before and after a round is made."""

    def next(self, step: int, pool: Any) -> Any:
        """See `Rounds`."""
        if step == 0:
            self.floor = memory_bytes("cpu", peak=False)
            reset_peak("cpu")
        found = super().next(step, pool)
        if step == 0:
            self.peak = memory_bytes("cpu")
        return found


class MeasuredOnPolicy(Measured, OnPolicy):
    """Eight completions of each prompt."""


class MeasuredFiltered(Measured, Filtered):
    """One completion of each prompt, against the chosen answer of a pair."""


class MeasuredDiscriminated(Measured, Discriminated):
    """Two completions of each prompt, 64 gold labels, a discriminator that learns from them in one epoch."""


class MeasuredActive(Measured, Active):
    """Eight completions of each prompt, ranked by entropy; the judge is asked about half of them."""


class MeasuredSelfPlay(Measured, SelfPlay):
    """One segment of each answer; the buffer holds all pairs."""


def made(name: str, prompts: int, asked: str, pairs: str) -> Any:
    """The partition, which takes all prompts in a round."""
    judge, most = Verifier(sort3.is_right), {"max_new_tokens": 9}
    if name == "OnPolicy":
        return MeasuredOnPolicy(asked, judge, **most)
    if name == "Filtered":
        return MeasuredFiltered(judge, **most)
    if name == "Discriminated":
        learns = Discriminator(lr=1e-3, epochs=1, folds=2)
        return MeasuredDiscriminated(asked, judge, learns, prompts_per_round=prompts, gold_per_round=64, **most)
    if name == "Active":
        return MeasuredActive(asked, judge, budget=prompts // 2, samples=8, **most)
    return MeasuredSelfPlay(pairs, segment_tokens=3, buffer=prompts)


def work(name: str, prompts: int, model: str, result: Path) -> None:
    """One round, in this process."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as work:
        folder, draw = Path(work), random.Random(prompts)
        fresh: dict[str, None] = {}
        while len(fresh) < prompts:
            fresh[sort3.ask(draw)] = None
        (folder / "prompts.txt").write_text("\n".join(fresh) + "\n")
        with (folder / "pairs.jsonl").open("w") as file:
            for asked in fresh:
                row = {"prompt": asked, "chosen": sort3.answer(asked), "rejected": sort3.answer(asked)[::-1] + "="}
                file.write(json.dumps(row) + "\n")
        del fresh
        partition = made(name, prompts, str(folder / "prompts.txt"), str(folder / "pairs.jsonl"))
        module = PreferenceModule(model, optimizer=sort3.optimizer(1e-3), lr_scheduler=None)
        rows = sort3.supervised(8, 0)
        pool = str(folder / "pairs.jsonl") if name == "Filtered" else rows
        data = PreferenceDataModule(pool, validation=rows, partition=partition, batch_size=32, max_length=32)

        def make_trainer(root: Path) -> Any:
            trainer = sort3.make_trainer(root, 1)
            trainer.fit_loop.epoch_loop.max_steps = 1
            return trainer

        fit_stepwise(module, data, make_trainer, folder / "run")
        told = json.loads((folder / "run" / "partition_0" / "round.json").read_text())
        size = sum(path.stat().st_size for path in (folder / "run" / "partition_0").glob("*.jsonl"))
    found = {
        "partition": name,
        "prompts": prompts,
        "floor": partition.floor,
        "peak": partition.peak,
        "peak_training": memory_bytes("cpu"),
    }
    result.write_text(json.dumps({**found, "files": size, "round": told}))


def main() -> None:
    """Measure each number of prompts, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, nargs="+", default=[1000, 10000, 40000])
    names = ("OnPolicy", "Filtered", "Discriminated", "SelfPlay", "Active")
    parser.add_argument("--partitions", nargs="+", choices=names, default=names)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--model", help="of a worker")
    parser.add_argument("--result", type=Path, help="of a worker")
    given = parser.parse_args()
    if given.result is not None:
        work(given.partitions[0], given.prompts[0], given.model, given.result)
        return
    torch.set_num_threads(1)
    about, records = facts("cpu", 1, 0), []
    with tempfile.TemporaryDirectory() as folder:
        model = sort3.start(Path(folder), sort3.supervised(2000, 0), 0, epochs=3)
        for name, prompts in itertools.product(given.partitions, given.prompts):
            words = ["--partitions", name, "--prompts", str(prompts), "--model", model]
            records.append(run_child(__file__, words, Path(folder) / f"{name}_{prompts}.json", 1, 3600))
            assert "error" not in records[-1], records[-1]
            append_lines(given.out / "rounds_memory.jsonl", [about | records[-1]])
            print(records[-1], flush=True)
    header = [
        "partition",
        "prompts",
        "completions a second",
        "judged a second",
        "floor MB",
        "peak above it MB",
        "with training MB",
    ]
    rows = []
    for record in records:
        told, floor = record["round"], record["floor"]
        speeds = [told["completions"] / told["seconds"]["sampling"]]
        if record["partition"] == "OnPolicy":
            judged = told["completions"] * told["finished"] - told["empty"] - told["duplicates"]
            speeds.append(judged / told["seconds"]["judging"])
        texts = [record["partition"], f"{record['prompts']:,}", *(f"{value:,.0f}" for value in speeds)]
        texts += ["-"] * (2 - len(speeds))
        sizes = [floor, record["peak"] - floor, record["peak_training"] - floor]
        rows.append([*texts, *(f"{value / 1e6:,.1f}" for value in sizes)])
    table = markdown_table(header, rows)
    print(table)
    load, processors = os.getloadavg()[0], os.cpu_count()
    note = (
        f"Load of the machine in the last minute of it: {load:.1f} on {processors} CPUs. Speeds are those of a machine "
    )
    note += "with other work where that is above 1."
    title = f"Rounds by the number of prompts: {', '.join(given.partitions)}"
    append_section(report_path(given.out, "rounds_memory", "cpu"), title, [table], about, [note])


if __name__ == "__main__":
    main()
