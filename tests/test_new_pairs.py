"""Steps of new pairs that a partition makes of the policy's own samples: written, read back, never asked for twice."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lit_dpo import Partition, Pool
from lit_dpo.callbacks import LastCheckpoint
from lit_dpo.cli import main
from lit_dpo.stepwise import fit_stepwise
from tests import runs

pytestmark = [*runs.QUIET, pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning.pytorch.cli")]
ROOT = Path(__file__).parents[1]
PROMPTS = ["Tell me about tea.", [{"role": "user", "content": "And rain?"}], "Number 7?", "Tell me about tea."]
WANTED = ["prompt", "chosen", "rejected"]


class LongerIsBetter(Partition):
    """First the pool, then as many steps of pairs of its own samples, the longer one chosen."""

    def __init__(self, asked=None, steps=3):
        self.asked, self.steps = asked, steps

    def next(self, step, pool):
        if self.asked is not None:
            with self.asked.open("a") as file:
                file.write(f"{step}\n")
        if step == 0:
            return torch.arange(pool.rows)
        if step == self.steps:
            return None
        found = pool.sample(PROMPTS, samples=3, max_new_tokens=6, seed=5, batch_size=2)
        rows = []
        for prompt, completions in zip(PROMPTS, found, strict=True):
            short, *_, long = sorted(
                {f"{text} {n}" for n, text in enumerate(completions)}, key=lambda text: (len(text), text)
            )
            if isinstance(prompt, str):
                rows.append({"prompt": prompt, "chosen": long, "rejected": short})
            else:
                sides = {"chosen": long, "rejected": short}
                rows.append({k: [*prompt, {"role": "assistant", "content": v}] for k, v in sides.items()})
        return rows


class Kill(LastCheckpoint):
    """End the process at once when step 1 is under way: before its first batch, or after its first checkpoint."""

    moment = None

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        step = Path(trainer.default_root_dir).name
        if (self.moment, step, batch_idx) in {("first", "partition_1", 0), ("later", "partition_1", 1)}:
            os.kill(os.getpid(), signal.SIGKILL)


def train(folder, resume=False, partition=None, **options):
    """Train through the steps; returns the module, and a file of the steps that the partition was asked about."""
    module = runs.module(lr=1e-2, optimizer=torch.optim.AdamW)
    asked = folder.with_name(f"{folder.name}.asked")
    data = runs.data(
        runs.rows(6), partition=partition or LongerIsBetter(asked), batch_size=2, validation=runs.rows(3, start=20)
    )
    data.allow_changes = options.pop("allow_changes", False)

    def make_trainer(root):
        callbacks = [Kill(every_n_steps=1)]
        return runs.trainer(root, callbacks=callbacks, max_epochs=1, enable_checkpointing=True, **options)

    fit_stepwise(module, data, make_trainer, folder, resume)
    return module, asked


def asked_about(path):
    return [int(line) for line in path.read_text().split()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("new_pairs") / "whole"
    return folder, *train(folder)


def test_a_step_trains_on_the_pairs_that_stand_in_its_file(whole):
    folder, _, asked = whole
    assert asked_about(asked) == [0, 1, 2, 3]
    assert sorted(path.name for path in folder.iterdir()) == ["partition_0", "partition_1", "partition_2"]
    assert not (folder / "partition_0" / "pairs.jsonl").exists()
    for step in (1, 2):
        root = folder / f"partition_{step}"
        rows = [json.loads(line) for line in (root / "pairs.jsonl").read_text().splitlines()]
        assert [row.get("prompt", row["chosen"][:-1]) for row in rows] == PROMPTS
        assert [json.loads((root / "pairs.jsonl.json").read_text())["sha256"]] == [
            json.loads((root / "DONE").read_text())["pairs"]
        ]
        # The oracle: plain training on that file, from the export before.
        plain = runs.module(str(folder / f"partition_{step - 1}" / "export"), lr=1e-2, optimizer=torch.optim.AdamW)
        validation = runs.rows(3, start=20)
        runs.fit(plain, runs.data(str(root / "pairs.jsonl"), batch_size=2, validation=validation), max_epochs=1)
        exported = runs.module(str(root / "export"))
        exported.configure_model()
        assert runs.same(runs.weights(plain.policy), runs.weights(exported.policy))


def test_samples_are_those_of_the_policy_that_starts_the_step_and_repeat(tmp_path):
    """Greedy ones as the exported model itself gives them; drawn ones the same whenever they are asked for."""
    found, prompts = {}, [row["prompt"][: 6 + n] for n, row in enumerate(runs.rows(16))]

    class Asking(Partition):
        def next(self, step, pool):
            if step == 2:
                found["greedy"] = pool.sample(prompts, temperature=0.0, max_new_tokens=5, batch_size=4)
                found["drawn"] = [pool.sample(PROMPTS, 2, max_new_tokens=5, seed=seed) for seed in (0, 0, 1)]
                return None
            return torch.arange(4)

    train(tmp_path / "run", partition=Asking())
    model = runs.module(str(tmp_path / "run" / "partition_1" / "export"))
    model.configure_model()
    for prompt, (completion,) in zip(prompts, found["greedy"], strict=True):
        ids = model.tokenizer(prompt, return_tensors="pt").input_ids
        for _ in range(5):  # the oracle: one whole forward pass a token, up to the end
            if ids[0, -1] != model.tokenizer.eos_token_id:
                with torch.no_grad():
                    ids = torch.cat([ids, model.policy.eval()(ids).logits[:, -1].argmax(-1, keepdim=True)], 1)
        assert completion == model.tokenizer.decode(ids[0], skip_special_tokens=True).removeprefix(prompt)
    assert any(completion for (completion,) in found["greedy"])
    first, second, other = found["drawn"]
    assert first == second != other
    assert [len(completions) for completions in first] == [2, 2, 2, 2]
    assert first[0] != first[3]  # the same prompt elsewhere


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["first", "later"])
def test_a_killed_step_goes_on_with_the_pairs_that_it_has_written(whole, tmp_path, moment):
    """A real process, SIGKILL, between the file and the end of the step."""
    folder = tmp_path / "run"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "tests.test_new_pairs", str(folder), moment]
    killed = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    assert (folder / "partition_1" / "pairs.jsonl").read_bytes() == (
        whole[0] / "partition_1" / "pairs.jsonl"
    ).read_bytes()
    assert not (folder / "partition_1" / "DONE").exists()
    module, asked = train(folder, resume=True)
    assert asked_about(asked)[2:] == [0, 2, 3]  # after 0 and 1 of the first process: never again about step 1
    assert runs.same(runs.weights(module.policy), runs.weights(whole[1].policy))


def without(run, step, folder):
    """A copy of a run that was stopped before it noted that a step is done, and lost all that came after."""
    shutil.copytree(run, folder)
    (folder / f"partition_{step}" / "DONE").unlink()
    shutil.rmtree(folder / f"partition_{step}" / "export")
    for later in range(step + 1, 3):
        shutil.rmtree(folder / f"partition_{later}")
    return folder


@pytest.mark.parametrize("done", [pytest.param(True, marks=pytest.mark.slow), False], ids=["done", "under way"])
def test_a_changed_file_is_refused(whole, tmp_path, done):
    """Also where no checkpoint of the step tells of its rows; nothing is written over."""
    folder = without(whole[0], 1 if not done else 2, tmp_path / "run")
    path = folder / "partition_1" / "pairs.jsonl"
    for checkpoint in folder.glob("partition_1/**/*.ckpt") if not done else ():
        checkpoint.unlink()
    path.write_text(path.read_text().replace("Number 7?", "Number 8?"))
    changed = path.read_bytes()
    with pytest.raises(
        ValueError, match=r"partition_1/pairs.jsonl` is not as the run has written it: restore it, or add"
    ):
        train(folder, resume=True)
    assert path.read_bytes() == changed
    assert train(folder, resume=True, allow_changes=True)
    assert path.read_bytes() == changed


def test_a_file_of_somebody_elses_is_neither_trained_on_nor_written_over(tmp_path):
    """One that stands in the step's folder without the digest that the run writes with it."""
    path = tmp_path / "run" / "partition_0" / "pairs.jsonl"
    path.parent.mkdir(parents=True)
    runs.write(path, runs.rows(4))
    mine = path.read_bytes()
    with pytest.raises(ValueError, match="is not as the run has written it"):
        train(tmp_path / "run", resume=True)
    assert path.read_bytes() == mine


