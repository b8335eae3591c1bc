"""Stepwise DPO: one `Trainer.fit` per partition, the policy of one being the reference of the next."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader

from lit_dpo.callbacks import ExportModel
from lit_dpo.checkpoints.claim import is_first
from lit_dpo.checkpoints.durable import write_json
from lit_dpo.checkpoints.verify import verify
from lit_dpo.data import PreferenceDataModule
from lit_dpo.lightning_private import attached_trainer
from lit_dpo.losses import SFTLoss
from lit_dpo.module import PreferenceModule
from lit_dpo.pairs import PairBatch
from lit_dpo.references.frozen import FrozenReference


def fit_stepwise(
    module: PreferenceModule,
    datamodule: PreferenceDataModule,
    make_trainer: Callable[[Path], Trainer],
    folder: str | Path,
    resume: bool = False,
) -> Path:
    """Train through the partitions of a data module in order.

    Each partition gets a fresh Trainer, and with it a fresh optimizer, schedule and early stopping. Policy and
    reference of partition t both start from the folder that partition t-1 exported: its best checkpoint as ranked by
    the Trainer's checkpoint callback, or its last policy if there is none. With LoRA, adapters are merged first.

    Source: sDPO, https://arxiv.org/abs/2403.19270.

    Args:
        module: What to train. In the end it holds the policy that the last partition exported, be that its best or its
            last one; sharded over processes, it loads it from there at its next run.
        datamodule: Its `partition` says how the training pairs are split.
        make_trainer: Makes a new Trainer whose ``default_root_dir`` is the folder it is given.
        folder: Where the partitions' folders go: ``partition_0`` and so on, each with ``export`` inside.
        resume: Go on in a folder that holds partitions: those that are done are left alone, the one under way goes on
            from its last checkpoint.

    Returns:
        The folder that the last partition exported.

    Raises:
        ValueError: The reference is a model of its own, or the partitions to go on with held other rows.
        FileExistsError: `folder` holds partitions already, and it was not said to resume.
    """
    reference = getattr(module.reference, "of", None) or module.reference  # the cached one, if it is
    if isinstance(reference, FrozenReference) and reference.model is not None:
        raise ValueError(
            "Stepwise, the reference is the policy of the step before: leave the `model` of `reference` out."
        )
    folder = Path(folder)
    if not resume and is_first() and any(folder.glob("partition_*")):  # the others may come when the first has begun
        raise FileExistsError(f"`{folder}` holds partitions already: name a new folder, or remove that one first.")
    parts = _split(module, datamodule, make_trainer, folder)
    exported = folder
    for number, part in enumerate(parts):
        root = folder / f"partition_{number}"
        start, exported = exported, root / "export"
        if resume and _is_done(root, part, datamodule):
            rank_zero_info(f"Partition {number + 1} of {len(parts)} is done")
            continue
        rank_zero_info(f"Partition {number + 1} of {len(parts)}: {len(part)} pairs")
        if number:
            module.restart_from(str(start))
        datamodule.use_part(number)
        trainer = make_trainer(root)
        if exported.exists():  # trained and exported, but stopped before that was noted
            _note_done(trainer, root, part, datamodule)
            continue
        trainer.callbacks.append(ExportModel(str(exported.absolute())))  # type: ignore[attr-defined]
        trainer.fit(module, datamodule, ckpt_path=_checkpoint_of(root) if resume else None)
        _note_done(trainer, root, part, datamodule)
    _hold(module, exported)
    rank_zero_info(f"Exported the policy of the last partition to {exported}")
    return exported


def _hold(module: PreferenceModule, exported: Path) -> None:
    """Let a module hold the policy of a folder, unless it would have to be sharded, which only a run can do."""
    module.restart_from(str(exported))
    trainer = attached_trainer(module)
    if module.device_mesh is None and not (trainer and isinstance(trainer.strategy, FSDPStrategy)):
        module.configure_model()


def _is_done(root: Path, part: Tensor, datamodule: PreferenceDataModule) -> bool:
    """Whether a partition is done; raises ValueError if it was one of other rows, or the data have changed since."""
    mark = root / "DONE"
    if not mark.exists():
        return False
    done = json.loads(mark.read_text(encoding="utf-8"))
    if "data" in done:
        datamodule.refuse_changes(done["data"], f"`{root}`")
    if done["rows"] != part.tolist() and not datamodule.allow_changes:
        raise ValueError(f"`{root}` was trained on other rows than this partition has now: start in a new folder.")
    return True


def _note_done(trainer: Trainer, root: Path, part: Tensor, datamodule: PreferenceDataModule) -> None:
    if trainer.is_global_zero:
        write_json(root / "DONE", {"rows": part.tolist(), "data": datamodule.state_dict()})
    trainer.strategy.barrier("partition done")


def _checkpoint_of(root: Path) -> Path | None:
    """The checkpoint that a partition under way goes on from: its last one, or the one before if that is damaged."""
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


def _split(
    module: PreferenceModule, datamodule: PreferenceDataModule, make_trainer: Callable[[Path], Trainer], folder: Path
) -> list[Tensor]:
    datamodule.tokenizer = datamodule.tokenizer or module.tokenizer
    datamodule.setup("fit")
    margins = None
    if datamodule.partition.needs_margins:
        rank_zero_info("Scoring the training pairs with the starting model")
        loss, reference = module.loss, module.reference
        module.loss, module.reference = SFTLoss(), None  # only the policy is asked
        try:
            margins = _margins(make_trainer(folder / "scoring"), module, datamodule)
        finally:
            module.loss, module.reference = loss, reference
        module.restart_from(module.model)
    return datamodule.split(margins)


def _margins(trainer: Trainer, module: PreferenceModule, datamodule: PreferenceDataModule) -> Tensor:
    """The starting model's chosen minus rejected log-prob for every row of the training set, in nats."""
    batches = trainer.predict(module, datamodule=_Pool(datamodule))
    assert batches is not None
    margins = torch.zeros(datamodule.pool_size, dtype=torch.float64, device=trainer.strategy.root_device)
    for batch in batches:
        assert isinstance(batch, dict)
        margins[batch["row_id"].to(margins.device)] = (batch["logp_chosen"] - batch["logp_rejected"]).to(margins)
    return trainer.strategy.reduce(margins, reduce_op="sum").cpu()


class _Pool(LightningDataModule):
    """All training pairs of a data module, shared among the processes of the Trainer that scores them."""

    def __init__(self, data: PreferenceDataModule) -> None:
        super().__init__()
        self.data = data

    def predict_dataloader(self) -> DataLoader[PairBatch]:
        self.data.trainer = self.trainer
        return self.data.pool_dataloader()
