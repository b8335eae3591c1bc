"""The command line, `lit-dpo`."""

import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from lit_dpo.cli.front import answer

__all__ = ["main"]


def main(args: Sequence[str] | None = None) -> None:
    """Run a command; what can be answered at once is, and the rest is imported only then.

    Args:
        args: Command-line arguments, by default the process's own.
    """
    given = list(sys.argv[1:] if args is None else args)
    answer(given)
    with _ctrl_c_says_one_line():
        from lit_dpo.cli import app
    app.main(given)


@contextmanager
def _ctrl_c_says_one_line() -> Iterator[None]:
    """End at once at Ctrl-C: nothing has been done, and an import that is cut short says much about itself."""

    def stop(*_: object) -> None:
        os.write(2, b"\nlit-dpo: interrupted\n")
        os._exit(128 + signal.SIGINT)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
