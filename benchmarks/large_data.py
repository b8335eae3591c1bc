"""Does a large data set fit: how long until it is ready, how much memory does each process take, what does a kill cost?

    python benchmarks/large_data.py --rows 10000 100000 1000000 --out benchmarks/results

For each number of rows a file of made-up pairs of 400 tokens. Then, in processes of their own: a first start that is
killed half way, and the start after it; two processes of a second start at the same time, which then read 20,000 pairs
in the order of training; and the log-probs of all rows, found in a table of a reference.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import (
    Record,
    append_lines,
    append_section,
    facts,
    markdown_table,
    memory_bytes,
    report_path,
    reset_peak,
    save_figure,
)

TOKENS = 400  # of prompt and both completions
READ = 20_000  # pairs read after a second start
LIMITS = {"resident_gb": 1.5, "second_start_s": 10, "kept_after_kill": 0.9}


# -- the made-up set --------------------------------------------------------------------------------------------------


def generate(path: Path, rows: int, seed: int) -> None:
    """Pairs of random words, and beside them a tokenizer that has an id for each word."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    draw = random.Random(seed)
    words = {"".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 8))): None for _ in range(3000)}
    core = Tokenizer(WordLevel({word: i for i, word in enumerate(["<eos>", "<unk>", *words])}, unk_token="<unk>"))
    core.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", unk_token="<unk>")
    tokenizer.save_pretrained(path.parent / "tokenizer")
    tens = [" " + " ".join(draw.choices([*words], k=10)) for _ in range(4000)]
    counts = [round(TOKENS * share / 10) for share in (0.4, 0.3, 0.3)]
    with path.open("w", encoding="utf-8") as file:
        for _ in range(rows):
            prompt, chosen, rejected = ("".join(draw.choices(tens, k=count)) for count in counts)
            file.write(json.dumps({"prompt": prompt, "chosen": chosen, "rejected": rejected}) + "\n")


# -- one process ------------------------------------------------------------------------------------------------------


def worker(options: argparse.Namespace) -> Record:
    """What one process does; its record."""
    began = time.perf_counter()
    import torch
    from lightning.pytorch.utilities import rank_zero_only

    from lit_dpo import PreferenceDataModule
    from lit_dpo.data import datamodule, token_cache
    from lit_dpo.tokenizers import load_tokenizer

    rank_zero_only.rank = 1  # quiet
    tokenizer = load_tokenizer(str(options.folder / "tokenizer"))
    imported, base = time.perf_counter(), memory_bytes("cpu", peak=False)
    found: Record = {"import_s": imported - began, "base_bytes": base}
    read, many = datamodule.read_pairs, token_cache.ShownEncoder.many

    def noted(*given: Any) -> Any:
        whole = read(*given)
        found["reused"] = whole[2]
        return whole

    def counted(self: Any, pairs: Any) -> Any:
        result = many(self, pairs)
        options.progress.write_text(str(self._done))
        return result

    datamodule.read_pairs, token_cache.ShownEncoder.many = noted, counted  # type: ignore[method-assign]
    data = PreferenceDataModule(
        str(options.folder / "rows.jsonl"), tokenizer=tokenizer, max_length=512, validation_fraction=0.01
    )
    data.setup("fit")
    batches = iter(data.train_dataloader())
    next(batches)
    found["start_s"] = time.perf_counter() - imported
    found["peak_bytes"] = memory_bytes("cpu")
    began = time.perf_counter()
    data.state_dict()
    found["state_s"] = time.perf_counter() - began
    if options.task == "second":
        reset_peak("cpu")
        began, pairs = time.perf_counter(), 0
        for batch in batches:
            pairs += len(batch)
            if pairs >= READ:
                break
        found |= {"pairs_read": pairs, "read_s": time.perf_counter() - began}
        found["peak_bytes"] = max(found["peak_bytes"], memory_bytes("cpu"))
    if options.task == "table":
        found |= table_of(data._sets["train"], options.folder / "references", torch)
    return found


def table_of(dataset: Any, folder: Path, torch: Any) -> Record:
    """Seconds to store log-probs of all rows, to read them, and to find them."""
    from lit_dpo.checkpoints.tensor_store import TensorStore
    from lit_dpo.references.table import LogpsTable

    marks = [time.perf_counter()]
    keys = dataset.content_keys(torch.arange(len(dataset)))
    marks.append(time.perf_counter())
    values = torch.randn(len(keys), 2)
    store = TensorStore(folder, {"benchmark": "large_data"})
    store.write(LogpsTable(keys, {"last": values}).tensors())
    marks.append(time.perf_counter())
    tensors, problem = store.read(LogpsTable.problem)
    assert tensors is not None, problem
    table = LogpsTable.from_tensors(tensors)
    marks.append(time.perf_counter())
    assert bool(table.known(keys, ["last"]).all())
    places, _ = table.find(keys)
    assert torch.equal(table.columns["last"][places], values)
    marks.append(time.perf_counter())
    names = ("table_keys_s", "table_write_s", "table_read_s", "table_find_s")
    return {name: after - before for name, before, after in zip(names, marks, marks[1:], strict=False)}


# -- all of them ------------------------------------------------------------------------------------------------------


def start(task: str, options: argparse.Namespace, number: int = 0) -> subprocess.Popen[bytes]:
    """A process that does a task."""
    names = {"result": f"{task}{number}.json", "progress": f"{task}{number}.progress"}
    files = [part for name, file in names.items() for part in (f"--{name}", str(options.folder / file))]
    command = [sys.executable, __file__, "--task", task, "--folder", str(options.folder), *files]
    quiet = {"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": str(options.threads)}
    return subprocess.Popen(command, env=os.environ | quiet | {"LIT_DPO_CACHE": str(options.folder / "cache")})


