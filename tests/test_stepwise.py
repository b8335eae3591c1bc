"""Stepwise DPO: the policy of one partition is the reference of the next, and everything else starts anew."""

import json
import math
import shutil

import pytest
import safetensors.torch
import torch
from lightning.pytorch import Callback
from transformers import AutoModelForCausalLM

from lit_dpo import ADPOLoss, BySource, CachedReference, EasyToHard, FrozenReference, LoRA, OneShot, RandomSplit, score
from lit_dpo.callbacks import BestCheckpoint, LastCheckpoint, RewardEarlyStopping
from lit_dpo.export import export_checkpoint
from lit_dpo.models import load_model
from lit_dpo.stepwise import fit_stepwise
from lit_dpo.tokenizers import quickstart_tokenizer
from tests import runs

pytestmark = runs.QUIET


class Start(Callback):
    """Remember, for every partition, what it starts and ends with."""

    def __init__(self, seen):
        self.entry = {"losses": [], "rows": set(), "validations": []}
        seen.append(self.entry)

    def on_train_start(self, trainer, pl_module):
        optimizer = trainer.optimizers[0]
        self.entry |= {
            "reference": [runs.weights(model) for model in pl_module.reference.models()],
            "start": runs.weights(pl_module.policy),
            "optimizer": (dict(optimizer.state), optimizer.param_groups[0]["lr"]),
            "steps": trainer.global_step,
            "trainer": trainer,
        }

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.entry["losses"].append(float(outputs["loss"]))
        self.entry["rows"] |= set(batch.row_ids.tolist())

    def on_validation_end(self, trainer, pl_module):
        self.entry["validations"].append(float(trainer.callback_metrics["val/rewards/ties"]))

    def on_train_end(self, trainer, pl_module):
        self.entry["end"] = runs.weights(pl_module.policy)


@pytest.fixture
def sources(tmp_path):
    """Three sources, of 12, 8 and 6 rows."""
    counts = {"one": 12, "two": 8, "three": 6}
    starts = {"one": 0, "two": 20, "three": 40}
    return [runs.pairs_file(tmp_path, counts[n], f"{n}.jsonl", start=starts[n]) for n in counts]


def stepwise(
    folder, train, partition, make=None, data_options=None, trainer_options=None, callbacks=list, first=False, **options
):
    """Run through the partitions; return what was seen of each, the module, and the last export."""
    seen = []
    module = make or runs.module(lr=1e-2, optimizer=torch.optim.AdamW, **options)
    data = runs.data(train, partition=partition, **{"batch_size": 4, "validation": train, **(data_options or {})})

    def make_trainer(root):
        settings = {"max_epochs": 1, **(trainer_options or {})}
        return runs.trainer(root, callbacks=[Start(seen), *callbacks()], **settings)

    exported = fit_stepwise(module, data, make_trainer, folder, first_reference=first)
    return [entry for entry in seen if entry["losses"]], module, exported


def loaded(folder):
    return runs.weights(AutoModelForCausalLM.from_pretrained(folder))


def test_the_policy_of_one_is_the_reference_of_the_next_tensor_for_tensor(tmp_path, sources):
    seen, module, exported = stepwise(tmp_path / "run", sources, BySource())
    assert exported == tmp_path / "run" / "partition_2" / "export"
    start = runs.weights(load_model(runs.LLAMA, quickstart_tokenizer()))
    for number, entry in enumerate(seen):
        assert runs.same(entry["reference"][0], start)
        assert runs.same(entry["start"], start)
        assert not runs.same(entry["end"], start)
        assert runs.same(loaded(tmp_path / "run" / f"partition_{number}" / "export"), entry["end"])
        start = entry["end"]
    assert runs.same(runs.weights(module.policy), start)


def test_every_partition_starts_afresh_at_log_2(tmp_path, sources):
    seen, *_ = stepwise(tmp_path / "run", sources, BySource())
    assert [entry["losses"][0] for entry in seen] == [pytest.approx(math.log(2), rel=1e-6)] * 3
    assert all(loss != pytest.approx(math.log(2), rel=1e-6) for entry in seen for loss in entry["losses"][1:])
    assert [entry["optimizer"] for entry in seen] == [({}, 1e-2)] * 3
    assert len({id(entry["trainer"]) for entry in seen}) == 3
    assert [entry["steps"] for entry in seen] == [0, 0, 0]
    assert [len(entry["losses"]) for entry in seen] == [3, 2, 2]


