"""What the command line answers before anything large is imported: help, the version, and the commonest mistakes.

The full parser stays the authority: what is let through here is checked again there. What is refused here names an
option, a command or a file that does not exist, whatever else is given.
"""

from __future__ import annotations

import re
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import yaml

from lit_dpo.cli import configs, signatures
from lit_dpo.cli.messages import did_you_mean
from lit_dpo.cli.signatures import Parameter
from lit_dpo.cli.tools import TOOLS, WHOLE
from lit_dpo.data.read import missing
from lit_dpo.version import __version__

COMMANDS = {
    "fit": "train",
    "validate": "measure a model on the validation pairs",
    "test": "measure a model on the test pairs",
    "predict": "write rewards and log-probs of every pair to a file",
    **WHOLE,
    **{name: tool.about for name, tool in TOOLS.items()},
    "configs": "list the shipped configurations, or copy one to a file",
}
_ALIASES = {"train": "fit", "eval": "evaluate", "generate": "sample", "upload": "push"}
_ALIASES |= {"convert": "export", "save": "export"}
_LIGHTNINGS = {  # options of LightningCLI itself
    "-h, --help": "Show this help.",
    "-c, --config FILE": "A configuration in YAML, or the name of a shipped one, which `lit-dpo configs` lists; of "
    "several the later ones win, and options win over all.",
    "--print_config": "Print the whole configuration and stop.",
    "--seed_everything SEED": "Seed of all random numbers.",
    "--ckpt_path PATH": "The checkpoint to go on from, or to measure; `last` is that of the newest run.",
}
_OWN = {  # options of one command or some: their help, and the commands
    "--verbose": ("Whether to print the results.", "validate", "test"),
    "--return_predictions": ("Whether to keep the predictions in memory too.", "predict"),
    "--pairs": ("How many pairs to show, 4 by default, those of the first batches.", "inspect"),
    "--score": ("Whether to load the model and measure how well it tells chosen from rejected already.", "inspect"),
    "--html": ("File to write as a page, besides what the terminal shows.", "inspect"),
    "--memory": ("GiB of memory that the run may take; without it, what this machine has left.", "check"),
}
_FLAGS = {  # on the command line only, never in a file
    "--allow-changes": "Resume with another configuration than that of the run.",
    "--allow-command": "Let the configuration name a command that judges completions.",
    "--allow-import PACKAGE": "Let the configuration name classes of that package.",
    "--overwrite": "Replace a file, where a command writes one.",
    "--trust-remote-code": "Let a model or tokenizer run the Python code that comes with it.",
}
_RUNS_OWN = {"--ckpt_path", "--predictions", "--first_reference", "--allow-changes"}  # of no use before a run
_USUAL_NAMES = {"learning_rate": "lr", "epochs": "max_epochs", "steps": "max_steps", "seed": "seed_everything"}
_SOURCES: dict[
    str, tuple[tuple[str, ...], ...]
] = {  # which sources of data a command reads; of several in one place the first that is given
    **dict.fromkeys(("fit", *WHOLE), (("train",), ("validation",))),
    "validate": (("validation", "train"),),
    "test": (("test", "validation", "train"),),
    "predict": (("predict", "test", "validation", "train"),),
}

_ABOUT = """Preference-tune language models with PyTorch Lightning.

usage: lit-dpo COMMAND [options]

commands:
{commands}

options:
  --help     this text; `lit-dpo COMMAND --help` lists the options of a command
  --version  the version of this package

`lit-dpo fit --config quickstart` trains a tiny model in under a minute, with nothing to download.

`--ckpt_path last` goes on with the newest run exactly where it was stopped; `--allow-changes` lets its configuration
differ. `--allow-import PACKAGE` lets the configuration name classes of that package besides those of lit_dpo, Lightning
and torch.optim. `--trust-remote-code` lets a model or tokenizer run the Python code that comes with it; `export` needs
it anew. `--overwrite` lets a command replace a file. These flags count on the command line only, never in a file.
"""
_ABOUT_CONFIGS = (
    "Without arguments, list the shipped configurations, which `--config NAME` finds from any folder. With a name and "
    "a file, copy that one to a new file; nothing is written over."
)


def answer(args: Sequence[str]) -> None:
    """End with an answer, where one can be given without importing what trains.

    Raises:
        SystemExit: It was given: status 0 for help and version, 2 for a mistake.
    """
    command = args[0] if args else ""
    if command in ("--version", "-V"):
        _say(f"lit-dpo {__version__}")
    if command in ("--help", "-h", "help"):
        commands = "\n".join(f"  {name:<10} {what}" for name, what in COMMANDS.items())
        _say(_ABOUT.format(commands=commands))
    if not command or (command not in COMMANDS and not command.startswith("-")):
        choice = f"the commands are {{{','.join(COMMANDS)}}}"
        near = [_ALIASES[command]] if command in _ALIASES else did_you_mean(command, COMMANDS)
        _refuse(f"there is no command `{command}`: {choice}" if command else f"no command: {choice}", near)
    if command in COMMANDS and {"--help", "-h"} & set(args):
        _say(_help(command))
    if command == "configs":
        _configs(args[1:])
    if command in _SOURCES or command in TOOLS:
        _check_options(command, args[1:])
    given = [(name, configs.meant(value) if name in configs.OPTIONS else value) for name, value in _values(args)]
    for option, value in given:
        if option in configs.OPTIONS and _names_no_file(value):
            raise_missing(value)
    elsewhere = any(re.match(r"--(data|print_config)(=|$)|--data\.\w+\+", argument) for argument in args)
    if command in _SOURCES and not elsewhere:
        _check_sources(command, given)


