"""ExPO: an exported policy, moved on beyond the base that training started from."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lit_dpo import LoRA
from lit_dpo.cli import main
from lit_dpo.export import export
from lit_dpo.extrapolate import Extrapolation
from lit_dpo.models import load_model
from lit_dpo.tokenizers import quickstart_tokenizer, train_tokenizer
from tests import runs

pytestmark = runs.QUIET
BASE = {**runs.LLAMA, "tie_word_embeddings": True}


def trained(folder, **options):
    """A folder with a base, and a checkpoint of what was trained from it."""
    tokenizer = quickstart_tokenizer()
    dtype = options.get("dtype", "float32")
    base = export(load_model(BASE, tokenizer, dtype), tokenizer, folder / "base")
    module = runs.module(model=str(base), tokenizer=None, lr=0.1, **options)
    run = runs.fit(module, runs.data(runs.rows(8)), max_steps=1)
    run.save_checkpoint(folder / "a.ckpt")
    return folder / "base", folder / "a.ckpt"


def exported(checkpoint, name, *options):
    main(["export", str(checkpoint), str(checkpoint.with_name(name)), *map(str, options)])
    return checkpoint.with_name(name)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("options", "base_dtype"),
    [({}, torch.float32), ({}, torch.float16), ({"dtype": "bfloat16"}, torch.bfloat16),
     ({"adapter": LoRA(rank=2, alpha=8)}, torch.float32)],
    ids=["float32", "float16 base", "bfloat16", "lora"],
)  # fmt: skip
def test_each_weight_goes_on_beyond_the_policy(tmp_path, options, base_dtype):
    base, checkpoint = trained(tmp_path, **options)
    start = {k: v.to(base_dtype) for k, v in load_file(base / "model.safetensors").items()}
    save_file(start, base / "model.safetensors", metadata={"format": "pt"})
    before = contents(base)
    plain = load_file(exported(checkpoint, "plain") / "model.safetensors")
    folder = exported(checkpoint, "expo", "--extrapolate", "0.3", "--base", base)
    found = load_file(folder / "model.safetensors")
    for name, value in found.items():
        there = (1 + 0.3) * plain[name].double().numpy() - 0.3 * start[name].double().numpy()
        assert value.dtype == plain[name].dtype
        rounding = torch.finfo(value.dtype).eps * (np.abs(there) + 1e-3)
        assert (np.abs(value.double().numpy() - there) <= rounding).all(), name
    assert any(not torch.equal(found[name], plain[name]) for name in found)
    assert "lm_head.weight" not in found  # it is tied
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(model.model.embed_tokens.weight, found["model.embed_tokens.weight"])
    card = (folder / "README.md").read_text()
    assert f"| extrapolated | `policy + 0.3 * (policy - base), base {base}` |" in card
    assert "before its weights were extrapolated" in card
    assert contents(base) == before


def test_alpha_0_is_the_plain_export_bit_for_bit(tmp_path):
    base, checkpoint = trained(tmp_path)
    content = torch.load(checkpoint, weights_only=True)
    content["state_dict"]["policy.model.layers.0.mlp.up_proj.weight"][:] = -0.0  # plus 0 it would be 0.0
    torch.save(content, checkpoint)
    plain, zero = exported(checkpoint, "plain"), exported(checkpoint, "zero", "--extrapolate", "0", "--base", base)
    first, second = contents(plain), contents(zero)
    cards = [found.pop("README.md") for found in (first, second)]
    assert first == second
    assert b"extrapolated" not in cards[0]
    assert b"policy + 0.0 * (policy - base)" in cards[1]


def test_a_model_in_several_files_is_its_own_base(tmp_path):
    """Policy and base are cut differently, and a policy that equals its base stays there however far it goes."""
    model = load_model(BASE, quickstart_tokenizer())
    for name, size in (("policy", "50KB"), ("base", "70KB")):
        model.save_pretrained(tmp_path / name, max_shard_size=size)
        assert len(list((tmp_path / name).glob("*.safetensors"))) > 1
    before = contents(tmp_path / "policy")
    Extrapolation(8.0, str(tmp_path / "base")).apply(tmp_path / "policy")
    assert contents(tmp_path / "policy") == before


def test_the_memory_it_takes_does_not_grow_with_the_model(tmp_path):
    """Of 64 MB of weights in one tensor on each side, a few million values are in memory at a time."""
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not clear.exists():
        pytest.skip("needs Linux to measure memory")

    def kilobytes(field):
        return int(status.read_text().partition(f"{field}:")[2].split()[0])

    def peak(folder, rows):
        for name in ("policy", "base"):
            (folder / name).mkdir(parents=True)
            weights = {"weight": torch.full((rows, 1 << 20), float(len(name)))}
            save_file(weights, folder / name / "model.safetensors")
        clear.write_text("5")  # forget the peak so far
        held = kilobytes("VmRSS")
        Extrapolation(0.5, str(folder / "base")).apply(folder / "policy")
        return kilobytes("VmHWM") - held

    peak(tmp_path / "first", 2)  # what is loaded at the first use
    assert peak(tmp_path / "second", 16) < 32_000
    assert (load_file(tmp_path / "second" / "policy" / "model.safetensors")["weight"] == 6 + 0.5 * (6 - 4)).all()


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("policy"))


def other_shape(base):
    other = {**BASE, "intermediate_size": 64}
    export(load_model(other, quickstart_tokenizer()), quickstart_tokenizer(), base)


def more_layers(base):
    other = {**BASE, "num_hidden_layers": 3}
    export(load_model(other, quickstart_tokenizer()), quickstart_tokenizer(), base)


def other_tokens(base):
    tokenizer = train_tokenizer(["other words make other tokens"] * 3, 1024)
    export(load_model({**BASE, "vocab_size": 1024}, tokenizer), tokenizer, base)


def nothing(base):
    base.mkdir()


def cut(base):
    export(load_model(BASE, quickstart_tokenizer()), quickstart_tokenizer(), base)
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])


def elsewhere(base):
    export(load_model(BASE, quickstart_tokenizer()), quickstart_tokenizer(), base)
    weights = dict.fromkeys(load_file(base / "model.safetensors"), "../base/model.safetensors")
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))


def eight_bits(base):
    export(load_model(BASE, quickstart_tokenizer()), quickstart_tokenizer(), base)
    weights = {k: v.to(torch.int8) for k, v in load_file(base / "model.safetensors").items()}
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("make", "alpha", "match"),
    [
        (other_shape, 0.3, "no base of this policy: its `model.layers.0.mlp.down_proj.weight` has the shape (32, 64)"),
        (more_layers, 0.3, "no base of this policy: `model.layers.2.input_layernorm.weight` is in only one of the two"),
        (other_tokens, 0.3, "has other tokens than the policy's"),
        (nothing, 0.3, "holds no `model.safetensors`: give a folder with a whole model"),
        (cut, 0.3, "is damaged"),
        (elsewhere, 0.3, "holds no `../base/model.safetensors`"),
        (eight_bits, 0.3, "as no floating point: give a copy that is not quantised"),
        (None, -0.1, "`extrapolate` must be a number of at least 0, got -0.1"),
        (None, math.inf, "`extrapolate` must be a number, got 'inf'"),
        (None, 1e39, "would not be finite: give a smaller one"),
        (None, None, "`extrapolate` and `base` belong together"),
    ],
)
def test_what_cannot_be_is_refused_and_leaves_nothing(policy, tmp_path, capsys, make, alpha, match):
    base, checkpoint = policy
    if make is not None:
        base = tmp_path / "base"
        make(base)
    options = ["--base", str(base), *([] if alpha is None else [f"--extrapolate={alpha}"])]
    before = sorted(checkpoint.parent.rglob("*"))
    with pytest.raises(SystemExit):
        main(["export", str(checkpoint), str(tmp_path / "out"), *options])
    assert match in capsys.readouterr().err
    assert not [path for path in tmp_path.iterdir() if path.name != "base"]
    assert sorted(checkpoint.parent.rglob("*")) == before


def test_it_overwrites_nothing(policy, tmp_path, capsys):
    base, checkpoint = policy
    decoy = shutil.copytree(base, tmp_path / "out")
    before = contents(decoy), contents(base)
    for target in (decoy, base):
        with pytest.raises(SystemExit):
            main(["export", str(checkpoint), str(target), "--extrapolate", "0.3", "--base", str(base)])
        assert f"`{target}` exists already" in capsys.readouterr().err
    assert (contents(decoy), contents(base)) == before


def test_adapters_alone_are_not_extrapolated(tmp_path, capsys):
    base, checkpoint = trained(tmp_path, adapter=LoRA(rank=2))
    with pytest.raises(SystemExit):
        exported(checkpoint, "out", "--extrapolate", "0.3", "--base", base, "--merge", "false")
    assert "Adapters alone cannot be extrapolated: leave `merge` true." in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
