"""Preference-tune language models with PyTorch Lightning: swap the loss object, not the trainer."""

import importlib
import importlib.util
from typing import TYPE_CHECKING

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
]

if TYPE_CHECKING:
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
else:
    # The names above, from the modules that have them, tried in this order: those that import least come first.
    _HOMES = ("pairs", "losses", "schedules", "data", "models", "scoring", "reference", "cached_reference", "module")

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
