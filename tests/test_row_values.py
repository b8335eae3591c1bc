"""Numbers in columns of the rows: from a file to the loss, into the digest of the data, and as weights of the mean."""

import math
import re
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from lit_dpo import DPOLoss, PairBatch, PairLogps, PreferenceLoss, SFTLoss, score
from lit_dpo.cli import main
from tests import runs
from tests.test_cli import command

pytestmark = [
    *runs.QUIET,
    pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning.pytorch.cli", "ignore:The dirpath has changed"),
]


@dataclass(frozen=True)
class MarginIsLoss(PreferenceLoss):
    """The row's own number as its loss."""

    columns: ClassVar[tuple[str, ...]] = ("margin",)
    needs_reference: ClassVar[bool] = False

    def __call__(self, policy: PairLogps, reference: PairLogps) -> torch.Tensor:
        assert torch.equal(policy.columns["margin"], reference.columns["margin"])
        return policy.columns["margin"] + 0 * policy.margin


def rows_with(count, **columns):
    return [{**row, **{name: of(n) for name, of in columns.items()}} for n, row in enumerate(runs.rows(count))]


def file_with(folder, count, name="pairs.jsonl", **columns):
    return runs.write(folder / name, rows_with(count, **columns))


# -- from the file to the loss ----------------------------------------------------------------------------------------


def test_each_pair_of_a_batch_has_the_numbers_of_its_row(tmp_path):
    """Shuffled, with a filler at the end, on another device, cut into parts."""
    path = file_with(tmp_path, 21, margin=lambda n: n / 8, other=lambda n: -n)
    data = runs.data(path, values=["other", "margin"], batch_size=3, validation_fraction=0.25)
    data.tokenizer = runs.module().tokenizer
    data.setup("fit")
    data.trainer = runs.trainer(accumulate_grad_batches=3)
    batches = [*data.train_dataloader(), *data.val_dataloader()]
    assert sorted({row for batch in batches for row in batch.row_ids.tolist()}) == list(range(21))
    assert any(batch.weights is not None for batch in batches)
    for batch in batches:
        for part in (batch, *batch.split(60), batch.to("cpu")):
            assert part.columns.keys() == {"margin", "other"}
            assert part.columns["margin"].tolist() == [row / 8 for row in part.row_ids.tolist()]
            assert part.columns["other"].tolist() == [-row for row in part.row_ids.tolist()]
    assert len(batches[0].split(60)) > 1
    assert {value.device.type for value in batches[0].to("meta").columns.values()} == {"meta"}


@pytest.mark.parametrize("max_tokens", [None, 80])
def test_a_loss_reads_the_numbers_that_it_declares(max_tokens, tmp_path):
    path = file_with(tmp_path, 10, margin=lambda n: n**2)
    data = runs.data(path, validation=path, values=["margin"], batch_size=4)
    run = runs.fit(runs.module(loss=MarginIsLoss(), max_tokens=max_tokens), data)
    assert run.callback_metrics["val/loss"].item() == sum(n**2 for n in range(10)) / 10


@pytest.mark.parametrize(("suffix", "write"), [("csv", "to_csv"), ("parquet", "to_parquet")])
def test_other_files_have_numbers_too(suffix, write, tmp_path):
    pytest.importorskip("datasets")
    from datasets import Dataset

    getattr(Dataset.from_list(rows_with(6, margin=lambda n: n / 4)), write)(str(tmp_path / f"rows.{suffix}"))
    data = runs.data(str(tmp_path / f"rows.{suffix}"), values=["margin"], validation_fraction=0)
    data.tokenizer = runs.module().tokenizer
    data.setup("fit")
    (batch,) = data.train_dataloader()
    assert sorted(batch.columns["margin"].tolist()) == [0.0, 0.25, 0.5, 0.75, 1.0, 1.25]


def test_a_batch_of_ones_own_has_numbers():
    pairs = [([1], [2], [3]), ([4], [5], [6, 7])]
    assert PairBatch.from_lists(pairs).columns == {}
    assert PairBatch.from_lists(pairs, columns={"margin": [1, 2]}).columns["margin"].tolist() == [1.0, 2.0]
    with pytest.raises(ValueError, match="`margin` must have one number for each of 2 pairs"):
        PairBatch.from_lists(pairs, columns={"margin": [1.0]})


