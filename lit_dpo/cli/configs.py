"""The shipped configurations: found by name from any folder, listed, and copied out.

They stand at the top of the repository, in ``configs/``, and travel in the wheel as ``lit_dpo/configs/``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

_PACKAGE = Path(__file__).parents[1]
OPTIONS = ("--config", "-c")


def shipped() -> dict[str, Path]:
    """The files by name: methods, then overlays, both without a suffix, then launch scripts with theirs."""
    inside = _PACKAGE / "configs"
    root = inside if inside.is_dir() else _PACKAGE.parent / "configs"
    found = {path.stem: path for pattern in ("*.yaml", "overlays/*.yaml") for path in sorted(root.glob(pattern))}
    return found | {path.name: path for path in sorted(root.glob("launch/*"))}


def meant(value: str) -> str:
    """The path of what `--config` is given: the shipped configuration of that name, or else the value itself.

    A file that is there is always meant, whatever its name. A launch script is no configuration.
    """
    path = shipped().get(value)
    return str(path) if path and path.suffix == ".yaml" and not Path(value).is_file() else value


def with_paths(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """Arguments with the names of shipped configurations replaced by their paths.

    Returns:
        The arguments, and the names of those shipped configurations whose place a file of the same name has taken.
    """
    replaced, hidden = [], []
    for index, argument in enumerate(args):
        option, equals, value = argument.partition("=")
        if option in OPTIONS and equals:
            replaced.append(f"{option}={meant(value)}")
        elif index and args[index - 1] in OPTIONS:
            value = argument
            replaced.append(meant(value))
        else:
            replaced.append(argument)
            continue
        if value in shipped() and Path(value).is_file():
            hidden.append(value)
    return replaced, hidden


def described() -> str:
    """The list that ``lit-dpo configs`` prints: a name a line, and what it is."""
    return "\n".join(f"{name:<{_WIDTH}} {_first_comment(path)}" for name, path in shipped().items())


def copy(name: str, target: Path) -> None:
    """Write a shipped configuration to a new file.

    Args:
        name: As ``lit-dpo configs`` lists it.
        target: The file to make.

    Raises:
        FileExistsError: Something is there already.
        OSError: The file cannot be made.
    """
    content = shipped()[name].read_bytes()
    try:
        with target.open("xb") as file:
            file.write(content)
    except FileExistsError as error:
        raise FileExistsError(f"`{target}` exists already, and nothing is written over: name a new file.") from error
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise OSError(f"`{target}` cannot be made ({reason}): name a file in a folder that is there.") from error


_WIDTH = 14  # characters


def _first_comment(path: Path) -> str:
    lines = path.read_text(encoding="utf-8").splitlines()
    return next(line.removeprefix("# ") for line in lines if line.startswith("# "))
