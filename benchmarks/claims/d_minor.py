"""D: MinorDPO pushes the rejected completion down only while it is more likely than under the reference."""

from __future__ import annotations

from statistics import mean

import numpy as np
import support
from claim import Claim, Experiment, Mean, Results, Run, Verdict, differs
from commands import Record, fit, logged, named, predict, settings, write_rows
from figure import COLOURS, band, label
from matplotlib.figure import Figure
from scoring import accuracy

BETA = 0.1
ARMS = {"DPO": named("DPOLoss", beta=BETA), "MinorDPO": named("MinorDPOLoss", beta=BETA)}
SIZES = {"cpu": (64, 15, 200), "smoke": (16, 2, 16), "gpu": (2000, 4, 1000)}
"""Pairs to train on, epochs, and held-out pairs."""


def run(one: Run) -> Record:
    """Train on pairs of which one phrase differs; the log-ratio of both sides, in nats, by step."""
    count, epochs, held_out = SIZES[one.place.scale]
    train = write_rows(one.shared, "fix", support.pairs("fix", count, one.seed))
    test = write_rows(one.shared, "fix-test", support.pairs("fix", held_out, one.seed, held_out=True))
    options = {"epochs": epochs, "seed": one.seed, "scale": one.place.scale, "rate": 5e-4}
    trained = fit(one.folder / "run", settings(one.base("support").folder, one.arm, train, **options))
    steps = [line for line in logged(trained) if "train/rewards/chosen" in line]
    sides = {side: [line[f"train/rewards/{side}"] / BETA for line in steps] for side in ("chosen", "rejected")}
    after = predict(trained, test)
    last = -(-count // 16)  # steps of an epoch
    return {
        **sides,
        **{f"{side}_end": mean(values[-last:]) for side, values in sides.items()},
        **{f"{side}_held_out": mean(row[f"reward_{side}"] for row in after) / BETA for side in sides},
        "accuracy": accuracy(after),
    }


def judge(results: Results) -> tuple[Verdict, str]:
    """Reproduced if the rejected log-ratio ends higher than with DPO, on training pairs and held out."""
    verdicts = [differs(results.differences(*ARMS, f"rejected_{where}"), 1) for where in ("end", "held_out")]
    said = [
        f"{arm}: rejected {results.mean(arm, 'rejected_end')}, chosen {results.mean(arm, 'chosen_end')}, held out "
        f"{results.mean(arm, 'rejected_held_out')} and {results.mean(arm, 'chosen_held_out')}, accuracy "
        f"{results.mean(arm, 'accuracy').text(3)}"
        for arm in ARMS
    ]
    gain = Mean.of(results.differences(*ARMS, "rejected_end"))
    measured = f"log-ratio to the reference after training, nats. {'. '.join(said)}. MinorDPO's rejected: {gain} higher"
    verdict: Verdict = verdicts[0] if verdicts[0] == verdicts[1] else "within noise"
    return verdict, measured


def draw(results: Results, figure: Figure) -> None:
    """Both sides by step."""
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, side in ((left, "rejected"), (right, "chosen")):
        for colour, arm in zip(COLOURS, ARMS, strict=False):
            rows = np.asarray(results.values(arm, side))
            band(axes, range(1, rows.shape[1] + 1), rows, colour, arm)
        axes.axhline(0.0, color="#555555", linewidth=1, linestyle="--")
        label(axes, "optimizer step", "log-ratio to the reference, nats" if side == "rejected" else "", side)
    left.legend(fontsize=11, frameon=False)
    figure.suptitle("MinorDPO's brake: training pairs, band over seeds", fontsize=12)


def experiments(scale: str) -> list[Experiment]:
    """One experiment."""
    count, epochs, held_out = SIZES[scale]
    note = f"{count} `fix` pairs, {epochs} epochs, learning rate 5e-4, beta {BETA}; {held_out} held-out pairs."
    sentence = "MinorDPO stops pushing the rejected completion down once it is less likely than under the reference"
    claim = Claim("D minor", "MinorDPO, arXiv 2408.09834", sentence, judge, "d_minor")
    return [
        Experiment("d_minor", ARMS, run, (claim,), {"d_minor": draw}, seeds=1 if scale == "smoke" else 5, note=note)
    ]
