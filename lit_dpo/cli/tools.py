"""The commands that are one function each: where it stands, and what it does in a line."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tool:
    """A function that is a command; its parameters are the options, its docstring their help.

    Args:
        module: The module it is defined in; imported only when the command runs.
        function: Its name. Parameters without a default are positional.
        about: What it does, for the list of commands.
    """

    module: str
    function: str
    about: str


TOOLS = {
    "export": Tool("lit_dpo.export", "export_run", "write a checkpoint's policy as a folder that transformers loads"),
}