# -- what is wrong is said at the start -------------------------------------------------------------------------------

BAD = {
    "null": (None, "not a finite number"),
    "text": ("high", "not a finite number"),
    "true": (True, "not a finite number"),
    "nan": (math.nan, "not a finite number"),
    "infinite": (math.inf, "not a finite number"),
    "too large": (10**400, "not a finite number"),
    "a list": ([1.0], "not a finite number"),
    "below 0": (-0.5, "a weight below 0"),
}


@pytest.mark.parametrize(("cell", "reason"), BAD.values(), ids=BAD)
def test_a_cell_without_a_number_makes_a_bad_row(cell, reason, tmp_path):
    path = file_with(tmp_path, 6, weight=lambda n: cell if n == 3 else n)
    with pytest.raises(ValueError, match=re.escape(f"{path}:4, column `weight`: {reason}")):
        runs.fit(runs.module(), runs.data(path, values=["weight"]), max_steps=1)
    data = runs.data(path, values=["weight"], on_bad_row="skip", validation_fraction=0)
    data.tokenizer = runs.module().tokenizer
    data.setup("fit")
    assert sorted(w for batch in data.train_dataloader() for w in batch.columns["weight"].tolist()) == [0, 1, 2, 4, 5]


def test_a_row_without_the_column_is_a_bad_row(tmp_path, caplog):
    rows = rows_with(6, margin=float)
    del rows[2]["margin"]
    path = runs.write(tmp_path / "pairs.jsonl", rows)
    with pytest.raises(ValueError, match=re.escape(f"{path}:3: `values` names `margin`, which is not there")):
        runs.fit(runs.module(), runs.data(path, values=["margin"]), max_steps=1)
    with caplog.at_level("INFO"):
        runs.fit(runs.module(), runs.data(path, values=["margin"], on_bad_row="skip"), max_steps=1)
    assert "6 rows read, 5 kept, 1 skipped" in caplog.text


@pytest.mark.parametrize("on_bad_row", ["error", "skip"])
def test_a_column_that_no_row_has_is_named(on_bad_row, tmp_path):
    path = runs.pairs_file(tmp_path)
    with pytest.raises(ValueError, match="`values` names `margin`, which is not there; the row has `prompt`"):
        runs.fit(runs.module(), runs.data(path, values=["margin"], on_bad_row=on_bad_row), max_steps=1)


@pytest.mark.parametrize("values", ["margin", ["margin", "margin"]])
def test_values_are_a_list_of_different_names(values):
    with pytest.raises(ValueError, match="`values` must be a list of different column names"):
        runs.data(values=values)


def test_a_loss_without_its_columns_ends_the_command_at_once(tmp_path, capsys):
    path = file_with(tmp_path, 12, score_chosen=float)
    with pytest.raises(SystemExit) as stop:
        main(command("fit", tmp_path, "odpo", "--data.train", path, "--data.values", "[score_chosen]"))
    assert stop.value.code not in (0, None)
    said = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert "`ODPOLoss` needs the numbers `score_rejected`" in said
    assert "--data.values" in said


def test_the_columns_are_missed_before_the_first_batch(tmp_path):
    module = runs.module(loss=MarginIsLoss())
    module.training_step = lambda *_: pytest.fail("a batch was reached")
    with pytest.raises(ValueError, match=r"`MarginIsLoss` needs the numbers `margin`.*--data\.values"):
        runs.fit(module, runs.data(runs.pairs_file(tmp_path)), max_steps=1)


def test_rows_to_predict_need_no_numbers(tmp_path):
    data = runs.data(file_with(tmp_path, 8, margin=float), predict=runs.pairs_file(tmp_path, 5, "new.jsonl"))
    data.values = ["margin"]
    module = runs.module(loss=MarginIsLoss())
    runs.fit(module, data, max_steps=1)
    assert sum(len(batch["row_id"]) for batch in runs.trainer().predict(module, data)) == 5


