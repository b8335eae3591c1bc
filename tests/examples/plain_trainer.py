"""The module and the data module in a Trainer of one's own, with one's own callbacks and settings."""

import lightning as L
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger

from lit_dpo import DPOLoss, PreferenceDataModule, PreferenceModule

module = PreferenceModule(
    model={
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    },
    tokenizer="quickstart",
    loss=DPOLoss(beta=0.1),
)
trainer = L.Trainer(
    max_epochs=1,
    limit_train_batches=4,
    accelerator="cpu",
    callbacks=[LearningRateMonitor()],
    logger=CSVLogger("logs"),
    log_every_n_steps=1,
)
trainer.fit(module, PreferenceDataModule(train="quickstart", batch_size=16))
