"""Checkpoints on disk: whole or not at all, checked when read, and never a way to run code."""

import errno
import json
import os
import random
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.fabric.plugins import TorchCheckpointIO

from lit_dpo.checkpoints import io
from lit_dpo.checkpoints import verify as verifying
from lit_dpo.checkpoints.durable import refuse_unwritable
from lit_dpo.checkpoints.io import DurableCheckpointIO, keep_as, make_durable
from lit_dpo.checkpoints.verify import manifest_of, verify, write_shards_manifest
from tests import runs

pytestmark = runs.QUIET
ROOT = Path(__file__).parents[1]


def content(step):
    return {"global_step": step, "state_dict": {"weight": torch.full((64, 64), float(step))}}


@pytest.fixture
def saved(tmp_path):
    """A good checkpoint of step 1."""
    DurableCheckpointIO().save_checkpoint(content(1), tmp_path / "last.ckpt")
    return tmp_path / "last.ckpt"


def step(path):
    return DurableCheckpointIO().load_checkpoint(path)["global_step"]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# -- saving -----------------------------------------------------------------------------------------------------------


def test_what_is_saved_is_loaded(saved):
    DurableCheckpointIO().save_checkpoint(content(2), saved)
    found = DurableCheckpointIO().load_checkpoint(saved)
    assert found["global_step"] == 2
    assert torch.equal(found["state_dict"]["weight"], torch.full((64, 64), 2.0))
    assert names(saved.parent) == ["last.ckpt", "last.ckpt.json"]


def test_lightning_itself_can_read_it(saved):
    assert TorchCheckpointIO().load_checkpoint(saved, weights_only=True)["global_step"] == 1


@pytest.mark.parametrize("moment", ["write", "fsync", "read back", "rename"])
def test_an_error_while_saving_leaves_the_previous_one_and_says_where(saved, monkeypatch, moment):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    if moment == "write":
        monkeypatch.setattr(io._Hashed, "write", full)
    elif moment == "fsync":
        monkeypatch.setattr(os, "fsync", full)
    elif moment == "read back":
        monkeypatch.setattr(io, "_sum_of_file", lambda path: "another")
    else:
        monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match=r"last\.ckpt` cannot be written .* bytes free; what stood there before is"):
        DurableCheckpointIO().save_checkpoint(content(2), saved)
    monkeypatch.undo()
    assert step(saved) == 1
    assert not [name for name in names(saved.parent) if name.endswith("ckpt.part")]


