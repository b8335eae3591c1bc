"""One GPU, unattended, in minutes: exactness, tokens a second, model FLOPs utilisation and peak memory.

    PYTHONPATH=. python benchmarks/gpu.py --out results                              # one H200, below 9 minutes
    PYTHONPATH=. python benchmarks/gpu.py --device cpu --shape tiny --out results    # does it run at all?

Models have random weights made on the device, and pairs random tokens with the lengths of a data set. Full fine-tuning
holds float32 weights under bfloat16 autocast, LoRA a bfloat16 model under the same. Steps are those of a bare loop; for
the first shape the same steps run in a Lightning Trainer too. Each part is a process of its own with a share of the
time, and is written as soon as it is done. TRL runs beside it where it is installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import torch
from common import (
    Record,
    StepClock,
    append_lines,
    append_section,
    facts,
    markdown_table,
    now,
    report_path,
    run_child,
)
from exactness import exactness
from flops import FORWARD, SHAPES, TRAIN, TRAIN_CHECKPOINTED, TRAIN_LORA, Work, flops
from synthetic import LENGTHS, build, draw_lengths, random_batches

from lit_dpo import DPOLoss, LoRA, PairLogps, PreferenceModule, Reference, score
from lit_dpo.scoring.decoder import adapters_off

RANK = 16
PARTS = ("exactness", "llama-3.2-1b", "qwen2.5-1.5b", "llama-3.1-8b", "trl")


# -- speed ------------------------------------------------------------------------------------------------------------


def speed(options: argparse.Namespace) -> Record:
    """Training steps and the reference pass of one shape, on both length profiles."""
    name = options.shape or options.worker
    shape, lora = SHAPES[name], options.worker.endswith("8b")
    model = build(name, options.device, torch.bfloat16 if lora else torch.float32)
    model = LoRA(rank=RANK).attach(model) if lora else model
    results = []
    for profile in LENGTHS:
        lengths = draw_lengths(profile, options.pairs * 16, options.seed, options.divide)
        size = options.pairs * (4 if profile == "hh" else 1)  # about as many tokens
        batches = random_batches(lengths, size, shape.vocab, options.seed)
        record = _bare_loop(model, batches, options) | {"profile": profile, "batch": size}
        timed = [batches[i % len(batches)] for i in range(options.warmup, options.warmup + record["timed_steps"])]
        done = [Work.flat(batch.shape) for batch in timed]
        seconds, cost, rank = record["train_wall_s"], *((TRAIN_LORA, RANK) if lora else (TRAIN, 0))
        record["train_s_per_pair"] = train = seconds / sum(len(batch) for batch in timed)
        record["pairs_per_s"] = 1 / train
        record["pairs_per_s_pass_counted"] = 1 / (train + record["reference_s_per_pair"])
        record["tokens_per_s"] = sum(work.body_tokens for work in done) / seconds
        counted = sum(flops(shape, work, cost, rank) for work in done)
        record["mfu"] = counted / seconds / (options.peak_tflops * 1e12)
        # What TRL's defaults compute for the same pairs: padded rows, products twice forward, a reference beside them.
        padded = [Work.padded(lengths[i : i + 8]) for i in range(0, len(lengths), 8)]
        theirs = sum(flops(shape, work, TRAIN_CHECKPOINTED) + flops(shape, work, FORWARD) for work in padded)
        flat = Work.flat(lengths)
        record["counted_trl_default_over_ours"] = theirs / (flops(shape, flat) + flops(shape, flat, FORWARD))
        record["padding"] = sum(work.body_tokens for work in padded) / sum(2 * p + c + r for p, c, r in lengths)
        if options.worker == PARTS[1] and profile == "ultrafeedback":
            record["lightning_s_per_pair"] = _lightning(model, batches, options)
        results.append(record)
    return {"shape": name, "lora_rank": RANK if lora else None, "profiles": results}


def _autocast(options: argparse.Namespace) -> Any:
    cuda = options.device.startswith("cuda")
    return torch.autocast("cuda", dtype=torch.bfloat16) if cuda else nullcontext()


def _bare_loop(model: Any, batches: Sequence[Any], options: argparse.Namespace) -> Record:
    """Steps until the time or their number is up, and before them one reference pass over the batches."""
    clock, loss, began = StepClock(options.warmup, options.device), DPOLoss(), time.perf_counter()
    reference: list[Any] = []
    with torch.no_grad(), _autocast(options), adapters_off(model):
        score(model, batches[0].to(options.device))  # warm-up
        before = now(options.device)
        reference = [score(model, batch.to(options.device)) for batch in batches]
        spent = now(options.device)[0] - before[0]
    optimizer = _fused([p for p in model.parameters() if p.requires_grad])
    while clock.steps < options.steps and (time.perf_counter() - began < options.seconds or len(clock.marks) < 3):
        place = clock.steps % len(batches)
        with _autocast(options):
            value = loss(score(model, batches[place].to(options.device)), reference[place]).mean()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        clock.step()
    scored = sum(len(batch) for batch in batches)
    return clock.record() | {"reference_s_per_pair": spent / scored, "last_loss": float(value.detach())}


def _lightning(model: Any, batches: Sequence[Any], options: argparse.Namespace) -> float | str:
    """Seconds a pair of the same steps in a Trainer, all metrics on; or why it could not be measured."""

    class Zeros(Reference):
        """A reference that costs nothing, as a cached one."""

        def score(self, policy: Any, batch: Any, scorer: Any) -> PairLogps:
            zero = torch.zeros(len(batch), device=batch.input_ids.device)
            return PairLogps(zero, zero, batch.lengths[:, 1], batch.lengths[:, 2])

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            clock.step()
            trainer.should_stop = time.perf_counter() - began > options.seconds and len(clock.marks) >= 3

    clock, began = StepClock(options.warmup, options.device), time.perf_counter()
    try:
        module = PreferenceModule(
            {"model_type": "llama"}, reference=Zeros(), tokenizer="quickstart", optimizer=_fused, lr_scheduler=None
        )
        module.policy = model
        steps = options.steps
        order = [batches[i % len(batches)] for i in range(steps)]
        trainer = L.Trainer(
            max_steps=steps,
            accelerator="gpu" if options.device.startswith("cuda") else "cpu",
            devices=1,
            precision="bf16-mixed" if options.device.startswith("cuda") else "32-true",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[Watch()],
        )
        trainer.fit(module, torch.utils.data.DataLoader(order, batch_size=None))  # type: ignore[arg-type]
    except Exception as error:  # the rest of the part must not die of it
        return f"{type(error).__name__}: {error}"
    timed = clock.record()
    pairs = sum(len(batch) for batch in order[options.warmup : options.warmup + timed["timed_steps"]])
    return timed["train_wall_s"] / pairs


def _fused(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-6, fused=True)


# -- the whole --------------------------------------------------------------------------------------------------------


def work(options: argparse.Namespace) -> None:
    """The worker mode: one part, its record written to a file."""
    torch.manual_seed(options.seed)
    if options.worker == "exactness":
        record = exactness(options.device, options.seed)
    elif options.worker == "trl":
        from trl_worker import time_on_ids  # here, since the opponent is no dependency

        name = options.shape or PARTS[1]
        lengths = draw_lengths("ultrafeedback", options.pairs * 16, options.seed, options.divide)
        clock = StepClock(options.warmup, options.device)
        model = build(name, options.device, torch.float32)
        time_on_ids(model, lengths, options.pairs, options.steps, options.seconds, clock)
        timed = clock.record()
        pairs = timed["timed_steps"] * options.pairs
        record = timed | {"shape": name, "batch": options.pairs, "pairs_per_s": pairs / timed["train_wall_s"]}
    else:
        record = speed(options)
    options.result.write_text(json.dumps(record))


def run_parts(options: argparse.Namespace, about: Record) -> Iterator[Record]:
    """Every part in a process of its own, within what is left of the time."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="gpu_") as folder:
        for part in options.parts:
            left = options.budget - (time.perf_counter() - began)
            missing = [name for name in ("trl", "datasets") if importlib.util.find_spec(name) is None]
            if part == "trl" and missing:
                print(f"trl: left out, {' and '.join(missing)} not installed")
                continue
            if left < 20:
                print(f"{part}: left out, the time is up")
                continue
            same = ("device", "seed", "pairs", "steps", "warmup", "seconds", "divide", "peak_tflops")
            arguments = [text for key in same for text in (f"--{key.replace('_', '-')}", str(getattr(options, key)))]
            arguments += ["--worker", part, *(["--shape", options.shape] if options.shape else [])]
            result = Path(folder) / f"{part}.json"
            record = {"part": part} | run_child(__file__, arguments, result, options.threads, min(options.cap, left))
            append_lines(options.out / "gpu.jsonl", [about | record])
            print(f"{part}: {record.get('error', 'done')}, {time.perf_counter() - began:.0f} s", flush=True)
            yield record


