"""One long CPU run under injected faults beside the same run left alone: how far apart are they?

    python benchmarks/chaos.py --faults 60 --out benchmarks/results

The disturbed run is a process that is started again and again by the same command until it is done. At seeded random
moments it is killed (SIGKILL), asked to stop (SIGTERM), given a full disk, has its newest checkpoint or its reference
cache damaged while it is down, or is fed a NaN. Each batch writes one line to the disk: rows, loss and learning rate to
the last bit. In the end the two logs and the two policies are compared.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import Record, append_lines, append_section, facts, markdown_table, report_path, save_figure
from lightning.pytorch import Callback, LightningModule, Trainer

from lit_dpo import CachedReference, LoRA, PreferenceDataModule, PreferenceModule, WarmupDecay
from lit_dpo.callbacks import LastCheckpoint
from lit_dpo.checkpoints import verify

_FULL = 300_000  # bytes a file may have on the full disk: a checkpoint has more, every other file less
KINDS = ("kill", "terminate", "full disk", "damaged checkpoint", "damaged cache", "NaN row")
MODEL: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 128,
}


class Log(Callback):
    """One line a batch, on the disk before training goes on."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, i: int
    ) -> None:
        """Write the line."""
        entry = {
            "batch": trainer.fit_loop.total_batch_idx,
            "epoch": trainer.current_epoch,
            "rows": batch.row_ids.tolist() if batch.weights is None else batch.row_ids[batch.weights != 0].tolist(),
            "loss": float(outputs["loss"]).hex(),
            "lr": trainer.optimizers[0].param_groups[0]["lr"].hex(),
        }
        with self.path.open("a", encoding="utf-8") as file:
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


def train(folder: Path, options: argparse.Namespace) -> None:
    """The run itself, begun or gone on with; its policy's hash goes to ``finished`` at the end."""
    torch.set_num_threads(1)
    module = PreferenceModule(
        MODEL,
        reference=CachedReference(str(folder / "cache")),
        adapter=LoRA(rank=4, alpha=8, dropout=0.1) if options.lora else None,
        tokenizer="quickstart",
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
        lr_scheduler=WarmupDecay,
    )
    data = PreferenceDataModule("quickstart", batch_size=4, max_length=128)
    trainer = Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        devices=1,
        max_epochs=options.epochs,
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
        val_check_interval=0.5,
        num_sanity_val_steps=0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[FullDisk(folder), Poison(folder), Log(folder / "log.jsonl"), LastCheckpoint(every_n_steps=2)],
    )
    last = folder / "checkpoints" / "last.ckpt"
    trainer.fit(module, data, ckpt_path=last if last.exists() else None)
    digest = hashlib.sha256()
    assert module.policy is not None
    for name, value in sorted(module.policy.state_dict().items()):
        digest.update(name.encode() + value.contiguous().numpy().tobytes())
    (folder / "finished").write_text(digest.hexdigest())


