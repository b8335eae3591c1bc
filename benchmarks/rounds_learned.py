"""What filtered DPO and D2PO are good for, on `sort3`, the task of `sort3.py`.

    python benchmarks/rounds_learned.py --out benchmarks/results

Both begin with the model of `sort3.py`, which has learned to sort digits from answers half of which are careless.

fdpo: 1,000 pairs, 35 % of whose chosen answers are careless; the rejected one is the right answer with a digit changed.
Two epochs with all pairs, with those that filtered DPO keeps by a verifier, with better samples in the place of chosen
answers, and with those pairs alone whose chosen answer is right, which nobody would know.

d2po: three rounds of 512 prompts with two completions each, 64 of them with a gold label of a verifier; the labels of
the others are a discriminator's. Against it: rounds of 64 prompts, so that there are as many gold labels and nothing
else, and rounds in which all 512 have a gold label.
"""

from __future__ import annotations

import json
import random
import statistics
from pathlib import Path
from typing import Any

import sort3
from common import Record, append_lines, append_section, markdown_table, report_path
from sort3 import LOSSES, answer, ask, careless, greedy, is_right, make_trainer, optimizer, spread

from lit_dpo import (
    BestVsWorst,
    Discriminated,
    Discriminator,
    Filtered,
    OnPolicy,
    Partition,
    Pool,
    PreferenceDataModule,
    PreferenceModule,
    Verifier,
)
from lit_dpo.stepwise import fit_stepwise

LOSS = "DPO 0.1 + 1.0 SFT"
AGAINST = {"fdpo": "all pairs", "d2po": "gold labels alone"}


class Unfiltered(Filtered):
    """The rounds of filtered DPO, with all pairs, or those whose chosen answer is right."""

    def __init__(self, right_alone: bool, **options: Any) -> None:
        super().__init__(Verifier(is_right), **options)
        self.right_alone = right_alone

    def make(self, step: int, pool: Pool) -> tuple[list[dict[str, object]], dict[str, Any]]:
        """Pairs as they are."""
        pairs = [one for one in pool.pairs() if not self.right_alone or is_right(str(one.prompt), str(one.chosen))]
        rows = [{"prompt": one.prompt, "chosen": one.chosen, "rejected": one.rejected} for one in pairs]
        return rows, {"prompts": len(rows), "finished": 1.0, "without_pair": {}}


def noisy(count: int, seed: int) -> list[dict[str, str]]:
    """Pairs, 35 % of whose chosen answers are careless."""
    draw, rows = random.Random(3000 + seed), []
    for _ in range(count):
        prompt = ask(draw)
        right = answer(prompt)
        place = draw.randrange(len(right))
        other = draw.choice([digit for digit in "0123456789" if digit != right[place]])
        chosen = careless(right, draw) if draw.random() < 0.35 else right
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": right[:place] + other + right[place + 1 :]})
    return [row for row in rows if row["chosen"] != row["rejected"]]


def arms(task: str, folder: Path, seed: int, prompts: int, gold: int) -> dict[str, Partition]:
    """The partitions to compare."""
    common: dict[str, Any] = {"max_new_tokens": 9, "seed": seed}
    if task == "fdpo":
        return {
            "all pairs": Unfiltered(False, rounds=2, **common),
            "filtered by a verifier": Filtered(Verifier(is_right), rounds=2, **common),
            "better samples as chosen": Filtered(Verifier(is_right), rounds=2, replace=True, **common),
            "right answers alone": Unfiltered(True, rounds=2, **common),
        }
    draw = random.Random(4000 + seed)
    fresh = list(dict.fromkeys(ask(draw) for _ in range(8 * prompts)))[: 3 * prompts]
    (folder / "prompts.txt").write_text("\n".join(fresh) + "\n")
    file, verifier = str(folder / "prompts.txt"), Verifier(is_right)
    of_gold = {"picker": BestVsWorst(), "rounds": 3, "samples": 2, **common}
    learned = Discriminator(lr=1e-3, epochs=8, seed=seed)
    return {
        "gold labels alone": OnPolicy(file, verifier, prompts_per_round=gold, **of_gold),
        "D2PO": Discriminated(
            file, verifier, learned, rounds=3, prompts_per_round=prompts, gold_per_round=gold, **common
        ),
        "all with gold labels": OnPolicy(file, verifier, prompts_per_round=prompts, **of_gold),
    }