def test_each_partition_trains_on_its_own_rows(tmp_path, sources):
    seen, *_ = stepwise(tmp_path / "run", sources, BySource(order=["two", "three", "one"]))
    rows = [set(range(12, 20)), set(range(20, 26)), set(range(12))]
    assert [entry["rows"] for entry in seen] == rows
    for number, expected in enumerate(rows):
        done = json.loads((tmp_path / "run" / f"partition_{number}" / "DONE").read_text())
        assert set(done["rows"]) == expected


def test_held_out_pairs_stay_held_out(tmp_path, sources):
    options = {"validation": None, "validation_fraction": 0.2}
    seen, *_ = stepwise(tmp_path / "run", sources, RandomSplit(3), data_options=options)
    rows = [row for entry in seen for row in entry["rows"]]
    assert len(rows) == len(set(rows)) == 26 - 5


@pytest.mark.every(3)
@pytest.mark.parametrize("partition", [OneShot(), RandomSplit(1), EasyToHard(parts=1)], ids=lambda x: type(x).__name__)
def test_one_partition_is_plain_training_bit_for_bit(tmp_path, sources, partition):
    _, module, exported = stepwise(tmp_path / "run", sources, partition)
    plain = runs.module(lr=1e-2, optimizer=torch.optim.AdamW)
    runs.fit(plain, runs.data(sources, validation=sources, batch_size=4), max_epochs=1)
    assert runs.same(runs.weights(module.policy), runs.weights(plain.policy))
    assert runs.same(loaded(exported), runs.weights(plain.policy))


@pytest.mark.parametrize(("partition", "names"), [(BySource(), []), (EasyToHard(2), ["scoring"])], ids=["none", "once"])
def test_a_policy_scores_only_where_a_partition_asks(tmp_path, sources, partition, names):
    made = []

    def make_trainer(root):
        made.append(root.name)
        return runs.trainer(root, max_steps=1)

    data = runs.data(sources[:2], partition=partition, batch_size=4, validation=sources[2])
    fit_stepwise(runs.module(), data, make_trainer, tmp_path / "run")
    assert made == [*names, "partition_0", "partition_1"]


# -- easy to hard -----------------------------------------------------------------------------------------------------


def margins(files):
    """The oracle: the starting model's margin of each row, pair by pair."""
    model = load_model(runs.LLAMA, quickstart_tokenizer())
    data = runs.data(files, validation=files, tokenizer=quickstart_tokenizer(), eval_batch_size=1)
    data.setup("fit")
    found = {}
    for batch in data.val_dataloader():
        with torch.no_grad():
            found[int(batch.row_ids)] = float(score(model, batch).margin)
    return [found[row] for row in sorted(found)]


def test_easy_sources_come_first(tmp_path):
    """Chosen is the short one in ``easy``, which a random model likes better, and the long one in ``hard``."""
    rows = runs.rows(8)
    turned = [{"prompt": r["prompt"], "chosen": r["rejected"], "rejected": r["chosen"]} for r in rows]
    hard, easy = runs.write(tmp_path / "hard.jsonl", rows), runs.write(tmp_path / "easy.jsonl", turned)
    mixed = runs.write(tmp_path / "mixed.jsonl", rows[:4] + turned[4:])
    accuracies = [sum(m > 0 for m in margins([file])) / 8 for file in (hard, mixed, easy)]
    assert accuracies == sorted(set(accuracies))

    seen, *_ = stepwise(tmp_path / "run", [hard, easy, mixed], EasyToHard())
    assert [entry["rows"] for entry in seen] == [set(range(8, 16)), set(range(16, 24)), set(range(8))]
    assert [entry["losses"][0] for entry in seen] == [pytest.approx(math.log(2), rel=1e-6)] * 3


def test_easy_pairs_come_first(tmp_path, sources):
    seen, *_ = stepwise(tmp_path / "run", sources, EasyToHard(parts=2))
    found = margins(sources)
    order = sorted(range(26), key=lambda row: -found[row])
    assert [entry["rows"] for entry in seen] == [set(order[:13]), set(order[13:])]
    assert runs.same(seen[0]["reference"][0], runs.weights(load_model(runs.LLAMA, quickstart_tokenizer())))


# -- adapters, early stopping, best checkpoints -----------------------------------------------------------------------


