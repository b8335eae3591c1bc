"""B1: what happens to the log-prob of the chosen completion, token by token, when pairs differ in a few words."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import bases
import figure
import numpy as np
import support
from claim import Claim, Experiment, Mean, Results, Run, Verdict, differs
from commands import Record, fit, logged, named, predict, settings, write_rows
from matplotlib.figure import Figure
from policies import greedy
from transformers import AutoTokenizer

BETA = 0.1
"""Of every loss, so that equal rewards are equal log-ratios."""
LOSSES = {
    "DPO": named("DPOLoss", beta=BETA),
    "DPO + SFT": named("WeightedLoss", losses=[named("DPOLoss", beta=BETA), named("SFTLoss")], weights=[1.0, 1.0]),
    "IPO": named("IPOLoss", beta=BETA, length_normalize=False),
    **{f"DPOP {p}": named("DPOPLoss", beta=BETA, penalty=float(p)) for p in (5, 50, 500)},
}
PLACES = ("before", "edit", "after")
WINDOW = range(-6, 13)  # tokens around the first one that differs


def run(task: Run) -> Record:
    """Train; log-ratios of single tokens before, in and after the edit, trajectories, and greedy completions."""
    arm, seed = task.arm, task.seed
    train, test = (write_rows(task.shared, f"displacement_{n}", rows) for n, rows in enumerate(_pairs(task)))
    start = task.base(arm["base"]).folder
    config = settings(
        start,
        arm["loss"],
        train,
        validation=test,
        epochs=arm["epochs"],
        rate=arm["rate"],
        max_length=bases.SIZES[task.place.scale][arm["base"]].max_length,
        seed=seed,
        scale=task.place.scale,
        callbacks=[named("ExportModel")],
        reference=named("CachedReference", folder=str(task.shared / "references")),
    )
    trained = fit(task.folder, config)
    found: Record = {"train": _trajectory(trained, "train"), "test": _trajectory(trained, "val")}
    for name, path in {"train": train, "test": test}.items():
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        found |= {f"{name}_{what}": value for what, value in _tokens(start, trained, path, rows).items()}
        if not arm["prompts"]:
            continue  # replies without one right answer
        rows = rows[: arm["prompts"]]
        said = greedy(trained / "export", [row["prompt"] for row in rows], arm["new_tokens"])
        before = greedy(start, [row["prompt"] for row in rows], arm["new_tokens"])
        for when, texts in (("greedy", said), ("greedy_start", before)):
            found[f"{name}_{when}"] = float(np.mean([_right(row, text) for row, text in zip(rows, texts, strict=True)]))
    return found


def _pairs(task: Run) -> tuple[list[support.Row], list[support.Row]]:
    """Pairs to train on and held-out ones."""
    arm, seed, kind = task.arm, task.seed, task.arm["kind"]
    if arm["base"] == "support":
        return support.pairs(kind, arm["pairs"], seed), support.pairs(kind, arm["held_out"], seed, held_out=True)
    limit = bases.SIZES[task.place.scale][arm["base"]].characters
    train, test = (bases.rows(task.place, kind, split, limit) for split in ("train", "validation"))
    count = min(arm["pairs"], len(train))
    first = seed * count % len(train)  # a small set is taken whole, beginning elsewhere
    return (train * 2)[first : first + count], test[: arm["held_out"]]


def _right(row: support.Row, text: str) -> bool:
    """Whether a completion says what the chosen one does: what to do, or the number that GSM8K's answers end with."""
    if "####" in row["chosen"]:
        return text.rpartition("####")[2].strip() == row["chosen"].rpartition("####")[2].strip()
    return support.slots(row["prompt"], text)["fix"]


def _trajectory(trained: Path, stage: str) -> list[list[float]]:
    """Once an epoch h and the log-ratio of the chosen completion, means over pairs."""
    names = [f"{stage}/rewards/{name}" for name in ("margins", "chosen")]
    log = np.array([[line[name] / BETA for name in names] for line in logged(trained) if names[0] in line])
    epochs = sum("val/loss" in line for line in logged(trained))
    means: list[list[float]] = log.reshape(epochs, -1, 2).mean(1).tolist()
    return means if stage == "train" else [[0.0, 0.0], *means]  # training pairs are measured before each step


