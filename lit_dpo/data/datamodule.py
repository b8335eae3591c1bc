"""The Lightning side of the data: files to loaders, one partition at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader

from lit_dpo.data.dataset import PairDataset
from lit_dpo.data.encode import PairEncoder, Truncation, read_template
from lit_dpo.data.load import OnBadRow, Rows, sources_of
from lit_dpo.data.loader import pair_loader, step_layout
from lit_dpo.data.options import check_shares, check_sizes, check_values
from lit_dpo.data.partition import Partition
from lit_dpo.data.read import MAX_LINE_BYTES
from lit_dpo.data.rows import PairPolicy, Reading, RowMap
from lit_dpo.data.splits import OneShot
from lit_dpo.data.token_cache import read_pairs
from lit_dpo.data.token_store import TokenStore
from lit_dpo.data.training import TrainingPairs
from lit_dpo.pairs import PairBatch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Loader = DataLoader[PairBatch]
# What a stage takes its pairs from: the first of these options that is given, else the training pairs.
_TAKES = {"predict": ("predict", "test", "validation"), "test": ("test", "validation"), "validate": ("validation",)}


class PreferenceDataModule(LightningDataModule):
    """Preference pairs from files, folders and hub data sets, as flat batches.

    The layouts of rows are in docs/data.md. The tokenizer comes from the module that trains.

    Args:
        train: Data sources: local files (jsonl, json, csv, parquet, gzipped too), folders, `save_to_disk` folders,
            hub names; `name:split` picks a split. `quickstart` is the small embedded set. In Python also rows in
            memory: a list of dictionaries or a `datasets.Dataset`, here and for the other three.
        validation: Sources of the validation pairs; without any, `validation_fraction` of the training pairs.
        test: Sources for `test`, and for `predict` unless `predict` is given; without any, the validation pairs.
        predict: Sources for `predict`. `train` means the pairs that are trained on, in their order; a folder
            of that name is `./train`.
        validation_fraction: Share of training pairs to hold out, in [0, 1), those of one prompt together; 0 for none.
        batch_size: Pairs a batch on each process.
        eval_batch_size: The same for validation, test and predict; `None` means twice `batch_size`.
        max_length: Most tokens of prompt and one completion together.
        truncation: `keep_start` cuts ends of completions and refuses longer prompts; `keep_end` cuts starts of prompts.
        keep_template_end: Keep what the chat template prints behind the last end of turn (mostly a newline), as TRL.
        append_eos: End completions with the EOS token; without it the model learns nothing about where to end.
        chat_template: A chat template in the place of the tokenizer's own: the path of a `.jinja` file, or its text.
            Checkpoints and exports keep it.
        columns: Own names for the columns of a layout, as `{question: q, chosen: good, rejected: bad}`.
        rows: A function from a row to one of a known layout, or to `None` to leave it out; on the command line its
            import path, whose package `--allow-import` has to allow.
        ignored_columns: Columns to leave aside although their names are those of parts of a prompt, or of labels.
        text_as_turns: Render rows of plain text as turns of a conversation, through the chat template.
        pairs: Pairs of several ranked answers: `best_worst`, `adjacent` ones, or `all`.
        max_pairs: Most pairs of one prompt of such rows, those with the largest difference first.
        weights: Source -> how often its training pairs are seen in an epoch: 2 is twice, 0.5 is half of them.
        max_per_source: Most training pairs of a source, drawn at random.
        values: Names of columns of numbers that travel with the rows to the loss; every row has to have them, except
            those of `predict`. `weight` multiplies the loss of its pair; the mean is still over the number of pairs.
        on_bad_row: `error` stops, with the first malformed row and the number of others; `skip` leaves them out and
            reports them, `warn` does so in a warning that names them.
        max_bad_share: Largest share of malformed rows to go on with, in [0, 1].
        partition: How training is split into steps (stepwise DPO); more than one step needs `fit_stepwise`.
        num_workers: Processes that make batches; pairs lie in mapped memory as token ids, so 0 is rarely slower.
        seed: Of the order of pairs and of the held-out share.
        tokenizer: A tokenizer object, for use without a `PreferenceModule`.
        cache_tokens: Keep the token ids of large sources in `$LIT_DPO_CACHE` or `~/.cache/lit_dpo`, 4 bytes a token
            and 124 a row, in a file that later runs and all processes of a node share. Any change is noticed.
        max_line_bytes: Most bytes of a line of a data file, decompressed, and of a `.json` file that is no JSON lines.

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
        sizes = {"max_line_bytes": max_line_bytes, "batch_size": batch_size, "eval_batch_size": eval_batch_size or 1}
        check_sizes(**sizes, max_per_source=max_per_source or 1)
        check_shares(validation_fraction, max_bad_share)
        self.reading = Reading(columns, text_as_turns, pairs, max_pairs, tuple(ignored_columns or ()), rows)
        self.weights, self.max_per_source = weights, max_per_source
        self.max_bad_share, self.keep_template_end = max_bad_share, keep_template_end
        self.values = check_values(values)
        given = {"train": train, "validation": validation, "test": test, "predict": predict}
        self._given = {name: sources_of(sources, name) for name, sources in given.items()}
        in_memory = [name for name, found in self._given.items() if any(isinstance(source, Rows) for source in found)]
        names = {name: [str(source) for source in self._given[name]] for name in in_memory}
        self.sources = {**given, **names}  # plain values: they go into checkpoints and model cards
        self.validation_fraction = validation_fraction
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size or 2 * batch_size
        self.max_length, self.truncation, self.columns, self.on_bad_row = max_length, truncation, columns, on_bad_row
        self.append_eos, self.chat_template = append_eos, chat_template and read_template(chat_template)
        self.partition = partition or OneShot()
        self.num_workers, self.seed, self.tokenizer, self.cache_tokens = num_workers, seed, tokenizer, cache_tokens
        self.allow_changes = False  # no option: a configuration file must not say so
        self.max_line_bytes = max_line_bytes
        self._sets: dict[str, PairDataset] = {}
        self._training: TrainingPairs | None = None
        self._limit: float | None = None

    @property
    def stepwise(self) -> bool:
        """Whether the partition may have more than one step."""
        return not isinstance(self.partition, OneShot)

    @property
    def has_validation(self) -> bool:
        """Whether there are pairs to validate on besides those trained on."""
        return bool(self.sources["validation"]) or self.validation_fraction > 0

    def prepare_data(self) -> None:
        """Fill the token cache on one process of each node, so that the others only read; errors wait for `setup`."""
        if self.trainer is None or self.trainer.world_size == 1 or not self.cache_tokens:
            return
        held_out = self._held_out_source(self.trainer.state.fn or "fit")
        training = held_out is None or (held_out == "predict" and self._given["predict"] == ["train"])
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
        if name == "predict" and self._given["predict"] == ["train"]:
            self._setup_fit()
            self._sets["predict"] = self._sets["train"]
        elif name is None:
            if stage != "fit" and not self.has_validation:
                remedy = "name sources for it, or set a `validation_fraction` above 0"
                raise ValueError(f"There are no pairs to {stage} on: {remedy}.")
            self._setup_fit()
        elif name not in self._sets:
            self._sets[name] = self._load(name)

    def teardown(self, stage: str) -> None:
        """Give the Trainer back its `limit_val_batches`, which `setup` takes away where there is no validation."""
        if stage == "fit" and self.trainer is not None and self._limit is not None:
            self.trainer.limit_val_batches, self._limit = self._limit, None

    def _held_out_source(self, stage: str) -> str | None:
        """The option that a stage reads its pairs from; `None` means that it needs the training pairs."""
        return next((name for name in _TAKES.get(stage, ()) if self.sources[name]), None)

    def _setup_fit(self) -> None:
        if self._training is not None:
            return
        train = self._load("train")
        if self.sources["validation"] and "validation" not in self._sets:
            self._sets["validation"] = self._load("validation")
        own = self._sets["validation"] if self.sources["validation"] else None
        options = (self.validation_fraction, self.seed, self.weights, self.max_per_source)
        self._training = TrainingPairs(train, own, *options)
        for said in self._training.said:
            rank_zero_info(said)
        if self.has_validation:
            self._sets.setdefault("validation", train)
        self._sets["train"] = train

    @property
    def training(self) -> TrainingPairs:
        """The training set as it is divided, and what the step under way trains on; RuntimeError before `setup`."""
        if self._training is None:
            raise RuntimeError("No training data are loaded: `setup` comes first.")
        return self._training

    def _load(self, name: str) -> PairDataset:
        store, report, reused = self._read(name)
        rank_zero_info(f"{name}: {report}")
        if reused:
            rank_zero_info(f"{name}: token ids of {reused} rows found in the token cache")
        return PairDataset(store, report)

    def _read(self, name: str) -> tuple[TokenStore, str, int]:
        """The encoded rows of an option, the account of them, and how many were found in the token cache."""
        options = self._options(self.reading) | ({"values": ()} if name == "predict" else {})
        return read_pairs(self._given[name], self._encoder(), options, self.cache_tokens)

    def _options(self, reading: Reading) -> dict[str, Any]:
        names = ("on_bad_row", "max_bad_share", "max_line_bytes", "values")
        return {"reading": reading, **{name: getattr(self, name) for name in names}}

    def _encoder(self) -> PairEncoder:
        options = (self.max_length, self.truncation, self.append_eos, self.chat_template, self.keep_template_end)
        return PairEncoder(self._tokenizer(), *options)

    def _tokenizer(self) -> PreTrainedTokenizerBase:
        tokenizer = self.tokenizer or getattr(getattr(self.trainer, "lightning_module", None), "tokenizer", None)
        if tokenizer is None:
            raise ValueError("No tokenizer: train with a `PreferenceModule`, or give the data module a `tokenizer`.")
        return tokenizer

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint: a hash of every row, and of which are trained on."""
        if self._training is None:
            return {}
        self.training_rows()  # which have to be chosen
        return dict(self._training.record())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuse to go on with training from a checkpoint of other rows, unless `allow_changes`.

        Raises:
            ValueError: Rows were added, removed, moved or changed, or other ones are held out; shows which.
        """
        if self.trainer is not None and self.trainer.state.fn == "fit":
            order = self.state_dict()["order"]
            if said := self.training.refuse_changes(state_dict, order, "the checkpoint", self.allow_changes):
                rank_zero_info(said)

    def use_pairs(self, source: str | Path | Rows) -> None:
        """Train on new pairs from now on; what is validated on stays.

        Args:
            source: A file of pairs with the usual column names, or rows in memory.

        Raises:
            ValueError: A row is malformed.
        """
        given = source if isinstance(source, Rows) else str(source)
        store, report, _ = read_pairs([given], self._encoder(), self._options(Reading()), keep=False)
        if not isinstance(source, Rows):
            rank_zero_info(f"new pairs: {report}")
        self.training.use_pairs(PairDataset(store))

    def training_rows(self) -> Tensor:
        """Row numbers trained on now, of `training.dataset`.

        Raises:
            ValueError: The partition has several steps and none was chosen.
        """
        if self.stepwise and not self.training.chosen:
            name = type(self.partition).__name__
            raise ValueError(f"`{name}` trains in several steps: call `fit_stepwise`, or use `OneShot`.")
        return self.training.rows

    def train_dataloader(self) -> Loader:
        """Training pairs of the step, shuffled, pairs of similar length together."""
        return self._loader(self.training.dataset, self.training_rows(), self.batch_size, shuffle=True)

    def val_dataloader(self) -> Loader | list[Any]:
        """Validation pairs, long ones first; nothing if there are none."""
        return self._held_out("validate")

    def test_dataloader(self) -> Loader | list[Any]:
        """Test pairs, or the validation pairs if there are none."""
        return self._held_out("test")

    def predict_dataloader(self) -> Loader | list[Any]:
        """Predict pairs, else test pairs, else validation pairs."""
        return self._held_out("predict")

    def _held_out(self, stage: str) -> Loader | list[Any]:
        name = next((name for name in _TAKES[stage] if name in self._sets), None)
        return [] if name is None else self._loader(self._sets[name], self._rows_of(name), self.eval_batch_size)

    def _rows_of(self, name: str) -> Tensor:
        """Rows of a set: a share of the training set, or the whole of a set of its own."""
        if self._training is not None and self._sets[name] is self._training.train:
            return self._training.held_out if name == "validation" else self._training.pool
        return torch.arange(len(self._sets[name]))

    def pool_dataloader(self) -> Loader:
        """All training pairs of all steps, in no random order, for scoring."""
        return self._loader(self.training.train, self.training.pool, self.eval_batch_size)

    def reference_sets(self, stage: str) -> Iterator[tuple[PairDataset, Tensor, Callable[[Tensor], Loader]]]:
        """What a stage will see: data set, row numbers, and a function from row numbers to a loader."""
        validates = stage != "fit" or (self.trainer and self.trainer.limit_val_batches != 0)
        names = _TAKES["validate" if stage == "fit" else stage] if validates else ()
        found = [name for name in names if name in self._sets][:1]
        sets = [(self.training.dataset, self.training_rows())] if stage == "fit" else []
        for dataset, rows in [*sets, *((self._sets[name], self._rows_of(name)) for name in found)]:
            yield dataset, rows, partial(self._loader, dataset, batch_size=self.eval_batch_size)

    def _loader(self, dataset: PairDataset, rows: Tensor, batch_size: int, shuffle: bool = False) -> Loader:
        return pair_loader(dataset, rows, batch_size, self.trainer, self.num_workers, self.seed, shuffle)

    def step_layout(self) -> dict[str, int]:
        """How optimizer steps are cut into batches: pairs a step, batches a step, batches an epoch."""
        assert self.trainer is not None
        return step_layout(self.trainer, len(self.train_dataloader()), self.batch_size)

    def origin(self, row_ids: Sequence[int], training: bool = False) -> list[str]:
        """Where rows of the prediction set, or of the training set, come from, as `file:line`."""
        sets = [self._sets[name] for name in _TAKES["predict"] if name in self._sets]
        if training:
            sets = [] if self._training is None else [self._training.dataset]
        if not sets:
            raise RuntimeError("No data are loaded: `setup` comes before `origin`.")
        return [sets[0].origins[row] for row in row_ids]
