"""A judge of Python code: runs a completion against the tests of its task, in a process that can do little else.

    lit-dpo fit --config code --allow-command

It reads `{"prompt": ..., "completion": ...}` a line and writes `true` if all tests of the prompt's task pass, else
`false`. Its argument is a file of JSON lines with a `prompt` and `tests`: the name of a `function`, the arguments of
its `calls`, and what is `expected` of each, in JSON.

Each completion gets a process of its own (`python -I`), an empty working folder, no environment, and limits of CPU
time, wall time, memory and answer. That process is given the calls and sends back values; which ones are right is
known to this process alone, so that a completion passes by giving the right values, and by nothing else that it prints
or does.

On Linux with x86-64 or 64-bit ARM the process may use a few system calls (seccomp): it starts no process, opens no
network connection, sends no signal and writes no file. Where the kernel has Landlock it also reads nothing but Python's
library. At its start this program tries what it promises, and says in one line what this system does not prevent.
"""

import ctypes
import json
import os
import platform
import re
import resource
import select
import shutil
import signal
import struct
import subprocess
import sys
import sysconfig
import tempfile
import time
from contextlib import suppress

CPU, WALL = 2, 4.0  # seconds
MEMORY = 256 << 20  # bytes of address space
ANSWER = 1 << 16  # bytes
# Numbers of the system calls that Python needs to compute and to import: read, write, close, fstat, lseek, mmap,
# mprotect, munmap, brk, rt_sigaction, rt_sigprocmask, rt_sigreturn, pread64, readv, sched_yield, mremap, madvise, dup,
# nanosleep, getpid, exit, uname, getcwd, gettimeofday, sysinfo, getuid, getgid, geteuid, getegid, getppid, sigaltstack,
# gettid, futex, getdents64, exit_group, clock_gettime, clock_getres, clock_nanosleep, newfstatat, readlinkat,
# faccessat, getrandom, statx; on x86-64 also stat, lstat, access, readlink and time.
CALLS = {
    "x86_64": "0 1 3 5 8 9 10 11 12 13 14 15 17 19 24 25 28 32 35 39 60 63 79 96 99 102 104 107 108 110 131 186 202 "
    "217 231 228 229 230 262 267 269 318 332 4 6 21 89 201",
    "aarch64": "63 64 57 80 62 222 226 215 214 134 135 139 67 65 124 216 233 23 101 172 93 160 17 169 179 174 176 175 "
    "177 173 132 178 98 61 94 113 114 115 79 78 48 278 291",
}
OPENAT = {"x86_64": 257, "aarch64": 56}  # allowed for reading alone
MACHINE = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}


def main(path: str) -> None:
    """Judge one line after the other."""
    with open(path, encoding="utf-8") as file:
        tasks = {task["prompt"]: task["tests"] for task in map(json.loads, file)}
    if problems := not_prevented(path):
        print(f"run_python_tests.py: on this system a completion can {', '.join(problems)}.", file=sys.stderr)
    for line in sys.stdin:
        asked = json.loads(line)
        prompt = asked["prompt"] if isinstance(asked["prompt"], str) else asked["prompt"][-1]["content"]
        tests = tasks[prompt]
        values = run(program(prompt, asked["completion"], tests["function"]), tests["function"], tests["calls"])
        print(json.dumps(same(values, tests["expected"])), flush=True)


def program(prompt: str, completion: str, function: str) -> str:
    """The code to run: the last fenced block or all of it, behind the prompt unless it defines the function itself."""
    blocks = re.findall(r"```(?:python)?\n(.*?)```", completion, re.DOTALL)
    code = blocks[-1] if blocks else completion
    return code if f"def {function}(" in code else prompt + code


def same(values: object, expected: object) -> bool:
    """Whether they are equal, and of the same types: `True` is not 1 here."""
    try:
        return repr(values) == repr(expected)
    except RecursionError:
        return False


def run(code: str, function: str, calls: list) -> object:
    """What the calls give, in a new process; `None` if they do not all give a value."""
    folder = tempfile.mkdtemp(prefix="run_python_tests_")
    command = [sys.executable, "-I", "-S", "-B", os.path.abspath(__file__), "--candidate"]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=folder, env={},
        start_new_session=True,
    )  # fmt: skip
    try:
        assert process.stdin
        assert process.stdout
        process.stdin.write(json.dumps({"code": code, "function": function, "calls": calls}).encode())
        process.stdin.close()
        return json.loads(read(process.stdout.fileno()) or b"null")
    except (ValueError, RecursionError, BrokenPipeError):
        return None
    finally:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        shutil.rmtree(folder, ignore_errors=True)


def read(pipe: int) -> bytes:
    """All that comes until the other side closes; nothing if that is too much or takes too long."""
    found, end = b"", time.monotonic() + WALL
    while len(found) <= ANSWER and select.select([pipe], [], [], max(0.0, end - time.monotonic()))[0]:
        if not (chunk := os.read(pipe, ANSWER)):
            return found
        found += chunk
    return b""


