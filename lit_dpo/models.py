"""Getting a policy and its tokenizer, from a name, a folder or a description, and writing them out again."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

from lit_dpo.checkpoints import sync_files
from lit_dpo.finite import first_nonfinite
from lit_dpo.merging import gives_no_tensor, merged
from lit_dpo.sources import NO_DECODER, read_config, read_model, read_tokenizer, refuse_kernels, trusts_remote_code

Dtype = Literal["float32", "bfloat16", "float16", "float64"]
Scalar = bool | int | float | None | str  # the order in which the command line tries to read a value
ModelDescription = dict[str, Scalar | list[Scalar] | dict[str, Scalar]]

_CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True)
class LoRA:
    """Low-rank adapters on the policy's linear layers, through peft.

    Source: Hu et al., LoRA, https://arxiv.org/abs/2106.09685.

    Args:
        rank: Rank of each update, at least 1; bigger adapts more and costs more.
        alpha: Scale of the update, applied as ``alpha / rank``.
        dropout: Probability of dropping an input of an adapter while training, in [0, 1).
        target_modules: Names of the layers to adapt; ``all-linear`` is every linear layer but the output head.
    """

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"

    def attach(self, model: PreTrainedModel, seed: int = 0) -> nn.Module:
        """Wrap the model: its own weights are frozen, the adapters' train and start as no change at all.

        Args:
            model: The model, changed in place.
            seed: Of the adapters' random half, so that every process starts from the same one.

        Raises:
            ImportError: peft is not installed.
        """
        try:
            from peft import LoraConfig, get_peft_model
        except ImportError as error:
            raise ImportError('LoRA needs the package peft: pip install "lit-dpo[peft]".') from error
        # Some routers are linear layers to peft, but give more than a product.
        strange = [name for name, module in model.named_modules() if gives_no_tensor(module)]
        config = LoraConfig(
            task_type="CAUSAL_LM",
            exclude_modules=strange if strange and self.target_modules == "all-linear" else None,
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=self.target_modules,
        )
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*is_gradient_checkpointing. is deprecated")  # peft 0.21 asks for it
            torch.manual_seed(seed)
            wrapped: nn.Module = get_peft_model(model, config)
        return wrapped


def load_model(
    source: str | ModelDescription,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: Dtype = "float32",
    seed: int = 0,
) -> PreTrainedModel:
    """A causal language model, with dropout off.

    Args:
        source: A hub name or a local folder with weights; or a description such as
            ``{"model_type": "llama", "hidden_size": 64, ...}``, from which a model with random weights is made.
        tokenizer: Fills in what a description leaves out: vocabulary size and special tokens.
        dtype: Of the weights.
        seed: Of the random weights: the same description and seed give the same model.

    Raises:
        ValueError: There is no such model, it is broken or needs code of its own (see `lit_dpo.sources.read_model`), or
            the description names no known ``model_type``.
    """
    kind = getattr(torch, dtype)
    if isinstance(source, str):
        model = read_model(source, kind)
    else:
        config = _config(source, tokenizer)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = _from_config(config, kind)
    _refuse_half(model)
    _disable_dropout(model)
    _keep_softcap(model)
    model.eval()  # as `from_pretrained` gives it
    return model


def empty_model(
    source: str | ModelDescription, tokenizer: PreTrainedTokenizerBase | None = None, dtype: Dtype = "float32"
) -> PreTrainedModel:
    """What `load_model` gives, but without any weights: every tensor is on the meta device.

    Raises:
        ValueError: There is no such model, or the description names no known ``model_type``.
    """
    config = read_config(source) if isinstance(source, str) else _config(source, tokenizer)
    with torch.device("meta"):
        model = _from_config(config, getattr(torch, dtype))
    _disable_dropout(model)
    _keep_softcap(model)
    return model


def load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a hub name or local folder, or ``quickstart``: a small one made from the embedded data.

    Raises:
        ValueError: There is no such tokenizer.
    """
    if source == "quickstart":
        return quickstart_tokenizer()
    return read_tokenizer(source)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer made from texts, with the ChatML chat template.

    Args:
        texts: What to learn merges from.
        vocab_size: Tokens at most, the 256 bytes and 3 special tokens included.
    """
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|pad|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
        extra_special_tokens=["<|im_start|>"],
    )
    tokenizer.chat_template = _CHATML
    return tokenizer


def quickstart_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of the quickstart: 1,024 tokens learnt from the embedded preference data."""
    lines = Path(__file__).with_name("data").joinpath("quickstart.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return train_tokenizer((m["content"] for row in rows for side in row.values() for m in side), vocab_size=1024)


def export(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    merge: bool = True,
    card: str | None = None,
) -> Path:
    """Write a folder that `AutoModelForCausalLM` and `AutoTokenizer` load with ``from_pretrained``.

    The folder appears whole or not at all: it is written beside its place and renamed into it.

    Args:
        model: A transformers model or a peft wrapper around one; it is left as it is.
        tokenizer: Saved along, chat template included.
        folder: Must not exist, or be empty.
        merge: Fold LoRA adapters into the weights; otherwise only the adapters are written.
        card: Text of the model card, ``README.md``.

    Raises:
        FileExistsError: `folder` holds something already.
        ValueError: A weight is not finite, or the merged model gives other log-probs than the one with adapters.
    """
    refuse_existing(Path(folder))
    if hasattr(model, "peft_config") and merge:
        model = merged(model)
    if name := first_nonfinite(model.named_parameters()):
        raise ValueError(
            f"The weights to export are not finite, `{name}` first, and make no model: export an earlier checkpoint, "
            "or train with a lower learning rate."
        )
    target = new_folder(folder)
    part = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        os.chmod(part, 0o755)
        with without_bars():
            model.save_pretrained(part)  # type: ignore[operator]
        tokenizer.save_pretrained(part)
        if card is not None:
            (part / "README.md").write_text(card, encoding="utf-8")
        sync_files(part)
        if target.exists():
            target.rmdir()
        part.rename(target)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    return target


@contextmanager
def without_bars(hidden: bool = True) -> Iterator[None]:
    """Let transformers draw no progress bars here, such as one over the files that it writes."""
    hidden &= logging.is_progress_bar_enabled()
    if hidden:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if hidden:
            logging.enable_progress_bar()


def new_folder(folder: str | Path) -> Path:
    """A path where a folder may be made, its parents present.

    Raises:
        FileExistsError: Something is there already.
    """
    target = Path(folder)
    refuse_existing(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    return target


def refuse_existing(target: Path) -> None:
    """Raise FileExistsError if something is there that is no empty folder."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"`{target}` exists already: name a new folder, or remove that one first.")


def _config(description: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase | None) -> Any:
    values = dict(description)
    if tokenizer is not None:
        values.setdefault("vocab_size", len(tokenizer))
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            values.setdefault(name, getattr(tokenizer, name))
    try:
        config = AutoConfig.for_model(**values)
    except StrictDataclassError as error:
        raise ValueError(f"`model` describes no model: {' '.join(str(error).split())}") from error
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"`model` names no usable `model_type`: {description.get('model_type')!r}. Give a hub name, a folder, "
            "or a description such as {model_type: llama, hidden_size: 256, num_hidden_layers: 4, ...}."
        ) from error
    refuse_kernels(config, description.get("model_type"))
    return config


def _from_config(config: Any, dtype: torch.dtype) -> PreTrainedModel:
    """A random model, or ValueError if a config is that of no decoder-only language model."""
    problem = f"`model` is a {config.model_type}, {NO_DECODER}"
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(problem)
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, trust_remote_code=trusts_remote_code(), dtype=dtype
        )
    except Exception as error:  # whatever odd numbers come to
        if "Unrecognized configuration class" in str(error):
            raise ValueError(problem) from error
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ValueError(f"`model` describes no model that can be made ({reason}): correct its numbers.") from error
    return model


def _refuse_half(model: PreTrainedModel) -> None:
    """Refuse the decoder of an encoder-decoder, which transformers loads alone without a word."""
    config = model.config
    made_as = (getattr(config, "architectures", None) or [""])[0]
    cut = made_as.endswith("ForConditionalGeneration") and made_as != type(model).__name__
    if cut and getattr(config, "encoder_layers", None) is not None:
        raise ValueError(f"`model` is a {config.model_type}, {NO_DECODER}")


def _keep_softcap(model: PreTrainedModel) -> None:
    """Leave `sdpa` where a model caps its attention scores: transformers 5.17 drops Gemma 2's cap there, silently."""
    config = model.config.get_text_config()
    if getattr(config, "attn_logit_softcapping", None) and model.config._attn_implementation == "sdpa":
        model.set_attn_implementation("eager")


def _disable_dropout(model: nn.Module) -> None:
    """Set every dropout rate to zero, those kept as plain numbers on attention modules too; the config stays."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)