# -- weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [(7, 1), (2, 4), (3, 3)], ids=["whole", "with a filler", "with two fillers"])
def test_a_weight_multiplies_the_loss_of_its_pair(cut, tmp_path):
    """One step over 7 pairs against the mean of each pair's loss times its weight, every pair scored alone."""
    weights = [0.0, 0.5, 1.0, 3.0, 0.25, 1.0, 2.0]
    path = file_with(tmp_path, 7, weight=weights.__getitem__)
    module = runs.module(runs.NEOX, lr=0.1, loss=DPOLoss(beta=0.5), dtype="float64")
    data = runs.data(path, values=["weight"], batch_size=cut[0], validation_fraction=0)
    run = runs.trainer(max_steps=1, accumulate_grad_batches=cut[1], log_every_n_steps=1)
    run.fit(module, data)

    start = runs.module(runs.NEOX, dtype="float64")
    start.configure_model()
    model, dataset = start.policy, data._sets["train"]
    total = 0.0
    for row, weight in enumerate(weights):
        found = score(model, PairBatch.from_lists([dataset.pair(row)]))
        h = found.margin - found.margin.detach()
        total = total - weight * torch.log(1 / (1 + torch.exp(-0.5 * h))).sum()
    (total / 7).backward()
    for (name, trained), before in zip(module.policy.named_parameters(), model.parameters(), strict=True):
        # The weights of a step that is not full are float32.
        torch.testing.assert_close((before - trained).detach() / 0.1, before.grad, rtol=1e-6, atol=1e-9, msg=name)
    assert run.callback_metrics["train/loss"].item() == pytest.approx(sum(weights) / 7 * math.log(2))


def test_a_column_is_no_weight_unless_it_is_asked_for(tmp_path):
    path = file_with(tmp_path, 8, weight=lambda n: 0)
    module = runs.module(loss=SFTLoss())
    run = runs.fit(module, runs.data(path, validation_fraction=0), max_steps=1, log_every_n_steps=1)
    assert run.callback_metrics["train/loss"].item() > 1


# -- the same data ----------------------------------------------------------------------------------------------------


def test_a_changed_number_is_noticed_and_never_served_from_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("lit_dpo.data.token_cache.WORTH_KEEPING", 1)
    monkeypatch.setenv("LIT_DPO_CACHE", str(tmp_path / "cache"))
    path = file_with(tmp_path, 16, margin=float)

    def go_on(module, data, **options):
        run = runs.trainer(tmp_path, **options)
        run.fit(module, data, ckpt_path=last if last.exists() else None)
        return run

    last = tmp_path / "last.ckpt"
    go_on(runs.module(), runs.data(path, values=["margin"]), max_steps=1).save_checkpoint(last)
    file_with(tmp_path, 16, margin=lambda n: 99.0 if n == 6 else n)
    changed = runs.data(path, values=["margin"])
    with pytest.raises(ValueError, match=r"training data differ from those of the checkpoint \(1 changed\)"):
        go_on(runs.module(), changed, max_steps=2)
    batches = [*changed.train_dataloader(), *changed.val_dataloader()]
    found = [pair for b in batches for pair in zip(b.row_ids.tolist(), b.columns["margin"].tolist(), strict=True)]
    assert {*found} == {(n, 99 if n == 6 else n) for n in range(16)}

    file_with(tmp_path, 16, margin=float)
    with pytest.raises(ValueError, match=r"\(16 changed\)"):
        go_on(runs.module(), runs.data(path), max_steps=2)
    go_on(runs.module(), runs.data(path, values=["margin"]), max_steps=2)


def test_a_run_without_numbers_resumes_as_before(tmp_path):
    """The record of rows without numbers is what it was before there were any."""
    path = file_with(tmp_path, 4, margin=float)
    plain, valued = (runs.data(path, values=values) for values in (None, ["margin"]))
    for data in (plain, valued):
        data.tokenizer = runs.module().tokenizer
        data.setup("fit")
    assert plain.state_dict()["train"] != valued.state_dict()["train"]
    assert plain._sets["train"].digest_bytes() == valued._sets["train"].digest_bytes(numbers=False)


def test_a_pair_with_another_number_is_still_found_in_both_sets(tmp_path, caplog):
    train = file_with(tmp_path, 6, margin=float)
    validation = file_with(tmp_path, 6, "validation.jsonl", margin=lambda n: n + 0.5)
    with caplog.at_level("INFO"):
        runs.fit(runs.module(), runs.data(train, validation=validation, values=["margin"]), max_steps=1)
    assert "6 of 6 pairs are also trained on" in caplog.text
