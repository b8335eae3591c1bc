"""Preference-tune language models with PyTorch Lightning: swap the loss object, not the trainer."""

from lit_dpo.cached_reference import CachedReference
from lit_dpo.data import BySource, EasyToHard, OneShot, Partition, PreferenceDataModule, RandomSplit
from lit_dpo.losses import (
    ADPOLoss,
    APODownLoss,
    APOZeroLoss,
    BCOPairLoss,
    CPOLoss,
    DPOLoss,
    DPOPLoss,
    DPOShiftLoss,
    EXOLoss,
    FDPOLoss,
    HingeLoss,
    IntermediateLoss,
    IPOLoss,
    LDDPOLoss,
    MinorDPOLoss,
    NCAPairLoss,
    ODPOLoss,
    ORPOLoss,
    PreferenceLoss,
    RDPOLoss,
    RobustDPOLoss,
    SFTLoss,
    SimPOLoss,
    SPPOLoss,
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
    "ADPOLoss",
    "APODownLoss",
    "APOZeroLoss",
    "AdapterReference",
    "BCOPairLoss",
    "BySource",
    "CPOLoss",
    "CachedReference",
    "DPOLoss",
    "DPOPLoss",
    "DPOShiftLoss",
    "EXOLoss",
    "EasyToHard",
    "FDPOLoss",
    "FrozenReference",
    "HingeLoss",
    "IPOLoss",
    "IntermediateLoss",
    "LDDPOLoss",
    "LoRA",
    "MinorDPOLoss",
    "NCAPairLoss",
    "ODPOLoss",
    "ORPOLoss",
    "OneShot",
    "PairBatch",
    "PairLogps",
    "Partition",
    "PreferenceDataModule",
    "PreferenceLoss",
    "PreferenceModule",
    "RDPOLoss",
    "RandomSplit",
    "Reference",
    "RobustDPOLoss",
    "SFTLoss",
    "SPPOLoss",
    "SimPOLoss",
    "WarmupDecay",
    "WeightedLoss",
    "__version__",
    "score",
    "trusting_remote_code",
]
