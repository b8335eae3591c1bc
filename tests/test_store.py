import json
import os
import random

import pytest
import torch

from lit_dpo import CachedReference
from lit_dpo.checkpoints.tensor_store import TensorStore
from lit_dpo.references.table import LogpsTable
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