def test_adapters_are_merged_into_the_next_reference(tmp_path, sources):
    adapter = LoRA(rank=2, alpha=64)
    seen, module, exported = stepwise(tmp_path / "run", sources[:2], BySource(), adapter=adapter)
    assert [entry["reference"] for entry in seen] == [[], []]  # no second model
    assert [entry["losses"][0] for entry in seen] == [pytest.approx(math.log(2), rel=1e-6)] * 2
    merged = loaded(tmp_path / "run" / "partition_0" / "export")
    base = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): value
        for name, value in seen[1]["start"].items()
        if "lora_" not in name
    }
    assert runs.same(base, merged)
    start = runs.weights(load_model(runs.LLAMA, quickstart_tokenizer()))
    assert not runs.same(merged, start)
    assert all(not value.any() for name, value in seen[1]["start"].items() if "lora_B" in name)
    batch = next(iter(module.trainer.datamodule.val_dataloader()))
    model = AutoModelForCausalLM.from_pretrained(exported)
    with torch.no_grad():
        torch.testing.assert_close(score(model, batch).chosen, score(module.policy, batch).chosen, rtol=1e-4, atol=1e-4)


def test_early_stopping_counts_anew_in_every_partition(tmp_path, sources):
    """With a patience that the first partition uses up, the second still runs until its own is."""
    seen, *_ = stepwise(
        tmp_path / "run",
        sources[:2],
        BySource(),
        callbacks=lambda: [RewardEarlyStopping(patience=2, min_delta=1.0)],  # no rise is ever large enough
        trainer_options={"val_check_interval": 1, "max_epochs": 4, "num_sanity_val_steps": 1},
    )
    assert [len(entry["losses"]) for entry in seen] == [3, 3]  # the first sets the mark, two miss it
    assert all(entry["validations"][0] == 1.0 for entry in seen)  # the sanity check, a tie


def test_the_best_checkpoint_goes_on_and_not_the_last(tmp_path, sources):
    """A learning rate that wrecks the policy after the first validation of the partition."""
    make = runs.module(lr=30.0)
    best = []

    def callbacks():
        best.append(BestCheckpoint("val/loss", mode="min"))
        return [best[-1]]

    seen, *_ = stepwise(
        tmp_path / "run", sources[:2], BySource(), make, callbacks=callbacks,
        trainer_options={"val_check_interval": 1, "enable_checkpointing": True},
    )  # fmt: skip
    kept = torch.load(best[0].best_model_path, weights_only=True)
    assert kept["global_step"] < len(seen[0]["losses"])
    state = {name.removeprefix("policy."): value for name, value in kept["state_dict"].items()}
    assert runs.same(seen[1]["reference"][0], state)
    assert not runs.same(seen[1]["reference"][0], seen[0]["end"])


@pytest.mark.parametrize("adapter", [None, LoRA(rank=2, alpha=64)], ids=["full", "lora"])
def test_the_module_ends_with_the_policy_that_was_exported(tmp_path, sources, adapter):
    """The best one and not the last, also when there was nothing left to do."""
    options = {"val_check_interval": 1, "enable_checkpointing": True}
    lr = 30.0 if adapter is None else 3.0

    def go(make, resume=False):
        data = runs.data(sources[:2], partition=BySource(), batch_size=4, validation=sources[:2])
        seen = []

        def make_trainer(root):
            callbacks = [Start(seen), BestCheckpoint("val/loss", mode="min")]
            return runs.trainer(root, callbacks=callbacks, max_epochs=1, **options)

        exported = fit_stepwise(make, data, make_trainer, tmp_path / "run", resume)
        batch = next(iter(data.val_dataloader()))
        with torch.no_grad():
            values = [score(model.eval(), batch).chosen for model in (make.policy, load_model(str(exported)))]
        torch.testing.assert_close(*values)
        return values[0], [entry.get("end") for entry in seen]

    first, ends = go(runs.module(lr=lr, adapter=adapter))
    again, nothing = go(runs.module(lr=lr, adapter=adapter), resume=True)
    assert (len(ends), nothing) == (2, [])
    assert torch.equal(first, again)
    if adapter is None:  # else this would test nothing
        assert not runs.same(loaded(tmp_path / "run" / "partition_1" / "export"), ends[1])


# -- validation against the first model -------------------------------------------------------------------------------