# -- options ----------------------------------------------------------------------------------------------------------


def options(command: str) -> dict[str, Parameter | None]:
    """Every option of a command, with what is known of it; those that may have options of their own say so."""
    found: dict[str, Parameter | None] = {}
    if command in TOOLS:  # whose parser brings two options of its own
        found |= {f"--{parameter.name}": parameter for parameter in signatures.tool(command)}
        return found | dict.fromkeys(["--config", "--print_config", *signatures.flags()])
    for group, parameters in _groups().items():
        found |= {f"--{group}.{parameter.name}": parameter for parameter in parameters}
        found[f"--{group}"] = None
    names = re.findall(r"-+\w+", " ".join(line.partition(" FILE")[0] for line in _LIGHTNINGS))
    own = [name for name, (_, *commands) in _OWN.items() if command in commands]
    return found | dict.fromkeys([*names, *own, *signatures.flags()])


def _groups() -> dict[str, tuple[Parameter, ...]]:
    return {"model": signatures.module(), "data": signatures.data(), "trainer": signatures.trainer()}


def _check_options(command: str, args: Sequence[str]) -> None:
    known = options(command)
    for argument in args:
        name = argument.partition("=")[0]
        if name.startswith("--") and not _is_known(name.removesuffix("+"), known):
            near = did_you_mean(name, known) if command in TOOLS else near_options(name, known)
            _refuse(f"there is no option `{name}`", near)


def _is_known(name: str, known: dict[str, Parameter | None]) -> bool:
    if name in known:
        return True
    parents = [name[: match.start()] for match in re.finditer(r"\.", name)]
    return any((parameter := known.get(parent)) is not None and parameter.nested for parent in parents)


def near_options(name: str, known: Sequence[str] | dict[str, Any]) -> list[str]:
    """Options that were probably meant: with the same last name, or a similar one."""
    nested = {
        f"--{option}.{own}" for option, classes in signatures.pluggable().items() for names in classes.values()
        for own in names
    }  # fmt: skip
    everything = {*known, *nested, "--model.optimizer.lr", "--model.optimizer.weight_decay"}
    last = name.rpartition(".")[2].removeprefix("--").replace("-", "_")
    wanted = {last, _USUAL_NAMES.get(last, last)}
    if same := sorted(option for option in everything if re.split(r"\.|--", option)[-1] in wanted):
        prefix = name.rpartition(".")[0]
        return [option for option in same if prefix and option.startswith(prefix)] or same[:3]
    return did_you_mean(name, everything)


# -- files ------------------------------------------------------------------------------------------------------------


