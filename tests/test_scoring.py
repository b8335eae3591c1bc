import copy

import pytest
import torch
from torch import nn

from lit_dpo import PairBatch
from lit_dpo.adapters import LoRA
from lit_dpo.scoring.audit import choose_form
from lit_dpo.scoring.decoder import decoder_parts
from lit_dpo.scoring.score import flat_obstacle, own_attention, score
from tests.models import VOCABULARY, tiny_model
from tests.oracles import dense_attention, sees, separate_logps

EXACT = ["llama", "qwen2", "qwen3", "mistral", "gpt_neox", "gpt2", "gemma", "gemma3_text"]
SOFTCAPPED = ["gemma2"]  # its own attention computes the softmax in float32
SCALED_HEADS = ["cohere", "granite"]
EXPERTS = ["mixtral", "jetmoe", "deepseek_v3"]
FLAT = EXACT + SOFTCAPPED + SCALED_HEADS + EXPERTS
LENGTHS = ((1, 1, 1), (5, 3, 7), (2, 6, 1), (9, 4, 4))


def made_pairs(lengths=LENGTHS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [tuple(torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in sizes) for sizes in lengths]


PAIRS = made_pairs()
BATCH = PairBatch.from_lists(PAIRS)


def weighted(chosen, rejected):
    """One number that depends on every log-prob in its own way."""
    signs = torch.linspace(1, 2, len(chosen), dtype=chosen.dtype)
    return (signs * chosen).sum() - (0.3 + signs.square()) @ rejected


def gradients(model, loss):
    """The gradient of every trainable parameter, by name, in float64."""
    model.zero_grad(set_to_none=True)
    loss.backward()
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return {name: torch.zeros_like(p).double() if p.grad is None else p.grad.double() for name, p in named.items()}


def assert_close(ours, expected, tolerance):
    """Equal within ``tolerance``, relative to the largest value where that is above 1."""
    assert ours.shape == expected.shape
    ours, expected = ours.detach().double(), expected.detach().double()
    assert float((ours - expected).abs().max()) <= tolerance * max(1.0, float(expected.abs().max()))


def assert_same_gradients(ours, expected, tolerance):
    assert ours.keys() == expected.keys()
    size = max(float(g.abs().max()) for g in expected.values())
    for name, gradient in ours.items():
        assert float((gradient - expected[name]).abs().max()) <= tolerance * size, name


def assert_scores_like_its_own_logits(model, batch, pairs, form, tolerance):
    untouched = copy.deepcopy(model)
    got = score(model, batch, form=form)
    chosen, rejected = separate_logps(untouched, pairs)
    assert_close(got.chosen, chosen, tolerance)
    assert_close(got.rejected, rejected, tolerance)
    ours = gradients(model, weighted(got.chosen, got.rejected))
    expected = gradients(untouched, weighted(chosen, rejected))
    assert_same_gradients(ours, expected, tolerance)


# Flat, padded, one by one


@pytest.mark.parametrize("form", ["flat", "padded"])
@pytest.mark.parametrize("model_type", EXACT)
def test_agrees_in_float64_with_one_sequence_at_a_time(model_type, form):
    assert_scores_like_its_own_logits(tiny_model(model_type, "float64"), BATCH, PAIRS, form, 1e-10)


@pytest.mark.parametrize("form", ["flat", "padded"])
@pytest.mark.parametrize("model_type", FLAT)
def test_agrees_in_float32_with_one_sequence_at_a_time(model_type, form):
    assert_scores_like_its_own_logits(tiny_model(model_type), BATCH, PAIRS, form, 1e-4)


@pytest.mark.parametrize("model_type", SOFTCAPPED)
def test_flat_and_padded_agree_where_the_models_own_softmax_is_float32(model_type):
    model = tiny_model(model_type, "float64")
    flat, padded = (score(model, BATCH, form=form) for form in ("flat", "padded"))
    assert_close(flat.chosen, padded.chosen, 1e-5)
    assert_close(flat.rejected, padded.rejected, 1e-5)


def test_counts_and_dtypes():
    got = score(tiny_model("llama"), BATCH)
    assert got.chosen_tokens.tolist() == [1, 3, 6, 4]
    assert got.rejected_tokens.tolist() == [1, 7, 1, 4]
    assert got.chosen.shape == got.rejected.shape == (4,)
    assert got.layers == {}
    assert got.chosen.dtype == torch.float32
    assert score(tiny_model("llama", "float64"), BATCH).chosen.dtype == torch.float64
    assert score(tiny_model("llama", "bfloat16"), BATCH).chosen.dtype == torch.float32


@pytest.mark.parametrize("form", ["flat", "padded"])
def test_bfloat16_and_autocast_stay_near_float32(form):
    exact = score(tiny_model("llama", initializer_range=0.05), BATCH, form=form)
    half = score(tiny_model("llama", "bfloat16", initializer_range=0.05), BATCH, form=form)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = score(tiny_model("llama", initializer_range=0.05), BATCH, form=form)
    for other in (half, mixed):
        assert (other.chosen - exact.chosen).abs().max() < 0.1
        assert (other.rejected - exact.rejected).abs().max() < 0.1


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing. is deprecated")
@pytest.mark.parametrize("way", ["weights", "autocast"])
@pytest.mark.parametrize("path", ["flat", "padded", "checkpointing", "layers", "adapter"])
def test_bfloat16_gradients_point_where_float32_ones_do(path, way):
    """Through every fast path: log-probs within 0.2 nats of float32, the whole gradient within 3 degrees of it."""
    layers = (1, 2) if path == "layers" else ()

    def scored(dtype, autocast):
        model = tiny_model("llama", dtype, initializer_range=0.05).train()
        if path == "checkpointing":
            older = model.gradient_checkpointing_enable  # the one name in transformers 5.17
            getattr(model, "activation_checkpointing_enable", older)({"use_reentrant": False})
        if path == "adapter":
            model = LoRA(rank=2).attach(model)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            got = score(model, BATCH, layers, form="padded" if path == "padded" else "flat")
        every = [got, *got.layers.values()]
        found = gradients(model, sum(weighted(one.chosen, one.rejected) for one in every))
        return torch.cat([torch.cat([one.chosen, one.rejected]) for one in every]), torch.cat(
            [gradient.flatten() for gradient in found.values()]
        )

    exact, half = scored("float32", False), scored(*(("bfloat16", False) if way == "weights" else ("float32", True)))
    assert (half[0] - exact[0]).abs().max() < 0.2
    assert torch.cosine_similarity(half[1], exact[1], dim=0) > 0.9986
    assert float(half[1].norm() / exact[1].norm()) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("form", ["flat", "padded"])
def test_neither_order_nor_split_of_the_batch_matters(form):
    model = tiny_model("llama", "float64")
    whole = score(model, BATCH, form=form)
    order = [2, 0, 3, 1]
    moved = score(model, PairBatch.from_lists([PAIRS[i] for i in order]), form=form)
    assert_close(moved.chosen, whole.chosen[order], 1e-10)
    assert_close(moved.rejected, whole.rejected[order], 1e-10)
    halves = [score(model, PairBatch.from_lists(PAIRS[part]), form=form) for part in (slice(1), slice(1, 4))]
    assert_close(torch.cat([half.chosen for half in halves]), whole.chosen, 1e-10)
    assert_close(torch.cat([half.rejected for half in halves]), whole.rejected, 1e-10)


def test_swapping_the_completions_swaps_their_log_probs():
    model = tiny_model("llama", "float64")
    whole = score(model, BATCH)
    swapped = score(model, PairBatch.from_lists([(p, r, c) for p, c, r in PAIRS]))
    assert_close(swapped.chosen, whole.rejected, 1e-10)
    assert_close(swapped.rejected, whole.chosen, 1e-10)


# Intermediate layers


@pytest.mark.parametrize("form", ["flat", "padded"])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma"])
def test_a_block_is_scored_through_final_norm_and_head(model_type, form):
    model = tiny_model(model_type, "float64")
    untouched = copy.deepcopy(model)
    got = score(model, BATCH, layers=(2, 1, 3), form=form)
    assert list(got.layers) == [2, 1, 3]
    loss = expected_loss = 0.0
    for block in (1, 2, 3):
        chosen, rejected = separate_logps(untouched, PAIRS, block)
        layer = got.layers[block]
        assert_close(layer.chosen, chosen, 1e-10)
        assert_close(layer.rejected, rejected, 1e-10)
        assert layer.chosen_tokens.tolist() == got.chosen_tokens.tolist()
        loss = loss + block * weighted(layer.chosen, layer.rejected)
        expected_loss = expected_loss + block * weighted(chosen, rejected)
    assert_same_gradients(gradients(model, loss), gradients(untouched, expected_loss), 1e-10)
    assert torch.equal(got.layers[3].chosen, got.chosen)  # the last block is the model's own output


def test_layers_do_not_change_the_last_one():
    model = tiny_model("llama", "float64")
    assert torch.equal(score(model, BATCH).chosen, score(model, BATCH, layers=(1, 2)).chosen)


def test_no_hook_stays_behind():
    model = tiny_model("llama")
    score(model, BATCH, layers=(1, 2))
    with pytest.raises(IndexError):
        score(model, PairBatch.from_lists([([999], [1], [2])]), layers=(1, 2))  # no such token
    assert not any(module._forward_hooks for module in model.modules())


def test_detach_head_keeps_the_intermediate_gradient_out_of_norm_and_head():
    model = tiny_model("gpt_neox", "float64", tie_word_embeddings=False)
    free = score(model, BATCH, layers=(2,)).layers[2]
    free_grads = gradients(model, weighted(free.chosen, free.rejected))
    got = score(model, BATCH, layers=(2,), detach_head=True)
    cut = got.layers[2]
    assert torch.equal(cut.chosen, free.chosen)
    cut_grads = gradients(model, weighted(cut.chosen, cut.rejected))
    parts = decoder_parts(model)
    for module in (parts.norm, parts.head):
        assert all(p.grad is None for p in module.parameters())
    names = {f"gpt_neox.final_layer_norm.{kind}" for kind in ("weight", "bias")} | {"lm_head.weight"}
    assert all(free_grads.pop(name).any() for name in names)
    assert_same_gradients({k: v for k, v in cut_grads.items() if k not in names}, free_grads, 1e-12)
    assert all(p.grad is None for p in parts.blocks[2].parameters())  # nothing behind block 2 either

    got = score(model, BATCH, layers=(2,), detach_head=True)  # the last layer's own term is left alone
    ours = gradients(model, weighted(got.chosen, got.rejected))
    plain = score(model, BATCH)
    assert_same_gradients(ours, gradients(model, weighted(plain.chosen, plain.rejected)), 1e-12)


def test_detach_head_leaves_a_tied_embedding_its_gradient_as_input():
    model = tiny_model("gpt2", "float64")  # the head's weight is the embedding
    cut = score(model, BATCH, layers=(1,), detach_head=True).layers[1]
    rows = gradients(model, weighted(cut.chosen, cut.rejected))["transformer.wte.weight"].any(1)
    read = {token for prompt, *sides in PAIRS for side in sides for token in (*prompt, *side[:-1])}
    assert set(rows.nonzero()[:, 0].tolist()) == read


@pytest.mark.parametrize("layer", [0, 4, -1, 1.5])
def test_a_block_that_is_not_there_is_refused(layer):
    with pytest.raises(ValueError, match=rf"no block {layer}: the decoder has 3 blocks, counted from 1"):
        score(tiny_model("llama"), BATCH, layers=(layer,))


def test_without_a_known_final_norm_only_the_last_layer_is_scored():
    model = tiny_model("biogpt")
    assert_scores_like_its_own_logits(model, BATCH, PAIRS, "auto", 1e-4)
    with pytest.raises(ValueError, match="BioGptForCausalLM has no final norm under a known name"):
        score(model, BATCH, layers=(1,))


@pytest.mark.parametrize("form", ["flat", "padded"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(form, reentrant):
    model = tiny_model("llama", "float64").train()
    calls = []
    model.model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(None))
    results = []
    for checkpointing in (False, True):
        if checkpointing:
            # transformers 5.23 renamed it
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": reentrant})
        got = score(model, BATCH, layers=(2,), form=form)
        between = got.layers[2]
        loss = weighted(got.chosen, got.rejected) + weighted(between.chosen, between.rejected)
        results.append((got.chosen, between.chosen, gradients(model, loss)))
    assert len(calls) == 3  # the second time once more, in the backward pass
    (chosen, layer, grads), (chosen_again, layer_again, grads_again) = results
    assert torch.equal(chosen, chosen_again)
    assert torch.equal(layer, layer_again)
    assert_same_gradients(grads_again, grads, 1e-12)


# Adapters

adapters = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft 0.21


def adapted(**overrides):
    pytest.importorskip("peft")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LoRA(rank=2, alpha=4).attach(tiny_model("llama", "float64", **overrides))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # starts at 0, which would make the adapter no change
                nn.init.normal_(parameter, std=0.3)
    return model


@adapters
@pytest.mark.parametrize("form", ["flat", "padded"])
def test_adapters_are_scored_and_switch_off(form):
    model, base = adapted(), tiny_model("llama", "float64")
    assert_scores_like_its_own_logits(model, BATCH, PAIRS, form, 1e-10)
    plain = score(base, BATCH, layers=(2,), form=form)
    assert (score(model, BATCH, form=form).chosen - plain.chosen).abs().min() > 1e-3
    with model.disable_adapter():
        off = score(model, BATCH, layers=(2,), form=form)
    assert torch.equal(off.chosen, plain.chosen)
    assert torch.equal(off.rejected, plain.rejected)
    assert torch.equal(off.layers[2].chosen, plain.layers[2].chosen)


@adapters
def test_only_adapters_get_a_gradient():
    model = adapted()
    got = score(model, BATCH)
    grads = gradients(model, weighted(got.chosen, got.rejected))
    assert all("lora_" in name for name in grads)
    assert all(gradient.any() for gradient in grads.values())
    assert model.get_base_model().lm_head.weight.grad is None


@adapters
def test_an_adapter_on_the_head_is_refused():
    pytest.importorskip("peft")
    model = LoRA(rank=2, target_modules=["lm_head"]).attach(tiny_model("llama"))
    with pytest.raises(ValueError, match=r"output head of LlamaForCausalLM is .*, not a linear layer"):
        score(model, BATCH)


def test_only_causal_language_models_are_scored():
    for model in (nn.Linear(2, 2), tiny_model("llama").model):
        with pytest.raises(
            ValueError, match=f"must be a transformers causal language model, got {type(model).__name__}"
        ):
            score(model, BATCH)


# Where the flat line cannot serve


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("bloom", "attention interface"),
        ("codegen", "attention interface"),  # and a config that knows no padding token
        ("mamba", "carries a state from token to token"),
    ],
)
def test_models_without_the_attention_interface_fall_back_to_padded_rows(model_type, reason):
    model = tiny_model(model_type)
    assert reason in flat_obstacle(model)
    form, why = choose_form(model)
    assert form == "padded"
    assert reason in why
    assert_scores_like_its_own_logits(model, BATCH, PAIRS, "auto", 1e-4)
    for function in (lambda: score(model, BATCH, form="flat"), lambda: choose_form(model, "flat")):
        with pytest.raises(ValueError, match=f"flat form cannot serve this model: .*{reason}.*`form: padded`"):
            function()


