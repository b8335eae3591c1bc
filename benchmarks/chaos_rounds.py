"""Rounds that are killed at any moment beside the same rounds left alone: are pairs, losses and weights the same?

    python benchmarks/chaos_rounds.py --kills 30 --out benchmarks/results
    python benchmarks/chaos_rounds.py --kills 10 --processes 2 --out benchmarks/results

A run of two rounds is a process that is started again by the same call until it is done, and gets SIGKILL: half of the
times at a random moment, half of the times at a place that is drawn (the n-th prompt that is sampled or judged, in the
middle of the file of pairs, after the n-th batch, between two rounds). When it is done, its files are compared with
those of a run that was left alone, and another run is begun until all kills are spent.

With several processes (DDP with gloo, as torchrun would start them), one that is drawn is killed at a random moment, or
the one that comes to a drawn place first. The others must end by themselves.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import multiprocessing
import multiprocessing.connection
import os
import random
import signal
import socket
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from common import Record, append_lines, append_section, facts, markdown_table, report_path
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities import rank_zero_only
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
PATIENCE = 120.0  # seconds that a process has to end when another one was killed


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


def train(folder: Path, rank: int, processes: int, resume: bool) -> None:
    """The run, begun or gone on with."""
    torch.set_num_threads(1)
    new_pairs.lines = watched("merging", new_pairs.lines)
    prompts = folder / "prompts.txt"
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
        last = [Log(folder / f"log.{rank}.jsonl", step), LastCheckpoint(every_n_steps=2)] if step >= 0 else []
        shared = {"devices": processes, "strategy": "ddp" if processes > 1 else "auto"}
        common = {"accelerator": "cpu", "max_epochs": 2, "num_sanity_val_steps": 0, **shared, **quiet}
        return Trainer(default_root_dir=root, callbacks=last, **common)

    fit_stepwise(module, data, make_trainer, folder / "run", resume)
    (folder / "finished").touch()


class Processes:
    """The processes of a run, forked from this one."""

    def __init__(self, count: int, work: Callable[[int, int], None]) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        fork = multiprocessing.get_context("fork").Process
        self.all = [fork(target=work, args=(rank, port), daemon=True) for rank in range(count)]
        for process in self.all:
            process.start()

    def join(self, seconds: float | None) -> None:
        """Wait until one has ended, or so many seconds."""
        multiprocessing.connection.wait([process.sentinel for process in self.all], seconds)

    def end(self, draw: random.Random | None) -> bool:
        """Kill one that is drawn, unless one was killed already; whether the others ended by themselves."""
        if draw is not None and all(process.is_alive() for process in self.all):
            draw.choice(self.all).kill()
        end = time.monotonic() + PATIENCE
        for process in self.all:
            process.join(max(0.0, end - time.monotonic()))
        left = [process for process in self.all if process.is_alive()]
        for process in left:
            process.kill()
            process.join()
        return not left

    @property
    def codes(self) -> list[int | None]:
        """Their statuses."""
        return [process.exitcode for process in self.all]


class Run:
    """A run in a folder of its own."""

    def __init__(self, folder: Path, processes: int) -> None:
        folder.mkdir()
        (folder / "prompts.txt").write_text("".join(f"{number}=\n" for number in range(2 * PROMPTS)))
        self.folder, self.processes, self.starts = folder, processes, 0

    def start(self) -> Processes:
        """Its processes."""
        self.starts += 1
        resume = (self.folder / "run").exists()
        return Processes(self.processes, lambda rank, port: self._work(rank, port, resume))

    def _work(self, rank: int, port: int, resume: bool) -> None:
        with (self.folder / f"said_{self.starts}.txt").open("a") as said:
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
        if self.processes > 1:
            where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GROUP_RANK": 0, "TORCHELASTIC_RUN_ID": "chaos"}
            where |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": self.processes}
            os.environ.update({name: str(value) for name, value in where.items()}, LOCAL_WORLD_SIZE=str(self.processes))
            rank_zero_only.rank = rank  # Lightning has asked the environment when it was imported
        train(self.folder, rank, self.processes, resume)
        if self.processes > 1:
            dist.barrier()
            dist.destroy_process_group()
            os._exit(0)  # a plain exit aborts now and then, when all is done

    @property
    def said(self) -> str:
        """The end of what it said since it was last started."""
        return (self.folder / f"said_{self.starts}.txt").read_text()[-3000:]

    @property
    def finished(self) -> bool:
        """Whether all rounds are done."""
        return (self.folder / "finished").exists()

    def finish(self) -> None:
        """Let it come to its end, undisturbed."""
        PLACE.arm(None)
        processes = self.start()
        processes.join(None)
        assert processes.end(None), self.said
        assert processes.codes == [0] * self.processes, self.said
        assert self.finished, self.said

    def result(self) -> Record:
        """Digests of what it has left: pairs and weights of each round, and the losses of its batches."""
        found: Record = {"losses": {}}
        ranks = range(self.processes)
        for rank in ranks:
            for line in (self.folder / f"log.{rank}.jsonl").read_text().splitlines():
                at, *rest = json.loads(line)
                found["losses"][f"{rank}: {at}"] = rest  # a batch that was done again counts as it was done last
        journals = [f"{name}.{rank}.jsonl" for name in ("completions", "scores") for rank in ranks]
        for name in ("pairs.jsonl", "export/model.safetensors", *journals):
            for step in range(2):
                content = (self.folder / "run" / f"partition_{step}" / name).read_bytes()
                found[f"{name} of round {step}"] = hashlib.sha256(content).hexdigest()
        return found


def disturb(run: Run, draw: random.Random, stage: str | None, seconds: float) -> Record | None:
    """Kill a run once, at a stage or at a random moment; `None` if it was done before that."""
    most = {"sampling": PROMPTS, "judging": PROMPTS, "merging": 2 * PROMPTS, "training": 12, "between rounds": 3}
    PLACE.arm(stage, draw.randrange(most[stage]) if stage else 0)
    processes = run.start()
    processes.join(None if stage else draw.uniform(0, seconds / 2))
    ended = processes.end(None if stage else draw)
    if -signal.SIGKILL not in processes.codes:
        assert processes.codes == [0] * run.processes, run.said
        return None
    return {"stage": PLACE.stage, "drawn": stage or "moment", "ended": ended}


def kill(root: Path, kills: int, each: int, draw: random.Random, processes: int) -> Record:
    """So many kills, a few a run, and how many runs differ from the one that was left alone."""
    alone = Run(root / "alone", processes)
    began = time.monotonic()
    alone.finish()
    seconds, expected = time.monotonic() - began, alone.result()
    done: list[Record] = []
    differing: list[str] = []
    runs = 0
    while len(done) < kills:
        run = Run(root / f"killed_{runs}", processes)
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
    outlived = sum(not one["ended"] for one in done)
    told: Record = {"kills": len(done), "processes": processes, "runs": runs, "stages": stages, "moments": drawn}
    return told | {"outlived": outlived, "differing": differing}


def main() -> None:
    """Kill, compare, write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--each", type=int, default=6, help="kills of a run at most")
    parser.add_argument("--processes", type=int, default=1, help="of a run")
    parser.add_argument("--seed", type=int, default=0, help="of stages and moments")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    os.environ.update({"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"})
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="chaos_rounds_") as root:
        record = kill(Path(root), options.kills, options.each, random.Random(options.seed), options.processes)
    about = facts("cpu", 1, options.seed)
    append_lines(options.out / "chaos_rounds.jsonl", [about | record])
    rows = [[name, str(record["stages"][name]), str(record["moments"][name])] for name in STAGES]
    table = markdown_table(["killed while", "times", "of these at a random moment"], rows)
    note = f"{record['runs']} runs; differences of pairs, completions, scores, losses or weights from the run left "
    note += f"alone: {len(record['differing'])}."
    title = f"{record['kills']} kills of rounds"
    if options.processes > 1:
        title += f" in {options.processes} processes"
        note += f" Kills after which another process had not ended within {PATIENCE:g} seconds: {record['outlived']}."
    print("", table, note, sep="\n\n")
    append_section(report_path(options.out, "chaos_rounds", "cpu"), title, [table], about, [note])
    if record["differing"] or record["outlived"]:
        raise SystemExit(f"Not as promised: {', '.join(record['differing'])}; outlived: {record['outlived']}")


if __name__ == "__main__":
    main()
