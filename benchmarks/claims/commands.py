"""The command line as an experiment uses it: trainings that go on where they were stopped, and what they left."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from lit_dpo.cli import main

Config = dict[str, Any]
Record = dict[str, Any]


def lit_dpo(words: Sequence[str], log: Path) -> None:
    """Run a command of `lit-dpo` in this process; what it prints goes to the end of a log.

    Raises:
        RuntimeError: It failed.
    """
    try:
        with _printing_to(log):
            print(f"$ lit-dpo {' '.join(words)}", flush=True)
            main(words)
    except SystemExit as ended:
        if ended.code not in (0, None):
            last = log.read_text(encoding="utf-8").strip().splitlines()[-1]
            raise RuntimeError(f"lit-dpo {words[0]} ended with {ended.code}, see {log}: {last}") from ended


@contextlib.contextmanager
def _printing_to(log: Path) -> Iterator[None]:
    """Have all that this process prints go to the end of a file, whoever prints it."""
    streams = (sys.stdout, sys.stderr)
    for stream in streams:
        stream.flush()
    kept = [os.dup(number) for number in (1, 2)]
    try:
        with log.open("a", encoding="utf-8") as file:
            for number in (1, 2):
                os.dup2(file.fileno(), number)
            yield
    finally:
        for stream in streams:
            stream.flush()
        for number, before in zip((1, 2), kept, strict=True):
            os.dup2(before, number)
            os.close(before)


def settings(
    model: Path,
    loss: Config,
    train: Path | Sequence[Path],
    *,
    epochs: int,
    seed: int,
    scale: str,
    validation: Path | None = None,
    rate: float = 5e-4,
    batch: int = 16,
    max_length: int = 512,
    callbacks: Iterable[Config] = (),
    reference: Config | None = None,
    data: Config | None = None,
    trainer: Config | None = None,
    **options: Any,
) -> Config:
    """The configuration of a fit: AdamW, gradients clipped at 1, a warm-up over a tenth of the steps, then constant.

    Every optimizer step is logged.

    Args:
        model: Folder of the starting policy.
        loss: `class_path` and `init_args`.
        train: Files of pairs.
        epochs: How often each pair is seen.
        seed: Of the order of the pairs.
        scale: `gpu` trains on a GPU in bfloat16, all others on the CPU.
        validation: File of pairs to validate on after every epoch; without one there is no validation.
        rate: Learning rate.
        batch: Pairs an optimizer step.
        max_length: Most tokens of prompt and one completion.
        callbacks: Besides those that a fit has anyway.
        reference: Where the reference log-probs come from; without one the default of the package.
        data: More options of the data module.
        trainer: More options of the Trainer.
        options: More options of the configuration, at its top.
    """
    files = [str(train)] if isinstance(train, Path) else [str(path) for path in train]
    rows = {"validation": str(validation)} if validation else {"validation_fraction": 0.0}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    device = {"accelerator": "gpu", "precision": "bf16-mixed"} if scale == "gpu" else {"accelerator": "cpu"}
    steps = {"max_epochs": epochs, "gradient_clip_val": 1.0, "log_every_n_steps": 1, "devices": 1}
    warmup = {"class_path": "WarmupDecay", "init_args": {"warmup": 0.1, "decay": "constant"}}
    adamw = {"class_path": "torch.optim.AdamW", "init_args": {"lr": rate, "weight_decay": 0.0}}
    module = {"model": str(model), "loss": loss, "optimizer": adamw, "lr_scheduler": warmup}
    return {
        "seed_everything": seed,
        "threads": 1,
        "model": module if reference is None else {**module, "reference": reference},
        "data": {
            "train": files, "batch_size": batch, "eval_batch_size": 4 * batch, "max_length": max_length, "seed": seed,
            "cache_tokens": False, **rows, **(data or {}),
        },
        "trainer": {**device, **steps, **quiet, "callbacks": list(callbacks), **(trainer or {})},
        **options,
    }  # fmt: skip


def named(class_path: str, **init_args: Any) -> Config:
    """A class as a configuration names it."""
    return {"class_path": class_path, "init_args": init_args}


def fit(folder: Path, config: Config, *overlays: str, words: Sequence[str] = ()) -> Path:
    """Train in a folder, or go on there, or find it done; the folder of the run.

    Args:
        folder: Of this training alone.
        config: Its configuration.
        overlays: Shipped configurations that stand before it.
        words: More of the command line, such as what no configuration may say.
    """
    if not (folder / "DONE").exists():
        folder.mkdir(parents=True, exist_ok=True)
        write(folder / "config.yaml", yaml.safe_dump(config, sort_keys=False))
        words = ["fit", *words, *(word for name in overlays for word in ("--config", name))]
        words += ["--config", str(folder / "config.yaml"), "--trainer.default_root_dir", str(folder)]
        if any(folder.glob("version_*/**/last.ckpt")):
            words += ["--ckpt_path", "last"]
        lit_dpo(words, folder / "log.txt")
        write(folder / "DONE", "")
    return max(folder.glob("version_*"), key=lambda run: int(run.name.rpartition("_")[2]))


def predict(run: Path, rows: Path, checkpoint: str = "last", tokens: bool = False) -> list[Record]:
    """What a trained policy and its reference make of pairs, a record a pair, see `PairPredictionWriter`.

    Args:
        run: The folder of a fit.
        rows: File of pairs.
        checkpoint: `last`, or `best`, that of `BestCheckpoint`.
        tokens: Give the log-prob of each token too.
    """
    path = run / f"{rows.stem}-{checkpoint}{'-tokens' * tokens}.jsonl"
    if not path.exists():
        [file] = run.glob("checkpoints/last.ckpt" if checkpoint == "last" else "checkpoints/step=*.ckpt")
        words = ["predict", "--config", str(run / "config.yaml"), "--data.predict", str(rows)]
        words += ["--ckpt_path", str(file), "--predictions", str(path), "--model.predict_tokens", str(tokens).lower()]
        lit_dpo(words, run / "log.txt")
    return lines(path)


def logged(run: Path) -> list[dict[str, float]]:
    """The metrics of a run, one record a line of its `metrics.csv`, without what is empty.

    A run that was stopped and went on has left `metrics_0.csv` and so on before it; steps that it did again count once.
    """
    earlier = sorted(run.glob("metrics_*.csv"), key=lambda path: int(path.stem.partition("_")[2]))
    found: dict[tuple[str, ...], dict[str, float]] = {}
    for path in [*earlier, *run.glob("metrics.csv")]:
        with path.open(encoding="utf-8", newline="") as file:
            for line in csv.DictReader(file):
                seen = {name: float(value) for name, value in line.items() if value}
                found[(line["step"], *sorted(seen))] = seen
    return list(found.values())


def lines(path: Path) -> list[Record]:
    """Records of a JSON lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def digest(value: object) -> str:
    """A short name for settings, the same in every process."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:12]


def write_rows(folder: Path, name: str, rows: Sequence[Record]) -> Path:
    """Write pairs to a file, once; its name carries a digest of its content, so that no other rows are ever there."""
    path = folder / f"{name}-{digest(rows)}.jsonl"
    if not path.exists():
        write(path, "".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def write(path: Path, text: str) -> None:
    """Write a file that is there whole or not at all, whenever the process is killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
