"""What is said at the end of a run: each sentence where its reason is, and not beside it."""

import pytest

from lit_dpo.callbacks import RunSummary
from lit_dpo.callbacks.findings import findings
from tests import runs
from tests.callbacks.test_summary import printed

pytestmark = runs.QUIET


def history(*accuracies, **last):
    """Validations every ten steps; further values of the last one."""
    found = [(10 * n, {"val/rewards/accuracies": accuracy}) for n, accuracy in enumerate(accuracies)]
    found[-1][1].update({f"val/{name.replace('__', '/')}": value for name, value in last.items()})
    return found


FELL = {"displacement": 0.75, "rewards__chosen": -0.5, "logps__chosen": -80.0}
LENGTH = {"displacement": 0.2, "length__longer": 0.5, "length__longer_won": 0.475, "length__shorter": 0.5}
LENGTH["length__shorter_won"] = 0.05


@pytest.mark.parametrize(
    ("validations", "said", "numbers"),
    [
        (history(0.5, 0.5, **FELL), "Chosen log-probs fell", ["75%", "-0.5", "-80", "DPOPLoss", "SFT"]),
        (history(0.5, 0.5, **{**FELL, "rewards__chosen": 0.1}), "Chosen log-probs fell", None),
        (history(0.5, 0.5, **{**FELL, "displacement": 0.5}), "Chosen log-probs fell", None),
        (history(0.5, 0.5, rewards__chosen=-0.5, logps__chosen=-80.0), "Chosen log-probs fell", None),
        (history(0.5, 0.6, 0.62), "Accuracy still rises", ["0.600", "step 10", "0.620"]),
        (history(0.5, 0.6, 0.55, 0.62), "Accuracy still rises", ["0.600", "step 10", "0.620"]),
        (history(0.54, 0.567, 0.525, 0.567), "Accuracy still rises", None),
        (history(0.5, 0.6, 0.605), "Accuracy still rises", None),
        (history(0.5, 0.7, 0.6, 0.65), "Accuracy still rises", None),
        (history(0.6), "Accuracy", None),
        (history(0.5, 0.7, 0.68), "Accuracy fell after step 10", ["0.700", "0.680"]),
        (history(0.5, 0.7, 0.695), "Accuracy fell", None),
        (history(0.5, 0.7, **LENGTH), "Most of the gain is length", ["0.950", "0.100"]),
        (history(0.5, 0.7, **{**LENGTH, "length__shorter_won": 0.15}), "Most of the gain is length", None),
        (history(0.5, 0.5, **LENGTH), "Most of the gain is length", None),
    ],
)
def test_a_sentence_stands_where_its_reason_is(validations, said, numbers, capsys):
    text = " ".join(printed(capsys, validations).split())
    assert (said in text) == (numbers is not None)
    assert all(number in text for number in numbers or ())


def test_a_change_within_the_standard_error_is_none():
    """Over 36 pairs one pair is 0.028, and the standard error of 0.75 is 0.072."""
    fell, rose = history(0.5, 0.75, 0.722), history(0.5, 0.722, 0.75)
    assert findings(fell, 36) == findings(rose, 36) == []
    assert "from 0.750 to 0.722 over 36,000 pairs" in findings(fell, 36_000)[0]
    assert "to 0.750 from 0.722 at step 10 over 36,000 pairs" in findings(rose, 36_000)[0]
    assert "from 0.750 to 0.650 over 36 pairs" in findings(history(0.5, 0.75, 0.65), 36)[0]


def test_a_run_whose_data_are_about_length_says_so(tmp_path, capsys, monkeypatch):
    """A real fit on pairs whose chosen completion is mostly the longer one, and of the same words."""
    monkeypatch.setenv("COLUMNS", "200")
    rows = []
    for n in range(64):
        long, short = " yes" * (8 + n % 4), " yes" * (2 + n % 3)
        chosen, rejected = (short, long) if n % 8 == 0 else (long, short)
        rows.append({"prompt": f"Number {n}?", "chosen": chosen, "rejected": rejected})
    path = runs.write(tmp_path / "pairs.jsonl", rows)
    data = runs.data(path, validation=path)
    values = runs.fit(runs.module(lr=0.1), data, max_steps=8, callbacks=[RunSummary()]).callback_metrics
    longer, shorter = float(values["val/length/longer_won"]) * 8 / 7, float(values["val/length/shorter_won"]) * 8
    assert float(values["val/rewards/accuracies"]) == pytest.approx(longer * 7 / 8 + shorter / 8)
    assert longer > 0.9
    assert shorter < 0.5
    assert "Most of the gain is length" in capsys.readouterr().out
