"""What rounds of the policy's own pairs repair: `sort3`, a task that works in minutes on a CPU.

    python benchmarks/rounds.py --out benchmarks/results

A small Llama learns to sort the digits of a prompt such as `50172=` from answers half of which are careless. Then come
rounds: fresh prompts, 8 completions of each, a verifier, one right completion against a wrong one, and a step of
training. Measured is the share of unseen prompts that greedy decoding answers right, before and after each round.
"""

from __future__ import annotations

import importlib.util
import json
import random
import statistics
from pathlib import Path

import sort3
from common import Record, append_lines, append_section, markdown_table, report_path, save_figure
from sort3 import LOSSES, fresh_prompts, greedy, half_interval, is_right, make_trainer, optimizer, spread

from lit_dpo import OnPolicy, PreferenceDataModule, PreferenceModule, Verifier
from lit_dpo.stepwise import fit_stepwise


def rounds(
    model: str, loss: object, folder: Path, rows: list[dict[str, str]], seed: int, count: int, prompts: int, epochs: int
) -> tuple[list[str], list[Record]]:
    """Train through the rounds; the export of each, and its record."""
    draw = random.Random(1000 + seed)
    folder.mkdir(parents=True)
    (folder / "prompts.txt").write_text("\n".join(fresh_prompts(draw, count * prompts)) + "\n")
    partition = OnPolicy(
        str(folder / "prompts.txt"),
        Verifier(is_right),
        rounds=count,
        prompts_per_round=prompts,
        max_new_tokens=9,
        seed=seed,
    )
    module = PreferenceModule(model, loss=loss, optimizer=optimizer(1e-3), lr_scheduler=None)
    data = PreferenceDataModule(rows[:8], validation=rows[:8], partition=partition, batch_size=32, max_length=32)
    fit_stepwise(module, data, lambda root: make_trainer(root, epochs), folder / "run")
    roots = [folder / "run" / f"partition_{step}" for step in range(count)]
    return [str(root / "export") for root in roots], [json.loads((root / "round.json").read_text()) for root in roots]


def table(records: list[Record], count: int) -> str:
    """One line a loss: greedy accuracy at the start and after each round, and what the last round's samples were."""
    header = ["loss", "start", *(f"round {n + 1}" for n in range(count)), "mixed", "finished", "completions a second"]
    lines = []
    for name in dict.fromkeys(record["loss"] for record in records):
        some = [record for record in records if record["loss"] == name]
        speeds = [r["completions"] / r["seconds"]["sampling"] for record in some for r in record["rounds"]]
        line = [name, *(spread([record["greedy"][n] for record in some]) for n in range(count + 1))]
        line += [f"{statistics.mean(r['rounds'][-1][key] for r in some):.3f}" for key in ("mixed", "finished")]
        lines.append([*line, f"{statistics.median(speeds):,.0f}"])
    return markdown_table(header, lines)


def draw_figure(records: list[Record], count: int, path: Path) -> None:
    """Greedy accuracy by round, with the interval over seeds; wide letters, so that it can be read at 600 pixels."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 4.5))
    names = list(dict.fromkeys(record["loss"] for record in records))
    for number, name in enumerate(names):
        values = [[record["greedy"][n] for record in records if record["loss"] == name] for n in range(count + 1)]
        halves = [half_interval(each) for each in values]
        middles = [statistics.mean(each) for each in values]
        places = [n + 0.06 * (number - (len(names) - 1) / 2) for n in range(count + 1)]  # beside each other
        axis.errorbar(places, middles, halves, marker="o", capsize=4, linewidth=2, label=name)
    axis.set_xticks(range(count + 1), ["start", *(f"round {n + 1}" for n in range(count))], fontsize=13)
    axis.tick_params(axis="y", labelsize=13)
    axis.set_ylabel("greedy accuracy", fontsize=13)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=12)
    save_figure(figure, path)
    pyplot.close(figure)


def main() -> None:
    parser = sort3.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--prompts", type=int, default=1000, help="prompts of a round")
    parser.add_argument("--losses", nargs="+", default=[*LOSSES], choices=[*LOSSES])
    given = parser.parse_args()
    about, records = sort3.facts_of(given), []
    for seed, rows, model, unseen, work in sort3.begun(given):
        first = greedy(model, unseen)
        for number, name in enumerate(given.losses):
            options = (seed, given.rounds, given.prompts, 2)
            exports, told = rounds(model, LOSSES[name], work / str(number), rows, *options)
            found = [first, *(greedy(export, unseen) for export in exports)]
            records.append({"loss": name, "greedy": found, "rounds": told, **about, "seed": seed})
            append_lines(given.out / "rounds.jsonl", records[-1:])
            print(f"seed {seed}, {name}: {', '.join(f'{value:.3f}' for value in found)}", flush=True)
    title = f"sort3: {given.rounds} rounds of {given.prompts:,} prompts, {given.seeds} seeds"
    note = f"Greedy accuracy on {given.unseen} unseen prompts a seed; mean and 95 % interval over seeds (Student's t)."
    path = report_path(given.out, "rounds", "cpu")
    append_section(path, title, [table(records, given.rounds)], about, [note])
    if importlib.util.find_spec("matplotlib"):
        draw_figure(records, given.rounds, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
