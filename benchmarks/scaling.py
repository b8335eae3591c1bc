"""Does the time of a training step follow the cost model, and how near is it to the machine's matrix products?

    python benchmarks/scaling.py --out benchmarks/results

Forward and backward pass of DPO on the flat line, over sequence length, vocabulary, intermediate layers scored, and
pairs a batch; every point once a round. Each time stands beside the operations counted for it (benchmarks/README.md),
as executed, and beside the time that this machine's own product of large square matrices would take for as many.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from common import Record, append_lines, append_section, facts, markdown_table, now, report_path, save_figure, spread
from flops import TRAIN_TILED, ModelShape, Work, flops

from lit_dpo import DPOLoss, IntermediateLoss, PairBatch, PreferenceLoss, score
from lit_dpo.models import load_model

BASE = {"length": 256, "vocab": 32768, "layers_scored": 0, "pairs": 4}
AXES = {
    "length": (64, 128, 256, 512, 1024),
    "vocab": (8192, 16384, 32768, 65536, 131072),
    "layers_scored": (0, 1, 2, 3, 5),
    "pairs": (1, 2, 4, 8, 16),
}
LABELS = {
    "length": "tokens of prompt and a completion",
    "vocab": "vocabulary",
    "layers_scored": "intermediate layers scored",
    "pairs": "pairs a batch",
}


def product_rate(device: str, size: int = 2048) -> float:
    """Operations a second of one float32 product of square matrices, the best of five."""
    left, right = torch.randn(size, size, device=device), torch.randn(size, size, device=device)
    out = torch.empty(size, size, device=device)
    return 2 * size**3 / min(seconds(lambda: torch.mm(left, right, out=out), device) for _ in range(5))


def seconds(work: Callable[[], Any], device: str) -> float:
    """Wall seconds of one call."""
    before = now(device)[0]
    work()
    return now(device)[0] - before


@lru_cache(maxsize=1)
def model_of(shape: ModelShape, device: str, seed: int) -> Any:
    """Random weights; the last one is kept, as most points of a round share it."""
    return load_model(shape.description(4096), seed=seed).to(device).train()


def step_of(shape: ModelShape, point: Record, device: str, seed: int) -> tuple[Callable[[], None], int]:
    """A forward and backward pass at a point, and the operations counted for it as executed."""
    shape = replace(shape, vocab=point["vocab"])
    model, draw = model_of(shape, device, seed), random.Random(seed)
    size = point["length"] // 2
    lengths = [(size, size, size)] * point["pairs"]
    pairs = [tuple([draw.randrange(shape.vocab) for _ in range(n)] for n in pair) for pair in lengths]
    batch = PairBatch.from_lists(pairs).to(device)  # type: ignore[arg-type]
    loss: PreferenceLoss = DPOLoss()
    if count := point["layers_scored"]:
        loss = IntermediateLoss(base=loss, layers=tuple(range(shape.layers - count, shape.layers)))

    def step() -> None:
        policy = score(model, batch, loss.layers)
        loss(policy, policy.detach()).mean().backward()
        model.zero_grad()

    work = Work.flat(lengths)
    extra = count * flops(shape, Work(0, work.head_tokens, 0), TRAIN_TILED)
    return step, flops(shape, work, TRAIN_TILED) + extra


def measure(shape: ModelShape, options: argparse.Namespace) -> list[Record]:
    """Every point of every axis once a round, the products' rate before and after each round."""
    points = [BASE | {"axis": axis, axis: value} for axis, values in AXES.items() for value in values]
    points = [point | {"length": max(2, point["length"] // options.divide)} for point in points]
    points.sort(key=lambda point: point["vocab"])  # as few models as possible
    rates: list[float] = []
    for number in range(options.rounds):
        rates.append(product_rate(options.device))
        for point in points:
            step, counted = step_of(shape, point, options.device, options.seed)
            step()  # warm-up
            point["operations"] = counted
            point.setdefault("wall_s", []).append(seconds(step, options.device))
        print(f"round {number + 1}: product {rates[-1] / 1e9:.0f} GFLOP/s, {time.strftime('%H:%M:%S')}", flush=True)
    rates.append(product_rate(options.device))
    rate = statistics.median(rates)
    for point in points:
        middle = statistics.median(point["wall_s"])
        point |= {"product_rates": rates, "share_of_products": point["operations"] / middle / rate}
    return sorted(points, key=lambda point: (list(AXES).index(point["axis"]), point[point["axis"]]))


def table(points: Sequence[Record], axis: str) -> str:
    """One line a value of an axis."""
    header = [LABELS[axis], "seconds", "counted GFLOP", "GFLOP/s", "share of the machine's products"]
    rows = []
    for point in (point for point in points if point["axis"] == axis):
        speed = point["operations"] / statistics.median(point["wall_s"]) / 1e9
        counted = f"{point['operations'] / 1e9:.1f}"
        rows.append(
            [str(point[axis]), spread(point["wall_s"]), counted, f"{speed:.0f}", f"{point['share_of_products']:.0%}"]
        )
    return markdown_table(header, rows)


def plot(points: Sequence[Record], path: Path) -> None:
    """Measured seconds, and the counted operations at the rate of the machine's products, one panel an axis."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(AXES), figsize=(4 * len(AXES), 3.6))
    for panel, axis in zip(panels, AXES, strict=True):
        line = [point for point in points if point["axis"] == axis]
        places = [point[axis] for point in line]
        middle = [statistics.median(point["wall_s"]) for point in line]
        ends = [[abs(m - pick(p["wall_s"])) for m, p in zip(middle, line, strict=True)] for pick in (min, max)]
        rate = statistics.median(line[0]["product_rates"])
        panel.errorbar(places, middle, yerr=ends, marker="o", capsize=3, label="measured")
        counted = [point["operations"] / rate for point in line]
        panel.plot(places, counted, linestyle="--", label="counted, at the rate of large products")
        panel.set(xlabel=LABELS[axis], ylabel="seconds, forward and backward", ylim=0)
        panel.locator_params(axis="x", nbins=5)
    panels[1].legend(loc="lower right")
    save_figure(figure, path)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--hidden", type=int, default=512)
    add("--layers", type=int, default=6)
    add("--rounds", type=int, default=3)
    add("--divide", type=int, default=1, help="lengths by this, for a quick look")
    add("--threads", type=int, default=1)
    add("--seed", type=int, default=0)
    add("--device", default="cpu")
    add("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    if options.layers <= max(AXES["layers_scored"]):
        parser.error(f"`--layers` must be above {max(AXES['layers_scored'])}, the most layers scored besides the last.")
    torch.set_num_threads(options.threads)
    shape = ModelShape(options.hidden, 8 * options.hidden // 3, options.layers, 8, 8, BASE["vocab"])
    points = measure(shape, options)
    about = facts(options.device, options.threads, options.seed)
    append_lines(
        options.out / "scaling.jsonl",
        [about | {"hidden": options.hidden, "layers": options.layers} | p for p in points],
    )
    tables = [table(points, axis) for axis in AXES]
    rate = statistics.median(points[0]["product_rates"]) / 1e9
    base = ", ".join(f"{LABELS[axis]} {value}" for axis, value in BASE.items())
    note = f"Large float32 products of this machine: {rate:.0f} GFLOP/s (2048 x 2048). The other axes stand at: {base}."
    note += f" Lengths were divided by {options.divide}." if options.divide > 1 else ""
    print("", *tables, note, sep="\n\n")
    path = report_path(options.out, "scaling", options.device)
    title = f"Time of a step: hidden {options.hidden}, {options.layers} layers, float32, {options.rounds} rounds"
    append_section(path, title, tables, about, [note])
    plot(points, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
