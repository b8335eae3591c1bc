"""Rounds that are killed at any moment beside the same rounds left alone: are pairs, losses and weights the same?

    python benchmarks/chaos_rounds.py --kills 30 --out benchmarks/results

A run of two rounds is a process that is started again by the same call until it is done, and gets SIGKILL: half of the
times at a random moment, half of the times at a place that is drawn (the n-th prompt that is sampled or judged, in the
middle of the file of pairs, after the n-th batch, between two rounds). When it is done, its files are compared with
those of a run that was left alone, and another run is begun until all kills are spent.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import multiprocessing
import os
import random
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from common import Record, append_lines, append_section, facts, markdown_table, report_path
from lightning.pytorch import Callback, Trainer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lit_dpo import Judge, OnPolicy, PreferenceDataModule, PreferenceModule
from lit_dpo.callbacks import LastCheckpoint
from lit_dpo.data import new_pairs
from lit_dpo.stepwise import fit_stepwise

STAGES = ("starting", "sampling", "judging", "merging", "training", "between rounds")
LLAMA = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
LLAMA |= {"num_attention_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2}
PROMPTS = 24  # of a round


class Place:
    """Where a run is, in memory that it shares with whoever kills it; it may kill itself at a place."""

    def __init__(self) -> None:
        self._shared = multiprocessing.get_context("fork").RawArray(ctypes.c_long, [0, -1, 0])

    def arm(self, stage: str | None, times: int = 0) -> None:
        """Have the next run end when it comes to a stage for the n-th time."""
        self._shared[:] = [0, -1 if stage is None else STAGES.index(stage), times]

    def come(self, stage: str) -> None:
        """Note that the run is there."""
        self._shared[0] = STAGES.index(stage)
        if self._shared[0] == self._shared[1]:
            self._shared[2] -= 1
            if self._shared[2] < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    @property
    def stage(self) -> str:
        """Where the run was last."""
        return STAGES[self._shared[0]]


PLACE = Place()


class Watched(Judge):
    """Right is what holds no 7; it notes that the run is judging."""

    def score(self, prompts: Sequence[Any], completions: Sequence[str]) -> list[float | None]:
        """One score each."""
        PLACE.come("judging")
        return [float("7" not in text) for text in completions]


class Log(Callback):
    """One line a batch, on the disk before training goes on."""

    def __init__(self, path: Path, step: int) -> None:
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Write the line."""
        line = json.dumps([[self.step, trainer.global_step], float(outputs["loss"]).hex(), batch.row_ids.tolist()])
        with self.path.open("a") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
        PLACE.come("training")

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """What follows is the export, the mark that the step is done, and the next round."""
        PLACE.come("between rounds")


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a character."""
    core = Tokenizer(models.WordLevel({"<end>": 0, **{sign: n for n, sign in enumerate("0123456789=", 1)}}, "<end>"))
    core.pre_tokenizer, core.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>")


def watched(stage: str, stream: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
    """A stream that notes each of its values."""

    def noting(*args: Any, **options: Any) -> Iterator[Any]:
        for value in stream(*args, **options):
            PLACE.come(stage)
            yield value

    return noting


class Noting(OnPolicy):
    """`OnPolicy` that notes where it is."""

    def next(self, step: int, pool: Any) -> Any:
        """See `OnPolicy`."""
        PLACE.come("between rounds")
        pool.complete = watched("sampling", pool.complete)
        found = super().next(step, pool)
        PLACE.come("merging")
        return found


def train(folder: Path) -> None:
    """The run, begun or gone on with."""
    torch.set_num_threads(1)
    new_pairs.lines = watched("merging", new_pairs.lines)
    prompts = folder / "prompts.txt"
    prompts.write_text("".join(f"{number}=\n" for number in range(2 * PROMPTS)))
    few = [{"prompt": f"{number}=", "chosen": "1", "rejected": "2"} for number in range(2)]
    options = {"rounds": 2, "prompts_per_round": PROMPTS, "samples": 6, "max_new_tokens": 20, "batch_size": 24}
    module = PreferenceModule(
        LLAMA, tokenizer=tokenizer(), optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3), lr_scheduler=None
    )
    partition = Noting(str(prompts), Watched(), **options)
    data = PreferenceDataModule(few, validation=few, partition=partition, batch_size=2, max_length=32)

    def make_trainer(root: Path) -> Trainer:
        step = int(root.name.removeprefix("partition_")) if root.name.startswith("partition_") else -1
        quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
        last = [Log(folder / "log.jsonl", step), LastCheckpoint(every_n_steps=2)] if step >= 0 else []
        return Trainer(
            default_root_dir=root, accelerator="cpu", max_epochs=2, num_sanity_val_steps=0, callbacks=last, **quiet
        )

    fit_stepwise(module, data, make_trainer, folder / "run", resume=(folder / "run").exists())
    (folder / "finished").touch()


class Run:
    """A run in a folder of its own, whose process is forked from this one."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder, self.starts = folder, 0

    def start(self) -> Any:
        """Its process."""
        self.starts += 1
        process = multiprocessing.get_context("fork").Process(target=self._work, daemon=True)
        process.start()
        return process

    def _work(self) -> None:
        with (self.folder / f"said_{self.starts}.txt").open("w") as said:
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
        train(self.folder)

    @property
    def finished(self) -> bool:
        """Whether all rounds are done."""
        return (self.folder / "finished").exists()

    def finish(self) -> None:
        """Let it come to its end, undisturbed."""
        PLACE.arm(None)
        process = self.start()
        process.join()
        said = (self.folder / f"said_{self.starts}.txt").read_text()
        assert process.exitcode == 0, said[-3000:]
        assert self.finished, said[-3000:]

    def result(self) -> Record:
        """Digests of what it has left: pairs and weights of each round, and the losses of its batches."""
        found: Record = {"losses": {}}
        for line in (self.folder / "log.jsonl").read_text().splitlines():
            at, *rest = json.loads(line)
            found["losses"][str(at)] = rest  # a batch that was done again counts as it was done last
        for name in ("pairs.jsonl", "completions.0.jsonl", "scores.0.jsonl", "export/model.safetensors"):
            for step in range(2):
                content = (self.folder / "run" / f"partition_{step}" / name).read_bytes()
                found[f"{name} of round {step}"] = hashlib.sha256(content).hexdigest()
        return found


