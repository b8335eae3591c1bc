"""One long CPU run under injected faults beside the same run left alone: how far apart are they?

    python benchmarks/chaos.py --faults 60 --out benchmarks/results

The disturbed run is a process that is started again and again by the same command until it is done. At seeded random
moments it is killed (SIGKILL), asked to stop (SIGTERM), given a full disk, is fed a NaN, or is killed in the middle of
the reference's scoring pass; while it is down, its newest checkpoint, its reference cache or its data file is damaged,
or its folder renamed. A second such run has two processes, one of which is killed. Each batch writes one line to the
disk: rows, loss and learning rate to the last bit. In the end the logs, the policies and the exports are compared.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import shutil
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

from chaos_run import Run
from common import Record, append_lines, append_section, facts, markdown_table, report_path, save_figure

from lit_dpo.checkpoints.verify import verify

TWO = "kill of one of two"
KINDS = (
    *("kill", "terminate", "full disk", "damaged checkpoint", "damaged cache", "NaN row"),
    *("changed data", "renamed folder", "killed reference pass", TWO),
)
_MARKS = {"full disk": "disk_is_full", "NaN row": "nan"}


# -- faults -----------------------------------------------------------------------------------------------------------


def disturb(kind: str, run: Run, draw: random.Random) -> str:
    """Inject one fault into a run under way and see it end; return how it ended."""
    if kind in _MARKS:
        (run.folder / _MARKS[kind]).touch()
    else:
        time.sleep(draw.uniform(0, 0.05))
        rank = draw.randrange(run.options.processes)
        run.signal(signal.SIGTERM if kind == "terminate" else signal.SIGKILL, rank)
    began = time.monotonic()
    said = run.wait()
    for mark in _MARKS.values():
        (run.folder / mark).unlink(missing_ok=True)
    if kind == TWO:
        other = run.processes[1 - rank].exitcode
        ended = "the other ended with one sentence" if f"Process {rank} of this run is gone" in said else "NOT said why"
        return f"{ended}, status {other}" + (f", NOT soon: {said[-200:]!r}" if time.monotonic() - began > 60 else "")
    ended = f"status {run.status}" + (", NOT by itself" if "NOT ended" in said else "")
    if kind == "full disk":
        ended += ", path named" if ".ckpt` cannot be written" in said else ", path NOT named"
    if kind == "NaN row":
        ended += ", row named" if "reference's log-prob of chosen nan" in said else ", row NOT named"
    after = {
        "damaged checkpoint": damage_checkpoint,
        "damaged cache": damage_cache,
        "changed data": change_data,
        "renamed folder": rename,
        "killed reference pass": kill_reference_pass,
    }
    return ended + (after[kind](run, draw) if kind in after else "")


def flip(path: Path, draw: random.Random) -> None:
    """Flip a random bit of a file, or cut it."""
    content = bytearray(path.read_bytes())
    if draw.random() < 0.3:
        content = content[: draw.randrange(len(content))]
    else:
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.unlink()  # so that a file that stands under two names is damaged under one
    path.write_bytes(content)


def damage_checkpoint(run: Run, draw: random.Random) -> str:
    """Damage the newest; the same command must refuse it and name the good one (stepwise it takes that by itself)."""
    last = run.last()
    previous = last.with_name("previous.ckpt")
    if not last.exists() or not previous.exists():
        return ", too early for damage"
    flip(last, draw)
    verify(previous)
    if run.options.stepwise:
        return ", the previous one taken"
    run.start()
    said = run.wait()
    good = "last.ckpt` is damaged" in said and "previous.ckpt`" in said and run.status != 0
    for name in ("ckpt", "ckpt.json"):  # what the user was told to resume from
        shutil.copy(previous.with_name(f"previous.{name}"), last.with_name(f"last.{name}"))
    return ", refused and the previous one offered" if good else f", NOT refused: {said[-200:]!r}"


def damage_cache(run: Run, draw: random.Random) -> str:
    """Damage every file of the reference cache."""
    for file in sorted((run.folder / "cache").rglob("*.safetensors")):
        flip(file, draw)
    return ""


def change_data(run: Run, draw: random.Random) -> str:
    """Change rows; the same command must refuse them, and go on when they are as they were."""
    if not run.last().exists():
        return ", too early for a change"
    path, kept = run.folder / "pairs.jsonl", run.folder.with_name("kept")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    how = draw.choice(("swapped", "removed", "moved", "added"))
    shutil.copytree(run.folder, kept)
    if how == "swapped":
        rows = [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    elif how == "removed":
        rows = rows[::2]
    elif how == "moved":
        rows.reverse()
    else:
        rows += rows[::3]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    before = len(run.log())
    run.start()
    run.wait_for(1)
    for process in run.processes if run.alive else ():
        process.kill()  # it trains, which it must not
    said = run.wait()
    refused = "ValueError" in said and "--allow-changes" in said and run.status != 0 and len(run.log()) == before
    shutil.rmtree(run.folder)
    kept.rename(run.folder)
    return f", rows {how}: {'refused' if refused else f'NOT refused: {said[-200:]!r}'}"


def rename(run: Run, draw: random.Random) -> str:
    """Give its folder another name; what a checkpoint remembers of the old one is nothing to resume from."""
    run.folder = run.folder.rename(run.folder.with_name(f"renamed_{run.started}"))
    return ""


def kill_reference_pass(run: Run, draw: random.Random) -> str:
    """Take the reference cache away, and kill the process that scores anew in the middle of it."""
    shutil.rmtree(run.folder / "cache", ignore_errors=True)
    mark, still = run.folder / "slow_scoring", run.folder / "standing_still"
    mark.write_text(str(draw.randint(3, 12)))
    run.start()
    while run.alive and not still.exists():
        time.sleep(0.005)
    reached = still.exists()
    run.signal(signal.SIGKILL)
    run.wait()
    mark.unlink()
    still.unlink(missing_ok=True)
    return ", killed within the pass" if reached else ", NOT killed within the pass"


# -- both runs --------------------------------------------------------------------------------------------------------


def both(root: Path, kinds: list[str], draw: random.Random, options: argparse.Namespace) -> Record:
    """A run left alone and one with these faults, and how they differ."""
    name = "one" if options.processes == 1 else "two"
    clean, broken = Run(root / f"clean_{name}", options), Run(root / f"disturbed_{name}", options)
    clean.start()
    said = clean.wait(3600)
    assert clean.status == 0, said[-2000:]
    total = len(clean.log())
    apart = max(1, total // (len(kinds) + 1))
    faults: list[Record] = []
    for kind in kinds:
        broken.start()
        broken.wait_for(draw.randint(max(1, apart // 2), apart))
        if not broken.alive:  # done, or broken: seen below
            break
        at = len({tuple(line["at"]) for line in broken.log()})
        faults.append({"kind": kind, "batch": at, "ended": disturb(kind, broken, draw)})
        print(f"{len(faults)}/{len(kinds)} batch {at}: {kind}: {faults[-1]['ended']}", flush=True)
    if broken.alive or not (broken.folder / "finished").exists():
        broken.start()
    said = broken.wait(3600)
    assert broken.status == 0, said[-2000:]
    return compare(clean, broken) | {"faults": faults}


def compare(clean: Run, broken: Run) -> Record:
    """The largest difference of losses, rows lost or done twice in the history that counts, equal weights."""
    expected, found = clean.log(), broken.log()
    last = {tuple(line["at"]): line for line in found}  # a batch done again after a crash replaces the one lost
    nothing: Record = {"loss": "inf", "epoch": -1, "rows": []}
    pairs = [(line, last.get(tuple(line["at"]), nothing)) for line in expected]
    again: dict[Any, Record] = {}
    sound = [line for line in found if line["loss"] != "nan"]  # the poisoned batch logs its NaN before it is refused
    seen: dict[tuple[int, int, int], int] = {}
    for line in last.values():
        for row in line["rows"]:
            place = (line["at"][0], line["epoch"], row)
            seen[place] = seen.get(place, 0) + 1
    wanted = {(line["at"][0], line["epoch"], row) for line in expected for row in line["rows"]}
    return {
        "batches": len(expected),
        "lines": len(found),
        "max_loss_difference": max(abs(float.fromhex(a["loss"]) - float.fromhex(b["loss"])) for a, b in pairs),
        "lines_differing": sum(a != b for a, b in pairs),
        "replays_differing": sum(again.setdefault(tuple(line["at"]), line) != line for line in sound),
        "rows_lost": len(wanted - set(seen)),
        "rows_repeated": sum(count > 1 for count in seen.values()),
        "weights_equal": (clean.folder / "finished").read_text() == (broken.folder / "finished").read_text(),
        "clean": [float.fromhex(a["loss"]) for a, _ in pairs],
        "disturbed": [float.fromhex(b["loss"]) for _, b in pairs],
    }


def run_all(options: argparse.Namespace) -> Record:
    """Faults on a run of one process and on a run of two, put together."""
    draw = random.Random(options.seed)
    kinds = [KINDS[i % len(KINDS)] for i in range(options.faults)]
    draw.shuffle(kinds)
    with tempfile.TemporaryDirectory(prefix="chaos_") as root:
        options.processes = 1
        record = both(Path(root), [kind for kind in kinds if kind != TWO], draw, options)
        if TWO in kinds:
            two = argparse.Namespace(**vars(options) | {"processes": 2, "epochs": max(1, options.epochs // 4)})
            other = both(Path(root), [kind for kind in kinds if kind == TWO], draw, two)
            record["faults"] += other["faults"]
            record["weights_equal"] &= other["weights_equal"]
            record["max_loss_difference"] = max(record["max_loss_difference"], other["max_loss_difference"])
            for name in ("batches", "lines", "lines_differing", "replays_differing", "rows_lost", "rows_repeated"):
                record[name] += other[name]
    counts = [fault["kind"] for fault in record["faults"]]
    return record | {"kinds": {kind: counts.count(kind) for kind in KINDS}}


def plot(record: Record, path: Path) -> None:
    """The disturbed loss curve over the undisturbed one, with the faults."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(9, 4))
    axis.plot(record["clean"], color="black", linewidth=2.5, label="undisturbed")
    axis.plot(record["disturbed"], color="tab:orange", linewidth=1, label="disturbed")
    for number, kind in enumerate(KINDS):
        if kind == TWO:
            continue  # in another run
        places = [fault["batch"] for fault in record["faults"] if fault["kind"] == kind]
        axis.plot(places, [-0.05] * len(places), "^", color=f"C{number + 2}", label=f"{kind} ({len(places)})")
    title = f"{len(record['faults'])} faults, largest difference {record['max_loss_difference']:g}"
    axis.set(xlabel="batch", ylabel="loss", title=title)
    axis.legend(ncol=2, fontsize=8)
    save_figure(figure, path)


