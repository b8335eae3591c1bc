"""Which training pairs are held out, and whether a validation set is one that training does not see."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lit_dpo.data.dataset import PairDataset
from lit_dpo.data.token_blocks import Array


def held_out(dataset: PairDataset, fraction: float, seed: int) -> Tensor:
    """Mask over rows: a share of them, drawn by whole prompt, so that no prompt stands on both sides.

    Args:
        dataset: The training set.
        fraction: Share of the prompts, in [0, 1); at least one prompt and not all of them, unless it is 0.
        seed: Seed of the random choice.

    Raises:
        ValueError: There is only one prompt.
    """
    number, count = _numbered(dataset.prompts)
    chosen = torch.zeros(count, dtype=torch.bool)
    if fraction:
        if count < 2:
            raise ValueError(
                "All pairs share one prompt, so none can be held out for validation: give `validation` a source of its "
                "own, or set `validation_fraction: 0` to train on all of them."
            )
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
        chosen[order[: min(max(1, round(fraction * count)), count - 1)]] = True
    return chosen[torch.from_numpy(number)]


def overlap(train: PairDataset, validation: PairDataset) -> str | None:
    """What of a validation set is in the training set too, in words; None if nothing is."""
    first, second = (
        np.frombuffer(data.digest_bytes(numbers=False), "<u8").reshape(-1, 2) for data in (train, validation)
    )
    other_way = b"".join(validation.swapped_digest(row, numbers=False) for row in range(len(validation)))
    swapped = np.frombuffer(other_way, "<u8").reshape(-1, 2)
    counts = {
        "are also trained on": _among(second, first),
        "contradict a training pair": _among(swapped, first),
        "have the prompt of a training pair": _among(validation.prompts, train.prompts),
    }
    found = [f"{count} of {len(validation)} pairs {what}" for what, count in counts.items() if count]
    return "; ".join(found) or None


def _numbered(hashes: Array) -> tuple[Array, int]:
    """Different hashes numbered in the order in which they first come, and how many there are.

    Args:
        hashes: Shape `(n, 2)` uint64.
    """
    order = np.lexsort((hashes[:, 1], hashes[:, 0]))  # stable: of equal ones the first stands first
    new = np.ones(len(hashes), dtype=bool)
    new[1:] = (hashes[order[1:]] != hashes[order[:-1]]).any(1)
    group = new.cumsum() - 1
    number = np.empty(int(new.sum()), dtype=np.int64)
    number[np.argsort(order[new])] = np.arange(len(number))
    found = np.empty(len(hashes), dtype=np.int64)
    found[order] = number[group]
    return found, len(number)


def _among(hashes: Array, others: Array) -> int:
    """How many hashes, each counted as often as it comes, are among others."""
    both = np.concatenate([others, hashes])
    number, _ = _numbered(both)
    return int(np.isin(number[len(others) :], number[: len(others)]).sum())
