"""D: length bias. Where the longer reply is mostly the chosen one, losses that look at lengths should keep off it."""

from __future__ import annotations

import random
from pathlib import Path
from statistics import mean

import support
from claim import Claim, Experiment, Mean, Results, Run, Verdict, differs
from commands import Record, fit, named, settings, write_rows
from dots import dots
from matplotlib.figure import Figure
from scoring import accuracy, export, quality, replies, scores

from lit_dpo.tokenizers import load_tokenizer

SIZES = {"cpu": (256, 2, 300), "smoke": (16, 1, 16), "gpu": (1000, 2, 300)}
"""Pairs to train on, epochs, and held-out pairs, half of which have the longer reply chosen."""
LONGER = 0.9
"""Share of training pairs whose chosen reply is the longer one."""
ARMS = {
    "DPO": named("DPOLoss", beta=0.1),
    "length-normalised": named("DPOLoss", beta=2.5, length_normalize=True),
    "R-DPO, alpha 0.05": named("RDPOLoss", beta=0.1, alpha=0.05),
    "R-DPO, alpha 0.2": named("RDPOLoss", beta=0.1, alpha=0.2),
}


def biased(start: Path, count: int, share: float, seed: int, held_out: bool) -> list[support.Row]:
    """Pairs of the set, taken so that in such a share of them the better reply has more tokens; none are as long."""
    tokenizer = load_tokenizer(str(start))
    wanted = {True: round(share * count), False: count - round(share * count)}
    rows = []
    for row in support.pairs("mixed", min(8 * count, 2400), seed, held_out=held_out):
        chosen, rejected = (len(tokenizer(row[side]).input_ids) for side in ("chosen", "rejected"))
        if chosen != rejected and wanted[chosen > rejected]:
            wanted[chosen > rejected] -= 1
            rows.append(row)
    if any(wanted.values()):
        raise RuntimeError("There are too few pairs to choose from.")
    return random.Random(f"order {seed}").sample(rows, count)


def run(one: Run) -> Record:
    """Train on biased pairs; accuracy where the longer, and where the shorter held-out reply is chosen."""
    count, epochs, held_out = SIZES[one.place.scale]
    start, scale = one.base("support").folder, one.place.scale
    train = write_rows(one.shared, "biased", biased(start, count, LONGER, one.seed, False))
    test = write_rows(one.shared, "balanced-test", biased(start, held_out, 0.5, one.seed, True))
    options = {"epochs": epochs, "seed": one.seed, "scale": scale, "rate": 5e-4}
    policy = export(fit(one.folder / "run", settings(start, one.arm, train, **options)))
    rows, said = scores(policy, start, test, scale), replies(policy, test)
    parts = [[row for row in rows if (row["chosen_tokens"] > row["rejected_tokens"]) is way] for way in (True, False)]
    longer, shorter = map(accuracy, parts)
    return {
        "longer": longer,
        "shorter": shorter,
        "controlled": (longer + shorter) / 2,
        "gap": longer - shorter,
        "quality": quality(said),
        "tokens": mean(len(each["ids"]) for each in said),
    }


def judge(results: Results) -> tuple[Verdict, str]:
    """Reproduced if a loss that looks at lengths has a smaller gap, and no lower length-controlled accuracy, than DPO.

    The gap is the accuracy where the longer reply is chosen less that where the shorter one is.
    """
    good, said = [], []
    for arm in ARMS:
        numbers = f"{results.mean(arm, 'controlled').text(3)}, gap {results.mean(arm, 'gap').text(3)}"
        said.append(f"{arm} {numbers}, replies of {results.mean(arm, 'tokens').text(1)} tokens")
        if arm != "DPO":
            gap = differs(results.differences("DPO", arm, "gap"), -1)
            kept = Mean.of(results.differences("DPO", arm, "controlled")).high >= 0
            good.append("not reproduced" if gap == "reproduced" and not kept else gap)
    verdict: Verdict = "within noise"
    if "reproduced" in good:
        verdict = "reproduced"
    elif "not reproduced" in good:
        verdict = "not reproduced"
    return verdict, f"length-controlled accuracy: {'; '.join(said)}"


def draw(results: Results, figure: Figure) -> None:
    """Length-controlled accuracy, and what length is worth."""
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, name, x in ((left, "controlled", "length-controlled accuracy"), (right, "gap", "longer minus shorter")):
        dots(axes, {arm: results.values(arm, name) for arm in ARMS}, x, line=None if name == "controlled" else 0.0)
    figure.suptitle(f"Length bias: the longer reply is chosen in {LONGER:.0%} of the training pairs", fontsize=12)


def experiments(scale: str) -> list[Experiment]:
    """One experiment."""
    count, epochs, held_out = SIZES[scale]
    note = f"{count} `mixed` pairs, of which {LONGER:.0%} have the longer reply chosen, {epochs} epochs, rate 5e-4;"
    note += f" {held_out} held-out pairs, half of which have the shorter reply chosen."
    sentence = "Length-normalised DPO or R-DPO leans less on length than DPO, at no cost in length-controlled accuracy"
    claim = Claim("D length", "Tulu 3 (arXiv 2411.15124); R-DPO, arXiv 2403.19159", sentence, judge, "d_length")
    return [
        Experiment("d_length", ARMS, run, (claim,), {"d_length": draw}, seeds=1 if scale == "smoke" else 5, note=note)
    ]
