"""Where the memory of a training step goes, over vocabulary sizes and sequence lengths.

    python benchmarks/memory.py --out benchmarks/results

For each point a process of its own takes a policy through a few DPO steps, the reference log-probs given, and measures
its peak above what Python and the libraries hold. Beside it stand what must be there (weights, gradients, optimizer
state, counted exactly) and the tensors saved for the backward pass. ``full_logits`` is the textbook way on the same
pairs: padded rows, the model's own logits, ``log_softmax``.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from common import (
    Record,
    append_lines,
    append_section,
    facts,
    markdown_table,
    memory_bytes,
    report_path,
    reset_peak,
    run_child,
    save_figure,
)
from flops import ModelShape

from lit_dpo import DPOLoss, PairBatch, PairLogps, score
from lit_dpo.models import load_model
from lit_dpo.scoring.inputs import padded


class SavedBytes:
    """Hooks for `saved_tensors_hooks` that count each stretch of memory kept for the backward pass once.

    Args:
        model: Its weights are left out.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.sizes: dict[int, int] = {}

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        """Count a tensor that is about to be kept."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.weights:
            self.sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    @staticmethod
    def give(tensor: torch.Tensor) -> torch.Tensor:
        """Give a kept tensor back as it is."""
        return tensor


def full_logits(model: Any, batch: PairBatch) -> PairLogps:
    """The textbook way: each completion in a padded row of its own, logits and their log-softmax at every position."""
    ids, mask, sources = padded(batch)
    logps = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float().log_softmax(-1)
    tokens = logps.flatten(0, 1)[sources].gather(1, batch.targets[:, None])[:, 0]
    sums = tokens.new_zeros(2 * len(batch)).index_add(0, batch.sequences, tokens)
    return PairLogps(sums[0::2], sums[1::2], batch.lengths[:, 1], batch.lengths[:, 2])


WAYS: dict[str, Callable[[Any, PairBatch], PairLogps]] = {"lit_dpo": score, "full_logits": full_logits}


def measure(options: argparse.Namespace) -> Record:
    """One point: three steps, the first counted, the last one's peak measured."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    steps(ModelShape(64, 64, 1, 4, 4, 64), 8, options)  # libraries allocate at their first use
    floor = memory_bytes(options.device, peak=False)
    vocab, length = options.point
    shape = ModelShape(options.hidden, 2 * options.hidden, options.layers, 4, 4, vocab)
    held = steps(shape, length, options)
    return held | {
        "vocab": vocab,
        "length": length,
        "batch": options.batch,
        "logits_bytes": 2 * options.batch * length * vocab * 4,  # one float32 copy of them
        "floor_bytes": floor,
        "peak_bytes": memory_bytes(options.device) - floor,
    }


