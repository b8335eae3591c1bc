"""Rounds sampled by vLLM: what is asked of it, what is made of its answers, and what is said when it fails.

A stand-in with vLLM's interface takes its place, in the process that vLLM would run in; where vLLM is installed, the
last test runs it.
"""

import hashlib
import importlib.util
import json
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lit_dpo import VLLM, RightVsWrong, Verifier
from lit_dpo.cli import main
from lit_dpo.models import load_model
from lit_dpo.sampling import Sampler
from tests import runs
from tests.test_rounds import DESCRIPTION, PROMPTS, is_right, lines, signs, train

pytestmark = [*runs.QUIET, pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning.pytorch.cli")]


@pytest.fixture
def notes(tmp_path_factory, monkeypatch):
    """A package `vllm` for this process and its children, and the file in which it notes what it is made with."""
    file, here = tmp_path_factory.mktemp("vllm") / "notes", Path(__file__).parent
    monkeypatch.syspath_prepend(str(here / "stand_ins"))
    paths = [here / "stand_ins", here.parent, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, paths)))
    monkeypatch.setenv("NOTES", str(file))
    return file


def drawn(model, prompt, seed, most=20):
    """One completion as the stand-in draws it."""
    ids, generator = [], torch.Generator().manual_seed(seed)
    with torch.no_grad():
        while len(ids) < most and 0 not in ids:
            logits = model(torch.tensor([prompt + ids])).logits[0, -1]
            ids.append(int(torch.multinomial(logits.softmax(-1), 1, generator=generator)))
    return ids


def seed_of(ids, number, sample, occurrence=0, seed=0):
    """What decides it, hashed twice: the prompt's ids; then seed, round and occurrence; then the sample."""
    key = hashlib.sha256(struct.pack(f"<{len(ids)}q", *ids)).digest() + struct.pack("<3q", seed, number, occurrence)
    return int.from_bytes(hashlib.sha256(key + struct.pack("<q", sample)).digest()[:4], "little") // 2


@pytest.mark.slow
def test_rounds_are_what_vllm_says_of_the_policy_that_starts_them(tmp_path, notes):
    """The oracle loads the policy anew, and draws each completion by itself with the seed it must have had."""
    roots = train(tmp_path / "run", Verifier(is_right), picker=RightVsWrong(), engine=VLLM(max_model_len=60))
    made = lines(notes)
    assert [one["model"] == str(roots[0] / "export") for one in made] == [False, True]
    assert {one["pid"] for one in made}.isdisjoint({os.getpid()})
    assert {(one["dtype"], one["trust"], one["max_model_len"]) for one in made} == {("float32", False, 60)}
    assert not Path(made[0]["model"]).exists()  # written for vLLM alone, as the first policy is a description
    assert [path.name for path in roots[0].iterdir() if path.name.startswith("policy-")] == [
        "policy-mine"
    ]  # the stand-in's
    starts = [load_model(DESCRIPTION, signs()), AutoModelForCausalLM.from_pretrained(roots[0] / "export")]
    for number, (root, model) in enumerate(zip(roots, starts, strict=True)):
        found = [[one["ids"] for one in said] for _, said in lines(root / "completions.0.jsonl")]
        prompts = [signs()(PROMPTS[(5 * number + n) % 7]).input_ids for n in range(5)]
        wanted = [[drawn(model, ids, seed_of(ids, number, sample)) for sample in range(6)] for ids in prompts]
        assert found == wanted
    assert json.loads((roots[0] / "round_options.json").read_text())["engine"] == "VLLM"


@pytest.mark.slow
def test_prompts_that_are_too_long_are_refused(tmp_path, notes):
    with pytest.raises(ValueError, match="exceed the 12 positions"):
        train(tmp_path / "run", Verifier(is_right), engine=VLLM(max_model_len=12))
    assert not notes.exists()  # before vLLM is loaded


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fails", "said"), [("load", "RuntimeError: no memory is left"), ("die", "its process ended with status 7")]
)
def test_what_fails_is_one_sentence(fails, said, tmp_path, notes, monkeypatch):
    monkeypatch.setenv("FAILS", fails)
    with pytest.raises(ValueError, match=rf"vLLM failed \({said}\): see what it printed.*gpu_memory_utilization"):
        train(tmp_path / "run", Verifier(is_right), engine=VLLM())


