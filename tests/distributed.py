"""One training run for any number of processes; as a script, one process of several (see test_distributed.py)."""

import copy
import json
import os
import sys
import traceback
from functools import partial
from pathlib import Path

import torch
from lightning.pytorch.strategies import FSDPStrategy
from torch.distributed.fsdp import FullStateDictConfig, FullyShardedDataParallel, StateDictType

import lit_dpo
from lit_dpo import (
    ADPOLoss,
    CachedReference,
    EasyToHard,
    FrozenReference,
    IntermediateLoss,
    LDDPOLoss,
    LoRA,
    MixedReference,
    SyncedReference,
)
from lit_dpo.callbacks import BestCheckpoint, ExportModel, PairPredictionWriter
from lit_dpo.models import load_model
from lit_dpo.stepwise import fit_stepwise
from tests import runs


class Noting(EasyToHard):
    """`EasyToHard` that writes down the margins it is given."""

    def __init__(self, parts, path):
        super().__init__(parts)
        self.path = path

    def next(self, step, pool):
        self.path.write_text(json.dumps(pool.margins(0).tolist()))
        return super().next(step, pool)


class FSDP1OnCPU(FSDPStrategy):
    """FSDP1, which neither Lightning nor PyTorch means for CPUs: a class of one's own passes Lightning's check, and
    the whole state is gathered without a detour over the CPU, on which it is already."""

    def __init__(self):
        super().__init__(process_group_backend="gloo")

    def lightning_module_state_dict(self):
        with whole_state(self.model):
            return self.model.state_dict()

    def optimizer_state(self, optimizer):
        return {}


def whole_state(model):
    return FullyShardedDataParallel.state_dict_type(
        model, StateDictType.FULL_STATE_DICT, FullStateDictConfig(offload_to_cpu=False, rank0_only=False)
    )


def spread(strategy, processes):
    """Options of a Trainer, with a strategy object of its own."""
    return {"strategy": FSDP1OnCPU() if strategy == "fsdp1" else strategy, "devices": processes}


def files(folder):
    """Data of 7, 5 and 14 rows, which fill no step of 4 evenly."""
    return [runs.pairs_file(folder, count, f"{count}.jsonl", start=20 * count) for count in (7, 5, 14)]


