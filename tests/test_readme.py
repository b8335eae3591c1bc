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
    assert len(PYTHON) >= 2
    assert len(COMMANDS) >= 5
    assert blocks("python", "a\n```python\nx = 1\n```\n```bash\ny\n```\n") == ["x = 1\n"]


def test_every_ratio_stands_in_the_results():
    measured = "".join(path.read_text() for path in (ROOT / "benchmarks" / "results").glob("throughput_*.md"))
    values = [float(number) for number in re.findall(r"([\d.]+)x", measured)]
    shown = re.findall(r"(\d+\.\d+)x", TEXT)
    assert len(shown) >= 4
    for number in shown:
        digits = len(number.partition(".")[2])
        assert number in {f"{value:.{digits}f}" for value in values}


@pytest.mark.parametrize("code", PYTHON, ids=lambda code: next(line for line in code.splitlines() if line)[:40])
def test_python_runs(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "block.py").write_text(code)
    exec(compile(code, str(tmp_path / "block.py"), "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_understood(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    _, *args = shlex.split(command.removeprefix("PYTHONPATH=. "), comments=True)
    if args[0] == "export":
        assert len(args) == 3
        return
    for code in PYTHON:  # a loss of the reader's own stands in the README, too
        if "(PreferenceLoss)" in code:
            (tmp_path / "my_losses.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main([*args, "--print_config"])
    assert not stop.value.code, capsys.readouterr().err


def test_every_file_that_is_named_exists():
    for target in re.findall(r"\]\(([^)]+)\)", TEXT):
        assert target.startswith("http") or (ROOT / target).exists(), target
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
