"""A mixture of references: what it mixes, what it equals, and that it goes wherever a reference goes."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from lit_dpo import (
    AdapterReference,
    CachedReference,
    FrozenReference,
    LoRA,
    MixedReference,
    PairBatch,
    PairLogps,
    Reference,
    Scorer,
    SyncedReference,
)
from lit_dpo.cli import main
from lit_dpo.losses import ADPOLoss
from lit_dpo.models import load_model
from tests import runs

pytestmark = [
    *runs.QUIET,
    pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning.pytorch.cli"),
    pytest.mark.filterwarnings("ignore:.*Be aware that when using `ckpt_path`"),
]
OTHER = {**runs.LLAMA, "intermediate_size": 64}
THIRD = {**runs.LLAMA, "num_attention_heads": 1}
PAIRS = [([5, 6, 7], [8, 9], [10]), ([11], [12, 13, 14, 15], [16, 17])]


def trained(reference, **options):
    module = runs.module(lr=0.1, reference=reference, **options)
    runs.fit(module, runs.data(runs.rows(8), batch_size=4), max_steps=2)
    return runs.weights(module.policy)


def test_it_is_the_weighted_mean_of_all_that_is_asked_for():
    parts = [FrozenReference(OTHER), MixedReference([FrozenReference(THIRD)]), AdapterReference()]
    module = runs.module(reference=MixedReference(parts, [0.2, 0.3, 0.5]), adapter=LoRA(rank=2))
    module.configure_model()
    batch = PairBatch.from_lists(PAIRS)
    found = module.reference.score(module.policy, batch, Scorer(layers=(1,), per_token=True))
    logps = torch.zeros(2, 9)  # of the last block and the first, for each completion token
    for weight, model in zip((0.2, 0.3, 0.5), (OTHER, THIRD, runs.LLAMA), strict=True):
        whole = load_model(model, module.tokenizer)
        place = 0
        for prompt, *completions in PAIRS:
            for completion in completions:
                ids = torch.tensor([prompt + completion])
                with torch.no_grad():
                    states = whole.model(ids, output_hidden_states=True).hidden_states
                    for row, state in enumerate((states[-1], whole.model.norm(states[1]))):
                        rows = whole.lm_head(state)[0, len(prompt) - 1 : -1].log_softmax(-1)
                        picked = rows[range(len(completion)), completion]
                        logps[row, place : place + len(completion)] += weight * picked
                place += len(completion)
    for got, expected in ((found, logps[0]), (found.layers[1], logps[1])):
        torch.testing.assert_close(got.tokens, expected, rtol=0, atol=1e-5)
        sums = [part.sum() for part in expected.split([2, 1, 4, 2])]
        torch.testing.assert_close(got.chosen, torch.stack(sums[0::2]), rtol=0, atol=1e-5)
        torch.testing.assert_close(got.rejected, torch.stack(sums[1::2]), rtol=0, atol=1e-5)


def test_a_mixture_of_one_is_that_one_bit_for_bit(tmp_path):
    assert runs.same(trained(MixedReference([FrozenReference(OTHER)], [1.0])), trained(FrozenReference(OTHER)))
    found = []
    for name, of in (("one", FrozenReference(OTHER)), ("two", MixedReference([FrozenReference(OTHER)]))):
        cached = CachedReference(str(tmp_path / name), of=of)
        found.append(trained(cached, loss=ADPOLoss(segments=2)))
        assert cached.scored
    assert runs.same(*found)


def test_equal_weights_are_the_default_and_the_weights_count():
    found = [trained(MixedReference([FrozenReference(OTHER), FrozenReference(THIRD)], weights))
             for weights in (None, [0.5, 0.5], [0.1, 0.9])]  # fmt: skip
    assert runs.same(*found[:2])
    assert not runs.same(*found[1:])


@pytest.mark.slow
def test_from_the_command_line_to_the_export(tmp_path):
    """Cached, stopped and resumed it trains what it does live at a stretch; its checkpoint loads as plain values."""
    parts = [{"class_path": "FrozenReference", "init_args": {"model": model}} for model in (OTHER, THIRD)]

    def fit(name, steps, option, *more):
        options = {
            "config": "tests/conf/tiny.yaml", "data.train": runs.pairs_file(tmp_path, 24), "data.batch_size": 2,
            "data.validation": runs.pairs_file(tmp_path, 4, "validation.jsonl", start=50), "model.optimizer.lr": 0.01,
            "trainer.accumulate_grad_batches": 1, "trainer.callbacks": "null", "trainer.max_epochs": 3,
            "trainer.max_steps": steps, "trainer.default_root_dir": tmp_path / name, "model.lr_scheduler": "null",
        }  # fmt: skip
        words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
        mixture = [option, "MixedReference", f"{option}.references", str(parts), f"{option}.weights", "[0.25, 0.75]"]
        main(["fit", "--config", "configs/dpo.yaml", *words, *more, *mixture])
        return torch.load(tmp_path / name / "version_0" / "checkpoints" / "last.ckpt", weights_only=True)

    whole = fit("live", 3, "--model.reference")
    cached = ["--model.reference", "CachedReference", "--model.reference.folder", str(tmp_path / "cache")]
    fit("kept", 2, "--model.reference.of", *cached)
    resumed = fit("kept", 3, "--model.reference.of", *cached, "--ckpt_path", "last", "--allow-changes")
    assert resumed["global_step"] == 3
    torch.testing.assert_close(resumed["state_dict"], whole["state_dict"], rtol=0, atol=1e-6)
    main(["export", str(tmp_path / "kept" / "version_0"), str(tmp_path / "out")])
    exported = runs.weights(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    assert runs.same(exported, {k.removeprefix("policy."): v for k, v in resumed["state_dict"].items()})
    assert "MixedReference(references=[FrozenReference(model=" in (tmp_path / "out" / "README.md").read_text()


class NoTokens(Reference):
    def score(self, policy, batch, scorer):
        _, chosen, rejected = batch.lengths.unbind(1)
        return PairLogps(-5.0 * chosen, -5.0 * rejected, chosen, rejected)


@pytest.mark.parametrize(
    ("references", "weights", "match"),
    [
        ([], None, "`references` must be a list of one or more references"),
        (["sft"], None, r"`references` must be a list of one or more references, got \['sft'\]"),
        ([FrozenReference()], [0.5], "`weights` must be numbers that add up to 1"),
        ([FrozenReference()], [0.5, 0.5], "`weights` must be 1 numbers, one a reference"),
        ([FrozenReference(), FrozenReference()], [1.5, -0.5], "`weights` must be above 0"),
    ],
)
def test_what_is_no_mixture_is_refused(references, weights, match):
    with pytest.raises(ValueError, match=match):
        MixedReference(references, weights)


def test_what_its_parts_cannot_do_it_refuses(tmp_path):
    with pytest.raises(ValueError, match="`NoTokens` gives no log-probs of single tokens"):
        trained(MixedReference([FrozenReference(), NoTokens()]), loss=ADPOLoss())
    with pytest.raises(ValueError, match="`AdapterReference` needs a policy with adapters"):
        trained(MixedReference([FrozenReference(), AdapterReference()]))
    mixture = MixedReference([FrozenReference(), SyncedReference()])
    with pytest.raises(ValueError, match="`SyncedReference` changes while the policy trains"):
        CachedReference(str(tmp_path), of=mixture)
