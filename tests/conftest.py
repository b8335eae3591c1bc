"""What every test runs under: no network, one thread, the same hypothesis examples each time."""

import logging
import os
import signal
import socket
import sys
from collections import Counter

import pytest
import torch
from hypothesis import settings

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # as in a terminal, where tests are started by `nohup` too,
signal.signal(signal.SIGINT, signal.default_int_handler)  # or by a script in the background, which ignores Ctrl-C
os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported, which only test modules do
torch.set_num_threads(1)  # the tensors are tiny, and waiting threads cost more than they bring
settings.register_profile("lit_dpo", max_examples=150, derandomize=True, deadline=None, database=None)
settings.load_profile("lit_dpo")


@pytest.hookimpl(optionalhook=True)  # without pytest-xdist, tests run one after another
def pytest_xdist_auto_num_workers():
    """`-n auto`: a worker for each core and one more, since tests wait for disks; eight at most, for their memory."""
    return min(8, 1 + (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Mark what `every(n)` leaves out as slow."""
    seen = Counter()
    for item in items:
        if chosen := item.get_closest_marker("every"):
            name = item.nodeid.partition("[")[0]
            if seen[name] % chosen.args[0]:
                item.add_marker(pytest.mark.slow)
            seen[name] += 1


@pytest.fixture(autouse=True)
def _no_network(_as_it_was, monkeypatch):
    """Fail a test that connects to anything but this machine."""

    def guarded(real):
        def connect(sock, address):
            local = sock.family == socket.AF_UNIX or str(address[0]) in ("127.0.0.1", "::1", "localhost")
            if not local:
                pytest.fail(f"a test tried to connect to {address}")
            return real(sock, address)

        return connect

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, guarded(getattr(socket.socket, name)))


@pytest.fixture(autouse=True)
def _as_it_was():
    """Put back what a command, called in this process, changes of it: the tests after it must not depend on that.

    Lightning sets the number of threads for several processes, and a fork of a process with more than one may hang.
    """
    environment, folder, path = dict(os.environ), os.getcwd(), [*sys.path]
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    dtype, exact = torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled()
    known = [each for each in logging.root.manager.loggerDict.values() if isinstance(each, logging.Logger)]
    loggers = [(logger, logger.level, logger.disabled) for logger in (logging.root, *known)]
    yield
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    os.environ.update(environment)
    os.chdir(folder)
    sys.path[:] = path
    for number, handler in handlers.items():
        signal.signal(number, handler or signal.SIG_DFL)
    torch.set_default_dtype(dtype)
    torch.use_deterministic_algorithms(exact)
    torch.set_num_threads(1)
    for logger, level, disabled in loggers:
        if logger.level != level:  # setting one costs milliseconds
            logger.setLevel(level)
        logger.disabled = disabled
