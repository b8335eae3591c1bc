import random

import torch

from lit_dpo.store import TensorStore


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
