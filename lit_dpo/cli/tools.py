"""The commands that are one function each: where it stands, and what it does in a line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Tool:
    """A function that is a command; its parameters are the options, its docstring their help.

    Args:
        module: The module it is defined in; imported only when the command runs.
        function: Its name. Parameters without a default are positional.
        about: What it does, for the list of commands.
        several: Parameters that take several words, each a list whose default is empty. Of these the first is given
            without its name, before all options.
        required: Those that must be given, although the function has a default for them.
    """

    module: str
    function: str
    about: str
    several: tuple[str, ...] = ()
    required: tuple[str, ...] = ()


def as_options(tool: Tool, args: Sequence[str], switches: Sequence[str] = ()) -> list[str]:
    """The same arguments, with the words of each parameter that takes several joined to one list.

    Args:
        tool: The command.
        args: What stands behind it.
        switches: Parameters that are true if they are given without a value.

    >>> as_options(Tool("m", "f", "", ("runs", "train")), ["a", "b", "--train", "x.yaml", "y.yaml", "--seeds", "5"])
    ['--runs', '["a", "b"]', '--train', '["x.yaml", "y.yaml"]', '--seeds', '5']
    >>> as_options(Tool("m", "f", ""), ["folder", "--dry_run"], ["dry_run"])
    ['folder', '--dry_run', 'true']
    """
    groups: list[list[str]] = [[f"--{tool.several[0]}"] if tool.several else []]
    for argument in args:
        if argument.startswith("--"):
            groups.append([])
        groups[-1].append(argument)
    first, *rest = groups
    groups = rest if len(first) < 2 and tool.several else groups
    names, alone = {f"--{name}" for name in tool.several}, [[f"--{name}"] for name in switches]
    groups = [[*group, "true"] if group in alone else group for group in groups]
    return [
        word
        for group in groups
        for word in ([group[0], json.dumps(group[1:])] if group and group[0] in names else group)
    ]


TOOLS = {
    "export": Tool("lit_dpo.export", "export_run", "write a checkpoint's policy as a folder that transformers loads"),
    "plot": Tool("lit_dpo.tools.plot", "plot_runs", "draw what runs have logged", ("runs",), ("runs",)),
    "compare": Tool("lit_dpo.cli.comparing", "compare_runs", "tell whether runs differ", ("runs", "train")),
    "rounds": Tool("lit_dpo.tools.rounds", "show_rounds", "show what each round of a run's own pairs did"),
    "audit": Tool("lit_dpo.tools.audit", "audit_run", "list training rows whose label is probably wrong"),
    "sample": Tool(
        "lit_dpo.tools.sample",
        "sample_models",
        "show what models say to the same prompts",
        several=("models",),
        required=("models", "prompts"),
    ),
    "evaluate": Tool(
        "lit_dpo.tools.evaluate",
        "evaluate_models",
        "measure how often a model prefers the right completion, with intervals",
        several=("models", "data"),
        required=("models", "data"),
    ),
    "push": Tool("lit_dpo.tools.push", "push_folder", "upload an exported folder to the Hugging Face hub"),
}

WHOLE = {  # take the whole configuration of a fit; see `lit_dpo.cli.whole`
    "inspect": "show what a fit would train: pairs as they are collated, lengths, rows left out",
    "check": "find out in a minute whether a fit would run, and what memory and time it takes",
}