@pytest.mark.parametrize("model_type", ["mistral", "gemma3_text"])
@pytest.mark.parametrize(("window", "fits"), [(12, True), (13, True), (11, False), (4, False)])
def test_a_sequence_longer_than_the_window_falls_back(model_type, window, fits):
    model = tiny_model(model_type, "float64", sliding_window=window)
    pairs = made_pairs(((5, 7, 3), (2, 1, 4)))  # the longest sequence has 12 tokens
    batch = PairBatch.from_lists(pairs)
    assert_scores_like_its_own_logits(model, batch, pairs, "auto", 1e-10)
    if fits:
        assert flat_obstacle(model, batch) is None
        assert_scores_like_its_own_logits(model, batch, pairs, "flat", 1e-10)
    else:
        message = f"a sequence of 12 tokens is longer than the model's attention window of {window}"
        assert flat_obstacle(model, batch) == message
        assert flat_obstacle(model) is None  # shorter batches still go flat
        with pytest.raises(ValueError, match=f"{message}.*`form: padded` or `auto`"):
            score(model, batch, form="flat")


# The audit


@pytest.mark.parametrize("model_type", FLAT)
def test_the_audit_passes_and_leaves_everything_as_it_was(model_type):
    model = tiny_model(model_type).train()
    model.get_decoder().eval()
    modes = [module.training for module in model.modules()]
    before = torch.get_rng_state()
    assert choose_form(model) == ("auto", None)
    assert choose_form(model, "flat") == ("auto", None)
    assert choose_form(model, "padded") == ("padded", "the padded form was asked for")
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.grad is None for p in model.parameters())


