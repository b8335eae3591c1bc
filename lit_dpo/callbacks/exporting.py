"""An exported model at the end of training."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities import rank_zero_info

from lit_dpo.callbacks.progress import finish_progress
from lit_dpo.checkpoints.durable import part_beside
from lit_dpo.export import (
    cleaning_up,
    export,
    export_checkpoint,
    new_folder,
    refuse_baseless,
    refuse_existing,
)
from lit_dpo.model_card import how_made, model_card
from lit_dpo.module import PreferenceModule
from lit_dpo.resume import run_facts


class ExportModel(Callback):
    """Write the best policy of a run as a folder that transformers loads.

    The best one is the checkpoint that the run's checkpoint callback ranks first; without any it is the last policy.

    Args:
        folder: The folder to make, inside the run's folder unless its path is absolute.
        merge: Fold LoRA adapters into the weights.
    """

    def __init__(self, folder: str = "export", merge: bool = True) -> None:
        self.folder, self.merge = folder, merge

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find a folder that is in the way, or adapters without a base, now and not after training."""
        if stage == "fit":
            assert isinstance(pl_module, PreferenceModule)
            refuse_baseless(pl_module.model, pl_module.adapter, self.merge)
            refuse_existing(self._target(trainer))

    def _target(self, trainer: Trainer) -> Path:
        return Path(trainer.log_dir or trainer.default_root_dir, self.folder)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the folder on the first process."""
        finish_progress(trainer)
        assert isinstance(pl_module, PreferenceModule)
        target = self._target(trainer)
        _write_policy(trainer, pl_module, str(target), self.merge)
        rank_zero_info(f"Exported the policy to {target}")


def _write_policy(trainer: Trainer, module: PreferenceModule, folder: str, merge: bool) -> None:
    """Write the best policy, or the last if no checkpoint was ranked; every process calls it, the first one writes."""
    checkpoint: str = getattr(trainer.checkpoint_callback, "best_model_path", "")
    sharded = module.device_mesh is not None or isinstance(trainer.strategy, FSDPStrategy)
    with ExitStack() as cleanup:
        if not checkpoint and sharded:  # saving a checkpoint is what gathers sharded weights
            spare: Path | None = None
            if trainer.is_global_zero:  # a folder of its own, beside the export, which is what gets removed
                spare = cleanup.enter_context(part_beside(new_folder(folder)))
                spare.mkdir()
            checkpoint = f"{trainer.strategy.broadcast(spare)}/policy.ckpt"
            trainer.save_checkpoint(checkpoint, weights_only=True)
        logs = trainer.log_dir  # asked by all processes, for Lightning broadcasts it
        if trainer.is_global_zero and checkpoint:
            export_checkpoint(checkpoint, folder, merge, **module.objects)
        elif trainer.is_global_zero:
            assert module.policy is not None
            made = how_made(Path(logs or trainer.default_root_dir, "config.yaml"))
            card = model_card(module.hparams, run_facts(trainer), made)
            with cleaning_up():
                export(module.policy, module.tokenizer, folder, merge, card)
    trainer.strategy.barrier("export")
