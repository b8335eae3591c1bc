"""What a configuration may have executed: nothing but what the command line permits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(frozen=True)
class _Permission:
    packages: tuple[str, ...]
    command: bool


_given: ContextVar[_Permission | None] = ContextVar("permission", default=None)  # none is asked for in Python


@contextmanager
def permitting(packages: tuple[str, ...], command: bool) -> Iterator[None]:
    """Let judges execute this much while the context lasts.

    Args:
        packages: Packages whose functions may be a verifier.
        command: Whether a command may be started.
    """
    token = _given.set(_Permission(packages, command))
    try:
        yield
    finally:
        _given.reset(token)


def refuse_function(function: object) -> None:
    """Refuse a function of a package that was not permitted: a function that exists already would be called.

    Raises:
        ValueError: It is one.
    """
    given = _given.get()
    module = getattr(function, "__module__", None) or ""
    if given and not any(f"{module}.".startswith(f"{package}.") for package in given.packages):
        name = getattr(function, "__name__", type(function).__name__)
        raise ValueError(
            f"`{module}.{name}` may not be a verifier: if you trust that function with what the model says, add "
            f"`--allow-import {module}`."
        )


def refuse_command(command: str) -> None:
    """Refuse a command if none was permitted.

    Raises:
        ValueError: None was.
    """
    given = _given.get()
    if given and not given.command:
        raise ValueError(
            f"`{command}` may not judge, as a command of a configuration: if you trust it, add `--allow-command`."
        )
