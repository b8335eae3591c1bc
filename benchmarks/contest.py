"""Preparing a contest, running it in interleaved rounds, and proving that all contestants did the same work."""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from common import Record, append_lines, append_section, facts, report_path, run_child
from flops import SHAPES, ModelShape, resized
from workers import CHECKED_STEPS, RUNS, Order, Settings, Split, train

from lit_dpo.data.encode import PairEncoder
from lit_dpo.data.read import read_rows, source_name
from lit_dpo.data.rows import RowError, parse_row
from lit_dpo.models import load_model
from lit_dpo.tokenizers import train_tokenizer

LOSS_TOLERANCE = 1e-4


class UnequalError(Exception):
    """Two contestants did not do the same work, so that no time of theirs means anything."""


# -- command line -----------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that every contest has."""
    add = parser.add_argument
    add("--data", help="jsonl or jsonl.gz with the text columns prompt, chosen, rejected")
    add("--shape", choices=["M", "S", "tiny"], default="M", help="of the model; the sizes below go before it")
    for size in ("hidden", "intermediate", "layers", "heads", "kv-heads", "vocab"):
        add(f"--{size}", type=int)
    add("--dtype", choices=["float32", "bfloat16", "float64"], default="float32", help="of the weights")
    add("--batch", type=int, default=8, help="pairs a step")
    add("--pairs", type=int, default=24, help="timed pairs, a multiple of the batch")
    add("--warmup-steps", type=int, default=1, help="steps that are not timed, at least 1")
    add("--max-length", type=int, default=512, help="tokens of prompt and completion; completions are cut at the end")
    add("--lr", type=float, default=1e-4, help="of AdamW, constant; high enough that the first losses tell runs apart")
    add("--threads", type=int, default=1, help="of each process")
    add("--rounds", type=int, default=3)
    add("--device", default="cpu")
    add("--seed", type=int, default=0, help="of weights and of the choice and order of pairs")
    add(
        "--sort-within",
        choices=["sample", "file", "longest"],
        default="sample",
        help="see README.md, How it is measured",
    )
    add("--timeout", type=float, default=3600, help="seconds that one child process may take")
    add("--out", default="benchmarks/results", help="folder of the results")
    add("--worker", help=argparse.SUPPRESS)
    add("--work", help=argparse.SUPPRESS)
    add("--steps", type=int, help=argparse.SUPPRESS)
    add("--result", help=argparse.SUPPRESS)


def shape_of(options: argparse.Namespace) -> ModelShape:
    """The model's sizes from the command line."""
    names = ("hidden", "intermediate", "layers", "heads", "kv_heads", "vocab")
    return resized(SHAPES[options.shape], {name: getattr(options, name) for name in names})


def title_of(options: argparse.Namespace) -> str:
    """One line for a report: shape, data, sizes."""
    shape = shape_of(options)
    params = shape.body_params + shape.head_params * (1 if shape.tied else 2)
    sizes = f"hidden {shape.hidden}, {shape.layers} layers, vocabulary {shape.vocab}, {params / 1e6:.0f} M parameters"
    return (
        f"{source_name(options.data)}, {options.shape} ({sizes}), {options.dtype}, {options.batch} pairs a step, "
        f"max length {options.max_length}, {options.pairs} pairs timed, {options.rounds} rounds"
    )


def work(options: argparse.Namespace) -> None:
    """The worker mode: one contestant, once, its record written to a file."""
    values = json.loads((Path(options.work) / "settings.json").read_text())
    settings = Settings(**values | {"betas": tuple(values["betas"])})
    Path(options.result).write_text(json.dumps(train(options.worker, settings, options.steps)))


