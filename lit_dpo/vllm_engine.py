"""Sampling through vLLM, which is made for GPUs and less exact than `Sampler` with transformers."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

import torch
from transformers import AutoConfig, GenerationConfig, PreTrainedTokenizerBase

from lit_dpo.pretrained import trusts_remote_code
from lit_dpo.sampling import Completion, Sampler, ends_of, text_of

_DTYPES = ("float32", "bfloat16", "float16")
_OF_A_RUN = {f"{prefix}{name}" for prefix in ("", "LOCAL_") for name in ("RANK", "WORLD_SIZE")}
_OF_A_RUN |= {"NODE_RANK", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT"}
_PATIENCE = 30.0  # seconds for its end


@dataclass(frozen=True)
class VLLM:
    """Sample with vLLM, in a process of its own that ends when all prompts are completed.

    Each completion gets a seed of its own, made of what decides the random numbers of `Sampler` too. What vLLM makes of
    it also depends on its kernels, and so on what else is computed at the same time: another run, batch size or number
    of processes may give other completions. Those that were written down before a kill are kept, and what is made of
    written completions is exact as ever. Token ids go in and come out, so no text is encoded twice.

    Source: Kwon et al., Efficient memory management for large language model serving with PagedAttention,
    https://arxiv.org/abs/2309.06180.

    Args:
        gpu_memory_utilization: Share of the GPU's memory that vLLM takes, in (0, 1]; what the training holds there
            stays.
        max_model_len: Most tokens of a prompt and its completion; by default the positions of the model. Fewer take
            less memory.

    Raises:
        ValueError: An option is out of its range.
        ImportError: vllm is not installed.
    """

    gpu_memory_utilization: float = 0.8
    max_model_len: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ValueError(f"`gpu_memory_utilization` must be in (0, 1], got {self.gpu_memory_utilization}.")
        if self.max_model_len is not None and self.max_model_len < 2:
            raise ValueError(f"`max_model_len` must be at least 2, got {self.max_model_len}.")
        if importlib.util.find_spec("vllm") is None:
            raise ImportError('Sampling with vLLM needs the package vllm: pip install "lit-dpo[vllm]".')

    def complete(
        self,
        sampler: Sampler,
        model: Path,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Iterable[Sequence[int]],
        names: Iterable[bytes] | None = None,
        dtype: str = "bfloat16",
        device: torch.device | None = None,
    ) -> Iterator[list[Completion]]:
        """The completions of each prompt, in order.

        Args:
            sampler: How to sample; its `rows` decide how many prompts are given to vLLM at a time.
            model: The folder of a transformers model.
            tokenizer: Its tokenizer.
            prompts: Token ids, at least one each.
            names: As `Sampler` takes them.
            dtype: Of the weights.
            device: The GPU; `None` leaves the choice to vLLM.

        Raises:
            ValueError: A prompt is empty or too long, the dtype is none that vLLM computes in, or vLLM fails.
        """
        if dtype not in _DTYPES:
            raise ValueError(f"vLLM computes in {', '.join(_DTYPES)}, got {dtype}: choose another `dtype_name`.")
        trust = trusts_remote_code()
        config = AutoConfig.from_pretrained(model, trust_remote_code=trust)
        positions = [getattr(config.get_text_config(), "max_position_embeddings", None), self.max_model_len]
        most = min((count for count in positions if count), default=None)
        options = {
            "temperature": sampler.temperature,
            "top_p": sampler.top_p,
            "top_k": sampler.top_k or 0,
            "max_tokens": sampler.max_new_tokens,
            "stop_token_ids": ends_of(tokenizer, _generation(model, config)),
        }
        settings = {
            "model": str(model),
            "skip_tokenizer_init": True,
            "dtype": dtype,
            "trust_remote_code": trust,
            "gpu_memory_utilization": self.gpu_memory_utilization,
            **({"max_model_len": self.max_model_len} if self.max_model_len else {}),
        }
        waiting = sampler.keyed(prompts, names)

        def window() -> list[tuple[Sequence[int], bytes]]:
            found = list(islice(waiting, sampler.window))
            sampler.check_ids([ids for ids, _ in found], most)
            return found

        some = window()  # refused, if it is, before vLLM is loaded
        with _worker(settings, device) as ask:
            while some:
                keyed = [(ids, key, sample) for ids, key in some for sample in range(sampler.samples)]
                seeds = [_seed(key, sample) for _, key, sample in keyed]
                found = ask({"prompts": [[*ids] for ids, _, _ in keyed], "seeds": seeds, "options": options})
                said = [Completion(tuple(ids), text_of(tokenizer, ids), finished) for ids, finished in found]
                for start in range(0, len(said), sampler.samples):
                    yield said[start : start + sampler.samples]
                some = window()


def _generation(model: Path, config: Any) -> GenerationConfig:
    try:
        return GenerationConfig.from_pretrained(model)
    except OSError:  # the folder has none
        return GenerationConfig.from_model_config(config)


def _seed(key: bytes, sample: int) -> int:
    """Of one completion, in [0, 2 ** 31)."""
    return int.from_bytes(hashlib.sha256(key + array("q", [sample]).tobytes()).digest()[:4], "little") >> 1


@contextmanager
def _worker(settings: dict[str, Any], device: torch.device | None) -> Iterator[Any]:
    """A function that asks vLLM's process, until the context ends, and the process with it."""
    theirs_in, ours_out = os.pipe()
    ours_in, theirs_out = os.pipe()
    process = subprocess.Popen(
        # `-P`: no module of the working folder, or of this one, is taken for another.
        [sys.executable, "-P", str(Path(__file__).with_name("vllm_worker.py")), str(theirs_in), str(theirs_out)],
        pass_fds=(theirs_in, theirs_out),
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr.fileno() if _has_descriptor(sys.stderr) else subprocess.DEVNULL,
        env=_environment(device),
        start_new_session=True,  # with all that vLLM starts
    )
    os.close(theirs_in)
    os.close(theirs_out)
    patience = 0.0  # whoever is interrupted does not wait for what is under way
    try:
        with open(ours_out, "wb", buffering=0) as asked, open(ours_in, "rb") as answered:

            def tell(request: dict[str, Any]) -> None:
                line = memoryview(json.dumps(request).encode() + b"\n")
                with suppress(BrokenPipeError):  # that it has ended is seen where its answer is missing
                    while line:
                        line = line[asked.write(line) :]

            def ask(request: dict[str, Any]) -> list[list[Any]]:
                tell(request)
                line = answered.readline()
                if not line:
                    _end(process, _PATIENCE)
                ended = f"its process ended with status {process.returncode}"
                answer: dict[str, Any] = json.loads(line) if line else {"error": ended}
                if "error" in answer:
                    raise ValueError(
                        f"vLLM failed ({answer['error']}): see what it printed. If it is short of memory, lower "
                        "`gpu_memory_utilization` or `max_model_len`. A round keeps what was sampled before."
                    )
                found: list[list[Any]] = answer["completions"]
                return found

            tell(settings)
            yield ask
            patience = _PATIENCE
    finally:
        _end(process, patience)


def _end(process: subprocess.Popen[bytes], patience: float) -> None:
    """Wait so many seconds for its own end, now that nothing is asked any more, and end all that is left of it."""
    with suppress(subprocess.TimeoutExpired):
        process.wait(patience)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _has_descriptor(stream: IO[str]) -> bool:
    try:
        return stream.fileno() >= 0
    except (OSError, ValueError, AttributeError):
        return False


def _environment(device: torch.device | None) -> dict[str, str]:
    """One GPU, and nothing that tells a process of a run its place in it."""
    found = {name: value for name, value in os.environ.items() if name not in _OF_A_RUN}
    if device is not None and device.type == "cuda":
        seen = os.environ.get("CUDA_VISIBLE_DEVICES")
        index = device.index or 0
        found["CUDA_VISIBLE_DEVICES"] = seen.split(",")[index] if seen else str(index)
    return {"VLLM_LOGGING_LEVEL": "WARNING", **found, "PYTHONSAFEPATH": "1"}  # `-P` for what it starts