def tables(records: Sequence[Record]) -> list[str]:
    """Speed, exactness, and TRL's line, as far as they were measured."""
    header = ["model", "lengths", "pairs a step", "pairs/s, pass counted", "pairs/s, training only", "tokens/s", "MFU"]
    header += ["peak GB", "Lightning over bare loop", "counted work, TRL's defaults over ours"]
    lines = []
    for record in (record for record in records if "profiles" in record):
        kind = f"LoRA rank {record['lora_rank']}" if record["lora_rank"] else "full"
        for one in record["profiles"]:
            trainer = one.get("lightning_s_per_pair")
            ratio = f"{trainer / one['train_s_per_pair']:.3f}x" if isinstance(trainer, float) else str(trainer or "")
            counted = "" if record["lora_rank"] else f"{one['counted_trl_default_over_ours']:.1f}x"
            line = [f"{record['shape']}, {kind}", one["profile"], str(one["batch"])]
            line += [f"{one[key]:.1f}" for key in ("pairs_per_s_pass_counted", "pairs_per_s")]
            line += [f"{one['tokens_per_s']:.0f}", f"{one['mfu']:.1%}", f"{one['peak_bytes'] / 1e9:.1f}"]
            lines.append([*line, ratio, counted])
    shown = [markdown_table(header, lines)] if lines else []
    for record in (record for record in records if "rows" in record):
        cells = [
            [row["dtype"], row["way"], f"{row['logp_gap']:.1e}", f"{row['gradient_error']:.1e}", str(row["ok"])]
            for row in record["rows"]
        ]
        shown.append(markdown_table(["dtype", "way", "nats a token", "gradient, relative", "within limits"], cells))
    for record in (record for record in records if record["part"] == "trl" and "error" not in record):
        speed_, peak = f"{record['pairs_per_s']:.1f}", f"{record['peak_bytes'] / 1e9:.1f}"
        cells = [[record["shape"], "ultrafeedback", str(record["batch"]), speed_, peak]]
        shown.append(markdown_table(["TRL's defaults", "lengths", "pairs a step", "pairs/s", "peak GB"], cells))
    return shown