def train(model: str, partition: Partition, rows: list[dict[str, str]], folder: Path) -> tuple[list[str], list[Record]]:
    """Train through the rounds; the export of each, and its record."""
    module = PreferenceModule(model, loss=LOSSES[LOSS], optimizer=optimizer(1e-3), lr_scheduler=None)
    data = PreferenceDataModule(rows, validation=rows[:8], partition=partition, batch_size=32, max_length=32)
    fit_stepwise(module, data, lambda root: make_trainer(root, 1), folder)
    roots = sorted(folder.glob("partition_*"))
    return [str(root / "export") for root in roots], [json.loads((root / "round.json").read_text()) for root in roots]


def table(records: list[Record], task: str) -> tuple[str, list[str]]:
    """One line an arm, with greedy accuracy at the start and after each round; and differences from one of them."""
    some = [record for record in records if record["task"] == task]
    names = list(dict.fromkeys(record["arm"] for record in some))
    of = {name: [record["greedy"] for record in some if record["arm"] == name] for name in names}
    count = len(some[0]["greedy"])
    header = ["arm", "start", *(f"round {n}" for n in range(1, count)), "pairs of the last round", "agreement"]
    lines, verdicts = [], []
    for name in names:
        last = [record["rounds"][-1] for record in some if record["arm"] == name]
        agreed = [one["agreement"] for one in last if "agreement" in one]
        line = [name, *(spread([found[n] for found in of[name]]) for n in range(count))]
        lines.append([*line, f"{statistics.mean(one['pairs'] for one in last):.0f}", spread(agreed) if agreed else ""])
        if name != AGAINST[task]:
            gaps = [a[-1] - b[-1] for a, b in zip(of[name], of[AGAINST[task]], strict=True)]
            verdicts.append(f"{name} minus {AGAINST[task]}, after the last round, paired by seed: {spread(gaps)}")
    return markdown_table(header, lines), verdicts


def main() -> None:
    parser = sort3.parser(__doc__)
    parser.add_argument("--tasks", nargs="+", default=["fdpo", "d2po"], choices=["fdpo", "d2po"])
    parser.add_argument("--pairs", type=int, default=1000, help="pairs of fdpo")
    parser.add_argument("--prompts", type=int, default=512, help="prompts of a round of d2po")
    parser.add_argument("--gold", type=int, default=64, help="gold labels of a round of d2po")
    given = parser.parse_args()
    about, records = sort3.facts_of(given), []
    for seed, _, model, unseen, work in sort3.begun(given):
        first = greedy(model, unseen)
        for task in given.tasks:
            for number, (name, partition) in enumerate(arms(task, work, seed, given.prompts, given.gold).items()):
                exports, told = train(model, partition, noisy(given.pairs, seed), work / f"{task}{number}")
                found = [first, *(greedy(export, unseen) for export in exports)]
                records.append({"task": task, "arm": name, "greedy": found, "rounds": told, **about, "seed": seed})
                append_lines(given.out / "rounds_learned.jsonl", records[-1:])
                print(f"seed {seed}, {task}, {name}: {', '.join(f'{value:.3f}' for value in found)}", flush=True)
    for task in given.tasks:
        lines, verdicts = table(records, task)
        note = (
            f"Greedy accuracy on {given.unseen} unseen prompts a seed; mean and 95 % interval over seeds (Student's t)."
        )
        path = report_path(given.out, "rounds_learned", "cpu")
        append_section(path, f"{task}: {given.seeds} seeds, loss {LOSS}", [lines], about, [note, *verdicts])


if __name__ == "__main__":
    main()
