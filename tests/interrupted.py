"""A run that can be stopped at any moment and resumed: what it logs, step by step, and a process to kill.

As a script: ``python -m tests.interrupted FOLDER OPTIONS``; it resumes if there is something to resume from.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
from lightning.pytorch import Callback

from lit_dpo import CachedReference, LoRA, RandomSplit, SyncedReference, WarmupDecay, watch
from lit_dpo.callbacks import BestCheckpoint, LastCheckpoint, RecordMargins, RewardEarlyStopping, Stopped
from lit_dpo.stepwise import fit_stepwise
from lit_dpo.strategies import FSDP2Strategy
from tests import runs


class Log(Callback):
    """One line a batch, on the disk before training goes on: rows, loss and learning rate to the last bit."""

    def __init__(self, path, partition=0):
        self.path, self.partition = path, partition

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        stepped = (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or trainer.is_last_batch
        logged = stepped and trainer.global_step % trainer.log_every_n_steps == 0
        real = batch.row_ids if batch.weights is None else batch.row_ids[batch.weights != 0]
        self.write(
            partition=self.partition,
            batch=trainer.fit_loop.total_batch_idx,
            rows=real.tolist(),
            loss=float(outputs["loss"]).hex(),
            lr=trainer.optimizers[0].param_groups[0]["lr"].hex(),
            metrics=self.metrics(trainer, "train/") if logged else {},
        )

    def on_validation_end(self, trainer, pl_module):
        self.write(
            partition=self.partition, batch=f"validation {trainer.global_step}", metrics=self.metrics(trainer, "val/")
        )

    @staticmethod
    def metrics(trainer, prefix):
        names = [k for k in trainer.callback_metrics if k.startswith(prefix) and k != "train/tokens_per_second"]
        return {name: float(trainer.callback_metrics[name]).hex() for name in names}

    def write(self, **entry):
        rank = os.environ.get("RANK", "0")
        path = self.path if rank == "0" else self.path.with_name(f"log_{rank}.jsonl")
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())


class Terminate(Callback):
    """Have the last process get a signal in the middle of a batch, as from a scheduler."""

    def __init__(self, batch, number=signal.SIGTERM):
        self.batch, self.number = batch, number

    def on_before_zero_grad(self, trainer, *args):
        if trainer.fit_loop.total_batch_idx == self.batch and trainer.global_rank == trainer.world_size - 1:
            os.kill(os.getpid(), self.number)


class Hold(Callback):
    """Wait at the start of a batch until the other process, which has something to do at this moment, says `go on`.

    It says so on the standard input. `waiting` is what it can wait for on the standard output.
    """

    def __init__(self, batch):
        self.batch = batch

    def on_train_batch_start(self, trainer, *args):
        if trainer.fit_loop.total_batch_idx == self.batch:
            print("waiting", flush=True)
            assert sys.stdin.readline() == "go on\n"


class Die(Callback):
    """Be ended by the kernel some time after so many lines were logged, whatever is under way; no timer but its own.

    Nobody else has to stop it in time, so that it comes no further on a busy machine than on an idle one. The default
    action of the signal of a timer is that of SIGKILL: nothing of the process runs any more.
    """

    def __init__(self, path, lines, seconds):
        self.path, self.lines, self.seconds = path, lines, seconds

    def on_train_batch_start(self, *args):
        logged = self.path.read_text().count("\n") if self.path.exists() else 0
        if logged >= self.lines and signal.getitimer(signal.ITIMER_REAL) == (0, 0):
            assert signal.getsignal(signal.SIGALRM) == signal.SIG_DFL
            signal.setitimer(signal.ITIMER_REAL, self.seconds)


class Mishap(Callback):
    """At a batch one process is killed or fails, while the others are busy for long, which no collective ends."""

    def __init__(self, kind, rank, batch=3):
        self.kind, self.rank, self.batch = kind, rank, batch

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.fit_loop.total_batch_idx == 1 and trainer.global_rank == self.rank:
            time.sleep(watch.GRACE + 1)  # all is well, however long it takes
        if trainer.fit_loop.total_batch_idx != self.batch:
            return
        if trainer.global_rank != self.rank:
            time.sleep(100)
        elif self.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        else:
            raise OSError("the disk is full")


class Spoil(Callback):
    """Put an infinity into the last process's own share of a weight, after the optimizer step of a batch."""

    def __init__(self, batch):
        self.batch = batch

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.fit_loop.total_batch_idx == self.batch and trainer.global_rank == trainer.world_size - 1:
            weight = next(pl_module.policy.parameters()).data
            getattr(weight, "_local_tensor", weight)[-1, 0] = float("inf")


