"""What the benchmarks share: clocks, peak memory, child processes, result files."""

from __future__ import annotations

import datetime
import importlib.metadata
import itertools
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Record = dict[str, Any]


# -- clocks and memory ------------------------------------------------------------------------------------------------


def reset_peak(device: str) -> bool:
    """Forget the highest memory use so far; False where the system does not allow it."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.reset_peak_memory_stats()
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def memory_bytes(device: str, peak: bool = True) -> int:
    """Highest (since `reset_peak`) or present memory use: resident on a CPU, allocated on a GPU."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
    try:
        status = Path("/proc/self/status").read_text()
        found = re.search(rf"{'VmHWM' if peak else 'VmRSS'}:\s+(\d+) kB", status)
        assert found is not None
        return int(found[1]) * 1024
    except (OSError, AssertionError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def now(device: str) -> tuple[float, float]:
    """Wall and process CPU seconds, all work on the device finished."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize()
    return time.perf_counter(), time.process_time()


@dataclass
class StepClock:
    """Times optimizer steps after a warm-up, and the peak memory from there on.

    Args:
        warmup: Steps that are not timed, at least 1: the first step allocates the optimizer's state.
        device: Where the training runs.
    """

    warmup: int
    device: str
    marks: list[tuple[float, float]] = field(default_factory=list)
    steps: int = 0
    peak_was_reset: bool = False

    def step(self) -> None:
        """Note the end of an optimizer step."""
        self.steps += 1
        if self.steps == self.warmup:
            self.peak_was_reset = reset_peak(self.device)
        if self.steps >= self.warmup:
            self.marks.append(now(self.device))

    def record(self) -> Record:
        """Seconds over all timed steps, and each step's."""
        between = [(b[0] - a[0], b[1] - a[1]) for a, b in zip(self.marks, self.marks[1:], strict=False)]
        return {
            "timed_steps": len(between),
            "train_wall_s": sum(wall for wall, _ in between),
            "train_cpu_s": sum(cpu for _, cpu in between),
            "step_wall_s": [round(wall, 6) for wall, _ in between],
            "peak_bytes": memory_bytes(self.device),
            "peak_was_reset": self.peak_was_reset,
        }


# -- child processes --------------------------------------------------------------------------------------------------


def run_child(script: str, arguments: Sequence[str], result: Path, threads: int, timeout: float) -> Record:
    """Run a worker in a process of its own; its record, or one with an ``error`` instead of a measurement."""
    counts = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    quiet = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore"}
    cache = {"HF_DATASETS_CACHE": str(result.with_suffix(".cache")), "TOKENIZERS_PARALLELISM": "false"}
    result.unlink(missing_ok=True)
    command = [sys.executable, script, *arguments, "--result", str(result)]
    try:
        done = subprocess.run(
            command, env=os.environ | counts | quiet | cache, capture_output=True, text=True, timeout=timeout
        )
    except subprocess.TimeoutExpired:
        return {"error": f"stopped after {timeout:.0f} seconds"}
    if result.exists():
        record: Record = json.loads(result.read_text())
        return record
    last = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
    return {"error": f"exit status {done.returncode}: {last}", "stderr": done.stderr[-4000:]}


# -- facts and files --------------------------------------------------------------------------------------------------


def hardware(device: str = "cpu") -> str:
    """Name of the GPU, or of the processor from /proc/cpuinfo."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.get_device_name()
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1].strip() if found else "unknown processor"


def facts(device: str, threads: int | None = None, seed: int | None = None, *data: str | None) -> Record:
    """Everything a published number carries along: command, versions, hardware, threads, seed, date."""
    packages = ("torch", "transformers", "trl", "lightning", "peft", "lit-dpo")
    return {
        "command": command_line(*data),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "hardware": hardware(device),
        "cpus": os.cpu_count(),
        "threads": threads,
        "seed": seed,
        "python": sys.version.split()[0],
        "versions": {name: version(name) for name in packages},
    }


def version(package: str) -> str | None:
    """Installed version of a package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def command_line(*data: str | None) -> str:
    """The command as anyone could give it, without the folders of this machine.

    Of a path to data, folder and file stay; of any other absolute path the option's name: `--work WORK`.
    """
    script, root = Path(sys.argv[0]).resolve(), Path(__file__).resolve().parents[1]
    words = ["python", str(script.relative_to(root)) if script.is_relative_to(root) else script.name]
    for option, word in itertools.pairwise(sys.argv):
        if word in data and "/" in word:
            words.append(f"DATA/{'/'.join(Path(word).parts[-2:])}")
        else:
            words.append(option.lstrip("-").upper() if option.startswith("--") and Path(word).is_absolute() else word)
    return " ".join(words)


def append_lines(path: Path, records: Sequence[Record]) -> None:
    """Append records as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def report_path(out: Path, stem: str, device: str) -> Path:
    """``<stem>_<hardware>_<yyyymm>.md`` in the results folder."""
    slug = re.sub(r"[^a-z0-9]+", "_", re.sub(r"\((r|tm)\)", "", hardware(device).lower())).strip("_")
    return out / f"{stem}_{slug}_{datetime.datetime.now(datetime.UTC):%Y%m}.md"


def append_section(path: Path, title: str, tables: Sequence[str], about: Record, notes: Sequence[str] = ()) -> None:
    """Append a titled section with tables, notes, and the facts that make it reproducible."""
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items() if number)
    source = f"{about['hardware']}, {about['cpus']} CPUs, {about['threads']} threads a process; Python "
    source += f"{about['python']}, {versions}; seed {about['seed']}; {about['date']}."
    path.parent.mkdir(parents=True, exist_ok=True)
    parts = [f"## {title}", *tables, *notes, source, f"```\n{about['command']}\n```"]
    with path.open("a", encoding="utf-8") as file:
        file.write("\n\n".join(parts) + "\n\n")
    print(f"written: {path}")


def save_figure(figure: Any, path: Path) -> None:
    """Write a matplotlib figure as PNG."""
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    print(f"written: {path}")


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table, padded so that it reads as plain text too."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (header, *rows)]
    lines.insert(1, " | ".join("-" * width for width in widths))
    return "\n".join(f"| {line} |" for line in lines)


def spread(values: Sequence[float], digits: int = 3) -> str:
    """``median (min - max)``."""
    low, middle, high = (_short(v, digits) for v in (min(values), statistics.median(values), max(values)))
    return f"{middle} ({low} - {high})" if len(values) > 1 else middle


def _short(value: float, digits: int) -> str:
    return f"{value:.{digits}g}" if abs(value) < 10**digits else f"{value:.0f}"


def medians(records: Sequence[Record], key: Callable[[Record], float]) -> float:
    """Median of a quantity over the rounds of a run."""
    return statistics.median(key(record) for record in records)
