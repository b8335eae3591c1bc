"""`lit-dpo check`, as a person calls it: what it finds, what it promises, and that it leaves nothing behind."""

import csv
import math
import re
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from lightning.pytorch import Trainer

from lit_dpo import BySource, EasyToHard, OnPolicy, RandomSplit, Verifier
from lit_dpo.checkpoints.io import DurableCheckpointIO
from lit_dpo.cli import main
from lit_dpo.models import load_model
from lit_dpo.module import PreferenceModule
from lit_dpo.tokenizers import quickstart_tokenizer
from lit_dpo.tools.check import check
from lit_dpo.tools.plan import rows_of_steps
from tests import runs
from tests.test_cli import built, quick  # noqa: F401 - fixtures
from tests.test_rounds import is_right

pytestmark = [
    *runs.QUIET,
    pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning.pytorch.cli"),
    pytest.mark.usefixtures("quick"),
]

TINY = str(Path(__file__).parents[1] / "conf" / "tiny.yaml")

MIDDLE = "{model_type: llama, hidden_size: 256, intermediate_size: 512, num_hidden_layers: 8, num_attention_heads: 4}"


def checked(capsys, *words, config=("--config", "dpo", "--config", TINY)):
    """The exit status of `check`, and its lines."""
    status = 0
    try:
        main(["check", *config, *map(str, words)])
    except SystemExit as stop:
        status = stop.code
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    return status, said.out.splitlines()


