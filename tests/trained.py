"""A model folder, a run that started from it, and its export: what the tools over models are given."""

import pytest
import torch

from lit_dpo.cli import main
from lit_dpo.models import load_model
from lit_dpo.tokenizers import quickstart_tokenizer
from tests import runs


def model_folder(folder, seed=0, tokenizer=None, **description):
    """A random model and its tokenizer as `save_pretrained` writes them."""
    tokenizer = tokenizer or quickstart_tokenizer()
    load_model({**runs.LLAMA, "max_position_embeddings": 256, **description}, tokenizer, seed=seed).save_pretrained(
        folder
    )
    tokenizer.save_pretrained(folder)
    return str(folder)


def fit(folder, base, *options):
    """A run of a few steps by the command line; its folder."""
    overlay = folder / "tiny.yaml"
    overlay.write_text(
        "data: {max_length: 128, validation_fraction: 0.25}\n"
        "trainer: {accelerator: cpu, devices: 1, max_steps: 4, log_every_n_steps: 1, num_sanity_val_steps: 0, "
        "enable_progress_bar: false, enable_model_summary: false}\n"
    )
    pairs = runs.pairs_file(folder)
    given = ["--config", "dpo", "--config", str(overlay), "--model.model", base, "--data.train", pairs]
    given += ["--model.optimizer.lr", "1e-2", "--trainer.default_root_dir", str(folder / "runs"), *options]
    main(["fit", *given])
    return folder / "runs" / "version_0"


@pytest.fixture(name="made", scope="module")
def made_once(tmp_path_factory):
    """A folder with the model ``base``, the run ``runs/version_0``, its export ``out``, and ``pairs.jsonl``."""
    folder = tmp_path_factory.mktemp("made")
    torch.set_num_threads(1)
    run = fit(folder, model_folder(folder / "base"))
    main(["export", str(run), str(folder / "out")])
    return folder


def refused(arguments, capsys):
    """What a command that ends with status 2 says, on one line."""
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    said = capsys.readouterr().err
    assert stop.value.code == 2, said
    assert "Traceback" not in said
    [line] = [line for line in said.splitlines() if line.startswith("lit-dpo: error: ")]
    return line
