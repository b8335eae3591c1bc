"""How near the estimates of `lit-dpo check` come to what `lit-dpo fit` then takes: time and peak memory.

    python benchmarks/check.py --out benchmarks/results
    python benchmarks/check.py --only quickstart lora --data DATA/hh_harmless/train.jsonl.gz

For each configuration a process of `check` and then one of `fit`, both of the same command line, as often as
`--repeats` says: each estimate is compared with the median of the fits, because two fits of the same settings take
unlike times too. The table has medians, with the smallest and the largest in brackets. The time of a fit runs
from its first batch (of the validation before training, where there is one) to the end of its last checkpoint, and
a reference's pass is timed apart, as `check` says it. Memory is the largest resident set of the whole process. Without
`--data` the rows are made up, with lengths as those of chats are spread: most are short, and a few are long.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from common import Record, append_lines, append_section, facts, markdown_table, memory_bytes, report_path

LIMIT = 0.15
MODEL = (
    "{model_type: llama, hidden_size: 192, intermediate_size: 512, num_hidden_layers: 4, num_attention_heads: 4, "
    "max_position_embeddings: 1024, tie_word_embeddings: true}"
)
_OWN = ["--model.model", MODEL, "--model.tokenizer", "quickstart", "--trainer.accelerator", "cpu"]
CONFIGURATIONS = {  # name -> words behind `fit`; but for the first each gets model and rows of this benchmark
    "quickstart": ["--config", "quickstart", "--trainer.max_epochs", "24"],
    "dpo": ["--config", "dpo", "--trainer.accumulate_grad_batches", "4"],
    "lora": ["--config", "dpo", "--config", "lora", "--trainer.accumulate_grad_batches", "1"],
    "cached": ["--config", "dpo", "--model.reference", "CachedReference", "--trainer.max_epochs", "2"],
    "intermediate": ["--config", "intermediate", "--trainer.accumulate_grad_batches", "2"],
    "simpo": ["--config", "simpo", "--trainer.accumulate_grad_batches", "1", "--trainer.max_epochs", "2"],
    "padded": [
        "--config", "dpo", "--model.form", "padded", "--model.gradient_checkpointing", "true", "--data.batch_size", "4",
    ],
}  # fmt: skip


def write_rows(path: Path, count: int, seed: int) -> None:
    """Made-up pairs, their lengths lognormal."""
    draw = random.Random(seed)
    words = "the a of and it is was red green tide stone river seldom answer because perhaps however"

    def text(median: float) -> str:
        return " ".join(draw.choices(words.split(), k=round(min(100, max(2, draw.lognormvariate(0, 0.7) * median)))))

    sides = ({"chosen": f" {text(20)}.", "rejected": f" {text(20)}!"} for _ in range(count))
    rows = ({"prompt": f"{number}: {text(25)}?", **side} for number, side in enumerate(sides))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


# -- one process ------------------------------------------------------------------------------------------------------


def worker(kind: str, words: list[str]) -> Record:
    """What a process of `check` says, or what one of `fit` measures of itself."""
    from lightning.pytorch import Callback, Trainer

    if os.environ.get("CLOCK") == "cpu":
        time.perf_counter = time.process_time

    from lit_dpo.callbacks import last_checkpoint
    from lit_dpo.cli import app
    from lit_dpo.references.cached import CachedReference

    seconds: dict[str, float] = {}
    marks: dict[str, float] = {}

    class Clock(Callback):
        """Notes the first batch, and the moment after the last checkpoint."""

        def on_sanity_check_start(self, *args: Any) -> None:
            marks.setdefault("began", time.perf_counter())

        def on_train_start(self, *args: Any) -> None:
            marks.setdefault("began", time.perf_counter())
            marks["train"] = time.perf_counter()

        def on_validation_start(self, *args: Any) -> None:
            marks["validation"] = time.perf_counter()

        def on_validation_end(self, *args: Any) -> None:
            seconds["validation"] = seconds.get("validation", 0.0) + time.perf_counter() - marks["validation"]

        def on_fit_end(self, trainer: Trainer, *args: Any) -> None:
            marks["ended"] = time.perf_counter()
            marks["steps"] = trainer.global_step

    def timed(owner: Any, name: str) -> None:
        function: Callable[..., Any] = getattr(owner, name)

        def wrapped(*args: Any, **options: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **options)
            finally:
                seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start

        setattr(owner, name, wrapped)

    def with_clock(cli: Any, **options: Any) -> Trainer:
        trainer = made(cli, **options)
        trainer.callbacks.insert(0, Clock())
        return trainer

    made = app.PreferenceCLI.instantiate_trainer
    began = time.perf_counter(), time.process_time()
    if kind == "fit":
        app.PreferenceCLI.instantiate_trainer = with_clock  # type: ignore[method-assign]
        timed(CachedReference, "prepare")
        timed(Trainer, "save_checkpoint")
        timed(last_checkpoint, "keep_as")
    try:
        app.main([kind, *words])
    except SystemExit as stop:
        if stop.code == 2:
            raise
    whole = time.perf_counter() - began[0], time.process_time() - began[1]
    found = {"whole_s": whole[0], "whole_cpu_s": whole[1], "peak_bytes": memory_bytes("cpu")}
    if kind == "fit":
        found |= {"time_s": marks["ended"] - marks["began"], "before_s": marks["train"] - marks["began"]}
        found |= {"steps": marks["steps"], **{f"{name}_s": value for name, value in seconds.items()}}
    return found


# -- all of them ------------------------------------------------------------------------------------------------------


def in_seconds(text: str) -> float:
    """Seconds of `12.5 s`, `3 min` or `2 h`."""
    number, unit = text.split()
    return float(number) * {"s": 1, "min": 60, "h": 3600}[unit]


def said(text: str) -> Record:
    """The numbers that `check` has printed."""
    time_of = re.search(r"^estimate time: (?:about )?([\d.e+-]+ (?:s|min|h)) ", text, re.M)
    memory = re.search(r"^estimate memory: ([\d.]+) GiB", text, re.M)
    steps = re.search(r" (\d+) steps", text)
    if time_of is None or memory is None or steps is None:
        raise ValueError(f"`check` gave no estimate: {text}")
    found: Record = {"time_s": in_seconds(time_of[1]), "peak_bytes": float(memory[1]) * 2**30, "steps": int(steps[1])}
    if reference := re.search(r"([\d.e+-]+ (?:s|min|h)) for the reference's pass", text):
        found["prepare_s"] = in_seconds(reference[1])
    return found


def process(kind: str, words: list[str], folder: Path, threads: int, clock: str) -> tuple[Record, str]:
    """A process of its own: its record, and what it printed."""
    result = folder / f"{kind}.json"
    counts = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    surroundings = os.environ | counts | {"CLOCK": clock, "LIT_DPO_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(Path(__file__).resolve()), "--worker", kind, str(result), *words]
    done = subprocess.run(command, cwd=folder, env=surroundings, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{kind} failed: {done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return json.loads(result.read_text()), done.stdout


def measure(name: str, options: argparse.Namespace) -> Record:
    """Check, then fit."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        words = [*CONFIGURATIONS[name], "--threads", str(options.threads), "--trainer.default_root_dir", "runs"]
        words += ["--trainer.enable_progress_bar", "false"]
        if name != "quickstart":
            rows = options.data and str(options.data.resolve())
            if rows is None:
                rows = str(folder / "rows.jsonl")
                write_rows(Path(rows), options.rows, options.seed)
            words += [*_OWN, "--data.train", rows, "--data.validation_fraction", "0.05"]
            words += ["--trainer.callbacks", "[{class_path: BestCheckpoint}]"]  # nothing that ends a run sooner
            words += ["--data.max_length", "512"]
        words += options.more
        runs = [one_each(words, folder / str(number), options) for number in range(options.repeats)]
    return {"configuration": name, "repeats": runs, "fit_s": statistics.median(run["fit"]["time_s"] for run in runs)}


