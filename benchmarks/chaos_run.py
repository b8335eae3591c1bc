"""The run that chaos.py disturbs: it logs every batch, and misbehaves once a file tells it to.

Its processes are forked from one that has imported everything, which saves the seconds that importing takes.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import json
import multiprocessing
import os
import shutil
import signal
import socket
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from common import Record
from lightning.pytorch import Callback, LightningModule, Trainer

from lit_dpo import CachedReference, LoRA, PreferenceDataModule, PreferenceModule, RandomSplit, WarmupDecay
from lit_dpo.callbacks import BestCheckpoint, ExportModel, LastCheckpoint
from lit_dpo.references import reference_pass
from lit_dpo.stepwise import fit_stepwise

_FULL = 300_000  # bytes a file may have on the full disk: a checkpoint has more, every other file less
MODEL: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 128,
}


class Log(Callback):
    """One line a batch and process, on the disk before training goes on."""

    def __init__(self, folder: Path, partition: int) -> None:
        self.folder, self.partition = folder, partition

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, i: int
    ) -> None:
        """Write the line."""
        entry = {
            "at": [self.partition, trainer.global_rank, trainer.fit_loop.total_batch_idx],
            "epoch": trainer.current_epoch,
            "rows": batch.row_ids.tolist() if batch.weights is None else batch.row_ids[batch.weights != 0].tolist(),
            "loss": float(outputs["loss"]).hex(),
            "lr": trainer.optimizers[0].param_groups[0]["lr"].hex(),
        }
        with (self.folder / f"log_{trainer.global_rank}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())


class FullDisk(Callback):
    """From the moment a file of this name is there, a write to a checkpoint fails as on a full disk."""

    def __init__(self, folder: Path) -> None:
        self.mark = folder / "disk_is_full"

    def on_train_batch_start(self, *args: Any) -> None:
        """Limit the size of files, once."""
        if self.mark.exists():
            import resource

            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (_FULL, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


class Poison(Callback):
    """From the moment a file of this name is there, the next reference log-prob is NaN."""

    def __init__(self, folder: Path) -> None:
        self.mark = folder / "nan"

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Spoil the table of the reference in memory."""
        if self.mark.exists():
            assert isinstance(pl_module, PreferenceModule)
            assert isinstance(pl_module.reference, CachedReference)
            assert pl_module.reference._table is not None
            pl_module.reference._table.columns["last"].fill_(torch.nan)


