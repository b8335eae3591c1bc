"""What cannot be trained says so in one sentence, from the command line too."""

import logging
import re
import textwrap

import pytest
from transformers import BartConfig, BartForConditionalGeneration, T5Config, T5ForConditionalGeneration

from lit_dpo import IntermediateLoss
from lit_dpo.cli import main
from tests import runs

pytestmark = [*runs.QUIET, pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning.pytorch.cli")]

SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
GEMMA3N = {
    "model_type": "gemma3n_text", **SMALL, "num_key_value_heads": 1, "head_dim": 8, "intermediate_size": 32,
    "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 1024, "laurel_rank": 4, "num_kv_shared_layers": 0,
    "layer_types": ["full_attention"] * 3, "activation_sparsity_pattern": [0.0] * 3,
}  # fmt: skip
LONGCAT = {
    "model_type": "longcat_flash", "hidden_size": 32, "num_layers": 2, "num_attention_heads": 2,
    "ffn_hidden_size": 32, "expert_ffn_hidden_size": 16, "n_routed_experts": 4, "zero_expert_num": 2, "moe_topk": 2,
    "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
}  # fmt: skip
SEQ2SEQ = {"d_model": 32, "num_layers": 2, "decoder_layers": 2, "encoder_layers": 2, "vocab_size": 1024}


@pytest.mark.parametrize(
    ("options", "trainer", "sentence"),
    [
        ({}, {"precision": "64-true"}, r"`precision: 64-true` .*`dtype: float64`.*`32-true`"),
        ({"model": {"model_type": "t5", **SEQ2SEQ}}, {}, r"`model` is a t5, .*no decoder-only .*: "),
        ({"model": {"model_type": "bart", **SEQ2SEQ}}, {}, r"`model` is a bart, .*no decoder-only .*: "),
        ({"model": LONGCAT}, {}, "No list of 4 decoder blocks found in LongcatFlashModel"),
        (
            {"model": GEMMA3N, "loss": IntermediateLoss(layers=(2,))},
            {},
            "blocks of Gemma3nForCausalLM put out 4-dimensional states.*score its last layer only",
        ),
    ],
    ids=["64-true", "t5", "bart", "no block list", "4-D blocks"],
)
def test_what_cannot_be_trained_is_refused_in_a_sentence(options, trainer, sentence, tmp_path):
    with pytest.raises(ValueError, match=sentence) as caught:
        runs.fit(runs.module(**options), runs.data(runs.pairs_file(tmp_path)), max_steps=1, **trainer)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "model"), [(BartConfig, BartForConditionalGeneration), (T5Config, T5ForConditionalGeneration)]
)
def test_a_folder_of_an_encoder_decoder_is_refused(config, model, tmp_path):
    """Of Bart, transformers would silently load the half without the encoder."""
    small = {"encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "d_ff": 32, "d_kv": 16, "num_heads": 2}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    model(config(**SEQ2SEQ, **small, **heads)).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="no decoder-only"):
        runs.fit(runs.module(str(tmp_path / "model")), runs.data(runs.pairs_file(tmp_path)), max_steps=1)


@pytest.mark.every(2)
@pytest.mark.parametrize(
    ("body", "got"),
    [
        ("dpo_like.mean()", r"a tensor of shape \(\)"),
        ("dpo_like[:1]", r"a tensor of shape \(1,\)"),
        ("dpo_like[:, None]", r"a tensor of shape \(\d+, 1\)"),
        ("float(dpo_like.mean())", "a float"),
    ],
    ids=["mean", "one", "column", "float"],
)
def test_a_loss_of_a_users_file_that_is_not_one_value_a_pair_is_one_sentence(
    body, got, tmp_path, monkeypatch, capsys, caplog, request
):
    name = f"their_losses_{request.node.callspec.id}"
    (tmp_path / f"{name}.py").write_text(
        textwrap.dedent(f"""
            from dataclasses import dataclass
            from lit_dpo.losses import PreferenceLoss

            @dataclass(frozen=True)
            class Theirs(PreferenceLoss):
                def __call__(self, policy, reference):
                    dpo_like = -(policy.margin - reference.margin)
                    return {body}
        """)
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    arguments = ["fit", "--model.model", str(runs.LLAMA), "--model.tokenizer", "quickstart", "--data.train"]
    arguments += [runs.pairs_file(tmp_path), "--model.loss", f"{name}.Theirs", "--allow-import", name]
    arguments += ["--trainer.max_steps", "1", "--trainer.accelerator", "cpu", "--trainer.devices", "1"]
    with caplog.at_level(logging.INFO), pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code not in (0, None)
    text = capsys.readouterr().err + caplog.text
    assert "Traceback" not in text
    (line,) = [line for line in text.splitlines() if "Theirs" in line and "one value a pair" in line]
    assert re.search(got, line)
    assert re.search(r"shape \(\d+,\).*the mean is taken", line)
