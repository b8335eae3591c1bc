"""A run that was stopped, at any moment and in any way, goes on as if it had never been."""

import json
import os
import pty
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from itertools import chain
from pathlib import Path

import pytest
import torch
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch import Callback
from transformers import AutoModelForCausalLM

from lit_dpo.callbacks import BestCheckpoint, LastCheckpoint, Stopped
from lit_dpo.data.sampler import PairSampler
from lit_dpo.export import export_checkpoint
from lit_dpo.resume import rescale, seeded
from tests import interrupted, runs

pytestmark = [*runs.QUIET, pytest.mark.filterwarnings("ignore:.*val_check_interval")]
ROOT = Path(__file__).parents[1]


class Copies(Callback):
    """Keep every last checkpoint that a run ever had."""

    def __init__(self, folder):
        self.folder = folder

    def keep(self, trainer):
        path = Path(trainer.default_root_dir, "checkpoints", "last.ckpt")
        if path.exists():
            for file in (path, path.with_name("last.ckpt.json")):
                shutil.copy(file, self.folder / file.name.replace("last", f"step_{trainer.global_step:03d}"))

    def on_train_batch_start(self, trainer, *args):
        self.keep(trainer)  # what was saved after the batch before, and after its validation

    def on_train_end(self, trainer, *args):
        self.keep(trainer)


def batches(entries):
    return [entry for entry in entries if "rows" in entry]


CASES = {
    "plain": {},
    "accumulation": {"accumulate": 2, "batch_size": 2},
    "workers": {"workers": 2},
    "lora with dropout": {"lora": True},
    "cached reference": {"cached": True},
    "synced reference": {"synced": True},
    "synced reference beside adapters": {"synced": True, "lora": True, "accumulate": 2, "batch_size": 2},
    "validation within an accumulation": {"accumulate": 4, "batch_size": 1, "val_every": 6},
}
# Slow: all but one, since each resumes a run again and again.
LONG = set(CASES) - {"cached reference"}
EVERY_STEP = ("plain", "synced reference beside adapters")


@pytest.mark.parametrize("case", [pytest.param(c, marks=pytest.mark.slow) if c in LONG else c for c in CASES])
def test_resuming_at_every_step_is_exact(tmp_path, case):
    """Rows, losses, learning rates, logged metrics and weights are the same to the last bit, from every checkpoint."""
    options = {"file": runs.pairs_file(tmp_path, 25), **CASES[case]}
    whole, kept = tmp_path / "whole", tmp_path / "kept"
    kept.mkdir(), whole.mkdir()
    module, data, callbacks = interrupted.parts(whole, options)
    run = interrupted.trainer(whole, [Copies(kept), *callbacks], options)
    run.fit(module, data)
    expected, weights = interrupted.entries(whole / "log.jsonl"), runs.weights(module.policy)
    copies = sorted(kept.glob("*.ckpt"))
    assert len(copies) == run.global_step >= 10
    (whole / "log.jsonl").unlink()
    for copy in copies if case in EVERY_STEP else copies[::3]:
        again = interrupted.train(whole, options, copy)
        found = interrupted.entries(whole / "log.jsonl") if (whole / "log.jsonl").exists() else []
        assert found == expected[len(expected) - len(found) :], copy.stem
        done = torch.load(copy, weights_only=True)["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["ready"]
        assert len(batches(found)) == len(batches(expected)) - done
        assert runs.same(runs.weights(again.policy), weights), copy.stem
        (whole / "log.jsonl").unlink(missing_ok=True)


class CrashError(Exception):
    """Of a run, at a moment of its own."""


class Crash(Callback):
    """Raise at the n-th of these moments."""

    def __init__(self, number, moment):
        self.left = number
        setattr(self, moment, self.hit)

    def hit(self, *args, **kwargs):
        self.left -= 1
        if self.left == 0:
            raise CrashError


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12))
def test_resuming_again_and_again_is_exact(tmp_path, seed):
    """A resumed run that crashes resumes as well; epochs end in half a step, which Lightning's own counters muddle."""
    options = {"file": runs.pairs_file(tmp_path, 19), "accumulate": 2, "batch_size": 2, "epochs": 4}
    whole, folder, draw = tmp_path / "whole", tmp_path / "run", random.Random(seed)
    whole.mkdir()
    weights = runs.weights(interrupted.train(whole, options).policy)
    folder.mkdir()
    moments = ["on_train_batch_start", "on_train_batch_end", "on_validation_start", "on_validation_end"]
    crashes = 0
    while True:
        module, data, callbacks = interrupted.parts(folder, options)
        callbacks.insert(3, Crash(draw.randrange(1, 12 + 4 * crashes), draw.choice(moments)))
        try:
            run = interrupted.trainer(folder, callbacks, options)
            run.fit(module, data, ckpt_path=interrupted.last_of(folder, options))
            break
        except CrashError:
            crashes += 1
    assert crashes >= 1
    assert interrupted.contradictions(folder / "log.jsonl") == []
    assert interrupted.entries(folder / "log.jsonl") == interrupted.entries(whole / "log.jsonl")
    assert runs.same(runs.weights(module.policy), weights)


