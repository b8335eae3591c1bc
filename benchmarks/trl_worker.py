"""TRL's side of the throughput benchmark: `DPOTrainer` through its public interface."""

from __future__ import annotations

import copy
import json
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import Record, StepClock, now
from datasets import Dataset
from flops import Lengths
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch.utils.data import SequentialSampler
from transformers import PreTrainedTokenizerFast, TrainerCallback
from trl import DPOConfig, DPOTrainer
from workers import CHECKED_STEPS, Run, Settings, Triple, adamw, identity, reference_record, step_means


def train_trl(run: Run, settings: Settings, steps: int) -> Record:
    """Train with `DPOTrainer` on the same weights, rows and batches; see `workers.train`."""

    class Opponent(DPOTrainer):
        """DPOTrainer as it is, but with a fixed order, and with a look at its first losses and its clock."""

        def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
            return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)

        def _precompute_ref_logps(self, *args: Any, **kwargs: Any) -> Any:
            before = now(settings.device)
            dataset = super()._precompute_ref_logps(*args, **kwargs)
            after = now(settings.device)
            scoring.append((after[0] - before[0], after[1] - before[1]))
            return dataset

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            if len(losses) < CHECKED_STEPS * run.micro_batches:
                losses.append(float(loss.detach()))
            return loss

    class Watch(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            clock.step()

    losses: list[float] = []
    scoring: list[tuple[float, float]] = []
    clock = StepClock(settings.warmup, settings.device)
    if run.completion_head:
        _force_completion_head()
    options = adamw(settings)
    config = DPOConfig(
        output_dir=str(Path(settings.folder) / "trl"),
        model_init_kwargs={"dtype": settings.dtype},
        beta=settings.beta,
        max_length=settings.max_length,
        truncation_mode="keep_start",
        precompute_ref_log_probs=run.cached,
        per_device_train_batch_size=settings.batch // run.micro_batches,
        gradient_accumulation_steps=run.micro_batches,
        max_steps=steps,
        learning_rate=options["lr"],
        adam_beta1=options["betas"][0],
        adam_beta2=options["betas"][1],
        adam_epsilon=options["eps"],
        weight_decay=options["weight_decay"],
        optim="adamw_torch_fused",  # its default
        gradient_checkpointing=run.checkpointing,  # here: a later assignment leaves its newer name at the default
        max_grad_norm=0.0,  # its default of 1.0 would be extra work, and another result
        lr_scheduler_type="constant",
        bf16=False,  # the weights' dtype is the dtype of the products, on both sides
        use_cpu=settings.device == "cpu",
        dataloader_pin_memory=settings.device != "cpu",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    with settings.rows(run.order).open(encoding="utf-8") as lines:
        rows = Dataset.from_list([json.loads(line) for line in lines])
    trainer = Opponent(settings.model, args=config, train_dataset=rows, callbacks=[Watch()])
    trainer.train()
    if trainer.model.is_gradient_checkpointing != run.checkpointing:
        raise RuntimeError(f"TRL trained with checkpointing {'off' if run.checkpointing else 'on'}, unlike {run}.")
    batches = list(trainer.get_train_dataloader())
    timed = batches[settings.warmup * run.micro_batches : steps * run.micro_batches]
    return {
        "losses": step_means(losses, run.micro_batches),
        **clock.record(),
        **reference_record(scoring or [(0.0, 0.0)], settings.steps * settings.batch),
        **identity([_padded_triples(batch) for batch in batches], run.micro_batches),
        "reference": "precomputed" if run.cached else "live",
        "checkpointing": trainer.model.is_gradient_checkpointing,
        "timed_pairs": (steps - settings.warmup) * settings.batch,
        "computed_tokens": sum(batch["input_ids"].numel() for batch in timed),
        "real_tokens": sum(int(batch["attention_mask"].sum()) for batch in timed),
    }


def time_on_ids(
    model: Any, lengths: Sequence[Lengths], batch: int, steps: int, seconds: float, clock: StepClock
) -> None:
    """Train a model in memory with TRL's defaults (checkpointing, live reference) on random tokens of given lengths.

    Each number is a word of its own, so that texts of numbers become exactly as many tokens, and one for the end.
    """
    vocab = model.config.vocab_size
    words = {f"{i}": i for i in range(vocab - 2)} | {"<eos>": vocab - 2, "<pad>": vocab - 1}
    core = Tokenizer(WordLevel(words, unk_token="<pad>"))
    core.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<pad>")
    draw = random.Random(0)

    def text(size: int) -> str:
        return "".join(f" {draw.randrange(vocab - 2)}" for _ in range(size))

    rows = [{"prompt": text(p), "chosen": text(max(1, c - 1)), "rejected": text(max(1, r - 1))} for p, c, r in lengths]

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            clock.step()
            if time.perf_counter() - began > seconds and len(clock.marks) >= 3:
                control.should_training_stop = True

    cpu = model.device.type == "cpu"
    with tempfile.TemporaryDirectory(prefix="trl_") as folder:
        config = DPOConfig(
            output_dir=folder,
            per_device_train_batch_size=batch,
            max_steps=steps,
            max_length=max(p + max(c, r) for p, c, r in lengths) + 1,
            use_cpu=cpu,
            bf16=not cpu,
            dataloader_pin_memory=not cpu,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = DPOTrainer(
            model,
            ref_model=copy.deepcopy(model),
            args=config,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=[Watch()],
        )
        began = time.perf_counter()
        trainer.train()


def _force_completion_head() -> None:
    """Let TRL score completion positions only, as it does on CUDA, on a CPU too.

    `trl.trainer.utils.add_fused_lm_head` asks ``_use_triton(device)`` once: if yes, it gathers the hidden states whose
    label is no ``-100``, scores these, and scatters the results back; otherwise it scores every position and masks
    afterwards. Both ways are TRL's own and give the same numbers. Only this one question, in this one module, is
    answered with yes. The kernels in `trl.kernels.chunked_logprob` ask a name of their own, so the tiles are still
    folded by TRL's torch code, which is all a CPU can run. No setting reaches this; it is the honest stand-in on a CPU
    for what TRL does on a GPU.
    """
    from trl.trainer import utils

    if not callable(getattr(utils, "_use_triton", None)):
        raise RuntimeError("This TRL has no `trl.trainer.utils._use_triton`: read how its head picks positions now.")
    utils._use_triton = lambda device: True


def _padded_triples(batch: dict[str, torch.Tensor]) -> list[Triple]:
    pairs = len(batch["input_ids"]) // 2
    rows = [
        (ids[real & ~done].tolist(), ids[real & done].tolist())
        for ids, real, done in zip(
            batch["input_ids"], batch["attention_mask"].bool(), batch["completion_mask"].bool(), strict=True
        )
    ]
    assert all(rows[i][0] == rows[pairs + i][0] for i in range(pairs))
    return [(rows[i][0], rows[i][1], rows[pairs + i][1]) for i in range(pairs)]
