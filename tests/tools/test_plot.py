"""`lit-dpo plot`, as a person calls it, on metrics that are known."""

import re
import sys
import time

import pytest

from lit_dpo.cli import main
from lit_dpo.tools.plot import with_lengths
from lit_dpo.tools.runs import find_run, metrics
from tests import runs
from tests.terminal import Terminal

pytestmark = runs.QUIET


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run that was stopped after step 20 and went on from step 10; its last line is only half written."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "version_0"
    folder.mkdir()
    (folder / "metrics_0.csv").write_text(
        "epoch,step,train/loss,val/rewards/accuracies\n0,0,0.7,\n0,0,,0.5\n0,10,0.6,\n0,20,0.9,\n"
    )
    (folder / "metrics.csv").write_text(
        "epoch,step,train/loss,lr,val/rewards/accuracies,val/length/longer,val/length/longer_won\n"
        "0,20,0.5,0.001,,,\n0,20,,,0.75,0.5,0.3\n0,30,0.4,0.0005"
    )
    return folder


def refused(capsys, *words):
    with pytest.raises(SystemExit) as stop:
        main(["plot", *map(str, words)])
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert "Traceback" not in said
    return said


def test_a_step_that_was_done_again_counts_once_and_as_it_was_done_last(run):
    found = metrics(find_run(run))
    assert found["train/loss"][:3] == [(1, 0.7), (11, 0.6), (21, 0.5)]
    assert len(found["train/loss"]) == 3
    assert found["val/rewards/accuracies"] == [(1, 0.5), (21, 0.75)]
    assert with_lengths(found)["val/accuracy, chosen longer"] == [(21, pytest.approx(0.6))]


def test_partitions_follow_each_other(tmp_path):
    for number, text in enumerate(("step,train/loss\n0,3\n4,2\n", "step,train/loss\n0,1.5\n4,1\n")):
        folder = tmp_path / "version_3" / f"partition_{number}" / "version_0"
        folder.mkdir(parents=True)
        (folder / "metrics.csv").write_text(text)
    assert metrics(find_run(tmp_path / "version_3"))["train/loss"] == [(1, 3), (5, 2), (6, 1.5), (10, 1)]


@pytest.mark.parametrize("columns", [80, 160])
def test_the_terminal_shows_a_line_a_metric(run, capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    main(["plot", str(run)])
    text = capsys.readouterr().out
    assert re.search(r"val/rewards/accuracies +▁█ +0\.5 +0\.75", text)
    assert re.search(r"^lr ", text, re.MULTILINE)
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= columns


def test_files_are_whole_and_nothing_is_written_over(run, capsys):
    pytest.importorskip("matplotlib")
    other = run.parent / "beside.png"
    other.write_text("mine")
    main(["plot", str(run), "--output", "out.png"])
    assert (run.parent / "out.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert "exists already" in refused(capsys, run, "--output", "out.png")
    assert "exists already" in refused(capsys, run, "--output", other)
    main(["plot", str(run), "--output", "out.html"])
    text = (run.parent / "out.html").read_text()
    assert text.count("data:image/png;base64,") == 2 * 4  # loss, accuracy, accuracy by length, rate; light and dark
    assert "http://" not in text
    assert "https://" not in text
    assert 'http-equiv="refresh"' not in text
    assert other.read_text() == "mine"


@pytest.mark.slow
def test_watching_draws_what_has_come(run, capsys, monkeypatch):
    """From before the first metric on, the run that it began with, once for each change, until Ctrl-C."""
    pytest.importorskip("matplotlib")
    log, page, draws, refreshing = run / "metrics.csv", run.parent / "out.html", [], []
    whole = log.read_text()
    (run / "metrics_0.csv").unlink()
    log.write_text("")

    def newer():
        (run.parent / "version_1").mkdir()
        (run.parent / "version_1" / "metrics.csv").write_text("step,train/loss\n0,9.5\n")

    coming = iter(
        [lambda: None, lambda: log.write_text(whole), newer, lambda: log.write_text(f"{whole},,,\n0,40,0.125,,,,\n")]
    )

    def sleep(seconds):
        said = capsys.readouterr().out
        draws.append((seconds, said.count("metric "), said.count("has logged no metrics yet: wait")))
        refreshing.append('<meta http-equiv="refresh" content="5">' in page.read_text() if page.exists() else None)
        try:
            next(coming)()
        except StopIteration:
            raise KeyboardInterrupt from None

    monkeypatch.setattr(time, "sleep", sleep)
    with pytest.raises(SystemExit) as stop:
        main(["plot", "last", "--output", "out.html", "--watch", "5"])
    assert stop.value.code == 130
    assert draws == [(5, 0, 1), (5, 0, 0), (5, 1, 0), (5, 0, 0), (5, 1, 0)]
    assert refreshing == [None, None, True, True, True]
    assert "0.125" in page.read_text()
    assert "9.5" not in page.read_text()
    assert "refresh" not in page.read_text()


def test_a_terminal_that_watches_shows_one_view(run, monkeypatch):
    def stop(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    monkeypatch.setattr(time, "sleep", stop)
    with pytest.raises(SystemExit):
        main(["plot", str(run), "--watch", "5"])
    assert terminal.getvalue().startswith("\x1b[2J\x1b[H")
    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    main(["plot", str(run)])
    assert "\x1b[2J" not in terminal.getvalue()


def test_a_dollar_in_a_name_is_no_formula(run):
    pytest.importorskip("matplotlib")
    run.rename(run.parent / "$\\frac$_1")
    run.with_name("version_2").mkdir()
    (run.with_name("version_2") / "metrics.csv").write_text("step,train/loss\n0,9.5\n")
    main(["plot", "$\\frac$_1", "version_2", "--output", "out.png"])
    assert (run.parent / "out.png").stat().st_size


def test_without_matplotlib_the_terminal_still_works(run, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install 'lit-dpo[tools]'" in refused(capsys, run, "--output", "out.png")
    main(["plot", str(run)])
    assert "train/loss" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "No run is given"),
        (["nothing"], "No run `nothing`"),
        (["empty"], "No run is in `empty`"),
        (["begun"], "has logged no metrics yet"),
        (["foreign"], "has no column `step`"),
        (["version_0", "--watch", "-1"], "must be 0 or more"),
        (["version_0", "--output", "a.svg"], "must end in .html or .png"),
    ],
)
def test_bad_input_is_one_sentence(run, capsys, words, said):
    (run.parent / "empty").mkdir()
    (run.parent / "begun" / "checkpoints").mkdir(parents=True)
    (run.parent / "foreign").mkdir()
    (run.parent / "foreign" / "metrics.csv").write_text("a,b\n1,2\n")
    assert said in refused(capsys, *words)
