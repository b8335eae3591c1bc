"""Writes trl_golden.json: the losses that TRL itself computes from given log-probs.

TRL has no loss function to call; its formulas stand inside `DPOTrainer._compute_loss`. So that method is run as it is,
on a trainer that was never initialised but holds the settings the method reads, and on a stand-in for the model that
returns the given log-probs. Per-pair losses come from batches of one pair.

TRL 1.16 has no label smoothing in its sigmoid loss; `aot` with one pair, where there is nothing to sort, is the
smoothed formula. CPO, SimPO and ORPO stand in its experimental trainers, in methods that take log-probs; of CPO and
ORPO these are the preference term alone, the supervised term being computed from the model's logits elsewhere.

    pip install trl==1.16.0
    python tests/losses/make_trl_golden.py
"""

import json
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import torch

CASES = {
    "dpo": {"loss_types": ["sigmoid"], "beta": 0.1},
    "dpo_beta": {"loss_types": ["sigmoid"], "beta": 0.5},
    "cdpo": {"loss_types": ["aot"], "beta": 0.1, "label_smoothing": 0.1},
    "cdpo_beta": {"loss_types": ["aot"], "beta": 0.5, "label_smoothing": 0.3},
    "ipo": {"loss_types": ["ipo"], "beta": 0.1},
    "ipo_beta": {"loss_types": ["ipo"], "beta": 0.5},
    "sft": {"loss_types": ["sft"], "beta": 0.1},
    "dpo_and_sft": {"loss_types": ["sigmoid", "sft"], "beta": 0.1, "loss_weights": [1.0, 0.5]},
    "dpo_norm": {"loss_types": ["sigmoid_norm"], "beta": 5.0},
    "robust": {"loss_types": ["robust"], "beta": 0.1, "label_smoothing": 0.1},
    "hinge": {"loss_types": ["hinge"], "beta": 0.1},
    "apo_zero": {"loss_types": ["apo_zero"], "beta": 0.1},
    "apo_down": {"loss_types": ["apo_down"], "beta": 0.1},
    "bco_pair": {"loss_types": ["bco_pair"], "beta": 0.1},
    "nca_pair": {"loss_types": ["nca_pair"], "beta": 0.01},
    "sppo": {"loss_types": ["sppo_hard"], "beta": 0.001},
    "exo": {"loss_types": ["exo_pair"], "beta": 0.1, "label_smoothing": 1e-3},
    "f_js": {"loss_types": ["sigmoid"], "beta": 0.1, "f_divergence_type": "js_divergence"},
    "f_forward_kl": {"loss_types": ["sigmoid"], "beta": 0.1, "f_divergence_type": "forward_kl"},
    "f_alpha": {
        "loss_types": ["sigmoid"],
        "beta": 0.1,
        "f_divergence_type": "alpha_divergence",
        "f_alpha_divergence_coef": 0.5,
    },
    "lddpo": {"loss_types": ["sigmoid"], "beta": 0.1, "ld_alpha": 0.5},
    "mpo": {"loss_types": ["sigmoid", "bco_pair", "sft"], "beta": 0.1, "loss_weights": [0.8, 0.2, 1.0]},
}
# Methods of the experimental trainers, from log-probs; whether these are means over tokens is the trainers' affair.
FROM_LOGPS = {
    "cpo": {"method": "cpo_loss", "loss_type": "sigmoid", "beta": 0.1, "means": False},
    "simpo": {"method": "cpo_loss", "loss_type": "simpo", "beta": 2.5, "simpo_gamma": 1.25, "means": True},
    "orpo": {"method": "odds_ratio_loss", "beta": 0.1, "means": True},
}
# Tokens of chosen and rejected completion, and log-prob per token of policy and reference for each of the two.
PAIRS = [
    ((1, 1), (-0.5, -0.7), (-2.5, -2.0)),
    ((7, 3), (-1.1, -1.0), (-1.3, -1.2)),
    ((4, 9), (-3.0, -1.0), (-0.4, -0.9)),
    ((12, 12), (-0.2, -2.2), (-4.0, -0.1)),
    ((5, 6), (-2.0, -2.0), (-1.5, -1.5)),
    ((30, 2), (-1.7, -1.6), (-6.0, -5.0)),
]


