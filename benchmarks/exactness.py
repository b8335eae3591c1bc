"""Are the flat line, padded rows and separate sequences the same on this device, in float32 and bfloat16?"""

from __future__ import annotations

from typing import Any

import torch
from common import Record
from synthetic import build, random_batches

from lit_dpo import score
from lit_dpo.scoring.score import own_attention

# Largest difference of a completion's log-prob, in nats a token, and relative error of the whole gradient.
LIMITS = {"float32": (1e-5, 1e-4), "bfloat16": (1e-2, 4e-2)}


def exactness(device: str, seed: int) -> Record:
    """Log-probs and gradients of flat line, padded rows and separate sequences, against separate float32 sequences."""
    torch.set_float32_matmul_precision("highest")
    lengths = [(17, 9, 30), (1, 1, 1), (64, 3, 2), (5, 40, 41), (130, 70, 20), (33, 128, 1)]
    batch = random_batches(lengths, len(lengths), 1000, seed)[0].to(device)
    torch.manual_seed(seed)
    exact = build("S", device, torch.float32)
    weights = exact.state_dict()
    expected = _logps_and_gradient(exact, batch, "separate")
    rows = []
    for dtype, (logp_limit, gradient_limit) in LIMITS.items():
        model = build("S", device, getattr(torch, dtype))
        model.load_state_dict(weights)
        for way in ("flat", "padded", "separate"):
            logps, gradient = _logps_and_gradient(model, batch, way)
            gap = float(((logps - expected[0]).abs() / batch.completion_lengths).max())
            error = float((gradient - expected[1]).norm() / expected[1].norm())
            row = {"dtype": dtype, "way": way, "logp_gap": gap, "gradient_error": error}
            rows.append(row | {"ok": gap <= logp_limit and error <= gradient_limit})
    return {"rows": rows, "limits": LIMITS, "ok": all(row["ok"] for row in rows)}


def _logps_and_gradient(model: Any, batch: Any, way: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed log-probs of the 2B completions, and the gradient of a fixed mixture of them over all weights."""
    model.zero_grad()
    if way == "separate":
        own_attention(model)
        sums = []
        parts = batch.input_ids.split([size for pair in batch.shape for size in pair])
        for i in range(0, len(parts), 3):
            for completion in parts[i + 1 : i + 3]:
                logits = model(torch.cat([parts[i], completion])[None], use_cache=False).logits[0]
                logps = logits[len(parts[i]) - 1 : -1].float().log_softmax(-1)
                sums.append(logps.gather(1, completion[:, None]).sum())
        logps = torch.stack(sums)
    else:
        pair = score(model, batch, form=way)
        logps = torch.stack([pair.chosen, pair.rejected], 1).flatten()
    (logps[0::2].sum() - 0.5 * logps[1::2].sum()).backward()
    gradient = torch.cat([p.grad.float().flatten() for p in model.parameters()])
    return logps.detach(), gradient
