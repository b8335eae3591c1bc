"""Stepwise DPO: one `Trainer.fit` per step, the policy at the end of one being the reference of the next."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lit_dpo.callbacks import ExportModel, FirstModelMetrics
from lit_dpo.checkpoints.claim import is_first
from lit_dpo.checkpoints.durable import write_json
from lit_dpo.checkpoints.verify import verify
from lit_dpo.data import Partition, PreferenceDataModule, new_pairs
from lit_dpo.lightning_private import attached_trainer
from lit_dpo.module import PreferenceModule
from lit_dpo.own_code import refuse_signature
from lit_dpo.references.frozen import FrozenReference
from lit_dpo.starting import StartingPolicies, folder_of, from_first, wait_for_all

DONE = "DONE"
NO_STEP = "The partition has no first step: its `next` must answer more than `None` for step 0."
_PATIENCE = 600  # seconds between the end of the first process's question to a partition and that of another


def fit_stepwise(
    module: PreferenceModule,
    datamodule: PreferenceDataModule,
    make_trainer: Callable[[Path], Trainer],
    folder: str | Path,
    resume: bool = False,
    first_reference: bool = False,
) -> Path:
    """Train through the steps of a data module's partition in order.

    A step begins with the question to the partition what to train on: rows of the pool, or new pairs, which are written
    to `pairs.jsonl` first. Policy and reference both start from what the step before exported, the first ones from
    the module's `model`. A fresh Trainer trains, with a fresh optimizer, schedule and early stopping. In the end the
    step exports its best checkpoint as ranked by the Trainer's checkpoint callback, or its last policy if there is
    none, LoRA adapters merged, and the file `DONE` says that it is done. When the partition answers `None`, the
    step before was the last.

    Source: sDPO, https://arxiv.org/abs/2403.19270.

    Args:
        module: What to train. In the end it holds the policy that the last step exported, be that its best or its
            last one; sharded over processes, it loads it from there at its next run.
        datamodule: Its `partition` says what each step trains on.
        make_trainer: Makes a new Trainer whose `default_root_dir` is the folder it is given.
        folder: Where the folders of the steps go: `partition_0` and so on, each with `export` inside.
        resume: Go on in a folder that holds steps: those that are done are left alone, the one under way goes on from
            its last checkpoint, and new pairs that are written already are trained on as they are.
        first_reference: Measure validations against the first model too, and log that as `val/first/...` with the
            names of the other metrics, so that steps and runs compare. It costs one forward pass over the validation
            pairs, and the memory of one more model during the first validation; see `FirstModelMetrics`.

    Returns:
        The folder that the last step exported.

    Raises:
        ValueError: The reference is a model of its own, a step to go on with held other rows, its new pairs have
            changed, or the partition cannot answer.
        FileExistsError: `folder` holds steps already, and it was not said to resume.
    """
    folder = Path(folder)
    refuse_settings(module, datamodule.partition)
    if not resume and is_first() and any(folder.glob("partition_*")):  # the others may come when the first has begun
        raise FileExistsError(f"`{folder}` holds partitions already: name a new folder, or remove that one first.")
    datamodule.tokenizer = datamodule.tokenizer or module.tokenizer
    datamodule.setup("fit")
    policies = StartingPolicies(module, datamodule, make_trainer, folder)
    policies.connect()
    restarts = datamodule.partition.restarts
    if (kept := _kept_reference(module, datamodule.partition)) is not None:
        assert not isinstance(policies.first, nn.Module)  # which was refused
        kept.keep(policies.first, module.init_seed, policies.loading)
    more = []
    if first_reference:
        if isinstance(policies.first, nn.Module):
            raise ValueError(
                "`first_reference` loads the first model again, and a `model` given as an object has been training: "
                "save it with `save_pretrained` and give the folder."
            )
        more = [FirstModelMetrics(policies.first, policies.loading)]
    for step in count():
        root = folder_of(folder, step)
        if step:
            module.restart_from(policies.of(0 if restarts else step))
        if not _choose(step, root, datamodule, policies):
            break
        if resume and _is_done(root, datamodule):
            rank_zero_info(f"Step {step} is done")
            continue
        rank_zero_info(f"Step {step}: {len(datamodule.training.rows)} pairs")
        trainer, start = make_trainer(root), time.perf_counter()
        if not (root / "export").exists():  # else it was stopped between the export and the mark
            trainer.callbacks += [*more, ExportModel(str((root / "export").absolute()))]  # type: ignore[attr-defined]
            trainer.fit(module, datamodule, ckpt_path=_checkpoint_of(root) if resume else None)
        _note_done(trainer, root, datamodule, time.perf_counter() - start)
    if not step:
        raise ValueError(NO_STEP)
    exported = Path(policies.of(step))  # type: ignore[arg-type]  # a folder, as this is no first step
    _hold(module, exported)
    rank_zero_info(f"Exported the policy of the last step to {exported}")
    return exported


def refuse_settings(module: PreferenceModule, partition: Partition) -> None:
    """Refuse what stepwise training cannot do, before data are read.

    Raises:
        ValueError: The reference is a model of its own, `next` of the partition takes other arguments, or the first
            model is needed in later steps and was given as an object, which training changes.
    """
    reference = getattr(module.reference, "of", None) or module.reference  # the cached one, if it is
    if isinstance(reference, FrozenReference) and reference.model is not None and not partition.other_reference:
        raise ValueError(
            "Stepwise, the reference is the policy of the step before: leave the `model` of `reference` out."
        )
    refuse_signature(partition, "next", "step", "pool")
    if partition.restarts and isinstance(module.model, nn.Module):
        raise ValueError(
            "Each step trains the first model anew, and a `model` given as an object has been training: save it with "
            "`save_pretrained` and give the folder."
        )
    _kept_reference(module, partition)


def _kept_reference(module: PreferenceModule, partition: Partition) -> FrozenReference | None:
    """The reference that has to stay at the model that starts the first step, unless it names one, or there is none."""
    reference = getattr(module.reference, "of", None) or module.reference
    if not partition.first_reference or reference is None:
        return None
    name = type(partition).__name__
    if not isinstance(reference, FrozenReference):
        raise ValueError(
            f"`{name}` keeps the first model as the reference of all steps, which `{type(reference).__name__}` does "
            "not: set `reference` to `FrozenReference`."
        )
    if reference.model is not None:
        return None
    if isinstance(module.model, nn.Module):
        raise ValueError(
            f"`{name}` keeps the first model as the reference of all steps, and a `model` given as an object has been "
            "training: save it with `save_pretrained` and give the folder."
        )
    return reference


def _choose(step: int, root: Path, datamodule: PreferenceDataModule, policies: StartingPolicies) -> bool:
    """Have the data module train on what the partition says, or said before; whether there is such a step."""
    path = root / new_pairs.FILE
    if from_first(path.exists()):
        if not datamodule.allow_changes:
            datamodule.partition.resumed(step, policies.pool(step))
    else:
        answer = datamodule.partition.next(step, policies.pool(step))
        if answer is None:
            return False
        if isinstance(answer, Tensor):
            datamodule.training.use_rows(answer)
            return True
        datamodule.use_pairs(new_pairs.rows_of(answer, step))  # what is malformed is refused before it is written
        if is_first():
            new_pairs.write(path, answer, step)
        wait_for_all()
        _wait_for(path)
    new_pairs.digest(path, datamodule.allow_changes)
    datamodule.use_pairs(path)
    return True


def _wait_for(path: Path) -> None:
    """Wait for what the first process writes, where the processes are not connected: all train on the same pairs.

    Raises:
        FileNotFoundError: It does not come.
    """
    end = time.monotonic() + _PATIENCE
    while not path.exists():
        if time.monotonic() > end:
            raise FileNotFoundError(
                f"The first process has not written `{path}` within {_PATIENCE} seconds: look what stopped it, and "
                "give all processes the same folder."
            )
        time.sleep(0.1)


def _hold(module: PreferenceModule, exported: Path) -> None:
    """Let a module hold the policy of a folder, unless it would have to be sharded, which only a run can do."""
    module.restart_from(str(exported))
    trainer = attached_trainer(module)
    if module.device_mesh is None and not (trainer and isinstance(trainer.strategy, FSDPStrategy)):
        module.configure_model()


def _trained_on(root: Path, datamodule: PreferenceDataModule) -> dict[str, Any]:
    """What a step trains on, for its mark: row numbers of the training set, or the digest of its new pairs."""
    if datamodule.training.dataset is datamodule.training.train:
        return {"rows": datamodule.training_rows().tolist()}
    return {"pairs": new_pairs.digest(root / new_pairs.FILE, datamodule.allow_changes)}


def _is_done(root: Path, datamodule: PreferenceDataModule) -> bool:
    """Whether a step is done; raises ValueError if it was one of other rows, or the data have changed since."""
    mark = root / DONE
    if not mark.exists():
        return False
    done = json.loads(mark.read_text(encoding="utf-8"))
    training, allowed = datamodule.training, datamodule.allow_changes
    if "data" in done and (said := training.refuse_changes(done["data"], None, f"`{root}`", allowed)):
        rank_zero_info(said)
    if not allowed and {**done, **_trained_on(root, datamodule)} != done:
        raise ValueError(f"`{root}` was trained on other rows than this step has now: start in a new folder.")
    return True


def _note_done(trainer: Trainer, root: Path, datamodule: PreferenceDataModule, seconds: float) -> None:
    """Mark a step as done, with the time since its training was started, or started again."""
    if trainer.is_global_zero:
        write_json(root / DONE, {**_trained_on(root, datamodule), "data": datamodule.state_dict(), "seconds": seconds})
    trainer.strategy.barrier("step done")


def _checkpoint_of(root: Path) -> Path | None:
    """The checkpoint that a step under way goes on from: its last one, or the one before if that is damaged."""
    found = sorted(root.rglob("last.ckpt"), key=lambda path: path.stat().st_mtime)
    if not found:
        return None
    last, previous = found[-1], found[-1].with_name("previous.ckpt")
    try:
        verify(last)
    except ValueError as error:
        if not previous.exists():
            raise
        verify(previous)
        rank_zero_info(str(error))
        return previous
    return last
