"""What the tools that look at a fit before it begins have in common."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer

from lit_dpo.data import PreferenceDataModule
from lit_dpo.module import PreferenceModule


def set_up(module: PreferenceModule, data: PreferenceDataModule, trainer: Trainer) -> None:
    """Read the data as a fit would; with a partition, all of its steps as one."""
    data.trainer, data.tokenizer = trainer, module.tokenizer
    data.setup("fit")
    if data.stepwise:
        data.training.use_rows(torch.arange(len(data.training.pool)))


@contextmanager
def without_news() -> Iterator[None]:
    """Leave out what a run says of itself, which a tool says in its own order; warnings stay."""
    names = ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed")
    before = {logger: logger.level for logger in map(logging.getLogger, names)}
    for logger in before:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for logger, level in before.items():
            logger.setLevel(level)


def special_ids(tokenizer: Any) -> set[int]:
    """Ids of the special tokens of a tokenizer, those that were added to it too."""
    return {*tokenizer.all_special_ids, *(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)}


def nearest(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    return next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())


def writable(folder: Path) -> bool:
    """Whether it is a folder in which something can be made."""
    return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)
