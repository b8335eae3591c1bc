"""The shipped configurations by name: found from any folder, listed, copied out, and in every wheel."""

import os
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
import torch

from lit_dpo.cli import main
from tests import runs
from tests.test_cli import built, parsed, quick  # noqa: F401 - fixtures

pytestmark = [*runs.QUIET, pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning.pytorch.cli")]

ROOT = Path(__file__).parents[1]


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A folder of the user's, as the working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def told(capsys, *args):
    """Exit status of a command, and what it said."""
    with pytest.raises(SystemExit) as stop:
        main(list(args))
    return stop.value.code, "".join(capsys.readouterr())


# -- by name ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [["-c", "ipo", "--config", "lora"], ["-c=ipo", "--config=lora"]])
def test_a_name_is_found_from_any_folder_and_so_is_an_overlay(options, elsewhere, parsed):  # noqa: F811
    config = parsed("fit", *options).config.fit.model
    assert (config.loss.class_path, config.adapter.rank) == ("lit_dpo.IPOLoss", 16)


def test_a_file_of_exactly_that_name_is_taken_and_said_to_be(elsewhere, parsed, capsys):  # noqa: F811
    (elsewhere / "dpo").write_text("model: {model: of/the-file}\n")
    assert parsed("fit", "--config", "dpo").config.fit.model.model == "of/the-file"
    assert capsys.readouterr().err == "`--config dpo`: the file `dpo` is taken, not the shipped configuration.\n"


def test_a_path_means_the_file_at_that_path(elsewhere, parsed, capsys):  # noqa: F811
    (elsewhere / "ipo").mkdir()
    (elsewhere / "dpo.yaml").write_text("model: {model: of/the-file}\n")
    (elsewhere / "ipo" / "ipo").write_text("model: {model: of/the-folder}\n")
    assert parsed("fit", "--config", "dpo.yaml").config.fit.model.model == "of/the-file"
    assert parsed("fit", "--config", "ipo/ipo").config.fit.model.model == "of/the-folder"
    assert parsed("fit", "--config", "ipo").config.fit.model.loss.class_path == "lit_dpo.IPOLoss"
    assert capsys.readouterr().err == ""
    assert told(capsys, "fit", "--config", "sub/dpo")[0] == 2


# -- listed and copied ------------------------------------------------------------------------------------------------


def test_each_is_listed_once_with_a_line_of_its_own(capsys):
    status, said = told(capsys, "configs")
    lines = dict(line.split(None, 1) for line in said.splitlines())
    files = [path for path in (ROOT / "configs").rglob("*") if path.is_file()]
    assert status == 0
    assert sorted(lines) == sorted(path.stem if path.suffix == ".yaml" else path.name for path in files)
    assert len(set(lines.values())) == len(lines) == len(said.splitlines())


def test_one_is_copied_out_and_nothing_is_written_over(elsewhere, capsys):
    assert told(capsys, "configs", "lora", "mine.yaml") == (0, "Copied lora to mine.yaml\n")
    assert (elsewhere / "mine.yaml").read_bytes() == (ROOT / "configs" / "overlays" / "lora.yaml").read_bytes()
    (elsewhere / "decoy").write_text("mine")
    (elsewhere / "folder").mkdir()
    (elsewhere / "link").symlink_to("nowhere")
    before = sorted(elsewhere.rglob("*"))
    for target in ("mine.yaml", "decoy", "folder", "link", "missing/dpo.yaml"):
        status, said = told(capsys, "configs", "dpo", target)
        assert status == 2
        assert f"`{target}` {'cannot be made' if '/' in target else 'exists already'}" in said
    assert sorted(elsewhere.rglob("*")) == before
    assert (elsewhere / "decoy").read_text() == "mine"


def test_what_is_no_configuration_is_told(elsewhere, capsys):
    assert "Did you mean ipo" in told(capsys, "configs", "ipoo", "x.yaml")[1]
    assert "copies to one file" in told(capsys, "configs", "ipo")[1]
    assert "copies to one file" in told(capsys, "configs", "ipo", "a", "b")[1]
    assert list(elsewhere.iterdir()) == []


# -- the wheel --------------------------------------------------------------------------------------------------------


def files_of(folder):
    """Files below a folder of the repository by their relative path, compiled ones left out."""
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_every_folder_of_the_package_is_packaged():
    named = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "lit_dpo").rglob("__init__.py")}
    assert sorted(named) == sorted([*(".".join(folder.parts) for folder in folders), "lit_dpo.configs"])


def run(*command, cwd):
    done = subprocess.run([*map(str, command)], cwd=cwd, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
def test_an_installed_wheel_is_complete_and_runs_the_quickstart_in_an_empty_folder(tmp_path):
    """Source archive, then wheel, then a fresh environment that shares nothing but the installed libraries."""
    source, made = tmp_path / "source", tmp_path / "built"
    for name in files_of(ROOT / "lit_dpo"):
        place(ROOT / "lit_dpo" / name, source / "lit_dpo" / name)
    for name in files_of(ROOT / "configs"):
        place(ROOT / "configs" / name, source / "configs" / name)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        place(ROOT / name, source / name)
    build = f"from setuptools.build_meta import build_sdist; build_sdist({str(made)!r})"
    run(sys.executable, "-c", build, cwd=source)
    [archive] = made.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(made, filter="data")
    [unpacked] = (path for path in made.iterdir() if path.is_dir())
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", made, ".", cwd=unpacked)
    [wheel] = made.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        found = {name for name in file.namelist() if ".dist-info/" not in name}
    assert found == {f"lit_dpo/{name}" for name in files_of(ROOT / "lit_dpo")} | {
        f"lit_dpo/configs/{name}" for name in files_of(ROOT / "configs")
    }

    home = tmp_path / "environment"
    venv.create(home, with_pip=False, symlinks=True)
    python = home / "bin" / "python"
    [packages] = home.glob("lib/*/site-packages")
    (packages / "shared.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    run(*pip, "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    empty = tmp_path / "empty"
    empty.mkdir()
    where = run(python, "-c", "import lit_dpo; print(lit_dpo.__file__)", cwd=empty).strip()
    assert Path(where).is_relative_to(home)
    said = run(home / "bin" / "lit-dpo", "fit", "--config", "quickstart", "--trainer.max_steps", 3, cwd=empty)
    [run_folder] = (empty / "runs" / "quickstart").iterdir()
    assert {"checkpoints", "config.yaml", "export"} <= set(os.listdir(run_folder)), said
    assert os.listdir(empty) == ["runs"]


def place(source, target):
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(source.read_bytes())