@pytest.mark.slow
def test_no_code_of_the_working_folder_or_of_the_model_runs(tmp_path, notes, monkeypatch):
    """Decoys: modules in the folder that the command is called in, and code that the model's folder brings."""
    canary = tmp_path / "canary"
    code = f"open({str(canary)!r}, 'w').close()\n"
    for name in ("vllm", "json", "torch", "lit_dpo"):
        (tmp_path / f"{name}.py").write_text(code)
    load_model(DESCRIPTION, signs()).save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "theirs.Theirs", "AutoModelForCausalLM": "theirs.Model"}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    (tmp_path / "model" / "theirs.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    said = list(VLLM().complete(Sampler(max_new_tokens=4), tmp_path / "model", signs(), [[1, 2]], None, "float32"))
    assert len(said) == 1
    assert not canary.exists()


@pytest.mark.slow
def test_it_is_told_nothing_of_the_run_it_serves(tmp_path, notes, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("MASTER_ADDR", "somewhere")
    model = load_model(DESCRIPTION, signs())
    model.save_pretrained(tmp_path / "model")
    asked = (Sampler(max_new_tokens=4), tmp_path / "model", signs(), [[1, 2]], None, "float32")
    assert len(list(VLLM().complete(*asked, torch.device("cuda", 1)))) == 1
    assert len(list(VLLM().complete(*asked))) == 1
    assert [note["environment"] for note in lines(notes)] == [
        {"CUDA_VISIBLE_DEVICES": "6"},
        {"CUDA_VISIBLE_DEVICES": "4,6"},
    ]


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_it_ends_with_the_process_that_asked(how, tmp_path, notes, monkeypatch):
    """Killed outright while vLLM computes, or interrupted, which does not wait for what is computed."""
    monkeypatch.setenv("FAILS", "hang")
    load_model(DESCRIPTION, signs()).save_pretrained(tmp_path / "model")
    program = (
        "from pathlib import Path; from lit_dpo import VLLM; from lit_dpo.sampling import Sampler; "
        "from tests.test_rounds import signs; "
        "sampler = Sampler(max_new_tokens=9); "
        f"list(VLLM().complete(sampler, Path({str(tmp_path / 'model')!r}), signs(), [[1, 2]], None, 'float32'))"
    )
    asking = subprocess.Popen([sys.executable, "-c", program])
    while not (notes.exists() and notes.read_text().endswith("\n")):
        assert asking.poll() is None
        time.sleep(0.1)
    [note] = lines(notes)
    time.sleep(3)
    asking.send_signal(how)
    asking.wait(10)
    end = time.monotonic() + 10
    while Path(f"/proc/{note['pid']}").exists() and time.monotonic() < end:
        time.sleep(0.1)
    assert not Path(f"/proc/{note['pid']}").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [({"gpu_memory_utilization": 1.5}, "gpu_memory_utilization"), ({"max_model_len": 1}, "at least 2")],
)
def test_options_out_of_range_are_refused(options, said, notes):
    with pytest.raises(ValueError, match=said):
        VLLM(**options)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["engine.max_model_len", "64", "--print_config"], "max_model_len: 64"),
        (["engine", "VLLM", "--print_config"], "gpu_memory_utilization: 0.8"),
        (["engine.max_model_len", "1"], "`max_model_len` must be at least 2, got 1"),
    ],
)
def test_the_command_line_takes_it(given, said, notes, tmp_path, capsys):
    option, *more = given
    pairs = runs.write(tmp_path / "pairs.jsonl", [{"prompt": "1", "chosen": "2", "rejected": "3"}])
    words = ["--data.train", pairs, "--data.partition.prompts", pairs]
    with pytest.raises(SystemExit):
        main(["fit", "--config", "iterative_length", *words, f"--data.partition.{option}", *more])
    assert said in "".join(capsys.readouterr())


def test_without_vllm_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'pip install "lit-dpo\[vllm\]"'):
        VLLM()


def test_another_dtype_is_refused(tmp_path, notes):
    with pytest.raises(ValueError, match="got float64: choose another"):
        next(VLLM().complete(Sampler(), tmp_path, signs(), [[1]], dtype="float64"))


def test_a_sampler_with_an_engine_takes_no_model(notes):
    with pytest.raises(ValueError, match="samples from the folder of a model"):
        next(Sampler(engine=VLLM())(load_model(DESCRIPTION, signs()), signs(), [[1]]))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_vllm_itself_says_what_transformers_says(tmp_path, monkeypatch):
    """Greedily token by token; drawn ones are the same in a second process, and end where the model ends them."""
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")  # GB, where it runs without a GPU
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 2}
    model = load_model({**DESCRIPTION, **sizes}, signs())
    model.save_pretrained(tmp_path / "model")
    prompts = [signs()(prompt).input_ids for prompt in PROMPTS]

    def of(sampler):
        return list(VLLM(0.3).complete(sampler, tmp_path / "model", signs(), prompts, dtype="float32"))

    greedy = Sampler(temperature=0.0, max_new_tokens=20)
    assert of(greedy) == list(greedy(model, signs(), prompts))
    drawn_once = of(Sampler(4, max_new_tokens=20))
    assert of(Sampler(4, max_new_tokens=20)) == drawn_once
    assert of(Sampler(4, max_new_tokens=20, seed=1)) != drawn_once
    for said in (one for each in drawn_once for one in each):
        assert said.finished == (said.ids[-1] == 0)
        assert 0 not in said.ids[:-1]
