"""Whether weights are numbers at all: one cheap pass over each tensor."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


@torch.no_grad()
def first_nonfinite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """The name of the first tensor that holds a NaN or an infinity; `None` if there is none.

    The sum of a tensor is finite only if all its values are, and reads them once, at the speed of memory; a sum that is
    not is looked into, for finite values can overflow too. Waits for each device once.

    Args:
        tensors: Names and tensors; of one that is sharded, this process's own share. What is not floating point, or on
            the meta device, is passed over.
    """
    kept = [(name, getattr(tensor, "_local_tensor", tensor)) for name, tensor in tensors]
    kept = [(name, t) for name, t in kept if t.is_floating_point() and t.device.type != "meta" and t.numel()]
    suspects = set()
    for device in {tensor.device for _, tensor in kept}:
        here = [(name, tensor) for name, tensor in kept if tensor.device == device]
        sums = torch.stack([_readable(tensor).sum().float() for _, tensor in here])  # (tensors,)
        suspects |= {name for (name, _), good in zip(here, sums.isfinite().tolist(), strict=True) if not good}
    return next((name for name, t in kept if name in suspects and not _readable(t).isfinite().all()), None)


def _readable(tensor: Tensor) -> Tensor:
    """Eight-bit floats, which cannot be summed, as wider ones."""
    return tensor.float() if tensor.element_size() == 1 else tensor
