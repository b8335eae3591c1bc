"""C1: sDPO against DPO at equal data and equal updates, with its sources in several orders; the same runs show B2."""

from __future__ import annotations

from collections.abc import Sequence

import b_margin
import support
import torch
from claim import Claim, Experiment, Mean, Results, Run, Verdict, differs
from commands import Config, Record, fit, named, settings, write_rows
from dots import dots
from matplotlib.figure import Figure
from scoring import accuracy, export, scores

from lit_dpo import BySource, EasyToHard, HardToEasy, Partition, Pool, RandomSplit

RELATED, UNRELATED = ("gap2", "gap3", "gap1"), ("tone", "item", "fix")
"""Sources by what their pairs are about: one skill at three levels of difficulty, and three skills."""
PAIRS = {"cpu": 96, "smoke": 8, "gpu": 2000}
"""Of each source."""
FLIPPED = 0.1
ORDERS = {"by source": BySource, "easy to hard": EasyToHard, "hard to easy": HardToEasy, "random": RandomSplit}


def run(one: Run) -> Record:
    """Train one arm: 3 steps of 2 epochs, or as many updates over all pairs at once."""
    start, scale, seed = one.base("support").folder, one.place.scale, one.seed
    count, order = PAIRS[scale], one.arm["order"]
    rows = {kind: support.pairs(kind, count, seed, FLIPPED) for kind in one.arm["kinds"]}
    files = [write_rows(one.shared, kind, of) for kind, of in rows.items()]
    test = write_rows(one.shared, "mixed-test", support.pairs("mixed", 3 * count, seed, held_out=True))
    split = None if order is None else partition(order, seed)
    data = {} if split is None else {"partition": split[1]}
    options = {"epochs": 2, "seed": seed, "scale": scale, "rate": 2e-4, "data": data}
    trained = fit(one.folder / "run", settings(start, named("DPOLoss", beta=0.1), files, **options))
    policy = export(trained) if split is None else trained / "partition_2" / "export"
    found = {"accuracy": accuracy(scores(policy, start, test, scale))}
    if split is None:
        return found
    together = write_rows(one.shared, "together", [row for of in rows.values() for row in of])
    before = scores(trained / "partition_0" / "export", start, together, scale)
    return found | second(split[0], before, [kind for kind, of in rows.items() for _ in of])


def partition(order: str, seed: int) -> tuple[Partition, Config]:
    """How pairs are split into steps: the object, and the same as a configuration names it."""
    options = {"parts": 3, "seed": seed} if order == "random" else {}
    return ORDERS[order](**options), named(ORDERS[order].__name__, **options)


def second(split: Partition, rows: Sequence[Record], sources: Sequence[str]) -> Record:
    """Mean margin of the second step's pairs, in nats, under M_0 and under M_1.

    Args:
        split: Says which these are.
        rows: What M_1 makes of all pairs, with M_0 as reference.
        sources: Of each pair.
    """
    margins = {
        step: torch.tensor([row[f"{who}logp_chosen"] - row[f"{who}logp_rejected"] for row in rows])
        for step, who in enumerate(("reference_", ""))
    }
    own = split.next(1, Pool(sources, score=lambda step: margins[0]))
    return {f"gamma_{step}": values[own].mean().item() for step, values in margins.items()}


def judge(results: Results) -> tuple[Verdict, str]:
    """Reproduced if sDPO from easy to hard is above DPO and above random steps, both intervals above zero."""
    gains = {other: results.differences(other, "easy to hard", "accuracy") for other in ("DPO", "random")}
    verdicts = [differs(values, 1) for values in gains.values()]
    verdict: Verdict = "within noise"
    if "not reproduced" in verdicts:
        verdict = "not reproduced"
    elif set(verdicts) == {"reproduced"}:
        verdict = "reproduced"
    arms = "; ".join(f"{arm} {results.mean(arm, 'accuracy').text(3)}" for arm in ("DPO", *ORDERS))
    said = ", ".join(f"{Mean.of(values).text(3)} over {other}" for other, values in gains.items())
    return verdict, f"held-out accuracy: {arms}; easy to hard {said}"


def draw(results: Results, figure: Figure) -> None:
    """Accuracy by arm."""
    values = {arm: results.values(arm, "accuracy") for arm in ("DPO", *ORDERS)}
    dots(figure.subplots(), values, "held-out accuracy", "C1: one pass or three steps, at equal data and updates")


C1 = Claim(
    "C1",
    "sDPO, arXiv 2403.19270",
    "sDPO is better than DPO at equal data, and steps from easy to hard are better than random ones",
    judge,
    "c_stepwise",
)


def experiments(scale: str) -> list[Experiment]:
    """One experiment for both claims."""
    arms = {arm: {"order": order, "kinds": list(RELATED)} for arm, order in (("DPO", None), *((o, o) for o in ORDERS))}
    arms["unrelated"] = {"order": "by source", "kinds": list(UNRELATED)}
    note = (
        f"3 sources of {PAIRS[scale]} pairs, {FLIPPED:.0%} of them flipped, DPO 0.1, learning rate 2e-4, 2 epochs: 36 "
    )
    note += "updates in every arm with 96 pairs. Each step warms up and starts Adam afresh."
    drawn = {"b_margin": b_margin.draw, "c_stepwise": draw}
    return [
        Experiment("c_stepwise", arms, run, (b_margin.CLAIM, C1), drawn, seeds=1 if scale == "smoke" else 5, note=note)
    ]
