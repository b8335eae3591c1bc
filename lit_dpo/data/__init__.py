"""Rows to batches: layouts, encoding, partitions, and the Lightning data module."""

from lit_dpo.data.datamodule import PreferenceDataModule
from lit_dpo.data.partition import BySource, EasyToHard, OneShot, Partition, RandomSplit

__all__ = ["BySource", "EasyToHard", "OneShot", "Partition", "PreferenceDataModule", "RandomSplit"]
