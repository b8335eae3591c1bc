"""Options of the command line, read from the source of what they belong to, without importing it.

Importing torch, Lightning and transformers takes seconds; a person who asks for help or has mistyped an option should
not wait for that. The source is parsed anew each time, so that nothing here can be out of date.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from lit_dpo.cli.tools import TOOLS

_PACKAGE = Path(__file__).parents[1]
_PLAIN = {"int", "float", "bool", "str", "None", "Optional", "Union", "list", "Literal"}
_ARGUMENT = re.compile(r"(\w+)(?: \([^)]*\))?: (.*)")  # of a docstring: `name: text`


@dataclass(frozen=True)
class Parameter:
    """A parameter of a function.

    Args:
        name: Its name.
        type: Its annotation, as it is written.
        default: Its default, as it is written; `None` if it must be given.
        help: What its docstring says.
        nested: Whether it may have options of its own, because its type is more than text and numbers.
    """

    name: str
    type: str
    default: str | None
    help: str
    nested: bool


def trainer() -> tuple[Parameter, ...]:
    """Parameters of Lightning's Trainer."""
    found = importlib.util.find_spec("lightning")
    assert found is not None
    assert found.submodule_search_locations is not None
    return of_class(Path(found.submodule_search_locations[0]) / "pytorch" / "trainer" / "trainer.py", "Trainer")


def module() -> tuple[Parameter, ...]:
    """Parameters of `PreferenceModule`."""
    return of_class(_PACKAGE / "module.py", "PreferenceModule")


def data() -> tuple[Parameter, ...]:
    """Parameters of `PreferenceDataModule`."""
    return of_class(_PACKAGE / "data" / "datamodule.py", "PreferenceDataModule")


def tool(name: str) -> tuple[Parameter, ...]:
    """Parameters of a command that is one function."""
    function = _function(name)
    return _parameters(function, ast.get_docstring(function) or "")


def about(name: str) -> tuple[str, ...]:
    """What a command that is one function does, a text a paragraph: its docstring up to the arguments."""
    text = re.split(r"^Args:$", ast.get_docstring(_function(name)) or "", maxsplit=1, flags=re.MULTILINE)[0]
    return tuple(" ".join(paragraph.split()) for paragraph in text.strip().split("\n\n"))


def _function(name: str) -> ast.FunctionDef:
    found = TOOLS[name]
    path = _PACKAGE.parent.joinpath(*found.module.split(".")).with_suffix(".py")
    [function] = (node for node in _nodes(path) if getattr(node, "name", "") == found.function)
    assert isinstance(function, ast.FunctionDef)
    return function


def in_words(annotation: str) -> str:
    """A type as a person names it, where it is a plain one; nothing is said of `None`, which a default tells.

    >>> in_words("int | None"), in_words("Dtype"), in_words("Reference | None")
    ('whole number', 'float32, bfloat16, float16, float64', 'Reference | None')
    """
    names = [name for name in annotation.split(" | ") if name != "None"]
    known = {
        "int": "whole number",
        "float": "number",
        "bool": "true or false",
        "str": "text",
        "list[str]": "one or more",
    }
    known |= {name: choices for name, choices in _choices().items() if name in names}
    return " or ".join(known[name] for name in names) if names and {*names} <= {*known} else annotation


@cache
def _choices() -> dict[str, str]:
    """Names that stand for a choice between texts, wherever the package defines them, with the texts."""
    pattern = re.compile(r"^(\w+) = Literal\[(.*?)\]$", re.MULTILINE)
    found = [match for path in _PACKAGE.rglob("*.py") for match in pattern.finditer(path.read_text(encoding="utf-8"))]
    return {match[1]: ", ".join(re.findall(r'"(.*?)"', match[2])) for match in found}


