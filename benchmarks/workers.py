"""The contestants of the throughput benchmark, and what both sides share.

Each contestant trains in a process of its own through its library's public interface. Both sides get the same folder:
``model`` (weights and tokenizer), and ``rows_<order>.jsonl`` with the same pairs in the order of training; batches are
consecutive rows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from common import Record

Order = Literal["shuffled", "sorted"]
Split = Literal["shuffled", "sorted", "validation"]
Triple = tuple[list[int], list[int], list[int]]
CHECKED_STEPS = 3


@dataclass(frozen=True)
class Run:
    """One contestant.

    Args:
        side: Which library trains; ``bare`` is ours in a plain loop.
        order: ``shuffled`` as one trains, or ``sorted`` by length so that a batch holds pairs of one length.
        why: What it stands for, as the report shows it.
        cached: Reference log-probs once before training, instead of a reference model in each step.
        checkpointing: Activations recomputed in the backward pass.
        completion_head: Force TRL's completion-only head on a CPU.
        layers: Intermediate layers of `IntermediateLoss`; 0 is plain DPO.
        micro_batches: Batches that a step's pairs are cut into, their gradients accumulated.
    """

    side: Literal["trl", "lit_dpo", "bare"]
    order: Order
    why: str
    cached: bool = False
    checkpointing: bool = False
    completion_head: bool = False
    layers: int = 0
    micro_batches: int = 1


RUNS = {
    "trl_default": Run("trl", "shuffled", "TRL's defaults", checkpointing=True),
    "trl_best": Run("trl", "sorted", "references precomputed, no checkpointing, pairs sorted by length", cached=True),
    "trl_best_head": Run(
        "trl", "sorted", "the same, its CUDA-only completion head forced", cached=True, completion_head=True
    ),
    "trl_best_micro": Run("trl", "sorted", "trl_best in 4 micro-batches a step", cached=True, micro_batches=4),
    "trl_best_micro_head": Run(
        "trl",
        "sorted",
        "trl_best_head in 4 micro-batches a step",
        cached=True,
        completion_head=True,
        micro_batches=4,
    ),
    "lit_dpo": Run("lit_dpo", "shuffled", "flat, prompt shared, references cached", cached=True),
    "lit_dpo_micro": Run("lit_dpo", "shuffled", "lit_dpo in 4 micro-batches a step", cached=True, micro_batches=4),
    "lit_dpo_live": Run("lit_dpo", "shuffled", "flat, prompt shared, reference model in each step"),
    "lit_dpo_sorted": Run("lit_dpo", "sorted", "as lit_dpo_live, pairs sorted by length"),
    "bare_loop": Run("bare", "shuffled", "score, loss and AdamW in a plain loop", cached=True),
    "intermediate_0": Run("lit_dpo", "shuffled", "plain DPO", cached=True),
    "intermediate_1": Run("lit_dpo", "shuffled", "IntermediateLoss at 1 layer", cached=True, layers=1),
    "intermediate_3": Run("lit_dpo", "shuffled", "IntermediateLoss at 3 layers", cached=True, layers=3),
}


@dataclass(frozen=True)
class Settings:
    """What all contestants share; written to ``settings.json`` beside the model.

    Args:
        folder: Where model, tokenizer and rows lie.
        dtype: Of the weights.
        device: ``cpu`` or ``cuda``.
        batch: Pairs a step.
        warmup: Steps that are not timed.
        steps: All steps; rows hold ``steps * batch`` pairs.
        max_length: Tokens of prompt and one completion together, completions cut at the end.
        threads: Of one process.
        lr: Learning rate, constant.
        betas: Of AdamW.
        eps: Of AdamW.
        weight_decay: Of AdamW.
        beta: Of the DPO loss.
    """

    folder: str
    dtype: Literal["float32", "bfloat16", "float64"]
    device: str
    batch: int
    warmup: int
    steps: int
    max_length: int
    threads: int
    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    beta: float = 0.1

    @property
    def model(self) -> str:
        """Folder of weights and tokenizer."""
        return str(Path(self.folder) / "model")

    def rows(self, order: Split) -> Path:
        """The pairs in an order, or one pair for validation."""
        return Path(self.folder) / f"rows_{order}.jsonl"


def train(name: str, settings: Settings, steps: int | None = None) -> Record:
    """Train as contestant `name`, and return what was measured and what proves that the work was the same."""
    torch.set_num_threads(settings.threads)
    run = RUNS[name]
    if run.side == "trl":
        from trl_worker import train_trl as trained  # here, since the opponent is no dependency
    elif run.side == "lit_dpo":
        from lit_dpo_worker import train_lit_dpo as trained
    else:
        from lit_dpo_worker import train_bare as trained
    record = trained(run, settings, steps or settings.steps)
    return {"run": name, "order": run.order, "why": run.why} | record


def identity(batches: list[list[Triple]], micro_batches: int = 1) -> Record:
    """Hashes of the token ids: of every pair whatever the order, and of the steps as they are trained on."""
    pairs = sorted(_digest(pair) for batch in batches for pair in batch)
    starts = range(0, len(batches), micro_batches)
    steps = [[list(pair) for batch in batches[i : i + micro_batches] for pair in batch] for i in starts]
    return {"pairs_digest": _digest(pairs), "batches_digest": _digest(steps)}


def step_means(losses: list[float], micro_batches: int) -> list[float]:
    """The first steps' losses, from those of all their micro-batches."""
    starts = range(0, CHECKED_STEPS * micro_batches, micro_batches)
    return [sum(losses[i : i + micro_batches]) / micro_batches for i in starts]


def _digest(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=12).hexdigest()


def adamw(settings: Settings) -> dict[str, Any]:
    """Options of `torch.optim.AdamW`."""
    return {
        "lr": settings.lr,
        "betas": settings.betas,
        "eps": settings.eps,
        "weight_decay": settings.weight_decay,
        "fused": True,
    }


def reference_record(spent: Iterable[tuple[float, float]], pairs: int) -> Record:
    """Seconds of the reference pass, and the pairs that it scored."""
    wall, cpu = (sum(values) for values in zip(*spent, strict=True))
    return {"reference_wall_s": wall, "reference_cpu_s": cpu, "reference_pairs": pairs}
