"""What a claim is: arms and seeds to run, a number for each, and a rule in code that gives the verdict."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bases import Base, Place, base
from commands import Config, Record, digest, write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Verdict = Literal["reproduced", "not reproduced", "within noise"]
_T = {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764, 5: 2.5706, 6: 2.4469, 7: 2.3646, 8: 2.3060, 9: 2.2622}


@dataclass(frozen=True)
class Mean:
    """A mean over seeds, with half the width of its 95 % interval by Student's t.

    Args:
        value: The mean.
        half: Infinite with one value alone.

    >>> str(Mean.of([1.0, 2.0, 3.0]))
    '2.00 ± 2.48'
    """

    value: float
    half: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        """From one value a seed, at most ten."""
        count = len(values)
        spread = statistics.stdev(values) / math.sqrt(count) if count > 1 else math.inf
        return cls(statistics.mean(values), _T[count - 1] * spread if count > 1 else math.inf)

    @property
    def low(self) -> float:
        """Lower end of the interval."""
        return self.value - self.half

    @property
    def high(self) -> float:
        """Upper end."""
        return self.value + self.half

    def text(self, digits: int = 2) -> str:
        """`mean ± half`."""
        return f"{self.value:.{digits}f} ± {self.half:.{digits}f}"

    __str__ = text


def differs(values: Sequence[float], expected: int) -> Verdict:
    """The verdict on paired differences that should be above zero (`expected` 1) or below it (-1).

    `within noise` is an interval that holds zero.
    """
    mean = Mean.of(values)
    if mean.low <= 0 <= mean.high:
        return "within noise"
    return "reproduced" if (mean.value > 0) == (expected > 0) else "not reproduced"


@dataclass(frozen=True)
class Results:
    """What was measured: a record for each arm and seed."""

    records: dict[str, dict[int, Record]]

    @property
    def seeds(self) -> list[int]:
        """Those that every arm has."""
        return sorted(set.intersection(*(set(of) for of in self.records.values())))

    def __getitem__(self, arm: str) -> list[Record]:
        """Records of an arm, in the order of `seeds`."""
        return [self.records[arm][seed] for seed in self.seeds]

    def values(self, arm: str, name: str) -> list[float]:
        """One number of each record."""
        return [record[name] for record in self[arm]]

    def mean(self, arm: str, name: str) -> Mean:
        """Its mean over seeds."""
        return Mean.of(self.values(arm, name))

    def differences(self, first: str, second: str, name: str) -> list[float]:
        """By seed, what the second arm has more than the first."""
        return [b - a for a, b in zip(self.values(first, name), self.values(second, name), strict=True)]


@dataclass(frozen=True)
class Run:
    """One arm with one seed, as an experiment's `run` gets it.

    Args:
        arm: What sets it apart from the other arms, as plain values.
        seed: Of the base, the pairs and their order.
        folder: Its own, for everything that it trains.
        place: Where the other things are, and the scale.
    """

    arm: Config
    seed: int
    folder: Path
    place: Place

    def base(self, name: str) -> Base:
        """The supervised model of a set, with this run's seed."""
        return base(self.place, name, self.seed)

    @property
    def shared(self) -> Path:
        """A folder that all runs share, for files of pairs and cached log-probs."""
        return self.place.work / "shared"


@dataclass(frozen=True)
class Claim:
    """A row of the table.

    Args:
        name: Such as `A1`.
        paper: Whose claim it is.
        sentence: What is claimed.
        judge: From what was measured, the verdict and what to print as measured. The rule stands there, in code.
        figure: Name of a figure of the experiment.
    """

    name: str
    paper: str
    sentence: str
    judge: Callable[[Results], tuple[Verdict, str]]
    figure: str


@dataclass(frozen=True)
class Experiment:
    """Runs that are done together, and the claims that are judged by them.

    Args:
        name: On the command line.
        arms: By name, plain values that `run` gets and that the key of a result is made of.
        run: Trains and measures one arm with one seed. It is called in another process; the same settings find what
            was done before.
        claims: Rows of the table.
        figures: By name, what draws them on a figure of matplotlib.
        bases: Sets whose supervised models the runs start from; they are trained first.
        seeds: How many.
        note: One or two sentences on what was done: pairs, epochs, learning rate.
    """

    name: str
    arms: dict[str, Config]
    run: Callable[[Run], Record]
    claims: tuple[Claim, ...]
    figures: dict[str, Callable[[Results, Figure], None]]
    bases: tuple[str, ...] = ("support",)
    seeds: int = 3
    note: str = field(default="")

    def tasks(self) -> list[tuple[str, str, int]]:
        """Name, arm and seed of every run, all seeds of an arm together."""
        return [(self.name, arm, seed) for arm in self.arms for seed in range(self.seeds)]


def result(experiment: Experiment, arm: str, seed: int, place: Place) -> Path:
    """The file of a result; its name has a digest of all settings, so that others are never taken for these."""
    settings = [experiment.name, experiment.arms[arm], experiment.bases, seed, place.scale]
    return place.work / "results" / experiment.name / f"{arm.replace(' ', '_')}-{seed}-{digest(settings)}.json"


def measure(experiment: Experiment, arm: str, seed: int, place: Place) -> Record:
    """The record of an arm and a seed: read if it is there, else made and written."""
    path = result(experiment, arm, seed, place)
    if not path.exists():
        folder = place.work / "runs" / experiment.name / path.stem
        folder.mkdir(parents=True, exist_ok=True)
        found = experiment.run(Run(experiment.arms[arm], seed, folder, place))
        write(path, json.dumps(_rounded(found)))
    record: Record = json.loads(path.read_text(encoding="utf-8"))
    return record


def _rounded(value: Any) -> Any:
    """With 6 significant digits, which is more than anything here is known to."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {name: _rounded(one) for name, one in value.items()}
    return [_rounded(one) for one in value] if isinstance(value, list | tuple) else value
