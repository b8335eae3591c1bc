"""Preference-tune language models with PyTorch Lightning: swap the loss object, not the trainer."""

from lit_dpo.losses import (
    DPOLoss,
    DPOPLoss,
    IntermediateLoss,
    IPOLoss,
    PreferenceLoss,
    SFTLoss,
    WeightedLoss,
)
from lit_dpo.pairs import PairBatch, PairLogps
from lit_dpo.version import __version__

__all__ = [
    "DPOLoss",
    "DPOPLoss",
    "IPOLoss",
    "IntermediateLoss",
    "PairBatch",
    "PairLogps",
    "PreferenceLoss",
    "SFTLoss",
    "WeightedLoss",
    "__version__",
]
