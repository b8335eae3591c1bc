"""A1, A2, A3: where the log-ratio margin h goes under IPO, conservative DPO, DPO and DPOP, and the chosen log-prob."""

from __future__ import annotations

import math

import figure
import numpy as np
import support
from claim import Claim, Experiment, Mean, Results, Run, Verdict
from commands import Record, fit, lines, named, predict, settings, write_rows
from matplotlib.figure import Figure

TARGETS = {"IPO": 5.0, "cDPO": math.log(9) / 0.5}
"""1 / (2 beta) with beta 0.1, and log((1 - e) / e) / beta with e 0.1 and beta 0.5, in nats."""
TOLERANCE = 0.05  # share of the target that h may be off at the end
LOSSES = {
    "IPO": named("IPOLoss", beta=0.1, length_normalize=False),
    "cDPO": named("DPOLoss", beta=0.5, label_smoothing=0.1),
    "DPO": named("DPOLoss", beta=0.1),
    "DPOP": named("DPOPLoss", beta=0.3, penalty=50.0),
}


def run(task: Run) -> Record:
    """Train on pairs that differ in one phrase; h of every training pair before each epoch, and after the last one."""
    train = write_rows(task.shared, "fix", support.pairs("fix", task.arm["pairs"], task.seed))
    test = write_rows(task.shared, "fix_held_out", support.pairs("fix", task.arm["held_out"], task.seed, held_out=True))
    config = settings(
        task.base("support").folder,
        task.arm["loss"],
        train,
        epochs=task.arm["epochs"],
        rate=task.arm["rate"],
        seed=task.seed,
        scale=task.place.scale,
        callbacks=[named("RecordMargins")],
        reference=named("CachedReference", folder=str(task.shared / "references")),
    )
    trained = fit(task.folder, config)
    after = {name: predict(trained, path) for name, path in {"train": train, "test": test}.items()}
    rows = lines(trained / "margins.jsonl")
    last = {row["row_id"]: _h(row) for row in after["train"]}
    h = np.array([[*(m - row["reference_margin"] for m in row["margins"]), last[row["row_id"]]] for row in rows])
    found: Record = {"h": h.mean(0).tolist(), "spread": h.std(0).tolist(), "end": float(h[:, -1].mean())}
    found |= {f"h{share}": np.percentile(h, share, axis=0).tolist() for share in (10, 50, 90)}
    for name, predicted in after.items():
        chosen = [row["logp_chosen"] - row["reference_logp_chosen"] for row in predicted]
        found[f"{name}_chosen"] = float(np.mean(chosen))
        found[f"{name}_below"] = float(np.mean([value < 0 for value in chosen]))
    return found


def _h(row: Record) -> float:
    """The log-ratio margin of a prediction, in nats."""
    chosen = row["logp_chosen"] - row["reference_logp_chosen"]
    return float(chosen - (row["logp_rejected"] - row["reference_logp_rejected"]))


# -- verdicts ---------------------------------------------------------------------------------------------------------