def entries(path):
    """What was logged, the entry of a batch done twice only once: the last one."""
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return list({(line["partition"], line["batch"]): line for line in lines}.values())


def contradictions(path):
    """Batches that were done twice, and differently."""
    seen, found = {}, []
    for line in map(json.loads, path.read_text().splitlines()):
        key = line["partition"], line["batch"]
        if seen.setdefault(key, line) != line:
            found.append(key)
    return found


def parts(folder, options, partition=0):
    """Module, data and callbacks of a run in a folder."""
    adapter = LoRA(rank=2, alpha=4, dropout=0.2) if options.get("lora") else None
    reference = CachedReference(str(folder / "cache")) if options.get("cached") else None
    reference = SyncedReference(every=3, mix=0.6) if options.get("synced") else reference
    module = runs.module(
        lr=1e-2, optimizer=torch.optim.AdamW, lr_scheduler=WarmupDecay, adapter=adapter, reference=reference
    )
    data = runs.data(
        options["file"],
        batch_size=options.get("batch_size", 4),
        num_workers=options.get("workers", 0),
        partition=RandomSplit(2) if options.get("stepwise") else None,
    )
    callbacks = [
        RewardEarlyStopping(patience=50),
        BestCheckpoint(),
        Log(folder / "log.jsonl", partition),
        LastCheckpoint(every_n_steps=options.get("every", 1)),
    ]
    if options.get("margins"):
        callbacks.append(RecordMargins())
    if "terminate" in options:
        callbacks.append(Terminate(options["terminate"], options.get("signal", signal.SIGTERM)))
    if "hold" in options:
        callbacks.append(Hold(options["hold"]))
    if "die" in options:
        callbacks.append(Die(folder / "log.jsonl", *options["die"]))
    if "mishap" in options:
        watch.GRACE = 3
        callbacks.append(Mishap(*options["mishap"]))
    if "spoil" in options:
        callbacks.append(Spoil(options["spoil"]))
    return module, data, callbacks


def trainer(folder, callbacks, options):
    return runs.trainer(
        folder,
        callbacks=callbacks,
        max_epochs=options.get("epochs", 2),
        accumulate_grad_batches=options.get("accumulate", 1),
        val_check_interval=options.get("val_every", 3),
        log_every_n_steps=2,
        enable_checkpointing=True,
        gradient_clip_val=1.0,
        strategy=FSDP2Strategy(True) if options.get("shards") else options.get("strategy", "auto"),
        devices=options.get("devices", 1),
        accelerator=options.get("accelerator", "cpu"),
    )


def train(folder, options, resume=None):
    """Train or resume; the policy at the end."""
    module, data, callbacks = parts(folder, options)
    if options.get("stepwise"):

        def make_trainer(root):
            number = int(root.name.partition("_")[2] or 0) if root.name.startswith("partition") else -1
            return trainer(root, parts(folder, options, number)[2], options)

        fit_stepwise(module, data, make_trainer, folder / "steps", resume=bool(resume))
        module.configure_model()
        return module
    trainer(folder, callbacks, options).fit(module, data, ckpt_path=resume)
    return module


def last_of(folder, options):
    """What to resume from, if there is anything."""
    if options.get("stepwise"):
        return (folder / "steps" / "partition_0").exists() or None
    path = folder / "checkpoints" / "last.ckpt"
    return path if path.exists() else None


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, options, code = Path(sys.argv[1]), json.loads(sys.argv[2]), 0
    folder.mkdir(exist_ok=True)
    print("ready", flush=True)
    try:
        module = train(folder, options, last_of(folder, options))
        values = runs.weights(module.policy).items()
        state = {name: value.full_tensor() if hasattr(value, "full_tensor") else value for name, value in values}
        if int(os.environ.get("RANK", 0)) == 0:
            torch.save(state, folder / "weights.pt")
    except Stopped as stop:
        code = stop.code
    except FloatingPointError as stop:
        (folder / f"error_{os.environ.get('RANK', 0)}.txt").write_text(str(stop))
        code = 3
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
        sys.stdout.flush()
        os._exit(code)  # a plain exit aborts now and then, when all is done
    raise SystemExit(code)