@cache
def of_class(path: Path, name: str) -> tuple[Parameter, ...]:
    """Parameters of the constructor of a class in a file, or the fields of a dataclass."""
    [found] = (node for node in _nodes(path) if isinstance(node, ast.ClassDef) and node.name == name)
    text = ast.get_docstring(found) or ""
    for node in found.body:
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            return _parameters(node, f"{text}\n{ast.get_docstring(node) or ''}")
    fields = (node for node in found.body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name))
    return tuple(
        _parameter(ast.unparse(field.target), field.annotation, field.value, _arguments(text))
        for field in fields
        if "ClassVar" not in _names([field.annotation])
    )


@cache
def flags() -> dict[str, str]:
    """Every option that the source of the command line itself names, such as `--threads`, with its help if it has."""
    nodes = [n for file in ("app", "flags") for top in _nodes(_PACKAGE / "cli" / f"{file}.py") for n in ast.walk(top)]
    texts = (node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str))
    found = {text: "" for text in texts if re.fullmatch(r"--[a-z][\w-]*", text)}
    for node in nodes:
        if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            for keyword in node.keywords:
                if node.args[0].value in found and keyword.arg == "help":
                    found[str(node.args[0].value)] = str(ast.literal_eval(keyword.value))
    return found


@cache
def pluggable() -> dict[str, dict[str, tuple[str, ...]]]:
    """By option: our classes that it can name, each with the names of its own options."""
    places = {
        "model.loss": ("losses/*.py", "PreferenceLoss"),
        "model.reference": ("references/*.py", "Reference"),
        "model.adapter": ("adapters.py", "LoRA"),
        "model.lr_scheduler": ("schedules.py", "WarmupDecay"),
        "data.partition": ("data/splits.py", "Partition"),
    }
    found: dict[str, dict[str, tuple[str, ...]]] = {}
    for option, (pattern, kind) in places.items():
        for path in sorted(_PACKAGE.glob(pattern)):
            for node in _nodes(path):
                if isinstance(node, ast.ClassDef) and (kind in _names(node.bases) or _stands_alone(node, kind)):
                    names = tuple(parameter.name for parameter in of_class(path, node.name))
                    found.setdefault(option, {})[node.name] = names
    return found


def _stands_alone(node: ast.ClassDef, kind: str) -> bool:
    """Whether a class is the one that an option takes, and not the base of several."""
    return node.name == kind and "ABC" not in _names(node.bases)


def _names(nodes: list[ast.expr]) -> set[str]:
    return {child.id for node in nodes for child in ast.walk(node) if isinstance(child, ast.Name)}


@cache
def _nodes(path: Path) -> tuple[ast.stmt, ...]:
    return tuple(ast.parse(path.read_bytes()).body)


def _parameters(function: ast.FunctionDef, docstring: str) -> tuple[Parameter, ...]:
    helps, arguments = _arguments(docstring), function.args
    positional = [argument for argument in (*arguments.posonlyargs, *arguments.args) if argument.arg != "self"]
    missing: list[ast.expr | None] = [None] * (len(positional) - len(arguments.defaults))
    given = [*zip(positional, [*missing, *arguments.defaults], strict=True)]
    given += zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    return tuple(_parameter(argument.arg, argument.annotation, default, helps) for argument, default in given)


def _parameter(name: str, annotation: ast.expr | None, default: ast.expr | None, helps: dict[str, str]) -> Parameter:
    nested = annotation is None or not _names([annotation]) <= _PLAIN
    return Parameter(
        name,
        "" if annotation is None else ast.unparse(annotation),
        None if default is None else ast.unparse(default),
        helps.get(name, ""),
        nested,
    )


def _arguments(docstring: str) -> dict[str, str]:
    """What a docstring in Google's style says of each argument."""
    found: dict[str, str] = {}
    indent, name = -1, ""
    for line in docstring.splitlines():
        text, depth = line.strip(), len(line) - len(line.lstrip())
        if text.endswith(":") and depth == 0:
            indent, name = (0 if text == "Args:" else -1), ""
        elif indent >= 0 and text:
            indent = indent or depth
            if depth == indent and (entry := _ARGUMENT.match(text)):
                name = entry[1]
                found[name] = entry[2]
            elif name and depth > indent:
                found[name] = f"{found[name]} {text}"
    return found