def _values(args: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Options and their values, given as `--name value` or `--name=value`."""
    for index, argument in enumerate(args):
        name, equals, value = argument.partition("=")
        if name.startswith("-") and equals:
            yield name, value
        elif name.startswith("-") and index + 1 < len(args):
            yield name, args[index + 1]


def _names_no_file(value: str) -> bool:
    """Whether a configuration is a path, rather than YAML itself or standard input, and nothing is there."""
    path = Path(value).expanduser()
    return value != "-" and not re.search(r"[{:\n]", value) and (path.is_dir() or not path.exists())


def raise_missing(value: str) -> NoReturn:
    """Refuse a configuration that does not exist, with the nearest name beside it."""
    path = Path(value).expanduser()
    if path.is_dir():
        known = path / "config.yaml"
        within = [str(known)] if known.is_file() else []
        _refuse(f"`{value}` is a folder and no configuration file: name a file", within)
    beside = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    near = [str(path.with_name(name)) for name in did_you_mean(path.name, beside)]
    if not path.suffix and path.name == value:
        near += [name for name in did_you_mean(value, configs.shipped()) if name not in near]
    _refuse(f"there is no configuration file `{value}`", near)


def _check_sources(command: str, given: Sequence[tuple[str, str]]) -> None:
    """Refuse data that are not there; what cannot be read so simply is left to the full parser."""
    sources: dict[str, Any] = {}
    names = {name for names in _SOURCES[command] for name in names}
    for option, value in given:
        try:
            if option in configs.OPTIONS and Path(value).is_file():
                sources |= (yaml.safe_load(Path(value).read_text(encoding="utf-8")) or {}).get("data") or {}
            elif option.startswith("--data.") and option.removeprefix("--data.") in names:
                sources[option.removeprefix("--data.")] = yaml.safe_load(value) if value[:1] in "['\"" else value
        except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError):
            return
    for choice in _SOURCES[command]:
        found: Any = next((sources[name] for name in choice if sources.get(name)), [])
        for source in found if isinstance(found, list) else [found]:
            if isinstance(source, str) and source != "null" and (problem := missing(source)):
                _refuse(problem)


def _configs(args: Sequence[str]) -> NoReturn:
    """List the shipped configurations, or copy one out."""
    if not args:
        _say(configs.described())
    if args[0] not in (known := configs.shipped()):
        _refuse(f"no configuration `{args[0]}` is shipped: `lit-dpo configs` lists them", did_you_mean(args[0], known))
    if len(args) != 2:
        _refuse(f"`lit-dpo configs {args[0]} FILE` copies to one file: name it")
    try:
        configs.copy(args[0], Path(args[1]))
    except OSError as error:
        _refuse(str(error))
    _say(f"Copied {args[0]} to {args[1]}")


# -- words ------------------------------------------------------------------------------------------------------------


def _help(command: str) -> str:
    if command == "configs":
        return f"usage: lit-dpo configs [NAME FILE]\n\n{_wrapped(_ABOUT_CONFIGS)}"
    if command in TOOLS:
        return _help_of_tool(command)
    own = {name: text for name, (text, *commands) in _OWN.items() if command in commands}
    lines = [f"usage: lit-dpo {command} [options]\n", _wrapped(f"`lit-dpo {command}`: {COMMANDS[command]}.", 0), ""]
    if command in WHOLE:
        lines += [f"  {name}\n{_wrapped(text)}" for name, text in own.items()]
        lines += ["", _wrapped("The other options are those of `lit-dpo fit`, which say what would be trained.", 0), ""]
        own = {}
    left_out = {"fit": (), "check": _RUNS_OWN | {"--overwrite"}}.get(command, _RUNS_OWN if command in WHOLE else ())
    general = {**_LIGHTNINGS, **dict(sorted({**signatures.flags(), **_FLAGS, **own}.items()))}
    lines += [
        f"  {name}\n{_wrapped(text)}" for name, text in general.items() if text and name.split()[0] not in left_out
    ]
    for group, parameters in _groups().items():
        lines.append(f"\n{group}:")
        lines += [_entry(f"--{group}.{parameter.name}", parameter) for parameter in parameters]
    own_options = "A class has options of its own, such as `--model.loss.beta`: `--model.loss.help DPOLoss` lists them."
    lines += ["", _wrapped(own_options, 0)]
    return "\n".join(lines)


def _help_of_tool(command: str) -> str:
    tool, parameters = TOOLS[command], signatures.tool(command)
    front = {p.name: p.name.upper() for p in parameters if p.default is None}  # given without a name
    front |= {name: f"{name.upper().removesuffix('S')}..." for name in tool.several[:1]}
    named = [name for name in tool.required if name not in front]
    words = [*front.values(), *(f"--{name} {name.upper()}{'...' * (name in tool.several)}" for name in named)]
    lines = [f"usage: lit-dpo {command} {' '.join(words)} [options]\n"]
    lines += [f"{_wrapped(paragraph, 0)}\n" for paragraph in signatures.about(command)]
    for parameter in parameters:
        needed = parameter.name in tool.required
        name = front.get(parameter.name, f"--{parameter.name}")
        lines.append(_entry(name, replace(parameter, default=None) if needed else parameter))
    return "\n".join(lines)


def _entry(name: str, parameter: Parameter) -> str:
    classes = signatures.pluggable().get(name.removeprefix("--"), {})
    facts = [signatures.in_words(parameter.type)]
    if parameter.default not in ("None", "[]"):
        facts.append("required" if parameter.default is None else f"default: {_literal(parameter.default)}")
    facts += [f"classes: {', '.join(sorted(classes))}"] if classes else []
    separated = "; ".join(facts)
    return f"  {name}\n{_wrapped(f'{parameter.help} ({separated})')}"


def _literal(default: str) -> str:
    """A default as a person would type it."""
    return {"True": "true", "False": "false"}.get(default, default.strip("'\""))


def _wrapped(text: str, indent: int = 6) -> str:
    width = min(120, shutil.get_terminal_size().columns)
    return textwrap.fill(text, width, initial_indent=" " * indent, subsequent_indent=" " * indent)


def _say(text: str) -> NoReturn:
    sys.stdout.write(text.rstrip() + "\n")
    raise SystemExit(0)


def _refuse(text: str, near: Sequence[str] = ()) -> NoReturn:
    hint = f"{text.rstrip('.')}. Did you mean {' or '.join(near)}?" if near else text
    sys.stderr.write(f"lit-dpo: error: {hint}\n")
    raise SystemExit(2)
