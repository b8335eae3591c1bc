"""Checks of the data module's options."""

from __future__ import annotations

from collections.abc import Sequence


def check_sizes(**sizes: int) -> None:
    """Raise ValueError unless each of these options is at least 1."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"`{name}` must be at least 1, got {size}.")


def check_shares(validation_fraction: float, max_bad_share: float) -> None:
    """Raise ValueError unless both are shares."""
    if not 0 <= validation_fraction < 1:
        raise ValueError(f"`validation_fraction` must be at least 0 and less than 1, got {validation_fraction}.")
    if not 0 <= max_bad_share <= 1:
        raise ValueError(f"`max_bad_share` must be between 0 and 1, got {max_bad_share}.")


def check_values(values: Sequence[str] | None) -> list[str]:
    """The names of columns of numbers; raise ValueError unless they are a list of different names."""
    if isinstance(values, str) or len({*(values or ())}) < len(values or ()):
        raise ValueError(f"`values` must be a list of different column names, got {values!r}.")
    return list(values or ())
