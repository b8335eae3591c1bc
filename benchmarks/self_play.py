"""What self-play (SAPO) makes of supervised data alone, against as many more steps of supervised training.

    python benchmarks/self_play.py --out benchmarks/results

The task is that of `benchmarks/sort3.py`: a small Llama learns to sort digits from answers half of which are
careless. Then it goes on with the same answers: as they are (SFT), or in rounds of pairs of an answer and the same one
with a segment that the policy wrote. All take as many optimizer steps of as many rows, at one learning rate.
Measured is the share of unseen prompts that greedy decoding answers right.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import sort3
import torch
from common import Record, append_lines, append_section, markdown_table, report_path
from lightning.pytorch import Callback, LightningModule, Trainer
from sort3 import QUIET, greedy, is_right, optimizer, spread, tokenizer

from lit_dpo import (
    DPOLoss,
    OneShot,
    PreferenceDataModule,
    PreferenceModule,
    SelfPlay,
    SFTLoss,
    SyncedReference,
    WeightedLoss,
)
from lit_dpo.models import load_model
from lit_dpo.sampling import Sampler
from lit_dpo.stepwise import fit_stepwise

BOTH = WeightedLoss([DPOLoss(0.1), SFTLoss()], [1.0, 1.0])
METHODS: dict[str, tuple[Any, int | None]] = {  # loss, and tokens of a segment
    "SFT": (SFTLoss(), None),
    "self-play, segments of 3, DPO 0.1": (DPOLoss(0.1), 3),
    "self-play, segments of 3, DPO 0.1 + 1.0 SFT": (BOTH, 3),
    "self-play, whole answers, DPO 0.1": (DPOLoss(0.1), 9),
    "self-play, whole answers, DPO 0.1 + 1.0 SFT": (BOTH, 9),
}


class Distance(Callback):
    """How far the moving average is from the policy when a step ends, as a share of the policy's way in that step."""

    def __init__(self) -> None:
        self.found: list[float] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the weights that a step begins with."""
        self.start = _flat(pl_module.policy)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure."""
        for reference in pl_module.reference.models() if pl_module.reference else ():
            policy = _flat(pl_module.policy)
            self.found.append(float((policy - _flat(reference)).norm() / (policy - self.start).norm()))


def _flat(model: Any) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten().clone() for parameter in model.parameters()])


def go_on(model: str, name: str, folder: Path, rows: list[dict[str, str]], seed: int, given: Any) -> tuple[str, Record]:
    """Train on from a model; the folder of what comes of it, and what its rounds were."""
    loss, segment = METHODS[name]
    folder.mkdir(parents=True)
    (folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    partition: Any = OneShot()
    if segment is not None:
        options = {"rounds": given.rounds, "prompts_per_round": given.prompts, "segment_tokens": segment, "seed": seed}
        partition = SelfPlay(str(folder / "answers.jsonl"), **options)
    reference = SyncedReference(every=1, mix=0.5) if segment else None
    steps = given.steps if segment else given.steps * given.rounds
    module = PreferenceModule(model, loss=loss, reference=reference, optimizer=optimizer(1e-3), lr_scheduler=None)
    train: Any = rows[:8] if segment else rows
    data = PreferenceDataModule(
        train, validation=rows[:8], partition=partition, batch_size=32, max_length=32, seed=seed
    )
    distance = Distance()

    def make_trainer(root: Path) -> Trainer:
        more = {"max_steps": steps, "max_epochs": -1, "gradient_clip_val": 1.0, "callbacks": [distance]}
        return Trainer(default_root_dir=root, **QUIET, **more)

    export = fit_stepwise(module, data, make_trainer, folder / "run")
    records = [json.loads(path.read_text()) for path in sorted(folder.glob("run/*/round.json"))]
    return str(export), {"rounds": records, "distance": distance.found}


def sampled(model: str, prompts: list[str]) -> float:
    """Share of samples at temperature 1 that are right."""
    signs = tokenizer()
    ids = [signs(prompt).input_ids for prompt in prompts]
    said = Sampler(4, max_new_tokens=9, rows=500)(load_model(model, signs), signs, ids)
    return statistics.mean(is_right(prompt, one.text) for prompt, few in zip(prompts, said, strict=True) for one in few)


def table(records: list[Record]) -> str:
    """One line a method: accuracy before and after, and what is paired with SFT seed by seed."""
    header = ["method", "greedy before", "greedy after", "after minus SFT, same seed", "sampled after", "pairs a round"]
    plain = {record["seed"]: record["greedy"][-1] for record in records if record["method"] == "SFT"}
    lines = []
    for name in dict.fromkeys(record["method"] for record in records):
        some = [record for record in records if record["method"] == name]
        pairs = [told["pairs"] for record in some for told in record["rounds"]]
        gains = [record["greedy"][-1] - plain[record["seed"]] for record in some if record["seed"] in plain]
        line = [name, *(spread([record["greedy"][n] for record in some]) for n in (0, 1))]
        line += [spread(gains) if gains and name != "SFT" else "", spread([record["sampled"] for record in some])]
        lines.append([*line, f"{statistics.mean(pairs):,.0f}" if pairs else ""])
    return markdown_table(header, lines)


def main() -> None:
    parser = sort3.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=64, help="optimizer steps of a round, of 32 rows each")
    parser.add_argument("--prompts", type=int, default=1000, help="rows of a round")
    parser.add_argument("--methods", nargs="+", default=[*METHODS], choices=[*METHODS])
    given = parser.parse_args()
    about, records = sort3.facts_of(given), []
    for seed, rows, model, unseen, work in sort3.begun(given):
        first = greedy(model, unseen)
        for number, name in enumerate(given.methods):
            export, told = go_on(model, name, work / str(number), rows, seed, given)
            found = [first, greedy(export, unseen)]
            record = {"method": name, "greedy": found, "sampled": sampled(export, unseen), **told}
            records.append({**record, **about, "seed": seed})
            append_lines(given.out / "self_play.jsonl", records[-1:])
            print(f"seed {seed}, {name}: {found[0]:.3f}, {found[1]:.3f}", flush=True)
    distances = [value for record in records for value in record["distance"]]
    notes = [f"Shares of right answers to {given.unseen} unseen prompts a seed; mean and 95 % interval over seeds."]
    if distances:
        notes.append(
            "When a round ends, the moving average is behind the policy by "
            f"{min(distances):.3f} to {max(distances):.3f} of the way that the policy has come in it."
        )
    title = f"Self-play on sort3: {given.rounds} rounds of {given.steps} steps, {given.seeds} seeds"
    append_section(report_path(given.out, "self_play", "cpu"), title, [table(records)], about, notes)


if __name__ == "__main__":
    main()
