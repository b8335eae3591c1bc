"""What rounds of the policy's own pairs repair: `sort3`, a task that works in minutes on a CPU.

    python benchmarks/rounds.py --out benchmarks/results

A small Llama learns to sort the digits of a prompt such as `50172=` from answers half of which are careless. Then come
rounds: fresh prompts, 8 completions of each, a verifier, one right completion against a wrong one, and a step of
training. Measured is the share of unseen prompts that greedy decoding answers right, before and after each round.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import math
import random
import statistics
import tempfile
from pathlib import Path

import torch
from common import Record, append_lines, append_section, facts, markdown_table, report_path, save_figure
from lightning.pytorch import Trainer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lit_dpo import DPOLoss, DPOPLoss, OnPolicy, PreferenceDataModule, PreferenceModule, SFTLoss, Verifier, WeightedLoss
from lit_dpo.models import load_model
from lit_dpo.sampling import Sampler
from lit_dpo.stepwise import fit_stepwise

LOSSES = {
    "DPO 0.1 + 1.0 SFT": WeightedLoss([DPOLoss(0.1), SFTLoss()], [1.0, 1.0]),
    "DPOP 0.1, penalty 5": DPOPLoss(0.1, 5.0),
    "DPO 0.1": DPOLoss(0.1),
    "SFT on the chosen": SFTLoss(),
}
LLAMA = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2}
LLAMA |= {"num_attention_heads": 4, "max_position_embeddings": 32, "tie_word_embeddings": True}
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # factor of the standard error, by the number of seeds


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a character, and no beginning of a sequence."""
    core = Tokenizer(models.WordLevel({"<end>": 0, **{sign: n for n, sign in enumerate("0123456789=", 1)}}, "<end>"))
    core.pre_tokenizer, core.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>")


def ask(draw: random.Random) -> str:
    """A prompt of 4 to 6 digits, most of them with a repeat: one is put into half of those that have none by chance."""
    digits = draw.choices("0123456789", k=draw.randint(4, 6))
    if len({*digits}) == len(digits) and draw.random() < 0.5:
        place, other = draw.sample(range(len(digits)), 2)
        digits[place] = digits[other]
    return "".join(digits) + "="


def answer(prompt: str) -> str:
    """Its digits in order."""
    return "".join(sorted(prompt.removesuffix("=")))


def is_right(prompt: str, completion: str) -> bool:
    """The verifier."""
    return completion == answer(prompt)


def careless(right: str, draw: random.Random) -> str:
    """As a careless person answers, always wrong: without the repeats, else with two different neighbours swapped."""
    if draw.random() < 0.7 and len({*right}) < len(right):
        return "".join(dict.fromkeys(right))
    place = draw.choice([n for n in range(len(right) - 1) if right[n] != right[n + 1]] or [0])
    return right[:place] + right[place + 1] + right[place] + right[place + 2 :]


def supervised(count: int, seed: int) -> list[dict[str, str]]:
    """Rows to learn from, half of them careless; the rejected side is not used."""
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        prompt = ask(draw)
        said = careless(answer(prompt), draw) if number % 2 else answer(prompt)
        rows.append({"prompt": prompt, "chosen": said, "rejected": f"{said}="})
    return rows


def optimizer(rate: float) -> functools.partial[torch.optim.Optimizer]:
    return functools.partial(torch.optim.AdamW, lr=rate, weight_decay=0.0)


def make_trainer(folder: Path, epochs: int) -> Trainer:
    quiet = ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing")
    options = {**dict.fromkeys(quiet, False), "accelerator": "cpu", "devices": 1, "limit_val_batches": 0}
    return Trainer(default_root_dir=folder, max_epochs=epochs, gradient_clip_val=1.0, **options)


def start(folder: Path, rows: list[dict[str, str]], seed: int, epochs: int = 6, batch: int = 64) -> str:
    """The model that begins: trained on the supervised rows."""
    signs = tokenizer()
    module = PreferenceModule(
        LLAMA, tokenizer=signs, loss=SFTLoss(), optimizer=optimizer(4e-3), lr_scheduler=None, init_seed=seed
    )
    data = PreferenceDataModule(rows, validation=rows[:8], batch_size=batch, max_length=32, seed=seed)
    make_trainer(folder, epochs).fit(module, data)
    module.policy.save_pretrained(folder / "start")
    signs.save_pretrained(folder / "start")
    return str(folder / "start")


def greedy(model: str, prompts: list[str]) -> float:
    """Share of prompts that are answered right by the most likely tokens."""
    signs = tokenizer()
    ids = [signs(prompt).input_ids for prompt in prompts]
    said = Sampler(temperature=0.0, max_new_tokens=9, rows=500)(load_model(model, signs), signs, ids)
    return statistics.mean(is_right(prompt, one.text) for prompt, (one,) in zip(prompts, said, strict=True))


def rounds(
    model: str, loss: object, folder: Path, rows: list[dict[str, str]], seed: int, count: int, prompts: int, epochs: int
) -> tuple[list[str], list[Record]]:
    """Train through the rounds; the export of each, and its record."""
    draw = random.Random(1000 + seed)
    fresh = list(dict.fromkeys(ask(draw) for _ in range(2 * count * prompts)))[: count * prompts]
    folder.mkdir(parents=True)
    (folder / "prompts.txt").write_text("\n".join(fresh) + "\n")
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


def half_interval(values: list[float]) -> float:
    """Half of the 95 % interval of the mean over seeds, by Student's t; 0 for one seed."""
    return T_95[len(values)] * statistics.stdev(values) / math.sqrt(len(values)) if len(values) in T_95 else 0.0


def spread(values: list[float]) -> str:
    """The mean, and its 95 % interval over seeds."""
    half = f" ± {half_interval(values):.3f}" if len(values) in T_95 else ""
    return f"{statistics.mean(values):.3f}{half}"


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--rows", type=int, default=6000, help="supervised rows")
    parser.add_argument("--prompts", type=int, default=1000, help="prompts of a round")
    parser.add_argument("--unseen", type=int, default=500, help="prompts to measure with")
    parser.add_argument("--sft_epochs", type=int, default=6)
    parser.add_argument("--losses", nargs="+", default=[*LOSSES], choices=[*LOSSES])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    about, records = facts("cpu", given.threads), []
    about["seed"] = f"0 to {given.seeds - 1}"
    for seed in range(given.seeds):
        draw = random.Random(2000 + seed)
        unseen = [ask(draw) for _ in range(given.unseen)]
        rows = supervised(given.rows, seed)
        with tempfile.TemporaryDirectory() as work:
            model = start(Path(work), rows, seed, given.sft_epochs)
            first = greedy(model, unseen)
            for number, name in enumerate(given.losses):
                options = (seed, given.rounds, given.prompts, 2)
                exports, told = rounds(model, LOSSES[name], Path(work, str(number)), rows, *options)
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
