"""The experiments of benchmarks/claims: known truth, verdicts by rule, results that survive a kill, GPU settings."""

import gzip
import json
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from lit_dpo.cli import main

ROOT = Path(__file__).parents[1]
RUN = ROOT / "benchmarks" / "claims" / "run.py"


@pytest.fixture(autouse=True)
def claims(monkeypatch):
    for folder in (RUN.parents[1], RUN.parent):
        monkeypatch.syspath_prepend(str(folder))


def command(name, work, out, *more):
    words = [*([name] if name else ["--all"]), "--work", str(work), "--out", str(out), "--smoke", "--processes", "2"]
    return [sys.executable, str(RUN), *words, *more]


def made_up(folder):
    """Sums as the real sets stand in their folder."""
    from bases import REAL

    for name in REAL:
        (folder / name).mkdir(parents=True)
        for split, count in (("train", 120), ("validation", 30)):
            with gzip.open(folder / name / f"{split}.jsonl.gz", "wt") as file:
                for n in range(count):
                    a, b = n * 7 % 50, n // 3
                    row = {"id": n, "prompt": f"Add {a} to {b} ({split}):", "chosen": f" {a}+{b} #### {a + b}"}
                    file.write(json.dumps({**row, "rejected": f" #### {a}"}) + "\n")
    return folder


def measured(out, name):
    """What stands in a results file, but for when and where it was made."""
    whole = json.loads((out / "results" / f"{name}.json").read_text())
    return {key: value for key, value in whole.items() if key != "about"}


class TestKnownTruth:
    @pytest.mark.parametrize("kind", ["fix", "tone", "item", "gap1", "gap2", "gap3", "mixed"])
    def test_the_labels_are_what_the_texts_say(self, kind):
        """The score is told from the text alone; exactly the share that was asked for is wrong."""
        import support

        rows = support.pairs(kind, 200, seed=3, flipped=0.1)
        gaps = [support.score(r["prompt"], r["chosen"]) - support.score(r["prompt"], r["rejected"]) for r in rows]
        assert {n for n, gap in enumerate(gaps) if gap < 0} == support.flips(200, 0.1, 3)
        assert len(support.flips(200, 0.1, 3)) == 20
        allowed = {"gap2": {2}, "gap3": {3}, "mixed": {1, 2, 3, 4}}.get(kind, {1})
        assert {abs(gap) for gap in gaps} == allowed
        assert rows == support.pairs(kind, 200, seed=3, flipped=0.1)
        assert rows != support.pairs(kind, 200, seed=4, flipped=0.1)

    @pytest.mark.parametrize("kind", ["fix", "tone", "item"])
    def test_a_kind_of_one_part_differs_there_alone(self, kind):
        import support

        for row in support.pairs(kind, 50, seed=0):
            good, bad = (support.slots(row["prompt"], row[side]) for side in ("chosen", "rejected"))
            assert (good.pop(kind), bad.pop(kind)) == (True, False)
            assert good == bad

    def test_held_out_prompts_stand_nowhere_else(self):
        import support

        seen = {row["prompt"] for row in [*support.supervised(3000, 0), *support.pairs("mixed", 500, 1)]}
        held_out = [*support.pairs("mixed", 500, 1, held_out=True), *support.supervised(200, 0, held_out=True)]
        assert not seen & {row["prompt"] for row in held_out}
        prompts = [row["prompt"] for row in support.pairs("fix", 500, 1)]
        assert len(set(prompts)) == 500

    def test_no_prompt_comes_again_before_all_have_come(self):
        """There are 6 * 8 * 20 * 12 prompts; a set with more rows than that ends all the same."""
        import support

        assert support.available(held_out=True) + support.available() == 6 * 8 * 20 * 12
        all_of_them = support.available(held_out=True)
        prompts = [row["prompt"] for row in support.pairs("mixed", all_of_them + 100, 0, held_out=True)]
        assert len({*prompts[:all_of_them]}) == len({*prompts}) == all_of_them
        assert len({*prompts[all_of_them:]}) == 100

    def test_a_supervised_reply_is_good_in_60_of_100(self):
        import support

        rows = support.supervised(2000, 0)
        for slot in support.SLOTS:
            share = sum(support.slots(row["prompt"], row["chosen"])[slot] for row in rows) / 2000
            assert share == pytest.approx(0.6, abs=0.04)