def report(
    script: str,
    purpose: str | None,
    names: Sequence[str],
    stem: str,
    title: str,
    table: Callable[[ModelShape, dict[str, list[Record]]], str],
    notes: Sequence[str] = (),
) -> None:
    """The whole command of a contest whose every contestant must succeed and whose result is one table.

    Args:
        script: Its file, which also serves as worker.
        purpose: Its docstring.
        names: The contestants.
        stem: Of the result files.
        title: Of the section.
        table: Makes the table from the model's shape and each contestant's records.
        notes: Sentences below the table.
    """
    parser = argparse.ArgumentParser(description=purpose, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    options = parser.parse_args()
    if options.worker:
        work(options)
        return
    if not options.data:
        parser.error("`--data` is needed.")
    try:
        with prepared(options) as settings:
            runs = by_run(contest(script, names, settings, options, stem))
    except UnequalError as error:
        raise SystemExit(f"No time is reported. {error}") from error
    if missing := [name for name in names if name not in runs]:
        raise SystemExit(f"{' and '.join(missing)} failed; see {stem}.jsonl.")
    shown = table(shape_of(options), runs)
    print(f"\n{shown}")
    about = facts(options.device, options.threads, options.seed, options.data)
    path = report_path(Path(options.out), stem, options.device)
    append_section(path, f"{title}: {title_of(options)}", [shown], about, notes)


# -- preparation ------------------------------------------------------------------------------------------------------


@contextmanager
def prepared(options: argparse.Namespace) -> Iterator[Settings]:
    """A temporary folder with tokenizer, weights and rows for all contestants."""
    if options.warmup_steps < 1 or options.pairs < options.batch or options.pairs % options.batch:
        raise SystemExit("`--warmup-steps` must be at least 1, and `--pairs` a multiple of `--batch`.")
    steps = options.warmup_steps + options.pairs // options.batch
    if steps < CHECKED_STEPS:
        raise SystemExit(f"Warm-up and timed steps must be {CHECKED_STEPS} at least: their losses are compared.")
    shape = shape_of(options)
    with tempfile.TemporaryDirectory(prefix="throughput_") as folder:
        settings = Settings(
            folder=folder,
            dtype=options.dtype,
            device=options.device,
            batch=options.batch,
            warmup=options.warmup_steps,
            steps=steps,
            max_length=options.max_length,
            threads=options.threads,
            lr=options.lr,
        )
        (Path(folder) / "settings.json").write_text(json.dumps(asdict(settings)))
        rows = [row for _, row in read_rows(options.data)]
        if not all(isinstance(row.get(name), str) for row in rows for name in ("prompt", "chosen", "rejected")):
            raise SystemExit("`--data` needs the text columns prompt, chosen, rejected in every row.")
        texts = (text for row in rows for text in (row["prompt"] + row["chosen"], row["rejected"]))
        tokenizer = train_tokenizer(texts, shape.vocab)
        # The head has the size asked for, whether the texts yield that many tokens or not.
        description = shape.description(max(2048, options.max_length))
        load_model(description, tokenizer, "float32", options.seed).save_pretrained(settings.model)
        tokenizer.save_pretrained(settings.model)
        usable = _usable(rows, PairEncoder(tokenizer, options.max_length))
        ordered = choose_rows(usable, settings, options.sort_within, options.seed)
        for order, chosen in ordered.items():
            lines = [json.dumps({name: rows[i][name] for name in ("prompt", "chosen", "rejected")}) for i in chosen]
            settings.rows(order).write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"{len(usable)} of {len(rows)} rows usable; tokenizer of {len(tokenizer)}, head of {shape.vocab} rows")
        yield settings


def _usable(rows: Sequence[Record], encoder: PairEncoder) -> dict[int, int]:
    """Tokens of the longer sequence of every row that both sides train on."""
    lengths = {}
    for number, row in enumerate(rows):
        try:
            pair = encoder(parse_row(row, "data", str(number)))
        except RowError:
            continue
        if not pair.control_text:  # ours keeps such text ordinary, TRL turns it into control tokens
            lengths[number] = len(pair.prompt) + max(len(pair.chosen), len(pair.rejected))
    return lengths


def choose_rows(lengths: dict[int, int], settings: Settings, within: str, seed: int) -> dict[Split, list[int]]:
    """The rows of warm-up and timed steps in both orders; the timed pairs are the same ones in either.

    With ``file``, the whole file is sorted by length and cut into batches, and evenly spaced ones are taken: padding
    is then as little as sorting a whole training set makes it. With ``sample``, pairs are drawn at random and only
    they are sorted, which leaves more padding in sorted batches, the more the fewer they are.
    """
    draw = random.Random(seed)
    size, warmup, timed = settings.batch, settings.warmup, settings.steps - settings.warmup
    needed = settings.steps * size
    if len(lengths) < needed:
        raise SystemExit(f"{needed} pairs are needed and the data have {len(lengths)}: lower `--pairs`.")

    def by_length(rows: Sequence[int]) -> list[int]:
        return sorted(rows, key=lambda row: (-lengths[row], row))  # longest first: memory has to grow only once

    if within == "file":
        everything = by_length(list(lengths))
        batches = [everything[i : i + size] for i in range(0, len(everything) - size + 1, size)]
        places = [int((k + 0.5) * len(batches) / timed) for k in range(timed)]
        spare = draw.sample([i for i in range(len(batches)) if i not in places], warmup)
        first, rest = ([row for i in chosen for row in batches[i]] for chosen in (spare, places))
    elif within == "longest":
        drawn = by_length(list(lengths))[:needed]
        first, rest = drawn[timed * size :], drawn[: timed * size]
    else:
        drawn = draw.sample(list(lengths), needed)
        first, rest = drawn[: warmup * size], drawn[warmup * size :]
    shuffled = [draw.sample(part, len(part)) for part in (first, rest)]
    return {
        "shuffled": [row for part in shuffled for row in part],
        "sorted": by_length(first) + by_length(rest),
        "validation": [min(rest, key=lambda row: (lengths[row], row))],
    }


