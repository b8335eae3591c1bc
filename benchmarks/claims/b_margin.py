"""B2: the margin that the reference gives to the pairs of the second step, under M_1 against M_0."""

from __future__ import annotations

from claim import Claim, Mean, Results, Verdict, differs
from dots import dots
from matplotlib.figure import Figure

ARMS = {
    "by source": "one skill, in the order given",
    "easy to hard": "one skill, easy to hard",
    "hard to easy": "one skill, hard to easy",
    "random": "one skill, random steps",
    "unrelated": "three skills, a step each",
}
"""Arms of C1's experiment that have steps, by what is printed for them."""


def judge(results: Results) -> tuple[Verdict, str]:
    """Reproduced if the margin rises wherever all steps are about one skill, each interval above zero."""
    found = {arm: _rises(results, arm) for arm in ARMS}
    verdicts = {arm: differs(values, 1) for arm, values in found.items() if arm != "unrelated"}
    verdict: Verdict = "within noise"
    if set(verdicts.values()) == {"reproduced"}:
        verdict = "reproduced"
    elif "not reproduced" in verdicts.values():
        verdict = "not reproduced"
    said = "; ".join(f"{ARMS[arm]} {Mean.of(values).text()}" for arm, values in found.items())
    return verdict, f"change of gamma on D_2 from M_0 to M_1, nats: {said}"


def _rises(results: Results, arm: str) -> list[float]:
    return [record["gamma_1"] - record["gamma_0"] for record in results[arm]]


def draw(results: Results, figure: Figure) -> None:
    """The change, by arm."""
    values = {ARMS[arm]: _rises(results, arm) for arm in ARMS}
    title = "B2: the first step's model against the supervised one"
    dots(figure.subplots(), values, "change of the mean margin on D_2, nats", title, 0.0)


CLAIM = Claim(
    "B2",
    "sDPO, arXiv 2403.19270",
    "The reference's mean margin on the pairs of D_2 is higher under M_1 than under M_0",
    judge,
    "b_margin",
)
