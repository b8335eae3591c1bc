"""What is found out about a model before its first step: randomness, branches that leak, positions, sizes."""

import math

import pytest
import torch

from lit_dpo import CachedReference, PairBatch
from lit_dpo.adapters import LoRA
from lit_dpo.models import load_model
from lit_dpo.references.adapter import AdapterReference
from lit_dpo.references.frozen import FrozenReference
from lit_dpo.scoring.audit import calm, choose_form
from lit_dpo.scoring.score import flat_obstacle, score
from lit_dpo.scoring.sizes import check_sizes
from tests import runs
from tests.models import tiny_model
from tests.oracles import separate_logps

pytestmark = [
    *runs.QUIET,
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys"),
]  # peft on Mixtral

_SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_EXPERTS = {**_SMALL, "num_key_value_heads": 2, "intermediate_size": 48, "num_local_experts": 4}
NOISY = {
    "phimoe": {"model_type": "phimoe", **_EXPERTS},
    "mixtral": {"model_type": "mixtral", **_EXPERTS, "router_jitter_noise": 0.3},
    "falcon": {"model_type": "falcon", **_SMALL, "hidden_dropout": 0.2, "num_kv_heads": 4},
    "opt": {"model_type": "opt", **_SMALL, "ffn_dim": 48, "word_embed_proj_dim": 32, "layerdrop": 0.3},
}
REFERENCES = {"frozen": FrozenReference, "cached": CachedReference, "adapter": AdapterReference}


def losses_at_rate_0(module, datamodule, batches=4, **options):
    """The loss of each training batch when nothing may change."""
    seen = []
    step = module._step

    def noted(batch, stage):
        loss = step(batch, stage)
        if stage == "train":
            seen.append(float(loss.detach()))
        return loss

    module._step = noted
    runs.fit(module, datamodule, max_steps=batches, limit_val_batches=0, **options)
    return seen


# Randomness


@pytest.mark.every(2)
@pytest.mark.parametrize(
    ("kind", "reference", "checkpointing"),  # all of them: test_architectures.py
    [
        ("phimoe", "frozen", False), ("falcon", "frozen", False), ("opt", "frozen", True),
        ("mixtral", "cached", False), ("opt", "cached", False),
        ("phimoe", "adapter", True), ("falcon", "adapter", True), ("mixtral", "adapter", True),
    ],
)  # fmt: skip
def test_at_rate_0_every_loss_is_log_2(kind, reference, checkpointing, tmp_path, monkeypatch):
    monkeypatch.setenv("LIT_DPO_CACHE", str(tmp_path))
    module = runs.module(
        {**NOISY[kind], "initializer_range": 0.3, "init_std": 0.3},
        lr=0.0,
        reference=REFERENCES[reference](),
        adapter=LoRA(rank=2, target_modules="all-linear") if reference == "adapter" else None,
        gradient_checkpointing=checkpointing,
    )
    losses = losses_at_rate_0(module, runs.data(runs.pairs_file(tmp_path), batch_size=4, cache_tokens=False))
    assert losses == pytest.approx([math.log(2)] * 4, abs=1e-5)


def test_the_dropout_of_adapters_stays(tmp_path):
    module = runs.module({**NOISY["opt"], "init_std": 0.3}, lr=0.1, adapter=LoRA(rank=2, dropout=0.5))
    runs.fit(module, runs.data(runs.pairs_file(tmp_path)), max_steps=3, limit_val_batches=0)
    batch = PairBatch.from_lists([([3, 4], [5, 6], [7])])
    module.policy.train()
    assert score(module.policy, batch).chosen != score(module.policy, batch).chosen


def test_a_calm_model_is_left_alone():
    model = tiny_model("llama").train()
    before = torch.get_rng_state()
    assert calm(model) == []
    assert torch.equal(torch.get_rng_state(), before)
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_what_was_random_is_named_and_the_rest_keeps_its_mode():
    model = load_model({**NOISY["opt"], "vocab_size": 50}).train()
    assert calm(model) == ["OPTDecoder"]
    assert calm(model) == []  # twice does no harm
    batch = PairBatch.from_lists([([3, 4], [5, 6], [7])])
    assert all(torch.equal(score(model, batch).chosen, score(model, batch).chosen) for _ in range(10))
    assert all(module.training for module in model.modules())


