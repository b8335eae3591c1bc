"""Which training pairs are held out, and whether a validation set is one that training does not see."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_dpo.data.dataset import PairDataset


def held_out(dataset: PairDataset, fraction: float, seed: int) -> Tensor:
    """Mask over rows: a share of them, drawn by whole prompt, so that no prompt stands on both sides.

    Args:
        dataset: The training set.
        fraction: Share of the prompts, in [0, 1); at least one prompt and not all of them, unless it is 0.
        seed: Of the draw.

    Raises:
        ValueError: There is only one prompt.
    """
    numbers = {prompt: i for i, prompt in enumerate(dict.fromkeys(dataset.prompts))}
    chosen = torch.zeros(len(numbers), dtype=torch.bool)
    if fraction:
        if len(numbers) < 2:
            raise ValueError(
                "All pairs share one prompt, so none can be held out for validation: give `validation` a source of its "
                "own, or set `validation_fraction: 0` to train on all of them."
            )
        order = torch.randperm(len(numbers), generator=torch.Generator().manual_seed(seed))
        chosen[order[: min(max(1, round(fraction * len(numbers))), len(numbers) - 1)]] = True
    return chosen[torch.tensor([numbers[prompt] for prompt in dataset.prompts])]


def overlap(train: PairDataset, validation: PairDataset) -> str | None:
    """What of a validation set is in the training set too, in words; None if nothing is."""
    first, second = train.digests(numbers=False), validation.digests(numbers=False)
    pairs, prompts = {*first}, {*train.prompts}
    counts = {
        "are also trained on": sum(digest in pairs for digest in second),
        "contradict a training pair": sum(
            validation.digest(row, swapped=True, numbers=False) in pairs for row in range(len(validation))
        ),
        "have the prompt of a training pair": sum(prompt in prompts for prompt in validation.prompts),
    }
    found = [f"{count} of {len(validation)} pairs {what}" for what, count in counts.items() if count]
    return "; ".join(found) or None
