"""Stepwise DPO: one `Trainer.fit` per partition, the policy of one being the reference of the next."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader

from lit_dpo.callbacks import ExportModel
from lit_dpo.data import PreferenceDataModule
from lit_dpo.module import PreferenceModule
from lit_dpo.pairs import PairBatch
from lit_dpo.reference import FrozenReference


def fit_stepwise(
    module: PreferenceModule,
    datamodule: PreferenceDataModule,
    make_trainer: Callable[[Path], Trainer],
    folder: str | Path,
) -> Path:
    """Train through the partitions of a data module in order.

    Each partition gets a fresh Trainer, and with it a fresh optimizer, schedule and early stopping. Policy and
    reference of partition t both start from the folder that partition t-1 exported: its best checkpoint as ranked by
    the Trainer's checkpoint callback, or its last policy if there is none. With LoRA, adapters are merged first.

    Source: sDPO, https://arxiv.org/abs/2403.19270.

    Args:
        module: What to train; it ends with the policy of the last partition.
        datamodule: Its `partition` says how the training pairs are split.
        make_trainer: Makes a new Trainer whose ``default_root_dir`` is the folder it is given.
        folder: Where the partitions' folders go: ``partition_0`` and so on, each with ``export`` inside.

    Returns:
        The folder that the last partition exported.

    Raises:
        ValueError: The reference is a model of its own.
        FileExistsError: `folder` holds partitions already.
    """
    if isinstance(module.reference, FrozenReference) and module.reference.source is not None:
        raise ValueError(
            "Stepwise, the reference is the policy of the step before: leave the `model` of `reference` out."
        )
    folder = Path(folder)
    if folder.is_dir() and any(folder.glob("partition_*")):
        raise FileExistsError(f"`{folder}` holds partitions already: name a new folder, or remove that one first.")
    parts = _split(module, datamodule, make_trainer, folder)
    exported = folder
    for number, part in enumerate(parts):
        root = folder / f"partition_{number}"
        rank_zero_info(f"Partition {number + 1} of {len(parts)}: {len(part)} pairs")
        if number:
            module.restart_from(str(exported))
        datamodule.use_part(number)
        trainer = make_trainer(root)
        exported = root / "export"
        trainer.callbacks.append(ExportModel(str(exported.absolute())))  # type: ignore[attr-defined]
        trainer.fit(module, datamodule)
        if trainer.is_global_zero:
            (root / "DONE").write_text(json.dumps({"rows": part.tolist()}), encoding="utf-8")
        trainer.strategy.barrier("partition done")
    rank_zero_info(f"Exported the policy of the last partition to {exported}")
    return exported


def _split(
    module: PreferenceModule, datamodule: PreferenceDataModule, make_trainer: Callable[[Path], Trainer], folder: Path
) -> list[Tensor]:
    datamodule.tokenizer = datamodule.tokenizer or module.tokenizer
    datamodule.setup("fit")
    margins = None
    if datamodule.partition.needs_margins:
        rank_zero_info("Scoring the training pairs with the starting model")
        reference, module.reference = module.reference, None  # only the policy is asked
        margins = _margins(make_trainer(folder / "scoring"), module, datamodule)
        module.reference = reference
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
