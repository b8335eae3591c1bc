"""A reference that follows the policy: exactly as a loop written by hand, and exactly so after every interruption."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from lit_dpo import CachedReference, LoRA, MixedReference, PairBatch, RandomSplit, SyncedReference, score
from lit_dpo.callbacks import BestCheckpoint
from lit_dpo.cli import main
from lit_dpo.models import load_model
from lit_dpo.stepwise import fit_stepwise
from tests import runs

pytestmark = [
    *runs.QUIET,
    pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning.pytorch.cli"),
    pytest.mark.filterwarnings("ignore:.*Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:.*modules? in eval mode"),
    pytest.mark.filterwarnings("ignore:.*You defined a `validation_step`"),
]
BATCHES = [
    PairBatch.from_lists([([5, 6 + n, 7], [8, 9 + n], [10 + n]), ([11 + n], [12, 13, 14 + n, 15], [16 + n, 17])])
    for n in range(8)
]


def by_hand(every, mix, rank):
    """SGD on DPO over two batches a step; ``rank`` > 0 trains low-rank factors, written out as sums of weights."""
    tokenizer = runs.module().tokenizer
    start = load_model(runs.LLAMA, tokenizer)
    policy, reference = copy.deepcopy(start), copy.deepcopy(start)
    factors = {}
    if rank:
        adapted = LoRA(rank=rank, alpha=8).attach(copy.deepcopy(start))
        for name, value in adapted.named_parameters():
            if "lora_" in name:
                layer, _, which = name.removeprefix("base_model.model.").partition(".lora_")
                factors.setdefault(f"{layer}.weight", {})[which[0]] = value.detach().clone().requires_grad_()
    trained = [f for pair in factors.values() for f in pair.values()] or list(policy.parameters())
    for step in range(1, 5):
        for batch in BATCHES[2 * step - 2 : 2 * step]:
            weights = dict(policy.named_parameters())
            if rank:
                sums = {k: start.get_parameter(k).detach() + 8 / rank * f["B"] @ f["A"] for k, f in factors.items()}
                weights = {**{k: v.detach() for k, v in weights.items()}, **sums}
            h = margins(policy, weights, batch) - margins(reference, dict(reference.named_parameters()), batch).detach()
            (F.softplus(-0.1 * h).mean() / 2).backward()
        with torch.no_grad():
            for value in trained:
                value -= 0.1 * value.grad
                value.grad = None
            if step % every == 0:
                for name, value in reference.named_parameters():
                    ours = policy.get_parameter(name)
                    if name in factors:
                        ours = start.get_parameter(name) + 8 / rank * factors[name]["B"] @ factors[name]["A"]
                    value.copy_((1 - mix) * value + mix * ours)
    return reference


def margins(model, weights, batch):
    """Chosen minus rejected log-prob of each pair, every sequence by itself."""
    found, place = [], 0
    for prompt, chosen, rejected in batch.shape:
        ids = batch.input_ids[place : place + prompt + chosen + rejected].tolist()
        place += prompt + chosen + rejected
        sums = []
        for completion in (ids[prompt : prompt + chosen], ids[prompt + chosen :]):
            inputs = {"input_ids": torch.tensor([ids[:prompt] + completion]), "use_cache": False}
            logits = torch.func.functional_call(model, weights, (), inputs).logits[0, prompt - 1 : -1]
            sums.append(logits.log_softmax(-1)[range(len(completion)), completion].sum())
        found.append(sums[0] - sums[1])
    return torch.stack(found)


@pytest.mark.parametrize(
    ("every", "mix", "options"),
    [
        (2, 0.6, {}),
        (1, 0.05, {"gradient_checkpointing": True}),
        (2, 1.0, {"max_tokens": 8}),
        (2, 0.6, {"adapter": LoRA(rank=2, alpha=8)}),
    ],
    ids=["soft", "average", "hard", "lora"],
)
def test_it_is_what_a_loop_by_hand_makes_of_it(every, mix, options):
    """Every so many optimizer steps, not batches: two are accumulated here."""
    module = runs.module(lr=0.1, reference=SyncedReference(every, mix), **options)
    run = runs.trainer(max_epochs=1, accumulate_grad_batches=2)
    run.fit(module, DataLoader(BATCHES, batch_size=None))
    [found] = module.reference.models()
    expected = by_hand(every, mix, 2 if "adapter" in options else 0)
    start = load_model(runs.LLAMA, module.tokenizer)
    torch.testing.assert_close(runs.weights(found), runs.weights(expected), rtol=0, atol=1e-6)
    assert not torch.allclose(found.model.layers[0].mlp.up_proj.weight, start.model.layers[0].mlp.up_proj.weight)
    if mix == 1:
        alike = [score(model, BATCHES[0]).chosen for model in (found, module.policy)]
        torch.testing.assert_close(*alike, rtol=0, atol=0)


@pytest.mark.slow
def test_from_the_command_line_to_the_export(tmp_path, capsys):
    """A run that stopped between two updates goes on as if it had not; a validation measures from the moved one."""

    def fit(name, steps, *more):
        options = {
            "config": "tests/conf/tiny.yaml", "data.train": runs.pairs_file(tmp_path, 24), "data.batch_size": 2,
            "data.validation": runs.pairs_file(tmp_path, 4, "validation.jsonl", start=50), "model.optimizer.lr": 0.01,
            "trainer.accumulate_grad_batches": 1, "trainer.callbacks": "null", "trainer.max_epochs": 3,
            "trainer.max_steps": steps, "trainer.default_root_dir": tmp_path / name, "model.lr_scheduler": "null",
            "model.reference": "SyncedReference", "model.reference.every": 2, "model.reference.mix": 0.3,
        }  # fmt: skip
        words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
        main(["fit", "--config", "configs/dpo.yaml", *words, *more])
        return torch.load(tmp_path / name / "version_0" / "checkpoints" / "last.ckpt", weights_only=True)

    whole = fit("whole", 4)
    fit("cut", 3)
    resumed = fit("cut", 4, "--ckpt_path", "last", "--allow-changes")
    assert runs.same(resumed["state_dict"], whole["state_dict"])
    held = {k.partition(".")[0] for k in whole["state_dict"]}
    assert held == {"policy", "moving_references"}
    main(["export", str(tmp_path / "cut" / "version_0"), str(tmp_path / "out")])
    exported = runs.weights(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    policy = {k.removeprefix("policy."): v for k, v in whole["state_dict"].items() if k.startswith("policy.")}
    assert runs.same(exported, policy)


class FirstLosses(Callback):
    def __init__(self, losses):
        self.losses = losses

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.setdefault(trainer.default_root_dir, []).append(float(outputs["loss"]))


def test_stepwise_it_starts_anew_at_each_step(tmp_path):
    losses = {}

    def make_trainer(root):
        callbacks = [FirstLosses(losses), BestCheckpoint("val/loss", mode="min")]
        return runs.trainer(root, max_epochs=1, callbacks=callbacks, enable_checkpointing=True)

    module = runs.module(lr=0.5, reference=SyncedReference(2, 0.5))
    data = runs.data(runs.rows(12), validation=runs.rows(4, 20), batch_size=2, partition=RandomSplit(2))
    fit_stepwise(module, data, make_trainer, tmp_path)
    assert len(losses) == 2
    for first, second, *_ in losses.values():
        assert first == pytest.approx(math.log(2), abs=1e-6)
        assert second != pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: SyncedReference(every=0), "`every` must be at least 1, got 0"),
        (lambda: SyncedReference(mix=0.0), r"`mix` must be in \(0, 1\], got 0.0"),
        (lambda: SyncedReference(mix=1.5), r"`mix` must be in \(0, 1\], got 1.5"),
        (lambda: CachedReference(of=SyncedReference()), "`SyncedReference` changes while the policy trains, and its"),
        (lambda: CachedReference(of=MixedReference([SyncedReference()])), "use it without `CachedReference`"),
    ],
)
def test_what_cannot_be_is_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make()
