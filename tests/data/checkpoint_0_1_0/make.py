"""Makes the checkpoint of release 0.1.0 beside this file, and the losses that 0.1.0 itself went on with.

Run with release 0.1.0 (commit 5aa44d5) on the path, from the folder of the repository:

    PYTHONPATH=PATH_TO_0_1_0 python tests/data/checkpoint_0_1_0/make.py tests/data/checkpoint_0_1_0
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

import lightning as L
import torch

import lit_dpo
from lit_dpo import (
    DPOLoss,
    FrozenReference,
    IntermediateLoss,
    PreferenceDataModule,
    PreferenceModule,
    SFTLoss,
    WeightedLoss,
)
from lit_dpo.callbacks import LastCheckpoint

MODEL = {
    "model_type": "llama", "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 256, "tie_word_embeddings": True,
}  # fmt: skip
STEPS, SAVED = 6, 3


class Losses(L.Callback):
    """The loss of every step, exactly."""

    def __init__(self):
        self.found = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.found.append(float(outputs["loss"]).hex())


def module():
    """The module of the run; the same call goes on with it."""
    loss = WeightedLoss((IntermediateLoss(DPOLoss(beta=0.2), layers=(1,)), SFTLoss()), (1.0, 0.5))
    optimizer = lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, fused=True)  # noqa: E731
    return PreferenceModule(MODEL, loss, FrozenReference(), tokenizer="quickstart", optimizer=optimizer)


def run(folder, steps, checkpoint=None):
    """Train to a number of steps, of an epoch of six; return the losses."""
    losses = Losses()
    data = PreferenceDataModule("quickstart", batch_size=4, max_length=128, validation_fraction=0.5)
    trainer = L.Trainer(
        max_steps=steps, accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, default_root_dir=folder,
        enable_model_summary=False, num_sanity_val_steps=0, limit_val_batches=0, limit_train_batches=STEPS,
        callbacks=[losses, LastCheckpoint(every_n_steps=SAVED)],
    )  # fmt: skip
    trainer.fit(module(), data, ckpt_path=checkpoint)
    return losses.found


if __name__ == "__main__":
    target = Path(sys.argv[1])
    torch.set_num_threads(1)
    L.seed_everything(0)
    with tempfile.TemporaryDirectory() as folder:

        class Copy(L.Callback):
            """Keeps the checkpoint of the middle."""

            def on_train_batch_start(self, trainer, module, batch, batch_idx):
                if trainer.global_step == SAVED:
                    for name in ("last.ckpt", "last.ckpt.json"):
                        shutil.copy(Path(folder) / "checkpoints" / name, target / name)

        original = L.Trainer.__init__

        def with_copy(self, *args, callbacks, **kwargs):
            original(self, *args, callbacks=[*callbacks, Copy()], **kwargs)

        L.Trainer.__init__ = with_copy
        losses = run(folder, STEPS)
    (target / "losses.json").write_text(json.dumps({"version": lit_dpo.__version__, "saved": SAVED, "losses": losses}))
    print(losses)
