"""No process outlives its run: each process of a run notices when another one is gone, and ends too.

Every process keeps a connection to the first one. The system closes it when a process dies, however it dies, and keeps
it open while a process is merely busy, so a run is never ended because one of its processes takes long over something.
(A machine that vanishes is noticed by the system's own keep-alive packets.)
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import selectors
import signal
import socket
import sys
import threading
import time
from functools import partial
from multiprocessing.util import Finalize
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerStatus

from lit_dpo.lightning_private import leave_signals

GRACE = 10.0  # seconds that a process has to end by itself, once another one is gone
LEAVING = 45.0  # the same for one that is ending already: it may have something to finish
_LAUNCHER = "LIT_DPO_LAUNCHER"  # the process that Lightning starts others from


class PeerLostError(SystemExit):
    """Another process of the run is gone, so this one ends: one sentence, status 1."""


def watch_over(trainer: Trainer) -> None:
    """Have a Trainer's processes end together, and leave signals to `LastCheckpoint` or to the system.

    Args:
        trainer: Before or within one of its runs; what was watched over already stays so.
    """
    follow_launcher()
    leave_signals(trainer)
    set_up = trainer.strategy.setup_environment
    if isinstance(set_up, partial) and set_up.func is _set_up_and_join:
        return
    trainer.strategy.setup_environment = partial(_set_up_and_join, trainer)  # type: ignore[method-assign]
    if _connected():
        _join(trainer)


def failed(exception: BaseException) -> None:
    """Tell the other processes that this one is ending, and why; call it as soon as that is known.

    Raises:
        PeerLostError: The exception is only what followed from the end of another process.
    """
    if _watch is not None:
        _watch.failed(exception)


def leave() -> None:
    """Tell the other processes that this one may end now without it meaning anything to them."""
    if _watch is not None:
        _watch.say(bye=True)


def follow_launcher() -> None:
    """End with the process that started this one as one of several, be it torchrun or the first process of the run."""
    global _followed
    first = os.environ.get(_LAUNCHER, "")
    if "TORCHELASTIC_RUN_ID" in os.environ:
        launcher = os.getppid()
    elif "LOCAL_RANK" in os.environ and first.isdecimal() and first != str(os.getpid()):
        launcher = int(first)
        if launcher != os.getppid() and _is_alive(launcher):
            return  # something else is in between
    else:
        os.environ[_LAUNCHER] = str(os.getpid())  # for the processes that Lightning starts from here
        return
    if _followed is None:
        _followed = threading.Thread(target=_follow, args=(launcher,), daemon=True, name="follow launcher")
        _followed.start()


# -- inside -----------------------------------------------------------------------------------------------------------

_watch: _Watch | None = None
_followed: threading.Thread | None = None


def _connected() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _set_up_and_join(trainer: Trainer) -> None:
    type(trainer.strategy).setup_environment(trainer.strategy)
    if _connected():
        _join(trainer)


def _join(trainer: Trainer) -> None:
    """Connect to the first process, once a process group, and note that another run of a Trainer begins."""
    global _watch
    if trainer.world_size == 1:
        return
    group = torch.distributed.group.WORLD
    if _watch is None or _watch.group is not group:
        _watch = _Watch(group, trainer)
    _watch.trainer, _watch.runs = trainer, _watch.runs + 1
    launcher: Any = trainer.strategy.launcher
    if procs := getattr(launcher, "procs", None):
        # Lightning's own observer would kill this process as soon as another one has ended with a status other than
        # zero, even if it ended as it should. (The launcher keeps its list, the observer an empty one.)
        launcher.procs = list(procs)
        procs.clear()


class _Watch:
    """The connections of one process, and the thread that listens to them.

    Args:
        group: The process group whose processes these are.
        trainer: The Trainer of the run that begins.
    """

    def __init__(self, group: Any, trainer: Trainer) -> None:
        self.group, self.trainer, self.runs, self.rank = group, trainer, 0, trainer.global_rank
        self.over = False  # this process has said good-bye, or heard it from the first one
        self._reasons: list[tuple[float, str, int | None]] = []  # to end: since when, what to say, of which run
        self._peers: dict[socket.socket, int] = {}
        self._received: dict[socket.socket, bytes] = {}
        self._lock = threading.Lock()
        self._listener = self._listen(trainer)
        port = self._listener.getsockname()[1] if self._listener else 0
        port, self._token = trainer.strategy.broadcast((port, secrets.token_hex(16)))
        if self.rank:
            try:
                self._connect("127.0.0.1" if trainer.num_nodes == 1 else os.environ["MASTER_ADDR"], port)
            except OSError as error:
                rank = self.rank
                sys.stderr.write(f"Process {rank} cannot notice if others end ({error}): it may then wait for them.\n")
        os.register_at_fork(after_in_child=self._close)  # a data loader's worker must not keep connections open
        Finalize(None, self._at_exit, exitpriority=-1)
        threading.Thread(target=self._run, daemon=True, name="watch").start()

    def _listen(self, trainer: Trainer) -> socket.socket | None:
        if self.rank:
            return None
        if trainer.num_nodes == 1:
            return socket.create_server(("127.0.0.1", 0), backlog=trainer.world_size)
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        return socket.create_server(("", 0), family=family, dualstack_ipv6=both, backlog=trainer.world_size)

    def _connect(self, host: str, port: int) -> None:
        connection = socket.create_connection((host, port), timeout=20)
        self._add(connection, 0)
        self.say(token=self._token, rank=self.rank)

    def _add(self, connection: socket.socket, rank: int) -> None:
        connection.settimeout(5)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (("TCP_KEEPIDLE", 20), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 4)):
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self._peers[connection], self._received[connection] = rank, b""

    def say(self, **message: Any) -> None:
        """Send a message to the first process, or from there to all."""
        self.over |= "bye" in message
        with self._lock:
            for connection in list(self._peers):
                with contextlib.suppress(OSError):
                    connection.sendall(json.dumps(message).encode() + b"\n")

    def failed(self, exception: BaseException) -> None:
        """See the function of this name."""
        for _ in range(20 if isinstance(exception, RuntimeError) else 0):  # of a collective, perhaps: see why
            for _, sentence, run in self._reasons:
                if run is None or run == self.runs:
                    raise PeerLostError(f"lit-dpo: error: {sentence}") from exception
            time.sleep(0.1)
        text = " ".join(f"{type(exception).__name__}: {exception}".split())[:400]
        self.say(failed=f"Process {self.rank} failed ({text})", run=self.runs)

    # -- in the thread ------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector:
            for connection in (*self._peers, *([self._listener] if self._listener else [])):
                selector.register(connection, selectors.EVENT_READ)
            while True:
                for key, _ in selector.select(0.5):
                    assert isinstance(key.fileobj, socket.socket)
                    if key.fileobj is self._listener:
                        with contextlib.suppress(OSError):
                            connection, _ = self._listener.accept()
                            self._add(connection, -1)  # nobody, until it has said the token
                            selector.register(connection, selectors.EVENT_READ)
                    elif not self._hear(key.fileobj):
                        selector.unregister(key.fileobj)
                self._end_if_due()

    def _hear(self, connection: socket.socket) -> bool:
        """Take in what came; False if the connection is at its end."""
        try:
            data = connection.recv(65536)
        except OSError:
            data = b""
        *lines, self._received[connection] = (self._received[connection] + data).split(b"\n")
        if data and len(self._received[connection]) < 65536:
            try:
                return all(self._take(connection, json.loads(line)) for line in lines)
            except (ValueError, TypeError, AttributeError):
                pass  # a stranger's
        with self._lock:
            rank = self._peers.pop(connection, -1)
        connection.close()
        if rank >= 0:
            self._must_end(f"Process {rank} of this run is gone", None)
        return False

    def _take(self, connection: socket.socket, message: dict[str, Any]) -> bool:
        if self._peers[connection] == -1:
            known = secrets.compare_digest(str(message.get("token")), self._token)
            self._peers[connection] = int(message["rank"]) if known else -2
        rank = self._peers[connection]
        if message.get("bye"):
            self.over |= rank == 0  # without the first process nothing more can be known
            self._peers[connection] = -2
        if rank >= 0 and "failed" in message:
            self._must_end(str(message["failed"]), message.get("run"))
        return True

    def _must_end(self, what: str, run: int | None) -> None:
        if self.rank == 0:
            self.say(failed=what, run=run)
        ours = f"{what}, so process {self.rank} ends too. `--ckpt_path last` goes on with what was saved."
        self._reasons.append((time.monotonic(), ours, run))

    def _end_if_due(self) -> None:
        """End this process if it should have ended by itself; a failure in a run that is over here does not count."""
        if self.over or not _connected() or torch.distributed.group.WORLD is not self.group:
            return
        status = self.trainer.state.status
        for since, sentence, run in self._reasons:
            concerned = run is None or (run == self.runs and status == TrainerStatus.RUNNING)
            limit = LEAVING if status == TrainerStatus.INTERRUPTED else GRACE
            if concerned and time.monotonic() - since > limit:
                _say(sentence)
                os._exit(1)

    # -- at the end ---------------------------------------------------------------------------------------------------

    def _at_exit(self) -> None:
        if self.trainer.state.status != TrainerStatus.INTERRUPTED and not hasattr(sys, "last_value"):
            self.say(bye=True)

    def _close(self) -> None:
        for connection in (*self._peers, *([self._listener] if self._listener else [])):
            connection.close()


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except OSError:
        return False
    return True


def _follow(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    if _watch is not None and _watch.over:
        return
    _say(f"The process {parent} that started this one is gone, so this one ends.")
    os.kill(os.getpid(), signal.SIGTERM)  # in training: save, and end
    time.sleep(LEAVING)
    os._exit(1)


def _say(sentence: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(f"\nlit-dpo: error: {sentence}\n")
        sys.stderr.flush()
