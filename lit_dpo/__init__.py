"""Preference-tune language models with PyTorch Lightning: swap the loss object, not the trainer."""

import importlib
import importlib.util
from typing import TYPE_CHECKING

from lit_dpo.version import __version__

__all__ = [
    "VLLM",
    "ADPOLoss",
    "APODownLoss",
    "APOZeroLoss",
    "Active",
    "AdapterReference",
    "AllPairs",
    "BCOPairLoss",
    "BestVsWorst",
    "BySource",
    "CPOLoss",
    "CachedReference",
    "ChosenVsSample",
    "Command",
    "DPOLoss",
    "DPOPLoss",
    "DPOShiftLoss",
    "Discriminated",
    "Discriminator",
    "EXOLoss",
    "EasyToHard",
    "FDPOLoss",
    "Filtered",
    "FrozenReference",
    "HardToEasy",
    "HingeLoss",
    "IPOLoss",
    "ImplicitReward",
    "IntermediateLoss",
    "Judge",
    "LDDPOLoss",
    "LoRA",
    "MinorDPOLoss",
    "MixedReference",
    "NCAPairLoss",
    "ODPOLoss",
    "ORPOLoss",
    "OnPolicy",
    "OneShot",
    "PairBatch",
    "PairLogps",
    "Partition",
    "Picker",
    "Pool",
    "PreferenceDataModule",
    "PreferenceLoss",
    "PreferenceModule",
    "RDPOLoss",
    "RandomSplit",
    "Reference",
    "RewardModel",
    "RightVsWrong",
    "RobustDPOLoss",
    "SFTLoss",
    "SPPOLoss",
    "Scorer",
    "SelfPlay",
    "SimPOLoss",
    "SyncedReference",
    "Verifier",
    "WarmupDecay",
    "WeightedLoss",
    "__version__",
    "score",
    "select_rows",
    "trusting_remote_code",
]

if TYPE_CHECKING:
    from lit_dpo.adapters import LoRA
    from lit_dpo.data import (
        BySource,
        EasyToHard,
        HardToEasy,
        OneShot,
        Partition,
        Pool,
        PreferenceDataModule,
        RandomSplit,
        select_rows,
    )
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
    from lit_dpo.module import PreferenceModule
    from lit_dpo.pairs import PairBatch, PairLogps
    from lit_dpo.pretrained import trusting_remote_code
    from lit_dpo.references.adapter import AdapterReference
    from lit_dpo.references.base import Reference
    from lit_dpo.references.cached import CachedReference
    from lit_dpo.references.frozen import FrozenReference
    from lit_dpo.references.mixed import MixedReference
    from lit_dpo.references.synced import SyncedReference
    from lit_dpo.rounds import (
        Active,
        AllPairs,
        BestVsWorst,
        ChosenVsSample,
        Command,
        Discriminated,
        Discriminator,
        Filtered,
        ImplicitReward,
        Judge,
        OnPolicy,
        Picker,
        RewardModel,
        RightVsWrong,
        SelfPlay,
        Verifier,
    )
    from lit_dpo.schedules import WarmupDecay
    from lit_dpo.scoring.score import Scorer, score
    from lit_dpo.vllm_engine import VLLM
else:
    # The names above, from the modules that have them, tried in this order: those that import least come first.
    _HOMES = ("pairs", "losses", "schedules", "data", "adapters", "scoring.score", "pretrained", "references", "rounds")
    _HOMES += ("module", "vllm_engine")

    def __getattr__(name: str) -> object:
        """Import what is asked for now: all of it takes seconds, which no `lit-dpo --help` should wait for."""
        if name in __all__:
            found = next(home for home in map(_imported, _HOMES) if hasattr(home, name))
            return getattr(found, name)
        if not name.startswith("_") and importlib.util.find_spec(f"{__name__}.{name}") is not None:
            return _imported(name)
        raise AttributeError(f"module `{__name__}` has no `{name}`")

    def __dir__() -> list[str]:
        """The names above, and what every module has."""
        return sorted({*globals(), *__all__})

    def _imported(name: str) -> object:
        return importlib.import_module(f"{__name__}.{name}")