@pytest.mark.parametrize("every", [6, pytest.param(1, marks=pytest.mark.slow)])
def test_a_partition_resumes_at_every_step(tmp_path, every):
    """Stopped after any batch of any partition, or between two, stepwise training ends with the same policy."""
    options = {"file": runs.pairs_file(tmp_path, 25), "stepwise": True, "epochs": 1, "val_every": 2}
    whole = tmp_path / "whole"
    whole.mkdir()
    weights = runs.weights(interrupted.train(whole, options).policy)
    expected = interrupted.entries(whole / "log.jsonl")
    assert {entry["partition"] for entry in expected} == {0, 1}

    def crash(count):
        def on_train_batch_end(self, *args):
            original(self, *args)
            left.append(1)
            if len(left) == count:
                raise CrashError

        original, left = interrupted.Log.on_train_batch_end, []
        return on_train_batch_end, original

    for count in range(1, len(batches(expected)) + 1, every):
        folder = tmp_path / f"crash_{count}"
        folder.mkdir()
        interrupted.Log.on_train_batch_end, original = crash(count)
        try:
            with pytest.raises(CrashError):
                interrupted.train(folder, options)
        finally:
            interrupted.Log.on_train_batch_end = original
        again = interrupted.train(folder, options, resume=True)
        assert interrupted.contradictions(folder / "log.jsonl") == []
        assert interrupted.entries(folder / "log.jsonl") == expected
        assert runs.same(runs.weights(again.policy), weights)


def test_done_partitions_of_other_rows_are_refused(tmp_path):
    options = {"file": runs.pairs_file(tmp_path, 25), "stepwise": True, "epochs": 1, "val_every": 2}
    folder = tmp_path / "run"
    folder.mkdir()
    interrupted.train(folder, options)
    original, options["file"] = options["file"], runs.pairs_file(tmp_path, 20, "other.jsonl")
    with pytest.raises(ValueError, match=r"differ from those of `.*partition_0` \(5 removed\)"):
        interrupted.train(folder, options, resume=True)
    mark = folder / "steps" / "partition_0" / "DONE"
    rows = json.loads(mark.read_text())["rows"]
    mark.write_text(json.dumps({"rows": rows[1:]}))  # as version 0.1.0 wrote it, with other rows
    with pytest.raises(ValueError, match="partition_0` was trained on other rows"):
        interrupted.train(folder, {**options, "file": original}, resume=True)
    mark.write_text(json.dumps({"rows": rows}))
    assert interrupted.train(folder, {**options, "file": original}, resume=True)


# -- processes that are killed ----------------------------------------------------------------------------------------


