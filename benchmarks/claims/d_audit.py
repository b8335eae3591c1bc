"""D: the label audit finds flipped labels; training without the suspects, against losses that expect wrong labels."""

from __future__ import annotations

from pathlib import Path

import support
from claim import Claim, Experiment, Mean, Results, Run, Verdict, differs
from commands import Config, Record, fit, lines, lit_dpo, named, settings, write_rows
from dots import dots
from matplotlib.figure import Figure
from scoring import accuracy, export, quality, replies, scores

SIZES = {"cpu": (256, 3, 300), "smoke": (20, 2, 16), "gpu": (8000, 3, 1000)}
"""Pairs to train on, epochs, and held-out pairs."""
FLIPPED = 0.2
DPO = named("DPOLoss", beta=0.1)
ARMS: dict[str, Config] = {
    "DPO": {"loss": DPO, "without": None},
    "without suspects": {"loss": DPO, "without": "suspects"},
    "without the flipped": {"loss": DPO, "without": "flipped"},
    "cDPO": {"loss": named("DPOLoss", beta=0.1, label_smoothing=FLIPPED), "without": None},
    "robust DPO": {"loss": named("RobustDPOLoss", beta=0.1, label_smoothing=FLIPPED), "without": None},
}


def run(one: Run) -> Record:
    """Train on all pairs with margins recorded, list the suspects, and train anew without some of the pairs.

    Whatever is left out, the policy that is measured has taken as many optimizer steps.
    """
    count, epochs, held_out = SIZES[one.place.scale]
    pairs, flipped = support.pairs("mixed", count, one.seed, FLIPPED), support.flips(count, FLIPPED, one.seed)
    test = write_rows(one.shared, "mixed-test", support.pairs("mixed", held_out, one.seed, held_out=True))
    start, scale = one.base("support").folder, one.place.scale
    steps = {"max_steps": -(-count // 16) * epochs}  # they end a training, whatever the epochs

    def trained(name: str, rows: list[support.Row], *callbacks: Config) -> Path:
        file = write_rows(one.folder, name, rows)
        options = {"seed": one.seed, "scale": scale, "rate": 5e-4, "trainer": steps, "callbacks": callbacks}
        return fit(one.folder / name, settings(start, one.arm["loss"], file, epochs=10 * epochs, **options))

    found: Record = {}
    left_out = flipped if one.arm["without"] == "flipped" else set()
    if one.arm["without"] != "flipped":
        last = trained("all", pairs, named("RecordMargins"))
        suspects = audited(last, one.folder / "suspects.jsonl", count)
        places = [int(line["row"].rpartition(":")[2]) - 1 for line in suspects]
        bad = [place in flipped for place in places]
        found = {
            "auroc": auroc([line["area"] for line in suspects], bad),
            "auroc_reference": auroc([line["reference_margin"] for line in suspects], bad),
            "precision": sum(bad[: len(flipped)]) / len(flipped),
        }
        left_out = set(places[: len(flipped)]) if one.arm["without"] == "suspects" else set()
    if one.arm["without"]:
        last = trained("kept", [row for number, row in enumerate(pairs) if number not in left_out])
    policy = export(last)
    reward = accuracy(scores(policy, start, test, scale))
    return found | {"accuracy": reward, "quality": quality(replies(policy, test))}


def audited(trained: Path, output: Path, count: int) -> list[Record]:
    """All rows of a run, most suspicious first."""
    if not output.exists():
        lit_dpo(["audit", str(trained), "--rows", str(count), "--output", str(output)], trained / "log.txt")
    return lines(output)


def auroc(values: list[float], flipped: list[bool]) -> float:
    """Share of couples of a flipped and a good row in which the flipped one has the lower value."""
    low, high = ([v for v, bad in zip(values, flipped, strict=True) if bad is side] for side in (True, False))
    return sum((a < b) + 0.5 * (a == b) for a in low for b in high) / (len(low) * len(high))


def finds(results: Results) -> tuple[Verdict, str]:
    """Reproduced if the audit's AUROC is above that of the margin before training, and above 0.7 with its interval."""
    audit, before = (results.values("DPO", name) for name in ("auroc", "auroc_reference"))
    gains = [a - b for a, b in zip(audit, before, strict=True)]
    verdicts = {differs([value - 0.7 for value in audit], 1), differs(gains, 1)}
    verdict: Verdict = verdicts.pop() if len(verdicts) == 1 else "within noise"
    measured = f"AUROC {Mean.of(audit)}, reference margin without training {Mean.of(before)}; of as many suspects as "
    return verdict, measured + f"flipped labels {results.mean('DPO', 'precision')} are flipped"


def helps(results: Results) -> tuple[Verdict, str]:
    """Reproduced if training without the suspects is above plain DPO in held-out accuracy."""
    gain = results.differences("DPO", "without suspects", "accuracy")
    said = "; ".join(
        f"{arm} {results.mean(arm, 'accuracy').text(3)} (good parts {results.mean(arm, 'quality').text(3)})"
        for arm in ARMS
    )
    return differs(gain, 1), f"held-out accuracy: {said}; without suspects against DPO {Mean.of(gain).text(3)}"


def draw(results: Results, figure: Figure) -> None:
    """How well flipped labels are found, and what training without them is worth."""
    left, right = figure.subplots(1, 2)
    found = {"area under\nthe margin": "auroc", "reference\nmargin": "auroc_reference"}
    dots(left, {name: results.values("DPO", key) for name, key in found.items()}, "AUROC, flipped labels", line=0.5)
    dots(right, {arm: results.values(arm, "accuracy") for arm in ARMS}, "held-out accuracy")
    figure.suptitle(f"Label audit, {FLIPPED:.0%} of the labels flipped", fontsize=12)


def experiments(scale: str) -> list[Experiment]:
    """One experiment for two claims."""
    count, epochs, held_out = SIZES[scale]
    note = (
        f"{count} `mixed` pairs, {FLIPPED:.0%} flipped, {-(-count // 16) * epochs} updates in every arm, learning rate "
    )
    note += f"5e-4; label smoothing {FLIPPED} for cDPO and robust DPO; {held_out} clean held-out pairs."
    sentence = "The mean margin over training tells flipped labels from good ones, better than the reference does"
    claims = (
        Claim("D audit", "this package", sentence, finds, "d_audit"),
        Claim("D retrain", "this package", "Training without the suspects is better than DPO on all", helps, "d_audit"),
    )
    return [Experiment("d_audit", ARMS, run, claims, {"d_audit": draw}, seeds=1 if scale == "smoke" else 5, note=note)]