class Answers(Partition):
    def __init__(self, answer):
        self.answer = answer

    def next(self, step, pool):
        return self.answer if step == 0 else None


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (None, "The partition has no first step"),
        ([], "must give row numbers as a tensor, a list of new pairs, or `None`, and gave a list for step 0"),
        ("pairs.jsonl", "and gave a str for step 0"),
        ([1, 2], "new pairs are dictionaries"),
        ([{"prompt": "a", "chosen": "b", "rejected": {1}}], "A new pair of step 0 holds no plain value"),
        ([{"prompt": "a", "chosen": " b", "rejected": " b"}], "new pairs of step 0, row 1, column `rejected`"),
        (torch.tensor([6]), "at least one row number of the pool, from 0 to 5"),
    ],
    ids=lambda value: str(value)[:20] if isinstance(value, str) else "",
)
def test_an_answer_that_is_none_is_refused_and_leaves_nothing(tmp_path, answer, message):
    with pytest.raises(ValueError, match=message):
        train(tmp_path / "run", partition=Answers(answer))
    assert not (tmp_path / "run").exists()


def test_margins_are_scored_once_and_kept(tmp_path):
    """Of the policy that starts the step, and of an earlier one; a resumed run and another pool know which they are."""
    seen = []

    class Noting(Partition):
        def next(self, step, pool):
            seen.append((step, pool.margins(), pool.margins(0)))
            if step == 1:
                with pytest.raises(ValueError, match="Step 1 knows no margins of step 2"):
                    pool.margins(2)
            return torch.arange(3) if step < 2 else None

    train(tmp_path / "run", partition=Noting())
    (_, first, _), (_, second, again), _ = seen
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    assert first.shape == (6,)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").glob("partition_*/margins/*")}
    assert len(times) == 2 * 3
    before = list(seen)
    train(tmp_path / "run", partition=Noting(), resume=True)
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert all(
        torch.equal(a, b)
        for one, two in zip(before, seen[3:], strict=True)
        for a, b in zip(one[1:], two[1:], strict=True)
    )


def test_a_pool_that_is_made_by_hand_serves_a_partition_too():
    pool = Pool(
        ["a"] * 4, generate=lambda prompts, samples, *rest: [[f"{n}" * (n + 1) for n in range(samples)]] * len(prompts)
    )
    rows = LongerIsBetter().next(1, pool)
    assert [set(row) for row in rows] == [{*WANTED}, {"chosen", "rejected"}, {*WANTED}, {*WANTED}]
    assert rows[0]["chosen"] == "222 2"


THEIRS = """
from lit_dpo import Partition

class Rounds(Partition):
    def __init__(self, prompts: list[str], rounds: int = 1):
        self.prompts, self.rounds = prompts, rounds

    def next(self, step, pool):
        if step == self.rounds:
            return None
        found = pool.sample(self.prompts, max_new_tokens=8)
        return [{"prompt": p, "chosen": c + ".", "rejected": c} for p, (c,) in zip(self.prompts, found)]
"""


@pytest.mark.slow
def test_the_command_line_takes_a_partition_of_ones_own(tmp_path, monkeypatch, capsys):
    (tmp_path / "their_rounds.py").write_text(THEIRS)
    monkeypatch.syspath_prepend(tmp_path)
    configs = ["--config", str(ROOT / "configs" / "dpo.yaml"), "--config", str(ROOT / "tests" / "conf" / "tiny.yaml")]
    words = ["fit", *configs, "--trainer.default_root_dir", str(tmp_path / "run"), "--allow-import", "their_rounds"]
    words += ["--data.partition", "their_rounds.Rounds", "--data.partition.prompts", "[Tell me of tea., And of rain.]"]
    main(words)
    run = tmp_path / "run" / "version_0"
    rows = [json.loads(line) for line in (run / "partition_0" / "pairs.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["Tell me of tea.", "And of rain."]
    assert sorted(path.name for path in run.iterdir()) == ["config.yaml", "partition_0"]
    main([*words, "--ckpt_path", "last"])
    rows[0]["chosen"] = " Never said."
    runs.write(run / "partition_0" / "pairs.jsonl", rows)
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        main([*words, "--ckpt_path", "last"])
    assert "is not as the run has written it: restore it, or add --allow-changes" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_share_the_prompts_and_find_what_one_finds(tmp_path):
    folder = tmp_path / "run"
    runs.launch(["tests.test_new_pairs", str(folder), "never", "2"])
    path = folder / "partition_1" / "pairs.jsonl"
    together = path.read_bytes()
    for step in (1, 2):
        shutil.rmtree(folder / f"partition_{step}")
    train(folder, resume=True)
    assert path.read_bytes() == together


if __name__ == "__main__":
    torch.set_num_threads(1)
    Kill.moment = sys.argv[2]
    train(Path(sys.argv[1]), **({"strategy": "ddp", "devices": 2} if sys.argv[3:] else {}))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
        sys.stdout.flush()
        os._exit(0)  # a plain exit aborts now and then, when all is done