@pytest.mark.slow
@pytest.mark.parametrize("limit", [4096, 16500])
def test_a_full_disk_leaves_the_previous_one(saved, limit):
    """A real limit of the system on the size of a file, in a process of its own."""
    code = (
        "import resource, signal, sys, torch\n"
        "from lit_dpo.checkpoints.io import DurableCheckpointIO\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
        "try:\n"
        "    DurableCheckpointIO().save_checkpoint({'w': torch.zeros(64, 64)}, sys.argv[1])\n"
        "except OSError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(saved)], capture_output=True, text=True, cwd=ROOT)
    assert "last.ckpt` cannot be written" in done.stdout, done.stderr
    assert step(saved) == 1
    assert names(saved.parent) == ["last.ckpt", "last.ckpt.json"]


def test_a_crash_between_the_two_renames_leaves_a_loadable_one(saved, monkeypatch):
    original = os.replace

    def crash(source, target):
        if str(target).endswith(".ckpt"):
            raise SystemExit
        original(source, target)

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(SystemExit):
        DurableCheckpointIO().save_checkpoint(content(2), saved)
    monkeypatch.undo()
    assert step(saved) == 1
    DurableCheckpointIO().save_checkpoint(content(3), saved)
    assert step(saved) == 3


KILLING = """
import os, random, signal, sys, time, torch
from lit_dpo.checkpoints.io import DurableCheckpointIO

target, draw = sys.argv[1], random.Random(0)
for round in range(20):
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        for step in range(1, 100000):
            content = {"step": step, "state_dict": {"w": torch.full((500, 1000), float(step))}}
            DurableCheckpointIO().save_checkpoint(content, target)
            os.write(writer, step.to_bytes(4, "big"))
    os.close(writer)
    first = os.read(reader, 4)  # so that there is something to lose
    time.sleep(draw.uniform(0, 0.2))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    told = first + os.read(reader, 1 << 16)
    done = int.from_bytes(told[-4:], "big")
    found = DurableCheckpointIO().load_checkpoint(target)
    assert found["step"] in (done, done + 1), (found["step"], done)
    assert bool((found["state_dict"]["w"] == found["step"]).all())
    print("loadable", flush=True)
"""


@pytest.mark.slow
def test_kill_9_while_saving_always_leaves_a_loadable_checkpoint(tmp_path):
    """20 of 20, with the temporary folder on another file system, where Lightning's own way loses some."""
    other = "/dev/shm" if os.path.isdir("/dev/shm") else str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", KILLING, str(tmp_path / "last.ckpt")], capture_output=True, text=True, cwd=ROOT,
        env={**os.environ, "TMPDIR": other, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.stdout.count("loadable") == 20, done.stderr


# -- damage -----------------------------------------------------------------------------------------------------------


def test_every_one_of_300_bit_flips_is_noticed_and_the_good_one_offered(saved):
    good = saved.with_name("previous.ckpt")
    keep_as(saved, good)
    DurableCheckpointIO().save_checkpoint(content(2), saved)
    whole, draw = saved.read_bytes(), random.Random(0)
    for _ in range(300):
        place = draw.randrange(len(whole))
        broken = bytearray(whole)
        broken[place] ^= 1 << draw.randrange(8)
        saved.write_bytes(broken)
        with pytest.raises(ValueError, match=r"last\.ckpt` is damaged .* Resume from `.*previous\.ckpt`"):
            DurableCheckpointIO().load_checkpoint(saved)
    saved.write_bytes(whole)
    assert (step(saved), step(good)) == (2, 1)


@pytest.mark.parametrize("size", [0, 1, 100, -1])
def test_a_cut_one_is_refused_by_name(saved, size):
    saved.write_bytes(saved.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"last\.ckpt` is damaged .* No other checkpoint is in its folder"):
        DurableCheckpointIO().load_checkpoint(saved)


def test_a_broken_manifest_is_no_proof(saved):
    manifest_of(saved).write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        verify(saved)


@pytest.mark.parametrize("text", ["[" * 200_000, "[]", "3", '{"sha256": 3}', '{"sha256": []}', "{}", "\\ud800", ""])
def test_a_manifest_of_any_form_is_damage_and_does_not_stop_the_next_save(saved, text):
    manifest_of(saved).write_text(text)
    with pytest.raises(ValueError, match=r"last\.ckpt` is damaged"):
        verify(saved)
    DurableCheckpointIO().save_checkpoint(content(2), saved)
    assert step(saved) == 2


def test_pipes_are_refused_without_waiting_for_them(saved):
    os.mkfifo(saved.with_name("pipe.ckpt"))
    with pytest.raises(ValueError, match="is a pipe, and only regular files are read"):
        verify(saved.with_name("pipe.ckpt"))
    with pytest.raises(FileNotFoundError, match=r"Resume from `.*last\.ckpt`"):
        verify(saved.with_name("nothing.ckpt"))
    manifest_of(saved).unlink()
    os.mkfifo(manifest_of(saved))
    with pytest.raises(ValueError, match="is a pipe, and only regular files are read"):
        verify(saved)


def test_without_a_manifest_the_archives_own_sums_are_checked(saved):
    manifest_of(saved).unlink()
    assert step(saved) == 1
    whole = bytearray(saved.read_bytes())
    whole[len(whole) // 2] ^= 1
    saved.write_bytes(whole)
    with pytest.raises(ValueError, match="another checksum"):
        verify(saved)


def test_there_is_none(saved):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint `.*nothing\.ckpt`. Resume from `.*last\.ckpt`"):
        DurableCheckpointIO().load_checkpoint(saved.with_name("nothing.ckpt"))


@pytest.mark.parametrize("links", [True, False])
def test_the_previous_one_stays_under_its_own_name(saved, monkeypatch, links):
    if not links:
        monkeypatch.setattr(os, "link", lambda *args: (_ for _ in ()).throw(OSError("no links here")))
    previous = saved.with_name("previous.ckpt")
    for number in (2, 3):
        keep_as(saved, previous)
        DurableCheckpointIO().save_checkpoint(content(number), saved)
        assert (step(saved), step(previous)) == (number, number - 1)


def test_a_damaged_one_never_replaces_the_previous(saved):
    previous = saved.with_name("previous.ckpt")
    keep_as(saved, previous)
    DurableCheckpointIO().save_checkpoint(content(2), saved)
    saved.write_bytes(saved.read_bytes()[:-1])
    keep_as(saved, previous)
    assert step(previous) == 1


def test_a_crash_while_replacing_a_damaged_one_does_not_vouch_for_it(saved, monkeypatch):
    saved.write_bytes(saved.read_bytes()[:-1])
    original = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: original(a, b) if str(b).endswith("json") else sys.exit())
    with pytest.raises(SystemExit):
        DurableCheckpointIO().save_checkpoint(content(2), saved)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="is damaged"):
        verify(saved)


def test_files_and_folders_of_shards_follow_each_other(saved):
    previous = saved.with_name("previous.ckpt")
    keep_as(saved, previous)
    saved.unlink(), manifest_of(saved).unlink()
    for number in (1, 2):
        saved.mkdir()
        (saved / "meta.pt").write_bytes(bytes([number]))
        write_shards_manifest(saved)
        keep_as(saved, previous)
        verify(previous)
        assert ((previous / "meta.pt").read_bytes(), saved.exists()) == (bytes([number]), False)
    saved.mkdir()  # and now before the end of the shards
    (saved / "__0_0.distcp").write_bytes(b"")
    keep_as(saved, previous)
    assert not saved.exists()
    DurableCheckpointIO().save_checkpoint(content(3), saved)
    keep_as(saved, previous)
    assert step(previous) == 3


def test_shards_are_checked_file_by_file(tmp_path):
    folder = tmp_path / "last.ckpt"
    folder.mkdir()
    (folder / "__0_0.distcp").write_bytes(b"first")
    with pytest.raises(ValueError, match=r"has no `meta\.pt`"):
        verify(folder)
    (folder / "meta.pt").write_bytes(b"second")
    write_shards_manifest(folder)
    verify(folder)
    (folder / "__0_0.distcp").write_bytes(b"First")
    with pytest.raises(ValueError, match=r"__0_0\.distcp: not what the manifest says"):
        verify(folder)


def test_removing_takes_the_manifest_along(saved):
    DurableCheckpointIO().remove_checkpoint(saved)
    assert names(saved.parent) == []


# -- at the start -----------------------------------------------------------------------------------------------------


def test_a_folder_that_cannot_be_written_to_is_found_at_the_start(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"cannot be written to `.*file/checkpoints`"):
        refuse_unwritable(tmp_path / "file" / "checkpoints", 0)
    with pytest.raises(OSError, match=r"needs about .* bytes and `.*` has .* free"):
        refuse_unwritable(tmp_path, 1 << 62)
    refuse_unwritable(tmp_path / "new", 100)
    assert names(tmp_path / "new") == []


def test_a_plugin_of_the_users_own_is_left_alone():
    class Mine(TorchCheckpointIO):
        pass

    trainer = runs.trainer()
    make_durable(trainer)
    assert isinstance(trainer.strategy.checkpoint_io, DurableCheckpointIO)
    trainer = runs.trainer(plugins=[Mine()])
    make_durable(trainer)
    assert type(trainer.strategy.checkpoint_io) is Mine


# -- code in pickles --------------------------------------------------------------------------------------------------


def malicious(canary):
    """12 ways to have a pickle run something when it is loaded."""
    import builtins
    import pathlib

    code = f"open({str(canary)!r}, 'w').close()"

    def reduced(function, *args):
        class Bomb:
            def __reduce__(self):
                return function, args

        return Bomb()

    class Stateful:
        def __reduce__(self):
            return (list, (), None, iter([reduced(os.system, f"touch {canary}")]))

    touch = f"touch {canary}"
    bombs = {
        "os.system": reduced(os.system, touch),
        "subprocess": reduced(subprocess.call, ["touch", str(canary)]),
        "eval": reduced(builtins.eval, f"__import__('os').system({touch!r})"),
        "exec": reduced(builtins.exec, code),
        "popen": reduced(os.popen, touch),
        "import": reduced(__import__, "this_module_must_not_be_imported"),
        "pathlib": reduced(pathlib.Path.touch, canary),
        "open": reduced(open, str(canary), "w"),
        "getattr": reduced(getattr, reduced(__import__, "os"), "system"),
        "torch.load": reduced(torch.load, str(canary)),
        "iterator": Stateful(),
        "rmtree": reduced(shutil.rmtree, str(canary)),
    }
    places = {
        "eval": lambda bomb: {"optimizer_states": [bomb]},
        "popen": lambda bomb: {"hyper_parameters": {"loss": bomb}},
        "open": lambda bomb: {"callbacks": {"RunSummary": bomb}},
        "pathlib": lambda bomb: {"lit_dpo": {"sums": bomb}},
    }
    return {name: places.get(name, lambda bomb: {"state_dict": {"w": bomb}})(bomb) for name, bomb in bombs.items()}


@pytest.mark.parametrize("with_manifest", [True, False])
def test_no_malicious_pickle_is_executed(tmp_path, with_manifest):
    from lit_dpo.export import export_checkpoint

    canary = tmp_path / "canary"
    tried = malicious(canary)
    assert len(tried) == 12
    for name, bad in tried.items():
        path = tmp_path / f"{name}.ckpt"
        torch.save({"state_dict": {}, "hyper_parameters": {"model": "x"}, **bad}, path)
        if with_manifest:
            manifest_of(path).write_text(json.dumps({"sha256": verifying._sum_of_file(path), "previous": None}))
        for load in (
            lambda path: DurableCheckpointIO().load_checkpoint(path, weights_only=False),
            lambda path: export_checkpoint(str(path), str(tmp_path / "out")),
        ):
            with pytest.raises(Exception, match=r"(?i)weights.only|unsupported|does not load"):
                load(path)
            assert not canary.exists(), name
    assert "this_module_must_not_be_imported" not in sys.modules


def test_part_files_have_unique_names_and_those_of_killed_processes_go(tmp_path):
    """A neighbour's, another file's and a living process's stay."""
    target, host = tmp_path / "last.ckpt", socket.gethostname()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    names = [f".last.ckpt.{host}-{os.getppid()}.part", ".last.ckpt.part", f".other.ckpt.{host}-{dead.pid}.part"]
    for name in (*names, f".last.ckpt.{host}-{dead.pid}.part"):
        (tmp_path / name).write_text(name)
    DurableCheckpointIO().save_checkpoint({"a": torch.ones(2)}, target)
    left = {path.name: path.read_text() for path in tmp_path.iterdir() if path.name.endswith(".part")}
    assert left == {name: name for name in names}
