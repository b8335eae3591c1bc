"""What libraries say that is no news to a person at the command line, left out while a command runs."""

from __future__ import annotations

import logging
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lit_dpo.export import without_bars

_NO_NEWS = (
    ".*does not have many workers.*",  # pairs are in memory as token ids: worker processes would only cost
    ".*Couldn't infer the batch indices.*",  # the sampler makes whole batches; predictions carry their row numbers
    ".*LightningCLI's args parameter.*",  # `main` passes them on, which is what that parameter is for
    "Experiment logs directory .* exists and is not empty.*",  # of a resumed run: see `rotate_metrics`
    "Checkpoint directory .* exists and is not empty.*",  # the same
    ".*isinstance.treespec, LeafSpec.*",  # Lightning 2.6 on PyTorch 2.13
)
_ONLY_FOR_TRAINING = (  # is what a checkpoint knows of callbacks
    "The dirpath has changed from.*",
    "Be aware that when using `ckpt_path`.*",
)
_LOGGED = r"💡|TPU available|Loading `\w+` to estimate number of stepping batches"  # by Lightning
_LOGGED_FOR_TRAINING = r"so the best checkpoint is found anew"


@contextmanager
def quiet(training: bool) -> Iterator[None]:
    """Leave out what is no news, and write warnings without the line of code they come from.

    Args:
        training: The command trains; what a checkpoint holds for training matters to no other.
    """
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    with warnings.catch_warnings(), without_bars(not sys.stderr.isatty()):
        for message in (*_NO_NEWS, *(() if training else _ONLY_FOR_TRAINING)):
            warnings.filterwarnings("ignore", message)
        before, warnings.formatwarning = warnings.formatwarning, _format
        no_news = re.compile(_LOGGED if training else f"{_LOGGED}|{_LOGGED_FOR_TRAINING}")

        def is_news(record: logging.LogRecord) -> bool:
            return not no_news.search(record.getMessage())

        logger.addFilter(is_news)
        try:
            yield
        finally:
            logger.removeFilter(is_news)
            warnings.formatwarning = before


def _format(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> str:
    return f"Warning: {message}\n"
