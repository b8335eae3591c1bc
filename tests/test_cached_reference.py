"""The cached reference: the same training bit for bit, reused exactly where it may be, rebuilt where it is damaged."""

import json
import logging

import lightning as L
import pytest
import torch

from lit_dpo import (
    CachedReference,
    DPOLoss,
    FrozenReference,
    IntermediateLoss,
    IPOLoss,
    LoRA,
    PairBatch,
    Pool,
    PreferenceDataModule,
    PreferenceModule,
    RandomSplit,
)
from lit_dpo.checkpoints.tensor_store import TensorStore
from lit_dpo.models import load_model
from lit_dpo.references.table import LogpsTable, content_keys, fingerprint
from lit_dpo.tokenizers import load_tokenizer, train_tokenizer

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers", "ignore:.*LeafSpec", "ignore:.*is_gradient_checkpointing.* is deprecated"
)
LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "initializer_range": 0.2,
}
TRAIN, VALIDATION, LIMIT = 10, 4, 50


def pairs(count, first=0):
    rows = []
    for i in range(first, first + count):
        user = [{"role": "user", "content": f"Question {i}, what is it?"}]
        chosen = {"role": "assistant", "content": f"It is the number {i} and a long answer."}
        rejected = {"role": "assistant", "content": f"no {i}"}
        if i == 0:  # one row that a limit of `LIMIT` tokens cuts
            chosen["content"] *= 3
        rows.append({"prompt": user, "chosen": [chosen], "rejected": [rejected]})
    return rows


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def place(tmp_path):
    """Files, a tokenizer folder, and the cache folder of one test."""
    write(tmp_path / "train.jsonl", pairs(TRAIN))
    write(tmp_path / "validation.jsonl", pairs(VALIDATION, first=100))
    train_tokenizer(["It is the number and a long answer, what is it? Question"], 320).save_pretrained(tmp_path / "tok")
    return tmp_path


def run(place, reference=None, steps=0, module=None, data=None, loss=None):
    """A fit on the files of `place`; returns the reference, the module and the validation metrics."""
    reference = reference or CachedReference(str(place / "cache"))
    options = {"model": LLAMA, "tokenizer": str(place / "tok"), "optimizer": lambda p: torch.optim.SGD(p, lr=0.1)}
    model = PreferenceModule(**{**options, "loss": loss or DPOLoss(), "reference": reference, **(module or {})})
    files = {"train": str(place / "train.jsonl"), "validation": str(place / "validation.jsonl")}
    pairs_of = PreferenceDataModule(**{**files, "batch_size": 4, **(data or {})})
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = L.Trainer(max_steps=steps, accelerator="cpu", num_sanity_val_steps=0, **quiet)
    if pairs_of.stepwise:
        pairs_of.tokenizer = model.tokenizer
        pairs_of.setup("fit")
        pairs_of.training.use_rows(pairs_of.partition.next(0, Pool(pairs_of.training.pool_sources)))
    trainer.fit(model, pairs_of)
    counts = (reference.scored, reference.reused) if isinstance(reference, CachedReference) else None
    metrics = trainer.validate(model, pairs_of, verbose=False)[0] if steps else {}
    return counts, model, metrics


@pytest.mark.every(3)
@pytest.mark.parametrize("loss", [DPOLoss(), IntermediateLoss(layers=(1, 2))], ids=["dpo", "intermediate"])
@pytest.mark.parametrize("adapter", [None, LoRA(rank=2)], ids=["full", "lora"])
def test_training_is_bit_identical_to_a_live_reference(place, loss, adapter):
    """Cached and live log-probs come from the same weights through the same code, so nothing may differ."""
    live = None if adapter else FrozenReference()
    _, trained, expected = run(place, live or _default(), 4, {"adapter": adapter}, loss=loss)
    _, cached, metrics = run(place, None, 4, {"adapter": adapter}, loss=loss)
    assert metrics == pytest.approx(expected, abs=1e-6)
    for (name, ours), theirs in zip(
        cached.policy.state_dict().items(), trained.policy.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6, msg=name)


def _default():
    from lit_dpo import AdapterReference

    return AdapterReference()


def test_a_second_run_reuses_everything_whatever_its_loss_beta_rate_or_seed(place):
    everything = TRAIN + VALIDATION
    assert run(place)[0] == (everything, 0)
    assert run(place)[0] == (0, everything)
    assert run(place, loss=DPOLoss(beta=0.7))[0] == (0, everything)
    assert run(place, loss=IPOLoss())[0] == (0, everything)
    assert run(place, module={"optimizer": lambda p: torch.optim.AdamW(p, lr=1.0)})[0] == (0, everything)
    assert run(place, data={"seed": 5, "batch_size": 2})[0] == (0, everything)


