"""`lit-dpo audit`, as a person calls it, on runs whose margins are known."""

import json
from pathlib import Path

import pytest
import yaml

from lit_dpo.cli import main
from tests import runs

pytestmark = runs.QUIET


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run's folder with three rows; the second is the worst, then the first."""
    monkeypatch.chdir(tmp_path)
    rows = [
        {"prompt": f"Prompt {n}?", "chosen": f" good <b>{n}</b>", "rejected": f" bad {n} \x1b[31m"} for n in range(3)
    ]
    path = runs.write(tmp_path / "pairs.jsonl", rows)
    folder = tmp_path / "version_0"
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump({"model": {}, "data": {"train": path}}))
    margins = ([1.0, -2.0], [3.0, 1.0], [1.0, 4.0])
    reference = (0.5, 4.0, 0.0)  # areas: -1, -2, 2.5
    lines = [
        {"row": f"{path}:{n + 1}", "row_id": n, "margins": m, "reference_margin": r, "length_difference": n - 1}
        for n, (m, r) in enumerate(zip(margins, reference, strict=True))
    ]
    runs.write(folder / "margins.jsonl", lines)
    return folder


def words(text):
    return " ".join(text.split())


def refused(capsys, *words):
    with pytest.raises(SystemExit) as stop:
        main(["audit", *map(str, words)])
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert "Traceback" not in said
    assert said.startswith("lit-dpo: error: ")
    return said


def test_the_most_suspicious_rows_come_first_with_place_and_pair(run, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    main(["audit", str(run), "--output", "out.jsonl"])
    found = [json.loads(line) for line in Path("out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(line["row"].rpartition(":")[2], line["area"]) for line in found] == [("2", -2.0), ("1", -1.0), ("3", 2.5)]
    assert found[0]["chosen"] == " good <b>1</b>"
    assert found[0]["margins"] == [3.0, 1.0]
    text = capsys.readouterr().out
    joined = "".join(text.split())  # a long path is broken into lines
    assert joined.index("pairs.jsonl:2") < joined.index("pairs.jsonl:1") < joined.index("pairs.jsonl:3")
    assert "good <b>1</b>" in text
    assert "chosen +0 tokens" in text
    assert "3 most suspicious of 3 rows, each seen 2 times in training; area and margins in nats." in words(text)
    assert "Rank correlation of area and length difference: +0.50." in words(text)
    assert "nothing is dropped" in " ".join(text.split())
    assert "\x1b" not in text  # neither colours in a pipe nor what a row brings
    assert max(map(len, text.splitlines())) <= 80


def test_a_list_of_lengths_is_called_one(run, capsys):
    lines = [json.loads(line) for line in (run / "margins.jsonl").read_text().splitlines()]
    for line, tokens in zip(lines, (20, 30, 10), strict=True):  # against the areas -1, -2, 2.5
        line["length_difference"] = tokens
    lines[0]["margins"] = [1.0, -2.0, -0.5]
    runs.write(run / "margins.jsonl", lines)
    main(["audit", str(run)])
    said = words(capsys.readouterr().out)
    assert "each seen 2 to 3 times in training" in said
    assert "length difference: -1.00, so that this list is mostly one of lengths." in said


def test_the_page_needs_nothing_else_and_no_row_becomes_markup(run):
    main(["audit", str(run), "--rows", "2", "--output", "out.html"])
    text = Path("out.html").read_text(encoding="utf-8")
    assert "&lt;b&gt;1&lt;/b&gt;" in text
    assert "<b>" not in text
    assert "http" not in text
    assert "prefers-color-scheme: dark" in text
    assert "Prompt 1?" in text
    assert "Prompt 2?" not in text


def test_predictions_serve_where_nothing_was_recorded(run, capsys):
    (run / "margins.jsonl").unlink()
    assert "RecordMargins" in refused(capsys, run)
    lines = [
        {"row": f"pairs.jsonl:{n}", "margin": m, "chosen_tokens": 3, "rejected_tokens": 5}
        for n, m in ((1, 2.0), (2, -1.0))
    ]
    runs.write(run / "predictions.jsonl", lines)
    main(["audit", str(run), "--predictions", str(run / "predictions.jsonl")])
    text = capsys.readouterr().out
    assert "of 2 rows, by the margins of implicit rewards in the predictions." in words(text)
    assert text.index("pairs.jsonl:2") < text.index("pairs.jsonl:1")
    assert "2 of the rows are not where they were trained from" in " ".join(text.split())


def test_nothing_is_written_over_unless_it_is_asked_for(run, capsys):
    for name in ("out.html", "beside.html"):
        (run.parent / name).write_text("mine")
    assert "exists already" in refused(capsys, run, "--output", "out.html")
    assert (run.parent / "out.html").read_text() == "mine"
    assert "exists already" in refused(capsys, run, "--output", "out.html", "--overwrite", "false")
    assert "is true or false, got 'no'" in refused(capsys, run, "--output", "out.html", "--overwrite=no")
    assert (run.parent / "out.html").read_text() == "mine"
    for asked in (["--overwrite"], ["--overwrite", "true"], ["--overwrite=true"]):
        (run.parent / "out.html").write_text("mine")
        main(["audit", str(run), "--output", "out.html", *asked])
        assert "Rows whose label" in (run.parent / "out.html").read_text()
    assert (run.parent / "beside.html").read_text() == "mine"
    (run.parent / "folder.html").mkdir()
    assert "name a file" in refused(capsys, run, "--output", "folder.html", "--overwrite")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda run: [run.parent / "version_7"], "No run `"),
        (lambda run: [run / "config.yaml"], "is no folder of a run"),
        (lambda run: (run / "config.yaml").unlink() or [run], "has no `config.yaml`"),
        (lambda run: (run / "config.yaml").write_text("[") and [run], "is no configuration"),
        (lambda run: (run / "margins.jsonl").write_text("") or [run], "is empty"),
        (lambda run: (run / "margins.jsonl").write_text('{"row": "a:1", "mar') and [run], "is no line of"),
        (lambda run: [run, "--rows", "0"], "must be at least 1"),
        (lambda run: [run, "--output", "out.pdf"], "must end in .html or .jsonl"),
        (lambda run: [run, "--predictions", "nothing.jsonl"], "There is no `nothing.jsonl`"),
    ],
    ids=["none", "a file", "half", "broken", "empty", "killed", "rows", "format", "predictions"],
)
def test_bad_input_is_one_sentence(run, capsys, change, said):
    assert said in refused(capsys, *change(run))
