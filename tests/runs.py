"""Tiny runs: a described model, a handful of pairs, a plain Trainer on the CPU, and what these say that is no news."""

import hashlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer

from lit_dpo import PreferenceDataModule, PreferenceModule

QUIET = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in (
        ".*does not have many workers",  # pairs are in memory, so workers would only cost
        ".*isinstance.treespec, LeafSpec",  # Lightning 2.6 on PyTorch 2.13
        ".*Couldn't infer the batch indices",  # the sampler makes the batches, which Lightning cannot see
        ".*GPU available but not used",
        ".*is_gradient_checkpointing. is deprecated",  # peft 0.21 on transformers 5.23
        ".*Checkpoint directory .* exists and is not empty",
        ".*number of training batches .* is smaller than the logging interval",
        ".*LightningCLI's args parameter",  # what `main` is for
    )
]

LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 128,
}
# Layer norms that keep to float64, where Llama's compute in float32 whatever comes in.
NEOX = {**LLAMA, "model_type": "gpt_neox"}

_SUBJECTS = ("tea", "rain", "bread", "trains", "the sea", "music", "an owl", "winter", "chess", "a long walk in town")
_REPLIES = ("Gladly!", "Of course, let us talk about it.", "Yes: here is all that I know.", "Sure, ask me anything.")


def rows(count, start=0, prompts=None):
    """Rows of text, all different; ``prompts`` limits how many prompts they share."""
    found = []
    for n in range(start, start + count):
        prompt = n if prompts is None else n % prompts
        found.append(
            {
                "prompt": f"Tell me about {_SUBJECTS[prompt % 10]}, number {prompt}.",
                "chosen": f" {_REPLIES[n % 4]} This is number {n}.",
                "rejected": " no" if n % 3 else f" no, not {n} again, and not today either",
            }
        )
    return found


def write(path, rows):
    """Write rows as a jsonl file, and return its name."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def pairs_file(folder, count=24, name="pairs.jsonl", **options):
    return write(folder / name, rows(count, **options))


def module(model=LLAMA, lr=1e-2, optimizer=torch.optim.SGD, **options):
    """A `PreferenceModule` with plain SGD at a constant learning rate unless told otherwise."""
    options = {"tokenizer": "quickstart", "lr_scheduler": None, **options}
    return PreferenceModule(model, optimizer=lambda parameters: optimizer(parameters, lr=lr), **options)


def data(train="quickstart", **options):
    return PreferenceDataModule(train, **{"batch_size": 8, "max_length": 128, **options})


def trainer(folder=None, **options):
    """A Trainer that writes nothing unless told to."""
    quiet = ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing")
    options = {**dict.fromkeys(quiet, False), "num_sanity_val_steps": 0, "accelerator": "cpu", "devices": 1, **options}
    return Trainer(default_root_dir=folder, **options)


def fit(module, datamodule, folder=None, **options):
    """Fit, for an epoch unless told otherwise, and return the Trainer."""
    run = trainer(folder, **(options if options.keys() & {"max_steps", "max_epochs"} else {**options, "max_epochs": 1}))
    run.fit(module, datamodule)
    return run


def weights(model):
    """A copy of a model's state."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(first, second):
    """Whether two states are the same, bit for bit."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def digest(model):
    """A hash over all the tensors of a model, buffers included."""
    found = hashlib.sha256()
    for name, value in sorted([*model.named_parameters(), *model.named_buffers()]):
        found.update(name.encode() + value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def leave():
    """End a process that `launch` has started: a plain exit aborts now and then, when all is done."""
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)


def launch(arguments, processes=2, code=0):
    """Run a module in several processes to their end, as torchrun would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        **os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes),
        "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "test", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    started = [
        subprocess.Popen(
            [sys.executable, "-m", *arguments], env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(processes)
    ]  # fmt: skip
    try:
        logs = [process.communicate(timeout=180)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    for process, log in zip(started, logs, strict=True):
        assert process.returncode == code, log[-4000:]