def main() -> None:
    """Run all parts, or as a worker one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", default="cuda")
    add("--shape", choices=list(SHAPES), help="instead of each part's own")
    add("--parts", nargs="*", default=list(PARTS), choices=PARTS)
    add("--pairs", type=int, default=8, help="pairs a step; four times as many of the short lengths")
    add("--steps", type=int, default=40, help="at most, of one measurement")
    add("--warmup", type=int, default=3)
    add("--seconds", type=float, default=25, help="of one measurement")
    add("--cap", type=float, default=130, help="seconds for one part")
    add("--budget", type=float, default=520, help="seconds for everything")
    add("--peak-tflops", type=float, default=989, help="dense bfloat16, nominal; 989 is an H100's and H200's")
    add("--divide", type=int, default=1, help="lengths by this, for a quick look")
    add("--threads", type=int, default=4)
    add("--seed", type=int, default=0)
    add("--out", type=Path, default=Path("benchmarks/results"))
    add("--worker", help=argparse.SUPPRESS)
    add("--result", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options)
        return
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("No CUDA device is here; `--device cpu --shape tiny` shows whether the script runs.")
    about = facts(options.device, options.threads, options.seed)
    records = list(run_parts(options, about))
    shown = tables(records)
    print("", *shown, sep="\n\n")
    failed = [f"{record['part']} failed: {record['error']}" for record in records if "error" in record]
    notes = [*failed, f"MFU: counted operations (benchmarks/README.md) over {options.peak_tflops:g} TFLOP/s."]
    title = f"{options.shape or 'All shapes'} on {about['hardware']}"
    append_section(report_path(options.out, "gpu", options.device), title, shown, about, notes)
    if any(record.get("ok") is False for record in records):
        raise SystemExit("The forms differ by more than the limits: no speed above means anything.")


if __name__ == "__main__":
    main()
