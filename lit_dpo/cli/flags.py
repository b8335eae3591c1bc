"""What only the command line may say, never a file."""

from __future__ import annotations

import importlib
import os
import shlex
import sysconfig
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_SWITCHES = ("--allow-changes", "--overwrite", "--trust-remote-code", "--allow-command")
KEPT = "What was done of the step is kept"


@dataclass(frozen=True)
class Flags:
    """What only the command line may say, never a file.

    Args:
        packages: Packages whose classes a configuration may name.
        allow_changes: Resume with another configuration or other data than the checkpoint's.
        overwrite: Let `predict` replace a file.
        trust_remote_code: Let the Python code of a model or tokenizer run.
        allow_command: Let a configuration name a command that judges completions.
    """

    packages: tuple[str, ...] = ()
    allow_changes: bool = False
    overwrite: bool = False
    trust_remote_code: bool = False
    allow_command: bool = False


def take_flags(args: Sequence[str]) -> tuple[list[str], Flags]:
    """Split off the flags that only the command line may set from the other arguments.

    A switch stands alone, or has `true` or `false` behind it, as the other options have.

    Raises:
        ValueError: The package to import from has no such name as packages have, or a switch another value.
    """
    rest: list[str] = []
    packages: list[str] = []
    switches: dict[str, bool] = {}
    remaining = [*reversed(args)]
    while remaining:
        argument = remaining.pop()
        name, given, value = argument.partition("=")
        if name in _SWITCHES:
            if not given:
                value = remaining.pop() if remaining and remaining[-1] in ("true", "false") else "true"
            if value not in ("true", "false"):
                raise ValueError(f"`{name}` is true or false, got {value!r}: write one of them, or `{name}` alone.")
            switches[name.removeprefix("--").replace("-", "_")] = value == "true"
        elif name == "--allow-import":
            package = value or (remaining.pop() if remaining else "")
            if not all(part.isidentifier() for part in package.split(".")):
                raise ValueError(f"`--allow-import` needs the import path of a package, got {package!r}.")
            packages.append(package)
        else:
            rest.append(argument)
    return rest, Flags(tuple(packages), **switches)


def resuming(args: Sequence[str], checkpoint: str) -> list[str]:
    """The same arguments, to go on with the run from a checkpoint."""
    rest: list[str] = []
    remaining = iter(args)
    for argument in remaining:
        if argument == "--ckpt_path":
            next(remaining, None)
        elif not argument.startswith("--ckpt_path="):
            rest.append(argument)
    return [*rest, "--ckpt_path", checkpoint]


def kept(error: BaseException, args: Sequence[str]) -> str:
    """What to say of a step that was stopped before there was a checkpoint; nothing if none was begun.

    Args:
        error: What stopped it, with the note `KEPT` if something is kept.
        args: Those of the command line.
    """
    if KEPT not in getattr(error, "__notes__", []):
        return ""
    return f"{KEPT}. To go on: {shlex.join(['lit-dpo', *resuming(args, 'last')])}\n"


def import_packages(packages: Sequence[str]) -> None:
    """Import what `--allow-import` names, so that an error in it is told as what it is.

    Raises:
        ValueError: One of them is not found, or fails while it is imported.
    """
    for package in packages:
        try:
            importlib.import_module(package)
        except Exception as error:
            stem, _, ending = package.rpartition(".")
            missing = error.name if isinstance(error, ModuleNotFoundError) else None
            if missing == package and ending == "py":
                hint = f"give the name without its ending, `--allow-import {stem}`"
            elif missing and f"{package}.".startswith(f"{missing}."):
                hint = "put the folder that it lies in on PYTHONPATH, such as with `PYTHONPATH=. lit-dpo ...`"
            else:
                places = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
                if isinstance(error, SyntaxError) and error.filename:
                    places.append((error.filename, error.lineno))
                file, line = [place for place in places if not _of_python(place[0])][-1]
                hint = f"mend `{os.path.relpath(file)}`, line {line}"
            reason = f"{type(error).__name__}: {error}" if missing is None else str(error)
            raise ValueError(f"`--allow-import {package}` cannot be imported ({reason}): {hint}.") from error


def _of_python(file: str) -> bool:
    """Whether a file belongs to Python itself, and so is not what a user has to mend."""
    return file.startswith("<") or Path(file).is_relative_to(sysconfig.get_path("stdlib"))
