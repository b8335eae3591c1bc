"""What the first of several processes says and does alone; for files that need nothing else of Lightning."""

from lightning.pytorch.utilities import rank_zero_info, rank_zero_only, rank_zero_warn

__all__ = ["rank_zero_info", "rank_zero_only", "rank_zero_warn"]
