"""Token ids on disk, so that large data sets are tokenized once: not in every run, and not by every process."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence, Sized
from contextlib import suppress
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lit_dpo.checkpoints.durable import put, replace_file
from lit_dpo.checkpoints.locks import lock
from lit_dpo.checkpoints.tensor_store import TensorStore, cache_folder
from lit_dpo.data.encode import Encoded, PairEncoder
from lit_dpo.data.encoding import ShownEncoder, SpreadEncoder
from lit_dpo.data.load import EncodedRow, Encoder, Rows, load_pairs
from lit_dpo.data.read import files_of
from lit_dpo.data.report import LoadReport
from lit_dpo.data.rows import Pair, RowError
from lit_dpo.data.token_store import TokenStore, names_of, open_blocks
from lit_dpo.data.token_writer import FLAGS, TokenWriter, of_flags
from lit_dpo.data.unchanged import Sources, stamp
from lit_dpo.files import read_json, refuse_special
from lit_dpo.plain_text import obeyed_by_none
from lit_dpo.processes import rank_zero_info, rank_zero_warn

_LAYOUT = 3  # of the files
WORTH_KEEPING = 2000  # rows; fewer are encoded in about a second
_PIECE = 32 << 20  # bytes of a data file in which lines are counted at a time
_LABELS = ("source", "row", "values", "layout", "notes")  # of a pair: they do not decide its ids


class TokenCache:
    """A `PairEncoder` that remembers: rows found by their content, only others encoded.

    A row's ids are kept under a hash of its prompt and completions, in a file named by everything else that decides
    them (tokenizer, template, versions, limits). So a changed row, tokenizer or option is never served old ids, and a
    row that was added costs its own encoding alone. Rows that are refused are not kept. If neither the data files nor
    anything that is done with them has changed, their rows are not even read: `whole` has them all.

    The files lie in `$LIT_DPO_CACHE` or `~/.cache/lit_dpo`: `<key>.tokens`, which every process maps, and
    `<key>.json` beside it; and `<key>.<random>.part` while rows are being encoded, which serves the next run if
    that one is killed.

    Args:
        encoder: Encodes what is not kept.
        specs: Names of the data sets; each list of them has a file of its own.
        load: What else decides which rows there are and what is reported of them, as plain values; `None` where it
            cannot be told, and then all rows are read.
        through: Encodes in the place of `encoder`, to the same ids.

    Attributes:
        reused: Rows found so far.
    """

    def __init__(
        self,
        encoder: PairEncoder,
        specs: Sequence[str],
        load: Mapping[str, object] | None = None,
        through: Encoder | None = None,
    ) -> None:
        self.encoder, self.reused = encoder, 0
        self._through = through or encoder
        self._files = self._open(encoder, specs)
        self._sources: Sources | None = None
        self._kept: list[TokenStore] = []
        self._complete: TokenStore | None = None
        self._header: dict[str, Any] = {}
        self._parts: dict[Path, int] = {}
        self._keys: dict[int, tuple[Encoded, bytes]] = {}
        if self._files is None:
            self._writer = TokenWriter()
            return
        self._read(specs, load)
        folder, key = self._files.folder, self._files.key
        self._writer = TokenWriter(folder, key, key.encode(), self._kept, WORTH_KEEPING)

    @staticmethod
    def _open(encoder: PairEncoder, specs: Sequence[str]) -> TensorStore | None:
        """Folder, key and header of the files; None if there are to be none."""
        identity = encoder.identity()
        if identity is None:
            return None
        try:
            place = cache_folder()
        except OSError as error:
            rank_zero_info(f"Token ids are not kept: {error}.")
            return None
        paths = [str(Path(spec).resolve()) if Path(spec).exists() else spec for spec in specs]
        return TensorStore(place, {**identity, "tokens": _LAYOUT, "flags": FLAGS, "specs": paths})

    @property
    def _data(self) -> Path:
        assert self._files is not None
        return self._files.data.with_suffix(".tokens")

    def _read(self, specs: Sequence[str], load: Mapping[str, object] | None) -> None:
        """Find what is there: a whole file, and parts that were left behind or are still being written."""
        assert self._files is not None
        key, problem = self._files.key, None
        vocabulary = len(self.encoder.tokenizer)
        try:
            self._header = read_json(self._files.header) if self._files.header.exists() else {}
        except (OSError, ValueError) as error:
            problem = str(error)
        if load is not None:
            self._sources = Sources(specs, load, self._header.get("files"))
        try:
            if self._data.exists():
                known = stamp(self._data, settled=False)  # its blocks are checked, if later
                later = self._is_meant() and known is not None and known == self._header.get("stamp")
                store, whole = open_blocks(self._data, key.encode(), vocabulary, later)
                problem = problem if whole else "its checksum does not match"
                self._kept += [store] if store else []
                self._complete = store if whole else None
            if self._complete is not None and self._header:
                self._complete.names = names_of(self._header, self._complete)
                if not isinstance(self._header.get("report"), str):
                    raise ValueError("it has no report")
        except (OSError, ValueError) as error:
            self._header, problem = {}, str(error)
        if problem:
            rank_zero_info(f"Token cache {self._data} is damaged ({problem}): tokenizing anew what is not there.")
        for path in sorted(self._files.folder.glob(f"{key}.????????.part")):
            with suppress(OSError, ValueError):
                size = path.stat().st_size
                store, _ = open_blocks(path, key.encode(), vocabulary)
                if store is not None:  # else it is nothing of ours, and left alone
                    self._parts[path] = size
                    self._kept.append(store)
        self._kept.sort(key=len, reverse=True)

    def whole(self) -> tuple[TokenStore, str] | None:
        """All rows and what was reported of them, if the data files are those that they were read from."""
        header, store = self._header, self._complete
        if not self._is_meant() or store is None or header.get("sums") != _sums(store):
            return None
        self.reused = len(store)
        with suppress(OSError):
            self._write_header(store, header["report"])
        return store, obeyed_by_none(header["report"])

    def _is_meant(self) -> bool:
        """Whether the header is that of these data files and of what is done with them."""
        load, header = self._digest, self._header
        return load is not None and header.get("load") == load and header.get("identity") == self._identity

    @property
    def _digest(self) -> str | None:
        return None if self._sources is None else self._sources.digest

    @property
    def _identity(self) -> dict[str, object] | None:
        return None if self._files is None else self._files.identity

    def many(self, pairs: Sequence[Pair]) -> list[Encoded | RowError]:
        """As `PairEncoder.many`."""
        keys = [_key(pair) for pair in pairs]
        places = self._find(keys)
        fresh = iter(self._through.many([pair for pair, place in zip(pairs, places, strict=True) if place is None]))
        results = [next(fresh) if place is None else self._encoded(*place) for place in places]
        self.reused += sum(place is not None for place in places)
        found = zip(results, keys, strict=True)
        self._keys = {id(result): (result, key) for result, key in found if isinstance(result, Encoded)}
        return results

    def append(self, row: EncodedRow) -> None:
        """Take a row in; its ids come from the last call of `many`, or are not to be found by later runs."""
        self._writer.append(row, self._keys.get(id(row.encoded), (None, bytes(16)))[1])

    def __len__(self) -> int:
        return len(self._writer)

    def keep(self, report: str = "") -> TokenStore:
        """The rows that were taken in, kept on disk if they are many; a folder that cannot be written costs a line.

        Args:
            report: What to say of them when they are found as a `whole`.
        """
        store = self._writer.finish()
        if self._sources is not None:
            self._sources.doubt()
        if self._files is None or (store.path is None and self._writer.problem is None):
            return store
        try:
            if self._writer.problem is not None:
                raise self._writer.problem
            return self._publish(store, str(report))
        except OSError as error:
            rank_zero_info(f"Token ids were not kept in {self._files.folder} ({error}).")
        return store

    def _publish(self, store: TokenStore, report: str) -> TokenStore:
        """Put the rows in their place, and remove parts that serve nobody any more."""
        assert self._files is not None
        if store.path is not None and store.path != self._data:
            put(store.path, self._data)
            store.path = self._data
        self._write_header(store, report)
        self._writer.abandon()
        for path, size in self._parts.items():
            with suppress(OSError), path.open("rb") as part:
                if lock(part) and os.fstat(part.fileno()).st_size == size:
                    path.unlink()
        return store

    def _write_header(self, store: TokenStore, report: str) -> None:
        """Say what the file holds, unless the header does so already."""
        assert self._files is not None
        names = {name: getattr(store.names, name) for name in ("sources", "places", "values")}
        header = {"identity": self._identity, "load": self._digest, "sums": _sums(store), "report": report, **names}
        header |= {"stamp": stamp(self._data, settled=False), "files": self._sources.stamps if self._sources else {}}
        content = json.dumps(header, indent=1).encode()
        if json.loads(content) != self._header:
            with replace_file(self._files.header) as file:
                file.write(content)

    def close(self) -> None:
        """Go no further: what is encoded already serves a later run."""
        self._writer.abandon()

    def _find(self, keys: Sequence[bytes]) -> list[tuple[TokenStore, int] | None]:
        """Where each of these keys is kept, if it is."""
        wanted = np.frombuffer(b"".join(keys), "<u8").reshape(-1, 2)
        found: list[tuple[TokenStore, int] | None] = [None] * len(keys)
        for store in self._kept:
            for number, row in enumerate(store.find(wanted).tolist()):
                if row >= 0 and found[number] is None:
                    found[number] = store, row
        return found

    @staticmethod
    def _encoded(store: TokenStore, row: int) -> Encoded:
        record = store.record(row)
        prompt, chosen, rejected = (part.tolist() for part in store.parts(row))
        small: dict[str, Any] = of_flags(int(record["flags"]))
        return Encoded(prompt, chosen, rejected, prompt_key=record["prompt"].tobytes(), **small)


def read_pairs(
    given: Sequence[str | Rows], encoder: PairEncoder, options: Mapping[str, Any], keep: bool = True
) -> tuple[TokenStore, str, int]:
    """The encoded rows of data sets, the account of them in words, and how many were found in the token cache.

    Args:
        given: As `load_pairs` takes them.
        encoder: Encodes what is not found.
        options: The other arguments of `load_pairs`, by name, `reading` among them.
        keep: Find rows in the token cache, and keep them there.

    Raises:
        ValueError: As `load_pairs`.
    """
    specs = [spec if isinstance(spec, str) else f"rows: {spec.name}" for spec in given]
    with SpreadEncoder(encoder) as spread:
        if not keep:
            writer = TokenWriter()
            with ShownEncoder(spread, partial(_count, given)) as shown:
                text = _account(load_pairs(given, shown, **options, into=writer)[1], encoder, options)
            return writer.finish(), text, 0
        rows = TokenCache(encoder, specs, _plain(given, options), spread)
        if whole := rows.whole():
            return *whole, rows.reused
        try:
            with ShownEncoder(rows, partial(_count, given)) as shown:
                text = _account(load_pairs(given, shown, **options, into=rows)[1], encoder, options)
            return rows.keep(text), text, rows.reused
        finally:
            rows.close()


def _plain(given: Sequence[str | Rows], options: Mapping[str, Any]) -> dict[str, object] | None:
    """What decides which rows there are, as plain values; None where it cannot be told, or where rows are warned of."""
    reading = options["reading"].identity()
    if reading is None or options["on_bad_row"] == "warn" or not all(isinstance(spec, str) for spec in given):
        return None
    return {**options, "reading": reading}


def _account(report: LoadReport, encoder: PairEncoder, options: Mapping[str, Any]) -> str:
    """What became of the rows, with an overview; a warning names those left out, if that was asked for."""
    if options["on_bad_row"] == "warn" and report.bad:
        rank_zero_warn(f"{report.bad.total()} malformed rows are left out:\n" + "\n".join(report.bad_rows))
    has_template = bool(encoder.chat_template or encoder.tokenizer.chat_template)
    return f"{report}\n{report.overview(lambda ids: str(encoder.tokenizer.decode(ids)), has_template)}"


def _count(given: Sequence[str | Rows]) -> int | None:
    """How many rows there are, where that can be told soon."""
    total = 0
    for spec in given:
        if isinstance(spec, Rows):
            if not isinstance(spec.rows, Sized):
                return None
            total += len(spec.rows)
            continue
        try:
            files = files_of(spec)
            if files is None or any(path.suffix != ".jsonl" for path in files):
                return None
            for path in files:
                refuse_special(path)
                with path.open("rb", buffering=0) as file:
                    total += sum(piece.count(b"\n") for piece in iter(lambda: file.read(_PIECE), b""))
        except (OSError, ValueError):
            return None
    return total


def _key(pair: Pair) -> bytes:
    """A hash of what decides a pair's ids, besides the tokenizer."""
    parts = tuple(getattr(pair, field.name) for field in fields(pair) if field.name not in _LABELS)
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).digest()


def _sums(store: TokenStore) -> str:
    """A hash over the sums of all blocks."""
    return hashlib.sha256(b"".join(block.sum for block in store.blocks)).hexdigest()
