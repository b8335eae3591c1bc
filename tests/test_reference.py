"""The reference: where its log-probs come from, and that it never trains."""

import pytest
import torch

from lit_dpo import AdapterReference, DPOLoss, FrozenReference, LoRA, PairBatch, Scorer, score
from lit_dpo.models import load_model
from lit_dpo.tokenizers import quickstart_tokenizer
from tests import runs

pytestmark = runs.QUIET

BATCH = PairBatch.from_lists([([5, 6, 7], [8, 9], [10]), ([11], [12], [13, 14, 15])])


@pytest.fixture(scope="module")
def tokenizer():
    return quickstart_tokenizer()


def trained(tmp_path, **options):
    """A module after four steps."""
    module = runs.module(**options)
    runs.fit(module, runs.data(runs.pairs_file(tmp_path)), max_steps=4)
    return module


def test_a_frozen_reference_stays_what_the_policy_was(tmp_path):
    module = runs.module()
    module.configure_model()
    model = module.reference.models()[0]
    before, start = runs.digest(model), runs.digest(module.policy)
    assert before == start
    runs.fit(module, runs.data(runs.pairs_file(tmp_path)), max_steps=4)
    assert module.reference.models()[0] is model
    assert runs.digest(model) == before
    assert runs.digest(module.policy) != start


def test_a_frozen_reference_takes_no_part_in_training(tmp_path):
    module = trained(tmp_path)
    model = module.reference.models()[0]
    assert not model.training
    assert all(not p.requires_grad and p.grad is None for p in model.parameters())
    assert not {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in module.parameters()}
    held = {id(p) for group in module.trainer.optimizers[0].param_groups for p in group["params"]}
    assert held == {id(p) for p in module.policy.parameters()}
    assert all(name.startswith("policy.") for name in module.state_dict())
    assert not [m for m in module.modules() if m is model]


def test_scores_come_without_a_graph(tmp_path):
    module = runs.module()
    module.configure_model()
    logps = module.reference.score(module.policy, BATCH, Scorer(layers=(1,)))
    assert not logps.chosen.requires_grad
    assert not logps.layers[1].rejected.requires_grad


def test_it_follows_the_module():
    module = runs.module()
    module.configure_model()
    module.to(torch.float64)
    assert next(module.reference.models()[0].parameters()).dtype == torch.float64


def test_an_unbuilt_reference_says_so():
    with pytest.raises(RuntimeError, match="has not been built"):
        FrozenReference().score(torch.nn.Identity(), BATCH, Scorer())


def test_a_reference_of_its_own_folder(tmp_path, tokenizer):
    other = load_model(runs.LLAMA, tokenizer, seed=1)
    other.save_pretrained(tmp_path / "other")
    module = runs.module(reference=FrozenReference(str(tmp_path / "other")))
    module.configure_model()
    assert runs.digest(module.reference.models()[0]) == runs.digest(other)
    assert runs.digest(module.policy) != runs.digest(other)
    policy, reference = module(BATCH)
    with torch.no_grad():
        expected = score(other.eval(), BATCH)
    assert torch.equal(reference.chosen, expected.chosen)
    assert not torch.equal(policy.chosen, expected.chosen)


def test_a_missing_reference_is_named():
    module = runs.module(reference=FrozenReference("./no/such/folder"))
    with pytest.raises(ValueError, match="no/such/folder"):
        module.configure_model()


def test_the_adapter_reference_is_the_base_bit_for_bit(tmp_path, tokenizer):
    module = trained(tmp_path, adapter=LoRA(rank=4))
    assert isinstance(module.reference, AdapterReference)
    assert module.reference.models() == []
    base = load_model(runs.LLAMA, tokenizer).eval()
    policy, reference = module(BATCH)
    with torch.no_grad():
        expected = score(base, BATCH)
    assert torch.equal(reference.chosen, expected.chosen)
    assert torch.equal(reference.rejected, expected.rejected)
    assert not torch.equal(policy.chosen, expected.chosen)
    assert torch.equal(module(BATCH)[0].chosen, policy.chosen)  # the adapters are on again


def test_the_adapter_reference_refuses_a_policy_without_adapters():
    module = runs.module(reference=AdapterReference())
    with pytest.raises(ValueError, match=r"needs a policy with adapters: set `adapter`, or use `FrozenReference`"):
        module.configure_model()


def test_adapters_with_a_frozen_reference_agree_with_the_adapter_reference(tmp_path):
    first = trained(tmp_path, adapter=LoRA(rank=4), loss=DPOLoss(beta=0.5))
    second = trained(tmp_path, adapter=LoRA(rank=4), loss=DPOLoss(beta=0.5), reference=FrozenReference())
    assert runs.same(runs.weights(first.policy), runs.weights(second.policy))
