"""What the README shows is executed: its Python as it stands, its commands as far as parsing goes."""

import re
import shlex
from pathlib import Path

import pytest

from lit_dpo.cli import main
from tests import runs

pytestmark = [
    *runs.QUIET,
    pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning.pytorch.cli"),
    pytest.mark.filterwarnings("ignore:.*modules? in eval mode"),
    pytest.mark.filterwarnings("ignore:.*You defined a `validation_step`"),
]

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language, text=TEXT):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


PYTHON = blocks("python")
COMMANDS = [
    line for block in blocks("bash") for line in block.splitlines() if re.match(r"(PYTHONPATH=\. )?lit-dpo ", line)
]


def test_there_is_something_to_run():
    assert len(PYTHON) >= 1
    assert len(COMMANDS) >= 5
    assert blocks("python", "a\n```python\nx = 1\n```\n```bash\ny\n```\n") == ["x = 1\n"]


RESULTS = "".join(path.read_text() for path in sorted((ROOT / "benchmarks" / "results").glob("throughput_*.md")))


def ratios(opponent, data="hh_harmless"):
    """Speed with the pass counted (wall) and memory of lit_dpo over an opponent, in the results of a data set."""
    sections = [part for part in RESULTS.split("## ") if part.startswith(f"Throughput: {data},")]
    rows = [re.findall(rf"^\| lit_dpo / {opponent} .*$", part, re.MULTILINE) for part in sections]
    ((row,),) = [found for found in rows if found]
    cells = re.findall(r"([\d.]+)x", row)
    return float(cells[1]), float(cells[-1])


def test_the_headline_is_the_measured_one():
    """The other settings stand in docs/scale.md; `test_docs.py` ties them."""
    speed, memory = ratios("trl_default")
    assert f"**{speed:.1f}x as fast as TRL 1.16 at its defaults, in {memory:.2f}x of the memory**" in TEXT
    assert f"and {ratios('trl_best')[0]:.1f}x over its precomputed and sorted setting" in TEXT


@pytest.mark.parametrize("code", PYTHON, ids=lambda code: next(line for line in code.splitlines() if line)[:40])
def test_python_runs(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "block.py").write_text(code)
    exec(compile(code, str(tmp_path / "block.py"), "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_understood(command, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    _, *args = shlex.split(command.removeprefix("PYTHONPATH=. "), comments=True)
    if args[0] == "export":
        assert len(args) == 3
        return
    with pytest.raises(SystemExit) as stop:
        main([*args, "--print_config"])
    assert not stop.value.code, capsys.readouterr().err


def test_every_file_that_is_named_exists():
    for target in re.findall(r"\]\(([^)]+)\)", TEXT):
        assert target.startswith("http") or (ROOT / target.partition("#")[0]).exists(), target
    for config in re.findall(r"configs/[\w/]+\.yaml", TEXT):
        assert (ROOT / config).exists(), config


def test_every_promise_has_its_test():
    """CONTRIBUTING.md sets promises beside tests; each of these is there under its name."""
    promises = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("## Promises")[2].partition("\n## ")[0]
    named = re.findall(r"`(test_\w+\.py)((?:::\w+)*)`", promises)
    assert len(named) >= 15
    for file, name in named:
        [path] = (ROOT / "tests").rglob(file)
        assert not name or f"def {name.removeprefix('::')}(" in path.read_text(encoding="utf-8"), (file, name)
