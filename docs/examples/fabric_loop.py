"""A plain training loop with Lightning Fabric: your loop, its devices and precision, our log-probs and losses."""

import lightning as L
import torch
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForCausalLM

from lit_dpo import DPOLoss, PairBatch, score

fabric = L.Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
fabric.launch()
fabric.seed_everything(0, verbose=False)

config = AutoConfig.for_model(
    "llama", vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
)
policy = AutoModelForCausalLM.from_config(config)
frozen = AutoModelForCausalLM.from_config(config).requires_grad_(False)
frozen.load_state_dict(policy.state_dict())
policy, optimizer = fabric.setup(policy, torch.optim.AdamW(policy.parameters(), lr=1e-2))
frozen = fabric.setup_module(frozen)

pairs = [([1, 2, 3], [4, 5], [6]), ([7, 8], [9], [10, 11])]  # token ids of prompt, chosen, rejected
loader = DataLoader([PairBatch.from_lists(pairs)] * 8, batch_size=None)
loss_of = DPOLoss(beta=0.1)

losses = []
for batch in fabric.setup_dataloaders(loader):
    with torch.no_grad():
        reference = score(frozen, batch)
    loss = loss_of(score(policy, batch), reference).mean()
    fabric.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())

fabric.print(f"loss: {losses[0]:.3f} before the first step, {losses[-1]:.3f} after the seventh")
assert losses[-1] < losses[0]
