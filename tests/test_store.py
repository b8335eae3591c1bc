import json
import os
import random

import pytest
import torch

from lit_dpo import CachedReference
from lit_dpo.checkpoints.tensor_store import TensorStore
from lit_dpo.data import token_cache as tokens
from lit_dpo.data.encode import PairEncoder
from lit_dpo.data.load import load_pairs
from lit_dpo.references.table import LogpsTable
from lit_dpo.tokenizers import quickstart_tokenizer
from tests import runs

pytestmark = runs.QUIET


def test_what_is_written_is_read_and_only_under_its_own_identity(tmp_path):
    tensors = {"a": torch.arange(6).view(2, 3), "b": torch.tensor([0.5])}
    TensorStore(tmp_path / "new", {"who": "a test"}).write(tensors)
    found, problem = TensorStore(tmp_path / "new", {"who": "a test"}).read()
    assert problem is None
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert TensorStore(tmp_path / "new", {"who": "another"}).read() == (None, None)
    assert (tmp_path / "new").stat().st_mode & 0o077 == 0


def test_every_one_of_300_bit_flips_is_noticed(tmp_path):
    store = TensorStore(tmp_path, {"who": "a test"})
    store.write({"keys": torch.randint(2**62, (50, 2)), "last": torch.randn(50, 2)})
    assert store.read()[1] is None
    chance = random.Random(0)
    for _ in range(300):
        path = chance.choice([store.data, store.header])
        good = path.read_bytes()
        bad = bytearray(good)
        bad[chance.randrange(len(bad))] ^= 1 << chance.randrange(8)
        path.write_bytes(bytes(bad))
        tensors, problem = store.read()
        assert tensors is None
        assert problem
        path.write_bytes(good)
    assert store.read()[0] is not None


def test_a_file_that_somebody_else_has_written_under_matching_sums_is_noticed(tmp_path):
    """Sums are no signatures: whoever reads says what its tensors must look like, as here and in the two caches."""
    store = TensorStore(tmp_path, {"who": "a test"})
    store.write({"b": torch.zeros(2)})
    assert store.read(lambda tensors: None if "a" in tensors else "it has no `a`") == (None, "it has no `a`")
    store.data.unlink()
    os.mkfifo(store.data)
    tensors, problem = store.read()
    assert tensors is None
    assert "is a pipe" in problem


GOOD = {"keys": torch.arange(6).view(3, 2), "last": torch.zeros(3, 2)}
FOREIGN = (
    {},
    {"x": torch.zeros(2)},
    {**GOOD, "keys": torch.zeros(3, 2)},
    {**GOOD, "keys": torch.arange(6)},
    {"keys": GOOD["keys"]},
    {**GOOD, "last": torch.zeros(3)},
    {**GOOD, "last": torch.zeros(2, 2)},
    {**GOOD, "last": GOOD["keys"].clone()},
)


@pytest.mark.parametrize("number", [0, 1, 6])
def test_a_foreign_table_of_log_probs_is_scored_anew(tmp_path, caplog, number):
    """Written by the store itself, so that every sum and the identity are right."""
    assert LogpsTable.problem(GOOD) is None
    assert all(LogpsTable.problem(foreign) for foreign in FOREIGN)
    weights = []
    for forge in (False, True):
        for header in (tmp_path / "cache").glob("*.json"):
            store = TensorStore(tmp_path / "cache", {})
            store.identity = json.loads(header.read_text())["identity"]
            store.data, store.header = header.with_suffix(".safetensors"), header
            store.write(FOREIGN[number])
        caplog.clear()
        with caplog.at_level("INFO"):
            module = runs.module(reference=CachedReference(str(tmp_path / "cache")))
            runs.fit(module, runs.data(runs.pairs_file(tmp_path)), max_steps=1)
        weights.append(runs.weights(module.policy))
        assert ("is damaged (it" in caplog.text) == forge
    assert runs.same(*weights)


def test_a_foreign_table_of_token_ids_is_encoded_anew(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("LIT_DPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tokens, "WORTH_KEEPING", 1)
    file = runs.pairs_file(tmp_path)
    encoder = PairEncoder(quickstart_tokenizer(), 128)

    def load():
        cache = tokens.TokenCache(encoder, [file])
        found = load_pairs([file], cache)[0]
        cache.keep()
        return [row.encoded for row in found], cache

    expected, cache = load()
    good = cache._store.read()[0]
    assert load()[1].reused == 24
    ids, lengths = good["tokens"], good["lengths"]
    spoilt = lengths.clone()
    spoilt[0, 0], spoilt[0, 1] = -1, lengths[0, :2].sum() + 1
    for change in (
        {"keys": good["keys"][:5]}, {"keys": good["keys"].int()}, {"lengths": lengths.float()},
        {"lengths": spoilt}, {"flags": good["flags"][0]}, {"tokens": ids + 5000}, {"tokens": ids - 5000},
        {"tokens": ids[:-1]}, {"tokens": ids.view(1, -1)}, {"tokens": ids.float()},
    ):  # fmt: skip
        cache._store.write({**good, **change})
        with caplog.at_level("INFO"):
            found, again = load()
        assert (found, again.reused) == (expected, 0)
    cache._store.write({name: value for name, value in good.items() if name != "flags"})
    assert load()[0] == expected
    assert caplog.text.count("is damaged (it") == 11