def test_randomness_that_cannot_be_switched_off_is_refused(monkeypatch):
    model = tiny_model("llama").train()
    forward = model.model.norm.forward
    model.model.norm.forward = lambda x: forward(x) * (1 + 0.1 * torch.rand(()))
    with pytest.raises(ValueError, match=r"LlamaForCausalLM .*random.* even in evaluation mode"):
        calm(model)


def test_a_mode_that_changes_values_without_randomness_is_found():
    model = tiny_model("llama").train()
    norm = model.model.norm
    forward = norm.forward
    norm.forward = lambda x: forward(x) * (1.1 if norm.training else 1.0)
    assert calm(model) == ["LlamaRMSNorm"]


# Branches and places


def conv_model(std=0.02, dtype="float32"):
    return load_model(
        {
            "model_type": "lfm2", **_SMALL, "num_key_value_heads": 2, "intermediate_size": 48, "vocab_size": 50,
            "layer_types": ["conv", "full_attention"], "initializer_range": std, "pad_token_id": 2,
        },
        dtype=dtype,
    )  # fmt: skip


def tuned_model(std=0.02, dtype="float32", floor_scale=16):
    return load_model(
        {
            "model_type": "llama4_text", **_SMALL, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 48,
            "intermediate_size_mlp": 48, "num_local_experts": 2, "vocab_size": 50, "initializer_range": std,
            "pad_token_id": 2, "floor_scale": floor_scale, "attn_scale": 0.5, "no_rope_layers": [1, 0],
            "attention_chunk_size": 8192, "moe_layers": [],
        },
        dtype=dtype,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize(("make", "named"), [(conv_model, "another branch"), (tuned_model, "place")])
def test_the_audit_sees_structure_however_small_its_effect_is(make, named, dtype):
    form, reason = choose_form(make(dtype=dtype))
    assert form == "padded"
    assert named in reason
    with pytest.raises(ValueError, match=f"flat form cannot serve this model: .*{named}"):
        choose_form(make(dtype=dtype), "flat")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_audit_sees_a_place_on_the_line_under_no_known_name(dtype):
    model = tuned_model(dtype=dtype)
    model.config.floor_scale = 10_000  # the modules keep theirs
    form, reason = choose_form(model)
    assert form == "padded"
    assert "depends on the place on the line" in reason


@pytest.mark.parametrize("make", [conv_model, tuned_model])
def test_padded_rows_serve_what_the_line_does_not(make):
    model = make(0.35, "float64")
    generator = torch.Generator().manual_seed(0)
    pairs = [
        tuple(torch.randint(3, 50, (n,), generator=generator).tolist() for n in sizes)
        for sizes in ((5, 9, 20), (30, 4, 8), (2, 3, 1))
    ]
    chosen, rejected = separate_logps(model, pairs)
    got = score(model, PairBatch.from_lists(pairs), form=choose_form(model)[0])
    assert (got.chosen - chosen).abs().max() < 1e-4  # their norms compute in float32
    assert (got.rejected - rejected).abs().max() < 1e-4


def test_a_line_longer_than_a_tempered_model_allows_goes_in_rows():
    model = tuned_model(floor_scale=1000)
    assert choose_form(model) == ("auto", None)
    long = PairBatch.from_lists([([3] * 200, [4] * 200, [5] * 100)] * 2)
    assert "1000" in flat_obstacle(model, long)
    assert flat_obstacle(model, PairBatch.from_lists([([3] * 200, [4] * 200, [5] * 100)])) is None


# Rotary positions that depend on the length


def stretched(kind):
    rope = {
        "dynamic": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
        "longrope": {
            "rope_type": "longrope", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 16,
            "short_factor": [1.0] * 4, "long_factor": [4.0, 3.0, 2.0, 5.0],
        },
    }[kind]  # fmt: skip
    return {
        "model_type": "llama", **_SMALL, "num_key_value_heads": 2, "intermediate_size": 48, "initializer_range": 0.35,
        "max_position_embeddings": 16 if kind == "dynamic" else 64, "rope_parameters": rope, "pad_token_id": 2,
    }  # fmt: skip


@pytest.mark.parametrize("form", ["auto", "padded"])
@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_positions_that_depend_on_the_length_do_not_depend_on_the_batch(kind, form):
    model = load_model({**stretched(kind), "vocab_size": 50}, dtype="float64")
    generator = torch.Generator().manual_seed(0)
    lengths = ((5, 9, 20), (30, 4, 8), (2, 3, 1), (8, 8, 8), (10, 3, 7))
    pairs = [tuple(torch.randint(3, 50, (n,), generator=generator).tolist() for n in sizes) for sizes in lengths]
    fresh = [load_model({**stretched(kind), "vocab_size": 50}, dtype="float64") for _ in pairs for _ in "ab"]
    with torch.no_grad():
        expected = torch.tensor(
            [[float(separate_logps(fresh.pop(), [pair])[side]) for side in (0, 1)] for pair in pairs]
        )
    for order in ([0, 1, 2, 3, 4], [4, 2, 3], [2], [1], [3, 0]):
        got = score(model, PairBatch.from_lists([pairs[i] for i in order]), form=form)
        assert (got.chosen - expected[order, 0]).abs().max() < 1e-3
        assert (got.rejected - expected[order, 1]).abs().max() < 1e-3
        score(model, PairBatch.from_lists([([3] * 50, [4] * 9, [5])]))  # what came before leaves no trace


@pytest.mark.parametrize("reference", ["frozen", "cached"])
def test_rows_beyond_the_original_length_start_at_log_2_and_say_so(reference, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("LIT_DPO_CACHE", str(tmp_path))
    module = runs.module(stretched("dynamic"), lr=0.0, reference=REFERENCES[reference]())
    data = runs.data(runs.pairs_file(tmp_path), batch_size=4, cache_tokens=False)
    with caplog.at_level("INFO"):
        assert losses_at_rate_0(module, data) == pytest.approx([math.log(2)] * 4, abs=1e-5)
    assert "Batches longer than 16 tokens are scored one sequence at a time" in caplog.text


# Sizes


@pytest.mark.parametrize("kind", ["gpt2", "opt", "gptj"])
def test_rows_longer_than_learnt_positions_are_refused(kind, tmp_path):
    description = {
        "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 16},
        "opt": {**NOISY["opt"], "max_position_embeddings": 16},
        "gptj": {"model_type": "gptj", "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 16, "rotary_dim": 4},
    }[kind]
    with pytest.raises(ValueError, match=r"has \d+ tokens, but .* knows 16 positions.*`max_length` of 16"):
        runs.fit(runs.module(description), runs.data(runs.pairs_file(tmp_path)), max_steps=1)


@pytest.mark.parametrize("where", ["train", "validation"])
def test_one_long_row_among_any_rows_of_a_fit_is_found(where, tmp_path):
    short = runs.pairs_file(tmp_path, 8, "short.jsonl")
    long = runs.write(tmp_path / "long.jsonl", [*runs.rows(7), {**runs.rows(1)[0], "chosen": " why" * 80}])
    sources = {"train": short, "validation": short, where: long}
    module = runs.module({"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64})
    with pytest.raises(ValueError, match="knows 64 positions"):
        runs.fit(module, runs.data(**sources), max_steps=1)


def test_rows_longer_than_rotary_positions_are_warned_of_once(tmp_path):
    module = runs.module({**runs.LLAMA, "max_position_embeddings": 16})
    with pytest.warns(UserWarning, match=r"has \d+ tokens.* 16 positions") as caught:
        runs.fit(module, runs.data(runs.pairs_file(tmp_path)), max_steps=1)
    assert len([one for one in caught if "positions" in str(one.message)]) == 1


def test_rows_that_fit_are_silent(tmp_path):
    runs.fit(runs.module({**runs.LLAMA, "max_position_embeddings": 64}), runs.data(runs.pairs_file(tmp_path)))


@pytest.mark.parametrize("where", ["policy", "reference"])
def test_a_token_beyond_the_embedding_is_named_before_training(where, tmp_path):
    small = {**runs.LLAMA, "vocab_size": 97}
    module = runs.module(
        small if where == "policy" else runs.LLAMA,
        reference=FrozenReference(small if where == "reference" else None),
    )
    with pytest.raises(ValueError, match=r"token id \d+, but .* embedding .* 97 tokens"):
        runs.fit(module, runs.data(runs.pairs_file(tmp_path)), max_steps=1)


def test_sizes_can_be_asked_for_alone():
    model = tiny_model("gpt2")
    check_sizes(model, longest=64, largest=49)
    with pytest.raises(ValueError, match="knows 64 positions"):
        check_sizes(model, longest=65, largest=49)
    with pytest.raises(ValueError, match="token id 50"):
        check_sizes(model, longest=64, largest=50)