def _late_growth(results: Results, arm: str) -> Mean:
    """How much larger h is at the end than halfway, as a share."""
    return Mean.of([record["h"][-1] / record["h"][len(record["h"]) // 2] - 1 for record in results[arm]])


def _settles(results: Results, arm: str) -> bool:
    """Whether the whole interval of h at the end lies within the tolerance of the target."""
    end, target = results.mean(arm, "end"), TARGETS[arm]
    return abs(end.low / target - 1) < TOLERANCE and abs(end.high / target - 1) < TOLERANCE


def judge_ipo(results: Results) -> tuple[Verdict, str]:
    """Reproduced if IPO ends within 5 % of its target, its spread below its largest, and DPO's h still grows."""
    spreads = [record["spread"] for record in results["IPO"]]
    shrinks = Mean.of([max(spread) - spread[-1] for spread in spreads])
    growth = _late_growth(results, "DPO")
    verdict: Verdict = "not reproduced"
    if _settles(results, "IPO") and shrinks.low > 0 and growth.low > 0:
        verdict = "reproduced"
    said = f"IPO's h ends at {results.mean('IPO', 'end')} nats (target 5), its spread over pairs falls from "
    said += f"{Mean.of([max(s) for s in spreads])} to {Mean.of([s[-1] for s in spreads])}; DPO's h is at "
    return verdict, said + f"{results.mean('DPO', 'end').text(1)} and grew by {growth.value:.0%} in the second half"


def judge_cdpo(results: Results) -> tuple[Verdict, str]:
    """Reproduced if the reward margin, beta h, ends within 5 % of log 9."""
    margin = Mean.of([0.5 * value for value in results.values("cDPO", "end")])
    said = f"the reward margin ends at {margin.text(3)} (target {math.log(9):.3f})"
    return "reproduced" if _settles(results, "cDPO") else "not reproduced", said


def judge_dpop(results: Results) -> tuple[Verdict, str]:
    """Reproduced if the mean log-ratio of the chosen training completions is not below zero, with its interval."""
    train, test = results.mean("DPOP", "train_chosen"), results.mean("DPOP", "test_chosen")
    verdict: Verdict = "reproduced" if train.low >= 0 else "within noise" if train.high >= 0 else "not reproduced"
    below = [f"{results.mean('DPOP', name).value:.0%}" for name in ("train_below", "test_below")]
    said = f"mean log-ratio of the chosen completions: {train} nats on training pairs ({below[0]} of the pairs lie "
    said += f"below the reference), {test} on held-out pairs ({below[1]} below); under DPO "
    return verdict, said + f"{results.mean('DPO', 'train_chosen').text(1)} on training pairs"


# -- figures ----------------------------------------------------------------------------------------------------------


def draw(results: Results, drawn: Figure) -> None:
    """Log-ratio margins against epochs, all training pairs of all seeds; growing arms at the left."""
    sides = drawn.subplots(1, 2)
    for side, (axes, arms) in enumerate(zip(sides, (("DPO", "DPOP"), ("IPO", "cDPO")), strict=True)):
        for number, arm in enumerate(arms):
            colour, h = figure.COLOURS[2 * side + number], results[arm]
            epochs = range(len(h[0]["h50"]))
            low, middle, high = (np.mean([record[f"h{share}"] for record in h], axis=0) for share in (10, 50, 90))
            axes.plot(epochs, middle, color=colour, label=arm, linewidth=2)
            axes.fill_between(epochs, low, high, color=colour, alpha=0.2, linewidth=0)
            if arm in TARGETS:
                axes.axhline(TARGETS[arm], color=colour, linestyle="--", linewidth=1)
        figure.label(axes, "epoch", "h, nats" if not side else "", ("no target", "a target (dashed)")[side])
        axes.legend(fontsize=11, frameon=False, loc="upper left" if not side else "lower right")


def draw_chosen(results: Results, drawn: Figure) -> None:
    """Mean log-ratio of the chosen completions at the end, training and held-out pairs."""
    axes = drawn.subplots()
    for number, (name, shown) in enumerate({"train": "training pairs", "test": "held-out pairs"}.items()):
        means = [results.mean(arm, f"{name}_chosen") for arm in LOSSES]
        at = np.arange(len(LOSSES)) + 0.36 * number - 0.18
        axes.bar(
            at,
            [mean.value for mean in means],
            0.34,
            yerr=[mean.half for mean in means],
            capsize=4,
            label=shown,
            color=figure.COLOURS[number],
        )
    axes.axhline(0, color="black", linewidth=1)
    axes.set_xticks(range(len(LOSSES)), list(LOSSES))
    axes.set_yscale("symlog", linthresh=1)
    axes.set_yticks([-20, -10, -5, -2, -1, -0.5, 0, 0.5, 1], ["-20", "-10", "-5", "-2", "-1", "-0.5", "0", "0.5", "1"])
    figure.label(axes, "", "log-ratio of the chosen completion, nats")
    axes.legend(fontsize=11, frameon=False)


def experiments(scale: str) -> list[Experiment]:
    """One, of four arms."""
    sizes = {"pairs": 64, "held_out": 256, "epochs": 20, "rate": 5e-4}
    sizes |= {"smoke": {"pairs": 16, "held_out": 16, "epochs": 2}, "gpu": {"pairs": 512, "rate": 5e-5}}.get(scale, {})
    ipo, cdpo, dpop = "2310.12036", "2305.18290", "2402.13228"
    claims = (
        Claim("A1", ipo, "IPO's h settles at 1/(2 beta), DPO's keeps growing", judge_ipo, "targets"),
        Claim("A2", cdpo, "conservative DPO's reward margin settles at log((1-e)/e)", judge_cdpo, "targets"),
        Claim("A3", dpop, "DPOP keeps the chosen log-prob at the reference or above", judge_dpop, "targets_chosen"),
    )
    note = f"{sizes['pairs']} pairs of the made-up set that differ in one phrase, {sizes['epochs']} epochs, batch 16, "
    note += f"AdamW {sizes['rate']}; IPO 0.1 over sums, cDPO 0.5 with smoothing 0.1, DPO 0.1, DPOP 0.3 with penalty 50."
    arms = {name: {"loss": loss, **sizes} for name, loss in LOSSES.items()}
    figures = {"targets": draw, "targets_chosen": draw_chosen}
    return [Experiment("a_targets", arms, run, claims, figures, seeds=2 if scale == "smoke" else 3, note=note)]
