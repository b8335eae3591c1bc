"""What Lightning, metrics and guards cost: a training step of `PreferenceModule` over a plain loop of the same maths.

    python benchmarks/overhead.py --data DATA/hh_harmless/train.jsonl.gz --shape M
    python benchmarks/overhead.py --data DATA/hh_harmless/train.jsonl.gz --shape tiny --pairs 640 --warmup-steps 10

The first tells the share of a real step, the second, whose steps are short, the cost itself. The plain loop keeps its
reference log-probs in a list, and has no Trainer, metrics, gradient norm or guard against NaN.
"""

from __future__ import annotations

import statistics

from common import Record, markdown_table, spread
from contest import report
from flops import ModelShape

NAMES = ("bare_loop", "lit_dpo")


def step_ms(record: Record) -> float:
    """Median wall milliseconds of a step: one slow moment of the machine is not the library's."""
    return 1000 * statistics.median(record["step_wall_s"])


def table(shape: ModelShape, runs: dict[str, list[Record]]) -> str:
    """One line a way; the difference and ratio of medians over the rounds."""
    bare, ours = (statistics.median(step_ms(record) for record in runs[name]) for name in NAMES)
    lines = [
        [f"{name}: {runs[name][0]['why']}", spread([step_ms(record) for record in runs[name]], 4)] for name in NAMES
    ]
    header = ["way", "ms a step", "more, ms", "over the plain loop"]
    return markdown_table(header, [[*lines[0], "", ""], [*lines[1], f"{ours - bare:.2f}", f"{ours / bare:.4f}x"]])


if __name__ == "__main__":
    report(__file__, __doc__, NAMES, "overhead", "Step overhead", table)
