"""The data module: files to loaders, what is held out, and what it says when it cannot."""

import pytest
import torch

from lit_dpo import BySource, Pool, PreferenceDataModule, RandomSplit
from lit_dpo.tokenizers import quickstart_tokenizer
from tests import runs

pytestmark = runs.QUIET


@pytest.fixture(scope="module")
def tokenizer():
    return quickstart_tokenizer()


@pytest.fixture
def make(tokenizer):
    def make(train, stage="fit", **options):
        module = runs.data(train, tokenizer=tokenizer, **options)
        module.setup(stage)
        return module

    return make


def drawn(loader):
    """Row numbers that a loader brings, sorted."""
    return sorted(row for batch in loader for row in batch.row_ids.tolist())


def places(data, loader, name):
    return {data._sets[name].origins[row] for row in drawn(loader)}


def test_each_row_is_trained_on_or_held_out(make, tmp_path):
    data = make(runs.pairs_file(tmp_path, 30), validation_fraction=0.2)
    train, held_out = drawn(data.train_dataloader()), drawn(data.val_dataloader())
    assert len(held_out) == 6
    assert sorted(train + held_out) == list(range(30))


def test_the_draw_depends_on_the_seed_alone(make, tmp_path):
    path = runs.pairs_file(tmp_path, 30)
    held_out = [drawn(make(path, seed=seed).val_dataloader()) for seed in (0, 0, 1)]
    assert held_out[0] == held_out[1] != held_out[2]


@pytest.mark.parametrize("seed", range(5))
def test_no_prompt_stands_on_both_sides(make, tmp_path, seed):
    data = make(runs.pairs_file(tmp_path, 40, prompts=6), validation_fraction=0.3, seed=seed)

    def prompts(loader):
        pairs = data._sets["train"]
        return {tuple(pairs.pair(row)[0]) for row in drawn(loader)}

    train, held_out = prompts(data.train_dataloader()), prompts(data.val_dataloader())
    assert not train & held_out
    assert (len(train), len(held_out)) == (4, 2)


