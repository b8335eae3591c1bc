"""The cached reference: every row scored once, by the policy itself, and kept on disk."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, partial, reduce
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_dpo.checkpoints.journal import Journal
from lit_dpo.checkpoints.tensor_store import TensorStore, cache_folder
from lit_dpo.models import Dtype
from lit_dpo.pair_data import pair_data
from lit_dpo.pairs import PairBatch, PairLogps
from lit_dpo.references.base import Filling, Reference, Start
from lit_dpo.references.reference_pass import Pass, columns_of, score_rows
from lit_dpo.references.table import LogpsTable, content_keys, fingerprint, first_of_each, joined
from lit_dpo.scoring.attention import NUMERICS, flash_here
from lit_dpo.scoring.decoder import own_tensors
from lit_dpo.scoring.logps import sum_by_completion
from lit_dpo.scoring.score import SHARDED_METHOD, Scorer


@dataclass(eq=False)
class CachedReference(Reference):
    """Reference log-probs computed once and kept: no second model in memory, no second forward pass a step.

    Every row is scored at the start of a run, by the reference `of`, or else by the policy itself before its first step
    (with LoRA: adapters off), so that rewards are zero there by construction. The values are stored and reused by later
    runs and epochs, whatever their loss, beta, learning rate, seed or LoRA rank; they are missed as soon as weights,
    configuration, token ids, dtype, precision, form, device or what `of` says of itself differ. Damaged files are
    noticed and rebuilt; a few reused rows are scored again and compared. What is scored is kept as it comes: a pass
    that was killed goes on where it stood, to the same values. Log-probs of single tokens are kept where a loss needs
    them; what holds sums alone is then scored again.

    Args:
        folder: Where the values are kept; `None` is `$LIT_DPO_CACHE` or `~/.cache/lit_dpo`.
        audit_rows: Reused rows to score again at the start of a run.
        of: The reference whose values are kept; `None` is the policy before its first step. Its models wait in the
            CPU's memory while the policy trains, unless they are sharded.

    Raises:
        ValueError: `of` is no reference, keeps its own values, or changes while the policy trains.

    Attributes:
        scored: Rows scored at the start of the last run.
        reused: Rows found in the cache then.
        seconds: Wall time that took.
    """

    folder: str | None = None
    audit_rows: int = 4
    of: Reference | None = None

    def __post_init__(self) -> None:
        if self.of is not None and (not isinstance(self.of, Reference) or isinstance(self.of, CachedReference)):
            raise ValueError(f"`of` must be a reference that is not cached itself, got {self.of!r}.")
        if self.of is not None and (moving := self.of.moving()):
            raise ValueError(
                f"`{type(moving[0]).__name__}` changes while the policy trains, and its values cannot be kept: "
                "use it without `CachedReference`."
            )
        self.scored, self.reused, self.seconds = 0, 0, 0.0
        self._who: dict[str, Any] = {}
        self._table: LogpsTable | None = None

    def build(self, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, dtype: Dtype) -> None:
        """Remember who will have scored: the policy's starting weights and configuration."""
        noise = ("transformers_version", "_name_or_path", "architectures", "use_cache")
        config = {k: v for k, v in policy.config.to_dict().items() if k not in noise}
        self._who = {"config": json.loads(json.dumps(config, default=str)), "dtype": dtype}
        if policy.device.type != "meta":
            self._who["weights"] = fingerprint(own_tensors(policy))
        self._table = None
        super().build(policy, tokenizer, dtype)

    def fill(self, policy: nn.Module, filling: Filling) -> None:
        """Remember the weights that are sharded."""
        self._who["weights"] = fingerprint(own_tensors(policy))
        super().fill(policy, filling)

    def _move_models(self, device: torch.device) -> None:
        """Take the models of `of` to a device, unless they are sharded."""
        for model in self.models():
            if not hasattr(model, SHARDED_METHOD):
                model.to(device)

    def prepare(self, start: Start) -> None:
        """Read what is stored, score what is missing, write it back.

        Raises:
            ValueError: The data module cannot say which rows there will be.
            OSError: Rows are to be scored, and the folder cannot be written to.
        """
        data = pair_data(start.trainer)
        if data is None:
            raise ValueError(
                "`CachedReference` needs a `PreferenceDataModule`; with other loaders use `FrozenReference`."
            )
        began = time.perf_counter()
        super().prepare(start)
        self._move_models(start.trainer.strategy.root_device)
        identity = {
            **self._who,
            "precision": str(start.trainer.precision),
            "device": start.trainer.strategy.root_device.type,
            "attention": [NUMERICS, "flash" if flash_here(start.trainer.strategy.root_device) else "pairs"],
            "layout": start.scorer.form,  # the name of 0.1.0, whose values still serve
            "adapter": "off" if hasattr(start.policy, "peft_config") else "none",
        }
        if self.of is not None:
            identity["of"] = json.loads(json.dumps(self.of.identity(), default=str))
        store = TensorStore(Path(self.folder).expanduser() if self.folder else cache_folder(), identity)
        first = start.trainer.is_global_zero
        tensors, problem, journals = _stored(store) if first else (None, None, {})
        tensors, problem = start.trainer.strategy.broadcast((tensors, problem))
        table = None if tensors is None else LogpsTable.from_tensors(tensors)
        if problem:
            rank_zero_info(f"Reference cache {store.data} is damaged ({problem}): scoring anew.")
        columns, per_token = columns_of(start.scorer), start.scorer.per_token
        model = cache(partial(self._starting_model, start))  # found out at most once, and only if asked
        visits = [
            (rows, dataset.content_keys(rows), loader)
            for dataset, rows, loader in data.reference_sets(start.trainer.state.fn or "fit")
        ]
        keep = True  # what others have stored meanwhile
        for rows, keys, loader in visits:
            stored = _known(table, keys, columns, per_token)
            if table is not None and not self._agrees(model, start, table, loader, rows[stored]):
                rank_zero_info(f"Reference cache {store.data} differs from the model's own log-probs: scoring anew.")
                table, keep = None, False
        self.scored, self.reused = 0, 0
        missing = torch.cat([keys[~_known(table, keys, columns, per_token)] for _, keys, _ in visits]).unique(dim=0)
        with Pass(start.trainer, store, len(missing)) as under_way:
            for rows, keys, loader in visits:
                known = _known(table, keys, columns, per_token)
                if not known.all():
                    # Of equal rows the first: so what a pass that goes on has left to score is the end of the whole.
                    places = first_of_each(keys[~known])[1].sort().values
                    fresh = score_rows(self.of, model, start, loader(rows[~known][places]), start.scorer, under_way)
                    table = fresh if table is None else table.merged(fresh)
                self.scored += int((~known).sum())
                self.reused += int(known.sum())
        self._table = table
        self._move_models(torch.device("cpu"))
        kept = ""
        if first and table is not None and (self.scored or journals):
            try:
                store.write(table.tensors(), _merge if keep else None)
                Journal.clear(journals)
                under_way.remove()
                kept = f"; kept in {store.data}"
            except OSError as error:
                kept = f"; they could not be kept in {store.folder} ({error})"
        self.seconds = time.perf_counter() - began
        rank_zero_info(f"Reference: {self.scored} rows scored, {self.reused} reused, {self.seconds:.1f} s{kept}")

    def _starting_model(self, start: Start) -> nn.Module:
        """The model to score with: the policy, unless a checkpoint has been restored into it."""
        if fingerprint(own_tensors(start.policy)) == self._who["weights"]:
            return start.policy
        return start.reload().to(start.trainer.strategy.root_device)

    def _agrees(
        self, model: Callable[[], nn.Module], start: Start, table: LogpsTable, loader: Any, rows: Tensor
    ) -> bool:
        """Score a few of these stored rows again and compare."""
        if not self.audit_rows or not len(rows):
            return True
        some = rows[torch.linspace(0, len(rows) - 1, min(self.audit_rows, len(rows))).long()]
        fresh = score_rows(self.of, model, start, loader(some), replace(start.scorer, layers=()))
        places, there = table.find(fresh.keys)
        pairs = [(table.columns["last"][places], fresh.columns["last"])]
        for name, live in fresh.tokens.items():
            kept = table.tokens[name].take(places)
            if not torch.equal(kept.counts, live.counts):
                return False
            pairs.append((kept.values, live.values))
        exact = pairs[0][1].dtype == torch.float64 or start.trainer.precision == "32-true"
        limit = 1e-3 if exact else 0.5  # nats
        return bool(there.all()) and all(float((stored - live).abs().max()) <= limit for stored, live in pairs)

    def score(self, policy: nn.Module, batch: PairBatch, scorer: Scorer) -> PairLogps:
        """The stored log-probs of a batch."""
        if self._table is None:
            raise RuntimeError("Nothing is cached yet: `prepare` comes before `score`.")
        if self._table.keys.device != batch.input_ids.device:
            self._table = self._table.to(batch.input_ids.device)
        table = self._table
        rows, there = table.find(content_keys(batch))
        if there.device.type == "cpu" and not there.all():
            missing = batch.row_ids[~there].tolist()
            raise RuntimeError(f"Rows {missing} were not there when the reference was scored.")

        def logps(
            column: str,
        ) -> PairLogps:  # NaN where nothing is, without waiting for the device
            tokens = None
            if scorer.per_token:
                tokens = table.tokens[column].of_batch(rows, there, batch)
                values = sum_by_completion(tokens, batch.completion_lengths).view(-1, 2)  # as scoring adds them up
            else:
                values = torch.where(there[:, None], table.columns[column][rows], torch.nan)
            counts = batch.completion_lengths.view(-1, 2)
            return PairLogps(values[:, 0], values[:, 1], counts[:, 0], counts[:, 1], tokens=tokens)

        last, *between = (logps(column) for column in columns_of(scorer))
        return replace(last, layers={int(k): found for k, found in zip(scorer.layers, between, strict=True)})


