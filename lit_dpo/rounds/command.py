"""A judge that is a program of its own."""

from __future__ import annotations

import hashlib
import json
import os
import selectors
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from lit_dpo.data.partition import Prompt
from lit_dpo.rounds.judges import Judge, JudgeError
from lit_dpo.rounds.permission import refuse_command


class Command(Judge):
    """A program that reads one completion a line and answers with one score a line: a sandbox, an LLM judge, a person.

    A line that it reads is `{"prompt": ..., "completion": ...}`, a line that it writes a number, `true`, `false`, or
    `null` for no opinion, flushed before it reads the next one. It is started once, without a shell, and goes on from
    one completion to the next. It is ended with this process, or within 5 seconds if that is killed. What the model
    said reaches it as data on its standard input alone. A configuration may name a command only where the command line
    has `--allow-command`.

    Args:
        command: The program and its arguments, as a shell would split them.
        seconds: How long an answer may take.
        restarts: How often, for one completion, a program that has died or hung is started again, at least 0; then it
            is an error.

    Raises:
        ValueError: An option is out of its range, or the command line has not permitted commands.
    """

    def __init__(self, command: str, seconds: float = 60.0, restarts: int = 1) -> None:
        try:
            self.words = shlex.split(command)
        except ValueError as error:
            raise ValueError(f"`command` is {command!r} ({error}): quote it as for a shell.") from error
        if not self.words:
            raise ValueError("`command` is empty: name a program.")
        if not seconds > 0 or restarts < 0:
            raise ValueError(f"`seconds` must be above 0 and `restarts` at least 0, got {seconds} and {restarts}.")
        refuse_command(command)
        self.command, self.seconds, self.restarts = command, seconds, restarts
        self._process: subprocess.Popen[bytes] | None = None
        self._guard: subprocess.Popen[bytes] | None = None
        self._left = b""  # what the program wrote behind the last whole line

    def score(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[float | None]:
        """One line each.

        Raises:
            JudgeError: The program cannot be started, dies or takes too long too often, or writes no score.
        """
        return [self._ask(prompt, said) for prompt, said in zip(prompts, completions, strict=True)]

    def _ask(self, prompt: Prompt, completion: str) -> Any:
        line = json.dumps({"prompt": prompt, "completion": completion}).encode() + b"\n"
        for attempt in range(self.restarts + 1):
            try:
                answer = self._exchange(line)
                break
            except _LostError as problem:
                self.close()
                if attempt == self.restarts:
                    raise JudgeError(
                        f"The judge `{self.command}` {problem} (prompt {prompt!r}, completion {completion!r}): correct "
                        "it, or raise `seconds` or `restarts`, and go on; what was judged before is kept."
                    ) from problem
        try:
            return json.loads(answer)
        except (ValueError, RecursionError) as error:
            raise JudgeError(
                f"The judge `{self.command}` wrote {answer[:80].decode(errors='replace')!r}, which is no score: write "
                "a number, true, false or null on a line of its own, and nothing else to standard output."
            ) from error

    def _start(self) -> subprocess.Popen[bytes]:
        none = subprocess.DEVNULL
        try:
            process = self._process = subprocess.Popen(
                self.words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, start_new_session=True
            )
            self._guard = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _GUARD, str(process.pid)],
                stdin=subprocess.PIPE, stdout=none, stderr=none, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            reason = f"cannot be started ({error.strerror})"
            raise JudgeError(f"The judge `{self.command}` {reason}: name another program.") from error
        assert process.stdin  # for the types
        assert process.stdout
        os.set_blocking(process.stdin.fileno(), False)
        return process

    def _exchange(self, line: bytes) -> bytes:
        """Write one line and read one, waiting for both at once, so that neither side can block the other."""
        process = self._process or self._start()
        assert process.stdin  # for the types
        assert process.stdout
        end = time.monotonic() + self.seconds
        with selectors.DefaultSelector() as ready:
            ready.register(process.stdout, selectors.EVENT_READ)
            ready.register(process.stdin, selectors.EVENT_WRITE)
            while line or b"\n" not in self._left:
                events = ready.select(max(0.0, end - time.monotonic()))
                if not events or time.monotonic() > end:
                    raise _LostError(f"took more than {self.seconds:g} seconds")
                for key, _ in events:
                    if key.fileobj is process.stdin:
                        with suppress(BrokenPipeError):
                            line = line[os.write(process.stdin.fileno(), line) :]
                        if not line:
                            ready.unregister(process.stdin)
                    elif chunk := os.read(process.stdout.fileno(), 65536):
                        self._left += chunk
                    else:
                        raise _LostError(f"ended with status {process.wait()} before it gave its score")
                if len(self._left) > _LONGEST:
                    raise _LostError(f"wrote more than {_LONGEST:,} bytes for one completion")
        answer, _, self._left = self._left.partition(b"\n")
        if self._left:
            raise _LostError("wrote more than one line for one completion")
        return answer

    def identity(self) -> dict[str, Any]:
        """The command, and the digests of the files that it names."""
        digests = {}
        for word in self.words:
            if os.path.isfile(word):  # a word may be too long for a path
                with open(word, "rb") as file:
                    digests[word] = hashlib.file_digest(file, "sha256").hexdigest()
        return {**super().identity(), "command": self.command, "files": digests}

    def close(self) -> None:
        """End the program, with all that it has started and that did not leave its group."""
        process, self._process, self._left = self._process, None, b""
        guard, self._guard = self._guard, None
        if process is None:
            return
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        if guard is not None:  # before `wait`, behind which another program may have the number
            guard.kill()
            guard.communicate()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()


_LONGEST = 65536  # bytes of an answer
_GUARD = """
import os, signal, sys, time
sys.stdin.read()  # until the process that holds the other end is gone
for _ in range(50):  # a program that reads its own input ends by itself
    os.killpg(int(sys.argv[1]), 0)  # an error ends this one as well: there is nothing to kill
    time.sleep(0.1)
os.killpg(int(sys.argv[1]), signal.SIGKILL)
"""


class _LostError(Exception):
    """The program is of no use any more; another start may help."""