# -- rounds -----------------------------------------------------------------------------------------------------------


def contest(
    script: str, names: Sequence[str], settings: Settings, options: argparse.Namespace, stem: str = "throughput"
) -> list[Record]:
    """All rounds: the proof of equal work first, then one process a contestant and round, interleaved.

    Raises:
        UnequalError: Token ids or first losses differ between contestants.
    """
    names = list(_available(names))
    if odd := [name for name in names if settings.batch % RUNS[name].micro_batches]:
        raise SystemExit(f"`--batch {settings.batch}` cannot be cut into the micro-batches of {', '.join(odd)}.")
    about = facts(options.device, options.threads, options.seed, options.data)
    about |= {"data": source_name(options.data), "shape": asdict(shape_of(options))}
    about["settings"] = {name: value for name, value in asdict(settings).items() if name != "folder"}
    about |= {"sort_within": options.sort_within}

    def child(name: str, key: str, steps: int | None = None) -> Record:
        arguments = ["--worker", name, "--work", settings.folder, *(["--steps", str(steps)] if steps else [])]
        result = Path(settings.folder) / f"result_{name}_{key}.json"
        return {"run": name} | run_child(script, arguments, result, settings.threads, options.timeout)

    # The yardstick of an order in which no lit_dpo contestant runs: three steps of it, untimed.
    ours = {RUNS[name].order for name in names if RUNS[name].side == "lit_dpo" and not RUNS[name].layers}
    yardsticks: dict[Order, str] = {"shuffled": "lit_dpo_live", "sorted": "lit_dpo_sorted"}
    needed = {RUNS[name].order for name in names} - ours
    checks = [child(yardsticks[order], "check", CHECKED_STEPS) for order in sorted(needed)]
    if failed := [record for record in checks if "error" in record]:
        raise UnequalError(f"Nothing to compare with, {failed[0]['run']} failed: {failed[0]['error']}")
    records: list[Record] = []
    for number in range(options.rounds):
        current = []
        for name in names:
            record = child(name, str(number)) | {"round": number}
            spent = f"{record['train_cpu_s']:.1f} CPU s" if "error" not in record else record["error"]
            print(f"round {number + 1}, {name}: {spent}", flush=True)
            current.append(record)
        verify([*checks, *current])
        append_lines(Path(options.out) / f"{stem}.jsonl", [about | record for record in current])
        records += current
    return records


def _available(names: Sequence[str]) -> Iterator[str]:
    trl = importlib.util.find_spec("trl") is not None
    for name in names:
        if RUNS[name].side != "trl" or trl:
            yield name
        else:
            print(f"{name}: left out, TRL is not installed")


def by_run(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Successful records of each run, in the order of the runs."""
    runs: dict[str, list[Record]] = {}
    for record in records:
        if "error" not in record:
            runs.setdefault(record["run"], []).append(record)
    return runs


def verify(records: Sequence[Record]) -> None:
    """Raise `UnequalError` unless all contestants trained on the same tokens, and equal orders gave equal first losses.

    The first loss is log 2 whatever the model does, so the later ones must have moved from there to count as a proof.
    A contestant with another loss (``intermediate_*``) is held to the tokens alone, a failed one to nothing.
    """
    done = [record for record in records if "error" not in record]
    for record in done:
        if record["pairs_digest"] != done[0]["pairs_digest"]:
            raise UnequalError(f"The token ids of {record['run']} are not those of {done[0]['run']}.")
    for order in ("shuffled", "sorted"):
        same = [record for record in done if record["order"] == order]
        for record in same:
            if record["batches_digest"] != same[0]["batches_digest"]:
                raise UnequalError(f"{record['run']} and {same[0]['run']} put other pairs into a batch.")
        plain = [record for record in same if not RUNS[record["run"]].layers]
        if plain and max(abs(loss - math.log(2)) for loss in plain[0]["losses"]) < 10 * LOSS_TOLERANCE:
            raise UnequalError("The first losses hardly move, so that equal ones prove nothing: raise `--lr`.")
        for record in plain:
            ours, theirs = plain[0]["losses"], record["losses"]
            close = [abs(a - b) <= LOSS_TOLERANCE for a, b in zip(ours, theirs, strict=False)]
            if len(ours) != len(theirs) or len(close) < CHECKED_STEPS or not all(close):  # a NaN is close to nothing
                raise UnequalError(f"First losses differ: {record['run']} {theirs}, {plain[0]['run']} {ours}.")
