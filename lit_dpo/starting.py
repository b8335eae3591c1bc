"""The policies that start the steps of stepwise training, asked for margins and samples."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, partial
from itertools import tee
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.lsf import LSFEnvironment
from lightning.fabric.plugins.environments.mpi import MPIEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lit_dpo.checkpoints.claim import connect, is_first
from lit_dpo.checkpoints.tensor_store import TensorStore
from lit_dpo.data import PreferenceDataModule
from lit_dpo.data.dataset import DIGEST
from lit_dpo.data.encode import PairEncoder
from lit_dpo.data.opening import Opening
from lit_dpo.data.partition import Pool, Prompt
from lit_dpo.data.prompts import Prompt as Asked
from lit_dpo.data.prompts import prompt_ids
from lit_dpo.data.texts import pool_pairs
from lit_dpo.losses import SimPOLoss
from lit_dpo.models import ModelSource, load_model
from lit_dpo.module import PreferenceModule
from lit_dpo.pairs import PairBatch
from lit_dpo.pretrained import Loading
from lit_dpo.references.table import fingerprint
from lit_dpo.sampling import Completion, Sampler, text_of
from lit_dpo.scoring.decoder import own_tensors
from lit_dpo.scoring.score import Scorer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_CLUSTERS = (LSFEnvironment, MPIEnvironment, SLURMEnvironment, TorchElasticEnvironment)  # which start all processes


class StartingPolicies:
    """What starts each step: the model of the run, then what the step before exported; loaded only when asked.

    Args:
        module: The module that is trained; its `model` starts the first step.
        data: The pool, set up.
        make_trainer: Makes a Trainer for a folder.
        folder: Where the folders of the steps are.
    """

    def __init__(
        self,
        module: PreferenceModule,
        data: PreferenceDataModule,
        make_trainer: Callable[[Path], Trainer],
        folder: Path,
    ) -> None:
        self.module, self.data, self.make_trainer, self.folder = module, data, make_trainer, folder
        self.first, self.loading = module.model, module.loading
        self._margins: dict[int, Tensor] = {}

    def of(self, step: int) -> ModelSource:
        """The model that starts a step."""
        return str(folder_of(self.folder, step - 1) / "export") if step else self.first

    def pool(self, step: int) -> Pool:
        """What the partition is given for a step."""

        def score(other: int | None) -> Tensor:
            if other is not None and not 0 <= other <= step:
                raise ValueError(f"Step {step} knows no margins of step {other}: name itself or an earlier one.")
            return self.margins(step if other is None else other)

        folder, is_object = folder_of(self.folder, step), isinstance(self.first, nn.Module)
        sample, complete = partial(self.sample, step), partial(self.complete, step)
        return Pool(
            self.data.training.pool_sources,
            folder,
            score,
            sample,
            complete,
            processes=self._processes(),
            gather=_gathered,
            encoder=self._encoder,
            pairs=partial(pool_pairs, self.data),
            model=self.load,
            logps=self.logps,
            progress=lambda: is_first() and self._scoring.progress_bar_callback is not None,
            allow_changes=self.data.allow_changes,
            policy={
                "policy": "export of the step before" if step else "object" if is_object else str(self.first),
                "init_seed": self.module.init_seed,
                "chat_template": self.data.chat_template,
            },
        )

    @cached_property
    def _scoring(self) -> Trainer:
        """A Trainer that is asked for the device, and whether to show progress."""
        return self.make_trainer(self.folder / "scoring")

    def load(self, step: int) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """See `Pool.model`."""
        module, source = self.module, self.of(step)
        if isinstance(source, nn.Module):
            model: Any = copy.deepcopy(source).eval()  # the object itself is going to be trained
        else:
            how = (module.dtype_name, module.init_seed, self._loading_of(step))
            model = load_model(source, module.tokenizer, *how)
        model.to(self._scoring.strategy.root_device)
        return model, module.tokenizer

    def connect(self) -> None:
        """Connect processes that torchrun or a cluster has started all at once, so that they share the first step too.

        Those that Lightning starts itself find what the first process has written by then.
        """
        if not any(cluster.detect() for cluster in _CLUSTERS):
            return
        strategy = self._scoring.strategy
        cluster = getattr(strategy, "cluster_environment", None)
        started = cluster is not None and cluster.creates_processes_externally
        if started and not isinstance(cluster, LightningEnvironment) and self._scoring.world_size > 1:
            connect(strategy)

    def _encoder(self) -> PairEncoder:
        data = self.data
        options = (data.max_length, data.truncation, data.append_eos, data.chat_template, data.keep_template_end)
        return PairEncoder(data.tokenizer or self.module.tokenizer, *options)

    def _loading_of(self, step: int) -> Loading:
        """The options of loading it: an export has no revision."""
        return replace(self.loading, revision=None) if step else self.loading

    @cached_property
    def _name(self) -> str:
        """What tells the first model from another: its description, or the weights that an object begins with."""
        return fingerprint(own_tensors(self.first)) if isinstance(self.first, nn.Module) else str(self.first)

    # -- margins ------------------------------------------------------------------------------------------------------

    def margins(self, step: int) -> Tensor:
        """See `Pool.margins`; the values are kept in the step's folder, as long as model and rows are the same."""
        if step not in self._margins:
            training = self.data.training
            digests = training.train.digest_bytes(numbers=False)
            of_pool = (digests[DIGEST * row : DIGEST * (row + 1)] for row in training.pool.tolist())
            rows = hashlib.sha256(b"".join(of_pool)).hexdigest()
            who = {"model": "export of the step before" if step else self._name, "seed": self.module.init_seed}
            store = TensorStore(folder_of(self.folder, step) / "margins", {**who, "rows": rows})
            tensors, problem = from_first(store.read(lambda found: None if "margins" in found else "it has no margins"))
            if problem:
                rank_zero_info(f"Margins {store.data} are damaged ({problem}): scoring anew.")
            if tensors is None:
                tensors = {"margins": self._score(step)}
                if is_first():
                    store.write(tensors)
                wait_for_all()
            self._margins[step] = tensors["margins"]
        return self._margins[step].clone()

    def _score(self, step: int) -> Tensor:
        rank_zero_info(f"Scoring {len(self.data.training.pool)} training pairs with the model that starts step {step}")
        module, trainer = self.module, self.make_trainer(self.folder / "scoring")
        model, loading = module.model, module.loading
        module.restart_from(self.of(step))
        module.loading = self._loading_of(step)
        try:
            return training_margins(module, self.data, trainer)[self.data.training.pool]
        finally:
            module.restart_from(model)
            module.loading = loading

    # -- samples ------------------------------------------------------------------------------------------------------

    def sample(
        self, step: int, prompts: Sequence[Prompt], samples: int, temperature: float, most: int, seed: int, size: int
    ) -> list[list[str]]:
        """See `Pool.sample`; equal prompts go to one process, which counts how often they came before."""
        rank, processes = self._processes()
        names = [json.dumps(prompt) for prompt in prompts]
        owners = {name: number % processes for number, name in enumerate(dict.fromkeys(names))}
        own = [number for number, name in enumerate(names) if owners[name] == rank]
        sampler = Sampler(samples, temperature, max_new_tokens=most, seed=seed, round=step, rows=size * samples)
        completions = self.complete(step, [prompts[number] for number in own], sampler)
        found = _gathered({n: [one.text for one in each] for n, each in zip(own, completions, strict=True)})
        return [found[number] for number in range(len(prompts))]

    def complete(self, step: int, prompts: Sequence[Prompt | Opening], sampler: Sampler) -> Iterator[list[Completion]]:
        """See `Pool.complete`."""
        tokenizer: Any = self.module.tokenizer
        ids, again = tee(map(self._ids, prompts))  # the sampler reads some prompts ahead
        opened = len(prompts) > 0 and isinstance(prompts[0], Opening)
        names = (prompt.name for prompt in prompts if isinstance(prompt, Opening)) if opened else None
        asked = sampler(*self.load(step), ids, names) if sampler.engine is None else self._by(sampler, step, ids, names)
        for prompt, each in zip(again, asked, strict=True):
            before = text_of(tokenizer, prompt)
            whole = (text_of(tokenizer, [*prompt, *one.ids]) for one in each)
            # Decoded alone, some tokenizers lose the first space.
            yield [
                replace(one, text=text.removeprefix(before)) if text.startswith(before) else one
                for one, text in zip(each, whole, strict=True)
            ]

    def _by(
        self, sampler: Sampler, step: int, ids: Iterator[list[int]], names: Iterator[bytes] | None
    ) -> Iterator[list[Completion]]:
        """The completions of an engine, which loads the policy from its folder."""
        assert sampler.engine is not None  # for the types
        dtype, device = self.module.dtype_name, self._scoring.strategy.root_device
        with self._saved(step) as folder:
            yield from sampler.engine.complete(sampler, folder, self.module.tokenizer, ids, names, dtype, device)

    @contextmanager
    def _saved(self, step: int) -> Iterator[Path]:
        """The folder of the policy that starts a step; for the time of the context, if there is none yet."""
        source = self.of(step)
        if self.loading.quantization is not None:
            raise ValueError("An `engine` samples from whole weights: leave it out, or `quantization`.")
        weights = ("model.safetensors", "model.safetensors.index.json")
        if isinstance(source, str) and any((Path(source) / name).is_file() for name in weights):
            yield Path(source)
            return
        folder = folder_of(self.folder, step)
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix="policy-", dir=folder) as saved:
            model, tokenizer = self.load(step)
            if hasattr(model, "peft_config"):
                raise ValueError("An `engine` samples from whole weights: leave it out, or export merged ones.")
            model.save_pretrained(saved)
            tokenizer.save_pretrained(saved)
            del model
            torch.cuda.empty_cache()  # does nothing without a GPU
            yield Path(saved)

    def logps(
        self, prompts: Sequence[Prompt], completions: Sequence[Sequence[Sequence[int]]], step: int
    ) -> Iterator[list[float]]:
        """See `Pool.logps`."""
        model, _ = self.load(step)
        for prompt, said in zip(map(self._ids, prompts), completions, strict=True):
            pairs = [(prompt, said[place], said[min(place + 1, len(said) - 1)]) for place in range(0, len(said), 2)]
            with torch.no_grad():
                found = Scorer()(model, PairBatch.from_lists(pairs).to(model.device))
            sides = torch.stack([found.chosen, found.rejected], dim=1)  # (pairs, 2)
            yield sides.flatten()[: len(said)].tolist()

    @staticmethod
    def _processes() -> tuple[int, int]:
        return (dist.get_rank(), dist.get_world_size()) if connected() else (0, 1)

    def _ids(self, prompt: Prompt | Opening) -> list[int]:
        tokenizer: Any = self.module.tokenizer
        if isinstance(prompt, Opening):
            return [*prompt.ids]
        if isinstance(prompt, str):
            found = prompt_ids(tokenizer, Asked(prompt, "a prompt to sample from"))
        else:
            template = self.data.chat_template or tokenizer.chat_template
            text = tokenizer.apply_chat_template(
                list(prompt), chat_template=template, tokenize=False, add_generation_prompt=True
            )
            found = tokenizer(text, add_special_tokens=False).input_ids
        if not found:
            raise ValueError("A prompt to sample from has no tokens: give one that is not empty.")
        return list(found)


