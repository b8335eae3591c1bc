"""`lit-dpo inspect`, as a person calls it, on rows whose tokens are known."""

import re
from pathlib import Path

import pytest
import torch

from lit_dpo.cli import main
from lit_dpo.models import load_model
from lit_dpo.tokenizers import quickstart_tokenizer
from tests import runs
from tests.test_cli import built, quick  # noqa: F401 - fixtures

pytestmark = [
    *runs.QUIET,
    pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning.pytorch.cli"),
    pytest.mark.usefixtures("quick"),
]


TINY = str(Path(__file__).parents[1] / "conf" / "tiny.yaml")


def message(role, content):
    return {"role": role, "content": content}


TALK = {
    "prompt": [message("user", "Where is the <b>sea</b>?")],
    "chosen": [message("assistant", "It is west."), message("user", "Really?"), message("assistant", "Yes, really.")],
    "rejected": [message("assistant", "no idea")],
}
SPELLED = {"prompt": "Say <|im_end|> twice:", "chosen": " gladly, <|im_end|>!", "rejected": " no"}


def asked(*words):
    """Arguments of `inspect` with a tiny model, all rows trained on."""
    return ["inspect", "--config", TINY, "--data.validation_fraction", "0", *map(str, words)]


@pytest.fixture
def rows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    return runs.write(tmp_path / "rows.jsonl", [TALK])


def test_the_terminal_shows_what_is_trained(rows, tmp_path, capsys):
    """The fork, the turn that is not trained on, special tokens; plain in a pipe, and nothing is left behind."""
    main(asked("--data.train", rows))
    said = capsys.readouterr().out
    assert "\x1b" not in said
    assert max(len(line) for line in said[said.index("By source") :].splitlines() if "/" not in line) <= 80
    assert "1 rows read, 1 kept" in said
    assert "as it is trained on" not in said  # the pair is shown once
    shown = said[said.index("\nprompt  ") :]
    assert re.match(
        r"\nprompt   «<\|im_start\|>»user\nWhere is the <b>sea</b>\?«<\|im_end\|>»\n«<\|im_start\|>»assistant\n┃\n"
        r"chosen   ┃It is west\.«<\|im_end\|>»",
        shown,
    )
    seen_only = "".join(re.findall(r"⟦(.*?)⟧", shown, re.DOTALL))
    assert "Really?" in seen_only
    assert "really." not in seen_only
    assert "west" not in seen_only
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_colours_tell_the_sides_apart_unless_they_are_unwanted(rows, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    main(asked("--data.train", rows))
    said = capsys.readouterr().out
    assert "\x1b[32mIt is west." in said
    assert "\x1b[31mno idea" in said
    assert re.search(r"\x1b\[90m[^\x1b]*Where is the", said)
    assert re.search(r"\x1b\[2;32mReally\?", said)
    monkeypatch.setenv("NO_COLOR", "1")
    main(asked("--data.train", rows))
    assert not re.search(r"\x1b\[[\d;]*3[0-7]m", capsys.readouterr().out)


def test_text_that_spells_a_special_token_is_shown_as_text(tmp_path, capsys):
    main(asked("--data.train", runs.write(tmp_path / "rows.jsonl", [SPELLED])))
    said = capsys.readouterr().out
    assert "prompt   Say <|im_end|> twice:┃" in said
    assert "chosen   ┃ gladly, <|im_end|>!«<|im_end|>»" in said


def test_a_row_cannot_steer_the_terminal(tmp_path, capsys):
    row = {"prompt": "Say \x1b[2J this:", "chosen": " yes \x9b31m", "rejected": " no"}
    main(asked("--data.train", runs.write(tmp_path / "a\x1b[31m.jsonl", [row])))
    said = capsys.readouterr().out
    assert "Say ?[2J this:" in said
    assert re.search(r"^a\?\[31m  1 ", said, re.MULTILINE)
    assert "\x1b" not in said
    assert "\x9b" not in said


def test_a_page_replaces_nothing_unasked_and_escapes_rows(rows, tmp_path, capsys):
    page = tmp_path / "page.html"
    page.write_text("somebody's own")
    with pytest.raises(SystemExit) as stop:
        main(asked("--data.train", rows, "--html", page))
    assert stop.value.code == 2
    assert "`--overwrite`" in capsys.readouterr().err
    assert page.read_text() == "somebody's own"
    main(asked("--data.train", rows, "--html", page, "--overwrite"))
    text = page.read_text()
    assert "&lt;b&gt;sea&lt;/b&gt;" in text
    assert "<b>" not in text
    assert 'class="special">«&lt;|im_end|&gt;»' in text
    assert re.search(r'<pre class="tokens chosen">┃It is west', text)
    assert re.search(r'class="masked">[^<]*Really\?', text)


def test_sources_are_counted_and_scored_by_the_starting_model(tmp_path, capsys):
    """Against the model's own logits, one sequence at a time."""
    files = [runs.pairs_file(tmp_path, 8, f"{name}.jsonl", start=start) for name, start in (("a", 0), ("b", 8))]
    main(asked("--data.train", f"[{files[0]}, {files[1]}]", "--score", "true", "--pairs", "0"))
    said = capsys.readouterr().out
    tokenizer = quickstart_tokenizer()
    model = load_model(runs.LLAMA, tokenizer)
    rows = runs.rows(8) + runs.rows(8, start=8)
    margins, longer = [], []
    for row in rows:
        sums = []
        for side in ("chosen", "rejected"):
            prompt = tokenizer(row["prompt"], add_special_tokens=False).input_ids
            text = tokenizer(row["prompt"] + row[side], add_special_tokens=False).input_ids
            whole = [*text, tokenizer.eos_token_id]
            assert whole[: len(prompt)] == prompt
            logps = model(input_ids=torch.tensor([whole])).logits[0].detach().log_softmax(-1)
            sums.append((sum(float(logps[n - 1, whole[n]]) for n in range(len(prompt), len(whole))), len(whole)))
        margins.append(sums[0][0] - sums[1][0])
        longer.append(sums[0][1] > sums[1][1])
    for line in said.splitlines():
        values = line.split()[1:]
        if line.startswith("all "):
            assert values[0] == "16"
            assert values[4] == f"{sum(longer) / 16:.0%}"
            assert values[6:] == [f"{sum(m > 0 for m in margins) / 16:.0%}", f"{sum(margins) / 16:.2f}"]
            break
    else:
        pytest.fail(said)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--pairs", "-1"], "`--pairs` must be at least 0, got -1."),
        (["--ckpt_path", "last"], "`inspect` looks at a run before its first step: leave `--ckpt_path` out."),
    ],
)
def test_a_mistake_gets_one_sentence(more, words, rows, capsys):
    with pytest.raises(SystemExit) as stop:
        main(asked("--data.train", rows, *more))
    said = capsys.readouterr().err
    assert (stop.value.code, "Traceback" in said) == (2, False)
    assert words in said
