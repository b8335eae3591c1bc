"""What the length-regularised loss (iLR-DPO) changes in rounds whose judge likes long completions.

    python benchmarks/length.py --out benchmarks/results

The task is that of `benchmarks/sort3.py`. The judge gives 1 to a completion that begins with the right answer, and
some more for each sign of its length, as reward models often do. Each round pairs the best of 8 completions with the
worst. Measured by greedy decoding on unseen prompts: the mean length, the share that is exactly right, and the share
that begins with the right answer, which is what the judge would give without its liking for length.
"""

from __future__ import annotations

import json
import random
import statistics
from pathlib import Path
from typing import Any

import sort3
from common import Record, append_lines, append_section, markdown_table, report_path
from sort3 import answer, fresh_prompts, is_right, make_trainer, optimizer, spread, tokenizer

from lit_dpo import BestVsWorst, DPOLoss, OnPolicy, PreferenceDataModule, PreferenceModule, RDPOLoss, Verifier
from lit_dpo.models import load_model
from lit_dpo.sampling import Sampler
from lit_dpo.stepwise import fit_stepwise

LOSSES: dict[str, Any] = {
    "DPO 0.1": DPOLoss(0.1),
    "R-DPO 0.1, alpha 0.01": RDPOLoss(0.1, 0.01),
    "R-DPO 0.1, alpha 0.1": RDPOLoss(0.1, 0.1),
    "R-DPO 0.1, alpha 0.3": RDPOLoss(0.1, 0.3),
}
LIKING = 0.1  # of the judge, for each sign


def judge(prompt: str, completion: str) -> float:
    """What a completion begins with, and its length."""
    return completion.startswith(answer(prompt)) + LIKING * len(completion)


def measured(model: str, prompts: list[str]) -> Record:
    """Length and accuracy of greedy completions."""
    signs = tokenizer()
    ids = [signs(prompt).input_ids for prompt in prompts]
    found = Sampler(temperature=0.0, max_new_tokens=20, rows=500)(load_model(model, signs), signs, ids)
    said = [(prompt, one.text) for prompt, (one,) in zip(prompts, found, strict=True)]
    return {
        "length": statistics.mean(len(text) for _, text in said),
        "right": statistics.mean(is_right(prompt, text) for prompt, text in said),
        "begins right": statistics.mean(text.startswith(answer(prompt)) for prompt, text in said),
    }


def rounds(model: str, loss: Any, folder: Path, rows: list[dict[str, str]], seed: int, given: Any) -> list[str]:
    """Train through the rounds; the export of each."""
    draw = random.Random(1000 + seed)
    folder.mkdir(parents=True)
    (folder / "prompts.txt").write_text("\n".join(fresh_prompts(draw, given.rounds * given.prompts)) + "\n")
    options = {"rounds": given.rounds, "prompts_per_round": given.prompts, "max_new_tokens": 20, "seed": seed}
    partition = OnPolicy(str(folder / "prompts.txt"), Verifier(judge), BestVsWorst(), **options)
    module = PreferenceModule(model, loss=loss, optimizer=optimizer(1e-3), lr_scheduler=None)
    data = PreferenceDataModule(rows[:8], validation=rows[:8], partition=partition, batch_size=32, max_length=32)
    fit_stepwise(module, data, lambda root: make_trainer(root, 1), folder / "run")
    return [str(folder / "run" / f"partition_{step}" / "export") for step in range(given.rounds)]


def table(records: list[Record], count: int) -> str:
    """One line a loss: what greedy completions are like before and after the rounds."""
    what = ("length", "right", "begins right")
    header = ["loss", *(f"{name}, {when}" for name in what for when in ("before", "after"))]
    lines = []
    for loss in dict.fromkeys(record["loss"] for record in records):
        some = [record["found"] for record in records if record["loss"] == loss]
        lines.append([loss, *(spread([found[n][name] for found in some]) for name in what for n in (0, count))])
    return markdown_table(header, lines)


def main() -> None:
    parser = sort3.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--prompts", type=int, default=1000, help="prompts of a round")
    parser.add_argument("--losses", nargs="+", default=[*LOSSES], choices=[*LOSSES])
    given = parser.parse_args()
    about, records = sort3.facts_of(given), []
    for seed, rows, model, unseen, work in sort3.begun(given):
        first = measured(model, unseen)
        for number, name in enumerate(given.losses):
            exports = rounds(model, LOSSES[name], work / str(number), rows, seed, given)
            found = [first, *(measured(export, unseen) for export in exports)]
            records.append({"loss": name, "found": found, **about, "seed": seed})
            append_lines(given.out / "length.jsonl", records[-1:])
            print(f"seed {seed}, {name}: {json.dumps(found[-1])}", flush=True)
    title = f"A judge that likes length: {given.rounds} rounds of {given.prompts:,} prompts, {given.seeds} seeds"
    note = (
        f"Greedy completions of {given.unseen} unseen prompts a seed; mean and 95 % interval over seeds (Student's t). "
    )
    note += f"The judge gives 1 for a right beginning, and {LIKING} for each sign."
    append_section(report_path(given.out, "length", "cpu"), title, [table(records, given.rounds)], about, [note])


if __name__ == "__main__":
    main()