def _tokens(start: Path, trained: Path, path: Path, rows: Sequence[support.Row]) -> dict[str, Any]:
    """Change of the chosen completion's log-prob by place: summed over a pair, and a token's mean around the edit."""
    tokenizer = AutoTokenizer.from_pretrained(start, trust_remote_code=False)
    sums, around = [], {offset: [0.0] for offset in WINDOW}
    for line, row in zip(predict(trained, path, tokens=True), rows, strict=True):
        change = np.subtract(line["tokens_chosen"], line["reference_tokens_chosen"])
        whole = [tokenizer(row["prompt"] + row[side]).input_ids for side in ("chosen", "rejected")]
        length = len(whole[0]) + 1 - len(change)  # of the prompt; the completion has an end of its own
        first, last = _edit(*(ids[length:] for ids in whole))
        sums.append([change[:first].sum(), change[first:last].sum(), change[last:].sum()])
        for offset in WINDOW:
            if 0 <= first + offset < len(change):
                around[offset].append(float(change[first + offset]))
    table = np.array(sums)
    found: dict[str, Any] = dict(zip(PLACES, table.mean(0).tolist(), strict=True))
    found |= {"chosen": float(table.sum(1).mean()), "below": float((table.sum(1) < 0).mean())}
    return {**found, "around": [float(np.mean(values[1:] or values)) for values in around.values()]}


def _edit(chosen: Sequence[int], rejected: Sequence[int]) -> tuple[int, int]:
    """Where the chosen ids differ from the rejected ones: first, and behind the last.

    >>> _edit([1, 2, 3, 4, 9], [1, 2, 7, 8, 8, 9])
    (2, 4)
    """
    shortest = min(len(chosen), len(rejected))
    first = next((n for n in range(shortest) if chosen[n] != rejected[n]), shortest)
    same = next((n for n in range(shortest - first) if chosen[-1 - n] != rejected[-1 - n]), shortest - first)
    return first, len(chosen) - same


# -- verdicts ---------------------------------------------------------------------------------------------------------


def _low(results: Results) -> dict[str, str]:
    """The arms, by loss; where there are two kinds of pairs, those with pairs that differ little."""
    return {arm.partition(",")[0]: arm for arm in results.records if not arm.endswith("high edit")}


def judge_after(results: Results) -> tuple[Verdict, str]:
    """Reproduced if under DPO the training pairs' tokens after the edit fall, and under DPOP 50 they do not.

    Each with its 95 % interval: DPO's lies below zero, DPOP's does not.
    """
    low = _low(results)
    dpo, dpop = results.mean(low["DPO"], "train_after"), results.mean(low["DPOP 50"], "train_after")
    reproduced = dpo.high < 0 <= dpop.high
    unclear = dpo.low < 0 <= dpo.high
    verdict: Verdict = "reproduced" if reproduced else "within noise" if unclear else "not reproduced"
    parts = []
    for name in low:
        before, edit, after = (results.mean(low[name], f"train_{place}") for place in PLACES)
        parts.append(f"{name} {before.text(1)} / {edit.text(1)} / {after.text(1)}")
    return verdict, f"nats before / in / after the edit, sums over a pair: {'; '.join(parts)}"


def judge_equal(results: Results) -> tuple[Verdict, str]:
    """Whether the chosen log-ratio of training pairs lies higher under DPOP 50 than under DPO at the same h.

    The h is nine tenths of the smallest that any arm reached with that seed.
    """
    low = _low(results)
    at = [
        0.9 * min(max(h for h, _ in results[arm][n]["train"]) for arm in low.values()) for n in range(_count(results))
    ]
    found = {name: [_at(results[arm][n]["train"], h) for n, h in enumerate(at)] for name, arm in low.items()}
    said = ", ".join(f"{name} {Mean.of(values).text(2)}" for name, values in found.items())
    gains = [b - a for a, b in zip(found["DPO"], found["DPOP 50"], strict=True)]
    return differs(gains, 1), f"chosen log-ratio at equal h ({Mean.of(at).text(1)} nats): {said}"


def judge_held_out(results: Results) -> tuple[Verdict, str]:
    """As `judge_equal`, with what happened to held-out pairs by the end."""
    verdict, said = judge_equal(results)
    ends = [f"{name} {results.mean(arm, 'test_chosen').text(2)}" for name, arm in _low(results).items()]
    return verdict, f"{said}; on held-out pairs at the end {', '.join(ends)}"