class Validations(Callback):
    """What the last validation of each step logged."""

    def __init__(self, seen):
        self.seen = seen

    def on_train_end(self, trainer, pl_module):
        self.seen.append({k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")})


def parted(metrics):
    """What is measured from the reference of the step, and what from the first model, under the same names."""
    first = {name.removeprefix("val/first/"): v for name, v in metrics.items() if name.startswith("val/first/")}
    return {k.removeprefix("val/"): v for k, v in metrics.items() if not k.startswith("val/first/")}, first


KINDS = {
    "frozen": lambda folder: {},
    "cached": lambda folder: {"reference": CachedReference(str(folder / "cache"))},
    "lora": lambda folder: {"adapter": LoRA(rank=2, alpha=64)},
    "tokens": lambda folder: {"loss": ADPOLoss()},
}


@pytest.mark.parametrize(
    "kind", ["cached", "lora", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("frozen", "tokens"))]
)
def test_validations_against_the_first_model_compare(tmp_path, sources, kind):
    """The oracle is a run of its own: what is exported, validated against the first model alone."""
    measured, best = [], []

    def callbacks():
        best.append(BestCheckpoint("val/first/loss", mode="min"))
        return [Validations(measured), best[-1]]

    _, module, _ = stepwise(
        tmp_path / "run", sources[1:], BySource(), callbacks=callbacks, first=True, **KINDS[kind](tmp_path),
        trainer_options={"val_check_interval": 1.0, "enable_checkpointing": True},
    )  # fmt: skip
    assert len(measured) == 2
    assert all(callback.best_model_path for callback in best)
    for step, metrics in enumerate(measured):
        ours, first = parted(metrics)
        assert ours.keys() == first.keys()
        exported = str(tmp_path / "run" / f"partition_{step}" / "export")
        judge = runs.module(exported, reference=FrozenReference(runs.LLAMA), loss=module.loss)
        (expected,) = runs.trainer().validate(judge, runs.data(sources[1:], validation=sources[1:]), verbose=False)
        assert first == pytest.approx(parted(expected)[0], abs=2e-4, rel=1e-3)
        if step == 0:
            assert first == pytest.approx(ours, abs=1e-5)
        else:
            assert first["rewards/margins"] != pytest.approx(ours["rewards/margins"], abs=1e-3)


# -- what it refuses --------------------------------------------------------------------------------------------------


def test_a_folder_with_partitions_is_refused(tmp_path, sources):
    (tmp_path / "run" / "partition_0").mkdir(parents=True)
    with pytest.raises(FileExistsError, match=r"`.*run` holds partitions already: name a new folder"):
        stepwise(tmp_path / "run", sources, BySource())
    assert [path.name for path in (tmp_path / "run").rglob("*")] == ["partition_0"]


def test_a_folder_with_other_things_is_no_hindrance(tmp_path, sources):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").touch()
    assert len(stepwise(tmp_path / "run", sources, RandomSplit(2))[0]) == 2


def test_a_split_that_cannot_be_leaves_nothing_behind(tmp_path, sources):
    with pytest.raises(ValueError, match="`order` names nothing, but the data have"):
        stepwise(tmp_path / "run", sources, BySource(order=["nothing"]))
    assert not (tmp_path / "run").exists()


def test_a_cached_reference_stays_one_and_follows_the_policy(tmp_path, sources):
    cached = CachedReference(str(tmp_path / "cache"))
    seen, module, _ = stepwise(tmp_path / "cached", sources, BySource(), reference=cached)
    expected, _, _ = stepwise(tmp_path / "frozen", sources, BySource())
    assert module.reference is cached
    assert [entry["losses"][0] for entry in seen] == pytest.approx([math.log(2)] * 3, abs=1e-6)
    for ours, theirs in zip(seen, expected, strict=True):
        assert ours["losses"] == pytest.approx(theirs["losses"], abs=1e-5)


def test_easy_to_hard_works_with_a_cached_reference(tmp_path, sources):
    cached = CachedReference(str(tmp_path / "cache"))
    seen, module, _ = stepwise(tmp_path / "run", sources, EasyToHard(2), reference=cached)
    assert len(seen) == 2
    assert module.reference is cached


def test_a_reference_of_its_own_is_refused(tmp_path, sources):
    with pytest.raises(ValueError, match="the reference is the policy of the step before"):
        stepwise(tmp_path / "run", sources, BySource(), reference=FrozenReference("another/model"))


def test_a_renamed_run_exports_a_later_partition(tmp_path, monkeypatch):
    """Its checkpoint names the folder that the partition before was exported to, which is elsewhere now."""
    file, old = runs.pairs_file(tmp_path), tmp_path / "old"
    options = {"enable_checkpointing": True}
    stepwise(old, file, RandomSplit(2), trainer_options=options, callbacks=lambda: [LastCheckpoint()])
    (checkpoint,) = (old / "partition_1").rglob("last.ckpt")
    expected = tmp_path / "before"
    export_checkpoint(str(checkpoint), str(expected))
    shutil.move(old, tmp_path / "new")
    moved = tmp_path / "new" / checkpoint.relative_to(old)
    found = export_checkpoint(str(moved), str(tmp_path / "after"))
    first, second = (safetensors.torch.load_file(folder / "model.safetensors") for folder in (expected, found))
    assert runs.same(first, second)
    shutil.rmtree(tmp_path / "new" / "partition_0")
    with pytest.raises(ValueError, match="no such folder"):
        export_checkpoint(str(moved), str(tmp_path / "gone"))
