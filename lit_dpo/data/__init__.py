"""Rows to batches: layouts, encoding, partitions, and the Lightning data module."""

from typing import TYPE_CHECKING

__all__ = [
    "BySource",
    "EasyToHard",
    "HardToEasy",
    "OneShot",
    "Partition",
    "Pool",
    "PreferenceDataModule",
    "RandomSplit",
    "select_rows",
]

if TYPE_CHECKING:
    from lit_dpo.data.datamodule import PreferenceDataModule
    from lit_dpo.data.partition import Partition, Pool
    from lit_dpo.data.selection import select_rows
    from lit_dpo.data.splits import BySource, EasyToHard, HardToEasy, OneShot, RandomSplit
else:

    def __getattr__(name: str) -> object:
        """Import what is asked for now, so that reading rows needs no torch."""
        if name not in __all__:
            raise AttributeError(f"module `lit_dpo.data` has no `{name}`")
        from lit_dpo.data import datamodule, partition, selection, splits

        return getattr(next(home for home in (partition, splits, selection, datamodule) if hasattr(home, name)), name)
