"""Imports run toward lower floors only, and each library is known to the few files that need it."""

import ast
import graphlib
import re
import sys
from pathlib import Path

import pytest

import lit_dpo

PACKAGE = Path(lit_dpo.__file__).parent
FLOORS = {
    "version": 0,
    "pairs": 0,
    "files": 0,
    "own_code": 0,
    "processes": 0,
    "plain_text": 0,
    "lightning_private": 0,
    "scoring.logps": 1,
    "scoring.attention": 1,
    "pair_data": 1,
    "references.table": 1,
    "checkpoints": 1,
    "watch": 1,
    "model_card": 7,
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
    "sampling": 4,
    "vllm_engine": 4,
    "vllm_worker": 0,
    "strategies": 4,
    "data": 4,
    "references": 5,
    "rounds": 5,
    "hparams": 6,
    "assembly": 6,
    "extrapolate": 6,
    "module": 7,
    "trained": 8,
    "export": 8,
    "starting": 8,
    "callbacks": 9,
    "stepwise": 10,
    "tools": 11,
    "cli": 12,
    "__init__": 12,
    "__main__": 13,
}
# On one floor, what may build on what.
NEIGHBOURS = {
    ("metrics", "losses"),
    ("export", "trained"),
    ("assembly", "hparams"),
    ("data", "sampling"),
    ("vllm_engine", "sampling"),
}
TORCH_ONLY = {"pairs", "scoring.logps", "scoring.attention", "losses", "checkpoints.finite"}
# `references`, `assembly` and `module` for the names of types; `data` for type checking alone, which does not count.
KNOW_TRANSFORMERS = {"scoring", "models", "tokenizers", "adapters", "pretrained", "references", "rounds"}
KNOW_TRANSFORMERS |= {"quantization", "resume", "assembly", "module", "export", "extrapolate", "sampling", "trained"}
KNOW_TRANSFORMERS |= {"vllm_engine"}
LONGEST = 350  # lines of a file


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


def test_no_file_is_too_long():
    assert {module_of(path) for path in FILES if len(path.read_text().splitlines()) > LONGEST} == set()


def test_no_test_has_a_class_with_a_name_of_the_package():
    """The command line looks short names up among all classes of the process, those of earlier tests included."""
    found = {}
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        found |= dict.fromkeys(re.findall(r"(?m)^\W*class (\w+)\b", path.read_text(encoding="utf-8")), path.name)
    assert "OwnHinge" in found  # one that stands in a text, which a test writes to a file
    assert {name: found[name] for name in found if name in lit_dpo.__all__} == {}


def test_data_knows_lightning_in_its_data_module_alone():
    knows = {
        module_of(path) for path in FILES if any(name.startswith("lightning") for name in imported(path.read_text()))
    }
    assert {name for name in knows if name.startswith("data.")} - {"data.datamodule"} == set()


def test_code_in_docstrings_stands_in_single_backticks():
    """As the manual reads them; three in a row fence a block."""
    assert [module_of(path) for path in FILES if re.search("(?<!`)``(?!`)", path.read_text())] == []


@each_file
def test_files_are_renamed_into_place_by_the_one_durable_writer(path):
    """A journal and a file of tokens are appended to, and make their own; a checkpoint or a log is renamed whole."""
    names = {ast.unparse(node) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
    found = names & {"os.replace", "os.rename", "tempfile.mkstemp", "tempfile.mkdtemp", "tempfile.NamedTemporaryFile"}
    allowed = {"checkpoints.durable": {"os.replace"}, "checkpoints.journal": {"tempfile.mkstemp"}}
    allowed["data.token_writer"] = {"tempfile.mkstemp"}
    assert found == allowed.get(module_of(path), set())


def folders(files):
    """The top-level folders and files of the package, each with those that it imports, from ``{module: imports}``."""
    graph = {}
    for module, names in files.items():
        own = module.split(".")[0]
        others = {name.split(".")[1] for name in names if name.startswith("lit_dpo.")}
        graph.setdefault(own, set()).update(others - {own})
    return graph


def drawing(graph):
    """The folders from the top down, a floor above all that it imports; raises CycleError if there is a circle."""
    floors = {}
    for name in graphlib.TopologicalSorter(graph).static_order():
        floors[name] = 1 + max((floors[other] for other in graph.get(name, ())), default=-1)
    lines = []
    for floor in sorted(set(floors.values()), reverse=True):
        for name in sorted(name for name in floors if floors[name] == floor):
            below = sorted(graph.get(name, ()), key=lambda other: (-floors[other], other))
            lines.append(f"{floor:>2}  {name:<12} {', '.join(below)}".rstrip())
    return "\n".join(lines)


def test_the_folders_stand_above_what_they_import():
    """Prints the drawing; `pytest -s -k stand_above` shows it."""
    files = {module_of(path): imported(path.read_text(), type_checking=True) for path in FILES}
    files.pop("__init__")  # the list of public names
    text = drawing(folders(files))
    print(f"\n{text}")
    order = [line.split()[1] for line in text.splitlines()]
    assert set(order) == {part.split(".")[0] for part in FLOORS} - {"__init__"}
    assert order.index("cli") < order.index("module") < order.index("losses") < order.index("pairs")


def test_a_circle_of_folders_is_found():
    with pytest.raises(graphlib.CycleError):
        drawing(folders({"a.one": ["lit_dpo.b.two"], "b.three": ["lit_dpo.a.four"]}))


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
