"""Where the reference log-probs come from."""

from lit_dpo.references.adapter import AdapterReference
from lit_dpo.references.base import Reference
from lit_dpo.references.cached import CachedReference
from lit_dpo.references.frozen import FrozenReference

__all__ = ["AdapterReference", "CachedReference", "FrozenReference", "Reference"]