def not_causal(shape):
    return sees(shape) | sees(shape).T


def without_prompt(shape):
    allowed = sees(shape)
    start = 0
    for prompt, chosen, rejected in shape:
        branch = start + prompt + chosen
        allowed[branch : branch + rejected, start : start + prompt] = False
        start = branch + rejected
    return allowed


def through_the_other_branch(shape):
    total = sum(map(sum, shape))
    pair = torch.tensor([i for i, sizes in enumerate(shape) for _ in range(sum(sizes))])
    return torch.ones(total, total).tril().bool() & (pair[:, None] == pair)


def across_pairs(shape):
    total = sum(map(sum, shape))
    return torch.ones(total, total).tril().bool()


@pytest.mark.parametrize("rule", [not_causal, without_prompt, through_the_other_branch, across_pairs])
def test_the_audit_catches_wrong_attention(rule, monkeypatch):
    def sabotaged(query, key, value, shape, scale, softcap, dropout):
        return dense_attention(query, key, value, rule(shape), scale, softcap)

    model = tiny_model("llama")
    monkeypatch.setattr("lit_dpo.scoring.score.pair_attention", sabotaged)
    form, reason = choose_form(model)
    assert form == "padded"
    assert "in the flat form differ from its own logits by" in reason
    with pytest.raises(ValueError, match=r"flat form cannot serve this model: .* differ from its own logits"):
        choose_form(model, "flat")


