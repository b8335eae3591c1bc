"""The Lightning side of the data: files to loaders, one partition at a time."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader

from lit_dpo.data.changes import record, refuse_changes
from lit_dpo.data.dataset import PairDataset
from lit_dpo.data.encode import PairEncoder, Truncation, read_template
from lit_dpo.data.load import EncodedRow, OnBadRow, Rows, load_pairs, sources_of
from lit_dpo.data.loader import ResumableLoader
from lit_dpo.data.partition import OneShot, Partition
from lit_dpo.data.read import MAX_LINE_BYTES
from lit_dpo.data.report import LoadReport
from lit_dpo.data.rows import PairPolicy, Reading, RowMap
from lit_dpo.data.sampler import PairSampler
from lit_dpo.data.shares import drawn
from lit_dpo.data.token_cache import TokenCache
from lit_dpo.data.validation import held_out, overlap
from lit_dpo.pairs import PairBatch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class PreferenceDataModule(LightningDataModule):
    """Preference pairs from files, folders and hub data sets, as flat batches.

    Rows may hold text or chat messages, with the prompt given or contained in both completions; see docs/data.md. The
    tokenizer comes from the module that trains.

    Args:
        train: Data sources: local files (jsonl, json, csv, parquet, gzipped too), folders, ``save_to_disk`` folders,
            hub names; ``name:split`` picks a split. ``quickstart`` is the small embedded set. In Python also rows in
            memory: a list of dictionaries or a `datasets.Dataset`, here and for the other three.
        validation: Sources of the validation pairs; without any, `validation_fraction` of the training pairs.
        test: Sources for ``test``, and for ``predict`` unless `predict` is given; without any, the validation pairs.
        predict: Sources for ``predict``. ``train`` means the pairs that are trained on, in their order; a folder
            of that name is ``./train``.
        validation_fraction: Share of training pairs to hold out, in [0, 1); pairs of one prompt stay together. With 0
            all are trained on, and there is no validation unless `validation` names sources.
        batch_size: Pairs a batch on each process.
        eval_batch_size: The same for validation, test and predict; ``None`` means twice `batch_size`.
        max_length: Most tokens of prompt and one completion together.
        truncation: ``keep_start`` cuts completions' ends and refuses longer prompts; ``keep_end`` cuts prompts' starts
            first.
        keep_template_end: Keep what the chat template prints behind the last end of turn (mostly a newline), as TRL.
        append_eos: End completions with the EOS token; without it the model learns nothing about where to end.
        chat_template: A chat template in the place of the tokenizer's own: the path of a ``.jinja`` file, or its text.
            Checkpoints and exports keep it.
        columns: Own names for the columns of a layout, as ``{question: q, chosen: good, rejected: bad}``.
        rows: A function from a row to a row of a known layout, or to ``None`` for a row to be left out. On the command
            line its import path, whose package ``--allow-import`` has to allow.
        ignored_columns: Columns that are left aside although their names say that they belong to the prompt, or that
            they tell which answer is better.
        text_as_turns: Render rows of plain text as turns of a conversation, through the chat template.
        pairs: Pairs of several ranked answers: ``best_worst``, ``adjacent`` ones, or ``all``.
        max_pairs: Most pairs of one prompt of such rows, those with the largest difference first.
        weights: Source -> how often its training pairs are seen in an epoch: 2 is twice, 0.5 is half of them.
        max_per_source: Most training pairs of a source, drawn at random.
        values: Names of columns of numbers that travel with the rows to the loss. ``weight`` multiplies the loss of
            its pair, whatever the loss; the mean is still taken over the number of pairs. Every row has to have them,
            those of `predict` apart, which meet no loss.
        on_bad_row: ``error`` stops, with the first malformed row and the number of others; ``skip`` leaves them out and
            reports them, ``warn`` does so in a warning that names them.
        max_bad_share: Largest share of malformed rows to go on with, in [0, 1].
        partition: How training is split into steps (stepwise DPO); more than one step needs `fit_stepwise`.
        num_workers: Processes that make batches; pairs are in memory as token ids, so 0 is rarely slower.
        seed: Of the order of pairs and of the held-out share.
        tokenizer: A tokenizer object, for use without a `PreferenceModule`.
        cache_tokens: Keep the token ids of large sources in ``$LIT_DPO_CACHE`` or ``~/.cache/lit_dpo``, for later runs
            and for the other processes of a node. Any change of row, tokenizer, template or limit is noticed.
        max_line_bytes: Most bytes, decompressed, of a line of a data file, and of a whole ``.json`` file that is no
            JSON lines; a longer one is refused by its number instead of filling the memory.

    Attributes:
        allow_changes: Resume from a checkpoint of other training data than these.

    Raises:
        ValueError: An option is out of its range.
    """

    def __init__(
        self,
        train: str | list[str] = "quickstart",
        validation: str | list[str] | None = None,
        test: str | list[str] | None = None,
        predict: str | list[str] | None = None,
        validation_fraction: float = 0.1,
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        max_length: int = 1024,
        truncation: Truncation = "keep_start",
        append_eos: bool = True,
        chat_template: str | None = None,
        columns: dict[str, str] | None = None,
        values: list[str] | None = None,
        rows: RowMap | None = None,
        ignored_columns: list[str] | None = None,
        text_as_turns: bool = False,
        keep_template_end: bool = False,
        pairs: PairPolicy = "best_worst",
        max_pairs: int | None = None,
        weights: dict[str, float] | None = None,
        max_per_source: int | None = None,
        on_bad_row: OnBadRow = "error",
        max_bad_share: float = 0.5,
        partition: Partition | None = None,
        num_workers: int = 0,
        seed: int = 0,
        tokenizer: PreTrainedTokenizerBase | None = None,
        cache_tokens: bool = True,
        max_line_bytes: int = MAX_LINE_BYTES,
    ) -> None:
        super().__init__()
        if max_line_bytes < 1:
            raise ValueError(f"`max_line_bytes` must be at least 1, got {max_line_bytes}.")
        for name, size in (("batch_size", batch_size), ("eval_batch_size", eval_batch_size or 1)):
            if size < 1:
                raise ValueError(f"`{name}` must be at least 1, got {size}.")
        if not 0 <= validation_fraction < 1:
            raise ValueError(f"`validation_fraction` must be at least 0 and less than 1, got {validation_fraction}.")
        if not 0 <= max_bad_share <= 1:
            raise ValueError(f"`max_bad_share` must be between 0 and 1, got {max_bad_share}.")
        if max_per_source is not None and max_per_source < 1:
            raise ValueError(f"`max_per_source` must be at least 1, got {max_per_source}.")
        self.reading = Reading(columns, text_as_turns, pairs, max_pairs, tuple(ignored_columns or ()), rows)
        self.weights, self.max_per_source = weights, max_per_source
        self.max_bad_share, self.keep_template_end = max_bad_share, keep_template_end
        if isinstance(values, str) or len({*(values or ())}) < len(values or ()):
            raise ValueError(f"`values` must be a list of different column names, got {values!r}.")
        self.values = list(values or ())
        given = {"train": train, "validation": validation, "test": test, "predict": predict}
        self._given = {name: sources_of(sources, name) for name, sources in given.items()}
        memory = {name: [str(s) for s in self._given[name]] for name in given if _in_memory(self._given[name])}
        self.sources = {**given, **memory}  # plain values: they go into checkpoints and model cards
        self.validation_fraction = validation_fraction
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size or 2 * batch_size
        self.max_length, self.truncation, self.columns, self.on_bad_row = max_length, truncation, columns, on_bad_row
        self.append_eos, self.chat_template = append_eos, chat_template and read_template(chat_template)
        self.partition = partition or OneShot()
        self.num_workers, self.seed, self.tokenizer, self.cache_tokens = num_workers, seed, tokenizer, cache_tokens
        self.allow_changes = False  # no option: a configuration file must not say so
        self.max_line_bytes = max_line_bytes
        self.parts: list[Tensor] | None = None
        self.part: int | None = None
        self._sets: dict[str, PairDataset] = {}
        self._train_rows = torch.arange(0)

    @property
    def stepwise(self) -> bool:
        """Whether the partition may have more than one part."""
        return not isinstance(self.partition, OneShot)

    @property
    def has_validation(self) -> bool:
        """Whether there are pairs to validate on besides those trained on."""
        return bool(self.sources["validation"]) or self.validation_fraction > 0

    @property
    def _predicts_training(self) -> bool:
        return self._given["predict"] == ["train"]

    def prepare_data(self) -> None:
        """Fill the token cache on one process of each node, so that the others only read; errors wait for `setup`."""
        if self.trainer is None or self.trainer.world_size == 1 or not self.cache_tokens:
            return
        held_out = self._held_out_source(self.trainer.state.fn or "fit")
        training = held_out is None or (held_out == "predict" and self._predicts_training)
        names = ["train", "validation"] if training else [str(held_out)]
        with suppress(ValueError, OSError):
            if self._encoder().identity() is None:
                return  # nothing can be kept, so that everyone would encode again
            for name in names:
                if self.sources[name] and name not in self._sets:
                    self._read(name)

    def setup(self, stage: str) -> None:
        """Read and encode what the stage needs, once; every row is trained on, held out, or reported.

        Raises:
            ValueError: There is no tokenizer, or no row to train on, or a row is malformed.
            FileNotFoundError: A file is missing.
        """
        module = getattr(self.trainer, "lightning_module", None)
        if self.chat_template and module is not None and hasattr(module, "tokenizer"):
            module.tokenizer.chat_template = self.chat_template  # for what is sampled and exported
        if stage == "fit" and self.trainer is not None and not self.has_validation:
            self._limit, self.trainer.limit_val_batches = self.trainer.limit_val_batches, 0
        name = self._held_out_source(stage)
        if name == "predict" and self._predicts_training:
            self._setup_fit()
            self._sets["predict"] = self._sets["train"]
        elif name is None:
            if stage != "fit" and not self.has_validation:
                raise ValueError(
                    f"There are no pairs to {stage} on: name sources for it, or set a `validation_fraction` above 0."
                )
            self._setup_fit()
        elif name not in self._sets:
            self._sets[name] = self._load(name)

    def teardown(self, stage: str) -> None:
        """Give the Trainer back its `limit_val_batches`, which `setup` takes away where there is no validation."""
        if stage == "fit" and self.trainer is not None and self._limit is not None:
            self.trainer.limit_val_batches, self._limit = self._limit, None

    def _held_out_source(self, stage: str) -> str | None:
        """The option that a stage reads its pairs from; ``None`` means that it needs the training pairs."""
        order = ("predict", "test", "validation")
        start = {"predict": 0, "test": 1, "validate": 2}.get(stage, len(order))
        return next((name for name in order[start:] if self.sources[name]), None)

    def _setup_fit(self) -> None:
        if "train" in self._sets:
            return
        train = self._load("train")
        everything = torch.arange(len(train))
        if self.sources["validation"]:
            if "validation" not in self._sets:
                self._sets["validation"] = self._load("validation")
            self._train_rows = everything
            if shared := overlap(train, self._sets["validation"]):
                rank_zero_info(f"validation: {shared}")
        elif self.has_validation:
            chosen = held_out(train, self.validation_fraction, self.seed)
            self._sets["validation"], self._validation_rows = train, everything[chosen]
            self._train_rows = everything[~chosen]
            rank_zero_info(f"validation: {int(chosen.sum())} pairs held out of {len(train)}")
        else:
            self._train_rows = everything
            rank_zero_info(f"validation: none, as `validation_fraction` is 0; all {len(train)} pairs are trained on")
        self._train_rows = drawn(self._train_rows, train.sources, self.weights, self.max_per_source, self.seed)
        if self.weights or self.max_per_source:
            rank_zero_info(f"train: {len(self._train_rows)} pairs an epoch, by `weights` and `max_per_source`")
        self._sets["train"] = train

    _validation_rows: Tensor | None = None
    _limit: float | None = None

    def _load(self, name: str) -> PairDataset:
        rows, report, reused = self._read(name)
        rank_zero_info(f"{name}: {report}")
        tokenizer = self._tokenizer()
        rank_zero_info(
            report.overview(lambda ids: str(tokenizer.decode(ids)), bool(self.chat_template or tokenizer.chat_template))
        )
        if self.on_bad_row == "warn" and report.bad:
            rank_zero_warn(f"{name}: {report.bad.total()} malformed rows are left out:\n" + "\n".join(report.bad_rows))
        if reused:
            rank_zero_info(f"{name}: token ids of {reused} rows found in the token cache")
        return PairDataset(rows)

    def _read(self, name: str) -> tuple[list[EncodedRow], LoadReport, int]:
        """The encoded rows of an option, the account of them, and how many were found in the token cache."""
        options: dict[str, Any] = {
            "on_bad_row": self.on_bad_row,
            "max_line_bytes": self.max_line_bytes,
            "values": () if name == "predict" else self.values,
            "reading": self.reading,
            "max_bad_share": self.max_bad_share,
        }
        if not self.cache_tokens:
            return *load_pairs(self._given[name], self._encoder(), **options), 0
        tokens = TokenCache(
            self._encoder(), [s if isinstance(s, str) else f"rows: {s.name}" for s in self._given[name]]
        )
        rows, report = load_pairs(self._given[name], tokens, **options)
        tokens.keep()
        return rows, report, tokens.reused

    def _encoder(self) -> PairEncoder:
        options = (self.max_length, self.truncation, self.append_eos, self.chat_template, self.keep_template_end)
        return PairEncoder(self._tokenizer(), *options)

    def _tokenizer(self) -> PreTrainedTokenizerBase:
        tokenizer = self.tokenizer or getattr(getattr(self.trainer, "lightning_module", None), "tokenizer", None)
        if tokenizer is None:
            raise ValueError("No tokenizer: train with a `PreferenceModule`, or give the data module a `tokenizer`.")
        return tokenizer

    # -- the same data when a run resumes -----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint: a hash of every row, and of which are trained on."""
        train = self._sets.get("train")
        return {} if train is None else dict(record(train, self._own_validation, self.training_rows(), self.seed))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuse to go on with training from a checkpoint of other rows, unless `allow_changes`.

        Raises:
            ValueError: Rows were added, removed, moved or changed, or other ones are held out; shows which.
        """
        if self.trainer is not None and self.trainer.state.fn == "fit":
            self.refuse_changes(state_dict, "the checkpoint", self.state_dict()["order"])

    def refuse_changes(self, saved: object, where: str, order: str | None = None) -> None:
        """Compare the data with an earlier `state_dict`; see `lit_dpo.data.changes.refuse_changes`."""
        refuse_changes(saved, self._sets["train"], self._own_validation, order, where, self.allow_changes)

    @property
    def _own_validation(self) -> PairDataset | None:
        return self._sets["validation"] if self.sources["validation"] else None

    # -- partitions ---------------------------------------------------------------------------------------------------

    @property
    def pool_size(self) -> int:
        """Rows of the training set, held-out ones included."""
        return len(self._sets["train"])

    def split(self, margins: Tensor | None = None) -> list[Tensor]:
        """Split the training pairs into the partition's parts, once.

        Args:
            margins: Starting model's chosen minus rejected log-prob of every row of the training set, in nats, for a
                partition that `needs_margins`.
        """
        if self.parts is None:
            sources = [self._sets["train"].sources[row] for row in self._train_rows.tolist()]
            pool_margins = None if margins is None else margins[self._train_rows]
            self.parts = [self._train_rows[part] for part in self.partition.split(sources, pool_margins)]
        return self.parts

    def use_part(self, part: int) -> None:
        """Train on this part of the partition from now on, counted from 0."""
        self.part = part

    def training_rows(self) -> Tensor:
        """Row numbers trained on now.

        Raises:
            ValueError: The partition has several parts and none was chosen.
        """
        if self.part is None and self.stepwise:
            raise ValueError(
                f"`{type(self.partition).__name__}` trains in several steps: call `fit_stepwise`, or use `OneShot`."
            )
        return self._train_rows if self.part is None else self.split()[self.part]

    # -- loaders ------------------------------------------------------------------------------------------------------

    def train_dataloader(self) -> DataLoader[PairBatch]:
        """Training pairs of the current part, shuffled, pairs of similar length together."""
        accumulate = self.trainer.accumulate_grad_batches if self.trainer else 1
        loader = self._loader("train", self.training_rows(), self.batch_size, shuffle=True, accumulate=accumulate)
        loader.sampler.limit = self._batches(len(loader))  # type: ignore[attr-defined]
        return loader

    def _batches(self, batches: int) -> int:
        """How many of an epoch's batches the Trainer's `limit_train_batches` lets through."""
        limit = self.trainer.limit_train_batches if self.trainer else 1.0
        return min(batches, limit) if isinstance(limit, int) else int(batches * limit)

    def val_dataloader(self) -> DataLoader[PairBatch] | list[Any]:
        """Validation pairs, long ones first; nothing if there are none."""
        if "validation" not in self._sets:
            return []
        return self._loader("validation", self._validation_rows, self.eval_batch_size)

    def test_dataloader(self) -> DataLoader[PairBatch] | list[Any]:
        """Test pairs, or the validation pairs if there are none."""
        if "test" not in self._sets:
            return self.val_dataloader()
        return self._loader("test", None, self.eval_batch_size)

    def predict_dataloader(self) -> DataLoader[PairBatch] | list[Any]:
        """Predict pairs, else test pairs, else validation pairs."""
        if "predict" not in self._sets:
            return self.test_dataloader()
        return self._loader("predict", self._rows_to_predict, self.eval_batch_size)

    @property
    def _rows_to_predict(self) -> Tensor | None:
        return self._train_rows if self._predicts_training else None

    def pool_dataloader(self) -> DataLoader[PairBatch]:
        """All training pairs of all parts, in no random order, for scoring."""
        return self._loader("train", self._train_rows, self.eval_batch_size)

    def reference_sets(
        self, stage: str
    ) -> Iterator[tuple[PairDataset, Tensor, Callable[[Tensor], DataLoader[PairBatch]]]]:
        """What a stage will see: data set, row numbers, and a function from row numbers to a loader."""
        rows: dict[str, Tensor | None] = {}
        if stage == "fit":
            rows["train"] = self.training_rows()
        if stage == "validate" or (stage == "fit" and self.trainer and self.trainer.limit_val_batches != 0):
            rows |= {"validation": self._validation_rows} if "validation" in self._sets else {}
        elif stage != "fit":
            names = ("predict", "test", "validation") if stage == "predict" else ("test", "validation")
            for name in [name for name in names if name in self._sets][:1]:
                rows[name] = {"validation": self._validation_rows, "predict": self._rows_to_predict}.get(name)
        for name, numbers in rows.items():
            dataset = self._sets[name]
            everything = torch.arange(len(dataset)) if numbers is None else numbers
            yield dataset, everything, partial(self._loader, name, batch_size=self.eval_batch_size)

    def _loader(
        self, name: str, rows: Tensor | None, batch_size: int, shuffle: bool = False, accumulate: int = 1
    ) -> DataLoader[PairBatch]:
        if self.trainer and self.trainer.overfit_batches:  # type: ignore[attr-defined]
            raise ValueError(
                "`overfit_batches` is not supported, because Lightning would replace the sampler that makes the "
                "batches: give `train` a small file instead, or use `limit_train_batches`."
            )
        dataset = self._sets[name]
        processes = self.trainer.distributed_sampler_kwargs if self.trainer else {}
        sampler = PairSampler(
            dataset,
            torch.arange(len(dataset)) if rows is None else rows,
            batch_size,
            shuffle=shuffle,
            seed=self.seed,
            accumulate=accumulate,
            **(processes or {}),
        )
        # The sampler yields whole batches, so automatic batching is off.
        loader = (ResumableLoader if shuffle else DataLoader)(
            dataset,
            batch_size=None,
            sampler=sampler,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0,
            worker_init_fn=_leave_signals,
        )
        if isinstance(loader, ResumableLoader):
            loader.trainer = self.trainer
        return loader

    def step_layout(self) -> dict[str, int]:
        """How optimizer steps are cut into batches: pairs a step, batches a step, batches an epoch."""
        trainer = self.trainer
        assert trainer is not None
        accumulate, batches = trainer.accumulate_grad_batches, self._batches(len(self.train_dataloader()))
        pairs = self.batch_size * trainer.world_size * accumulate
        return {"pairs_per_step": pairs, "accumulate": accumulate, "batches": max(1, batches)}

    def origin(self, row_ids: Sequence[int], training: bool = False) -> list[str]:
        """Where rows of the prediction set, or of the training set, come from, as ``file:line``."""
        for name in ("train",) if training else ("predict", "test", "validation"):
            if name in self._sets:
                return [self._sets[name].origins[row] for row in row_ids]
        raise RuntimeError("No data are loaded: `setup` comes before `origin`.")


def _in_memory(sources: list[str | Rows]) -> bool:
    return any(isinstance(source, Rows) for source in sources)


def _leave_signals(worker: int) -> None:
    """Let the main process alone decide what a signal means: workers end when it does."""
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN)