def disturb(run: Run, draw: random.Random, stage: str | None, seconds: float) -> Record | None:
    """Kill a run once, at a stage or at a random moment; `None` if it was done before that."""
    most = {"sampling": PROMPTS, "judging": PROMPTS, "merging": 2 * PROMPTS, "training": 12, "between rounds": 3}
    PLACE.arm(stage, draw.randrange(most[stage]) if stage else 0)
    process = run.start()
    process.join(None if stage else draw.uniform(0, seconds / 2))
    if process.is_alive():
        process.kill()
        process.join()
    if process.exitcode != -signal.SIGKILL:
        said = (run.folder / f"said_{run.starts}.txt").read_text()
        assert process.exitcode == 0, said[-3000:]
        return None
    return {"stage": PLACE.stage, "drawn": stage or "moment"}


def kill(root: Path, kills: int, each: int, draw: random.Random) -> Record:
    """So many kills, a few a run, and how many runs differ from the one that was left alone."""
    alone = Run(root / "alone")
    began = time.monotonic()
    alone.finish()
    seconds, expected = time.monotonic() - began, alone.result()
    done: list[Record] = []
    differing: list[str] = []
    runs = 0
    while len(done) < kills:
        run = Run(root / f"killed_{runs}")
        runs += 1
        for _ in range(each):
            # Half of them at a drawn stage, those first which were hit least.
            hit = Counter(one["stage"] for one in done)
            stages = sorted(STAGES[1:], key=lambda name: (hit[name], draw.random()))
            found = disturb(run, draw, stages[0] if len(done) % 2 else None, seconds)
            done += [found] if found else []
            if run.finished or len(done) == kills:
                break
        run.finish()
        result = run.result()
        differing += [name for name in expected if result[name] != expected[name]]
        print(f"{len(done)}/{kills} kills, {runs} runs, {len(differing)} differences", flush=True)
    stages = {name: sum(one["stage"] == name for one in done) for name in STAGES}
    drawn = {name: sum(one["stage"] == name and one["drawn"] == "moment" for one in done) for name in STAGES}
    return {"kills": len(done), "runs": runs, "stages": stages, "moments": drawn, "differing": differing}


def main() -> None:
    """Kill, compare, write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--each", type=int, default=6, help="kills of a run at most")
    parser.add_argument("--seed", type=int, default=0, help="of stages and moments")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    os.environ.update({"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"})
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="chaos_rounds_") as root:
        record = kill(Path(root), options.kills, options.each, random.Random(options.seed))
    about = facts("cpu", 1, options.seed)
    append_lines(options.out / "chaos_rounds.jsonl", [about | record])
    rows = [[name, str(record["stages"][name]), str(record["moments"][name])] for name in STAGES]
    table = markdown_table(["killed while", "times", "of these at a random moment"], rows)
    note = f"{record['runs']} runs; differences of pairs, completions, scores, losses or weights from the run left "
    note += f"alone: {len(record['differing'])}."
    print("", table, note, sep="\n\n")
    title = f"{record['kills']} kills of rounds"
    append_section(report_path(options.out, "chaos_rounds", "cpu"), title, [table], about, [note])
    if record["differing"]:
        raise SystemExit(f"Not as promised: {', '.join(record['differing'])}")


if __name__ == "__main__":
    main()