class TestVerdicts:
    def test_the_interval_is_students(self):
        """Of 4, 6, 8, 10 by hand: mean 7, deviation 2.582, quantile 3.182, half 3.182 * 2.582 / 2 = 4.108."""
        from claim import Mean

        mean = Mean.of([4.0, 6.0, 8.0, 10.0])
        assert (mean.value, round(mean.half, 3)) == (7.0, 4.108)

    @pytest.mark.parametrize(
        ("values", "expected", "verdict"),
        [
            ([1.0, 1.1, 1.2], 1, "reproduced"),
            ([1.0, 1.1, 1.2], -1, "not reproduced"),
            ([-1.0, -1.1, -1.2], -1, "reproduced"),
            ([1.0, -1.0, 0.5], 1, "within noise"),
            ([1.0], 1, "within noise"),
        ],
    )
    def test_a_difference_is_judged_by_its_interval(self, values, expected, verdict):
        from claim import differs

        assert differs(values, expected) == verdict

    @pytest.mark.parametrize(("end", "verdict"), [(5.05, "reproduced"), (5.4, "not reproduced")])
    def test_ipo_has_to_end_at_its_target(self, end, verdict):
        import a_targets
        from claim import Results

        def record(at, n):
            h = [0.0, at, at, at + 0.01 * n]
            return {"h": h, "end": h[-1], "spread": [0.0, 0.9, 0.5, 0.2 + 0.01 * n]}

        dpo = {n: {"h": [0.0, 5.0, 10.0, 20.0 + n], "end": 20.0 + n, "spread": [0.0, 1, 2, 3]} for n in range(3)}
        results = Results({"IPO": {n: record(end, n) for n in range(3)}, "DPO": dpo})
        assert a_targets.judge_ipo(results)[0] == verdict

    def test_equal_h_is_found_between_epochs(self):
        """At h 3, halfway from (2, -1) to (4, -5): -3."""
        from b_displacement import _at

        assert _at([[0.0, 0.0], [2.0, -1.0], [4.0, -5.0], [3.5, -6.0]], 3.0) == -3.0

    @pytest.mark.parametrize(
        ("chosen", "rejected", "edit"),
        [([1, 2, 3], [1, 9, 3], (1, 2)), ([1, 1, 1], [1, 1], (2, 3)), ([1, 2], [1, 5, 2], (1, 1)), ([4], [5], (0, 1))],
    )
    def test_the_edit_is_what_no_end_shares(self, chosen, rejected, edit):
        from b_displacement import _edit

        assert _edit(chosen, rejected) == edit


class TestLog:
    def test_steps_that_were_done_again_count_once(self, tmp_path):
        """A run that was stopped after step 2 and went on from step 1 leaves two files."""
        from commands import logged

        (tmp_path / "metrics_0.csv").write_text("step,train/loss,val/loss\n0,3.0,\n0,,9.0\n1,2.0,\n")
        (tmp_path / "metrics.csv").write_text("step,lr,train/loss,val/loss\n1,,2.0,\n1,,,8.0\n2,,1.0,\n")
        assert [line["train/loss"] for line in logged(tmp_path) if "train/loss" in line] == [3.0, 2.0, 1.0]
        assert [line["val/loss"] for line in logged(tmp_path) if "val/loss" in line] == [9.0, 8.0]


class TestTable:
    def test_words_around_the_table_stay(self, tmp_path):
        import run

        page = tmp_path / "README.md"
        page.write_text(f"# Mine\n\nbefore\n\n{run.MARKS[0]}\nold\n{run.MARKS[1]}\n\nafter\n")
        run.show(run.experiments("cpu"), tmp_path, draw=False)
        text = page.read_text()
        assert text.startswith("# Mine\n\nbefore\n")
        assert text.endswith("\n\nafter\n")
        assert "old" not in text
        assert "not run" in text

    def test_the_manual_quotes_what_was_measured(self):
        quoted = re.findall(r"-?[\d.]+ ± [\d.]*\d", (ROOT / "docs" / "methods.md").read_text())
        table = (RUN.parent / "README.md").read_text()
        assert len(quoted) >= 4
        assert [number for number in quoted if number not in table] == []

    @pytest.mark.slow
    def test_the_table_is_that_of_the_results(self, tmp_path):
        """Judged again from the committed results, which a change of a rule has to show in."""
        import run

        shutil.copytree(RUN.parent / "results", tmp_path / "results")
        shutil.copy(RUN.parent / "README.md", tmp_path)
        run.show(run.experiments("cpu"), tmp_path, draw=False)
        assert (tmp_path / "README.md").read_text() == (RUN.parent / "README.md").read_text()

    def test_the_results_are_of_this_code(self):
        """What made the numbers and what makes them now: the settings of every arm, and the code that measures."""
        import run
        import sources

        stale = []
        for name, experiment in run.experiments("cpu").items():
            path = RUN.parent / "results" / f"{name}.json"
            whole = json.loads(path.read_text()) if path.exists() else {"arms": None, "about": {}}
            now = json.loads(json.dumps(experiment.arms)), sources.code(run.module_of(name))
            stale += [name] if (whole["arms"], whole["about"].get("code")) != now else []
        assert stale == [], "measure them again: python benchmarks/claims/run.py NAME --work WORK --data DATA"

    def test_code_that_measures_is_told_from_what_judges_and_draws(self, tmp_path):
        import sources

        text = (RUN.parent / "d_rounds.py").read_text()
        of = sources.measuring(text)
        assert (
            sources.measuring(text.replace("Whether ", "If ").replace("against_fixed(results", "other(results")) == of
        )
        assert sources.measuring(text.replace("draw.randrange(len(prompt) - 1)", "0")) != of
        assert {path.name for path in sources.sources("d_rounds")} >= {
            "sort3.py",
            "rounds.py",
            "bases.py",
            "support.py",
        }

    def test_a_smoke_run_spoils_no_result(self, tmp_path, capsys):
        import run

        with pytest.raises(SystemExit) as ended:
            run.main(["--all", "--smoke", "--work", str(tmp_path)])
        assert ended.value.code == 2
        assert "--out" in capsys.readouterr().err