def start(folder, options, **environment):
    command = [sys.executable, "-m", "tests.interrupted", str(folder), json.dumps(options)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A run of many steps, its log and its weights."""
    folder = tmp_path_factory.mktemp("undisturbed")
    options = {"file": runs.pairs_file(folder, 41), "accumulate": 2, "batch_size": 2, "epochs": 6, "cached": True}
    module = interrupted.train(folder, options)
    return options, interrupted.entries(folder / "log.jsonl"), runs.weights(module.policy)


@pytest.mark.slow
@pytest.mark.parametrize("planned", [1, 8])
def test_an_end_at_random_moments_loses_nothing(tmp_path, undisturbed, planned):
    options, expected, weights = undisturbed
    folder, draw, kills = tmp_path / "run", random.Random(planned), 0
    while True:
        have = len((folder / "log.jsonl").read_text().splitlines()) if (folder / "log.jsonl").exists() else 0
        die = {"die": [have + draw.randrange(3, 100 // planned), draw.uniform(0.001, 0.05)]} if kills < planned else {}
        _, err = (process := start(folder, {**options, **die})).communicate(timeout=120)
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGALRM, err[-3000:]
        kills += 1
    assert kills == planned
    assert interrupted.contradictions(folder / "log.jsonl") == []
    assert interrupted.entries(folder / "log.jsonl") == expected
    assert runs.same(torch.load(folder / "weights.pt", weights_only=True), weights)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_exits_with_its_status(tmp_path, undisturbed, number, code):
    options, expected, weights = undisturbed
    options = {**options, "every": 1000}  # what is saved is saved because of the signal
    folder = tmp_path / "run"
    process = start(folder, {**options, "hold": 8})
    assert [process.stdout.readline() for _ in "rw"] == ["ready\n", "waiting\n"]
    process.send_signal(number)
    _, err = process.communicate("go on\n", timeout=60)
    assert process.returncode == code, err[-3000:]
    assert len(batches(interrupted.entries(folder / "log.jsonl"))) == 10  # the two batches of the step under way
    state = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert state["global_step"] == 5  # nothing done was lost
    process = start(folder, options)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err[-3000:]
    assert len((folder / "log.jsonl").read_text().splitlines()) == len(expected)  # and nothing done twice
    assert interrupted.entries(folder / "log.jsonl") == expected
    assert runs.same(torch.load(folder / "weights.pt", weights_only=True), weights)


@pytest.mark.every(2)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGHUP, 129), (signal.SIGUSR1, 138)])
def test_other_signals_save_and_exit_as_sigterm_does(tmp_path, number, code):
    """A terminal that is closed, and what Slurm is often told to send before a job's time is up."""
    options = {"file": runs.pairs_file(tmp_path, 25), "every": 1000}
    whole, folder = tmp_path / "whole", tmp_path / "run"
    whole.mkdir(), folder.mkdir()
    weights = runs.weights(interrupted.train(whole, options).policy)
    module, data, callbacks = interrupted.parts(folder, options)
    with pytest.raises(Stopped) as stopped:
        interrupted.trainer(folder, [*callbacks, interrupted.Terminate(3, number)], options).fit(module, data)
    assert (stopped.value.code, stopped.value.name, stopped.value.step) == (code, number.name, 4)
    assert signal.getsignal(number) == signal.SIG_DFL
    again = interrupted.train(folder, options, interrupted.last_of(folder, options))
    assert interrupted.contradictions(folder / "log.jsonl") == []
    assert interrupted.entries(folder / "log.jsonl") == interrupted.entries(whole / "log.jsonl")
    assert runs.same(runs.weights(again.policy), weights)


def test_a_signal_that_is_ignored_or_handled_already_is_left_alone(tmp_path):
    """As under ``nohup``, and with a tool that listens for SIGUSR1."""
    heard = []
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN), signal.signal(signal.SIGUSR1, lambda *_: heard.append(1))
    try:
        options = {"file": runs.pairs_file(tmp_path, 12), "epochs": 1}
        module, data, callbacks = interrupted.parts(tmp_path, options)
        callbacks += [interrupted.Terminate(n, number) for n, number in ((0, signal.SIGHUP), (1, signal.SIGUSR1))]
        run = interrupted.trainer(tmp_path, callbacks, options)
        run.fit(module, data)
        assert (run.global_step, heard) == (3, [1])
    finally:
        signal.signal(signal.SIGHUP, before[0])
        signal.signal(signal.SIGUSR1, before[1])


@pytest.mark.every(3)
@pytest.mark.parametrize("moment", ["on_sanity_check_start", "on_sanity_check_end", "on_train_end"])
def test_lightnings_own_signal_handlers_are_never_there(tmp_path, moment):
    """They exchange messages from within the handler: a SIGTERM to one process of several could hang all."""
    found = []

    class Look(Callback):
        pass

    def look(self, trainer, *args):
        found.extend(signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1))

    setattr(Look, moment, look)
    last = LastCheckpoint()
    plugins = SLURMEnvironment(auto_requeue=True)
    run = runs.trainer(
        tmp_path, callbacks=[Look(), last], max_epochs=1, num_sanity_val_steps=1, enable_checkpointing=True,
        plugins=plugins,
    )  # fmt: skip
    run.fit(runs.module(), runs.data(runs.pairs_file(tmp_path, 12)))
    assert len(found) == 2
    assert all(handler in (signal.SIG_DFL, last._note) for handler in found)


