"""Experiments that show what the methods do, one command for all of them.

    python benchmarks/claims/run.py --all --work WORK --data DATA
    python benchmarks/claims/run.py a_targets --work WORK

Every run of an arm and a seed writes its result under the folder of `--work`. If the command is stopped, or killed, the
same command goes on: what is done is read, and a training that was under way goes on from its last checkpoint. The
results, the figures and the table of README.md are written to the folder of `--out`.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import re
import sys
import threading
import time
import traceback
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import replace
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))

import a_stepwise
import a_targets
import b_displacement
import b_stopping
import c_layers
import c_stepwise
import d_audit
import d_expo
import d_filtered
import d_length
import d_minor
import d_pilot
import d_rounds
import figure
import losses
import sources
from bases import REAL, Place, base
from claim import Experiment, Results, measure
from commands import write
from common import facts

MODULES = (a_targets, a_stepwise, b_displacement, b_stopping, c_stepwise, c_layers)
MODULES += (d_rounds, d_filtered, d_expo, d_minor, d_length, d_pilot, d_audit, losses)
MARKS = ("<!-- table -->", "<!-- end of table -->")


def experiments(scale: str) -> dict[str, Experiment]:
    """All of them, by name."""
    found = [experiment for module in MODULES for experiment in module.experiments(scale)]
    return {experiment.name: experiment for experiment in found}


def module_of(name: str) -> str:
    """The module that has an experiment."""
    return next(m.__name__ for m in MODULES if any(each.name == name for each in m.experiments("cpu")))


# -- processes --------------------------------------------------------------------------------------------------------


def _begin() -> None:
    """A worker ends with the command that started it, even if that was killed."""
    parent = parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    import torch

    torch.set_num_threads(1)


def _base(name: str, seed: int, place: Place) -> str:
    return f"perplexity {base(place, name, seed).perplexity:.2f}"


def _measure(name: str, arm: str, seed: int, place: Place) -> str:
    measure(experiments(place.scale)[name], arm, seed, place)
    return "done"


def _all(pool: ProcessPoolExecutor, tasks: dict[str, tuple[Any, ...]]) -> list[str]:
    """Do tasks, the first ones first, with a line for each that ends; the names of those that failed."""
    began = time.monotonic()
    running: dict[Future[str], str] = {pool.submit(*task): name for name, task in tasks.items()}
    failed = []
    for number, future in enumerate(as_completed(running), 1):
        try:
            said = future.result()
        except Exception:
            failed.append(running[future])
            said = f"failed\n{traceback.format_exc()}"
        print(f"[{number}/{len(tasks)}, {time.monotonic() - began:.0f} s] {running[future]}: {said}", flush=True)
    return failed


def run(chosen: list[Experiment], place: Place, processes: int) -> list[str]:
    """Train and measure all that is not there yet; the names of what failed."""
    wanted = {(name, seed) for each in chosen for name in each.bases for seed in range(each.seeds)}
    first = {f"base {name}, seed {seed}": (_base, name, seed, place) for name, seed in sorted(wanted)}
    tasks = {f"{task[0]}, {task[1]}, seed {task[2]}": (_measure, *task, place) for e in chosen for task in e.tasks()}
    with ProcessPoolExecutor(processes, get_context("spawn"), initializer=_begin) as pool:
        return _all(pool, first) or _all(pool, tasks)


# -- what is written --------------------------------------------------------------------------------------------------


def collect(experiment: Experiment, place: Place, out: Path, command: str) -> None:
    """Put the results of an experiment into one file, with what made them."""
    seeds = range(experiment.seeds)
    records = {arm: {seed: measure(experiment, arm, seed, place) for seed in seeds} for arm in experiment.arms}
    bases = {name: [base(place, name, seed).perplexity for seed in seeds] for name in experiment.bases}
    about = facts("cuda" if place.scale == "gpu" else "cpu", 1, None)
    about |= {"command": command, "seed": f"0 to {experiment.seeds - 1}", "scale": place.scale}
    about["code"] = sources.code(module_of(experiment.name))
    whole = {"about": about, "perplexity": bases, "arms": experiment.arms, "records": records}
    write(out / "results" / f"{experiment.name}.json", json.dumps(whole, indent=1) + "\n")


def show(known: dict[str, Experiment], out: Path, draw: bool = True) -> None:
    """Judge and draw what has been measured, and write the table."""
    rows, notes = [], []
    for name, experiment in known.items():
        path = out / "results" / f"{name}.json"
        if not path.exists():
            rows += [[c.name, _paper(c.paper), c.sentence, "", "", f"`{name}`", "not run"] for c in experiment.claims]
            continue
        whole = json.loads(path.read_text(encoding="utf-8"))
        results = Results({a: {int(s): one for s, one in of.items()} for a, of in whole["records"].items()})
        for title, make in experiment.figures.items() if draw else ():
            drawn = figure.new()
            make(results, drawn)
            figure.save(drawn, out / "figures" / f"{title}.png")
        for claim in experiment.claims:
            verdict, measured = claim.judge(results)
            shown = [f"[{claim.figure}](figures/{claim.figure}.png)", f"`{name}`", f"**{verdict}**"]
            rows.append([claim.name, _paper(claim.paper), claim.sentence, measured, *shown])
        notes.append(_note(name, experiment, whole))
    header = ["claim", "paper", "what is claimed", "measured", "figure", "`run.py`", "verdict"]
    table = "\n".join(f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *rows))
    _write_table(out / "README.md", "\n\n".join([MARKS[0], table, *notes, MARKS[1]]))
    for row in rows:
        print(f"{row[0]}: {row[6].strip('*')}. {row[3]}")


def _paper(paper: str) -> str:
    """A link, if it is a number of arXiv."""
    return f"[{paper}](https://arxiv.org/abs/{paper})" if re.fullmatch(r"\d{4}\.\d{5}", paper) else paper


def _note(name: str, experiment: Experiment, whole: dict[str, Any]) -> str:
    about = whole["about"]
    versions = ", ".join(f"{package} {number}" for package, number in about["versions"].items() if number)
    fits = "; ".join(
        f"{base} {', '.join(f'{value:.2f}' for value in values)}" for base, values in whole["perplexity"].items()
    )
    fits = f" Held-out perplexity of the supervised models: {fits}." if fits else ""
    said = f"**{name}**: {experiment.note}{fits} Seeds {about['seed']}, "
    said += f"scale `{about['scale']}`; {about['hardware']}, one thread a run, Python {about['python']}, {versions}."
    return f"{said}\n\n```text\n{about['command']}\n```"


def _write_table(path: Path, table: str) -> None:
    """Put it between the marks of a file, the rest of which is written by hand."""
    text = path.read_text(encoding="utf-8") if path.exists() else f"# Claims\n\n{MARKS[0]}\n{MARKS[1]}\n"
    before, _, rest = text.partition(MARKS[0])
    write(path, before + table + rest.partition(MARKS[1])[2])


# -- the command ------------------------------------------------------------------------------------------------------


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"experiments: {', '.join(experiments('cpu'))}")
    parser.add_argument("--all", action="store_true", help="all experiments")
    parser.add_argument("--arms", nargs="+", help="only these arms of one experiment, if its claims allow")
    parser.add_argument("--work", type=Path, help="folder of all trainings; the same one goes on")
    parser.add_argument("--data", type=Path, help="folder of the real sets; without it what needs them is left out")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--scale", choices=["cpu", "gpu", "smoke"], default="cpu")
    parser.add_argument("--smoke", action="store_true", help="tiny models and few steps, to see that everything runs")
    parser.add_argument("--draw", action="store_true", help="judge and draw again what is in the folder of --out")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    given = parser.parse_args(args)
    scale = "smoke" if given.smoke else given.scale
    known = experiments(scale)
    if unknown := [name for name in given.names if name not in known]:
        parser.error(f"there is no experiment {', '.join(unknown)}: choose from {', '.join(known)}")
    if given.draw:
        show(known, given.out)
        return
    if given.all == bool(given.names):
        parser.error("name experiments, or give --all: one of the two")
    if given.work is None:
        parser.error("--work FOLDER is needed: all trainings go there")
    if scale == "smoke" and given.out == parser.get_default("out"):
        parser.error("--smoke measures nothing worth keeping: give another folder with --out")
    chosen = [experiment for experiment in known.values() if given.all or experiment.name in given.names]
    if given.arms:
        if len(chosen) != 1 or not set(given.arms) <= set(chosen[0].arms):
            said = f"it has {'; '.join(chosen[0].arms)}" if len(chosen) == 1 else "name one experiment"
            parser.error(f"--arms takes arms of one experiment: {said}")
        chosen = [replace(chosen[0], arms={arm: chosen[0].arms[arm] for arm in given.arms})]
    if given.data is None:
        left = [each.name for each in chosen if set(each.bases) & set(REAL)]
        chosen = [each for each in chosen if each.name not in left]
        for name in left:
            print(f"{name} is left out: it needs real sets, whose folder --data names.", flush=True)
    given.work.mkdir(parents=True, exist_ok=True)
    with (given.work / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            parser.error(f"another command is at work in {given.work}: wait for it, or name another folder")
        os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
        os.environ.update(PYTHONWARNINGS="ignore", TQDM_DISABLE="1")
        place = Place(given.work.absolute(), given.data and given.data.absolute(), scale)
        failed = run(chosen, place, given.processes)
        for experiment in chosen:
            if not any(name.startswith((f"{experiment.name},", "base ")) for name in failed):
                collect(experiment, place, given.out, _command(experiment, scale, given.arms))
    show(known, given.out)
    if failed:
        sys.exit(f"{len(failed)} of the runs failed: {'; '.join(failed)}")


def _command(experiment: Experiment, scale: str, arms: list[str] | None) -> str:
    """The command that runs this experiment alone, without paths of this machine."""
    words = ["python benchmarks/claims/run.py", experiment.name, "--work WORK"]
    words += ["--arms", *(f'"{arm}"' for arm in arms)] if arms else []
    words += ["--data DATA"] if set(experiment.bases) & set(REAL) else []
    return " ".join([*words, *([f"--scale {scale}"] if scale != "cpu" else [])])


if __name__ == "__main__":
    main()