def everything(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder with a run and a file of somebody's where a fit would write."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.setattr("lit_dpo.tools.measured._PASSES", 1)  # times are of no matter here
    (tmp_path / "runs/dpo/version_0/checkpoints").mkdir(parents=True)
    (tmp_path / "runs/dpo/.lit-dpo-check-0").mkdir()
    files = ["version_0/checkpoints/last.ckpt", "version_0/config.yaml", "last.ckpt", ".lit-dpo-check-0/last.ckpt"]
    for name in ["predictions.jsonl", *(f"runs/dpo/{file}" for file in files)]:
        (tmp_path / name).write_text("somebody's own")
    return tmp_path


@pytest.mark.slow
def test_all_steps_of_stepwise_training_are_counted(here, capsys, monkeypatch):
    """Each has validations and checkpoints of its own, and a last optimizer step of fewer rows, and all stay."""
    files = [runs.pairs_file(here, count, f"{count}.jsonl", start=100 * count) for count in (30, 11)]
    words = ["--data.train", str(files).replace("'", '"'), "--data.batch_size", 2, "--trainer.max_steps", -1]
    words += ["--trainer.val_check_interval", "0.5", "--trainer.num_sanity_val_steps", 1, "--data.validation", files[1]]
    words += ["--model.optimizer.lr", "0"]  # so that none is the best, and early stopping ends nothing
    config = ("--config", "sdpo", "--config", TINY, "--trainer.callbacks", "[BestCheckpoint]")
    _, lines = checked(capsys, *words, config=config)
    [found] = [line for line in lines if "steps:" in line]
    assert found == "fine     steps: `BySource` makes 2, each of 11 to 30 pairs; the estimates are for all"
    [line] = [line for line in lines if line.startswith("estimate time")]
    saved, save = [], Trainer.save_checkpoint
    monkeypatch.setattr(Trainer, "save_checkpoint", lambda *args, **options: saved.append(save(*args, **options)))
    main(["fit", *config, *map(str, words), "--trainer.default_root_dir", "out"])
    parts = sorted((here / "out/version_0").glob("partition_*"))
    logged = [list(csv.DictReader((part / "version_0/metrics.csv").read_text().splitlines())) for part in parts]
    steps = sum(1 + max(int(row["step"]) for row in rows if row["train/loss"]) for rows in logged)
    validations = sum(bool(row["val/loss"]) for rows in logged for row in rows)
    assert (len(parts), steps, validations) == (2, 6, 4)
    assert f" {steps} steps;" in line
    assert f"for {validations} validations" in line
    assert f" s for up to {len(saved) + validations} checkpoints" in line
    sizes = [path.stat().st_size for path in here.glob("out/version_0/**/*.ckpt")]
    assert len(sizes) == 4  # none is a best one
    [disk] = [line for line in lines if "disk:" in line]
    one = float(re.search(r"checkpoints of ([\d.]+) GiB", disk)[1]) * 2**30
    assert one == pytest.approx(max(sizes), rel=0.2)
    assert float(re.search(r"disk: ([\d.]+) GiB", disk)[1]) * 2**30 == pytest.approx(7.66 * one, rel=0.05)
    assert "(the last two and 1 of the best of each of 2 steps, and one being written) and 2 exports" in disk


def test_steps_are_known_where_the_rows_alone_decide():
    def known(partition):
        return [rows.tolist() for rows in rows_of_steps(partition, ["a", "b", "a"])]

    assert known(BySource(["b", "a"])) == [[1], [0, 2]]
    assert [len(rows) for rows in known(RandomSplit(2))] == [2, 1]
    for asking in (EasyToHard(), OnPolicy("missing.jsonl", Verifier(is_right))):
        assert rows_of_steps(asking, ["a", "b"]) is None
    with pytest.raises(ValueError, match="`order` names x"):
        known(BySource(["x"]))


@pytest.mark.slow
def test_steps_that_ask_the_policy_are_told_from_others(here, capsys):
    """And what stepwise training refuses is refused."""
    config = ("--config", "sdpo", "--config", TINY)
    _, lines = checked(capsys, "--data.partition", "EasyToHard", config=config)
    [found] = [line for line in lines if "steps:" in line]
    assert found.startswith("estimate steps: `EasyToHard` divides or makes the pairs as training goes on")
    status, lines = checked(
        capsys, "--model.reference", "{class_path: FrozenReference, init_args: {model: a/b}}", config=config
    )
    assert (status, len(lines)) == (2, 1)
    assert lines[0].startswith("fails    Stepwise, the reference is the policy of the step before: leave the `model`")


@pytest.mark.every(3)
@pytest.mark.parametrize("more", [(), ("--model.reference", "CachedReference"), ("--model.adapter", "{rank: 2}")])
def test_a_run_that_is_fine_is_found_so_and_nothing_is_written(more, here, capsys, monkeypatch):
    monkeypatch.setenv("LIT_DPO_CACHE", str(here / "cache"))
    before = everything(here)
    status, lines = checked(capsys, *more)
    assert everything(here) == before
    assert status == 0, lines
    assert {line.split()[0] for line in lines} == {"fine", "estimate"}
    [start] = [line for line in lines if "policy equals reference" in line]
    assert start.endswith(f"the loss has its value there, {math.log(2):.4f}")
    assert any("no random numbers" in line for line in lines)


def test_the_weights_stay_as_they_are(here, capsys, monkeypatch):
    """However large the learning rate is."""
    found = []

    def kept(module, *args, **options):
        found.append((module, check(module, *args, **options)))

    monkeypatch.setattr("lit_dpo.cli.whole.check", kept)
    checked(capsys, "--model.optimizer.lr", "1.0", "--model.lr_scheduler", "null", "--trainer.max_steps", "3")
    [(module, status)] = found
    assert status == 0
    start = load_model(runs.LLAMA, quickstart_tokenizer())
    for name, weight in start.named_parameters():
        assert weight.equal(module.policy.get_parameter(name)), name


@pytest.mark.every(4)
@pytest.mark.parametrize(
    ("more", "text"),
    [
        (["--data.append_eos", "false"], "no EOS is appended"),
        (["--data.max_length", "34"], "the pairs are as long as `max_length` 34"),
        (["--model.dtype", "bfloat16"], "bfloat16 weights do not move"),
        (["--model.model", "{folder}", "--model.optimizer.lr", "1e-4"], "learning rate 0.0001: full fine-tuning above"),
    ],
)
def test_what_is_known_to_go_wrong_is_a_warning_with_a_remedy(more, text, here, capsys):
    if "{folder}" in more:
        load_model(runs.LLAMA, quickstart_tokenizer()).save_pretrained(here / "model")
        quickstart_tokenizer().save_pretrained(here / "model")
    words = [str(here / "model") if word == "{folder}" else word for word in more]
    config = ("--config", "dpo", *(() if "{folder}" in more else ("--config", TINY)))
    small = ("--data.train", "quickstart", "--data.validation_fraction", "0.1", "--trainer.accelerator", "cpu")
    status, lines = checked(capsys, *small, *words, config=config)
    assert status == 1, lines
    [line] = [line for line in lines if line.startswith("warning") and text in line]
    assert ": " in line.partition(text)[2] or "raise" in line


@pytest.mark.every(2)
@pytest.mark.parametrize(
    ("more", "text"),
    [
        (["--memory", "0.01"], "and there are 0.01 GiB: "),
        (["--data.train", "{rows}"], "rows.jsonl:1"),
        (["--trainer.default_root_dir", "predictions.jsonl/runs"], "predictions.jsonl` cannot be written to"),
        (["--model.model.vocab_size", "10"], "10"),
    ],
)
def test_what_would_fail_is_said_in_a_line(more, text, here, capsys):
    rows = runs.write(here / "rows.jsonl", [{"prompt": "a", "chosen": "b"}])
    before = everything(here)
    status, lines = checked(capsys, *(word.replace("{rows}", rows) for word in more))
    assert everything(here) == before
    assert status == 2
    [line] = [line for line in lines if line.startswith("fails")]
    assert text in line


def test_a_reference_that_is_another_model_is_told_from_a_broken_one(here, capsys):
    other = "{model_type: llama, hidden_size: 16, intermediate_size: 16, num_hidden_layers: 1, num_attention_heads: 2}"
    status, lines = checked(capsys, "--model.reference", "FrozenReference", "--model.reference.model", other)
    assert status == 0
    assert any("the reference is another model: up to" in line for line in lines)


@pytest.mark.slow
def test_a_batch_that_would_not_fit_is_not_tried(here, capsys, monkeypatch):
    """On a machine where every batch takes a tenth of a GiB more than the one before."""
    asked = []

    def status(name):
        asked.append(name)
        return 2**30 + (asked.count("VmHWM") * 2**30 // 10 if name == "VmHWM" else 0)

    monkeypatch.setattr("lit_dpo.tools.memory._status", status)
    small = ("--data.train", runs.pairs_file(here, 40), "--data.batch_size", "2")
    _, lines = checked(capsys, *small, "--memory", "1.6")
    peaks = asked.count("VmHWM")
    [line] = [line for line in lines if line.startswith("fails")]
    assert re.search(r"memory: [\d.]+ GiB at most .* and there are 1\.60 GiB: ", line)
    assert "`--data.batch_size 1 --trainer.accumulate_grad_batches 8` saves about" in line
    assert "policy equals reference" in "".join(lines)
    asked.clear()
    checked(capsys, *small, "--memory", "100")
    assert peaks < asked.count("VmHWM")


def test_memory_that_does_not_suffice_leads_to_changes_with_their_effect(here, capsys):
    """A model of 20 MB: its parts are those that can be counted by hand."""
    _, lines = checked(capsys, "--model.model", MIDDLE, "--memory", "0.01")
    [line] = [line for line in lines if line.startswith("fails")]
    model = load_model(yaml.safe_load(MIDDLE), quickstart_tokenizer())
    size = sum(4 * parameter.numel() for parameter in model.parameters())
    saved = dict(re.findall(r"`(--[^`]+)` saves about ([\d.]+) GiB", line))
    assert float(saved["--model.reference CachedReference"]) == pytest.approx(size / 2**30, abs=0.006)
    assert float(saved["--model.adapter '{rank: 16}'"]) == pytest.approx(4 * size / 2**30, abs=0.006)
    assert "--data.batch_size" not in line  # which changes nothing of these


@pytest.mark.slow
def test_a_slow_disk_is_in_the_time(here, capsys, monkeypatch):
    """Two checkpoints are to come, of a validation each: one that is among the best, too, counts twice."""
    save = DurableCheckpointIO.save_checkpoint

    def slow(*args, **options):
        save(*args, **options)
        time.sleep(0.5)

    monkeypatch.setattr(DurableCheckpointIO, "save_checkpoint", slow)
    words = ("--trainer.max_steps", "4", "--trainer.accumulate_grad_batches", "1", "--trainer.val_check_interval", "2")
    found = []
    for more in ((), ("--trainer.callbacks", "[]")):
        [line] = [line for line in checked(capsys, *words, *more)[1] if line.startswith("estimate time")]
        whole, saving, count = re.search(
            r"about ([\d.]+) s .* ([\d.]+) s for (?:up to )?(\d+) checkpoints", line
        ).groups()
        assert int(count) * 0.5 <= float(saving) < int(count) * 0.6 + 0.5
        assert float(whole) > float(saving)
        found.append(int(count))
    assert found == [4, 2]


@pytest.mark.parametrize(
    "more",
    [
        (),
        ("--trainer.max_steps", "-1", "--trainer.val_check_interval", "3"),
        ("--trainer.max_steps", "-1", "--trainer.max_epochs", "2", "--trainer.accumulate_grad_batches", "3"),
    ],
)
@pytest.mark.slow
def test_a_fit_takes_the_steps_validations_and_checkpoints_that_were_announced(more, here, capsys, monkeypatch):
    rows = runs.pairs_file(here, 40)
    words = ("--data.train", rows, "--data.batch_size", "4", "--trainer.callbacks", "[]", *more)
    _, lines = checked(capsys, *words)
    [line] = [line for line in lines if line.startswith("estimate time")]
    saved, save = [], Trainer.save_checkpoint
    monkeypatch.setattr(Trainer, "save_checkpoint", lambda *args, **options: saved.append(save(*args, **options)))
    main(["fit", "--config", "dpo", "--config", TINY, *words, "--trainer.default_root_dir", "out"])
    with (here / "out/version_0/metrics.csv").open() as file:
        logged = list(csv.DictReader(file))
    steps = 1 + max(int(row["step"]) for row in logged if row["train/loss"])
    validations = sum(bool(row["val/loss"]) for row in logged)
    assert f" {steps} steps;" in line
    assert (f"for {validations} validations" in line) == bool(validations)
    assert f" s for {len(saved)} checkpoints" in line


def test_a_mistake_on_the_command_line_gets_one_sentence(here, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["check", "--config", "dpo", "--config", TINY, "--memory", "0"])
    assert (stop.value.code, "`--memory` must be above 0 GiB" in capsys.readouterr().err) == (2, True)


def clocked(monkeypatch, name, seconds):
    """From here on nothing takes time but a step of the module, which takes `seconds(batch)`."""
    step, now = getattr(PreferenceModule, name), [0.0]

    def slow(self, batch, *args):
        now[0] += seconds(batch)
        return step(self, batch, *args)

    monkeypatch.setattr(PreferenceModule, name, slow)
    monkeypatch.setattr("lit_dpo.tools.measured.time", SimpleNamespace(perf_counter=lambda: now[0]))


def estimated(lines):
    """The line of the time."""
    [line] = [line for line in lines if line.startswith("estimate time")]
    return line


def test_the_validation_before_training_is_in_the_time(here, capsys, monkeypatch):
    """Of two batches at most, as Lightning has it unless it is told otherwise; here there is one."""
    seen = set()

    def seconds(batch):
        seen.add(len(batch.input_ids))
        return 0.01 * len(batch.input_ids)

    clocked(monkeypatch, "validation_step", seconds)
    words = ("--data.train", runs.pairs_file(here, 40), "--data.batch_size", "4", "--data.validation_fraction", "0.2")
    _, lines = checked(capsys, *words, "--trainer.num_sanity_val_steps", "2")
    [tokens] = seen
    validating, count = re.search(r" ([\d.]+) s for (\d+) validations", estimated(lines)).groups()
    assert float(validating) == pytest.approx(0.01 * tokens * (int(count) + 1), rel=0.006)


@pytest.mark.slow
def test_the_widest_padded_batch_is_tried(here, capsys, monkeypatch):
    """It is not the one of the most tokens, where rows are filled up to the longest of their batch."""
    seen, step = [], PreferenceModule.training_step

    def noted(self, batch, *args):
        longest = max(prompt + max(sides) for prompt, *sides in batch.shape)
        seen.append((len(batch.input_ids), 2 * len(batch) * longest))
        return step(self, batch, *args)

    monkeypatch.setattr(PreferenceModule, "training_step", noted)
    long = {"prompt": "a stone " * 33, "chosen": " yes.", "rejected": " no."}
    short = [{"prompt": f"{number}?", "chosen": " a.", "rejected": " b."} for number in range(7)]
    sides = {"chosen": " red" * 54, "rejected": " green" * 54}
    middle = [{"prompt": f"{number}:", **sides} for number in range(40)]
    words = ("--data.train", runs.write(here / "rows.jsonl", [*short, long, *middle]), "--data.batch_size", "4")
    words += ("--trainer.max_steps", "12", "--trainer.accumulate_grad_batches", "1", "--data.validation_fraction", "0")
    words += ("--trainer.callbacks", "[]", "--trainer.val_check_interval", "null", "--seed_everything", "1")
    main(["fit", "--config", "dpo", "--config", TINY, *words, "--trainer.default_root_dir", "out"])
    all_of_them = set(seen)
    assert max(seen)[1] < max(padded for _, padded in seen)
    for form, column in (("flat", 0), ("padded", 1)):
        seen.clear()
        status, lines = checked(capsys, *words, "--model.form", form)
        assert status == 0, lines
        assert set(seen) <= all_of_them
        assert max(batch[column] for batch in seen) == max(batch[column] for batch in all_of_them)


@pytest.mark.slow
def test_what_the_first_batches_cost_counts_once_and_a_swing_is_told(here, capsys, monkeypatch):
    """A first step and then six lengths, four times: 1 s each at first, later 0.2 s, and at last 0.4 s."""
    monkeypatch.setattr("lit_dpo.tools.measured._PASSES", 4)
    waits = iter([1.0] * 7 + [0.2] * 12 + [0.4] * 6)
    clocked(monkeypatch, "training_step", lambda batch: next(waits))
    words = ("--data.train", runs.pairs_file(here, 48), "--data.batch_size", "4", "--data.validation_fraction", "0")
    steps = ("--trainer.max_steps", "12", "--trainer.accumulate_grad_batches", "1")
    _, lines = checked(capsys, *words, *steps, "--trainer.val_check_interval", "null")
    assert not list(waits)
    assert f"; {12 * 0.3 + 7 * 0.7:.3g} s of training" in estimated(lines)
    assert "the same batches took up to 33% more or less when they came again" in estimated(lines)
