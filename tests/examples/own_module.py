"""Somebody else's module, which takes the log-probs and the loss and nothing more."""

import lightning as L
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lit_dpo import DPOLoss, PairBatch, score


class Mine(L.LightningModule):
    def __init__(self):
        super().__init__()
        sizes = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
        self.policy = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **sizes)).train()
        self.frozen = AutoModelForCausalLM.from_config(self.policy.config).requires_grad_(False)
        self.frozen.load_state_dict(self.policy.state_dict())

    def training_step(self, batch: PairBatch, batch_idx: int):
        return DPOLoss(beta=0.1)(score(self.policy, batch), score(self.frozen, batch)).mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.policy.parameters(), lr=1e-2)


module = Mine()
batch = PairBatch.from_lists([([1, 2, 3], [4, 5], [6]), ([7, 8], [9], [10, 11])])  # prompt, chosen, rejected
trainer = L.Trainer(max_epochs=4, accelerator="cpu", logger=False, enable_checkpointing=False)
trainer.fit(module, torch.utils.data.DataLoader([batch], batch_size=None))