def trl_loss(settings, model, reference, inputs):
    """TRL's own loss over a batch, from two models that return `log_probs`, and a batch as its collator makes it."""
    from trl import DPOTrainer

    trainer = object.__new__(DPOTrainer)
    defaults = {
        "beta": 0.1,
        "label_smoothing": 0.0,
        "loss_weights": [1.0] * len(settings["loss_types"]),
        "f_divergence_type": "reverse_kl",
        "ld_alpha": None,
        "use_weighting": False,
        "aux_loss_enabled": False,
        "precompute_ref_logps": False,
    }
    gather = SimpleNamespace(device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x)
    bookkeeping = {
        "model": model.eval(),
        "ref_model": reference,
        "accelerator": gather,
        "args": SimpleNamespace(gradient_checkpointing_kwargs=None),
        "_metrics": {"eval": defaultdict(list)},
        "_total_train_tokens": 0,
    }
    for name, value in {**defaults, **bookkeeping, **settings}.items():
        setattr(trainer, name, value)
    return trainer._compute_loss(model, inputs, return_outputs=False)


def trl_loss_from_logps(settings, chosen, rejected):
    """What the method of an experimental trainer makes of log-probs of the policy."""
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    trainer = SimpleNamespace(alpha=0.0, label_smoothing=0.0, accelerator=SimpleNamespace(device="cpu"))
    vars(trainer).update(settings)
    if settings["method"] == "cpo_loss":
        return CPOTrainer.cpo_loss(trainer, chosen, rejected)[0]
    return -ORPOTrainer.odds_ratio_loss(trainer, chosen, rejected)[0]  # the trainer subtracts it


class Given(torch.nn.Module):
    """A stand-in for a model: returns these per-token log-probs, shape (2B, tokens - 1), whatever it is asked."""

    is_gradient_checkpointing = False

    def __init__(self, log_probs):
        super().__init__()
        other = torch.zeros_like(log_probs)
        self.out = SimpleNamespace(log_probs=log_probs, entropy=other, mean_logits=other, is_top1=other.bool())

    def forward(self, **_):
        return self.out


def batch_of(pairs, generator):
    """Inputs in TRL's layout (all chosen rows, then all rejected), and log-probs of policy and reference."""
    rows = [(pair[0][side], pair[1 + side]) for side in (0, 1) for pair in pairs]  # (tokens, (policy, reference))
    prompt, longest = 2, max(tokens for tokens, _ in rows)
    mask = torch.zeros(len(rows), prompt + longest, dtype=torch.int64)
    policy, reference = torch.zeros(2, len(rows), prompt + longest - 1, dtype=torch.float64)
    for i, (tokens, means) in enumerate(rows):
        mask[i, prompt : prompt + tokens] = 1
        for values, mean in zip((policy, reference), means, strict=True):
            noise = torch.rand(tokens, generator=generator, dtype=torch.float64) - 0.5
            values[i, prompt - 1 : prompt - 1 + tokens] = mean * (1 + noise / 2)
    inputs = {"input_ids": torch.ones_like(mask), "attention_mask": torch.ones_like(mask), "completion_mask": mask}
    return inputs, policy, reference


def main():
    import trl

    pairs = [batch_of([pair], torch.Generator().manual_seed(i)) for i, pair in enumerate(PAIRS)]
    golden = {
        "made_by": f"tests/losses/make_trl_golden.py with trl {trl.__version__}",
        "chosen_tokens": [pair[0][0] for pair in PAIRS],
        "rejected_tokens": [pair[0][1] for pair in PAIRS],
    }
    for name, which in (("policy", 1), ("reference", 2)):
        sums = [made[which].sum(1).tolist() for made in pairs]
        golden[f"{name}_chosen"], golden[f"{name}_rejected"] = (list(side) for side in zip(*sums, strict=True))
        masks = [made[0]["completion_mask"][:, 1:].bool() for made in pairs]
        golden[f"{name}_tokens"] = [made[which][mask].tolist() for made, mask in zip(pairs, masks, strict=True)]
    golden["cases"] = {}
    for name, settings in CASES.items():
        # TRL's alpha divergence knows no float64
        dtype = torch.float32 if "f_alpha_divergence_coef" in settings else torch.float64
        losses = [trl_loss(settings, Given(p.to(dtype)), Given(r.to(dtype)), i).item() for i, p, r in pairs]
        golden["cases"][name] = {**settings, "losses": losses}
    for name, settings in FROM_LOGPS.items():
        sides = ("chosen", "rejected")
        logps = [torch.tensor(golden[f"policy_{side}"], dtype=torch.float64) for side in sides]
        if settings["means"]:
            logps = [v / torch.tensor(golden[f"{side}_tokens"]) for v, side in zip(logps, sides, strict=True)]
        golden["cases"][name] = {**settings, "losses": trl_loss_from_logps(settings, *logps).tolist()}
    path = Path(__file__).with_name("trl_golden.json")
    path.write_text(json.dumps(golden, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