def train(folder, files, strategy="auto", processes=1):
    """Plain training on 7 pairs, then predictions, then two partitions of 7 pairs; all written to the folder."""
    folder.mkdir(exist_ok=True)
    seven, five, fourteen = files
    options = spread(strategy, processes)
    sizes = {"batch_size": 4 // processes, "eval_batch_size": 2, "validation": five}
    module, data = runs.module(lr=0.1), runs.data(seven, **sizes)
    run = runs.fit(module, data, folder, max_epochs=3, gradient_clip_val=1.0, callbacks=[ExportModel()], **options)
    values = {name: float(value) for name, value in run.callback_metrics.items()}
    run.save_checkpoint(folder / "plain.ckpt")
    writer = PairPredictionWriter(str(folder / "predictions.jsonl"))
    runs.trainer(callbacks=[writer], **spread(strategy, processes)).predict(module, data, return_predictions=False)

    def make_trainer(root):
        best = BestCheckpoint("val/loss", mode="min")
        more = spread(strategy, processes)
        return runs.trainer(root, callbacks=[best], max_epochs=2, enable_checkpointing=True, **more)

    module, data = (
        runs.module(lr=0.1),
        runs.data(fourteen, partition=Noting(2, folder / f"margins_{run.global_rank}.json"), **sizes),
    )
    fit_stepwise(module, data, make_trainer, folder / "steps")
    if run.is_global_zero:
        (folder / "metrics.json").write_text(json.dumps(values))


SPEED = "train/tokens_per_second"
VARIANTS = {
    "tied": lambda folder: {"model": {**runs.LLAMA, "tie_word_embeddings": True}},
    "lora": lambda folder: {"adapter": LoRA(rank=2, alpha=8)},
    "lora beside a frozen copy": lambda folder: {"adapter": LoRA(rank=2, alpha=8), "reference": FrozenReference()},
    "another reference": lambda folder: {"reference": FrozenReference({**runs.LLAMA, "intermediate_size": 64})},
    "cached": lambda folder: {"reference": CachedReference(str(folder / "cache"))},
    "cached, of another": lambda folder: {
        "reference": CachedReference(str(folder / "of"), of=FrozenReference({**runs.LLAMA, "intermediate_size": 64})),
    },
    "tokens": lambda folder: {"loss": ADPOLoss(), "max_tokens": 60},
    "cached tokens": lambda folder: {
        "loss": IntermediateLoss(LDDPOLoss(), layers=(1,)),
        "reference": CachedReference(str(folder / "tokens")),
    },
    "mixed": lambda folder: {
        "reference": MixedReference([FrozenReference(), FrozenReference({**runs.LLAMA, "intermediate_size": 64})]),
    },
    "synced": lambda folder: {
        "model": {**runs.LLAMA, "tie_word_embeddings": True},
        "reference": SyncedReference(every=1, mix=0.6),
    },
    "synced beside adapters": lambda folder: {
        "adapter": LoRA(rank=2, alpha=8),
        "reference": SyncedReference(every=1, mix=0.6),
    },
    "neox": lambda folder: {"model": runs.NEOX, "gradient_checkpointing": True},
    "in parts": lambda folder: {"model": runs.NEOX, "max_tokens": 60},
}


QUICK = ("lora", "cached, of another", "tokens", "synced beside adapters")


def variants(folder, files, strategy="auto", processes=1, names=QUICK):
    """Metrics after two steps of other models, adapters and references."""
    folder.mkdir(exist_ok=True)
    known = folder / "variants.json"
    found = json.loads(known.read_text()) if known.exists() else {}
    for name, options in ((name, VARIANTS[name]) for name in names):
        chosen = options(folder)
        if strategy not in ("auto", "ddp"):
            chosen.pop("max_tokens", None)  # refused there: see test_parts.py
        if strategy == "fsdp1" and name.startswith("synced"):
            found[name] = {"refused": refusal(chosen, files[0])}
            continue

        def fit(steps, checkpoint=None, name=name, chosen=chosen):
            # (With momentum: Lightning restores no sharded optimizer without a state.)
            options = {"optimizer": partial(torch.optim.SGD, momentum=0.5)} if name.startswith("synced") else {}
            module = runs.module(lr=0.1, **copy.deepcopy(chosen), **options)
            data = runs.data(files[0], batch_size=4 // processes, eval_batch_size=2, validation=files[1])
            run = runs.trainer(folder, max_steps=steps, gradient_clip_val=1.0, **spread(strategy, processes))
            run.fit(module, data, ckpt_path=checkpoint, weights_only=True)
            return run, {key: float(v) for key, v in run.callback_metrics.items() if key != SPEED}

        run, found[name] = fit(2)
        if name == "synced":  # the reference is in the checkpoint, whoever holds which share of it
            whole, kinds = fit(4)[1], (False, True) if strategy == "fsdp2" else (None,)
            for shards in kinds:
                if shards is not None:
                    run.strategy._save_distributed_checkpoint = shards
                run.save_checkpoint(folder / f"synced_{shards}.ckpt")
                assert (folder / f"synced_{shards}.ckpt").is_dir() == bool(shards)
                assert fit(4, folder / f"synced_{shards}.ckpt")[1] == whole
    if run.is_global_zero:
        (folder / "variants.json").write_text(json.dumps(found))


def refusal(options, file):
    """What a run with these options under FSDP1 is refused with."""
    try:
        runs.fit(runs.module(**options), runs.data(file), max_steps=1, **spread("fsdp1", 2))
    except ValueError as error:
        return str(error)


def refuse_to_load(*args, **kwargs):
    raise AssertionError("only the first process reads weights")


if __name__ == "__main__":
    torch.set_num_threads(1)
    code = 0
    try:
        for strategy in sys.argv[2].split(","):
            folder, processes = Path(sys.argv[1], strategy), int(os.environ["WORLD_SIZE"])
            names = sys.argv[3].split("|")
            load = refuse_to_load if strategy == "fsdp2" and os.environ["RANK"] != "0" else load_model
            lit_dpo.assembly.load_model = lit_dpo.references.frozen.load_model = load
            if names == list(QUICK):
                train(folder, sys.argv[4:], strategy, processes)
            variants(folder, sys.argv[4:], strategy, processes, names)
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a plain exit aborts now and then, when all is done
