"""Ten losses side by side at equal data, each with its own choice from a small grid of beta and learning rate."""

from __future__ import annotations

import time
from statistics import mean

import support
from claim import Claim, Experiment, Results, Run, Verdict
from commands import Config, Record, fit, named, settings, write_rows
from dots import dots
from matplotlib.figure import Figure
from scoring import accuracy, compared, export, kept, scores

SIZES = {"cpu": (128, 2, 200), "smoke": (16, 1, 16), "gpu": (8000, 1, 1000)}
"""Pairs to train on, epochs, and held-out pairs; as many again choose from the grid."""
BETAS: dict[str, tuple[Config, tuple[float, float]]] = {
    "DPO": (named("DPOLoss"), (0.05, 0.2)),
    "normalised DPO": (named("DPOLoss", length_normalize=True), (1.0, 5.0)),
    "IPO": (named("IPOLoss"), (0.5, 2.0)),
    "robust DPO": (named("RobustDPOLoss"), (0.05, 0.2)),
    "hinge": (named("HingeLoss"), (0.05, 0.2)),
    "DPOP": (named("DPOPLoss", penalty=5.0), (0.05, 0.2)),
    "APO-zero": (named("APOZeroLoss"), (0.05, 0.2)),
    "SimPO": (named("SimPOLoss"), (2.5, 10.0)),
    "CPO": (named("CPOLoss"), (0.05, 0.2)),
    "ORPO": (named("ORPOLoss"), (0.1, 1.0)),
}
"""Each loss with two values of what scales its preference term: `weight` of ORPO, `beta` of all others."""
RATES = (2e-4, 6e-4)
MARGIN = 0.05
"""What a loss has to have more than DPO, in accuracy, to count as better by more than a trifle."""
FREE = ("SimPO", "CPO", "ORPO")
"""Losses that train without a reference."""


def arms() -> dict[str, Config]:
    """The points of all grids."""
    found: dict[str, Config] = {}
    for name, (loss, values) in BETAS.items():
        scale = "weight" if name == "ORPO" else "beta"
        for value in values:
            filled = named(loss["class_path"], **{**loss["init_args"], scale: value})
            for rate in RATES:
                point = {"name": name, "loss": filled, "rate": rate}
                found[f"{name}, {scale} {value:g}, rate {rate:g}"] = point
    return found


def run(one: Run) -> Record:
    """Train one point; one cache holds the log-probs of the reference for all points of a seed.

    Rewards are measured from the supervised model for every loss, also for those that train without a reference.
    """
    count, epochs, half = SIZES[one.place.scale]
    start, scale, name = one.base("support").folder, one.place.scale, one.arm["name"]
    train = write_rows(one.shared, "mixed", support.pairs("mixed", count, one.seed))
    rows = support.pairs("mixed", 2 * half, one.seed, held_out=True)
    held_out = write_rows(one.shared, "mixed-both", rows)
    cached = None if name in FREE else named("CachedReference", folder=str(one.shared / "cache"))
    options = {"epochs": epochs, "seed": one.seed, "scale": scale, "rate": one.arm["rate"], "reference": cached}
    began = time.process_time()
    trained = fit(one.folder / "run", settings(start, one.arm["loss"], train, **options))
    seconds = time.process_time() - began
    after = scores(export(trained), start, held_out, scale)
    choice, test = after[:half], after[half:]
    return {"seconds": seconds, "choice": accuracy(choice), "accuracy": accuracy(test), **kept(test)}


def chosen(results: Results) -> dict[str, str]:
    """Of each loss the point of its grid with the highest mean accuracy on the pairs that choose."""
    points = {name: [arm for arm in results.records if arm.startswith(f"{name}, ")] for name in BETAS}
    return {name: max(of, key=lambda arm: mean(results.values(arm, "choice"))) for name, of in points.items()}


def judge(results: Results) -> tuple[Verdict, str]:
    """Reproduced if no loss is better than DPO, and each interval leaves room for less than `MARGIN` only.

    All differences are corrected together (Holm). Where an interval leaves room for more, nothing is found either way.
    """
    points = chosen(results)
    differences = compared(results, points)
    against = [each for each in differences if each.first == "DPO"]
    better = [each.second for each in against if each.found and each.difference > 0]
    worse = [each.second for each in against if each.found and each.difference < 0]
    said = "; ".join(f"{arm}: {results.mean(arm, 'accuracy').text(3)}" for arm in points.values())
    count = len(results.records) * len(results.seeds)
    seconds = sum(sum(results.values(arm, "seconds")) for arm in results.records)
    measured = (
        f"test accuracy: {said}. Better than DPO: {', '.join(better) or 'none'}; worse: {', '.join(worse) or 'none'}. "
    )
    room = max(each.high for each in against)
    measured += f"The intervals of what they have more than DPO end at {room:.3f} or below. "
    measured += f"Of all {len(differences)} couples {sum(each.found for each in differences)} differ in accuracy. "
    measured += f"The {count} trainings took {seconds:.0f} processor seconds"
    return "not reproduced" if better else "reproduced" if room < MARGIN else "within noise", measured


def draw(results: Results, figure: Figure) -> None:
    """Accuracy of each loss at its chosen point."""
    values = {name: results.values(arm, "accuracy") for name, arm in chosen(results).items()}
    dots(figure.subplots(), values, "test accuracy", "Ten losses, each at the best point of its own grid")


def experiments(scale: str) -> list[Experiment]:
    """One experiment."""
    count, epochs, held_out = SIZES[scale]
    note = f"{count} `mixed` pairs, {epochs} epochs; 2 by 2 points a loss; {held_out} pairs choose, as many test."
    sentence = "No loss is better than DPO once each has its own beta and learning rate"
    claim = Claim("losses", "arXiv 2603.19335", sentence, judge, "losses")
    given = arms() if scale != "smoke" else {n: a for n, a in arms().items() if a["rate"] == RATES[0]}
    return [Experiment("losses", given, run, (claim,), {"losses": draw}, seeds=1 if scale == "smoke" else 3, note=note)]
