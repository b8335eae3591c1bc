"""The line that shows how far a run is; what a person sees of a whole run is in tests/test_terminal.py."""

import contextlib
import logging
import re
import sys
from types import SimpleNamespace

import pytest
from lightning.pytorch import Callback

import lit_dpo.callbacks.progress
from lit_dpo.callbacks import ProgressLine
from lit_dpo.callbacks.progress import _batches_of_epoch, _short
from tests import runs
from tests.terminal import Terminal

pytestmark = runs.QUIET


@pytest.fixture
def terminal(monkeypatch):
    """A terminal of 80 columns, unless `COLUMNS` is set again."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm-256color")
    return Terminal()


def drawn(terminal):
    """Every state of the line, without colours."""
    text = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", terminal.getvalue())
    return [line.rstrip() for line in re.split(r"[\r\n]+", text) if re.match("Epoch|Validation  *━|Test|Predict", line)]


def fit(folder, terminal, *callbacks, **options):
    """Fit with standard output on the terminal, which must be as it was at the end."""
    options = {"max_epochs": 2, "log_every_n_steps": 1, "enable_progress_bar": True, **options}
    data = runs.data(runs.pairs_file(folder))
    with contextlib.redirect_stdout(terminal):
        try:
            return runs.fit(runs.module(), data, callbacks=[ProgressLine(), *callbacks], **options)
        finally:
            assert sys.stdout is terminal


def test_epochs_and_batches_are_counted_from_one(tmp_path, terminal, monkeypatch):
    monkeypatch.setattr(lit_dpo.callbacks.progress, "_INTERVAL", 0.0)
    fit(tmp_path, terminal)
    counts = [
        found.groups()[:2] for line in drawn(terminal) if (found := re.search(r"Epoch (\d/\d).* (\d/\d)( |$)", line))
    ]
    assert list(dict.fromkeys(counts)) == [
        *(("1/2", f"{n}/3") for n in range(4)), *(("2/2", f"{n}/3") for n in range(4))
    ]  # fmt: skip


@pytest.mark.parametrize("columns", [30, 60, 80, 200])
def test_the_line_fits_and_drops_whole_metrics(tmp_path, terminal, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    fit(tmp_path, terminal)
    lines = [line for line in drawn(terminal) if line.startswith("Epoch")]
    assert max(len(line) for line in lines) <= columns
    whole = r"( loss [-\d.e]+)?( accuracy [\d.]+)?( margin [-\d.e+]+)?( [\dk.]+ tokens/s)?"
    for line in lines:
        assert re.fullmatch(rf"Epoch \d/2 [━╸╺ ]+ *\d/3( [-:\d]+)?{whole}", line), line
    assert any("tokens/s" in line for line in lines) == (columns >= 80)


def test_what_is_logged_meanwhile_stands_above_and_streams_are_given_back(tmp_path, terminal):
    logger = logging.getLogger("somebody")
    handler = logging.StreamHandler(terminal)
    logger.addHandler(handler)

    class Talker(Callback):
        def on_train_batch_end(self, trainer, *args):
            logger.warning("logged")
            print("printed")

    try:
        fit(tmp_path, terminal, Talker(), max_epochs=1)
    finally:
        logger.removeHandler(handler)
    assert handler.stream is terminal
    lines = [line.rstrip() for line in re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", terminal.getvalue()).splitlines()]
    assert [line for line in lines if line in ("logged", "printed")] == ["logged", "printed"] * 3


def test_an_error_finds_the_terminal_as_it_was(tmp_path, terminal):
    class Failing(Callback):
        def on_train_batch_end(self, *args):
            raise RuntimeError("of the user")

    with pytest.raises(RuntimeError, match="of the user"):
        fit(tmp_path, terminal, Failing())
    assert terminal.getvalue().count("\x1b[?25h") == terminal.getvalue().count("\x1b[?25l") == 1  # the cursor


def test_it_stays_out_of_a_pipe_and_of_other_processes(tmp_path, capsys, terminal):
    bar = ProgressLine()
    with contextlib.redirect_stdout(terminal):
        assert bar._visible()
        bar.setup(SimpleNamespace(is_global_zero=False), None, "fit")
        assert not bar._visible()
        bar.print("nothing")
    assert terminal.getvalue() == ""
    assert not ProgressLine()._visible()


@pytest.mark.parametrize(
    ("max_steps", "done", "batch", "every", "expected"),
    [(-1, 0, 0, 1, 10), (4, 1, 0, 1, 4), (4, 1, 1, 2, 8), (4, 1, 2, 2, 8), (4, 3, 1, 2, 4), (100, 3, 1, 2, 10)],
)
def test_max_steps_may_end_an_epoch_early(max_steps, done, batch, every, expected):
    trainer = SimpleNamespace(
        max_steps=max_steps, global_step=done, accumulate_grad_batches=every, num_training_batches=10
    )  # fmt: skip
    assert _batches_of_epoch(trainer, batch) == expected


def test_values_are_short():
    assert _short("loss", 0.69314) == "loss 0.693"
    assert (_short("tokens/s", 812.3), _short("tokens/s", 12_345.0)) == ("812 tokens/s", "12k tokens/s")