def lines(path: Path) -> list[Record]:
    """What is logged so far, a torn last line left out."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text.splitlines() if line.endswith("}")]


def start(folder: Path, options: argparse.Namespace) -> subprocess.Popen[str]:
    """Start the run in a process of its own."""
    command = [sys.executable, __file__, "--worker", str(folder), "--epochs", str(options.epochs)]
    quiet = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    return subprocess.Popen(
        [*command, *(["--lora"] if options.lora else [])],
        env=os.environ | quiet,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(folder: Path, more: int, process: subprocess.Popen[str]) -> None:
    """Wait until the process has logged so many more lines, or has ended."""
    goal = len(lines(folder / "log.jsonl")) + more
    while process.poll() is None and len(lines(folder / "log.jsonl")) < goal:
        time.sleep(0.002)


def flip(path: Path, draw: random.Random) -> None:
    """Flip a random bit of a file, or cut it."""
    content = bytearray(path.read_bytes())
    if draw.random() < 0.3:
        content = content[: draw.randrange(len(content))]
    else:
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.unlink()  # so that a file that stands under two names is damaged under one
    path.write_bytes(content)


def disturb(
    kind: str, folder: Path, process: subprocess.Popen[str], draw: random.Random, options: argparse.Namespace
) -> str:
    """Inject one fault into a process under way and see it end; return how it ended."""
    marks = {"full disk": "disk_is_full", "NaN row": "nan"}
    if kind in marks:
        (folder / marks[kind]).touch()
    else:
        time.sleep(draw.uniform(0, 0.05))
        process.send_signal(signal.SIGTERM if kind == "terminate" else signal.SIGKILL)
    _, said = process.communicate(timeout=120)
    for mark in marks.values():
        (folder / mark).unlink(missing_ok=True)
    ended = f"status {process.returncode}"
    if kind == "full disk":
        ended += ", path named" if "last.ckpt` cannot be written" in said else ", path NOT named"
    if kind == "NaN row":
        ended += ", row named" if "reference's log-prob of chosen nan" in said else ", row NOT named"
    last, previous = (folder / "checkpoints" / name for name in ("last.ckpt", "previous.ckpt"))
    if kind == "damaged checkpoint" and last.exists() and previous.exists():
        flip(last, draw)
        refusing = start(folder, options)  # the same command: it must refuse, and name the good one
        _, said = refusing.communicate(timeout=120)
        good = "last.ckpt` is damaged" in said and "previous.ckpt`" in said and refusing.returncode != 0
        ended += ", refused and the previous one offered" if good else f", NOT refused: {said[-300:]}"
        verify(previous)
        last.unlink()
        last.with_name("last.ckpt.json").unlink()
        shutil.copy(previous, last)  # what the user was told to resume from
        shutil.copy(previous.with_name("previous.ckpt.json"), last.with_name("last.ckpt.json"))
    if kind == "damaged cache":
        for file in sorted((folder / "cache").rglob("*.safetensors")):
            flip(file, draw)
    return ended


def run(options: argparse.Namespace) -> Record:
    """Both runs, and what became of the disturbed one."""
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory(prefix="chaos_") as root:
        clean, folder = Path(root, "clean"), Path(root, "disturbed")
        clean.mkdir(), folder.mkdir()
        process = start(clean, options)
        _, said = process.communicate()
        assert process.returncode == 0, said[-2000:]
        total = len(lines(clean / "log.jsonl"))
        apart = max(1, total // (options.faults + 1))
        kinds = [KINDS[i % len(KINDS)] for i in range(options.faults)]
        draw.shuffle(kinds)
        faults: list[Record] = []
        for kind in kinds:
            process = start(folder, options)
            wait_for(folder, draw.randint(max(1, apart // 2), apart), process)
            if process.poll() is not None:  # done, or broken: seen below
                break
            at = len({line["batch"] for line in lines(folder / "log.jsonl")})
            faults.append({"kind": kind, "batch": at, "ended": disturb(kind, folder, process, draw, options)})
            print(f"{len(faults)}/{options.faults} batch {at}: {kind}: {faults[-1]['ended']}", flush=True)
        process = start(folder, options)
        _, said = process.communicate()
        assert process.returncode == 0, said[-2000:]
        return compare(clean, folder) | {"faults": faults, "kinds": {k: kinds[: len(faults)].count(k) for k in KINDS}}


def compare(clean: Path, folder: Path) -> Record:
    """The largest difference of losses, rows lost or done twice in the history that counts, equal weights."""
    expected, found = lines(clean / "log.jsonl"), lines(folder / "log.jsonl")
    last = {line["batch"]: line for line in found}  # a batch done again after a crash replaces the one that was lost
    apart = [abs(float.fromhex(line["loss"]) - float.fromhex(last[line["batch"]]["loss"])) for line in expected]
    again: dict[int, Record] = {}
    sound = [line for line in found if line["loss"] != "nan"]  # the poisoned batch logs its NaN before it is refused
    differing = sum(again.setdefault(line["batch"], line) != line for line in sound)
    per_epoch: dict[tuple[int, int], int] = {}
    for line in last.values():
        for row in line["rows"]:
            per_epoch[line["epoch"], row] = per_epoch.get((line["epoch"], row), 0) + 1
    wanted = {(line["epoch"], row) for line in expected for row in line["rows"]}
    return {
        "batches": len(expected),
        "lines": len(found),
        "max_loss_difference": max(apart),
        "lines_differing": sum(last[line["batch"]] != line for line in expected),
        "replays_differing": differing,
        "rows_lost": len(wanted - set(per_epoch)),
        "rows_repeated": sum(count > 1 for count in per_epoch.values()),
        "weights_equal": (clean / "finished").read_text() == (folder / "finished").read_text(),
        "clean": [float.fromhex(line["loss"]) for line in expected],
        "disturbed": [float.fromhex(last[line["batch"]]["loss"]) for line in expected],
    }


def plot(record: Record, path: Path) -> None:
    """The disturbed loss curve over the undisturbed one, with the faults."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(9, 4))
    axis.plot(record["clean"], color="black", linewidth=2.5, label="undisturbed")
    axis.plot(record["disturbed"], color="tab:orange", linewidth=1, label="disturbed")
    for number, kind in enumerate(KINDS):
        places = [fault["batch"] for fault in record["faults"] if fault["kind"] == kind]
        axis.plot(places, [-0.05] * len(places), "^", color=f"C{number + 2}", label=f"{kind} ({len(places)})")
    title = f"{len(record['faults'])} faults, largest difference {record['max_loss_difference']:g}"
    axis.set(xlabel="batch", ylabel="loss", title=title)
    axis.legend(ncol=2, fontsize=8)
    save_figure(figure, path)