def test_the_audit_lets_right_attention_pass(monkeypatch):
    def slow(query, key, value, shape, scale, softcap, dropout):
        return dense_attention(query, key, value, sees(shape), scale, softcap)

    monkeypatch.setattr("lit_dpo.scoring.score.pair_attention", slow)
    assert choose_form(tiny_model("llama")) == ("auto", None)


@pytest.mark.parametrize("place", [0, -2], ids=["prompt", "rejected"])
def test_the_audit_is_not_fooled_by_nan(place, monkeypatch):
    def sabotaged(query, key, value, shape, scale, softcap, dropout):
        out = dense_attention(query, key, value, sees(shape), scale, softcap)
        out[:, :, place] = torch.nan  # a prompt spoils both completions, a rejected one only itself
        return out

    monkeypatch.setattr("lit_dpo.scoring.score.pair_attention", sabotaged)
    form, reason = choose_form(tiny_model("llama"))
    assert form == "padded"
    assert "nan" in reason


@pytest.mark.parametrize("setting", ["logit_scale", "logits_scaling", "final_logit_softcapping"])
def test_the_audit_catches_a_head_that_is_not_the_models(setting):
    model = tiny_model("llama")
    setattr(model.config, setting, 0.5)  # llama knows no such setting, so its own logits do not change
    with pytest.raises(ValueError, match=r"LlamaForCausalLM cannot be scored: .* padded form differ .* own logits"):
        choose_form(model)