def judge_edit(results: Results) -> tuple[Verdict, str]:
    """Whether DPO lowers the chosen log-prob further on pairs that differ little, at the same h, than on others."""
    pairs = list(zip(results["DPO, low edit"], results["DPO, high edit"], strict=True))
    at = [0.9 * min(max(h for h, _ in record["train"]) for record in pair) for pair in pairs]
    low, high = ([_at(pair[side]["train"], h) for pair, h in zip(pairs, at, strict=True)] for side in (0, 1))
    said = f"chosen log-ratio under DPO at equal h ({Mean.of(at).text(1)} nats): {Mean.of(low).text(2)} with low and "
    return differs(
        [a - b for a, b in zip(low, high, strict=True)], -1
    ), f"{said}{Mean.of(high).text(2)} with high edit distance"


def judge_greedy(results: Results) -> tuple[Verdict, str]:
    """Whether greedy decoding on held-out prompts is right more often after DPOP 50 than after DPO."""
    low = _low(results)
    start = results.mean(low["DPO"], "test_greedy_start")
    said = ", ".join(f"{name} {results.mean(arm, 'test_greedy').text(2)}" for name, arm in low.items())
    gains = results.differences(low["DPO"], low["DPOP 50"], "test_greedy")
    return differs(gains, 1), f"right greedy answers to held-out prompts: start {start.text(2)}, {said}"


def _count(results: Results) -> int:
    return len(results.seeds)


def _at(trajectory: Sequence[Sequence[float]], h: float) -> float:
    """The chosen log-ratio when h was first reached, between epochs along a line."""
    reached = next(n for n, (seen, _) in enumerate(trajectory) if seen >= h)
    (h0, r0), (h1, r1) = trajectory[max(reached - 1, 0)], trajectory[reached]
    return r0 + (r1 - r0) * ((h - h0) / (h1 - h0) if h1 > h0 else 1.0)


# -- figures ----------------------------------------------------------------------------------------------------------


def draw_trajectories(results: Results, drawn: Figure) -> None:
    """Chosen log-ratio against h, once an epoch, for training pairs and held-out ones; means over seeds."""
    for axes, (name, shown) in zip(
        drawn.subplots(1, 2, sharey=True), {"train": "training pairs", "test": "held-out pairs"}.items(), strict=True
    ):
        for number, (loss, arm) in enumerate(_low(results).items()):
            path = np.mean([record[name] for record in results[arm]], axis=0)
            axes.plot(path[:, 0], path[:, 1], ".-", color=figure.COLOURS[number], linewidth=2, label=loss)
        axes.axhline(0, color="black", linewidth=1)
        figure.label(axes, "h, nats", "log-ratio of the chosen, nats" if name == "train" else "", shown)
        if name == "train":
            axes.legend(fontsize=11, frameon=False)


def draw_positions(results: Results, drawn: Figure) -> None:
    """Mean change of a token's log-prob around the first token that differs, on training pairs, at the end."""
    axes = drawn.subplots()
    low = _low(results)
    shown = ("DPO", "IPO", "DPOP 50")
    for number, name in enumerate(shown):
        rows = np.array([record["train_around"] for record in results[low[name]]])
        at = np.array(WINDOW) + 0.27 * (number - 1)
        axes.bar(at, rows.mean(0), 0.26, color=figure.COLOURS[list(low).index(name)], label=name)
    axes.axvline(-0.5, color="black", linestyle="--", linewidth=1)
    axes.axhline(0, color="black", linewidth=1)
    axes.xaxis.get_major_locator().set_params(integer=True)
    figure.label(axes, "token, counted from the first one that differs", "change of its log-prob, nats")
    axes.legend(fontsize=11, frameon=False)


# -- experiments ------------------------------------------------------------------------------------------------------


def experiments(scale: str) -> list[Experiment]:
    """Pairs of the made-up set, of GSM8K, and of sets whose pairs are whole replies of people or of models."""
    return [_support(scale), _gsm(scale), *(_replies(name, scale) for name in ("hh_harmless", "hellaswag", "oasst_en"))]