@pytest.mark.slow
def test_a_terminal_that_is_closed_ends_the_run_saved(tmp_path):
    """The progress bar cannot be written to it any more, which must not be what ends the run."""
    leader, follower = pty.openpty()
    command = [
        "fit", "-c", "configs/dpo.yaml", "-c", "tests/conf/tiny.yaml", "-c", "tests/conf/endless.yaml",
        "--trainer.default_root_dir", str(tmp_path), "--trainer.enable_progress_bar", "true",
    ]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-c", f"import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
         f"from lit_dpo.cli import main; main({command})"],
        cwd=ROOT, stdin=follower, stdout=follower, stderr=follower, start_new_session=True,
    )  # fmt: skip
    os.close(follower)
    threading.Thread(target=drain, args=[leader], daemon=True).start()
    metrics, end = tmp_path / "version_0" / "metrics.csv", time.monotonic() + 60
    while time.monotonic() < end and not (metrics.exists() and metrics.read_text().count("\n") > 5):
        time.sleep(0.05)
    os.close(leader)
    try:
        assert process.wait(60) == 129
    finally:
        process.kill()
    assert (tmp_path / "version_0" / "checkpoints" / "last.ckpt").exists()


def drain(terminal):
    """Read what is written to a terminal, as somebody who looks at it does."""
    with suppress(OSError):
        while os.read(terminal, 4096):
            pass


# -- several processes ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "shards"])
def test_two_processes_stop_together_and_resume_exactly(tmp_path, strategy):
    """One of them gets the signal; and the same checkpoint goes on with one process, the same rows in each step."""
    options = {"file": runs.pairs_file(tmp_path, 25), "batch_size": 2, "strategy": strategy, "devices": 2}
    options["shards"] = strategy == "shards"
    whole, broken, copy = (tmp_path / name for name in ("whole", "broken", "copy"))
    runs.launch(["tests.interrupted", str(whole), json.dumps(options)])
    runs.launch(["tests.interrupted", str(broken), json.dumps({**options, "every": 1000, "terminate": 4})], code=143)
    assert len(batches(interrupted.entries(broken / "log.jsonl"))) == 5
    shutil.copytree(broken, copy)
    runs.launch(["tests.interrupted", str(broken), json.dumps(options)])
    logs = ("log.jsonl", "log_1.jsonl")
    expected = [interrupted.entries(whole / name) for name in logs]
    assert [interrupted.entries(broken / name) for name in logs] == expected
    weights = torch.load(whole / "weights.pt", weights_only=True)
    assert runs.same(torch.load(broken / "weights.pt", weights_only=True), weights)

    last = broken / "checkpoints" / "last.ckpt"
    assert last.is_dir() == options["shards"]
    exported = AutoModelForCausalLM.from_pretrained(export_checkpoint(str(last), str(tmp_path / "export")))
    assert runs.same(runs.weights(exported), weights)
    if options["shards"]:
        return  # a single process does not read them; `lit-dpo export` does

    shutil.rmtree(broken)
    copy.rename(broken)  # the folder is part of what a checkpoint callback remembers
    options |= {"strategy": "auto", "devices": 1, "accumulate": 2, "val_every": 6}
    module = interrupted.train(broken, options, interrupted.last_of(broken, {}))
    expected = [batches(entries)[5:] for entries in expected]
    found = batches(interrupted.entries(broken / "log.jsonl"))[5:]
    steps = [sorted(first["rows"] + second["rows"]) for first, second in zip(found[::2], found[1::2], strict=True)]
    assert steps == [sorted(a["rows"] + b["rows"]) for a, b in zip(*expected, strict=True)]
    torch.testing.assert_close(runs.weights(module.policy), weights, rtol=0, atol=1e-4)


# -- another number of processes --------------------------------------------------------------------------------------


def rows_by_step(rows, world, batch_size, accumulate, start=0):
    """The rows of each optimizer step over all processes, from a batch on."""

    class Lengths:
        def __init__(self, count):
            self.lengths = torch.arange(3 * count).reshape(count, 3) % 7 + 1

        def __len__(self):
            return len(self.lengths)

    found = []
    for rank in range(world):
        sampler = PairSampler(Lengths(rows), torch.arange(rows), batch_size, True, 0, accumulate, world, rank)
        sampler.start = start
        plans = list(sampler)
        assert len(plans) == len(sampler) - start
        assert list(sampler) == list(sampler)  # `start` counts once
        real = [[r for i, r in enumerate(p.rows) if p.weights is None or p.weights[i]] for p in plans]
        found.append([list(chain(*real[i : i + accumulate])) for i in range(0, len(real), accumulate)])
    return [sorted(chain(*parts)) for parts in zip(*found, strict=True)]


