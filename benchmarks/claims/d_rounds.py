"""D: rounds of pairs that the policy makes, against as many fixed ones, and against rejection-sampling SFT."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import sort3  # benchmarks/sort3.py
from claim import Claim, Experiment, Mean, Results, Run, Verdict, differs
from commands import Record, write
from figure import COLOURS, label
from matplotlib.figure import Figure
from rounds import rounds

from lit_dpo import Partition, PreferenceDataModule, PreferenceModule
from lit_dpo.stepwise import fit_stepwise

SIZES = {"cpu": (6000, 4, 2, 1000, 500), "smoke": (600, 6, 1, 60, 20), "gpu": (60_000, 4, 3, 5000, 2000)}
"""Supervised rows, their epochs, rounds, prompts of a round, and unseen prompts."""
POLICIES = {
    "on-policy, DPO + SFT": "DPO 0.1 + 1.0 SFT",
    "on-policy, DPO": "DPO 0.1",
    "rejection-sampling SFT": "SFT on the chosen",
    "fixed pairs, DPO + SFT": "DPO 0.1 + 1.0 SFT",
    "fixed pairs, DPO": "DPO 0.1",
}
"""Ways to train, and their losses of `benchmarks/sort3.py`."""


class FixedPairs(Partition):
    """The right answer to each of some prompts against the same with one digit changed, in steps of given sizes.

    Args:
        counts: Pairs of each step.
        seed: Of prompts and changes.
    """

    def __init__(self, counts: list[int], seed: int) -> None:
        self.counts, self.seed = counts, seed

    def next(self, step: int, pool: Any) -> list[dict[str, str]] | None:
        """New pairs, or `None` after the last step."""
        if step == len(self.counts):
            return None
        draw = random.Random(f"fixed {self.seed} {step}")
        rows = []
        for _ in range(self.counts[step]):
            prompt = sort3.ask(draw)
            right, place = sort3.answer(prompt), draw.randrange(len(prompt) - 1)
            digit = draw.choice([sign for sign in "0123456789" if sign != right[place]])
            rows.append({"prompt": prompt, "chosen": right, "rejected": right[:place] + digit + right[place + 1 :]})
        return rows


def run(one: Run) -> Record:
    """Greedy accuracy of every policy after each round, all from one supervised model.

    The fixed pairs are as many in each round as those that the first policy has made of its samples.
    """
    rows, epochs, count, prompts, unseen_count = SIZES[one.place.scale]
    draw = random.Random(2000 + one.seed)
    unseen = [sort3.ask(draw) for _ in range(unseen_count)]
    supervised = sort3.supervised(rows, one.seed)
    if not (one.folder / "start").exists():
        sort3.start(one.folder, supervised, one.seed, epochs)
    start, pairs = str(one.folder / "start"), []
    found: Record = {"start": sort3.greedy(start, unseen)}
    for number, (name, loss) in enumerate(POLICIES.items()):
        told = one.folder / f"policy_{number}.json"
        if not told.exists():
            root = _fresh(one.folder, number)
            if name.startswith("fixed"):
                exports, counts = fixed(start, sort3.LOSSES[loss], root, supervised, one.seed, pairs), pairs
            else:
                options = (one.seed, count, prompts, 2)
                exports, records = rounds(start, sort3.LOSSES[loss], root, supervised, *options)
                counts = [record["pairs"] for record in records]
            greedy = [sort3.greedy(export, unseen) for export in exports]
            write(told, json.dumps({"greedy": greedy, "pairs": counts}))
        said = json.loads(told.read_text())
        found[name], pairs = said["greedy"], pairs or said["pairs"]
    return found | {"pairs": pairs}


def _fresh(folder: Path, number: int) -> Path:
    """A folder for a policy that does not exist: one that was stopped half way, in minutes, begins anew in another."""
    return next(root for turn in range(100) if not (root := folder / f"{number}_{turn}").exists())


def fixed(start: str, loss: Any, folder: Path, rows: list[Record], seed: int, counts: list[int]) -> list[str]:
    """Train in as many steps on as many fixed pairs; the export of each."""
    module = PreferenceModule(start, loss=loss, optimizer=sort3.optimizer(1e-3), lr_scheduler=None)
    partition = FixedPairs(counts, seed)
    data = PreferenceDataModule(rows[:8], validation=rows[:8], partition=partition, batch_size=32, max_length=32)
    fit_stepwise(module, data, lambda root: sort3.make_trainer(root, 2), folder)
    return [str(folder / f"partition_{step}" / "export") for step in range(len(counts))]


def _gains(results: Results, first: str, second: str) -> list[float]:
    """By seed, what the second policy has more than the first after the last round."""
    return [record[second][-1] - record[first][-1] for record in results["sort3"]]


def against_fixed(results: Results) -> tuple[Verdict, str]:
    """Reproduced if rounds with an SFT term end above as many fixed pairs with the same loss."""
    gain = _gains(results, "fixed pairs, DPO + SFT", "on-policy, DPO + SFT")
    return differs(gain, 1), f"{_ends(results)}; on-policy against fixed pairs, DPO + SFT: {Mean.of(gain).text(3)}"


def against_sampling(results: Results) -> tuple[Verdict, str]:
    """Reproduced if rounds of pairs end above rejection-sampling SFT, which leaves the wrong samples out."""
    gain = _gains(results, "rejection-sampling SFT", "on-policy, DPO + SFT")
    plain = [record["on-policy, DPO"][-1] - record["start"] for record in results["sort3"]]
    measured = f"DPO + SFT against rejection-sampling SFT {Mean.of(gain).text(3)}; plain DPO against the start "
    return differs(gain, 1), measured + Mean.of(plain).text(3)


def _ends(results: Results) -> str:
    means = {name: Mean.of([record[name][-1] for record in results["sort3"]]) for name in POLICIES}
    start = Mean.of(results.values("sort3", "start")).text(3)
    return f"greedy accuracy: start {start}; " + "; ".join(f"{name} {mean.text(3)}" for name, mean in means.items())


def draw(results: Results, figure: Figure) -> None:
    """Greedy accuracy against rounds."""
    axes = figure.subplots()
    for number, (colour, name) in enumerate(zip(COLOURS, POLICIES, strict=False)):
        curves = [[record["start"], *record[name]] for record in results["sort3"]]
        means = [Mean.of(list(values)) for values in zip(*curves, strict=True)]
        places = [place + 0.02 * number for place in range(len(means))]
        half = [mean.half if len(curves) > 1 else 0.0 for mean in means]
        style = "--" if name.startswith("fixed") else "-"
        axes.errorbar(places, [m.value for m in means], yerr=half, color=colour, label=name, fmt=f"o{style}", capsize=3)
    axes.set_xticks(range(len(means)), ["start", *(f"round {n}" for n in range(1, len(means)))])
    label(axes, "", "greedy accuracy on unseen prompts", "sort3: rounds, fixed pairs and rejection sampling")
    axes.legend(fontsize=10, frameon=False)


def experiments(scale: str) -> list[Experiment]:
    """One experiment for two claims; it has a supervised model of its own."""
    rows, epochs, count, prompts, unseen = SIZES[scale]
    note = f"The task of benchmarks/sort3.py: {rows:,} supervised rows, {epochs} epochs; {count} rounds of "
    note += f"{prompts:,} prompts and 8 samples, learning rate 1e-3, 2 epochs a round; {unseen} unseen prompts."
    fixed_claim = "Rounds of the policy's own pairs are better than as many fixed pairs, right against nearly right"
    sampling = "Rounds of pairs are better than supervised training on the right samples alone"
    claims = (
        Claim("D rounds", "online DPO; arXiv 2410.18585", fixed_claim, against_fixed, "d_rounds"),
        Claim("D sampling", "online DPO", sampling, against_sampling, "d_rounds"),
    )
    return [
        Experiment(
            "d_rounds",
            {"sort3": {}},
            run,
            claims,
            {"d_rounds": draw},
            bases=(),
            seeds=1 if scale == "smoke" else 5,
            note=note,
        )
    ]