def test_lora_ranks_share_one_entry(place):
    assert run(place, module={"adapter": LoRA(rank=2)})[0] == (TRAIN + VALIDATION, 0)
    assert run(place, module={"adapter": LoRA(rank=4)})[0] == (0, TRAIN + VALIDATION)


def test_intermediate_layers_are_added_and_then_serve_the_last_layer_too(place):
    everything = TRAIN + VALIDATION
    assert run(place, loss=IntermediateLoss(layers=(2,)))[0] == (everything, 0)
    assert run(place, loss=IntermediateLoss(layers=(2,)))[0] == (0, everything)
    assert run(place, loss=DPOLoss())[0] == (0, everything)
    assert run(place, loss=IntermediateLoss(layers=(1,)))[0] == (everything, 0)
    assert run(place, loss=IntermediateLoss(layers=(1, 2)))[0] == (0, everything)


def changed_template(place):
    tokenizer = train_tokenizer(["It is the number and a long answer, what is it? Question"], 320)
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_start|>", "<|im_start|>: ")
    tokenizer.save_pretrained(place / "other")
    return {"tokenizer": str(place / "other")}


def changed_tokenizer(place):
    train_tokenizer(["quite other text to learn merges from"], 320).save_pretrained(place / "other")
    return {"tokenizer": str(place / "other")}


def one_row_changed(place):
    rows = pairs(TRAIN)
    rows[3]["chosen"][0]["content"] = "Something else."
    return {"train": write(place / "train.jsonl", rows)}


ALL, ONE = TRAIN + VALIDATION, 1
TABLE = {  # what changes: (options of the module, options of the data, rows that must be scored anew)
    "weights": (lambda place: {"init_seed": 1}, None, ALL),
    "model config": (
        lambda place: {"model": {**LLAMA, "rope_parameters": {"rope_type": "default", "rope_theta": 50.0}}},
        None,
        ALL,
    ),
    "tokenizer": (changed_tokenizer, None, ALL),
    "chat template": (changed_template, None, ALL),
    "max_length": (None, lambda place: {"max_length": LIMIT}, ONE),
    "truncation side": (None, lambda place: {"max_length": LIMIT, "truncation": "keep_end"}, ONE),
    "dtype": (lambda place: {"dtype": "float64"}, None, ALL),
    "attention": (lambda place: {"form": "padded"}, None, ALL),
    "adapter state": (lambda place: {"adapter": LoRA(rank=2)}, None, ALL),
    "row content": (None, one_row_changed, ONE),
    "row order": (None, lambda place: {"train": write(place / "train.jsonl", pairs(TRAIN)[::-1])}, 0),
    "subset": (None, lambda place: {"train": write(place / "train.jsonl", pairs(TRAIN)[:4])}, 0),
    "partition": (None, lambda place: {"partition": RandomSplit(2)}, 0),
    "cache format": ("format", None, ALL),
}


@pytest.mark.every(4)
@pytest.mark.parametrize("what", TABLE)
def test_changed_inputs_are_missed_and_unchanged_ones_reused(place, monkeypatch, what):
    module, data, expected = TABLE[what]
    assert run(place)[0] == (ALL, 0)
    if what == "truncation side":  # the same limit before, cutting at the other side
        assert run(place, data={"max_length": LIMIT})[0] == (ONE, ALL - ONE)
    if module == "format":
        monkeypatch.setattr("lit_dpo.checkpoints.tensor_store.FORMAT", 2)
        module = None
    (scored, reused), _, _ = run(place, module=module and module(place), data=data and data(place))
    assert scored == expected
    again, _, _ = run(place, module=module and module(place), data=data and data(place))
    assert again == (0, scored + reused)


