"""Imports run toward lower floors only, and each library is known to the few files that need it."""

import ast
import sys
from pathlib import Path

import pytest

import lit_dpo

PACKAGE = Path(lit_dpo.__file__).parent
FLOORS = {
    "version": 0,
    "pairs": 0,
    "files": 0,
    "scoring.logps": 1,
    "scoring.attention": 1,
    "references.table": 1,
    "checkpoints": 1,
    "watch": 1,
    "model_card": 1,
    "quantization": 1,
    "resume": 2,
    "meter": 3,
    "gradients": 2,
    "pretrained": 2,
    "losses": 2,
    "metrics": 2,
    "schedules": 2,
    "scoring": 3,
    "tokenizers": 3,
    "adapters": 4,
    "models": 4,
    "scoring.audit": 5,
    "sampling": 4,
    "strategies": 4,
    "data": 4,
    "references": 5,
    "hparams": 6,
    "assembly": 6,
    "module": 7,
    "export": 8,
    "callbacks": 9,
    "stepwise": 10,
    "tools": 11,
    "cli": 12,
    "__init__": 12,
    "__main__": 13,
}
# On one floor, what may build on what.
NEIGHBOURS = {("metrics", "losses"), ("assembly", "hparams")}
TORCH_ONLY = {"pairs", "scoring.logps", "scoring.attention", "losses", "checkpoints.finite"}
# `references`, `assembly` and `module` for the names of types; `data` for type checking alone, which does not count.
KNOW_TRANSFORMERS = {"scoring", "scoring.audit", "models", "tokenizers", "adapters", "pretrained", "references"}
KNOW_TRANSFORMERS |= {"quantization", "resume", "assembly", "module", "export", "sampling"}


def imported(source, type_checking=False):
    """Names of the modules that a file imports, wherever the import stands, those for type checking left out."""
    tree = ast.parse(source)
    ignored = set()
    if not type_checking:
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and getattr(node.test, "id", None) == "TYPE_CHECKING":
                ignored |= {id(child) for statement in node.body for child in ast.walk(statement)}
    names = []
    for node in ast.walk(tree):
        if id(node) in ignored:
            continue
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports name the whole path"
            if node.module == "lit_dpo":  # `from lit_dpo import data` brings a module, or a name of `__init__`
                names += [f"lit_dpo.{alias.name}" for alias in node.names]
            else:
                names.append(node.module)
    return names


def part(name):
    """The part of the package that a module belongs to: the longest name in `FLOORS` that it begins with."""
    names = name.removeprefix("lit_dpo.").split(".")
    known = (".".join(names[:n]) for n in range(len(names), 0, -1))
    return next((part for part in known if part in FLOORS), None)


def module_of(path):
    """The name of a file as a module of the package."""
    names = [*path.relative_to(PACKAGE).with_suffix("").parts]
    return ".".join(names[:-1] if names[-1] == "__init__" and names[1:] else names)


def climbing(own, names):
    """The imports among ``names`` that a file of the part ``own`` must not have."""
    wrong = []
    for name in names:
        if not name.startswith("lit_dpo."):
            continue
        other = part(name)
        if other is None or (other != own and (own, other) not in NEIGHBOURS and FLOORS[other] >= FLOORS[own]):
            wrong.append(name)
    return wrong


FILES = sorted(PACKAGE.rglob("*.py"))
each_file = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))


def test_every_part_has_a_floor():
    assert {part(module_of(path)) for path in FILES} == set(FLOORS)


@each_file
def test_imports_go_down(path):
    assert climbing(part(module_of(path)), imported(path.read_text(), type_checking=True)) == []


@each_file
def test_libraries_stay_where_they_belong(path):
    own, libraries = module_of(path), {name.split(".")[0] for name in imported(path.read_text())}
    outside = libraries - set(sys.stdlib_module_names) - {"lit_dpo"}
    if own in TORCH_ONLY or part(own) in TORCH_ONLY:
        assert outside <= {"torch"}
    if part(own) not in KNOW_TRANSFORMERS:
        assert not outside & {"transformers", "peft", "tokenizers"}
    if "jsonargparse" in outside:
        assert part(own) == "cli"


@pytest.mark.parametrize(
    ("own", "source"),
    [
        ("pairs", "from lit_dpo.scoring import score"),
        ("data", "from lit_dpo.module import PreferenceModule"),
        ("data", "def late():\n    import lit_dpo.module"),
        ("losses", "from lit_dpo import models"),
        ("losses", "from lit_dpo import DPOLoss"),
        ("callbacks", "from lit_dpo.stepwise import fit_stepwise"),
        ("module", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from lit_dpo.cli import main"),
    ],
)
def test_an_import_upward_is_found(own, source):
    assert len(climbing(own, imported(source, type_checking=True))) == 1


def test_imports_for_type_checking_alone_are_told_apart():
    source = "from typing import TYPE_CHECKING\nimport torch\nif TYPE_CHECKING:\n    import transformers"
    assert imported(source) == ["typing", "torch"]
    assert imported(source, type_checking=True) == ["typing", "torch", "transformers"]
