"""Agreement with TRL 1.16, the numbers of which `make_trl_golden.py` wrote down."""

import copy
import json
from pathlib import Path

import pytest
import torch

from lit_dpo import (
    APODownLoss,
    APOZeroLoss,
    BCOPairLoss,
    CPOLoss,
    DPOLoss,
    EXOLoss,
    FDPOLoss,
    HingeLoss,
    IPOLoss,
    LDDPOLoss,
    NCAPairLoss,
    ORPOLoss,
    PairBatch,
    PairLogps,
    RobustDPOLoss,
    SFTLoss,
    SimPOLoss,
    SPPOLoss,
    WeightedLoss,
)
from lit_dpo.scoring.score import score
from tests.losses.make_trl_golden import CASES, FROM_LOGPS, trl_loss
from tests.models import tiny_model

GOLDEN = json.loads(Path(__file__).with_name("trl_golden.json").read_text(encoding="utf-8"))
# TRL takes IPO's h from means over the completion's tokens, and so does the default here.
OURS = {
    "dpo": DPOLoss(beta=0.1),
    "dpo_beta": DPOLoss(beta=0.5),
    "cdpo": DPOLoss(beta=0.1, label_smoothing=0.1),
    "cdpo_beta": DPOLoss(beta=0.5, label_smoothing=0.3),
    "ipo": IPOLoss(beta=0.1),
    "ipo_beta": IPOLoss(beta=0.5),
    "sft": SFTLoss(),
    "dpo_and_sft": WeightedLoss(losses=(DPOLoss(beta=0.1), SFTLoss()), weights=(1.0, 0.5)),
    "dpo_norm": DPOLoss(beta=5.0, length_normalize=True),
    "robust": RobustDPOLoss(),
    "hinge": HingeLoss(),
    "apo_zero": APOZeroLoss(),
    "apo_down": APODownLoss(),
    "bco_pair": BCOPairLoss(),
    "nca_pair": NCAPairLoss(),
    "sppo": SPPOLoss(),
    "exo": EXOLoss(),
    "f_js": FDPOLoss(),
    "f_forward_kl": FDPOLoss(divergence="forward_kl"),
    "f_alpha": FDPOLoss(divergence="alpha", alpha=0.5),
    "lddpo": LDDPOLoss(),
    "mpo": WeightedLoss(losses=(DPOLoss(), BCOPairLoss(), SFTLoss()), weights=(0.8, 0.2, 1.0)),
}
IN_FLOAT32 = {"f_alpha", "orpo", "exo"}  # what TRL computes in float32 whatever it is given; of EXO the epsilon


def golden_logps(who, dtype):
    values = (torch.tensor(GOLDEN[f"{who}_{side}"], dtype=torch.float64).to(dtype) for side in ("chosen", "rejected"))
    counts = (torch.tensor(GOLDEN[f"{side}_tokens"]) for side in ("chosen", "rejected"))
    tokens = torch.tensor([value for pair in GOLDEN[f"{who}_tokens"] for value in pair], dtype=torch.float64).to(dtype)
    return PairLogps(*values, *counts, tokens=tokens)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("name", OURS)
def test_agrees_with_trl_on_given_log_probs(name, dtype, tolerance):
    tolerance = 1e-6 if name in IN_FLOAT32 else tolerance
    value = OURS[name](golden_logps("policy", dtype), golden_logps("reference", dtype))
    assert value.tolist() == pytest.approx(GOLDEN["cases"][name]["losses"], rel=tolerance, abs=tolerance)


@pytest.mark.parametrize("name", FROM_LOGPS)
def test_agrees_with_trls_experimental_trainers(name):
    policy = golden_logps("policy", torch.float64)
    value = {
        "simpo": SimPOLoss()(policy, policy),
        "cpo": CPOLoss().terms(policy, policy)["preference"],
        "orpo": ORPOLoss().weight * ORPOLoss().terms(policy, policy)["odds"],
    }[name]
    tolerance = 1e-6 if name in IN_FLOAT32 else 1e-12
    assert value.tolist() == pytest.approx(GOLDEN["cases"][name]["losses"], rel=tolerance, abs=tolerance)


def test_the_golden_numbers_are_of_these_cases():
    assert GOLDEN["made_by"].endswith("with trl 1.16.0")
    assert OURS.keys() == CASES.keys()
    assert (CASES | FROM_LOGPS).keys() == GOLDEN["cases"].keys()
    for name, settings in (CASES | FROM_LOGPS).items():
        assert {k: v for k, v in GOLDEN["cases"][name].items() if k != "losses"} == settings
    assert len({len(v) for v in GOLDEN.values() if isinstance(v, list)}) == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # trl 1.16
@pytest.mark.parametrize("name", ["dpo", "ipo"])
def test_agrees_with_trl_from_model_to_gradient(name):
    """TRL's collator, log-probs, loss and backward pass on a tiny model, against ours."""
    pytest.importorskip("trl")
    from trl.trainer.dpo_trainer import DataCollatorForPreference
    from trl.trainer.utils import add_fused_lm_head

    generator = torch.Generator().manual_seed(0)
    lengths = ((1, 1, 1), (5, 3, 7), (2, 6, 1), (9, 4, 4))
    pairs = [[torch.randint(3, 50, (n,), generator=generator).tolist() for n in sizes] for sizes in lengths]

    policy, reference = tiny_model("llama"), tiny_model("llama", seed=7)
    theirs, their_reference = copy.deepcopy(policy), copy.deepcopy(reference)
    for model in (theirs, their_reference):
        add_fused_lm_head(model, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    rows = [dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), pair, strict=True)) for pair in pairs]
    inputs = DataCollatorForPreference(pad_token_id=2)(rows)
    expected = trl_loss(CASES[name], theirs, their_reference, inputs)
    expected.backward()

    batch = PairBatch.from_lists(pairs)
    with torch.no_grad():
        fixed = score(reference, batch)
    loss = OURS[name](score(policy, batch), fixed).mean()
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    largest = max(float(p.grad.abs().max()) for p in theirs.parameters())
    for ours, their in zip(policy.parameters(), theirs.parameters(), strict=True):
        assert (ours.grad - their.grad).abs().max() <= 1e-5 * largest