def main() -> None:
    """Run both, compare, write the report; or as a worker train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=60)
    parser.add_argument("--epochs", type=int, default=24, help="of the quickstart data; more make a longer run")
    parser.add_argument("--lora", action="store_true", help="train adapters with dropout instead of all weights")
    parser.add_argument("--seed", type=int, default=0, help="of kinds and moments")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        train(options.worker, options)
        return
    began = time.perf_counter()
    record = run(options)
    about = facts("cpu", 1, options.seed) | {"seconds": round(time.perf_counter() - began)}
    append_lines(options.out / "chaos.jsonl", [about | record])
    ends = {kind: {fault["ended"] for fault in record["faults"] if fault["kind"] == kind} for kind in KINDS}
    rows = [[kind, str(count), "; ".join(sorted(ends[kind]))] for kind, count in record["kinds"].items()]
    hidden = ("faults", "kinds", "clean", "disturbed")
    results = [[name.replace("_", " "), str(value)] for name, value in record.items() if name not in hidden]
    tables = [markdown_table(["fault", "times", "ended with"], rows), markdown_table(["result", ""], results)]
    print("", *tables, sep="\n\n")
    path = report_path(options.out, "chaos", "cpu")
    append_section(path, f"{len(record['faults'])} faults in one run", tables, about)
    if importlib.util.find_spec("matplotlib"):
        plot(record, path.with_suffix(".png"))
    else:
        print("no curve is drawn: matplotlib is not installed")
    losses = ("max_loss_difference", "lines_differing", "replays_differing", "rows_lost", "rows_repeated")
    wrong = [name for name in losses if record[name]] + ([] if record["weights_equal"] else ["weights"])
    wrong += [fault["ended"] for fault in record["faults"] if "NOT" in fault["ended"]]
    if len(record["faults"]) < options.faults:
        wrong.append("the run ended before all faults were injected: raise `--epochs`")
    if wrong:
        raise SystemExit(f"Not as promised: {'; '.join(wrong)}")


if __name__ == "__main__":
    main()
