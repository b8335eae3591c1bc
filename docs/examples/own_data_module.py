"""Pairs from a data module of your own, for `PreferenceModule`.

Any loader will do whose batches are `PairBatch` objects. Here the pairs are made up, and tokenized by hand. What
`PreferenceDataModule` does besides (row layouts, length limits, grouping by length, exact resume in mid-epoch, row
origins in error messages) is then yours to do.
"""

import lightning as L
import torch
from torch.utils.data import DataLoader

from lit_dpo import DPOLoss, PairBatch, PreferenceModule


class Sums(L.LightningDataModule):
    """Sums with their result and with a refusal.

    Args:
        batch_size: Pairs a batch.
    """

    def __init__(self, batch_size: int = 8) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.pairs: list[tuple[list[int], list[int], list[int]]] = []

    def setup(self, stage: str) -> None:
        """Tokenize the pairs with the tokenizer of the module that trains."""
        tokenizer = self.trainer.lightning_module.tokenizer
        end = tokenizer.eos_token_id

        def ids(text: str) -> list[int]:
            return tokenizer(text, add_special_tokens=False).input_ids

        for a in range(8):
            for b in range(8):
                pair = (ids(f"{a} + {b} ="), [*ids(f" {a + b}"), end], [*ids(" I do not know."), end])
                self.pairs.append(pair)

    def _loader(self, start: int, shuffle: bool = False) -> DataLoader:
        numbered = [(row, self.pairs[row]) for row in range(start, len(self.pairs), 2)]

        def collate(items: list) -> PairBatch:
            return PairBatch.from_lists([pair for _, pair in items], row_ids=[row for row, _ in items])

        return DataLoader(numbered, batch_size=self.batch_size, shuffle=shuffle, collate_fn=collate)

    def train_dataloader(self) -> DataLoader:
        """Every second sum, in random order."""
        return self._loader(0, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        """The others."""
        return self._loader(1)


L.seed_everything(0, verbose=False)
module = PreferenceModule(
    {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2},
    loss=DPOLoss(beta=0.5),
    tokenizer="quickstart",
    optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=5e-3),
    lr_scheduler=None,
)
trainer = L.Trainer(
    max_epochs=6,
    accelerator="cpu",
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.fit(module, Sums())
accuracy = float(trainer.callback_metrics["val/rewards/accuracies"])
print(f"validation reward accuracy: {accuracy:.2f}")
assert accuracy > 0.9