# -- inside the new process -------------------------------------------------------------------------------------------


def candidate() -> None:
    """Give up all rights, then run the code and send what its function gives."""
    asked = json.loads(sys.stdin.buffer.read())
    answers, nowhere = os.dup(1), os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nowhere, number)
    confine()
    space: dict = {"__name__": "candidate"}
    exec(compile(asked["code"], "candidate", "exec"), space)
    values = [space[asked["function"]](*arguments) for arguments in asked["calls"]]
    os.write(answers, json.dumps(values).encode())
    os._exit(0)


def confine() -> None:
    """Limits, then the two ways of Linux to give up rights; what the system lacks is left out."""
    limits = {"CPU": CPU, "AS": MEMORY, "FSIZE": 0, "CORE": 0, "NPROC": 0, "NOFILE": 32}
    for name, value in limits.items():
        with suppress(AttributeError, ValueError, OSError):
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))
    if platform.system() == "Linux" and platform.machine() in CALLS:
        system = ctypes.CDLL(None)
        system.prctl(38, *map(ctypes.c_ulong, (1, 0, 0, 0)))  # PR_SET_NO_NEW_PRIVS
        read_the_library_alone(system)
        use_few_calls(system, platform.machine())


def read_the_library_alone(system: ctypes.CDLL) -> None:
    """Landlock: reading below the folders of Python and of shared libraries, and nothing else."""
    version = system.syscall(444, None, ctypes.c_size_t(0), ctypes.c_uint(1))  # landlock_create_ruleset
    if version < 1:
        return
    rights = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)) - 1  # those of files that this kernel knows
    rules = system.syscall(444, struct.pack("Q", rights), ctypes.c_size_t(8), ctypes.c_uint(0))
    for folder in {sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"), "/lib", "/lib64", "/usr/lib"}:
        if os.path.isdir(folder):
            place = os.open(folder, os.O_PATH)
            rule = struct.pack("=Qi", 4 | 8, place)  # read files, list folders
            system.syscall(445, rules, ctypes.c_int(1), rule, ctypes.c_uint(0))  # landlock_add_rule
            os.close(place)
    system.syscall(446, rules, ctypes.c_uint(0))  # landlock_restrict_self
    os.close(rules)


def use_few_calls(system: ctypes.CDLL, machine: str) -> None:
    """Seccomp: the calls of `CALLS`, and opening files for reading; all others fail with EPERM."""
    allowed = [int(number) for number in CALLS[machine].split()]
    load, equal, any_of, end = 0x20, 0x15, 0x45, 0x06  # operations of the kernel's filters
    yes, no = 0x7FFF0000, 0x00050001  # allow, EPERM
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
    steps = [(load, 0, 0, 4), (equal, 1, 0, MACHINE[machine]), (end, 0, 0, 0x80000000), (load, 0, 0, 0)]
    steps += [(equal, 0, 3, OPENAT[machine]), (load, 0, 0, 32), (any_of, len(allowed), 0, writing), (end, 0, 0, yes)]
    steps += [(equal, len(allowed) - place, 0, number) for place, number in enumerate(allowed)]
    steps += [(end, 0, 0, no), (end, 0, 0, yes)]
    filled = b"".join(struct.pack("HBBI", *step) for step in steps)
    content = ctypes.create_string_buffer(filled, len(filled))
    wanted = struct.pack("HxxxxxxP", len(steps), ctypes.addressof(content))
    system.prctl(22, *map(ctypes.c_ulong, (2,)), wanted, ctypes.c_ulong(0), ctypes.c_ulong(0))  # PR_SET_SECCOMP


# -- what this system prevents ----------------------------------------------------------------------------------------

TRIED = """
import os, socket
def can():
    found = {}
    for name, act in {
        "start processes": lambda: os.fork() or os._exit(0),
        "use the network": lambda: socket.socket().close(),
        "signal other processes": lambda: os.kill(os.getppid(), 0),
        "change files": lambda: os.chmod(PATH, os.stat(PATH).st_mode & 0o7777),
        "read files": lambda: open(PATH).close(),
    }.items():
        try:
            act()
            found[name] = True
        except OSError:
            pass
    return list(found)
"""


def not_prevented(path: str) -> list[str]:
    """What a completion can do here that it should not, tried by one that does no harm."""
    values = run(f"PATH = {os.path.abspath(path)!r}\n{TRIED}", "can", [[]])
    if not isinstance(values, list):
        sys.exit("run_python_tests.py: this system lets no program run within its limits: raise `MEMORY` or `CPU`.")
    return [str(name) for name in values[0]]


if __name__ == "__main__":
    if sys.argv[1:] == ["--candidate"]:
        candidate()
    elif len(sys.argv) == 2:
        main(sys.argv[1])
    else:
        sys.exit("Usage: run_python_tests.py TASKS")
