"""`lit-dpo rounds`, as a person calls it, on records that are known."""

import json
import re

import pytest

from lit_dpo.cli import main
from tests import runs

pytestmark = runs.QUIET


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Three rounds; the judge gets worse in the second one, and a reason looks like a command to a terminal."""
    monkeypatch.chdir(tmp_path)
    for number, (share, score) in enumerate(((0.9, 0.33), (0.6, 0.5), (0.61, 0.55))):
        root = tmp_path / "run" / f"partition_{number}"
        (root / "version_0").mkdir(parents=True)
        record = {
            "round": number, "prompts": 1000, "completions": 8000, "finished": 0.975, "empty": 3, "duplicates": 2100,
            "no_opinion": 0, "mixed": 0.7, "pairs": 700, "without_pair": {"all\x1b[31m <b>wrong</b>": 300 - number},
            "trusted": {"pairs": 100, "share": share, "error": 0.05, "no_opinion": 0},
            "greedy": {"prompts": 500, "score": score, "error": 0.04, "finished": 1.0, "no_opinion": 0},
            "seconds": {"sampling": 2.25, "judging": 1.0, "measuring": 0.5}, "kept": 17, "agreement": 0.75,
        }  # fmt: skip
        if number == 2:
            record["greedy_after"] = {**record["greedy"], "score": 0.61}
        (root / "round.json").write_text(json.dumps(record))
        (root / "DONE").write_text(json.dumps({"pairs": "x", "seconds": 12.5}))
        (root / "version_0" / "metrics.csv").write_text(f"step,val/displacement\n1,0.9\n5,0.{number + 1}25\n")
    return tmp_path / "run"


@pytest.mark.parametrize("columns", [80, 160])
def test_the_terminal_shows_what_each_round_did(run, capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    main(["rounds", "run"])
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= columns
    assert "\x1b" not in text
    values = {
        "prompts": "1,000", "prompts whose scores differ": "70.0%", "duplicate completions": "2,100",
        "completions with an end": "97.5%", "kept": "17", "learned judge agrees with gold": "75.0%",
        "seconds of training": "12.5", "seconds of sampling": "2.2",
    }  # fmt: skip
    for name, value in values.items():
        assert re.search(rf"^{name[:30]}.*( +{re.escape(value)}){{3}}", text.replace("\n of", " of"), re.MULTILINE), (
            name
        )
    assert re.search(r"displacement in validation +0\.125 +0\.225 +0\.325", text)
    assert re.search(r"judged, at the start +0\.330 ±0\.040 +0\.500 ±0\.040 +0\.550 ±0\.040", text)
    assert re.search(r"the same after the round +0\.500 ±0\.040 +0\.550 ±0\.040 +0\.610 ±0\.040", text)
    assert re.search(r"wrong.* 300 +299 +298", text)
    said = "The judge got worse in round 1: it agrees with 60% of the trusted pairs, and did with 90% before."
    assert said in " ".join(text.split())
    assert text.count("got worse") == 1
    assert "± is half of a 95 % interval." in text


def test_the_page_is_whole_and_nothing_is_written_over(run, capsys):
    decoy = run.parent / "mine.html"
    decoy.write_text("mine")
    main(["rounds", "run", "--output", "rounds.html"])
    page = (run.parent / "rounds.html").read_text()
    assert "got worse in round 1" in page
    assert "<b>wrong" not in page
    assert page.count("0.610 ±0.040") == 1
    for name in ("mine.html", "rounds.html"):
        assert "exists already" in refused(capsys, "run", "--output", name)
    assert "must end in .html" in refused(capsys, "run", "--output", "x.png")
    assert decoy.read_text() == "mine"


def test_what_is_no_run_of_rounds_is_one_sentence(run, capsys):
    plain = run.parent / "plain" / "version_0"
    plain.mkdir(parents=True)
    (plain / "config.yaml").write_text("x: 1")
    assert "has no rounds: give a run whose partition makes its pairs itself" in refused(capsys, str(plain))
    assert "No run `nowhere`" in refused(capsys, "nowhere")
    for content in ("{", "[]", "{}", '{"round": 0, "greedy": {"score": "x"}}', '{"round": 0, "seconds": [1]}'):
        (run / "partition_1" / "round.json").write_text(content)
        refused(capsys, "run")


def refused(capsys, *words):
    with pytest.raises(SystemExit) as stop:
        main(["rounds", *words])
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert "Traceback" not in said
    return " ".join(said.split())