def one_each(words: list[str], folder: Path, options: argparse.Namespace) -> Record:
    """A process of `check`, and one of `fit`."""
    folder.mkdir()
    looked, text = process("check", words, folder, options.threads, options.clock)
    fit, _ = process("fit", words, folder, options.threads, options.clock)
    return {"check": said(text), "fit": fit, "check_itself": looked, "said": text}


def spread(values: Sequence[float], shown: str) -> str:
    """The median, and in brackets the smallest and the largest, if there are several."""
    middle = format(statistics.median(values), shown)
    return middle if len(values) == 1 else f"{middle} ({min(values):{shown}} to {max(values):{shown}})"


def off(record: Record) -> list[float]:
    """By what part each estimate of the time differs from the median of the fits."""
    return [run["check"]["time_s"] / record["fit_s"] - 1 for run in record["repeats"]]


def off_in_memory(record: Record) -> list[float]:
    """The same of memory, of which two fits take as much."""
    return [run["check"]["peak_bytes"] / run["fit"]["peak_bytes"] - 1 for run in record["repeats"]]


def outside(records: Sequence[Record]) -> list[str]:
    """Configurations with estimates that are off by more than the limit, and how many of them."""
    found = {}
    for record in records:
        pairs = zip(off(record), off_in_memory(record), strict=True)
        found[record["configuration"]] = sum(max(map(abs, both)) > LIMIT for both in pairs)
    return [f"{name} ({count} of {len(records[0]['repeats'])})" for name, count in found.items() if count]