class _Pool(LightningDataModule):
    """All training pairs of a data module, shared among the processes of the Trainer that scores them."""

    def __init__(self, data: PreferenceDataModule) -> None:
        super().__init__()
        self.data = data

    def predict_dataloader(self) -> DataLoader[PairBatch]:
        self.data.trainer = self.trainer
        return self.data.pool_dataloader()


def training_margins(module: PreferenceModule, data: PreferenceDataModule, trainer: Trainer) -> Tensor:
    """Log-prob of chosen minus that of rejected under the policy alone, in nats, the same on all processes.

    Returns:
        Shape `(training rows,)`, float64; 0 for rows that are held out.
    """
    loss, reference = module.loss, module.reference
    module.loss, module.reference = SimPOLoss(), None  # only the policy is asked
    try:
        batches: Any = trainer.predict(module, datamodule=_Pool(data))
    finally:
        module.loss, module.reference = loss, reference
    margins = torch.zeros(len(data.training.train), dtype=torch.float64, device=trainer.strategy.root_device)
    for batch in batches:
        margins[batch["row_id"].to(margins.device)] = (batch["logp_chosen"] - batch["logp_rejected"]).to(margins)
    return trainer.strategy.reduce(margins, reduce_op="sum").cpu()


def folder_of(folder: Path, step: int) -> Path:
    """The folder of a step, counted from 0."""
    return folder / f"partition_{step}"


# -- processes of a run, once they are connected ----------------------------------------------------------------------


def connected() -> bool:
    """Whether the processes of this run can talk to each other yet."""
    return dist.is_available() and dist.is_initialized()


def from_first(value: Any) -> Any:
    """The first process's value, on all of them; each has its own until they are connected."""
    box = [value]
    if connected():
        dist.broadcast_object_list(box, src=0)
    return box[0]


def wait_for_all() -> None:
    """Wait until all processes are here, if they are connected."""
    if connected():
        dist.barrier()


def _gathered(found: dict[int, Any]) -> dict[int, Any]:
    """What the processes have found, each its own numbers, as one on all."""
    everyone: list[Any] = [found]
    if connected():
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, found)
    return {number: value for one in everyone for number, value in one.items()}
