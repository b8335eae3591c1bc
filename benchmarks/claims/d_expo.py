"""D: ExPO. Going beyond a policy helps up to a point, and the point lies further out the less it was trained."""

from __future__ import annotations

from statistics import mean

import support
from claim import Claim, Experiment, Mean, Results, Run, Verdict, differs
from commands import Config, Record, fit, named, settings, write_rows
from figure import COLOURS, label
from matplotlib.figure import Figure
from scoring import export, quality, replies

SIZES = {"cpu": (256, 4, 300), "smoke": (16, 2, 16), "gpu": (8000, 4, 1000)}
"""Pairs to train on, epochs of the longer training, and held-out prompts."""
ALPHAS = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)


def run(one: Run) -> Record:
    """Train, and look at policies further and further along the line from the supervised one."""
    count, _, held_out = SIZES[one.place.scale]
    train = write_rows(one.shared, "mixed", support.pairs("mixed", count, one.seed))
    test = write_rows(one.shared, "mixed-test", support.pairs("mixed", held_out, one.seed, held_out=True))
    start, scale = one.base("support").folder, one.place.scale
    options = {"epochs": one.arm["epochs"], "seed": one.seed, "scale": scale, "rate": 2e-4}
    trained = fit(one.folder / "run", settings(start, named("DPOLoss", beta=0.1), train, **options))
    policies = [export(trained, alpha, start) for alpha in one.arm["alphas"]]
    said = [replies(policy, test) for policy in policies]
    return {
        "quality": [quality(each) for each in said],
        "chosen_by": [quality(each[0::2]) for each in said],
        "judged_by": [quality(each[1::2]) for each in said],
        "finished": [mean(one["finished"] for one in each) for each in said],
    }


def best(results: Results, arm: str) -> int:
    """Place of the best alpha, by one half of the prompts."""
    curves = [mean(values) for values in zip(*results.values(arm, "chosen_by"), strict=True)]
    return curves.index(max(curves))


def judge(results: Results) -> tuple[Verdict, str]:
    """Reproduced if, in both arms, quality rises from alpha 0 to a best one and falls to the largest.

    The best alpha is chosen by one half of the prompts, and both intervals are those of the other half.
    """
    verdicts, said = [], []
    for arm in results.records:
        place = best(results, arm)
        curves = results.values(arm, "judged_by")
        up, down = [c[place] - c[0] for c in curves], [c[-1] - c[place] for c in curves]
        verdicts += [differs(up, 1), differs(down, -1)]
        whole = Mean.of([c[0] for c in results.values(arm, "quality")])
        said.append(
            f"{arm}: good parts {whole.text(3)} at alpha 0, best at {ALPHAS[place]:g} ({Mean.of(up).text(3)}), at "
            f"{ALPHAS[-1]:g} {Mean.of(down).text(3)} from there"
        )
    verdict: Verdict = "within noise"
    if set(verdicts) == {"reproduced"}:
        verdict = "reproduced"
    elif "not reproduced" in verdicts:
        verdict = "not reproduced"
    return verdict, ". ".join(said)


def draw(results: Results, figure: Figure) -> None:
    """Good parts of sampled replies against alpha."""
    axes = figure.subplots()
    places = range(len(ALPHAS))
    for colour, arm in zip(COLOURS, results.records, strict=False):
        curves = [Mean.of(list(values)) for values in zip(*results.values(arm, "quality"), strict=True)]
        half = [curve.half if len(results.seeds) > 1 else 0.0 for curve in curves]
        axes.errorbar(places, [c.value for c in curves], yerr=half, color=colour, label=arm, marker="o", capsize=3)
    axes.set_xticks(places, [f"{alpha:g}" for alpha in ALPHAS])
    label(axes, "alpha", "good parts of sampled replies", "ExPO: beyond the trained policy, with 95 % intervals")
    axes.legend(fontsize=11, frameon=False)


def experiments(scale: str) -> list[Experiment]:
    """One experiment."""
    count, epochs, held_out = SIZES[scale]
    lengths = {f"{n} epoch{'s' * (n > 1)}": n for n in (max(1, epochs // 4), epochs)}
    arms: dict[str, Config] = {name: {"epochs": n, "alphas": list(ALPHAS)} for name, n in lengths.items()}
    note = f"{count} `mixed` pairs, DPO 0.1, learning rate 2e-4; sampled replies to {held_out} held-out prompts."
    sentence = "Extrapolating a policy improves it up to a point, beyond which it gets worse"
    claim = Claim("D ExPO", "ExPO, arXiv 2404.16792", sentence, judge, "d_expo")
    return [Experiment("d_expo", arms, run, (claim,), {"d_expo": draw}, seeds=1 if scale == "smoke" else 5, note=note)]
