"""C2: Intermediate DPO against DPO, by layer, number of layers, weight, and how the terms are combined."""

from __future__ import annotations

import support
from bases import SIZES as MODELS
from claim import Claim, Experiment, Mean, Results, Run, Verdict
from commands import Config, Record, fit, named, settings, write_rows
from dots import dots
from matplotlib.figure import Figure
from scoring import accuracy, compared, export, kept, scores

SIZES = {"cpu": (192, 2, 300), "smoke": (16, 1, 16), "gpu": (8000, 1, 1000)}
"""Pairs to train on, epochs, and held-out pairs."""


def arms(scale: str) -> dict[str, Config]:
    """The losses; the last block is left out, as it is DPO itself."""
    blocks = MODELS[scale]["support"].layers
    dpo, middle = named("DPOLoss", beta=0.1), max(1, blocks // 2)

    def at(*layers: int, **options: object) -> Config:
        return named("IntermediateLoss", base=dpo, layers=list(layers), **options)

    found = {"DPO": dpo, **{f"block {n}": at(n) for n in range(1, blocks)}}
    found[f"blocks 1 to {blocks - 1}"] = at(*range(1, blocks))
    found |= {f"block {middle}, weight {weight}": at(middle, weight=weight) for weight in (0.1, 0.6)}
    found[f"block {middle}, additive"] = at(middle, combine="additive")
    return found | {f"block {middle}, head detached": at(middle, detach_head=True)}


def run(one: Run) -> Record:
    """Train one arm; accuracy on held-out pairs."""
    count, epochs, held_out = SIZES[one.place.scale]
    train = write_rows(one.shared, "mixed", support.pairs("mixed", count, one.seed))
    test = write_rows(one.shared, "mixed-test", support.pairs("mixed", held_out, one.seed, held_out=True))
    start, scale = one.base("support").folder, one.place.scale
    options = {"epochs": epochs, "seed": one.seed, "scale": scale, "rate": 5e-4}
    policy = export(fit(one.folder / "run", settings(start, one.arm, train, **options)))
    rows = scores(policy, start, test, scale)
    return {"accuracy": accuracy(rows), **kept(rows)}


def judge(results: Results) -> tuple[Verdict, str]:
    """Reproduced if an arm is better than DPO after Holm's correction for all couples of arms."""
    against = [each for each in compared(results, {arm: arm for arm in results.records}) if each.first == "DPO"]
    better = [each.second for each in against if each.found and each.difference > 0]
    verdict: Verdict = "reproduced" if better else "within noise"
    if all(each.found and each.difference < 0 for each in against):
        verdict = "not reproduced"
    gains = {each.second: Mean.of(results.differences("DPO", each.second, "accuracy")) for each in against}
    said = "; ".join(f"{arm} {gain.text(3)}" for arm, gain in gains.items())
    measured = f"held-out accuracy, DPO {results.mean('DPO', 'accuracy').text(3)}; more than DPO: {said}. "
    return verdict, f"{measured}Better after correction: {', '.join(better) or 'none'}"


def draw(results: Results, figure: Figure) -> None:
    """What each arm has more than DPO."""
    gains = {arm: results.differences("DPO", arm, "accuracy") for arm in results.records if arm != "DPO"}
    title = "C2: Intermediate DPO against DPO, same seeds"
    dots(figure.subplots(), gains, "held-out accuracy, more than DPO", title, 0.0)


def experiments(scale: str) -> list[Experiment]:
    """One experiment."""
    count, epochs, held_out = SIZES[scale]
    note = (
        f"{count} `mixed` pairs, {epochs} epochs, learning rate 5e-4, beta 0.1, weight 0.3 where nothing else is said; "
    )
    note += f"{held_out} held-out pairs."
    sentence = "Intermediate DPO is better than DPO for some layer, number of layers or weight"
    claim = Claim("C2", "Intermediate DPO, arXiv 2408.02923", sentence, judge, "c_layers")
    return [
        Experiment(
            "c_layers", arms(scale), run, (claim,), {"c_layers": draw}, seeds=1 if scale == "smoke" else 5, note=note
        )
    ]
