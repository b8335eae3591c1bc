"""What intermediate layers cost: a step of `IntermediateLoss` with K = 1 and 3 layers over plain DPO, interleaved.

    python benchmarks/intermediate_cost.py --data DATA/hh_harmless/train.jsonl.gz --shape M

The contestants are those of throughput.py with other losses: same weights, pairs, batches and optimizer, one process
each, cached references. Beside the measured ratio stands the counted one, of the products alone.
"""

from __future__ import annotations

from common import Record, markdown_table, medians, spread
from contest import report
from flops import FORWARD, TRAIN_TILED, ModelShape, Work, flops
from throughput import epoch, training
from workers import RUNS

NAMES = ("intermediate_0", "intermediate_1", "intermediate_3")
NOTE = "Counted: the matrix products alone, 8 operations a head weight and token in training and 2 in the pass."


def counted(shape: ModelShape, record: Record, layers: int) -> tuple[float, float]:
    """Counted work with `layers` more head products over that without: training alone, and the reference pass too."""
    seen = Work(record["computed_tokens"], record["completion_tokens"], record["attended"])
    head = Work(0, record["completion_tokens"], 0)
    train, forward = flops(shape, seen, TRAIN_TILED), flops(shape, seen, FORWARD)
    more_train, more_forward = (layers * flops(shape, head, cost) for cost in (TRAIN_TILED, FORWARD))
    return 1 + more_train / train, 1 + (more_train + more_forward) / (train + forward)


def table(shape: ModelShape, runs: dict[str, list[Record]]) -> str:
    """One line a number of layers; ratios over plain DPO from medians."""
    header = ["layers", "CPU s/pair, training", "over plain DPO", "counted"]
    header += ["CPU s/pair, reference pass counted", "over plain DPO", "counted", "peak GB"]
    rows = []
    plain = runs["intermediate_0"]
    for name, records in runs.items():
        layers = RUNS[name].layers
        ratios = counted(shape, records[0], layers)
        row = [str(layers)]
        for key, ratio in zip((training("cpu"), epoch("cpu")), ratios, strict=True):
            measured = medians(records, key) / medians(plain, key)
            row += [spread([key(record) for record in records]), f"{measured:.2f}x", f"{ratio:.2f}x"]
        rows.append([*row, spread([record["peak_bytes"] / 1e9 for record in records])])
    return markdown_table(header, rows)


if __name__ == "__main__":
    report(__file__, __doc__, NAMES, "intermediate_cost", "Intermediate layers", table, [NOTE])
