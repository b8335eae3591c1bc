"""Files and folders appear whole or not at all, and nothing but one's own parts is removed on the way."""

import os
import socket
import stat
import subprocess
import sys
import threading

import pytest
import torch
from transformers import AutoModelForCausalLM

import lit_dpo.callbacks.exporting
from lit_dpo.callbacks import ExportModel
from lit_dpo.checkpoints.durable import replace_file, replace_folder
from tests import runs

pytestmark = runs.QUIET


def tree(folder):
    """Every file below a folder with its content, every folder, and every link."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else path.is_symlink()
        for path in sorted(folder.rglob("*"))
    }


@pytest.fixture
def decoys(tmp_path):
    """Files and folders of somebody else's with names much like those of parts, beside ``thing``."""
    host = socket.gethostname()
    for name in (".thing.part", f".thing.{host}-1.part", f".thing.{host}-99999999x.0123456789abcdef.part"):
        (tmp_path / name).write_text("mine")
    for name in (".thing.abcdefgh", f".thing.{host}-99999999.0123456789abcdef.part"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "policy.ckpt").write_text("mine")
    (tmp_path / f".thing.{host}-99999998.part").symlink_to(tmp_path / ".thing.abcdefgh")
    return tree(tmp_path)


def test_an_error_leaves_what_was_there(tmp_path, decoys):
    target = tmp_path / "thing"
    for content in (None, b"old"):
        if content is not None:
            target.write_bytes(content)
        with pytest.raises(KeyboardInterrupt), replace_file(target) as file:  # noqa: PT012
            file.write(b"half")
            raise KeyboardInterrupt
        assert tree(tmp_path) == decoys | ({} if content is None else {"thing": content})
    with replace_file(target) as file:
        file.write(b"new")
        assert target.read_bytes() == b"old"
    assert tree(tmp_path) == {**decoys, "thing": b"new"}


def test_a_folder_appears_whole_or_not_at_all(tmp_path, decoys):
    target = tmp_path / "thing"
    target.mkdir()  # an empty one may stand there
    before = tree(tmp_path)
    with pytest.raises(SystemExit), replace_folder(target) as part:  # noqa: PT012
        (part / "inner").mkdir()
        (part / "inner" / "half").write_text("half")
        raise SystemExit
    assert tree(tmp_path) == before
    with replace_folder(target) as part:
        (part / "inner").mkdir()
        (part / "inner" / "whole").write_text("whole")
        assert not any(target.iterdir())
    assert tree(tmp_path) == {**decoys, "thing": False, "thing/inner": False, "thing/inner/whole": b"whole"}


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_new_folder_replaces_nothing_that_appeared_meanwhile(tmp_path, decoys, kind):
    target = tmp_path / "thing"
    with pytest.raises(OSError, match="thing"), replace_folder(target) as part:  # noqa: PT012
        (part / "a").write_text("a")
        if kind == "folder":
            target.mkdir()
            (target / "mine").write_text("mine")
        else:
            target.write_text("mine")
    there = {"thing": False, "thing/mine": b"mine"} if kind == "folder" else {"thing": b"mine"}
    assert tree(tmp_path) == decoys | there


def test_it_is_on_the_disk_before_its_name_is(tmp_path, monkeypatch):
    """Content, then the rename, then the folder that holds the name."""
    seen = []
    sync, replace = os.fsync, os.replace

    def kind(handle):
        return "folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file"

    monkeypatch.setattr(os, "fsync", lambda handle: (seen.append(kind(handle)), sync(handle)))
    monkeypatch.setattr(os, "replace", lambda *names: (seen.append("rename"), replace(*names)))
    with replace_file(tmp_path / "file") as file:
        file.write(b"a")
    assert seen == ["file", "rename", "folder"]
    seen.clear()
    with replace_folder(tmp_path / "folder") as part:
        (part / "one").write_text("1")
        (part / "two").write_text("2")
    assert seen == ["file", "file", "rename", "folder"]


def test_writers_of_one_file_do_not_meet(tmp_path):
    """Eight threads at a time: one of them has the last word, and its word is whole."""
    target, together = tmp_path / "thing", threading.Barrier(8)

    def write(number):
        with replace_file(target) as file:
            for _ in range(50):
                file.write(b"%d" % number)
            together.wait(20)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(target.read_bytes()) == 50
    assert len(set(target.read_bytes())) == 1
    assert list(tree(tmp_path)) == ["thing"]


def test_what_a_killed_process_left_goes_at_the_next_write_and_nothing_else(tmp_path):
    code = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom lit_dpo.checkpoints.durable import replace_file\n"
        "with replace_file(Path(sys.argv[1])) as file:\n"
        "    file.write(b'half')\n    file.flush()\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    target = tmp_path / "thing"
    subprocess.run([sys.executable, "-c", code, str(target)], check=False)
    [left] = tmp_path.iterdir()
    assert left.read_bytes() == b"half"
    for name in (f".thing.{socket.gethostname()}-{os.getppid()}.0123456789abcdef.part", left.name + ".txt", ".other"):
        (tmp_path / name).write_text("mine")
    kept = tree(tmp_path)
    del kept[left.name]
    with replace_file(target) as file:
        file.write(b"new")
    assert tree(tmp_path) == {**kept, "thing": b"new"}


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such modes")
def test_a_private_file_is_for_its_owner_alone(tmp_path):
    before = os.umask(0o022)
    try:
        for name, private in (("open", False), ("private", True)):
            with replace_file(tmp_path / name, private) as file:
                file.write(b"a")
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes == {"open": 0o644, "private": 0o600}


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor")
@pytest.mark.parametrize("fails", [False, True])
def test_the_export_of_a_sharded_policy_removes_its_own_folder_alone(tmp_path, monkeypatch, fails):
    """Sharded weights are gathered through a checkpoint, in a folder beside the export."""
    host = socket.gethostname()
    for name in (".export.part", ".export.abcdefgh", f".export.{host}-99999999.0123456789abcdef.part"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "policy.ckpt").write_text("mine")
    (tmp_path / "policy.ckpt").write_text("mine")
    before = tree(tmp_path)

    def full(*args):
        raise OSError("No space left on device")

    if fails:
        monkeypatch.setattr(lit_dpo.callbacks.exporting, "export_checkpoint", full)
    module, data = runs.module(), runs.data(runs.pairs_file(tmp_path.parent, 8, f"{tmp_path.name}.jsonl"))
    trainer = runs.trainer(tmp_path, strategy="fsdp2", max_steps=1, callbacks=[ExportModel()])
    try:
        if fails:
            with pytest.raises(OSError, match="No space left"):
                trainer.fit(module, data)
        else:
            trainer.fit(module, data)
    finally:
        torch.distributed.destroy_process_group()
    after = {name: content for name, content in tree(tmp_path).items() if not name.startswith("export")}
    assert after == before
    assert (tmp_path / "export").exists() != fails
    if not fails:
        AutoModelForCausalLM.from_pretrained(tmp_path / "export")
