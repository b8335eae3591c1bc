"""Active preference learning on `sort3`: does choosing what the oracle is asked teach more than asking at random?

    python benchmarks/active.py --out benchmarks/results

The small Llama of `sort3.py`, which sorts digits and half of whose lessons were careless, is trained in rounds with a
budget of questions. A question is a pair of completions of one prompt; the oracle says of each whether it is right, and
two that are right or wrong alike teach nothing. All ways of choosing have the same first model, prompts, budget and
steps, and `random` is the control. Measured is the share of unseen prompts that greedy decoding answers right after
each round.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from pathlib import Path

import sort3
from common import Record, append_lines, append_section, markdown_table, report_path
from sort3 import LOSSES, fresh_prompts, greedy, is_right, make_trainer, optimizer, spread, supervised

from lit_dpo import Active, PreferenceDataModule, PreferenceModule, Verifier
from lit_dpo.stepwise import fit_stepwise

WAYS = {
    "random": {"entropy": False, "gap": False},
    "entropy": {"entropy": True, "gap": False},
    "gap": {"entropy": False, "gap": True},
    "entropy + gap": {"entropy": True, "gap": True},
}


def train(way: str, model: str, folder: Path, prompts: Path, seed: int, given: argparse.Namespace) -> list[Record]:
    """Train through the rounds; the record of each."""
    partition = Active(
        str(prompts),
        Verifier(is_right),
        budget=given.budget,
        rounds=given.rounds,
        prompts_per_round=given.prompts,
        samples=given.samples,
        max_new_tokens=9,
        seed=seed,
        **WAYS[way],
    )
    rows = supervised(8, seed)
    module = PreferenceModule(model, loss=LOSSES[given.loss], optimizer=optimizer(1e-3), lr_scheduler=None)
    data = PreferenceDataModule(rows, validation=rows, partition=partition, batch_size=32, max_length=32)
    fit_stepwise(module, data, lambda root: make_trainer(root, given.epochs), folder)
    roots = [folder / f"partition_{step}" for step in range(given.rounds)]
    return [json.loads((root / "round.json").read_text()) for root in roots]


def table(records: list[Record], rounds: int) -> str:
    """One line a way: greedy accuracy after each round, how it differs from `random` of the same seed, and pairs."""
    header = ["asked", "start", *(f"round {n + 1}" for n in range(rounds)), "last - random", "pairs", "finished"]
    control = {record["seed"]: record["greedy"][-1] for record in records if record["way"] == "random"}
    lines = []
    for way in dict.fromkeys(record["way"] for record in records):
        some = [record for record in records if record["way"] == way]
        more = [record["greedy"][-1] - control[record["seed"]] for record in some if record["seed"] in control]
        line = [way, *(spread([record["greedy"][n] for record in some]) for n in range(rounds + 1))]
        line.append("" if way == "random" or not more else spread(more))
        pairs = statistics.mean(record["rounds"][-1]["pairs"] for record in some)
        finished = statistics.mean(record["rounds"][-1]["finished"] for record in some)
        lines.append([*line, f"{pairs:.0f}", f"{finished:.3f}"])
    return markdown_table(header, lines)


def main() -> None:
    parser = sort3.parser(__doc__, unseen=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--budget", type=int, default=900, help="questions of all rounds")
    parser.add_argument("--prompts", type=int, default=600, help="prompts that a round chooses from")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--loss", default="DPO 0.1 + 1.0 SFT", choices=[*LOSSES])
    parser.add_argument("--ways", nargs="+", default=[*WAYS], choices=[*WAYS])
    given = parser.parse_args()
    about, records = sort3.facts_of(given), []
    for seed, _, model, unseen, work in sort3.begun(given):
        prompts = work / "prompts.txt"
        fresh = fresh_prompts(random.Random(3000 + seed), given.rounds * given.prompts)
        prompts.write_text("\n".join(fresh) + "\n")
        first = greedy(model, unseen)
        for number, way in enumerate(given.ways):
            folder = work / str(number)
            told = train(way, model, folder, prompts, seed, given)
            exports = [str(folder / f"partition_{step}" / "export") for step in range(given.rounds)]
            found = [first, *(greedy(export, unseen) for export in exports)]
            records.append({"way": way, "greedy": found, "rounds": told, **about, "seed": seed})
            append_lines(given.out / "active.jsonl", records[-1:])
            print(f"seed {seed}, {way}: {', '.join(f'{value:.3f}' for value in found)}", flush=True)
    title = f"sort3: {given.budget} questions in {given.rounds} rounds, {given.seeds} seeds"
    note = (
        f"Loss {given.loss}; greedy accuracy on {given.unseen} unseen prompts a seed; mean and 95 % interval over "
        "seeds (Student's t); differences are paired by seed."
    )
    append_section(report_path(given.out, "active", "cpu"), title, [table(records, given.rounds)], about, [note])


if __name__ == "__main__":
    main()
