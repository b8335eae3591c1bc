"""Every tool on what a person gives by mistake: one sentence with a remedy, and nothing written, over or beside."""

import os
import re
from pathlib import Path

import pytest
import yaml

from lit_dpo.cli import main
from lit_dpo.tokenizers import quickstart_tokenizer
from tests import runs
from tests.test_cli import quick  # noqa: F401 - a fixture
from tests.trained import model_folder

pytestmark = [
    *runs.QUIET,
    pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning.pytorch.cli"),
    pytest.mark.usefixtures("quick"),
]

TINY = str(Path(__file__).parents[1] / "conf" / "tiny.yaml")
EXPORTED = ("README.md", "config.json", "model.safetensors", "tokenizer_config.json")


PARSERS = {}


@pytest.fixture
def built(tool):
    """What `quick` keeps of a tool's parser; those of `inspect` and `check` differ by their own options."""
    return PARSERS.setdefault(tool, {})


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A model, and one with another tokenizer."""
    folder, other = tmp_path_factory.mktemp("models"), quickstart_tokenizer()
    other.add_tokens(["elsewhere"])
    return model_folder(folder / "base"), model_folder(folder / "other", tokenizer=other)


@pytest.fixture
def folder(models, tmp_path, monkeypatch):
    """A folder with everything that the cases name; `killed` is what `kill -9` leaves before the first checkpoint."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LIT_DPO_CACHE", str(tmp_path.parent / f"{tmp_path.name}_cache"))
    for name, path in zip(("base", "other"), models, strict=True):
        Path(name).symlink_to(path)
    runs.pairs_file(tmp_path, 4)
    config = yaml.safe_dump({"model": {}, "data": {"train": "pairs.jsonl"}})
    margins = '{"row": "pairs.jsonl:1", "row_id": 0, "margins": [1], "reference_margin": 0, "length_difference": 0}\n'
    for name in ("killed", "no_config", "empty_run"):
        Path(name, "version_0").mkdir(parents=True)
    Path("killed/version_0/config.yaml").write_text(config)
    Path("killed/version_0/metrics.csv").write_text("epoch,step,train/lo")
    Path("no_config/version_0/checkpoints").mkdir()
    Path("no_config/version_0/checkpoints/last.ckpt").write_text("cut off")
    Path("no_config/version_0/margins.jsonl").write_text(margins)
    Path("no_config/version_0/metrics.csv").write_bytes(b"\xff\xfe\x00")
    Path("empty.jsonl").touch()
    Path("empty.txt").write_text("\n \n")
    Path("binary.jsonl").write_bytes(bytes(range(256)) * 8)
    os.mkfifo("pipe.jsonl")
    runs.write(Path("steering.jsonl"), [{"prompt": "a", "chosen\x1b]0;mine\x07\x9b2J\u202e": "b", "rejected": "c"}])
    for number in (1, 2):
        rows = [{"row": f"set_{number}.jsonl:{n}", "margin": 1.0, "logp_chosen": -1.0} for n in range(20)]
        runs.write(Path(f"predicted_{number}.jsonl"), rows)
    Path("export").mkdir()
    for name in EXPORTED:
        Path("export", name).write_text("{}")
    for ending in ("html", "jsonl", "json", "png"):
        Path(f"mine.{ending}").write_text("mine")
    return tmp_path


def everything(folder):
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def answer(words, capsys):
    """The sentence that a command ends with, an error or what `check` finds to fail, which exits with 2."""
    with pytest.raises(SystemExit) as stop:
        main(words)
    out, err = capsys.readouterr()
    assert stop.value.code == 2
    assert "Traceback" not in out + err
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", out + err)
    [line] = re.findall(r"^(?:lit-dpo: error: |fails +)(.*)$", out + err, re.MULTILINE)
    return line


