"""`lit-dpo push`: what goes to the hub, and what never does; the hub itself is a stand-in that notes its calls."""

import re
import shutil
from contextlib import nullcontext

import huggingface_hub
import pytest
import yaml
from huggingface_hub.errors import LocalTokenNotFoundError

from lit_dpo.cli import main
from lit_dpo.model_card import how_made, model_card
from tests import runs
from tests.terminal import Terminal
from tests.trained import made_once, refused  # noqa: F401

pytestmark = [
    *runs.QUIET,
    pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning.pytorch.cli"),
    pytest.mark.filterwarnings("ignore:.*modules? in eval mode"),
]


class Hub:
    """Notes what is asked of it."""

    calls: list
    there = False
    error = None

    def repo_exists(self, repo_id):
        self.calls.append(("repo_exists", repo_id))
        if self.error:
            raise self.error
        return self.there

    def create_repo(self, repo_id, private):
        self.calls.append(("create_repo", repo_id, private))

    def upload_folder(self, repo_id, folder_path, allow_patterns, commit_message):
        self.calls.append(("upload_folder", repo_id, str(folder_path), tuple(allow_patterns)))


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(Hub, "calls", [], raising=False)
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    return Hub


@pytest.fixture
def out(made, tmp_path):
    return shutil.copytree(made / "out", tmp_path / "out")


FILES = ["README.md", "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors"]
FILES += ["tokenizer.json", "tokenizer_config.json"]


def test_a_new_repository_is_made_and_gets_what_an_export_writes(hub, out, tmp_path, capsys):
    (out / "credentials.json").write_text("secret")
    (out / ".env").write_text("secret")
    (tmp_path / "elsewhere.json").write_text("secret")
    (out / "vocab.json").symlink_to(tmp_path / "elsewhere.json")
    (out / "logs").mkdir()
    main(["push", str(out), "me/policy"])
    assert hub.calls[:2] == [("repo_exists", "me/policy"), ("create_repo", "me/policy", True)]
    assert hub.calls[2:] == [("upload_folder", "me/policy", str(out), tuple(FILES))]
    shown = capsys.readouterr().out
    assert "Left out, as no export writes them: .env, credentials.json, logs, vocab.json" in " ".join(shown.split())
    hub.calls.clear()
    main(["push", str(out), "me/policy", "--private", "false"])
    assert ("create_repo", "me/policy", False) in hub.calls


def test_a_dry_run_asks_nobody(hub, out, capsys):
    main(["push", str(out), "me/policy", "--dry_run", "true"])
    assert hub.calls == []
    shown = capsys.readouterr().out
    assert [line.split()[0] for line in shown.splitlines()[1:]] == FILES
    assert f"model.safetensors ({(out / 'model.safetensors').stat().st_size:,} bytes)" in shown


def test_an_existing_repository_is_not_written_to_in_a_pipe(hub, out, monkeypatch, capsys):
    monkeypatch.setattr(hub, "there", True)
    said = refused(["push", out, "me/policy"], capsys)
    assert "`me/policy` exists already and is left as it is: name another, or add `--overwrite`" in said
    assert hub.calls == [("repo_exists", "me/policy")]
    main(["push", str(out), "me/policy", "--overwrite"])
    assert [call[0] for call in hub.calls] == ["repo_exists", "repo_exists", "upload_folder"]


@pytest.mark.parametrize(("answer", "uploads"), [("y", 1), ("", 0), ("no", 0)])
def test_a_person_is_asked(hub, out, monkeypatch, answer, uploads):
    monkeypatch.setattr(hub, "there", True)
    asked = []
    monkeypatch.setattr("sys.stdin", Terminal())
    monkeypatch.setattr("sys.stdout", Terminal())
    monkeypatch.setattr("builtins.input", lambda text: asked.append(text) or answer)
    with nullcontext() if uploads else pytest.raises(SystemExit):
        main(["push", str(out), "me/policy"])
    assert len(asked) == 1
    assert [call[0] for call in hub.calls].count("upload_folder") == uploads


def test_mistakes_are_one_sentence_with_a_remedy(hub, out, tmp_path, monkeypatch, capsys):
    for given, expected in (
        ([tmp_path / "none", "me/policy"], "There is no folder"),
        ([out, "policy"], "of the form `organization/name`"),
        ([out, "me/../other"], "of the form `organization/name`"),
    ):
        assert expected in refused(["push", *given], capsys)
    weights = (out / "model.safetensors").rename(tmp_path / "weights")
    assert "it lacks model.safetensors: give a folder that `lit-dpo export` wrote" in refused(
        ["push", out, "me/policy", "--dry_run", "true"], capsys
    )
    weights.rename(out / "model.safetensors")
    assert hub.calls == []
    monkeypatch.setattr(hub, "error", LocalTokenNotFoundError("no token"))
    assert "(no token): log in with `hf auth login`" in refused(["push", out, "me/policy"], capsys)


def test_the_card_says_how_it_was_made(made):
    card = (made / "out" / "README.md").read_text()
    run = made / "runs" / "version_0"
    commands = card.partition("```bash\n")[2].partition("\n```")[0].splitlines()
    assert commands[0] == "lit-dpo fit --config config.yaml"
    assert re.fullmatch(rf"lit-dpo export {run}/checkpoints/\S+ {made / 'out'}", commands[1])
    assert len(commands) == 2
    shown = card.partition("```yaml\n")[2].partition("\n```")[0]
    assert yaml.safe_load(shown) == yaml.safe_load((run / "config.yaml").read_text())
    head = yaml.safe_load(card.split("---")[1])
    assert "base_model" not in head  # a folder of this machine is no name on the hub
    assert "val/rewards/accuracies" in card


def test_the_card_names_what_the_hub_may_know(tmp_path):
    """A hub name, also by way of an export that another run started from; of the data, no file."""
    options = dict.fromkeys(("loss", "reference", "adapter", "dtype"), "x")
    data = {"train": ["org/set:test", "pairs.jsonl", "org/gone.jsonl", str(tmp_path)], "validation": None}

    def head(model):
        card = model_card({"model": model, **options}, {"data": data})
        return yaml.safe_load(card.split("---")[1]), card

    found, card = head("Qwen/Qwen2.5-0.5B")
    assert (found["base_model"], found["datasets"]) == ("Qwen/Qwen2.5-0.5B", ["org/set"])
    (tmp_path / "README.md").write_text(card)
    assert head(str(tmp_path))[0]["base_model"] == "Qwen/Qwen2.5-0.5B"
    for broken in ("no front", "---\n[1\n---", "---\nbase_model: [1]\n---", "---\nbase_model: ../x\n---"):
        (tmp_path / "README.md").write_text(broken)
        assert "base_model" not in head(str(tmp_path))[0]


def test_no_configuration_breaks_out_of_its_block(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("a: 1\n")
    assert "```yaml\na: 1\n```" in how_made(config, "lit-dpo export a b")
    config.write_text("a: |\n  ```\n  # free\n")
    assert "free" not in how_made(config, "lit-dpo export a b")
    assert "lit-dpo fit" not in how_made(None, "lit-dpo export a b")