@pytest.mark.parametrize("rows", [24, 27, 30])
def test_the_order_of_rows_survives_another_number_of_processes(rows):
    one = rows_by_step(rows, 1, 4, 2)
    for world, size, accumulate in ((2, 4, 1), (2, 2, 2), (4, 2, 1), (1, 2, 4)):
        assert rows_by_step(rows, world, size, accumulate) == one
        layout = {"pairs_per_step": 8, "accumulate": 2, "batches": -(-rows // 4)}
        batches = rows // 8 * accumulate + -(-(rows % 8) // (size * world))
        new = {"pairs_per_step": 8, "accumulate": accumulate, "batches": batches}
        for steps in range(1, rows // 8 + 1):
            done = dict.fromkeys(("ready", "started", "processed", "completed"), layout["batches"] * 3 + 2 * steps)
            current = dict.fromkeys(done, 2 * steps)
            loops = {"fit_loop": {"epoch_loop.batch_progress": {"total": done, "current": current}}}
            rescale(loops, layout, new)
            assert current["completed"] == steps * accumulate
            assert done["completed"] == batches * 3 + steps * accumulate
            assert rows_by_step(rows, world, size, accumulate, current["completed"]) == one[steps:]


def test_another_number_of_pairs_a_step_is_refused():
    old, new = {"pairs_per_step": 8}, {"pairs_per_step": 16}
    with pytest.raises(ValueError, match="8 pairs an optimizer step and this run has 16: change `batch_size`"):
        rescale({}, old, new)


# -- smaller things ---------------------------------------------------------------------------------------------------


def test_random_numbers_depend_on_their_seeds_alone_and_leave_the_others_be():
    before = torch.get_rng_state()
    draws = []
    for numbers in ((0, 1, 2), (0, 1, 2), (0, 2, 1), (1, 1, 2)):
        with seeded(torch.device("cpu"), *numbers):
            draws.append(torch.rand(4))
        torch.rand(3)
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[0], draws[3])
    torch.set_rng_state(before)
    with seeded(torch.device("cpu"), 1):
        torch.rand(9)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_handlers_are_given_back(tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    options = {"file": runs.pairs_file(tmp_path, 12), "epochs": 1}
    interrupted.train(tmp_path, options)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_a_folder_that_cannot_be_written_to_stops_the_run_at_its_start(tmp_path):
    (tmp_path / "file").touch()
    run = runs.trainer(
        tmp_path, callbacks=[LastCheckpoint(dirpath=str(tmp_path / "file" / "x"))], max_epochs=1,
        enable_checkpointing=True,
    )  # fmt: skip
    module = runs.module()
    with pytest.raises(OSError, match="cannot be written to"):
        run.fit(module, runs.data(runs.pairs_file(tmp_path)))
    assert run.global_step == 0


def test_a_run_that_is_made_longer_goes_on_learning(tmp_path):
    """The schedule's length is the new run's, not the checkpoint's, at whose end the learning rate is zero."""
    options = {"file": runs.pairs_file(tmp_path, 12), "epochs": 1}
    interrupted.train(tmp_path, options)
    module = interrupted.train(tmp_path, {**options, "epochs": 2}, interrupted.last_of(tmp_path, options))
    rates = [float.fromhex(entry["lr"]) for entry in batches(interrupted.entries(tmp_path / "log.jsonl"))]
    assert len(rates) == 6
    assert rates[2] == 0
    assert rates[3] > rates[4] > rates[5] == 0
    assert module.lr_schedulers().total_steps == 6


def test_what_comes_after_it_in_the_list_is_in_it_too(tmp_path):
    best = BestCheckpoint()
    run = runs.trainer(tmp_path, callbacks=[LastCheckpoint(), best], max_epochs=2, enable_checkpointing=True)
    run.fit(runs.module(lr=0.1), runs.data(runs.pairs_file(tmp_path, 12)))
    assert run.checkpoint_callback is best
    state = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["callbacks"]
    assert best.state_dict()["best_model_path"] in str(state)


def test_every_n_steps_is_checked():
    with pytest.raises(ValueError, match="`every_n_steps` must be at least 1, got 0"):
        LastCheckpoint(every_n_steps=0)
