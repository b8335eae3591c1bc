"""The rows B2, C1, C2, D and the losses side by side: verdicts told by their rules, and the pairs they are made of."""

import importlib
import itertools
import random
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "benchmarks"
SEEDS = range(3)
NOISE = (-0.02, 0.03, -0.01)
CLEAR = (0.1, 0.12, 0.11)


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch):
    for folder in (FOLDER, FOLDER / "claims"):
        monkeypatch.syspath_prepend(str(folder))


def verdicts(name, records):
    """What an experiment says of made-up records."""
    claim = importlib.import_module("claim")
    (experiment,) = importlib.import_module(name).experiments("cpu")
    results = claim.Results({arm: dict(enumerate(of)) for arm, of in records.items()})
    return [each.judge(results)[0] for each in experiment.claims]


def three(gain):
    """Above, below, and about zero."""
    return {
        "reproduced": [gain * v for v in CLEAR],
        "not reproduced": [-gain * v for v in CLEAR],
        "within noise": NOISE,
    }


def pairs_won(shares, name=None):
    """Records of 100 pairs of which so many are won, those of a seed the same ones whatever the arm."""
    found = []
    for seed, share in enumerate(shares):
        order = random.Random(seed).sample(range(100), 100)
        wins = "".join("+" if place < 100 * share else "-" for place in order)
        found.append({"accuracy": share, "choice": share, "quality": share, "seconds": 1.0, "wins": wins})
        found[-1]["logps"] = " ".join(["-20.00"] * 100)
    return found


@pytest.mark.parametrize("expected", ["reproduced", "not reproduced", "within noise"])
class TestVerdicts:
    def test_of_the_second_steps_margin_and_of_steps(self, expected):
        gains = three(1.0)[expected]
        record = {"gamma_0": 1.0, "accuracy": 0.7, "quality": 0.5}
        same = [{**record, "gamma_1": 1.0 + gain} for gain in gains]
        arms = dict.fromkeys(("DPO", "by source", "hard to easy", "random", "unrelated"), same)
        arms["easy to hard"] = [{**one, "accuracy": 0.7 + gain} for one, gain in zip(same, gains, strict=True)]
        assert verdicts("c_stepwise", arms) == [expected, expected]

    def test_of_the_brake(self, expected):
        record = {
            "rejected_end": -5.0,
            "rejected_held_out": -4.0,
            "chosen_end": 0.0,
            "chosen_held_out": 0.0,
            "accuracy": 1.0,
        }
        braked = [
            {**record, "rejected_end": -5 + gain, "rejected_held_out": -4 + gain} for gain in three(10.0)[expected]
        ]
        assert verdicts("d_minor", {"DPO": [record] * 3, "MinorDPO": braked}) == [expected]

    def test_of_the_audit_and_of_training_without_suspects(self, expected):
        gains = three(1.0)[expected]
        plain = [{"auroc": 0.7 + gain, "auroc_reference": 0.7, "precision": 0.5, "accuracy": 0.7} for gain in gains]
        arms = {
            name: [{**one, "quality": 0.5} for one in plain]
            for name in ("DPO", "without the flipped", "cDPO", "robust DPO")
        }
        arms["without suspects"] = [{"accuracy": 0.7 + gain, "quality": 0.5} for gain in gains]
        assert verdicts("d_audit", arms) == [expected, expected]

    def test_of_the_pilot(self, expected):
        noise = [0.3 + 20 * value for value in NOISE]
        pilot = {"reproduced": [0.8, 0.85, 0.82], "not reproduced": [-0.5, -0.55, -0.52], "within noise": noise}[
            expected
        ]
        record = {"length": 0.1, "margin": -0.2, "displaced": 0.5}
        assert verdicts("d_pilot", {"DPO": [{**record, "pilot": value} for value in pilot]}) == [expected]

    def test_of_filtering(self, expected):
        record = {"quality": 0.5, "start": 0.4}
        filtered = [{**record, "quality": 0.5 + gain} for gain in three(1.0)[expected]]
        arms = {"DPO on all": [record] * 3, "filtered DPO": filtered, "DPO on the good": [record] * 3}
        assert verdicts("d_filtered", arms) == [expected]

    def test_of_rounds(self, expected):
        fixed, sampled = "fixed pairs, DPO + SFT", "rejection-sampling SFT"
        record = {"start": 0.3, fixed: [0.3, 0.5], sampled: [0.3, 0.5], "fixed pairs, DPO": [0.1, 0.1]}
        rounds = [{"on-policy, DPO": [0.2, 0.2], "on-policy, DPO + SFT": [0.4, 0.5 + g]} for g in three(1.0)[expected]]
        assert verdicts("d_rounds", {"sort3": [{**record, **one} for one in rounds]}) == [expected] * 2


