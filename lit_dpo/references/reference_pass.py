"""The pass over the rows in which a cached reference is scored."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from lit_dpo.checkpoints.journal import Journal
from lit_dpo.checkpoints.tensor_store import TensorStore
from lit_dpo.pairs import PairLogps
from lit_dpo.references.base import Reference, Start, refuse_incomplete, scored_by
from lit_dpo.references.table import LogpsTable, TokenLogps, content_keys, first_of_each, joined
from lit_dpo.scoring.decoder import adapters_off
from lit_dpo.scoring.score import Scorer

_SECONDS, _SHARE = 2.0, 0.05  # between two blocks of the journal: at most so long, and so much of what is scored


class Pass:
    """Scoring under way: what there is of it is written to a journal, and a terminal shows how far it is.

    Args:
        trainer: The Trainer whose processes score.
        store: Where the values will go.
        rows: How many are to be scored; without any, nothing is opened.

    Raises:
        OSError: (on entering, on every process) The cache cannot be written to.
    """

    def __init__(self, trainer: Trainer, store: TensorStore, rows: int) -> None:
        self.trainer, self.store, self.rows = trainer, store, rows
        self._writer: Journal | None = None
        self._full = False
        self._bar: Progress | None = None

    def __enter__(self) -> Pass:
        problem = None
        if self.rows and self.trainer.is_global_zero:
            try:
                self._writer = Journal(self.store)
            except OSError as error:
                problem = str(error)
        if problem := self.trainer.strategy.broadcast(problem):
            raise OSError(
                f"The reference cache `{self.store.folder}` cannot be written to ({problem}): name another `folder` of "
                "`CachedReference`, or set the environment variable LIT_DPO_CACHE."
            )
        console = Console(stderr=True)
        quiet = self.trainer.progress_bar_callback is None or self.trainer.state.fn != "fit"  # else it has begun
        if self._writer is not None and console.is_terminal and not quiet:
            shown = (BarColumn(), MofNCompleteColumn(), TextColumn("rows, left:"), TimeRemainingColumn())
            self._bar = Progress("Reference", *shown, console=console, transient=True)
            self._bar.start()
            self._task = self._bar.add_task("", total=self.rows)
        return self

    def show(self, rows: int) -> None:
        """So many more rows are scored."""
        if self._bar is not None:
            self._bar.advance(self._task, rows)

    def keep(self, block: LogpsTable) -> None:
        """Write a block, on the first process; if that fails, this pass is not kept, but it goes on."""
        if self._writer is None or self._full:
            return
        try:
            self._writer.append(block.tensors())
        except OSError as error:
            self._full = True
            rank_zero_info(f"Reference: what is scored from now on would not survive a kill ({error}).")

    def remove(self) -> None:
        """Remove the journal, as everything is in the store."""
        if self._writer is not None:
            self._writer.path.unlink(missing_ok=True)

    def __exit__(self, *error: object) -> None:
        if self._writer is not None:
            self._writer.close()
        if self._bar is not None:
            self._bar.stop()


def columns_of(scorer: Scorer) -> list[str]:
    """Names in a table of what a scorer is asked for."""
    return ["last", *(f"layer.{int(k)}" for k in scorer.layers)]


@torch.no_grad()
def score_rows(
    of: Reference | None,
    model: Callable[[], nn.Module],
    start: Start,
    loader: Any,
    scorer: Scorer,
    under_way: Pass | None = None,
) -> LogpsTable:
    """Score every row of a loader, each process its share, and gather the results on all: now and then, to be kept.

    Args:
        of: What gives the log-probs; `None` is the model, its adapters switched off.
        model: Gives the policy before its first step.
        start: What is there at the start of the run.
        loader: The batches, as many on every process.
        scorer: What is asked for.
        under_way: Is told, and keeps each block.

    Raises:
        ValueError: `of` does not give what was asked for.
    """
    strategy, scored = start.trainer.strategy, model()
    columns, blocks = columns_of(scorer), []
    found: list[tuple[Tensor, PairLogps]] = []  # content keys and log-probs of each batch since the last block
    began, due = time.perf_counter(), 1
    for number, batch in enumerate(loader, 1):
        batch = strategy.batch_to_device(batch)
        with start.trainer.precision_plugin.forward_context():
            if of is None:
                with adapters_off(scored):
                    logps = scorer(scored, batch)
            else:
                logps = scored_by(of, scored, batch, scorer)
        refuse_incomplete(of, logps, scorer)
        found.append((content_keys(batch), logps))
        if under_way is not None:
            under_way.show(len(batch) * start.trainer.world_size)
        if number == due or number == len(loader):
            keys = torch.cat([keys for keys, _ in found])
            logps = PairLogps.cat([logps for _, logps in found])
            blocks.append(
                _gathered(start.trainer, keys, dict(zip(columns, (logps, *logps.layers.values()), strict=True)))
            )
            if under_way is not None:
                under_way.keep(blocks[-1])
            found = []
            passed = time.perf_counter() - began
            due = number + strategy.broadcast(max(1, int(number * min(_SECONDS / passed, _SHARE))))
    return joined(blocks)[0]


def _gathered(trainer: Trainer, keys: Tensor, logps: Mapping[str, PairLogps]) -> LogpsTable:
    """What the processes have scored, as many rows each, as one table on all of them."""
    strategy = trainer.strategy
    keys = strategy.all_gather(keys).reshape(-1, 2).cpu()
    unique, first = first_of_each(keys)
    columns, tokens = {}, {}
    for name, found in logps.items():
        sums = strategy.all_gather(torch.stack([found.chosen, found.rejected], 1))
        columns[name] = sums.reshape(-1, 2).cpu()[first]
        if found.tokens is not None:
            counts = strategy.all_gather(found.chosen_tokens + found.rejected_tokens).reshape(trainer.world_size, -1)
            totals = counts.sum(1).tolist()
            values = F.pad(found.tokens, (0, max(totals) - len(found.tokens)))  # every process gathers as many
            values = strategy.all_gather(values).reshape(trainer.world_size, -1).cpu()
            values = torch.cat([line[:total] for line, total in zip(values, totals, strict=True)])
            tokens[name] = TokenLogps(values, counts.flatten().cpu()).take(first)
    return LogpsTable(unique, columns, tokens)