@pytest.mark.parametrize(
    ("name", "value"), [("s_aux", torch.ones(4)), ("block_indices", torch.zeros(1, 2, 3, 4, dtype=torch.int64))]
)
def test_attention_that_takes_more_than_scores_falls_back(name, value, monkeypatch):
    """Learnt sinks, chosen blocks: what the flat line would silently leave out, perhaps beyond the audit's lengths."""
    model = tiny_model("llama")
    for block in model.model.layers:
        forward = block.self_attn.forward
        monkeypatch.setattr(block.self_attn, "forward", lambda *a, f=forward, **k: f(*a, **k, **{name: value}))
    form, reason = choose_form(model)
    assert form == "padded"
    assert name in reason


def test_attention_that_cannot_run_on_the_flat_line_falls_back():
    model = tiny_model("nemotron")  # its blocks keep the form's arguments from the attention function
    form, reason = choose_form(model)
    assert form == "padded"
    assert reason
    assert_scores_like_its_own_logits(model, BATCH, PAIRS, "padded", 1e-4)
    with pytest.raises(ValueError, match="flat form cannot serve this model"):
        choose_form(model, "flat")


# The model afterwards


def test_plain_forward_passes_are_as_before():
    model = tiny_model("llama", "float64")
    ids = torch.randint(VOCABULARY, (2, 7))
    before = model(ids).logits
    score(model, BATCH)
    assert torch.equal(model(ids).logits, before)
    generated = model.generate(ids[:1], max_new_tokens=3, do_sample=False)
    assert generated.shape[1] > 7


@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_own_attention_is_given_back(model_type):
    model = tiny_model(model_type)
    name = model.config._attn_implementation
    ids = torch.randint(VOCABULARY, (2, 7))
    before = model(ids).logits
    score(model, BATCH, form="flat")
    own_attention(model)
    assert model.config._attn_implementation == name
    assert torch.equal(model(ids).logits, before)
    own_attention(model)  # twice does no harm
    assert model.config._attn_implementation == name


def test_a_cap_on_scores_is_not_lost_in_a_plain_pass():
    model = tiny_model("gemma2")
    score(model, BATCH, form="flat")
    with pytest.raises(RuntimeError, match=r"call `own_attention\(model\)`"):
        model(torch.randint(VOCABULARY, (2, 7)))


def test_a_second_model_of_the_same_config_is_scored_too():
    model = tiny_model("llama", "float64")
    score(model, BATCH)
    second = type(model)(model.config).double()  # shares the config object
    second.load_state_dict(model.state_dict())
    flat, padded = score(second, BATCH, form="flat"), score(second, BATCH, form="padded")
    assert_close(flat.chosen, padded.chosen, 1e-4)
    assert_close(score(model, BATCH, form="padded").chosen, padded.chosen, 1e-4)
    own_attention(model)
    own_attention(second)
    assert model.config._attn_implementation == "sdpa"