def config_of(module, experiment, arm, place, monkeypatch):
    """Configuration and more words of the first training of an arm, without any training."""
    import bases
    from claim import Run

    class AskedError(Exception):
        pass

    def fit(folder, config, *overlays, words=()):
        raise AskedError(config, words)

    monkeypatch.setattr(module, "fit", fit)
    monkeypatch.setattr(Run, "base", lambda self, name: bases.Base(Path("quickstart"), 1.0))
    with pytest.raises(AskedError) as asked:
        experiment.run(Run(experiment.arms[arm], 0, place.work, place))
    return asked.value.args


@pytest.mark.slow
@pytest.mark.timeout(900)  # the command line reads each of a hundred configurations
@pytest.mark.filterwarnings("ignore")
def test_the_gpu_settings_are_valid(tmp_path, monkeypatch, capsys):
    """Every arm of every experiment, as the command line reads it; what needs real sets gets made-up ones."""
    import bases
    import run
    import support

    monkeypatch.setattr(bases, "rows", lambda *_: support.pairs("mixed", 40, 0))
    place = bases.Place(tmp_path, tmp_path, "gpu")
    checked = 0
    for module in (each for each in run.MODULES if hasattr(each, "fit")):  # the others train in Python
        for experiment in module.experiments("gpu"):
            for arm in experiment.arms:
                config, words = config_of(module, experiment, arm, place, monkeypatch)
                (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
                with pytest.raises(SystemExit) as ended:
                    main(["fit", *words, "--config", str(tmp_path / "config.yaml"), "--print_config"])
                assert ended.value.code in (0, None), capsys.readouterr().err
                printed = yaml.safe_load(capsys.readouterr().out)
                assert printed["trainer"]["accelerator"] == "gpu"
                assert printed["trainer"]["precision"] == "bf16-mixed"
                checked += 1
    assert checked > 10


@pytest.mark.slow
def test_a_killed_command_goes_on_to_the_same_results(tmp_path):
    """Killed outright three times, soon after another checkpoint was written; nothing that was done is done again."""
    whole = subprocess.run(command("a_stepwise", tmp_path / "a", tmp_path / "b"), capture_output=True, text=True)
    assert whole.returncode == 0, whole.stdout + whole.stderr
    draw = random.Random()
    for checkpoints in (1, 3, 5):
        process = subprocess.Popen(command("a_stepwise", tmp_path / "c", tmp_path / "d"), stdout=subprocess.DEVNULL)
        while process.poll() is None and len([*(tmp_path / "c").rglob("last.ckpt")]) < checkpoints:
            time.sleep(0.1)
        time.sleep(draw.uniform(0, 2))
        process.kill()
        process.wait()
        time.sleep(1)  # the workers end by themselves
        done = {path: path.stat().st_mtime_ns for path in (tmp_path / "c").rglob("DONE")}
    assert done
    last = subprocess.run(command("a_stepwise", tmp_path / "c", tmp_path / "d"), capture_output=True, text=True)
    assert last.returncode == 0, last.stdout + last.stderr
    assert measured(tmp_path / "d", "a_stepwise") == measured(tmp_path / "b", "a_stepwise")
    assert {path: path.stat().st_mtime_ns for path in done} == done


@pytest.mark.slow
def test_everything_runs_small(tmp_path):
    """On made-up sets in the place of the real ones; the table has a line a claim, each with its figure."""
    import run

    given = ["--data", str(made_up(tmp_path / "data"))]
    done = subprocess.run(command(None, tmp_path / "work", tmp_path / "out", *given), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    text = (tmp_path / "out" / "README.md").read_text()
    for experiment in run.experiments("smoke").values():
        for claim in experiment.claims:
            assert f"| {claim.name} |" in text
            assert (tmp_path / "out" / "figures" / f"{claim.figure}.png").exists()
    assert "not run" not in text