def damage(path, how):
    content = bytearray(path.read_bytes())
    if how == "cut":
        content = content[: len(content) // 2]
    elif how == "zeroed":
        content = bytes(len(content))
    path.write_bytes(bytes(content))


@pytest.mark.every(5)
@pytest.mark.parametrize("suffix", ["safetensors", "json"])
@pytest.mark.parametrize("how", ["cut", "zeroed", "missing"])
def test_damaged_files_are_rebuilt_with_one_line(place, caplog, how, suffix):
    run(place)
    (path,) = (place / "cache").glob(f"*.{suffix}")
    path.unlink() if how == "missing" else damage(path, how)
    with caplog.at_level(logging.INFO):
        assert run(place)[0] == (ALL, 0)
    lines = [r.message for r in caplog.records if "is damaged" in r.message]
    assert len(lines) == (0 if (how, suffix) == ("missing", "json") else 1)  # without a header there is nothing at all
    assert run(place)[0] == (0, ALL)


@pytest.mark.parametrize("wrong", ["everywhere", "validation"])
def test_wrong_values_under_a_right_checksum_fail_the_audit(place, caplog, wrong):
    """Wrong validation rows are found after the training rows have passed; those are scored anew with them."""
    run(place)
    (header,) = (place / "cache").glob("*.json")
    identity = json.loads(header.read_text())["identity"]
    store = TensorStore(place / "cache", {k: v for k, v in identity.items() if k != "format"})
    table = LogpsTable.from_tensors(store.read()[0])
    shift = torch.ones(len(table), 1)
    if wrong == "validation":
        data = PreferenceDataModule(
            str(place / "train.jsonl"), str(place / "validation.jsonl"), tokenizer=load_tokenizer(str(place / "tok"))
        )
        data.setup("fit")
        held_out = [content_keys(batch) for batch in data.val_dataloader()]
        shift = torch.zeros(len(table), 1)
        shift[table.find(torch.cat(held_out))[0]] = 1.0
    store.write({"keys": table.keys, "last": table.columns["last"] + shift})
    with caplog.at_level(logging.INFO):
        assert run(place, steps=2)[0][0] == ALL
    assert caplog.text.count("differs from the model's own log-probs") == 1


def test_a_restored_checkpoint_does_not_become_the_reference(place):
    """`validate` of a trained policy scores missing rows with the starting weights, not with the policy's."""
    _, trained, expected = run(place, FrozenReference(), 4)
    reference = CachedReference(str(place / "cache"))
    module = PreferenceModule(LLAMA, tokenizer=str(place / "tok"), reference=reference)
    module.configure_model()
    module.policy.load_state_dict(trained.policy.state_dict())
    files = {"train": str(place / "train.jsonl"), "validation": str(place / "validation.jsonl")}
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    metrics = trainer.validate(module, PreferenceDataModule(**files, batch_size=4), verbose=False)[0]
    assert reference.scored == VALIDATION
    assert metrics == pytest.approx(expected, abs=1e-5)


def test_other_loaders_are_refused(place):
    module = PreferenceModule(LLAMA, tokenizer=str(place / "tok"), reference=CachedReference(str(place / "cache")))
    loader = torch.utils.data.DataLoader([PairBatch.from_lists([([1], [2], [3])])], batch_size=None)
    trainer = L.Trainer(max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False)
    with pytest.raises(ValueError, match="needs a `PreferenceDataModule`"):
        trainer.fit(module, loader, loader)


def test_content_keys_see_ids_and_boundaries_and_nothing_else():
    one = ([1, 2, 3], [4, 5], [6])
    keys = content_keys(
        PairBatch.from_lists([one, ([1, 2], [3, 4, 5], [6]), ([1, 2, 3], [4], [5, 6]), ([1, 3, 2], [4, 5], [6])])
    )
    assert len({tuple(key) for key in keys.tolist()}) == 4
    alone = content_keys(PairBatch.from_lists([([9], [9], [9]), one]))[1]
    assert torch.equal(alone, keys[0])


def test_fingerprint_sees_every_bit_name_shape_and_dtype():
    base = {"a": torch.randn(3, 5), "b": torch.arange(4)}
    prints = {fingerprint(base.items())}
    changed = base["a"].clone()
    changed.view(torch.int32)[2, 4] ^= 1
    for other in (
        {**base, "a": changed},
        {**base, "a": base["a"].reshape(5, 3)},
        {"c": base["a"], "b": base["b"]},
        {**base, "b": base["b"].double()},
        {"a": base["a"]},
    ):
        prints.add(fingerprint(other.items()))
    assert len(prints) == 6
    assert fingerprint({k: v.clone() for k, v in base.items()}.items()) == fingerprint(base.items())


def test_fingerprint_of_a_model_is_that_of_its_copy():
    first, second = (load_model({**LLAMA, "vocab_size": 64}, seed=3) for _ in range(2))
    assert fingerprint(first.state_dict().items()) == fingerprint(second.state_dict().items())
