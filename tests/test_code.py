"""Rounds judged by tests of programs: the example that runs them, what a program may not do, the configuration."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lit_dpo import Command, SFTLoss
from lit_dpo.cli import main
from tests import runs

pytestmark = [*runs.QUIET, pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning.pytorch.cli")]
ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "docs" / "examples" / "code"
PROGRAM, TASKS = EXAMPLE / "run_python_tests.py", EXAMPLE / "python_tasks.jsonl"
ROWS = [json.loads(line) for line in TASKS.read_text().splitlines()]
ADD = ROWS[0]["prompt"]


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("run_python_tests", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def confined(example):
    """Linux with seccomp, which no machine of CI lacks, and Landlock."""
    if sys.platform != "linux":
        pytest.skip("needs Linux")
    problems = example.not_prevented(str(TASKS))
    assert {*problems} <= {"read files"}
    if problems:
        pytest.skip("needs Landlock")


@pytest.fixture
def judge():
    judge = Command(f"{sys.executable} {PROGRAM} {TASKS}", seconds=30.0, restarts=0)
    yield judge
    judge.close()


def judged(judge, *completions, prompt=ADD):
    """Verdicts on completions of one prompt, a right one behind them: what judges must have survived."""
    verdicts = judge.score([prompt] * (len(completions) + 1), [*completions, "    return b + a"])
    assert verdicts.pop() is True
    return verdicts


@pytest.mark.every(6)
@pytest.mark.parametrize("part", range(6))
def test_solutions_pass_and_wrong_ones_fail(part, judge):
    rows = ROWS[part::6]
    prompts = [row["prompt"] for row in rows]
    assert judge.score(prompts, [row["chosen"] for row in rows]) == [True] * len(rows)
    assert judge.score(prompts, [row["rejected"] for row in rows]) == [False] * len(rows)


def test_tasks_are_all_different():
    assert len({row["prompt"] for row in ROWS}) == len({row["tests"]["function"] for row in ROWS}) == len(ROWS) >= 60


def test_the_program_is_what_the_completion_says(judge):
    """Behind the prompt, alone if it defines the function itself, or fenced; the types of values count."""
    whole = "def add(a, b):\n    return sum([a, b])\n"
    fenced = f"Here it is:\n```python\n{whole}```\nDone."
    library = "    import math, re, random, functools, collections\n    return a + b"
    right = [whole, fenced, library, "    print('x' * 100)\n    return a + b"]
    wrong = [
        "    return float(a + b)",
        "    return None",
        "    return a +",
        "",
        "    raise KeyError",
        "    return {a + b}",
    ]
    assert judged(judge, *right, *wrong) == [True] * 4 + [False] * 6


EACH_FILE = "    import os\n    for n in range(32):\n        try: {}\n        except OSError: pass"
# Programs that try to be judged right, or to do harm; `{decoy}` is a file of the user's.
ATTACKS = {
    "leave early": "    import sys; sys.exit(0)",
    "leave at once": "    import os; os._exit(0)",
    "say the verdict": EACH_FILE.format("os.write(n, b'true\\n')"),
    "equal to all": "    return type('E', (), {{'__eq__': lambda *_: True, '__repr__': lambda _: '3'}})()",
    "read the answers": f"    import json; t = json.loads(open({str(TASKS)!r}).readline())['tests']\n"
    "    return t['expected'][t['calls'].index([a, b])]",
    "read the judge": "    import os; open(f'/proc/{{os.getppid()}}/mem').close(); return a + b",
    "read another file": "    open({decoy!r}).close(); return a + b",
    "write over a file": "    open({decoy!r}, 'w').write('x'); return a + b",
    "empty a file": "    import os; os.truncate({decoy!r}, 0); return a + b",
    "remove a file": "    import os; os.remove({decoy!r}); return a + b",
    "rename a file": "    import os; os.rename({decoy!r}, {decoy!r} + 'x'); return a + b",
    "close a file to its owner": "    import os; os.chmod({decoy!r}, 0); return a + b",
    "make a file": "    open('x', 'w').close(); return a + b",
    "10 GB": "    bytearray(10 << 30); return a + b",
    "a process": "    import os; os.fork(); return a + b",
    "a program": "    import subprocess; subprocess.run(['true']); return a + b",
    "become a program": "    import os; os.execv('/bin/sh', ['sh', '-c', 'true'])",
    "a thread": "    import threading; threading.Thread(target=int).start(); return a + b",
    "the network": "    import socket; socket.socket(); return a + b",
    "kill the judge": "    import os; os.kill(os.getppid(), 9); return a + b",
    "raise its limits": "    import resource; resource.setrlimit(resource.RLIMIT_CPU, (99, 99)); return a + b",
    "a signal by its pipe": "    import fcntl, os; fcntl.fcntl(3, fcntl.F_SETOWN, os.getppid()); return a + b",
    "nested values": "    x = []\n    for n in range(900): x = [x]\n    return x",
    "a long number": "    return '9' * 60000",
}


@pytest.mark.usefixtures("confined")
def test_attacks_fail_and_the_judge_goes_on(judge, tmp_path):
    """Each would be right if it could do what it tries, or forges a verdict; the judge answers a line a program."""
    decoy = tmp_path / "decoy"
    decoy.write_text("mine")
    before, folders = decoy.stat(), set(os.listdir(tmp_path.parent))
    found = judged(judge, *(code.format(decoy=str(decoy)) for code in ATTACKS.values()))
    assert dict(zip(ATTACKS, found, strict=True)) == dict.fromkeys(ATTACKS, False)
    assert decoy.read_text() == "mine"
    assert (decoy.stat().st_mode, decoy.stat().st_mtime_ns) == (before.st_mode, before.st_mtime_ns)
    assert os.listdir(tmp_path) == ["decoy"]
    assert set(os.listdir(tmp_path.parent)) == folders


@pytest.mark.slow
@pytest.mark.usefixtures("confined")
def test_what_takes_long_or_floods_is_stopped(judge):
    """A busy loop, one that sleeps, one that catches its end, a fork bomb, and a gigabyte to each of its files."""
    attacks = {
        "loop": "    while True: pass",
        "sleep": "    import time; time.sleep(60)",
        "loop that goes on": "    while True:\n        try: any(iter(int, 1))\n        except BaseException: pass",
        "fork bomb": "    import os\n    while True:\n        try: os.fork()\n        except OSError: pass",
        "print": "    for n in range(1 << 14): print('x' * (1 << 16))",
        "answer": EACH_FILE.format("[os.write(n, b'x' * (1 << 16)) for _ in range(1 << 14)]"),
    }
    start = time.monotonic()
    found = judged(judge, *(f"{code}\n    return a + b" for code in attacks.values()))
    assert dict(zip(attacks, found, strict=True)) == {name: name == "print" for name in attacks}  # it goes nowhere
    assert time.monotonic() - start < 60
    running = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert running.count(f"{PROGRAM} --candidate") == 0


def test_what_a_system_does_not_prevent_is_said(tmp_path):
    """The same program on a machine that it knows no system calls of; the tests say right and wrong all the same."""
    other = tmp_path / "run_python_tests.py"
    other.write_text(re.sub(r'^    "(x86_64|aarch64)": "', r'    "no \1": "', PROGRAM.read_text(), flags=re.MULTILINE))
    asked = [json.dumps({"prompt": ADD, "completion": text}) for text in ("    return a + b", "    return a - b")]
    done = subprocess.run(
        [sys.executable, other, TASKS], input="\n".join(asked), capture_output=True, text=True, cwd=tmp_path
    )
    assert done.stdout.split() == ["true", "false"]
    [line] = done.stderr.splitlines()
    assert re.fullmatch(r"run_python_tests\.py: on this system a completion can .*use the network.*read files\.", line)


# -- the configuration ------------------------------------------------------------------------------------------------


def pieces():
    """A tokenizer whose tokens are the words and signs of the tasks, each with the space before it."""
    split = Regex(r" ?\w+| ?[^\w\s]+|\s+")
    cut = pre_tokenizers.Split(split, "isolated")
    texts = [row["prompt"] + row[side] for row in ROWS for side in ("chosen", "rejected")]
    words = sorted({word for text in texts for word, _ in cut.pre_tokenize_str(text)})
    core = Tokenizer(models.WordLevel({"<end>": 0, **{word: n for n, word in enumerate(words, 1)}}, "<end>"))
    core.pre_tokenizer, core.decoder = cut, decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>")


@pytest.mark.slow
def test_the_shipped_configuration_runs_end_to_end(tmp_path, monkeypatch):
    """The model has learnt right and wrong answers of ten tasks alike; its pairs tell them apart."""
    monkeypatch.chdir(tmp_path)
    rows = [
        {**row, "prompt": row["prompt"] + "    return"}
        | {side: row[side].removeprefix("    return") for side in ("chosen", "rejected")}
        for row in ROWS[:10]
    ]
    both = [*rows, *({**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows)]
    plain = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in both]
    module = runs.module(tokenizer=pieces(), lr=1e-2, optimizer=torch.optim.AdamW, loss=SFTLoss())
    runs.fit(module, runs.data(plain, batch_size=20, validation_fraction=0.0), max_epochs=60)
    module.policy.save_pretrained("start")
    pieces().save_pretrained("start")
    shutil.copy(PROGRAM, tmp_path)
    runs.write(tmp_path / "python_tasks.jsonl", rows)
    words = ["fit", "--config", str(ROOT / "configs" / "code.yaml"), "--allow-command", "--model.model", "start"]
    words += ["--data.validation", "python_tasks.jsonl", "--data.max_length", "128", "--trainer.max_epochs", "1"]
    command = f"{sys.executable} run_python_tests.py python_tasks.jsonl"
    words += ["--data.partition.judge.command", command]
    words += ["--data.partition.rounds", "1", "--data.partition.samples", "4", "--data.partition.max_new_tokens", "24"]
    for name in ("enable_progress_bar", "enable_model_summary"):
        words += [f"--trainer.{name}", "false"]
    main([*words, "--trainer.accelerator", "cpu", "--trainer.devices", "1"])
    step = tmp_path / "runs" / "code" / "version_0" / "partition_0"
    found = [json.loads(line) for line in (step / "pairs.jsonl").read_text().splitlines()]
    solutions = {row["prompt"]: row["chosen"] for row in rows}
    right = [row["chosen"] == solutions[row["prompt"]] for row in found]
    assert len(found) >= 3
    assert sum(right) >= len(right) / 2  # now and then it finds another one
    assert not any(row["rejected"] == solutions[row["prompt"]] for row in found)
    assert (step / "export" / "config.json").exists()
