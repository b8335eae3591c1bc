"""`sort3`, the task of the benchmarks about rounds: a small Llama sorts the digits of prompts such as `50172=`.

It learns that from answers half of which are careless. What follows, rounds or other training, is measured by the share
of unseen prompts that greedy decoding answers right.
"""

from __future__ import annotations

import argparse
import functools
import math
import random
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import Record, facts
from lightning.pytorch import Trainer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lit_dpo import DPOLoss, DPOPLoss, PreferenceDataModule, PreferenceModule, SFTLoss, WeightedLoss
from lit_dpo.models import load_model
from lit_dpo.sampling import Sampler

LOSSES = {
    "DPO 0.1 + 1.0 SFT": WeightedLoss([DPOLoss(0.1), SFTLoss()], [1.0, 1.0]),
    "DPOP 0.1, penalty 5": DPOPLoss(0.1, 5.0),
    "DPO 0.1": DPOLoss(0.1),
    "SFT on the chosen": SFTLoss(),
}
LLAMA = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2}
LLAMA |= {"num_attention_heads": 4, "max_position_embeddings": 32, "tie_word_embeddings": True}
_OFF = ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing")
QUIET: dict[str, Any] = {**dict.fromkeys(_OFF, False), "accelerator": "cpu", "devices": 1, "limit_val_batches": 0}
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
    return Trainer(default_root_dir=folder, max_epochs=epochs, gradient_clip_val=1.0, **QUIET)


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


def fresh_prompts(draw: random.Random, count: int) -> list[str]:
    """Different prompts."""
    return list(dict.fromkeys(ask(draw) for _ in range(2 * count)))[:count]


class Begun(NamedTuple):
    """A seed, the supervised rows, the model that learned from them, prompts it has not seen, and a folder."""

    seed: int
    rows: list[dict[str, str]]
    model: str
    unseen: list[str]
    work: Path


def parser(about: str | None, unseen: int = 500) -> argparse.ArgumentParser:
    """The options that all benchmarks of the task have."""
    found = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--seeds", type=int, default=3)
    found.add_argument("--rows", type=int, default=6000, help="supervised rows")
    found.add_argument("--unseen", type=int, default=unseen, help="prompts to measure with")
    found.add_argument("--sft_epochs", type=int, default=6)
    found.add_argument("--threads", type=int, default=1)
    found.add_argument("--out", type=Path, required=True)
    return found


def facts_of(given: argparse.Namespace) -> Record:
    """Command, versions, hardware and seeds of a record."""
    return {**facts("cpu", given.threads), "seed": f"0 to {given.seeds - 1}"}


def begun(given: argparse.Namespace) -> Iterator[Begun]:
    """What each seed begins with; its folder is removed when the next one is asked for."""
    torch.set_num_threads(given.threads)
    for seed in range(given.seeds):
        draw = random.Random(2000 + seed)
        unseen = [ask(draw) for _ in range(given.unseen)]
        rows = supervised(given.rows, seed)
        with tempfile.TemporaryDirectory() as work:
            yield Begun(seed, rows, start(Path(work), rows, seed, given.sft_epochs), unseen, Path(work))


def half_interval(values: list[float]) -> float:
    """Half of the 95 % interval of the mean over seeds, by Student's t; 0 for one seed."""
    return T_95[len(values)] * statistics.stdev(values) / math.sqrt(len(values)) if len(values) in T_95 else 0.0


def spread(values: list[float]) -> str:
    """The mean, and its 95 % interval over seeds."""
    half = f" ± {half_interval(values):.3f}" if len(values) in T_95 else ""
    return f"{statistics.mean(values):.3f}{half}"