@pytest.mark.parametrize("source", ["fresh", "token cache"])
@pytest.mark.parametrize("truncation", ["keep_end", "keep_start"])
def test_a_prompt_that_is_cut_or_healed_never_stands_on_both_sides(make, tmp_path, monkeypatch, truncation, source):
    """The room for a prompt depends on its completions, and so does its last token: one prompt ends up as several."""
    rows = [
        {"prompt": f"Now I have a question. What is {n % 20}?", "chosen": " ok" * (n // 20), "rejected": "no"}
        for n in range(20, 120)
    ]
    path = runs.write(tmp_path / "rows.jsonl", rows)
    monkeypatch.setenv("LIT_DPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("lit_dpo.data.token_cache.WORTH_KEEPING", 1)
    limit = 18 if truncation == "keep_end" else 40
    if truncation == "keep_start":  # nothing is cut, but the last token goes with completions that begin in its middle
        rows = [
            {**row, "prompt": row["prompt"] + " ", "chosen": "abc"[n % 3] + row["chosen"]} for n, row in enumerate(rows)
        ]
        rows = [{**row, "chosen": "éa", "rejected": "éb"} if n // 20 % 2 else row for n, row in enumerate(rows)]
        path = runs.write(tmp_path / "rows.jsonl", rows)
    for _ in range(1 + (source == "token cache")):
        data = make(path, validation_fraction=0.3, max_length=limit, truncation=truncation)

    def prompts(loader):
        return {rows[int(origin.rpartition(":")[2]) - 1]["prompt"] for origin in places(data, loader, "train")}

    cut = {tuple(data._sets["train"].pair(row)[0]) for row in range(len(rows))}
    assert len(cut) > len({row["prompt"] for row in rows})
    train, held_out = prompts(data.train_dataloader()), prompts(data.val_dataloader())
    assert len(train) > len(held_out) > 0
    assert not train & held_out


def test_without_a_validation_fraction_all_pairs_are_trained_on(make, tmp_path, caplog):
    with caplog.at_level("INFO"):
        data = make(runs.pairs_file(tmp_path, 9, prompts=1), validation_fraction=0)
    assert drawn(data.train_dataloader()) == list(range(9))
    assert data.val_dataloader() == []
    assert caplog.text.count("validation: none, as `validation_fraction` is 0; all 9 pairs are trained on") == 1
    for stage in ("validate", "test", "predict"):
        with pytest.raises(ValueError, match=rf"no pairs to {stage} on: name sources for it, or set"):
            make(runs.pairs_file(tmp_path, 9), stage, validation_fraction=0)
    tested = make(data.sources["train"], "test", validation_fraction=0, test=data.sources["train"])
    assert drawn(tested.test_dataloader()) == list(range(9))


def test_validation_pairs_that_are_trained_on_are_counted_and_said(make, tmp_path, caplog):
    train, validation = runs.rows(12), runs.rows(6, start=9)  # three of them are the same
    validation[4] = {**train[0], "chosen": " Another reply."}
    files = [runs.write(tmp_path / f"{n}.jsonl", rows) for n, rows in (("train", train), ("validation", validation))]
    with caplog.at_level("INFO"):
        make(files[0], validation=files[1])
    said = "validation: 3 of 6 pairs are also trained on; 4 of 6 pairs have the prompt of a training pair"
    assert caplog.text.count(said) == 1
    caplog.clear()
    with caplog.at_level("INFO"):
        make(files[0], validation=runs.pairs_file(tmp_path, 3, "new.jsonl", start=40))
    assert "also trained on" not in caplog.text


@pytest.mark.parametrize(("fraction", "held_out"), [(0.01, 1), (0.99, 3)])
def test_neither_side_is_ever_empty(make, tmp_path, fraction, held_out):
    data = make(runs.pairs_file(tmp_path, 4), validation_fraction=fraction)
    assert len(drawn(data.val_dataloader())) == held_out


def test_one_prompt_cannot_be_held_out(make, tmp_path):
    with pytest.raises(ValueError, match=r"All pairs share one prompt.*give `validation` a source of its own"):
        make(runs.pairs_file(tmp_path, prompts=1))


def test_several_sources_come_in_order(make, tmp_path):
    first = runs.pairs_file(tmp_path, 5, "first.jsonl")
    second = runs.pairs_file(tmp_path, 4, "second.jsonl", start=100)
    data = make([second, first], validation=first, partition=BySource())
    assert data._sets["train"].sources == ["second"] * 4 + ["first"] * 5
    steps = [data.partition.next(step, Pool(data.training.pool_sources)) for step in range(2)]
    assert [rows.tolist() for rows in steps] == [[0, 1, 2, 3], [4, 5, 6, 7, 8]]
    data.training.use_rows(steps[1])
    assert drawn(data.train_dataloader()) == [4, 5, 6, 7, 8]
    assert drawn(data.pool_dataloader()) == list(range(9))


def test_a_validation_source_leaves_all_pairs_for_training(make, tmp_path):
    train = runs.pairs_file(tmp_path, 7, "train.jsonl")
    validation = runs.pairs_file(tmp_path, 3, "validation.jsonl", start=50)
    data = make(train, validation=validation)
    assert drawn(data.train_dataloader()) == list(range(7))
    assert places(data, data.val_dataloader(), "validation") == {f"{validation}:{n}" for n in (1, 2, 3)}


def test_a_partition_never_touches_what_is_held_out(make, tmp_path):
    data = make(runs.pairs_file(tmp_path, 30), partition=RandomSplit(3))
    trained = []
    for step in range(3):
        data.training.use_rows(data.partition.next(step, Pool(data.training.pool_sources)))
        trained += drawn(data.train_dataloader())
    assert sorted({*trained} | {*drawn(data.val_dataloader())}) == list(range(30))
    assert len({*trained}) == 27


@pytest.mark.parametrize(
    "rows", [[], [27], [-1], [0.0], [True] * 27, [[0]]], ids=["none", "behind", "before", "floats", "mask", "table"]
)
def test_what_is_no_row_of_the_pool_is_refused(make, tmp_path, rows):
    data = make(runs.pairs_file(tmp_path, 30))
    with pytest.raises(ValueError, match="at least one row number of the pool, from 0 to 26"):
        data.training.use_rows(torch.tensor(rows))


def test_several_parts_need_the_driver(make, tmp_path):
    data = make(runs.pairs_file(tmp_path), partition=RandomSplit(2))
    with pytest.raises(
        ValueError, match="`RandomSplit` trains in several steps: call `fit_stepwise`, or use `OneShot`"
    ):
        data.train_dataloader()


def test_test_and_predict_take_the_next_best_data(make, tmp_path):
    files = {
        name: runs.pairs_file(tmp_path, count, f"{name}.jsonl", start=10 * count)
        for name, count in (("train", 9), ("test", 4), ("predict", 3))
    }

    def counts(stage, **options):
        data = make(files["train"], stage, **options)
        loader = data.test_dataloader() if stage == "test" else data.predict_dataloader()
        rows = drawn(loader)
        return len(rows), data.origin(rows[:1])[0].split("/")[-1].split(".")[0]

    assert counts("test") == (1, "train")
    assert counts("predict") == (1, "train")
    assert counts("test", test=files["test"]) == (4, "test")
    assert counts("predict", test=files["test"]) == (4, "test")
    assert counts("predict", test=files["test"], predict=files["predict"]) == (3, "predict")
    assert counts("predict", predict=files["predict"]) == (3, "predict")
    assert counts("test", predict=files["predict"]) == (1, "train")
    assert counts("test", validation=files["test"]) == (4, "test")


@pytest.mark.parametrize("stage", ["predict", "test", "validate"])
def test_held_out_data_are_read_without_the_training_data(make, tmp_path, stage):
    data = make("no/such/file.jsonl", stage, validation=runs.pairs_file(tmp_path, 3))
    for loader in (data.predict_dataloader, data.test_dataloader, data.val_dataloader):
        assert drawn(loader()) == [0, 1, 2]
    with pytest.raises(FileNotFoundError):
        data.setup("fit")


def test_bad_rows_stop_or_are_skipped(make, tmp_path, caplog):
    rows = runs.rows(6)
    del rows[2]["chosen"]
    rows[3]["chosen"] = ""
    path = runs.write(tmp_path / "bad.jsonl", rows)
    with pytest.raises(ValueError, match=r"bad\.jsonl:3"):
        make(path)
    with caplog.at_level("INFO"):
        data = make(path, on_bad_row="skip")
    assert len(data._sets["train"]) == 4
    assert "6 rows read, 4 kept, 2 skipped" in caplog.text
    assert "bad.jsonl:4" in caplog.text


def test_columns_of_another_name(make, tmp_path):
    rows = [{"question": r["prompt"], "good": r["chosen"], "bad": r["rejected"]} for r in runs.rows(5)]
    path = runs.write(tmp_path / "named.jsonl", rows)
    data = make(path, columns={"prompt": "question", "chosen": "good", "rejected": "bad"})
    assert len(data._sets["train"]) == 5
    with pytest.raises(ValueError, match=r"named\.jsonl:1"):
        make(path)


def test_no_rows_are_an_error(make, tmp_path):
    with pytest.raises(ValueError, match=r"No row to train on in .*empty\.jsonl"):
        make(runs.write(tmp_path / "empty.jsonl", []))


def test_long_prompts_are_refused_or_cut(make, tmp_path):
    path = runs.pairs_file(tmp_path)
    with pytest.raises(ValueError, match=r"pairs\.jsonl:1, column `prompt`.*`truncation: keep_end`"):
        make(path, max_length=8)
    data = make(path, validation=path, max_length=8, truncation="keep_end")
    assert int(data._sets["train"].lengths[:, :2].sum(1).max()) == 8


def test_no_tokenizer_is_an_error():
    with pytest.raises(ValueError, match="No tokenizer: train with a `PreferenceModule`, or give"):
        PreferenceDataModule().setup("fit")


def test_files_are_read_once(make, tmp_path):
    path = tmp_path / "pairs.jsonl"
    data = make(runs.pairs_file(tmp_path, 6))
    path.unlink()
    data.setup("fit")
    data.setup("validate")
    assert len(drawn(data.train_dataloader())) == 5


def test_every_epoch_of_a_trainer_has_its_own_order(tmp_path):
    """With worker processes that stay, too, which fetch ahead."""
    for workers in (0, 2):
        module, seen = runs.module(), []

        def note(batch, batch_idx, module=module, seen=seen):
            seen.append((module.current_epoch, tuple(batch.row_ids.tolist())))
            return type(module).training_step(module, batch, batch_idx)

        module.training_step = note
        data = runs.data(runs.pairs_file(tmp_path), batch_size=4, num_workers=workers)
        runs.fit(module, data, max_epochs=3, limit_val_batches=0)
        epochs = [[rows for at, rows in seen if at == epoch] for epoch in range(3)]
        assert len({str(epoch) for epoch in epochs}) == 3
        assert len({str(sorted(row for rows in epoch for row in set(rows))) for epoch in epochs}) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
        ({"eval_batch_size": -1}, "`eval_batch_size` must be at least 1, got -1"),
        ({"validation_fraction": -0.1}, r"`validation_fraction` must be at least 0 and less than 1, got -0\.1"),
        ({"validation_fraction": 1.0}, "`validation_fraction` must be at least 0 and less than 1"),
        ({"chat_template": "no/such.jinja"}, r"`chat_template`: there is no file `no/such.jinja`\. Give a .jinja file"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        PreferenceDataModule(**options)


def test_evaluation_batches_are_twice_as_large_by_default(make, tmp_path):
    data = make(runs.pairs_file(tmp_path, 24), batch_size=2, validation_fraction=0.5)
    assert [len(batch) for batch in data.val_dataloader()] == [4, 4, 4]
    assert torch.is_tensor(next(iter(data.train_dataloader())).input_ids)
