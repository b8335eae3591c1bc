"""What a run has left in its folder: metrics, margins, its configuration, and the rows that it was trained on."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lit_dpo.checkpoints.claim import number_of
from lit_dpo.data.read import read_rows, source_name
from lit_dpo.data.rows import Message, Pair, parse_row
from lit_dpo.files import refuse_special

Series = list[tuple[int, float]]  # optimizer steps done and values, in the order of the steps
_LARGEST = 256 << 20  # bytes of a file of metrics


@dataclass(frozen=True)
class FinishedRun:
    """A run's folder.

    Args:
        folder: Where it is.
        parts: Folders that hold its metrics, one a partition of a stepwise run, else the run's own.
    """

    folder: Path
    parts: tuple[Path, ...]


def find_run(given: str | Path, last: str = "last") -> FinishedRun:
    """The run that a name on the command line means: its folder, a folder of runs for its newest one, or `last`.

    Raises:
        FileNotFoundError: There is no such folder, or no run is in it.
    """
    path = Path(given)
    if str(given) == last and not path.exists():
        places = [place for root in (Path(), *sorted(Path("runs").glob("*"))) for place in _runs_in(root)]
        if not places:
            raise FileNotFoundError("`last`: no run is in this folder or below `runs`. Name the folder of a run.")
        path = max(places, key=lambda place: place.stat().st_mtime)
    if path.name == "checkpoints" or path.is_file():
        raise FileNotFoundError(f"`{path}` is no folder of a run: give the folder that holds its `config.yaml`.")
    if not path.is_dir():
        beside = [str(place) for place in _runs_in(path.parent)] if path.parent.is_dir() else []
        hint = f"there are {', '.join(beside[-3:])}" if beside else "give the folder that `lit-dpo fit` wrote"
        raise FileNotFoundError(f"No run `{path}`: {hint}.")
    if not _is_run(path) and (within := _runs_in(path)):
        path = within[-1]
    partitions = sorted(path.glob("partition_*"), key=lambda part: number_of(part, "partition"))
    parts = [versions[-1] for part in partitions if (versions := _runs_in(part))] or [path]
    if not _is_run(path) and parts == [path]:
        raise FileNotFoundError(f"No run is in `{path}`: give the folder that `lit-dpo fit` wrote.")
    return FinishedRun(path, tuple(parts))


def _is_run(path: Path) -> bool:
    return any((path / name).exists() for name in ("metrics.csv", "config.yaml", "checkpoints", "margins.jsonl"))


def _runs_in(path: Path) -> list[Path]:
    return sorted((run for run in path.glob("version_*") if run.is_dir() and number_of(run) >= 0), key=number_of)


# -- metrics ----------------------------------------------------------------------------------------------------------


def metrics(run: FinishedRun) -> dict[str, Series]:
    """Every metric that a run has logged, by name, with the optimizer steps that were done then, as checkpoints say it.

    A step that was done again after a stop counts as it was done last. The partitions of a stepwise run follow each
    other.

    Raises:
        FileNotFoundError: Nothing was logged yet.
        ValueError: A file is no table of metrics.
    """
    found: dict[str, dict[int, float]] = {}
    offset = 0
    for part in run.parts:
        earlier = sorted(part.glob("metrics_*.csv"), key=lambda file: number_of(file.with_suffix(""), "metrics"))
        last = offset
        for file in [*earlier, *([part / "metrics.csv"] if (part / "metrics.csv").exists() else [])]:
            for step, values in _table(file):
                done = offset + step + 1  # Lightning counts from 0
                last = max(last, done)
                for name, value in values.items():
                    found.setdefault(name, {})[done] = value
        offset = last
    if not found:
        raise FileNotFoundError(
            f"`{run.folder}` has logged no metrics yet: wait for the first ones, or lower `log_every_n_steps`."
        )
    return {name: sorted(values.items()) for name, values in found.items()}


def _table(file: Path) -> Iterable[tuple[int, dict[str, float]]]:
    """Steps and values of a csv file; a last line that is only half written is left out."""
    refuse_special(file)
    if file.stat().st_size > _LARGEST:
        raise ValueError(f"`{file}` has more than {_LARGEST:,} bytes: it is no table of metrics of `lit-dpo fit`.")
    whole = file.read_text(encoding="utf-8", errors="replace").rpartition("\n")[0]
    if not whole:
        return
    reader = csv.DictReader(whole.splitlines())
    if "step" not in (reader.fieldnames or ()):
        raise ValueError(f"`{file}` has no column `step`: give a run that `lit-dpo fit` wrote.")
    for line in reader:
        try:
            values = {name: float(text) for name, text in line.items() if text and name and name != "epoch"}
            step = int(values.pop("step"))
        except (ValueError, KeyError, TypeError):
            continue
        yield step, values


# -- lines of JSON ----------------------------------------------------------------------------------------------------


def read_lines(path: Path, needed: Sequence[str], what: str) -> list[dict[str, Any]]:
    """A file with a JSON object a line, each with the names that are needed.

    Raises:
        OSError: It cannot be read.
        ValueError: It holds something else, or nothing.
    """
    if not path.exists():
        raise FileNotFoundError(f"There is no `{path}`: give {what}.")
    refuse_special(path)
    found: list[dict[str, Any]] = []
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if not isinstance(row, dict) or any(name not in row for name in needed):
                raise ValueError(f"`{path}:{number}` is no line of {what}, which has {', '.join(needed)}.")
            found.append(row)
    if not found:
        raise ValueError(f"`{path}` is empty: give {what}.")
    return found


def source_of(origin: str) -> str:
    """The name of the data set of a row, from its place.

    >>> source_of("data/hh_harmless/train.jsonl.gz:17")
    'hh_harmless'
    """
    return source_name(origin.rpartition(":")[0] or origin)


# -- rows -------------------------------------------------------------------------------------------------------------


def config_file(run: FinishedRun) -> Path:
    """The configuration that a run was started with, of a stepwise one that of its last partition, as a file.

    Raises:
        FileNotFoundError: It is not there.
    """
    places = [folder / "config.yaml" for folder in (*reversed(run.parts), run.folder)]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise FileNotFoundError(f"`{run.folder}` has no `config.yaml`: give a run that `lit-dpo fit` wrote.")
    return path


def config_of(run: FinishedRun) -> dict[str, Any]:
    """The configuration that a run was started with.

    Raises:
        FileNotFoundError: It is not there.
        ValueError: It is no configuration.
    """
    path = config_file(run)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"`{path}` is no configuration: restore it, or give another run.") from error
    if not isinstance(content, dict) or not isinstance(content.get("data"), dict):
        raise ValueError(f"`{path}` is no configuration of `lit-dpo fit`: restore it, or give another run.")
    return content


def pairs_at(data: Mapping[str, Any], origins: Iterable[str]) -> dict[str, Pair]:
    """The pairs at these places of the training data, as they are written there now.

    Args:
        data: The part `data` of a configuration.
        origins: Places such as `file:line`.

    Returns:
        The pair of each place that was found; a file that is gone or has changed leaves some out.
    """
    wanted, found = set(origins), {}
    sources = data.get("train") or []
    for source in [sources] if isinstance(sources, str) else sources:
        try:
            for where, row in read_rows(source, lambda error: None):
                if where in wanted:
                    found[where] = parse_row(row, source_name(source), where, data.get("columns"))
                if len(found) == len(wanted):
                    return found
        except (OSError, ValueError):
            continue  # what is missing is counted by whoever asks
    return found


def shown(content: str | Sequence[Message]) -> str:
    """A prompt or completion as a person reads it; of messages, each with its role."""
    if isinstance(content, str):
        return content
    if len(content) == 1:
        return content[0]["content"]
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in content)
