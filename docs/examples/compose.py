"""Log-probs and a loss inside a LightningModule of your own.

The module owns its models, its optimizer and its logging. From lit_dpo it takes `score`, which turns a batch of pairs
into log-probs, and a loss object.
"""

import lightning as L
import torch
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForCausalLM

from lit_dpo import DPOLoss, PairBatch, PairLogps, SFTLoss, WeightedLoss, score


class MyModule(L.LightningModule):
    """A policy, a frozen copy of it as the reference, and DPO with a supervised term."""

    def __init__(self) -> None:
        super().__init__()
        config = AutoConfig.for_model(
            "llama",
            vocab_size=64,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
        )
        self.policy = AutoModelForCausalLM.from_config(config)
        self.frozen = AutoModelForCausalLM.from_config(config).requires_grad_(False)
        self.frozen.load_state_dict(self.policy.state_dict())
        self.loss = WeightedLoss(losses=(DPOLoss(beta=0.1), SFTLoss()), weights=(1.0, 0.1))
        self.losses: list[float] = []

    def reference(self, batch: PairBatch) -> PairLogps:
        """Log-probs under the frozen copy."""
        with torch.no_grad():
            return score(self.frozen, batch)

    def training_step(self, batch: PairBatch, batch_idx: int) -> torch.Tensor:
        """The mean loss over the pairs of a batch."""
        loss = self.loss(score(self.policy, batch), self.reference(batch)).mean()
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW over the policy."""
        return torch.optim.AdamW(self.policy.parameters(), lr=1e-2)


L.seed_everything(0, verbose=False)
pairs = [([1, 2, 3], [4, 5], [6]), ([7, 8], [9], [10, 11])]  # token ids of prompt, chosen, rejected
loader = DataLoader([PairBatch.from_lists(pairs)], batch_size=None)
module = MyModule()
trainer = L.Trainer(
    max_epochs=8,
    accelerator="cpu",
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.fit(module, loader)
print(f"loss: {module.losses[0]:.3f} before the first step, {module.losses[-1]:.3f} after the seventh")
assert module.losses[-1] < module.losses[0]
