"""What a person sees: the quickstart on a real terminal, replayed in a terminal emulator."""

import re
import sys
import warnings
from pathlib import Path

import pyte
import pytest

from lit_dpo.adapters import LoRA
from lit_dpo.callbacks import ExportModel, RunSummary, SampleCompletions
from lit_dpo.cli import main
from lit_dpo.models import load_model
from lit_dpo.tokenizers import load_tokenizer
from tests import runs
from tests.terminal import Session, Terminal

pytestmark = [*runs.QUIET, pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning.pytorch.cli")]

ROOT = Path(__file__).parents[1]
NOISE = (
    "Tip:", "litlogger", "litmodels", "TPU available", "v_num", "FLOPs", "ModuleDict", "Writing model shards",
    "Loading weights", "Epoch 0", "/-2", "deprecat", "LeafSpec", "site-packages", "estimate number of stepping",
    "Traceback", "it/s",
)  # fmt: skip


def quickstart(folder):
    short = {"max_steps": 8, "max_epochs": -1, "limit_train_batches": 4, "log_every_n_steps": 2}
    short |= {"check_val_every_n_epoch": 1, "default_root_dir": folder}
    options = [f"--trainer.{name}={value}" for name, value in short.items()]
    return [sys.executable, "-m", "lit_dpo", "fit", "--config", "configs/quickstart.yaml", *options]


@pytest.fixture(scope="module", params=[pytest.param(width, marks=pytest.mark.slow) for width in (80, 160)])
def finished(request, tmp_path_factory):
    """A short quickstart on a terminal of some width, and its folder."""
    folder = tmp_path_factory.mktemp(f"columns{request.param}")
    session = Session(quickstart(folder), request.param, cwd=ROOT)
    assert session.finish() == 0, session.stream.decode()[-3000:]
    return session, folder


def test_the_result_stays_on_the_terminal(finished):
    """Every line of it once, in order, and nothing of the bar among or below them."""
    session, folder = finished
    rows = session.text()
    text = "".join(rows)  # a long line goes on in the next row
    run = folder / "version_0"
    [best] = [
        path for path in (run / "checkpoints").iterdir() if path.name.startswith("step=") and path.suffix == ".ckpt"
    ]
    expected = [
        "Before training", "Policy: LlamaForCausalLM", "After training", f"Exported the policy to {run}/export",
        "Validation", *(f"│ {name} " for name in ("loss", "rewards/accuracies", "rewards/margins")),
        *(f"│ {name} " for name in ("logps/chosen", "logps/rejected", "displacement")),
        f"Best checkpoint: {best}", "Next: lit-dpo export",
    ]  # fmt: skip
    places = [text.rfind(line) for line in expected]
    assert -1 not in places, [line for line, place in zip(expected, places, strict=True) if place == -1]
    assert places == sorted(places)
    assert [text.count(line) for line in expected if line != "Validation"] == [1] * (len(expected) - 1)
    assert text.count("Can you help me?") == 2
    assert str(best) in text[text.rfind("Next: ") :]
    assert not [row for row in rows if re.search("Epoch|tokens/s|Validation +━", row)]
    for row in rows:
        if row.startswith("│ "):
            assert len(re.findall(r"-?\d[\d.]*", row)) == 3


def test_the_bar_is_one_line_with_short_names(finished):
    seen, most = set(), 0
    for frame in finished[0].frames():
        bars = [row for row in frame if re.match("Epoch|Validation +\\S*━|Sanity", row)]
        most = max(most, len(bars))
        for name in ("loss", "accuracy", "margin", "tokens/s", "Epoch 1 ", "Epoch 2 ", "4/4"):
            seen |= {name for row in bars if name in row}
        assert not [row for row in frame if "…" in row]
    assert most == 1
    assert seen == {"loss", "accuracy", "margin", "tokens/s", "Epoch 1 ", "Epoch 2 ", "4/4"}


def test_nothing_on_the_terminal_is_no_news(finished):
    text = finished[0].stream.decode()
    assert [noise for noise in NOISE if noise in text] == []


def test_a_pipe_gets_a_line_for_each_validation_and_nothing_of_the_bar(tmp_path, capfd, monkeypatch):
    """Nor does a variable that asks for colours change that."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.chdir(ROOT)
    main([*quickstart(tmp_path)[3:], "--trainer.callbacks=null"])
    said = capfd.readouterr()
    assert [line for line in said.out.splitlines() if re.search("━ \\d|Epoch|tokens/s|\x1b\\[2K", line)] == []
    lines = re.findall(r"^Validation at step (\d+): loss [\d.]+, accuracy [\d.]+, margin [-\d.e]+$", said.out, re.M)
    assert lines == ["0", "4", "8"]
    assert [noise for noise in NOISE if noise in said.out + said.err] == []


def test_in_python_what_follows_is_printed_when_lightnings_own_bar_has_stopped(tmp_path, monkeypatch):
    """And its bar and summary show our few names, and no row for what only measures."""
    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("TERM", "xterm-256color")
    options = {"enable_progress_bar": True, "enable_model_summary": True, "max_epochs": 2, "log_every_n_steps": 1}
    callbacks = [SampleCompletions(["Hello"]), ExportModel(), RunSummary()]
    runs.fit(runs.module(), runs.data(runs.pairs_file(tmp_path)), tmp_path, callbacks=callbacks, **options)
    screen = pyte.HistoryScreen(160, 60, history=1000)
    pyte.Stream(screen).feed(terminal.getvalue().replace("\n", "\r\n"))
    text = "\n".join(screen.display)
    assert "After training" in [row.strip() for row in screen.display]  # alone on its row
    for line in ("After training", "│ loss ", "│ displacement ", "No best checkpoint was kept"):
        assert text.count(line) == 1, text
    assert "means" not in text
    assert "Writing model shards" not in text
    shown = re.findall(r"(\S+): [\d.]+", next(row for row in screen.display if row.startswith("Epoch")))
    assert shown == ["loss", "accuracy", "margin", "tokens/s"]


def test_attaching_adapters_says_nothing():
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        LoRA(rank=2).attach(load_model(runs.LLAMA, load_tokenizer("quickstart")))
    assert [str(warning.message) for warning in said] == []
