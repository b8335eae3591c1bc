"""One training run for any number of processes; as a script, one process of several (see test_distributed.py)."""

import json
import os
import sys
import traceback
from pathlib import Path

import torch

from lit_dpo import EasyToHard
from lit_dpo.callbacks import BestCheckpoint, ExportModel, PairPredictionWriter
from lit_dpo.stepwise import fit_stepwise
from tests import runs


class Noting(EasyToHard):
    """`EasyToHard` that writes down the margins it is given."""

    def __init__(self, parts, path):
        super().__init__(parts)
        self.path = path

    def split(self, sources, margins=None):
        self.path.write_text(json.dumps(margins.tolist()))
        return super().split(sources, margins)


def files(folder):
    """Data of 7, 5 and 14 rows, which fill no step of 4 evenly."""
    return [runs.pairs_file(folder, count, f"{count}.jsonl", start=20 * count) for count in (7, 5, 14)]


def train(folder, files, strategy="auto", processes=1):
    """Plain training on 7 pairs, then predictions, then two partitions of 7 pairs; all written to the folder."""
    folder.mkdir(exist_ok=True)
    seven, five, fourteen = files
    options = {"strategy": strategy, "devices": processes}
    sizes = {"batch_size": 4 // processes, "eval_batch_size": 2, "validation": five}
    module, data = runs.module(lr=0.1), runs.data(seven, **sizes)
    run = runs.fit(module, data, folder, max_epochs=3, gradient_clip_val=1.0, callbacks=[ExportModel()], **options)
    values = {name: float(value) for name, value in run.callback_metrics.items()}
    run.save_checkpoint(folder / "plain.ckpt")
    writer = PairPredictionWriter(str(folder / "predictions.jsonl"))
    runs.trainer(callbacks=[writer], **options).predict(module, data, return_predictions=False)

    def make_trainer(root):
        best = BestCheckpoint("val/loss", mode="min")
        return runs.trainer(root, callbacks=[best], max_epochs=2, enable_checkpointing=True, **options)

    module, data = (
        runs.module(lr=0.1),
        runs.data(fourteen, partition=Noting(2, folder / f"margins_{run.global_rank}.json"), **sizes),
    )
    fit_stepwise(module, data, make_trainer, folder / "steps")
    if run.is_global_zero:
        (folder / "metrics.json").write_text(json.dumps(values))


if __name__ == "__main__":
    torch.set_num_threads(1)
    code = 0
    try:
        for strategy in sys.argv[2].split(","):
            train(Path(sys.argv[1], strategy), sys.argv[3:], strategy, processes=int(os.environ["WORLD_SIZE"]))
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a plain exit aborts now and then, when all is done
