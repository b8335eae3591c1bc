"""The Lightning side of the data: files to loaders, one partition at a time."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader

from lit_dpo.data.collate import PairDataset, PairSampler
from lit_dpo.data.encode import PairEncoder, Truncation
from lit_dpo.data.load import EncodedRow, LoadReport, OnBadRow, load_pairs
from lit_dpo.data.partition import OneShot, Partition
from lit_dpo.data.read import MAX_LINE_BYTES
from lit_dpo.data.tokens import TokenCache
from lit_dpo.pairs import PairBatch
from lit_dpo.resume import ResumableLoader

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class PreferenceDataModule(LightningDataModule):
    """Preference pairs from files, folders and hub data sets, as flat batches.

    Rows may hold text or chat messages, with the prompt given or contained in both completions; see README.md. The
    tokenizer comes from the module that trains.

    Args:
        train: Data sources: local files (jsonl, json, csv, parquet, gzipped too), folders, ``save_to_disk`` folders,
            hub names; ``name:split`` picks a split. ``quickstart`` is the small embedded set.
        validation: Sources of the validation pairs; without any, `validation_fraction` of the training pairs.
        test: Sources for ``test``, and for ``predict`` unless `predict` is given; without any, the validation pairs.
        predict: Sources for ``predict``.
        validation_fraction: Share of training pairs to hold out, in (0, 1); pairs of one prompt stay together.
        batch_size: Pairs a batch on each process.
        eval_batch_size: The same for validation, test and predict; ``None`` means twice `batch_size`.
        max_length: Most tokens of prompt and one completion together.
        truncation: ``keep_start`` cuts completions' ends and refuses longer prompts; ``keep_end`` cuts prompts' starts
            first.
        columns: Own names for the columns, as ``{prompt: question, chosen: good, rejected: bad}``.
        on_bad_row: ``error`` stops at the first malformed row, ``skip`` counts and reports them.
        partition: How training is split into steps (stepwise DPO); more than one step needs `fit_stepwise`.
        num_workers: Processes that make batches; pairs are in memory as token ids, so 0 is rarely slower.
        seed: Of the order of pairs and of the held-out share.
        tokenizer: A tokenizer object, for use without a `PreferenceModule`.
        cache_tokens: Keep the token ids of large sources in ``$LIT_DPO_CACHE`` or ``~/.cache/lit_dpo``, for later runs
            and for the other processes of a node. Any change of row, tokenizer, template or limit is noticed.
        max_line_bytes: Most bytes, decompressed, of a line of a data file, and of a whole ``.json`` file that is no
            JSON lines; a longer one is refused by its number instead of filling the memory.

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
        columns: dict[str, str] | None = None,
        on_bad_row: OnBadRow = "error",
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
        if not 0 < validation_fraction < 1:
            raise ValueError(f"`validation_fraction` must be between 0 and 1, got {validation_fraction}.")
        self.sources = {"train": train, "validation": validation, "test": test, "predict": predict}
        self.validation_fraction = validation_fraction
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size or 2 * batch_size
        self.max_length, self.truncation, self.columns, self.on_bad_row = max_length, truncation, columns, on_bad_row
        self.partition = partition or OneShot()
        self.num_workers, self.seed, self.tokenizer, self.cache_tokens = num_workers, seed, tokenizer, cache_tokens
        self.max_line_bytes = max_line_bytes
        self.parts: list[Tensor] | None = None
        self.part: int | None = None
        self._sets: dict[str, PairDataset] = {}
        self._train_rows = torch.arange(0)

    @property
    def stepwise(self) -> bool:
        """Whether the partition may have more than one part."""
        return not isinstance(self.partition, OneShot)

    def prepare_data(self) -> None:
        """Fill the token cache on one process of each node, so that the others only read; errors wait for `setup`."""
        if self.trainer is None or self.trainer.world_size == 1 or not self.cache_tokens:
            return
        held_out = self._held_out_source(self.trainer.state.fn or "fit")
        names = ["train", "validation"] if held_out is None else [held_out]
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
        name = self._held_out_source(stage)
        if name is None:
            self._setup_fit()
        elif name not in self._sets:
            self._sets[name] = self._load(name)

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
        else:
            held_out = _held_out(train, self.validation_fraction, self.seed)
            self._sets["validation"], self._validation_rows = train, everything[held_out]
            self._train_rows = everything[~held_out]
            rank_zero_info(f"validation: {int(held_out.sum())} pairs held out of {len(train)}")
        self._sets["train"] = train

    _validation_rows: Tensor | None = None

    def _load(self, name: str) -> PairDataset:
        rows, report, reused = self._read(name)
        rank_zero_info(f"{name}: {report}")
        if reused:
            rank_zero_info(f"{name}: token ids of {reused} rows found in the token cache")
        return PairDataset(rows)

    def _read(self, name: str) -> tuple[list[EncodedRow], LoadReport, int]:
        """The encoded rows of an option, the account of them, and how many were found in the token cache."""
        options = (self.columns, self.on_bad_row, self.max_line_bytes)
        if not self.cache_tokens:
            return *load_pairs(self._specs(name), self._encoder(), *options), 0
        tokens = TokenCache(self._encoder(), self._specs(name))
        rows, report = load_pairs(self._specs(name), tokens, *options)
        tokens.keep()
        return rows, report, tokens.reused

    def _specs(self, name: str) -> list[str]:
        source = self.sources[name]
        return [source] if isinstance(source, str) else list(source or [])

    def _encoder(self) -> PairEncoder:
        return PairEncoder(self._tokenizer(), self.max_length, self.truncation)

    def _tokenizer(self) -> PreTrainedTokenizerBase:
        tokenizer = self.tokenizer or getattr(getattr(self.trainer, "lightning_module", None), "tokenizer", None)
        if tokenizer is None:
            raise ValueError("No tokenizer: train with a `PreferenceModule`, or give the data module a `tokenizer`.")
        return tokenizer

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
        return self._loader("train", self.training_rows(), self.batch_size, shuffle=True, accumulate=accumulate)

    def val_dataloader(self) -> DataLoader[PairBatch]:
        """Validation pairs, long ones first."""
        return self._loader("validation", self._validation_rows, self.eval_batch_size)

    def test_dataloader(self) -> DataLoader[PairBatch]:
        """Test pairs, or the validation pairs if there are none."""
        if "test" not in self._sets:
            return self.val_dataloader()
        return self._loader("test", None, self.eval_batch_size)

    def predict_dataloader(self) -> DataLoader[PairBatch]:
        """Predict pairs, else test pairs, else validation pairs."""
        if "predict" not in self._sets:
            return self.test_dataloader()
        return self._loader("predict", None, self.eval_batch_size)

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
            rows["validation"] = self._validation_rows
        elif stage != "fit":
            names = ("predict", "test", "validation") if stage == "predict" else ("test", "validation")
            name = next(name for name in names if name in self._sets)
            rows[name] = self._validation_rows if name == "validation" else None
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
        accumulate, batches = trainer.accumulate_grad_batches, len(self.train_dataloader())
        limit = trainer.limit_train_batches
        batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
        pairs = self.batch_size * trainer.world_size * accumulate
        return {"pairs_per_step": pairs, "accumulate": accumulate, "batches": max(1, batches)}

    def origin(self, row_ids: Sequence[int], training: bool = False) -> list[str]:
        """Where rows of the prediction set, or of the training set, come from, as ``file:line``."""
        for name in ("train",) if training else ("predict", "test", "validation"):
            if name in self._sets:
                return [self._sets[name].origins[row] for row in row_ids]
        raise RuntimeError("No data are loaded: `setup` comes before `origin`.")


def _leave_signals(worker: int) -> None:
    """Let the main process alone decide what a signal means: workers end when it does."""
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN)


def _held_out(dataset: PairDataset, fraction: float, seed: int) -> Tensor:
    """Mask over rows: a share of them, drawn by prompt so that no prompt stands on both sides."""
    prompts = [tuple(dataset.pair(row)[0]) for row in range(len(dataset))]
    numbers = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    if len(numbers) < 2:
        raise ValueError(
            "All pairs share one prompt, so none can be held out for validation: give `validation` a source of its own."
        )
    order = torch.randperm(len(numbers), generator=torch.Generator().manual_seed(seed))
    count = min(max(1, round(fraction * len(numbers))), len(numbers) - 1)
    chosen = torch.zeros(len(numbers), dtype=torch.bool)
    chosen[order[:count]] = True
    return chosen[torch.tensor([numbers[prompt] for prompt in prompts])]
