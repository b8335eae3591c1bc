"""Several values of beta, with the reference scored once.

`CachedReference` keeps the log-probs of each row under the starting policy. They do not depend on the loss, so that the
second and every later run finds them.
"""

import lightning as L
import torch

from lit_dpo import CachedReference, DPOLoss, PreferenceDataModule, PreferenceModule

START = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def run(beta: float) -> dict[str, float]:
    """Train with one beta from the same starting weights; return what was measured."""
    reference = CachedReference(folder="reference_cache")
    module = PreferenceModule(
        START,
        loss=DPOLoss(beta=beta),
        reference=reference,
        tokenizer="quickstart",
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=2e-3),
    )
    trainer = L.Trainer(
        max_steps=4,
        limit_val_batches=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = PreferenceDataModule(train="quickstart", batch_size=8, max_length=96)
    trainer.fit(module, data)
    rows = {"scored": reference.scored, "reused": reference.reused}
    trainer.validate(module, data, verbose=False)
    return {**rows, **{name: float(value) for name, value in trainer.callback_metrics.items()}}


print("  beta  scored  reused  val/loss  val/rewards/margins")
for number, beta in enumerate((0.05, 0.1, 0.5)):
    found = run(beta)
    values = f"{found['val/loss']:8.4f}  {found['val/rewards/margins']:8.4f}"
    print(f"{beta:6}  {found['scored']:6}  {found['reused']:6}  {values}")
    assert (found["scored"] == 0) == (number > 0)  # once, in the first run