def result(task: str, process: subprocess.Popen[bytes], options: argparse.Namespace, number: int = 0) -> Record:
    """The record of a process, when it has ended."""
    if process.wait():
        raise SystemExit(f"{task}: exit status {process.returncode}")
    record: Record = json.loads((options.folder / f"{task}{number}.json").read_text())
    return record


def measure(rows: int, options: argparse.Namespace) -> Record:
    """Everything for one number of rows."""
    generate(options.folder / "rows.jsonl", rows, options.seed)
    found: Record = {"rows": rows, "file_bytes": (options.folder / "rows.jsonl").stat().st_size}
    first, progress = start("killed", options), options.folder / "killed0.progress"
    began, done = time.perf_counter(), 0
    while first.poll() is None and done < rows // 2:
        time.sleep(0.01)
        done = int((progress.exists() and progress.read_text()) or 0)
    first.send_signal(signal.SIGKILL)
    first.wait()
    killed_s, done = time.perf_counter() - began, int(progress.read_text())
    after = result("first", start("first", options), options)
    found |= {"done_at_kill": done, "kept_after_kill": after["reused"] / done, "killed_after_s": killed_s}
    found |= {"first_start_s": killed_s + after["start_s"], "first_peak_bytes": after["peak_bytes"]}
    found["tokens_bytes"] = sum(file.stat().st_size for file in (options.folder / "cache").glob("*.tokens"))
    both = [start("second", options, number) for number in range(2)]
    seconds = [result("second", process, options, number) for number, process in enumerate(both)]
    found["second"] = seconds
    found["table"] = result("table", start("table", options), options)
    print(json.dumps(found), flush=True)
    return found


def table(records: Sequence[Record]) -> str:
    """One line a number of rows."""
    header = ["rows", "text, MB", "ids, MB", "first start, s", "its memory, GB", "second start, s", "its memory, GB"]
    header += ["kept after a kill", "log-probs read and found, s", "pairs read a second"]
    lines = []
    for one in records:
        second, logps = one["second"], one["table"]
        found = logps["table_keys_s"] + logps["table_read_s"] + logps["table_find_s"]
        cells = [f"{one['rows']:,}", f"{one['file_bytes'] / 1e6:.0f}", f"{one['tokens_bytes'] / 1e6:.0f}"]
        cells += [f"{one['first_start_s']:.1f}", f"{one['first_peak_bytes'] / 1e9:.2f}"]
        cells += [" and ".join(f"{s['start_s']:.1f}" for s in second)]
        cells += [" and ".join(f"{s['peak_bytes'] / 1e9:.2f}" for s in second)]
        cells += [f"{one['kept_after_kill']:.1%}", f"{found:.2f}"]
        cells += [" and ".join(f"{s['pairs_read'] / s['read_s']:.0f}" for s in second)]
        lines.append(cells)
    return markdown_table(header, lines)


def plot(records: Sequence[Record], path: Path) -> None:
    """Seconds and memory over rows, both axes logarithmic, beside a line of slope 1."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [one["rows"] for one in records]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.6))
    first = [one["first_start_s"] for one in records]
    left.plot(rows, first, marker="o", label="first start")
    left.plot(rows, [max(s["start_s"] for s in one["second"]) for one in records], marker="s", label="second start")
    left.plot(rows, [first[-1] * n / rows[-1] for n in rows], linestyle=":", color="grey", label="linear")
    left.axhline(LIMITS["second_start_s"], color="black", linewidth=0.5)
    left.set(xscale="log", yscale="log", xlabel="rows", ylabel="seconds")
    right.plot(rows, [one["first_peak_bytes"] / 1e9 for one in records], marker="o", label="first start")
    second = [max(s["peak_bytes"] for s in one["second"]) / 1e9 for one in records]
    right.plot(rows, second, marker="s", label="second start, and 20,000 pairs read")
    right.plot(rows, [one["tokens_bytes"] / 1e9 for one in records], linestyle=":", label="file of ids")
    right.axhline(LIMITS["resident_gb"], color="black", linewidth=0.5)
    right.set(xscale="log", xlabel="rows", ylabel="GB resident, one process", ylim=(0, None))
    for panel in (left, right):
        panel.legend()
    save_figure(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    add("--threads", type=int, default=1)
    add("--seed", type=int, default=0)
    add("--out", type=Path, default=Path("benchmarks/results"))
    for name in ("--folder", "--result", "--progress"):
        add(name, type=Path, help=argparse.SUPPRESS)
    add("--task", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.task:
        options.result.write_text(json.dumps(worker(options)))
        return
    records = []
    for rows in sorted(options.rows):
        with tempfile.TemporaryDirectory(prefix="large_data.", dir=options.folder) as folder:
            given, options.folder = options.folder, Path(folder)
            records.append(measure(rows, options))
            options.folder = given
    about = facts("cpu", options.threads, options.seed)
    append_lines(options.out / "large_data.jsonl", [about | record for record in records])
    notes = [
        "The first start was killed half way and started again: the seconds are those of both, imports of the first in "
        "them. Memory is the largest resident set of a process, its imports, about 0.4 GB, in it. Two processes make "
        "the second start at the same time; each then reads pairs in the order of training. A start is over when the "
        "first batch is there. The tokenizer knows whole words alone, which is faster than most."
    ]
    print("", table(records), *notes, sep="\n\n")
    path = report_path(options.out, "large_data", "cpu")
    append_section(path, f"Pairs of {TOKENS} tokens", [table(records)], about, notes)
    plot(records, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