def main() -> None:
    """Run all, compare, write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=60)
    parser.add_argument("--epochs", type=int, default=24, help="of the quickstart data; more make a longer run")
    parser.add_argument("--lora", action="store_true", help="train adapters with dropout instead of all weights")
    parser.add_argument("--stepwise", action="store_true", help="train in two partitions, one after the other")
    parser.add_argument("--seed", type=int, default=0, help="of kinds and moments")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    quiet = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    os.environ.update(quiet)
    began = time.perf_counter()
    record = run_all(options)
    about = facts("cpu", 1, options.seed) | {"seconds": round(time.perf_counter() - began)}
    append_lines(options.out / "chaos.jsonl", [about | record])
    ends = {kind: {fault["ended"] for fault in record["faults"] if fault["kind"] == kind} for kind in KINDS}
    rows = [[kind, str(count), "; ".join(sorted(ends[kind]))] for kind, count in record["kinds"].items()]
    hidden = ("faults", "kinds", "clean", "disturbed")
    results = [[name.replace("_", " "), str(value)] for name, value in record.items() if name not in hidden]
    tables = [markdown_table(["fault", "times", "ended with"], rows), markdown_table(["result", ""], results)]
    print("", *tables, sep="\n\n")
    path = report_path(options.out, "chaos", "cpu")
    how = "".join(f", {name}" for name in ("lora", "stepwise") if getattr(options, name))
    append_section(path, f"{len(record['faults'])} faults{how}", tables, about)
    if importlib.util.find_spec("matplotlib"):
        plot(record, path.with_suffix(".png"))
    else:
        print("no curve is drawn: matplotlib is not installed")
    losses = ("max_loss_difference", "lines_differing", "replays_differing", "rows_lost", "rows_repeated")
    wrong = [name for name in losses if record[name]] + ([] if record["weights_equal"] else ["weights"])
    wrong += [fault["ended"] for fault in record["faults"] if "NOT" in fault["ended"]]
    if len(record["faults"]) < options.faults:
        wrong.append("the run ended before all faults were injected: raise `--epochs`")
    if wrong:
        raise SystemExit(f"Not as promised: {'; '.join(wrong)}")


if __name__ == "__main__":
    main()
