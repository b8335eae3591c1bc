"""Checks of classes that a user wrote, made before they are called."""

from __future__ import annotations

import inspect


def refuse_signature(owner: object, method: str, *arguments: str) -> None:
    """Refuse an object whose method cannot be called as it is going to be.

    Args:
        owner: Has the method.
        method: Name of the method.
        arguments: Names of what it is called with, by position.

    Raises:
        ValueError: The method takes other arguments.
    """
    found = inspect.signature(getattr(owner, method))
    try:
        found.bind(*arguments)
    except TypeError:
        takes = ", ".join(["self", *found.parameters])
        raise ValueError(
            f"`{type(owner).__name__}.{method}` is called with ({', '.join(['self', *arguments])}), but takes "
            f"({takes}): define it with these arguments."
        ) from None
