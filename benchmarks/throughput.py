"""lit_dpo and TRL's DPOTrainer side by side: time, memory and padding on the same weights, pairs and optimizer.

    python benchmarks/throughput.py --data DATA/hh_harmless/train.jsonl.gz --shape M

Every contestant runs in a process of its own through its library's public interface, in interleaved rounds. Token ids
and the first losses are proven equal before any time is reported. benchmarks/README.md says how it is measured.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from common import Record, append_section, facts, markdown_table, medians, report_path, spread
from contest import UnequalError, add_arguments, by_run, contest, prepared, title_of, work
from workers import RUNS

DEFAULT_RUNS = "trl_default,trl_best,trl_best_head,lit_dpo,lit_dpo_live"
Quantity = Callable[[Record], float]


def training(clock: str) -> Quantity:
    """Seconds a pair in training alone, by ``wall`` or ``cpu``."""
    return lambda record: record[f"train_{clock}_s"] / record["timed_pairs"]


def reference(clock: str) -> Quantity:
    """Seconds a pair in a reference pass of its own, 0 where the reference runs within the step."""
    return lambda record: record[f"reference_{clock}_s"] / record["reference_pairs"]


def epoch(clock: str) -> Quantity:
    """Seconds a pair for one epoch, the reference pass counted."""
    return lambda record: reference(clock)(record) + training(clock)(record)


def times_table(runs: dict[str, list[Record]]) -> str:
    """One line a run: medians with minimum and maximum over the rounds."""

    def over(records: Sequence[Record], key: Quantity) -> str:
        return spread([key(record) for record in records])

    header = ["run", "CPU s/pair", "wall s/pair", "reference pass, CPU s/pair", "pairs/s, pass counted"]
    header += ["pairs/s, training only", "peak GB", "tokens computed / in the sequences, a step"]
    rows = []
    for name, records in runs.items():
        first = records[0]
        steps = first["timed_steps"]
        rows.append(
            [
                f"{name}: {first['why']} ({first['reference']})",
                over(records, training("cpu")),
                over(records, training("wall")),
                over(records, reference("cpu")),
                over(records, lambda record: 1 / epoch("wall")(record)),
                over(records, lambda record: 1 / training("wall")(record)),
                over(records, lambda record: record["peak_bytes"] / 1e9),
                f"{first['computed_tokens'] / steps:.0f} / {first['real_tokens'] / steps:.0f}",
            ]
        )
    return markdown_table(header, rows)


def ratios_table(runs: dict[str, list[Record]]) -> str:
    """Of each of our runs over each opponent, from medians."""
    header = ["run over opponent", "speed, pass counted, CPU", "the same, wall", "speed, training only, CPU"]
    header += ["the same, wall", "memory"]
    quantities = [epoch("cpu"), epoch("wall"), training("cpu"), training("wall")]
    rows = []
    for ours in (name for name in runs if RUNS[name].side == "lit_dpo" and not RUNS[name].layers):
        for theirs in (name for name in runs if RUNS[name].side == "trl"):
            faster = [medians(runs[theirs], key) / medians(runs[ours], key) for key in quantities]
            peaks = [medians(runs[name], lambda record: record["peak_bytes"]) for name in (ours, theirs)]
            rows.append([f"{ours} / {theirs}", *(f"{ratio:.2f}x" for ratio in faster), f"{peaks[0] / peaks[1]:.2f}x"])
    return markdown_table(header, rows) if rows else "No opponent ran, so there is no ratio."


def peaks_table(runs: dict[str, list[Record]]) -> str:
    """Peak memory alone, and our runs' share of it."""
    ours = [name for name in runs if RUNS[name].side == "lit_dpo"]
    peaks = {name: medians(records, lambda record: record["peak_bytes"]) for name, records in runs.items()}
    header = ["run", "peak GB", "tokens computed a step", *(f"{name} over it" for name in ours)]
    rows = []
    for name, records in runs.items():
        tokens = records[0]["computed_tokens"] / records[0]["timed_steps"]
        shares = [f"{peaks[own] / peaks[name]:.2f}x" for own in ours]
        rows.append([f"{name}: {records[0]['why']}", f"{peaks[name] / 1e9:.2f}", f"{tokens:.0f}", *shares])
    return markdown_table(header, rows)


def notes(records: Sequence[Record], runs: dict[str, list[Record]]) -> list[str]:
    """What a reader of the tables must know besides them."""
    failed = [record for record in records if "error" in record]
    lines = [f"{record['run']}, round {record['round'] + 1}, failed: {record['error']}" for record in failed]
    if not all(record["peak_was_reset"] for group in runs.values() for record in group):
        lines.append("This system does not let a process reset its peak memory: peaks include loading and warm-up.")
    losses = {record["order"]: record["losses"] for group in runs.values() for record in group}
    shown = "; ".join(f"{order} {', '.join(f'{loss:.6f}' for loss in values)}" for order, values in losses.items())
    lines.append(f"Token ids equal in all runs; first losses equal within 1e-4 in runs of one order: {shown}.")
    return lines


def main() -> None:
    """Run the contest, or as its worker one contestant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--runs", default=DEFAULT_RUNS, help=f"comma list of {', '.join(RUNS)}")
    options = parser.parse_args()
    if options.worker:
        work(options)
        return
    names = options.runs.split(",")
    if not options.data or not set(names) <= set(RUNS):
        parser.error("`--data` is needed, and `--runs` must name runs of the list in --help.")
    try:
        with prepared(options) as settings:
            stem = "peak" if options.sort_within == "longest" else "throughput"
            records = contest(__file__, names, settings, options, stem)
    except UnequalError as error:
        raise SystemExit(f"No time is reported. {error}") from error
    runs = by_run(records)
    if not runs:
        raise SystemExit("Every run failed; see the lines above and the file throughput.jsonl.")
    title = "Throughput"
    tables = [times_table(runs), ratios_table(runs)]
    if options.sort_within == "longest":  # a measurement of memory, which may run beside other work
        title, tables = "Peak memory on the longest pairs", [peaks_table(runs)]
    print("", *tables, *notes(records, runs), sep="\n\n")
    about = facts(options.device, options.threads, options.seed, options.data)
    append_section(
        report_path(Path(options.out), stem, options.device),
        f"{title}: {title_of(options)}",
        tables,
        about,
        notes(records, runs),
    )


if __name__ == "__main__":
    main()