def slow_down_scoring(folder: Path) -> None:
    """With a file `slow_scoring` that holds a number, score slowly, and stand still after so many batches."""
    mark = folder / "slow_scoring"
    if not mark.exists():
        return
    left, content_keys = int(mark.read_text()), reference_pass.content_keys

    def slowly(*args: Any, **kwargs: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            (folder / "standing_still").touch()
            time.sleep(600)
        time.sleep(0.1)
        return content_keys(*args, **kwargs)

    reference_pass.content_keys = slowly  # called once a batch that is scored


def train(folder: Path, options: Namespace) -> None:
    """The run itself, begun or gone on with; hashes of its policy and its export go to ``finished`` at the end."""
    torch.set_num_threads(1)
    slow_down_scoring(folder)
    module = PreferenceModule(
        MODEL,
        reference=CachedReference(str(folder / "cache")),
        adapter=LoRA(rank=4, alpha=8, dropout=0.1) if options.lora else None,
        tokenizer="quickstart",
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
        lr_scheduler=WarmupDecay,
    )
    split = RandomSplit(2) if options.stepwise else None
    data = PreferenceDataModule(str(folder / "pairs.jsonl"), batch_size=4, max_length=128, partition=split)

    def make_trainer(root: Path) -> Trainer:
        number = int(root.name.removeprefix("partition_")) if root.name.startswith("partition_") else 0
        return Trainer(
            default_root_dir=root,
            accelerator="cpu",
            devices=options.processes,
            strategy="fsdp2" if options.processes > 1 else "auto",
            max_epochs=options.epochs,
            accumulate_grad_batches=2,
            gradient_clip_val=1.0,
            val_check_interval=0.5,
            num_sanity_val_steps=0,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[
                *(FullDisk(folder), Poison(folder), BestCheckpoint(), Log(folder, number)),
                *([] if options.stepwise else [ExportModel()]),
                LastCheckpoint(every_n_steps=2),
            ],
        )

    if options.stepwise:
        steps = folder / "steps"
        exported = fit_stepwise(module, data, make_trainer, steps, resume=(steps / "partition_0").exists())
        module.configure_model()
    else:
        last = folder / "checkpoints" / "last.ckpt"
        make_trainer(folder).fit(module, data, ckpt_path=last if last.exists() else None)
        exported = folder / "export"
    assert module.policy is not None
    digest = hashlib.sha256((exported / "model.safetensors").read_bytes())
    for name, value in sorted(module.policy.state_dict().items()):
        whole = value.full_tensor() if hasattr(value, "full_tensor") else value
        digest.update(name.encode() + whole.contiguous().numpy().tobytes())
    if int(os.environ.get("RANK", 0)) == 0:
        (folder / "finished").write_text(digest.hexdigest())
    if options.processes > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


class Run:
    """A run in a folder of its own that can be started again and again.

    Args:
        folder: Where it keeps everything; its data file is put there.
        options: Of the command, with the number of `processes`.
    """

    def __init__(self, folder: Path, options: Namespace) -> None:
        folder.mkdir()
        with importlib.resources.as_file(importlib.resources.files("lit_dpo.data") / "quickstart.jsonl") as path:
            shutil.copy(path, folder / "pairs.jsonl")
        self.folder, self.options, self.started = folder, options, 0
        self.processes: list[Any] = []

    def start(self) -> None:
        """Start its processes; what they say goes to a file."""
        self.started += 1
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        fork = multiprocessing.get_context("fork")
        several = self.options.processes > 1
        self.processes = [
            fork.Process(target=self._work, args=(rank, port if several else 0), daemon=True)
            for rank in range(self.options.processes)
        ]
        for process in self.processes:
            process.start()

    def _work(self, rank: int, port: int) -> None:
        with (self.folder / f"said_{self.started}_{rank}.txt").open("w") as said:
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
        if port:
            count = str(self.options.processes)
            shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": count, "GROUP_RANK": "0"}
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": count, "TORCHELASTIC_RUN_ID": "x"}
            os.environ.update(shared | own)
        train(self.folder, self.options)

    def wait(self, limit: float = 120) -> str:
        """Wait for the end of all; what they said."""
        end = time.monotonic() + limit
        for process in self.processes:
            process.join(max(0.1, end - time.monotonic()))
        late = [process for process in self.processes if process.is_alive()]
        for process in late:
            process.kill()
            process.join()
        said = "".join(path.read_text() for path in sorted(self.folder.glob(f"said_{self.started}_*.txt")))
        return said + (f"\nNOT ended within {limit} s" if late else "")

    @property
    def status(self) -> int:
        """Of the first process."""
        status: int = self.processes[0].exitcode
        return status

    @property
    def alive(self) -> bool:
        """Whether all processes are under way."""
        return all(process.is_alive() for process in self.processes)

    def signal(self, number: int, rank: int = 0) -> None:
        """Send a signal to one process."""
        os.kill(self.processes[rank].pid, number)

    def log(self) -> list[Record]:
        """What is logged so far, a torn last line left out."""
        text = "".join(path.read_text(encoding="utf-8") for path in sorted(self.folder.glob("log_*.jsonl")))
        return [json.loads(line) for line in text.splitlines() if line.endswith("}")]

    def wait_for(self, more: int) -> None:
        """Wait until so many more lines are logged, or the run has ended."""
        goal = len(self.log()) + more
        while self.alive and len(self.log()) < goal:
            time.sleep(0.005)

    def last(self) -> Path:
        """The checkpoint to resume from."""
        found = sorted(self.folder.rglob("last.ckpt"), key=lambda path: path.stat().st_mtime)
        return found[-1] if found else self.folder / "checkpoints" / "last.ckpt"
