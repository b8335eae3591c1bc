"""D: filtered DPO. Pairs whose chosen answer is worse than what the policy says itself are left out."""

from __future__ import annotations

import random

import support
from claim import Claim, Experiment, Mean, Results, Run, Verdict, differs
from commands import Config, Record, fit, named, settings, write_rows
from dots import dots
from matplotlib.figure import Figure
from scoring import export, quality, replies

SIZES = {"cpu": (256, 2, 300), "smoke": (16, 2, 16), "gpu": (2000, 3, 1000)}
"""Pairs to train on, rounds (epochs), and held-out prompts."""
POOR = 0.35
"""Share of pairs whose chosen reply has one good part of four; its rejected one has none. The others have 3 or 4."""
ARMS: dict[str, Config] = {
    "DPO on all": {"filtered": False, "poor": True},
    "filtered DPO": {"filtered": True, "poor": True},
    "DPO on the good": {"filtered": False, "poor": False},
}


def noisy(count: int, seed: int, poor: bool) -> list[support.Row]:
    """Pairs with rightly ordered replies, of which a share is of two poor ones, unless these are left out."""
    wanted = {True: round(POOR * count), False: count - round(POOR * count)}
    rows = []
    for row in support.pairs("mixed", 8 * count, seed):
        worth = support.score(row["prompt"], row["chosen"])
        if worth != 2 and wanted[worth < 2]:
            wanted[worth < 2] -= 1
            rows += [row] if poor or worth > 2 else []
    return random.Random(f"order {seed}").sample(rows, len(rows))


def run(one: Run) -> Record:
    """Train in as many updates on all pairs, on those that a judge who knows the truth leaves, or on the good ones."""
    count, rounds, held_out = SIZES[one.place.scale]
    train = write_rows(one.folder, "train", noisy(count, one.seed, one.arm["poor"]))
    test = write_rows(one.shared, "mixed-test", support.pairs("mixed", held_out, one.seed, held_out=True))
    start, scale, steps = one.base("support").folder, one.place.scale, -(-count // 16)
    data, overall = {}, rounds * steps
    if one.arm["filtered"]:
        judge = named("Verifier", function="support.score")
        options = {"rounds": rounds, "judge": judge, "seed": one.seed}
        data, overall = {"partition": named("Filtered", **options)}, steps
    options = {"epochs": 100, "seed": one.seed, "scale": scale, "rate": 5e-4, "data": data}  # the updates end it
    config = settings(start, named("DPOLoss", beta=0.1), train, trainer={"max_steps": overall}, **options)
    trained = fit(one.folder / "run", config, words=("--allow-import", "support"))
    policy = trained / f"partition_{rounds - 1}" / "export" if one.arm["filtered"] else export(trained)
    return {"quality": quality(replies(policy, test)), "start": quality(replies(start, test))}


def judge(results: Results) -> tuple[Verdict, str]:
    """Reproduced if filtered DPO ends above DPO on all pairs in the true quality of sampled replies."""
    gain = results.differences("DPO on all", "filtered DPO", "quality")
    said = "; ".join(f"{arm} {results.mean(arm, 'quality').text(3)}" for arm in ARMS)
    start = results.mean("DPO on all", "start").text(3)
    return differs(
        gain, 1
    ), f"good parts of replies: start {start}; {said}; filtered against all {Mean.of(gain).text(3)}"


def draw(results: Results, figure: Figure) -> None:
    """True quality by arm."""
    values = {"start": results.values("DPO on all", "start")} | {arm: results.values(arm, "quality") for arm in ARMS}
    dots(
        figure.subplots(), values, "good parts of sampled replies", f"{POOR:.0%} of the pairs have a poor chosen reply"
    )


def experiments(scale: str) -> list[Experiment]:
    """One experiment."""
    count, rounds, held_out = SIZES[scale]
    note = (
        f"{count} pairs, {POOR:.0%} of them of two poor replies; {rounds} rounds, DPO 0.1, learning rate 5e-4, as many "
    )
    note += f"updates in every arm; the judge knows the truth; sampled replies to {held_out} held-out prompts."
    sentence = "Leaving out pairs whose chosen answer is worse than the policy's own makes a better policy"
    claim = Claim("D filtered", "filtered DPO, arXiv 2404.13846", sentence, judge, "d_filtered")
    return [
        Experiment(
            "d_filtered", ARMS, run, (claim,), {"d_filtered": draw}, seeds=1 if scale == "smoke" else 3, note=note
        )
    ]
