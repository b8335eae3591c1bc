"""`lit-dpo sample`: what models say to the same prompts."""

import json

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_dpo.cli import main
from tests import runs
from tests.trained import made_once, model_folder, refused  # noqa: F401

pytestmark = [
    *runs.QUIET,
    pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning.pytorch.cli"),
    pytest.mark.filterwarnings("ignore:.*modules? in eval mode"),
]


@pytest.fixture
def prompts(tmp_path):
    words = ("tea", "rain <b>now</b>\x1b[2J", f"{'rain or ' * 60}bread", "tea")
    rows = [{"prompt": f"Tell me about {word}."} for word in words]
    return runs.write(tmp_path / "prompts.jsonl", rows)


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_base_and_run_answer_side_by_side(made, prompts, tmp_path, capsys):
    file, html = tmp_path / "said.jsonl", tmp_path / "said.html"
    options = ["--prompts", prompts, "--max_new_tokens", "6", "--jsonl", str(file), "--html", str(html)]
    main(["sample", str(made / "runs" / "version_0"), str(made / "out"), *options])
    rows, shown = read(file), capsys.readouterr().out
    names = [str(made / "base"), str(made / "runs" / "version_0"), str(made / "out")]
    assert [row["model"] for row in rows[:3]] == names
    assert [row["row"] for row in rows[::3]] == [f"{prompts}:{line}" for line in range(1, 5)]
    said = {name: [row["completion"] for row in rows if row["model"] == name] for name in names}
    assert said[names[1]] == said[names[2]] != said[names[0]]  # the export is the run's policy
    # By the oracle of transformers' own generation, a prompt at a time.
    model, tokenizer = (kind.from_pretrained(names[0]) for kind in (AutoModelForCausalLM, AutoTokenizer))
    for row in rows[::3]:
        ids = tokenizer(row["prompt"], return_tensors="pt").input_ids
        expected = model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :].tolist()
        assert row["ids"] == expected
        assert row["finished"] == (tokenizer.eos_token_id in expected)
    assert shown.count("rain or bread.") == 1
    assert shown.count("rain or") < 60  # of a long prompt its end
    assert f"Wrote {file}" in shown.replace("\n", "")
    assert f"{names[0]}: 4 completions of " in shown
    assert all(len(line) <= 80 for line in shown.splitlines() if str(tmp_path.parent) not in line)  # paths stay whole
    assert "\x1b" not in shown
    page = html.read_text(encoding="utf-8")
    assert page.count('<div class="beside">') == 4  # the models of each prompt
    assert "rain &lt;b&gt;now&lt;/b&gt;" in page
    assert "<b>now" not in page
    assert not any(word in page for word in ("http://", "https://", "<script"))


def test_the_batch_size_changes_no_text_and_the_seed_does(made, prompts, tmp_path):
    found = {}
    for name, more in (("1", ["--batch_size", "1"]), ("16", ["--batch_size", "16"]), ("seed", ["--seed", "1"])):
        file = tmp_path / f"{name}.jsonl"
        options = ["--samples", "3", "--temperature", "1", "--top_p", "0.95", "--max_new_tokens", "8"]
        main(["sample", str(made / "base"), "--prompts", prompts, *options, *more, "--jsonl", str(file)])
        found[name] = read(file)
    assert found["1"] == found["16"] != found["seed"]
    first, last = ([row["ids"] for row in found["1"] if row["row"] == f"{prompts}:{line}"] for line in (1, 4))
    assert len({tuple(ids) for ids in first + last}) == 6  # the same prompt once more is drawn anew


def test_nothing_is_written_over(made, prompts, tmp_path, capsys):
    mine = tmp_path / "mine.jsonl"
    mine.write_text("mine\n")
    given = ["sample", made / "base", "--prompts", prompts, "--max_new_tokens", "2", "--jsonl", mine]
    assert "exists already: name another file, or add `--overwrite`" in refused(given, capsys)
    assert mine.read_text() == "mine\n"
    main([str(word) for word in [*given, "--overwrite"]])
    assert len(read(mine)) == 4
    link = tmp_path / "link.jsonl"
    link.symlink_to(mine)
    assert "exists already: name a file" in refused([*given[:-1], link, "--overwrite"], capsys)
    assert len(read(mine)) == 4


def test_mistakes_are_one_sentence_with_a_remedy(made, prompts, tmp_path, capsys):
    base, run = made / "base", made / "runs" / "version_0"
    half = tmp_path / "half"
    half.mkdir()
    (half / "tokenizer.json").write_text("{}")
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    killed = tmp_path / "killed" / "version_0"
    killed.mkdir(parents=True)
    (killed / "config.yaml").write_text("model: {}\n")
    for given, expected in (
        (["--prompts", prompts], "needs at least one model and a file of prompts"),
        ([base], "needs at least one model and a file of prompts"),
        ([tmp_path / "none", "--prompts", prompts], "no such folder, and not to be had from the hub"),
        ([half, "--prompts", prompts], "holds neither a model (`config.json` and weights) nor a run"),
        ([killed, "--prompts", prompts], "or wait for the run's first checkpoint"),
        ([run / "checkpoints" / "no.ckpt", "--prompts", prompts], "No checkpoint"),
        ([base, "--prompts", empty], "holds no prompt: give a file with at least one"),
        ([base, "--prompts", tmp_path / "no.jsonl"], "no.jsonl"),
        ([base, "--prompts", prompts, "--temperature", "-1"], "`temperature` must be at least 0"),
        ([base, "--prompts", prompts, "--max_new_tokens", "500"], f"{prompts}:1: A prompt of "),
        ([base, "--prompts", prompts, "--count", "-1"], "`count` must be at least 0"),
        ([base, "--prompts", prompts, "--batch_size", "0"], "`batch_size` must be at least 1"),
        ([base, "--prompts", prompts, "--top_p", "0.9"], "`top_p` 0.9 changes nothing at `temperature` 0"),
        ([base, "--prompts", prompts, "--jsonl", "new", "--html", "./new"], "Two files cannot be written to `new`"),
        ([base, "--prompts", prompts, "--sampels", "2"], "sampels"),
    ):
        assert expected in refused(["sample", *given], capsys), given


def test_a_prompt_that_is_too_long_for_one_model_names_what_to_change(made, prompts, tmp_path, capsys):
    short = model_folder(tmp_path / "short", max_position_embeddings=16)
    said = refused(["sample", short, "--prompts", prompts, "--max_new_tokens", "12"], capsys)
    assert "lower `max_new_tokens`, or shorten the prompt" in said