PIPE = "is a pipe, and only regular files are read: give a regular file in its place"
FIT = ("--config", TINY, "--data.train")
SAID = ("--max_new_tokens", "2", "--prompts")
CASES = {
    "inspect": [
        ([*FIT, "nothing.jsonl"], "There is no `nothing.jsonl` in `.`"),
        ([*FIT, "empty.jsonl"], "No row to train on in empty.jsonl; correct the data"),
        ([*FIT, "steering.jsonl"], "`chosen?]0;mine??2J?`"),
        ([*FIT, "binary.jsonl"], "binary.jsonl:1: the line is not valid JSON; correct it"),
        ([*FIT, "pipe.jsonl"], PIPE),
        ([*FIT, "killed/version_0"], "No row to train on in killed/version_0; correct the data"),
        ([*FIT, "pairs.jsonl", "--html", "mine.html"], "exists already"),
        ([*FIT, "pairs.jsonl", "--ckpt_path", "last"], "leave `--ckpt_path` out"),
        ([*FIT, "pairs.jsonl", "--pairs", "-1"], "must be at least 0"),
        ([*FIT, "pairs.jsonl", "--model.tokenizer", "killed"], "Give a folder saved by `save_pretrained`"),
        (
            ["--config", "killed/version_0"],
            "configuration file: name a file. Did you mean killed/version_0/config.yaml?",
        ),
    ],
    "check": [
        ([*FIT, "nothing.jsonl"], "There is no `nothing.jsonl` in `.`"),
        ([*FIT, "empty.jsonl"], "No row to train on in empty.jsonl; correct the data"),
        ([*FIT, "binary.jsonl"], "binary.jsonl:1: the line is not valid JSON; correct it"),
        ([*FIT, "pipe.jsonl"], PIPE),
        ([*FIT, "pairs.jsonl", "--memory", "0"], "must be above 0"),
        ([*FIT, "pairs.jsonl", "--overwrite"], "leave `--overwrite` out"),
        (["--config", "nothing.yaml"], "there is no configuration file"),
    ],
    "sample": [
        (["nothing", *SAID, "pairs.jsonl"], "no such folder, and not to be had from the hub"),
        (["killed/version_0", *SAID, "pairs.jsonl"], "or wait for the run's first checkpoint"),
        (["no_config/version_0", *SAID, "pairs.jsonl"], "give a .ckpt file that `lit-dpo fit` has written whole"),
        (["pairs.jsonl", *SAID, "pairs.jsonl"], "does not load as a checkpoint"),
        (["base", *SAID, "empty.jsonl"], "holds no prompt: give a file with at least one"),
        (["base", *SAID, "empty.txt"], "holds no prompt"),
        (["base", *SAID, "binary.jsonl"], "the line is not valid JSON; correct it"),
        (["base", *SAID, "pipe.jsonl"], PIPE),
        (["base", *SAID, "nothing.jsonl"], "There is no `nothing.jsonl` in `.`"),
        (["base", *SAID, "killed"], "holds no data file"),
        (["base", *SAID, "pairs.jsonl", "--html", "mine.html"], "exists already"),
        (["base", *SAID, "pairs.jsonl", "--jsonl", "mine.jsonl"], "exists already"),
        (["base"], "needs at least one model and a file of prompts"),
    ],
    "evaluate": [
        (["nothing", "--data", "pairs.jsonl"], "no such folder, and not to be had from the hub"),
        (["killed/version_0", "--data", "pairs.jsonl"], "or wait for the run's first checkpoint"),
        (["no_config/version_0", "--data", "pairs.jsonl"], "does not load as a checkpoint"),
        (["base", "--data", "pairs.jsonl"], "add `--reference MODEL`"),
        (["base", "--data", "pairs.jsonl", "--reference", "other"], "has another tokenizer than `base`"),
        (["base", "--data", "empty.jsonl", "--reference", "none"], "correct the data"),
        (["base", "--data", "binary.jsonl", "--reference", "none"], "is not valid JSON; correct it"),
        (["base", "--data", "pipe.jsonl", "--reference", "none"], PIPE),
        (["base", "--data", "nothing.jsonl", "--reference", "none"], "There is no `nothing.jsonl`"),
        (["base", "--data", "pairs.jsonl", "--reference", "killed"], "or wait for the run's first checkpoint"),
        (["base", "--data", "pairs.jsonl", "--html", "mine.html"], "exists already"),
        (["base", "--data", "pairs.jsonl", "--output", "mine.json"], "exists already"),
        ([], "needs at least one model and one file of pairs"),
    ],
    "compare": [
        (["nothing", "killed"], "No run `nothing`"),
        (["killed/version_0", "predicted_1.jsonl"], "has no checkpoint yet"),
        (["no_config/version_0", "predicted_1.jsonl"], "has no `config.yaml`"),
        (["no_config/version_0/checkpoints/last.ckpt", "predicted_1.jsonl"], "is no folder of a run"),
        (["empty_run", "predicted_1.jsonl"], "No run is in `empty_run/version_0`: give"),
        (["empty.jsonl", "predicted_1.jsonl"], "is empty"),
        (["binary.jsonl", "predicted_1.jsonl"], "is no line of"),
        (["pairs.jsonl", "predicted_1.jsonl"], "is no line of"),
        (["pipe.jsonl", "predicted_1.jsonl"], PIPE),
        (["predicted_1.jsonl", "predicted_2.jsonl"], "have no validation row in common"),
        (["predicted_1.jsonl"], "takes two or more"),
        (["predicted_1.jsonl", "predicted_1.jsonl"], "not the same"),
        (["predicted_1.jsonl", "predicted_2.jsonl", "--output", "mine.html"], "exists already"),
        (["--train", "dpo", "nothing.yaml"], "There is no configuration `nothing.yaml`"),
        ([], "Give either runs to compare"),
    ],
    "plot": [
        (["nothing"], "No run `nothing`"),
        (["last"], "no run is in this folder or below `runs`. Name the folder of a run"),
        (["killed/version_0"], "has logged no metrics yet"),
        (["killed"], "has logged no metrics yet"),
        (["empty_run"], "No run is in `empty_run/version_0`: give"),
        (["no_config/version_0"], "has logged no metrics yet"),
        (["no_config/version_0/checkpoints/last.ckpt"], "is no folder of a run"),
        (["killed", "--output", "mine.png"], "exists already"),
        (["killed", "--output", "mine.html"], "exists already"),
        (["killed", "--output", "new.pdf"], "must end in .html or .png"),
        (
            ["killed", "--output", "mine.html/new/new.html"],
            "cannot be written (Not a directory): name a file in another",
        ),
        ([], "No run is given"),
    ],
    "audit": [
        (["nothing"], "No run `nothing`"),
        (["killed/version_0"], "has no `margins.jsonl`"),
        (["no_config/version_0"], "has no `config.yaml`"),
        (["no_config/version_0/checkpoints/last.ckpt"], "is no folder of a run"),
        (["killed", "--predictions", "empty.jsonl"], "is empty"),
        (["killed", "--predictions", "binary.jsonl"], "is no line of"),
        (["killed", "--predictions", "pipe.jsonl"], PIPE),
        (["killed", "--predictions", "killed"], "is a folder, and only regular files are read"),
        (["killed", "--output", "mine.html"], "exists already"),
        (["killed", "--output", "mine.jsonl"], "exists already"),
        (["no_config/version_0", "--output", "mine.html/new.html"], "cannot be written (Not a directory)"),
        ([], "required and not given: `"),
    ],
    "rounds": [
        (["nothing"], "No run `nothing`"),
        (["killed/version_0"], "has no rounds"),
        (["no_config/version_0/checkpoints/last.ckpt"], "is no folder of a run"),
        (["killed", "--output", "mine.html"], "exists already"),
        ([], "required and not given: `"),
    ],
    "export": [
        (["nothing", "new"], "give a .ckpt file from a run's folder"),
        (["killed/version_0", "new"], "No checkpoint of a run"),
        (["no_config/version_0", "new"], "give a .ckpt file that `lit-dpo fit` has written whole"),
        (["pairs.jsonl", "new"], "give a .ckpt file that `lit-dpo fit` has written whole"),
        (["no_config/version_0", "export"], "exists already"),
        ([], "required and not given: `"),
    ],
    "push": [
        (["nothing", "a/b", "--dry_run", "true"], "There is no folder `nothing`"),
        (["killed/version_0", "a/b", "--dry_run", "true"], "holds no whole model"),
        (["no_config/version_0/checkpoints/last.ckpt", "a/b", "--dry_run", "true"], "There is no folder"),
        (["export", "b", "--dry_run", "true"], "of the form `organization/name`"),
        (["export"], "required and not given: `repository`"),
        ([], "required and not given: `"),
    ],
}


@pytest.mark.every(3)
@pytest.mark.parametrize(("tool", "number"), [(tool, n) for tool, cases in CASES.items() for n in range(len(cases))])
def test_a_mistake_is_one_sentence_and_nothing_is_written(tool, number, folder, capsys):
    words, expected = CASES[tool][number]
    before = everything(folder)
    said = answer([tool, *words], capsys)
    assert expected in said
    assert everything(folder) == before
