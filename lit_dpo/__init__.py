"""Preference-tune language models with PyTorch Lightning: swap the loss object, not the trainer."""

from lit_dpo.cached_reference import CachedReference
from lit_dpo.data import BySource, EasyToHard, OneShot, Partition, PreferenceDataModule, RandomSplit
from lit_dpo.losses import (
    DPOLoss,
    DPOPLoss,
    IntermediateLoss,
    IPOLoss,
    PreferenceLoss,
    SFTLoss,
    WeightedLoss,
)
from lit_dpo.models import LoRA
from lit_dpo.module import PreferenceModule
from lit_dpo.pairs import PairBatch, PairLogps
from lit_dpo.reference import AdapterReference, FrozenReference, Reference
from lit_dpo.schedules import WarmupDecay
from lit_dpo.scoring import score
from lit_dpo.sources import trusting_remote_code
from lit_dpo.version import __version__

__all__ = [
    "AdapterReference",
    "BySource",
    "CachedReference",
    "DPOLoss",
    "DPOPLoss",
    "EasyToHard",
    "FrozenReference",
    "IPOLoss",
    "IntermediateLoss",
    "LoRA",
    "OneShot",
    "PairBatch",
    "PairLogps",
    "Partition",
    "PreferenceDataModule",
    "PreferenceLoss",
    "PreferenceModule",
    "RandomSplit",
    "Reference",
    "SFTLoss",
    "WarmupDecay",
    "WeightedLoss",
    "__version__",
    "score",
    "trusting_remote_code",
]
