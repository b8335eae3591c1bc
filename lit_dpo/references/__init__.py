"""Where the reference log-probs come from."""

from lit_dpo.references.adapter import AdapterReference
from lit_dpo.references.base import Reference
from lit_dpo.references.cached import CachedReference
from lit_dpo.references.frozen import FrozenReference
from lit_dpo.references.mixed import MixedReference
from lit_dpo.references.synced import SyncedReference

__all__ = [
    "AdapterReference",
    "CachedReference",
    "FrozenReference",
    "MixedReference",
    "Reference",
    "SyncedReference",
]
