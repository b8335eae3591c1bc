"""Supervised models to start from, one for each set, seed and scale: trained once, by `configs/sft.yaml`."""

from __future__ import annotations

import fcntl
import gzip
import json
import math
import random
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import support
from commands import Config, digest, fit, lit_dpo, logged, named, write, write_rows

REAL = ("gsm8k_lowedit", "gsm8k_model_solutions", "hh_harmless", "hellaswag", "oasst_en")
"""Sets that are read from the folder of `--data`."""


@dataclass(frozen=True)
class Sizes:
    """A supervised stage.

    Args:
        hidden: Width of the Llama; its feed-forward is three times as wide.
        layers: Its blocks.
        heads: Attention heads.
        vocabulary: Entries of its tokenizer, which is trained on the texts.
        rows: Rows to train on, at most.
        epochs: How often each is seen.
        batch: Rows an optimizer step.
        rate: Learning rate at its peak.
        characters: Rows of more are left out.
        max_length: Positions of the model.
    """

    hidden: int
    layers: int
    heads: int
    vocabulary: int
    rows: int
    epochs: int
    batch: int = 32
    rate: float = 4e-3
    characters: int = 2000
    max_length: int = 512


_SMOKE = Sizes(32, 2, 2, 400, 96, 1, 32, characters=400)
_SMALL = Sizes(128, 4, 4, 2048, 1500, 4, 16, 3e-3, 400)
_LONGER = {"hh_harmless": replace(_SMALL, characters=800)}
_LONGER["oasst_en"] = replace(_SMALL, characters=2000, max_length=1024)
_GPU = Sizes(768, 12, 12, 16384, 100_000, 3, 32, 6e-4, 3000, 2048)
SIZES: dict[str, dict[str, Sizes]] = {
    "cpu": {"support": Sizes(64, 4, 4, 640, 4000, 4), **dict.fromkeys(REAL, _SMALL), **_LONGER},
    "smoke": {"support": _SMOKE, **dict.fromkeys(REAL, _SMOKE)},
    "gpu": {"support": Sizes(512, 12, 8, 640, 40_000, 3, 64, 6e-4), **dict.fromkeys(REAL, _GPU)},
}


@dataclass(frozen=True)
class Place:
    """Where experiments are done.

    Args:
        work: Folder of all trainings and what was measured.
        data: Folder of the real sets; `None` leaves them out.
        scale: `cpu`, `smoke` or `gpu`.
    """

    work: Path
    data: Path | None = None
    scale: str = "cpu"


@dataclass(frozen=True)
class Base:
    """A supervised model.

    Args:
        folder: The export, which transformers loads.
        nats: Held-out loss in nats a token, mean over rows; `math.exp` of it is the perplexity.
    """

    folder: Path
    nats: float

    @property
    def perplexity(self) -> float:
        """Held out."""
        return math.exp(self.nats)


def rows(place: Place, name: str, split: str, characters: int = 10**9) -> list[support.Row]:
    """Pairs of a real set, those of more characters left out.

    Args:
        place: Has the folder.
        name: One of `REAL`.
        split: `train` or `validation`.
        characters: Of prompt and the longer completion.
    """
    assert place.data is not None
    with gzip.open(place.data / name / f"{split}.jsonl.gz", "rt", encoding="utf-8") as file:
        found = [{side: row[side] for side in ("prompt", "chosen", "rejected")} for row in map(json.loads, file)]
    return [r for r in found if len(r["prompt"]) + max(len(r["chosen"]), len(r["rejected"])) <= characters]


def base(place: Place, name: str, seed: int) -> Base:
    """The supervised model of a set and a seed, trained now unless it is there.

    The seed decides the weights it starts from, the order, and with `support` the texts too. Two processes that ask
    for the same one train it once.
    """
    sizes = SIZES[place.scale][name]
    folder = place.work / "bases" / f"{name}-{seed}-{digest(asdict(sizes))}"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "base.json").exists():
            _train(place, name, seed, sizes, folder)
    said = json.loads((folder / "base.json").read_text())
    return Base(folder / "model", said["nats"])


def _train(place: Place, name: str, seed: int, sizes: Sizes, folder: Path) -> None:
    if name == "support":
        train = support.supervised(sizes.rows, seed)
        held_out = support.supervised(max(64, sizes.rows // 20), seed, held_out=True)
        texts = support.supervised(4000, 0)  # one tokenizer, whatever the seed
    else:
        texts = rows(place, name, "train", sizes.characters)
        train = random.Random(f"base {seed}").sample(texts, min(sizes.rows, len(texts)))
        held_out = rows(place, name, "validation", sizes.characters)[:200]
    files = [write_rows(folder, "train", train), write_rows(folder, "held_out", held_out)]
    if not (folder / "tokenizer" / "DONE").exists():
        words = [row["prompt"] + row["chosen"] for row in texts]
        support.train_tokenizer(words, sizes.vocabulary, folder / "tokenizer")
        write(folder / "tokenizer" / "DONE", "")
    run = fit(folder / "run", _config(place, sizes, seed, folder, *files), "sft")
    if not (folder / "model").exists():
        lit_dpo(["export", str(run), str(folder / "model")], folder / "log.txt")
    nats = [line["val/loss"] for line in logged(run) if "val/loss" in line]
    write(folder / "base.json", json.dumps({"nats": min(nats)}))


def _config(place: Place, sizes: Sizes, seed: int, folder: Path, train: Path, held_out: Path) -> Config:
    """What differs from `configs/sft.yaml`: the model, the data, the rate, and two validations an epoch."""
    device = {"accelerator": "gpu", "precision": "bf16-mixed"} if place.scale == "gpu" else {"accelerator": "cpu"}
    return {
        "seed_everything": seed,
        "threads": 1,
        "model": {
            "model": {
                "model_type": "llama", "hidden_size": sizes.hidden, "intermediate_size": 3 * sizes.hidden,
                "num_hidden_layers": sizes.layers, "num_attention_heads": sizes.heads, "tie_word_embeddings": True,
                "max_position_embeddings": sizes.max_length,
            },
            "tokenizer": str(folder / "tokenizer"),
            "init_seed": seed,
            "optimizer": named("torch.optim.AdamW", lr=sizes.rate, weight_decay=0.0),
        },
        "data": {
            "train": str(train), "validation": str(held_out), "batch_size": sizes.batch, "eval_batch_size": 64,
            "max_length": sizes.max_length, "seed": seed, "cache_tokens": False,
        },
        "trainer": {
            **device, "devices": 1, "max_epochs": sizes.epochs, "accumulate_grad_batches": 1, "val_check_interval": 0.5,
            "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0,
        },
    }  # fmt: skip
