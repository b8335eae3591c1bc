"""`append_eos` and `chat_template`: from the command line to the token ids, the token cache, and the export."""

import pytest
from transformers import AutoTokenizer

from lit_dpo.cli import main
from lit_dpo.tokenizers import quickstart_tokenizer
from tests import runs
from tests.test_cli import command

pytestmark = [*runs.QUIET, pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning.pytorch.cli")]
TEMPLATE = (
    "{% for m in messages %}({{ m.role }}) {{ m.content }}\n{% endfor %}{{ '(assistant) ' if add_generation_prompt }}"
)


@pytest.fixture
def bare(tmp_path):
    """The folder of a tokenizer without a chat template."""
    tokenizer = quickstart_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "bare")
    return str(tmp_path / "bare")


def messages(folder, count=12):
    rows = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "chosen": [{"role": "assistant", "content": row["chosen"].strip()}],
            "rejected": [{"role": "assistant", "content": row["rejected"].strip()}],
        }
        for row in runs.rows(count)
    ]
    return runs.write(folder / "messages.jsonl", rows)


def texts(data):
    """Prompt, chosen, rejected of the first row, as text."""
    return tuple(data._tokenizer().decode(ids) for ids in data._sets["train"].pair(0))


@pytest.mark.parametrize("how", ["file", "text"])
def test_a_chat_template_of_ones_own_is_trained_on_and_exported(bare, tmp_path, monkeypatch, how):
    (tmp_path / "own.jinja").write_text(TEMPLATE, encoding="utf-8")
    given = str(tmp_path / "own.jinja") if how == "file" else TEMPLATE
    more = ("--model.tokenizer", bare, "--data.train", messages(tmp_path), "--data.chat_template", given)
    seen = []
    monkeypatch.setattr("lit_dpo.cli.app.RunSummary.on_fit_end", lambda self, trainer, module: seen.append(trainer))
    main(command("fit", tmp_path / "run", "dpo", *more, "--data.batch_size", 4))
    eos = quickstart_tokenizer().eos_token
    prompt, chosen, rejected = texts(seen[0].datamodule)
    start = "(user) Tell me about tea, number 0.\n(assistant)"
    assert prompt == start  # the space goes with the completion's first token
    assert prompt + chosen == f"{start} Gladly! This is number 0.\n{eos}"
    assert prompt + rejected == f"{start} no, not 0 again, and not today either\n{eos}"
    checkpoint = tmp_path / "run" / "version_0" / "checkpoints" / "last.ckpt"
    main(["export", str(checkpoint), str(tmp_path / "export")])
    assert AutoTokenizer.from_pretrained(tmp_path / "export").chat_template == TEMPLATE


@pytest.mark.parametrize("append", [True, False])
def test_completions_end_with_the_eos_unless_told_not_to(tmp_path, monkeypatch, append):
    seen = []
    monkeypatch.setattr("lit_dpo.cli.app.RunSummary.on_fit_end", lambda self, trainer, module: seen.append(trainer))
    more = ("--data.train", runs.pairs_file(tmp_path, 12), "--data.batch_size", 4, "--data.append_eos", append)
    main(command("fit", tmp_path / "run", "dpo", *more))
    eos = quickstart_tokenizer().eos_token
    _, chosen, rejected = texts(seen[0].datamodule)
    assert chosen.endswith(eos) == rejected.endswith(eos) == append


def test_the_token_cache_knows_both(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("LIT_DPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("lit_dpo.data.token_cache.WORTH_KEEPING", 1)
    path, found = messages(tmp_path), {}
    # Without a special token at its end, a template leaves the end to the EOS.
    options = ({}, {"append_eos": False}, {"chat_template": TEMPLATE}, {"chat_template": TEMPLATE, "append_eos": False})
    for turn in ("written", "read"):
        for number, option in enumerate(options):
            data = runs.data(path, tokenizer=quickstart_tokenizer(), **option)
            caplog.clear()
            with caplog.at_level("INFO"):
                data.setup("fit")
            assert ("12 rows found in the token cache" in caplog.text) == (turn == "read")
            assert found.setdefault(number, texts(data)) == texts(data)
    assert len({found[0], found[2], found[3]}) == 3


def test_a_tokenizer_that_was_given_is_left_as_it_is(tmp_path):
    tokenizer = quickstart_tokenizer()
    before = tokenizer.chat_template
    runs.data(messages(tmp_path), tokenizer=tokenizer, chat_template=TEMPLATE).setup("fit")
    assert tokenizer.chat_template == before != TEMPLATE


def test_messages_without_a_template_name_an_option_that_exists(bare, tmp_path, capsys):
    more = ("--model.tokenizer", bare, "--data.train", messages(tmp_path))
    with pytest.raises(SystemExit):
        main(command("fit", tmp_path / "run", "dpo", *more))
    assert "set the data's `chat_template`, or give the data as text" in capsys.readouterr().err


def test_a_template_that_is_none_is_one_sentence(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(command("fit", tmp_path / "run", "dpo", "--data.chat_template", tmp_path / "no.jinja"))
    assert "there is no file" in capsys.readouterr().err
    more = ("--data.train", messages(tmp_path), "--data.chat_template", "{% for m in messages %}")
    with pytest.raises(SystemExit):
        main(command("fit", tmp_path / "run", "dpo", *more))
    said = capsys.readouterr().err
    assert "the chat template refuses the conversation" in said
    assert "Traceback" not in said