class TestVerdictsOfSeveralNumbers:
    @pytest.mark.parametrize(
        ("curve", "expected"),
        [
            ([0.5, 0.6, 0.7, 0.8, 0.7, 0.5, 0.3], "reproduced"),
            ([0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2], "within noise"),  # the best is the start: there is no rise
            ([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7], "within noise"),  # nor a fall
        ],
    )
    def test_an_inverted_u_rises_and_falls(self, curve, expected):
        seeds = [[value + noise / 10 for value in curve] for noise in NOISE]
        records = [dict.fromkeys(("quality", "chosen_by", "judged_by"), one) for one in seeds]
        for number, record in enumerate(records):  # not a parallel shift
            record["judged_by"] = [
                v + 0.001 * ((number + place) % 3) * (v > 0) for place, v in enumerate(record["quality"])
            ]
            if expected != "reproduced":
                record["judged_by"][0] = record["quality"][0]
        assert verdicts("d_expo", {"1 epoch": records, "4 epochs": records}) == [expected]

    @pytest.mark.parametrize(
        ("gap", "controlled", "expected"),
        [(-0.1, 0.0, "reproduced"), (-0.1, -0.2, "not reproduced"), (0.1, 0.0, "not reproduced")],
    )
    def test_a_smaller_gap_that_costs_accuracy_is_none(self, gap, controlled, expected):
        record = {"gap": 0.3, "controlled": 0.7, "tokens": 20.0}
        other = [
            {"gap": 0.3 + gap + n, "controlled": 0.7 + controlled + n / 10, "tokens": 20.0} for n in (0.01, 0.0, -0.01)
        ]
        arms = {"DPO": [record] * 3, "length-normalised": other, "R-DPO, alpha 0.05": other, "R-DPO, alpha 0.2": other}
        assert verdicts("d_length", arms) == [expected]

    @pytest.mark.parametrize(("share", "expected"), [(0.95, "reproduced"), (0.62, "within noise")])
    def test_one_layer_has_to_be_better_after_correction(self, share, expected):
        arms = {arm: pairs_won((0.6, 0.61, 0.59)) for arm in ("DPO", "block 1")}
        arms["block 2"] = pairs_won((share, share + 0.01, share - 0.01))
        assert verdicts("c_layers", arms) == [expected]

    @pytest.mark.parametrize(("share", "expected"), [(0.95, "not reproduced"), (0.61, "reproduced")])
    def test_each_loss_is_taken_at_the_point_that_other_pairs_choose(self, share, expected, monkeypatch):
        """A point that is good on the test pairs alone is not taken."""
        losses = importlib.import_module("losses")
        monkeypatch.setattr(losses, "BETAS", {name: losses.BETAS[name] for name in ("DPO", "IPO")})
        arms = {arm: pairs_won((0.6, 0.61, 0.59)) for arm in losses.arms()}
        ipo = [arm for arm in arms if arm.startswith("IPO")]
        arms[ipo[2]] = pairs_won((share, share + 0.01, share - 0.01))
        arms[ipo[3]] = [{**one, "choice": 0.1} for one in pairs_won((0.99, 0.99, 0.99))]
        assert verdicts("losses", arms) == [expected]


def test_rank_correlation_and_auroc_are_those_of_their_definitions():
    draw = random.Random(0)
    a, b = ([draw.random() for _ in range(50)] for _ in range(2))
    b = [x + y for x, y in zip(a, b, strict=True)]
    ranks = torch.tensor([a, b]).argsort().argsort().double()
    assert importlib.import_module("d_pilot").spearman(a, b) == pytest.approx(
        torch.corrcoef(ranks)[0, 1].item(), abs=1e-9
    )
    auroc = importlib.import_module("d_audit").auroc
    assert auroc([1.0, 2.0, 3.0, 3.0], [True, False, True, False]) == (1 + 1 + 0 + 0.5) / 4


def test_pairs_have_the_shares_that_are_asked_for():
    support, length, filtered = (importlib.import_module(name) for name in ("support", "d_length", "d_filtered"))
    tokenizer = importlib.import_module("lit_dpo.tokenizers").load_tokenizer("quickstart")
    rows = length.biased(Path("quickstart"), 40, 0.9, seed=1, held_out=False)
    sizes = [[len(tokenizer(row[side]).input_ids) for side in ("chosen", "rejected")] for row in rows]
    assert sum(chosen > rejected for chosen, rejected in sizes) == 36
    assert sum(chosen < rejected for chosen, rejected in sizes) == 4
    everything, good = (filtered.noisy(40, 1, poor) for poor in (True, False))
    worth = [support.score(row["prompt"], row["chosen"]) for row in everything]
    assert sum(value == 1 for value in worth) == 14
    assert sum(value >= 3 for value in worth) == 26
    assert sorted(map(str, good)) == sorted(
        str(row) for row, value in zip(everything, worth, strict=True) if value >= 3
    )


def test_fixed_pairs_are_right_against_one_digit_changed():
    rounds = importlib.import_module("d_rounds")
    partition = rounds.FixedPairs([5, 3], seed=2)
    steps = [partition.next(step, None) for step in range(3)]
    assert [step and len(step) for step in steps] == [5, 3, None]
    for row in itertools.chain(*steps[:2]):
        assert row["chosen"] == "".join(sorted(row["prompt"][:-1]))
        assert sum(a != b for a, b in zip(row["chosen"], row["rejected"], strict=True)) == 1
    assert rounds.FixedPairs([5, 3], seed=2).next(1, None) == steps[1]