def steps(shape: ModelShape, length: int, options: argparse.Namespace) -> Record:
    """Three training steps; what they must hold, in bytes. The peak is reset before the third."""
    run = WAYS[options.worker]
    model = load_model(shape.description(length), seed=options.seed).to(options.device)
    sizes = (length // 2, length - length // 2, length - length // 2)
    pairs = [tuple(torch.randint(shape.vocab, (size,)).tolist() for size in sizes) for _ in range(options.batch)]
    batch = PairBatch.from_lists(pairs).to(options.device)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    loss, saved = DPOLoss(), SavedBytes(model)
    with torch.no_grad():
        reference = run(model, batch)
    for step in range(3):
        if step == 2:
            reset_peak(options.device)
        count = torch.autograd.graph.saved_tensors_hooks(saved.keep, saved.give) if step == 0 else nullcontext()
        with count:
            value = loss(run(model, batch), reference).mean()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    state = sum(t.numel() * t.element_size() for values in optimizer.state.values() for t in values.values())
    return {
        "weights_bytes": weights,
        "gradients_bytes": weights,
        "optimizer_bytes": state,
        "saved_bytes": sum(saved.sizes.values()),
    }


def sweep(options: argparse.Namespace) -> list[Record]:
    """Every point of both sweeps for every way, each in a process of its own."""
    points = [("vocab", vocab, options.length) for vocab in options.vocabs]
    points += [("length", options.vocab, length) for length in options.lengths]
    about = facts(options.device, options.threads, options.seed)
    about["settings"] = {name: getattr(options, name) for name in ("hidden", "layers", "batch")}
    records = []
    with tempfile.TemporaryDirectory(prefix="memory_") as folder:
        for axis, vocab, length in points:
            for way in options.ways:
                same = ("hidden", "layers", "batch", "threads", "seed", "device")
                arguments = [text for name in same for text in (f"--{name}", str(getattr(options, name)))]
                arguments += ["--worker", way, "--point", str(vocab), str(length)]
                result = Path(folder) / f"{axis}_{vocab}_{length}_{way}.json"
                record = run_child(__file__, arguments, result, options.threads, options.timeout)
                record = {"way": way, "axis": axis} | record
                said = record.get("error") or f"{record['peak_bytes'] / 1e6:.0f} MB"
                print(f"vocabulary {vocab}, length {length}, {way}: {said}", flush=True)
                append_lines(options.out / "memory.jsonl", [about | record])
                records.append(record)
    return [record for record in records if "error" not in record]


def table(records: Sequence[Record], axis: str) -> str:
    """Megabytes at each point of a sweep."""
    parts = ("weights", "gradients", "optimizer", "saved", "logits")
    header = [axis, "way", "peak MB", *(f"{part} MB" for part in parts), "peak - weights - gradients - optimizer MB"]
    rows = []
    for record in (record for record in records if record["axis"] == axis):
        held = sum(record[f"{part}_bytes"] for part in parts[:3])
        sizes = [record["peak_bytes"], *(record[f"{part}_bytes"] for part in parts), record["peak_bytes"] - held]
        rows.append([str(record[axis]), record["way"], *(f"{size / 1e6:.0f}" for size in sizes)])
    return markdown_table(header, rows)


def plot(records: Sequence[Record], path: Path) -> None:
    """Measured peaks as lines over what lit_dpo's step must hold as areas, one panel a sweep."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    axes = [axis for axis in ("vocab", "length") if any(record["axis"] == axis for record in records)]
    figure, panels = pyplot.subplots(1, len(axes), figsize=(5.5 * len(axes), 4), squeeze=False)
    for panel, axis in zip(panels[0], axes, strict=True):
        for way in WAYS:
            line = [record for record in records if record["axis"] == axis and record["way"] == way]
            line.sort(key=lambda record: record[axis])
            places = [record[axis] for record in line]
            panel.plot(places, [record["peak_bytes"] / 1e9 for record in line], marker="o", label=f"{way}, measured")
            if way == "lit_dpo":
                parts = ("weights", "gradients", "optimizer", "saved")
                areas = [[record[f"{part}_bytes"] / 1e9 for record in line] for part in parts]
                panel.stackplot(places, *areas, labels=parts, alpha=0.35)
        panel.set(xlabel={"vocab": "vocabulary", "length": "tokens of a sequence"}[axis], ylabel="peak GB", ylim=0)
    panels[0][0].legend()
    save_figure(figure, path)


def main() -> None:
    """Run both sweeps, or as a worker one point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--vocabs", type=int, nargs="*", default=[8192, 16384, 32768, 65536, 131072])
    add("--lengths", type=int, nargs="*", default=[128, 256, 512, 1024, 2048])
    add("--vocab", type=int, default=32768, help="of the sweep over lengths")
    add("--length", type=int, default=256, help="of the sweep over vocabularies: tokens of prompt and a completion")
    add("--hidden", type=int, default=256)
    add("--layers", type=int, default=4)
    add("--batch", type=int, default=4, help="pairs")
    add("--ways", nargs="*", default=list(WAYS), choices=list(WAYS))
    add("--threads", type=int, default=1)
    add("--seed", type=int, default=0)
    add("--device", default="cpu")
    add("--timeout", type=float, default=600, help="seconds for one point")
    add("--out", type=Path, default=Path("benchmarks/results"))
    add("--worker", help=argparse.SUPPRESS)
    add("--point", type=int, nargs=2, help=argparse.SUPPRESS)
    add("--result", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        options.result.write_text(json.dumps(measure(options)))
        return
    records = sweep(options)
    if not records:
        raise SystemExit("Every point failed; see memory.jsonl.")
    axes = [axis for axis in ("vocab", "length") if any(record["axis"] == axis for record in records)]
    tables = [table(records, axis) for axis in axes]
    print("", *tables, sep="\n\n")
    path = report_path(options.out, "memory", options.device)
    title = f"Peak memory: hidden {options.hidden}, {options.layers} layers, {options.batch} pairs, float32"
    append_section(path, title, tables, facts(options.device, options.threads, options.seed))
    plot(records, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
