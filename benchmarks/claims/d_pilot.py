"""D: the pilot. A short training on a tenth of the rows tells which of the others will be displaced."""

from __future__ import annotations

from statistics import mean

import support
from claim import Claim, Experiment, Results, Run, Verdict, differs
from commands import Record, fit, named, settings, write_rows
from dots import dots
from figure import COLOURS, label
from matplotlib.figure import Figure
from scoring import export, scores

KINDS = ("fix", "gap1", "gap3", "mixed")
SIZES = {"cpu": (80, 32, 5), "smoke": (8, 8, 1), "gpu": (2000, 800, 1)}
"""Pairs of each kind, pairs of the pilot, and its epochs."""
SIGNALS = {"pilot": "pilot", "length": "length difference", "margin": "reference margin"}
"""Forecasts, by what is printed for them; the two others cost no training."""


def run(one: Run) -> Record:
    """Forecast each row's change of the chosen log-prob by a pilot, train on all rows for an epoch, and compare."""
    count, few, epochs = SIZES[one.place.scale]
    rows = [row for kind in KINDS for row in support.pairs(kind, count, one.seed)]
    picked = set(range(0, len(rows), len(rows) // few))
    start, scale = one.base("support").folder, one.place.scale
    parts = {
        "few": [row for place, row in enumerate(rows) if place in picked],
        "others": [row for place, row in enumerate(rows) if place not in picked],
        "all": rows,
    }
    files = {name: write_rows(one.folder, name, of) for name, of in parts.items()}
    policies = []
    for name, times in (("few", epochs), ("all", 1)):
        options = {"epochs": times, "seed": one.seed, "scale": scale, "rate": 5e-4}
        trained = fit(one.folder / name, settings(start, named("DPOLoss", beta=0.1), files[name], **options))
        policies.append(export(trained))
    forecast, happened = (scores(policy, start, files["others"], scale) for policy in policies)
    truth = [row["reward_chosen"] for row in happened]  # nats, since beta is 1
    signals = {
        "pilot": [row["reward_chosen"] for row in forecast],
        "length": [float(row["rejected_tokens"] - row["chosen_tokens"]) for row in happened],
        "margin": [row["reference_logp_rejected"] - row["reference_logp_chosen"] for row in happened],
    }
    found = {"displaced": mean(value < 0 for value in truth), "points": [signals["pilot"], truth]}
    return found | {name: spearman(values, truth) for name, values in signals.items()}


def spearman(a: list[float], b: list[float]) -> float:
    """Rank correlation; equal values share the mean of their ranks."""

    def ranks(values: list[float]) -> list[float]:
        order = sorted(values)
        return [order.index(value) + (order.count(value) - 1) / 2 for value in values]

    x, y = ranks(a), ranks(b)
    middle = (len(x) - 1) / 2
    cross = sum((p - middle) * (q - middle) for p, q in zip(x, y, strict=True))
    own = sum((p - middle) ** 2 for p in x) * sum((q - middle) ** 2 for q in y)
    return float(cross / own**0.5) if own else 0.0


def judge(results: Results) -> tuple[Verdict, str]:
    """Reproduced if the pilot's rank correlation is above zero, and above those of the two forecasts without one."""
    pilot = results.values("DPO", "pilot")
    others = [results.values("DPO", name) for name in ("length", "margin")]
    gains = [[a - abs(b) for a, b in zip(pilot, other, strict=True)] for other in others]
    verdicts = [differs(values, 1) for values in (pilot, *gains)]
    verdict: Verdict = "within noise"
    if set(verdicts) == {"reproduced"}:
        verdict = "reproduced"
    elif "not reproduced" in verdicts:
        verdict = "not reproduced"
    said = ", ".join(f"{shown} {results.mean('DPO', name)}" for name, shown in SIGNALS.items())
    displaced = results.mean("DPO", "displaced")
    return verdict, f"rank correlation with the chosen log-ratio after training: {said}; {displaced} of rows displaced"


def draw(results: Results, figure: Figure) -> None:
    """The correlations, and the rows of the first seed."""
    left, right = figure.subplots(1, 2)
    dots(left, {shown: results.values("DPO", name) for name, shown in SIGNALS.items()}, "rank correlation", line=0.0)
    x, y = results["DPO"][0]["points"]
    right.scatter(x, y, s=10, color=COLOURS[0], alpha=0.5)
    label(right, "after the pilot, nats", "after all rows, nats", "seed 0")
    figure.suptitle("The pilot as a forecast of the chosen reply's log-ratio", fontsize=12)


def experiments(scale: str) -> list[Experiment]:
    """One experiment."""
    count, few, epochs = SIZES[scale]
    note = (
        f"{count} pairs each of {', '.join(KINDS)}; the pilot: {few} of them, {epochs} epochs; then one epoch of all. "
    )
    note += "DPO 0.1, learning rate 5e-4."
    sentence = "DPO on a tenth of the rows forecasts which other rows' chosen log-prob will fall"
    claim = Claim("D pilot", "this package", sentence, judge, "d_pilot")
    arms = {"DPO": {"loss": "DPO"}}
    return [
        Experiment("d_pilot", arms, run, (claim,), {"d_pilot": draw}, seeds=1 if scale == "smoke" else 5, note=note)
    ]
