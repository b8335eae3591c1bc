"""B3: early stopping on the accuracy of held-out rewards, against training to the end, with one label in five wrong."""

from __future__ import annotations

import figure
import numpy as np
import support
from claim import Claim, Experiment, Mean, Results, Run, Verdict, differs
from commands import Record, fit, logged, named, predict, settings, write_rows
from matplotlib.figure import Figure
from policies import drift

WAYS = ("stopped", "end")


def run(task: Run) -> Record:
    """Train twice, with `RewardEarlyStopping` and `BestCheckpoint` or without; judge both on pairs of their own."""
    arm, seed = task.arm, task.seed
    drawn = support.pairs("mixed", arm["validation"] + arm["test"], seed, held_out=True)
    train = write_rows(task.shared, "mixed", support.pairs("mixed", arm["pairs"], seed, flipped=0.2))
    validation = write_rows(task.shared, "mixed_validation", drawn[: arm["validation"]])
    test = write_rows(task.shared, "mixed_test", drawn[arm["validation"] :])
    prompts, start = [row["prompt"] for row in drawn[arm["validation"] :]], task.base("support").folder
    found: Record = {}
    for way in WAYS:
        stopping = [named("RewardEarlyStopping", patience=3), named("BestCheckpoint")] if way == "stopped" else []
        config = settings(
            start,
            named("DPOLoss", beta=arm["beta"]),
            train,
            validation=validation,
            epochs=arm["epochs"],
            rate=arm["rate"],
            seed=seed,
            scale=task.place.scale,
            callbacks=[*stopping, named("ExportModel")],
            reference=named("CachedReference", folder=str(task.shared / "references")),
        )
        trained = fit(task.folder / way, config)
        rows = predict(trained, test, "best" if way == "stopped" else "last")
        log = logged(trained)
        seen: Record = {
            "accuracy": float(np.mean([(np.sign(row["margin"]) + 1) / 2 for row in rows])),
            "chosen": float(np.mean([row["logp_chosen"] - row["reference_logp_chosen"] for row in rows])),
            "drift": drift(trained / "export", start, prompts[:128], seed),
            "validation": [line["val/rewards/accuracies"] for line in log if "val/rewards/accuracies" in line],
        }
        right = [line["train/rewards/accuracies"] for line in log if "train/rewards/accuracies" in line]
        epochs = len(seen["validation"])
        seen["training"] = np.reshape(right, (epochs, -1)).mean(1).tolist()  # each epoch's mean, as it was trained
        found |= {f"{way}_{name}": value for name, value in seen.items()}
    return found


# -- verdicts ---------------------------------------------------------------------------------------------------------


def _gains(results: Results, name: str) -> list[float]:
    """By seed, what stopping has more of a quantity than training to the end, mean over the arms."""
    by_arm = [[record[f"stopped_{name}"] - record[f"end_{name}"] for record in results[arm]] for arm in results.records]
    return np.mean(by_arm, axis=0).tolist()


def _each(results: Results, name: str, digits: int) -> str:
    """By arm, the means of stopping and of training to the end."""
    return "; ".join(
        f"{arm}: {results.mean(arm, f'stopped_{name}').value:.{digits}f} against "
        f"{results.mean(arm, f'end_{name}').value:.{digits}f}"
        for arm in results.records
    )


def judge_peak(results: Results) -> tuple[Verdict, str]:
    """By seed and over all arms: the best validation accuracy lies above the last one, and the training accuracy rises.

    The best of several noisy values lies above the last one by chance too; so `judge_accuracy` looks at other pairs.
    """
    arms = results.records
    fall = np.mean([[max(r["end_validation"]) - r["end_validation"][-1] for r in results[arm]] for arm in arms], axis=0)
    last = Mean.of(np.mean([[r["end_training"][-1] for r in results[arm]] for arm in arms], axis=0).tolist())
    said = f"from its best epoch to the last, validation accuracy falls by {Mean.of(fall.tolist()).text(3)}, while "
    return differs(fall.tolist(), 1), said + f"training accuracy ends at {last.text(3)}"


def judge_accuracy(results: Results) -> tuple[Verdict, str]:
    """Whether stopping has the higher accuracy on test pairs, mean over arms."""
    gains = _gains(results, "accuracy")
    said = f"test accuracy of stopping less that of the end: {Mean.of(gains).text(3)} ({_each(results, 'accuracy', 3)})"
    return differs(gains, 1), said