def _stored(store: TensorStore) -> tuple[dict[str, Tensor] | None, str | None, dict[Path, int]]:
    """What is stored and what journals hold, as one table; what is wrong with the store; and the journals' sizes."""
    tensors, problem = store.read(LogpsTable.problem)
    blocks, sizes = Journal.read_all(store)
    table = None
    try:
        table = None if tensors is None else LogpsTable.from_tensors(tensors)
    except ValueError as error:
        problem = str(error)
    with suppress(ValueError):  # of a forged journal
        journals = joined([LogpsTable.from_tensors(block) for block in blocks])
        if journals:
            rank_zero_info(f"Reference: {sum(map(len, journals))} rows of a pass that was cut short are there")
        # Where two know a value, the store's counts.
        table = reduce(LogpsTable.merged, [*journals, *([] if table is None else [table])]) if journals else table
    return None if table is None else table.tensors(), problem, sizes


def _merge(there: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """What another run has stored meanwhile, and our values, which count where both know one."""
    try:
        return LogpsTable.from_tensors(there).merged(LogpsTable.from_tensors(ours)).tensors()
    except ValueError:
        return ours


def _known(table: LogpsTable | None, keys: Tensor, columns: Sequence[str], per_token: bool) -> Tensor:
    return torch.zeros(len(keys), dtype=torch.bool) if table is None else table.known(keys, columns, per_token)
