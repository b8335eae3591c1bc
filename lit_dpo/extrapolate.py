"""ExPO: weights beyond a trained policy, on the line that leads to it from the model that training started from."""

from __future__ import annotations

import json
import math
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lit_dpo.files import read_json, refuse_special
from lit_dpo.tokenizers import load_tokenizer

_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_CHUNK = 1 << 20  # values at a time


@dataclass(frozen=True)
class Extrapolation:
    """ExPO: each weight becomes `policy + alpha * (policy - base)`.

    It is computed a million values at a time in the files of an exported folder, so that the memory it takes does not
    grow with the model: in float32, or in float64 where the policy's weights are float64, and rounded once to the
    policy's own dtype. The base may have another floating dtype. What is no floating point stays as it is. An alpha of
    0 changes nothing, to the last bit.

    Source: Zheng et al., Weak-to-Strong Extrapolation Expedites Alignment, https://arxiv.org/abs/2404.16792. It takes
    alpha 0.3 to 0.5 for fully trained policies, and more for those trained on a part of the data.

    Args:
        alpha: How far to go, as a share of the way from the base to the policy; at least 0.
        base: A folder with the model that training started from, as `save_pretrained` writes it: its weights as
            safetensors, and its tokenizer.

    Raises:
        ValueError: `alpha` is out of its range.
    """

    alpha: float
    base: str

    def __post_init__(self) -> None:
        if not (self.alpha >= 0 and math.isfinite(self.alpha)):
            raise ValueError(f"`extrapolate` must be a number of at least 0, got {self.alpha}.")

    def check(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Refuse a base that is none, or that has another tokenizer than the policy.

        Raises:
            ValueError: It is no folder with weights, or its tokens are others.
        """
        _places(Path(self.base))
        if load_tokenizer(self.base).get_vocab() != tokenizer.get_vocab():
            raise ValueError(
                f"The tokenizer in `{self.base}` has other tokens than the policy's: give as `base` the model that "
                "training started from."
            )

    def apply(self, folder: Path, tied: Collection[str] = ()) -> None:
        """Extrapolate the weights in an exported folder, in place.

        Args:
            folder: Holds the policy.
            tied: Names that the base may have besides, because they stand for a weight of another name.

        Raises:
            ValueError: The base holds other weights, or the result is not finite. The folder is then spoilt.
        """
        ours, base = _places(folder), _places(Path(self.base))
        if other := sorted((ours.keys() - base.keys()) | (base.keys() - ours.keys() - set(tied))):
            raise ValueError(
                f"`{self.base}` is no base of this policy: `{other[0]}` is in only one of the two. Give the model that "
                "training started from."
            )
        for name, place in ours.items():
            if base[name].shape != place.shape:
                raise ValueError(
                    f"`{self.base}` is no base of this policy: its `{name}` has the shape {base[name].shape} in the "
                    f"place of {place.shape}. Give the model that training started from."
                )
            if place.dtype is not None and base[name].dtype is None:
                raise ValueError(
                    f"`{self.base}` holds `{name}` as no floating point: give a copy that is not quantised."
                )
        for name, place in ours.items() if self.alpha else ():
            if place.dtype is None:
                continue
            kind = torch.promote_types(place.dtype, torch.float32)
            with place.file.open("r+b") as file, base[name].file.open("rb") as other_file:
                for first in range(0, place.count, _CHUNK):
                    policy = place.read(file, first).to(kind)
                    start = base[name].read(other_file, first).to(kind)
                    beyond = (policy + self.alpha * (policy - start)).to(place.dtype)
                    if not beyond.isfinite().all():
                        raise ValueError(f"With alpha {self.alpha} `{name}` would not be finite: give a smaller one.")
                    place.write(file, first, beyond)


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies in a file of safetensors; its dtype is None if it is no floating point."""

    file: Path
    dtype: torch.dtype | None
    shape: tuple[int, ...]
    offset: int

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    def read(self, file: BinaryIO, first: int) -> Tensor:
        """The values from one number on, a chunk at most."""
        assert self.dtype is not None
        file.seek(self.offset + first * self.dtype.itemsize)
        size = min(_CHUNK, self.count - first) * self.dtype.itemsize
        return torch.frombuffer(bytearray(file.read(size)), dtype=self.dtype)

    def write(self, file: BinaryIO, first: int, values: Tensor) -> None:
        """Put values in the place of those from one number on."""
        file.seek(self.offset + first * values.itemsize)
        file.write(values.view(torch.uint8).numpy().data)


def _places(folder: Path) -> dict[str, _Place]:
    """Where each tensor of a folder lies.

    Raises:
        ValueError: The folder holds no model in safetensors, or a file of it is damaged.
    """
    index = folder / "model.safetensors.index.json"
    names = {"model.safetensors"}
    if index.exists():
        names = set(map(str, (read_json(index).get("weight_map") or {}).values()))
    found: dict[str, _Place] = {}
    for name in sorted(names):
        file = folder / name
        if Path(name).name != name or not file.exists():
            raise ValueError(
                f"`{folder}` holds no `{name}`: give a folder with a whole model in safetensors, as `save_pretrained` "
                "writes it."
            )
        refuse_special(file)
        try:
            with safe_open(file, framework="pt"):  # it checks all that is read by hand here
                pass
        except SafetensorError as error:
            raise ValueError(f"`{file}` is damaged ({error}): give another copy.") from error
        with file.open("rb") as opened:
            size = int.from_bytes(opened.read(8), "little")
            entries = json.loads(opened.read(size))
        for key, entry in entries.items():
            if key != "__metadata__":
                place = 8 + size + entry["data_offsets"][0]
                found[key] = _Place(file, _FLOATS.get(entry["dtype"]), tuple(entry["shape"]), place)
    return found