def judge_drift(results: Results) -> tuple[Verdict, str]:
    """Whether stopping has the smaller divergence from the starting model, mean over arms."""
    gains = _gains(results, "drift")
    said = f"nats a token of stopping less those of the end: {Mean.of(gains).text(2)} ({_each(results, 'drift', 2)}); "
    return differs(gains, -1), said + f"log-ratio of the chosen completions: {_each(results, 'chosen', 1)}"


# -- figures ----------------------------------------------------------------------------------------------------------


def draw(results: Results, drawn: Figure) -> None:
    """Accuracy against epochs when training to the end, and where stopping stopped; the first arm, each seed thin."""
    arm = next(iter(results.records))
    axes = drawn.subplots()
    for number, (name, shown) in enumerate({"training": "training pairs", "validation": "validation pairs"}.items()):
        rows = np.array([record[f"end_{name}"] for record in results[arm]])
        epochs = range(1, rows.shape[1] + 1)
        for row in rows:
            axes.plot(epochs, row, color=figure.COLOURS[number], alpha=0.3, linewidth=1)
        axes.plot(epochs, rows.mean(0), color=figure.COLOURS[number], linewidth=2.5, label=shown)
    best = [int(np.argmax(record["stopped_validation"])) for record in results[arm]]
    at = [record["stopped_validation"][epoch] for record, epoch in zip(results[arm], best, strict=True)]
    axes.plot(np.add(best, 1), at, "o", color="black", markersize=8, label="kept by early stopping, each seed")
    figure.label(axes, "epoch", "accuracy of the rewards", arm)
    axes.legend(fontsize=11, frameon=False)


def draw_drift(results: Results, drawn: Figure) -> None:
    """Test accuracy and drift of both ways, by arm."""
    left, right = drawn.subplots(1, 2)
    at = np.arange(len(results.records))
    for axes, name, shown in ((left, "accuracy", "test accuracy"), (right, "drift", "KL from the start, nats a token")):
        for number, way in enumerate(WAYS):
            means = [results.mean(arm, f"{way}_{name}") for arm in results.records]
            axes.errorbar(
                [mean.value for mean in means],
                at + 0.24 * number - 0.12,
                xerr=[mean.half for mean in means],
                fmt="o",
                capsize=4,
                color=figure.COLOURS[number],
                label={"stopped": "early stopping", "end": "to the end"}[way],
            )
        axes.set_yticks(at, list(results.records) if axes is left else [""] * len(at))
        axes.invert_yaxis()
        figure.label(axes, shown, "")
    drawn.legend(*left.get_legend_handles_labels(), fontsize=11, frameon=False, loc="outside upper center", ncols=2)


def experiments(scale: str) -> list[Experiment]:
    """One; its arms are sizes of the set, and betas."""
    sizes = {"validation": 300, "test": 300, "epochs": 10, "rate": 5e-4}
    sizes |= {"smoke": {"validation": 16, "test": 16, "epochs": 2}, "gpu": {"rate": 5e-5}}.get(scale, {})
    factor = {"smoke": 1 / 6, "gpu": 10}.get(scale, 1)
    options = [(96, 0.1), (288, 0.1), (96, 0.5)][: 1 if scale == "smoke" else None]
    counts = [(int(pairs * factor), beta) for pairs, beta in options]
    arms = {f"{pairs} pairs, beta {beta}": {"pairs": pairs, "beta": beta, **sizes} for pairs, beta in counts}
    paper = "Cerebras BTLM study"
    claims = (
        Claim("B3, peak", paper, "validation accuracy peaks while training accuracy goes on", judge_peak, "stopping"),
        Claim("B3, accuracy", paper, "early stopping keeps the peak", judge_accuracy, "stopping_drift"),
        Claim("B3, drift", paper, "early stopping keeps the policy nearer to its start", judge_drift, "stopping_drift"),
    )
    note = f"`mixed` pairs with 20 % of the labels wrong, {sizes['epochs']} epochs at most, DPO, batch 16, AdamW "
    note += f"{sizes['rate']}; stopped with patience 3 and the best checkpoint of {sizes['validation']} validation "
    note += f"pairs, judged on {sizes['test']} other pairs; drift from one completion to each of 128 held-out prompts."
    figures = {"stopping": draw, "stopping_drift": draw_drift}
    return [Experiment("b_stopping", arms, run, claims, figures, seeds=2 if scale == "smoke" else 3, note=note)]