def _support(scale: str) -> Experiment:
    sizes = {"base": "support", "pairs": 64, "held_out": 128, "epochs": 15, "rate": 5e-4, "prompts": 64}
    sizes |= {"smoke": {"pairs": 16, "held_out": 16, "epochs": 2, "prompts": 8}}.get(scale, {})
    sizes |= {"gpu": {"pairs": 512, "rate": 5e-5}}.get(scale, {})
    arms = {f"{name}, low edit": {"loss": loss, "kind": "fix"} for name, loss in LOSSES.items()}
    arms |= {f"{name}, high edit": {"loss": LOSSES[name], "kind": "gap1"} for name in ("DPO", "DPOP 50")}
    note = f"{sizes['pairs']} pairs that differ in one phrase (low edit) or are drawn independently with true scores "
    note += f"that differ by 1 (high edit), {sizes['epochs']} epochs, beta 0.1 for every loss, batch 16, AdamW 5e-4."
    return _experiment("b_displacement", "B1", arms, {**sizes, "new_tokens": 48}, scale, note, 5)


def _gsm(scale: str) -> Experiment:
    sizes = {"base": "gsm8k_lowedit", "pairs": 256, "held_out": 96, "epochs": 3, "rate": 3e-4, "prompts": 48}
    sizes |= {"smoke": {"pairs": 16, "held_out": 8, "epochs": 1, "prompts": 4}}.get(scale, {})
    sizes |= {"gpu": {"pairs": 1024, "rate": 5e-6, "held_out": 400, "prompts": 400}}.get(scale, {})
    names = [*LOSSES] if scale == "gpu" else ["DPO", "DPO + SFT", "IPO", "DPOP 50"]
    arms = {f"{name}, low edit": {"loss": LOSSES[name], "kind": "gsm8k_lowedit"} for name in names}
    arms["DPO, high edit"] = {"loss": LOSSES["DPO"], "kind": "gsm8k_model_solutions"}
    note = f"{sizes['pairs']} pairs of `gsm8k_lowedit` (low edit) or as many as there are of `gsm8k_model_solutions` "
    note += f"(high edit), {sizes['epochs']} epochs, beta 0.1 for every loss, batch 16, AdamW {sizes['rate']}."
    return _experiment("b_displacement_gsm", "B1 on GSM8K", arms, {**sizes, "new_tokens": 160}, scale, note, 3)


def _replies(base: str, scale: str) -> Experiment:
    sizes = {"base": base, "kind": base, "pairs": 256, "held_out": 96, "epochs": 3, "rate": 3e-4, "prompts": 0}
    sizes |= {"smoke": {"pairs": 16, "held_out": 8, "epochs": 1}}.get(scale, {})
    sizes |= {"gpu": {"pairs": 1024, "rate": 5e-6, "held_out": 400}}.get(scale, {})
    name, sentence = f"b_displacement_{base.partition('_')[0]}", "at equal h DPOP keeps the chosen log-prob higher"
    claims = (Claim(f"B1 on {base}, equal h", "2402.13228", sentence, judge_held_out, f"{name}_paths"),)
    arms = {loss: {"loss": LOSSES[loss], **sizes} for loss in ("DPO", "DPOP 50")}
    most = bases.SIZES[scale][base].characters
    note = f"{sizes['pairs']} pairs of `{base}` of at most {most} characters, or as many as there are, "
    note += f"{sizes['epochs']} epochs, beta 0.1 for both losses, batch 16, AdamW {sizes['rate']}."
    seeds = 2 if scale == "smoke" else 3
    return Experiment(name, arms, run, claims, {f"{name}_paths": draw_trajectories}, (base,), seeds, note)


def _experiment(
    name: str, claim: str, arms: dict[str, Any], sizes: dict[str, Any], scale: str, note: str, seeds: int
) -> Experiment:
    """With the four claims, which are judged alike on every set."""
    paper, paths, places = "2402.13228", f"{name}_paths", f"{name}_positions"
    claims = (
        Claim(f"{claim}, tokens", paper, "DPO lowers tokens after the edit, DPOP does not", judge_after, places),
        Claim(f"{claim}, equal h", paper, "at equal h DPOP keeps the chosen log-prob higher", judge_equal, paths),
        Claim(f"{claim}, edit", paper, "DPO lowers it further where pairs differ little", judge_edit, paths),
        Claim(f"{claim}, greedy", paper, "greedy answers are better after DPOP", judge_greedy, places),
    )
    figures = {paths: draw_trajectories, places: draw_positions}
    given = {arm: {**options, **sizes} for arm, options in arms.items()}
    count = 2 if scale == "smoke" else seeds
    return Experiment(name, given, run, claims, figures, bases=(sizes["base"],), seeds=count, note=note)
