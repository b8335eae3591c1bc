"""Token ids on disk, so that large data sets are tokenized once: not in every run, and not by every process."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lit_dpo.checkpoints.tensor_store import TensorStore, cache_folder
from lit_dpo.data.encode import Encoded, PairEncoder
from lit_dpo.data.rows import Pair, RowError

_LAYOUT = 3  # of the tensors in a file
WORTH_KEEPING = 2000  # rows; fewer are encoded in about a second


class TokenCache:
    """A `PairEncoder` that remembers: rows found by their content, only others encoded.

    A row's ids are kept under a hash of its prompt and completions, in a file named by everything else that decides
    them (tokenizer, template, versions, limits). So a changed row, tokenizer or option is never served old ids, and a
    row that was added costs its own encoding alone. Rows that are refused are not kept. The files lie in
    ``$LIT_DPO_CACHE`` or ``~/.cache/lit_dpo``.

    Args:
        encoder: Encodes what is not kept.
        specs: Names of the data sets; each list of them has a file of its own.

    Attributes:
        reused: Rows found so far.
    """

    def __init__(self, encoder: PairEncoder, specs: Sequence[str]) -> None:
        self.encoder, self.reused = encoder, 0
        self._store = self._open(encoder, specs)
        self._kept: dict[bytes, int] = {}
        self._seen: dict[bytes, Encoded] = {}
        self._changed = False
        self._read()

    @staticmethod
    def _open(encoder: PairEncoder, specs: Sequence[str]) -> TensorStore | None:
        identity = encoder.identity()
        if identity is None:
            return None
        try:
            place = cache_folder()
        except OSError as error:
            rank_zero_info(f"Token ids are not kept: {error}.")
            return None
        paths = [str(Path(spec).resolve()) if Path(spec).exists() else spec for spec in specs]
        return TensorStore(place, {**identity, "tokens": _LAYOUT, "specs": paths})

    def _read(self) -> None:
        tensors, problem = (None, None) if self._store is None else self._store.read(self._problem)
        if problem and self._store is not None:
            rank_zero_info(f"Token cache {self._store.data} is damaged ({problem}): tokenizing anew.")
        if tensors is None:
            return
        keys = tensors["keys"].numpy().tobytes()
        self._kept = {keys[i : i + 16]: i // 16 for i in range(0, len(keys), 16)}
        self._tokens, self._lengths, self._flags = (tensors[name] for name in ("tokens", "lengths", "flags"))
        self._prompts = tensors["prompts"].numpy().tobytes()
        self._ends = self._lengths.sum(1).cumsum(0)

    def _problem(self, tensors: Mapping[str, Tensor]) -> str | None:
        """Why these are not what `keep` writes, if they are not."""
        layout = {
            "keys": (torch.uint8, 16),
            "prompts": (torch.uint8, 16),
            "lengths": (torch.int64, 3),
            "flags": (torch.bool, 6),
        }
        parts = [tensors.get(name) for name in layout]
        for part, (dtype, width) in zip(parts, layout.values(), strict=True):
            if part is None or part.dtype != dtype or part.shape != (len(parts[0]), width):  # type: ignore[arg-type]
                return "it has not the form of token ids"
        tokens, counts = tensors.get("tokens"), tensors["lengths"]
        if tokens is None or tokens.dtype != torch.int32 or tokens.dim() != 1:
            return "it has not the form of token ids"
        if (counts < 1).any() or (counts > len(tokens)).any() or counts.sum() != len(tokens):
            return "its lengths do not fit its token ids"
        if len(tokens) and int(torch.where(tokens < 0, ~tokens, tokens).max()) >= len(self.encoder.tokenizer):
            return "it holds ids that the tokenizer does not have"
        return None

    def many(self, pairs: Sequence[Pair]) -> list[Encoded | RowError]:
        """As `PairEncoder.many`."""
        keys = [_key(pair) for pair in pairs]
        unknown = [pair for key, pair in zip(keys, pairs, strict=True) if key not in self._kept]
        fresh = iter(self.encoder.many(unknown))
        results: list[Encoded | RowError] = []
        for key in keys:
            found = self._kept.get(key)
            result = next(fresh) if found is None else self._encoded(found)
            results.append(result)
            if isinstance(result, Encoded):
                self._seen[key] = result
                self._changed |= found is None
            self.reused += found is not None
        return results

    def keep(self) -> None:
        """Write the rows seen, if any was not in the file; a folder that cannot be written costs a line."""
        rows = self._seen
        if self._store is None or not self._changed or len(rows) < WORTH_KEEPING:
            return
        parts = [part for row in rows.values() for part in (row.prompt, row.chosen, row.rejected)]
        flags = [
            (row.truncated, row.healed, row.control_text, *(bool(row.cut & bit) for bit in (1, 2, 4)))
            for row in rows.values()
        ]
        tensors = {
            "keys": _bytes(rows),
            "tokens": torch.tensor([i for part in parts for i in part], dtype=torch.int32),
            "lengths": torch.tensor([len(part) for part in parts]).view(-1, 3),
            "flags": torch.tensor(flags),
            "prompts": _bytes(row.prompt_key for row in rows.values()),
        }
        try:
            self._store.write(tensors)
        except OSError as error:
            rank_zero_info(f"Token ids were not kept in {self._store.folder} ({error}).")

    def _encoded(self, row: int) -> Encoded:
        end, lengths = int(self._ends[row]), self._lengths[row].tolist()
        prompt, chosen, rejected = (part.tolist() for part in self._tokens[end - sum(lengths) : end].split(lengths))
        truncated, healed, control_text, *cut = self._flags[row].tolist()
        key = self._prompts[16 * row : 16 * row + 16]
        return Encoded(
            prompt, chosen, rejected, truncated, healed, control_text, key, sum(bit << i for i, bit in enumerate(cut))
        )


def _bytes(hashes: Iterable[bytes]) -> torch.Tensor:
    """Hashes of 16 bytes, shape ``(n, 16)`` uint8."""
    return torch.frombuffer(bytearray(b"".join(hashes)), dtype=torch.uint8).view(-1, 16)


def _key(pair: Pair) -> bytes:
    content = (pair.prompt, pair.chosen, pair.rejected, list(pair.tools), dict(pair.template_options))
    return hashlib.blake2b(repr(content).encode(), digest_size=16).digest()