def line(record: Record) -> list[str]:
    """A line of the table."""
    runs = record["repeats"]
    checks, fits = [run["check"] for run in runs], [run["fit"] for run in runs]
    cells = [record["configuration"], str(fits[0]["steps"])]
    cells += [spread([found["time_s"] for found in both], ".1f") for both in (checks, fits)]
    cells += [spread(off(record), "+.0%")]
    cells += [f"{statistics.median(found['peak_bytes'] for found in both) / 2**30:.2f}" for both in (checks, fits)]
    cells += [spread(off_in_memory(record), "+.0%")]
    passes = [[found["prepare_s"] for found in both if "prepare_s" in found] for both in (checks, fits)]
    cells += [", ".join(spread(both, ".1f") for both in passes if both)]
    return [*cells, spread([run["check_itself"]["whole_s"] for run in runs], ".0f")]


HEADER = ["configuration", "steps", "check, s", "fit, s", "", "check, GiB", "fit, GiB", ""]
HEADER += ["reference pass, s: check, fit", "check itself, s"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(CONFIGURATIONS), choices=list(CONFIGURATIONS))
    parser.add_argument("--data", type=Path, help="a file of pairs; without it they are made up")
    parser.add_argument("--rows", type=int, default=340)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu: processor seconds of both")
    parser.add_argument("--seed", type=int, default=0, help="of the rows that are made up")
    parser.add_argument("--repeats", type=int, default=1, help="processes of check and of fit")
    parser.add_argument("--more", nargs=argparse.REMAINDER, default=[], help="further options of check and fit")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    about = facts("cpu", options.threads, options.seed, options.data and str(options.data))
    records = []
    for name in options.only:
        records.append(measure(name, options))
        print(*line(records[-1]), sep=" | ", flush=True)
        if options.out is not None:
            append_lines(options.out / "check.jsonl", [{**about, **records[-1]}])
    table = markdown_table(HEADER, list(map(line, records)))
    print(table)
    if options.out is not None:
        clock = {"wall": "Seconds of a clock.", "cpu": "Seconds of the processor."}[options.clock]
        verdict = f"{clock} Outside {LIMIT:.0%}: {', '.join(outside(records)) or 'none'}."
        append_section(report_path(options.out, "check", "cpu"), "Estimates of check", [table], about, [verdict])


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        record = worker(sys.argv[2], sys.argv[4:])
        Path(sys.argv[3]).write_text(json.dumps(record))
    else:
        main()
