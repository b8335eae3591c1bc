"""Rows from files, folders and the hub, each with the place a person finds it at.

JSON and CSV are read here rather than through `datasets`, whose JSON reader guesses types: one odd row
turns a text column into decoded JSON, in which "007" becomes 7 and "null" becomes None.
"""

import csv
import difflib
import gzip
import importlib.resources
import json
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from lit_dpo.data.rows import RowError
from lit_dpo.data.specs import bracketed, split_off
from lit_dpo.files import refuse_special

Row = tuple[str, dict[str, object]]
"""Location, such as `path/file.jsonl:17`, and the row itself."""
OnBadRow = Callable[[RowError], None]

QUICKSTART = "quickstart"
MAX_LINE_BYTES = 64 << 20
_SUFFIXES = (".jsonl", ".json", ".parquet", ".csv", ".arrow")
_SPLITS = {"train": "train", "validation": "validation", "valid": "validation", "val": "validation", "test": "test"}
_SPLIT_WORD = re.compile(rf"(?<![a-z])({'|'.join(_SPLITS)})(?![a-z])")
_SPLIT_FILE = re.compile(rf"({'|'.join(_SPLITS)})(\..*|-\d+-of-\d+)?")
_LFS = b"version https://git-lfs"
_GZIP = b"\x1f\x8b"


def read_rows(spec: str, on_bad_row: OnBadRow | None = None, max_line_bytes: int = MAX_LINE_BYTES) -> Iterator[Row]:
    """Yield every row of a data set with its location.

    Args:
        spec: A `.jsonl`, `.json` (both also `.gz`), `.parquet`, `.csv` or `.arrow` file; a folder of such
            files, not searched deeper; a folder written by `save_to_disk`; a dataset name on the hub; or
            `quickstart`, the set in the package. A folder or hub name may end in `:split`; without it,
            `train` is read, or everything in a folder whose file names tell no splits. Hub data goes
            through `datasets` and its guesses about JSON. A hub name may have a configuration, a revision
            and files in brackets: `org/set[config, revision=v1, data_files=part/*.json]:split`.
        on_bad_row: Called with each row that cannot be read when the ones behind it can; without it, the
            first is raised. Damage to a whole file is always raised.
        max_line_bytes: Most bytes, decompressed, of a line of JSON, of a row of CSV, and of a whole `.json` file that
            does not hold JSON lines. No more of a longer one is ever in memory.

    Raises:
        FileNotFoundError: `spec` looks like a path, and nothing is there.
        RowError: A row, or a file at a row, cannot be read.
        ValueError: There is no such split, no data file in the folder, or it is no regular file.
    """
    bad = on_bad_row or _raise
    if spec == QUICKSTART:
        with importlib.resources.as_file(importlib.resources.files("lit_dpo.data") / "quickstart.jsonl") as path:
            yield from _read_file(path, QUICKSTART, bad, max_line_bytes)
        return
    name, split = split_off(spec)
    path = Path(name).expanduser()
    if path.is_dir():
        if any((path / marker).exists() for marker in ("dataset_info.json", "dataset_dict.json")):
            yield from _read_datasets(path, name, split)
        else:
            for file in _files(path, split):
                yield from _read_file(file, str(file), bad, max_line_bytes)
    elif path.exists():
        if split:
            raise ValueError(f"`{name}` is one file and has no split `{split}`; leave `:{split}` off.")
        yield from _read_file(path, name, bad, max_line_bytes)
    elif problem := missing(spec):
        raise FileNotFoundError(problem)
    else:
        yield from _read_datasets(None, name, split)


def missing(spec: str) -> str | None:
    """What is wrong with a source that looks like a path where nothing is; `None` if there is something to try."""
    name = split_off(spec)[0]
    path = Path(name).expanduser()
    looks = name.startswith((".", "/", "~")) or bool(_suffix(path))
    return _not_found(path) if looks and not path.exists() else None


def files_of(spec: str) -> list[Path] | None:
    """The files that `read_rows` reads, in order; `None` where they cannot be told, as of names on the hub.

    Raises:
        ValueError: There is no such split, or no data file in the folder.
    """
    name, split = split_off(spec)
    path = Path(name).expanduser()
    if path.is_dir():
        if any((path / marker).exists() for marker in ("dataset_info.json", "dataset_dict.json")):
            return sorted(file for file in path.rglob("*") if not file.is_dir())
        return _files(path, split)
    return [path] if spec != QUICKSTART and path.exists() else None


def source_name(spec: str) -> str:
    """Name a data set after its file, its folder if the file is named after a split, or its hub name.

    Example:
        >>> source_name("data/hh_harmless/train.jsonl.gz"), source_name("my_pairs.csv"), source_name("org/set:test")
        ('hh_harmless', 'my_pairs', 'org/set')
    """
    name = split_off(spec)[0]
    path = Path(name).expanduser()
    suffix = _suffix(path)
    if not suffix:
        return path.absolute().name if path.exists() else bracketed(name)[0]
    stem = path.name.removesuffix(".gz").removesuffix(suffix)
    return path.absolute().parent.name or stem if _SPLIT_FILE.fullmatch(stem) else stem


def _raise(error: RowError) -> None:
    raise error


def _suffix(path: Path) -> str:
    """The suffix that tells the format, `.gz` left aside; empty if we read no such files."""
    suffix = Path(path.name.removesuffix(".gz")).suffix
    return suffix if suffix in _SUFFIXES else ""


def _not_found(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f"There is no folder `{folder}`, so no `{path.name}` in it; check the path."
    near = difflib.get_close_matches(path.name, [entry.name for entry in folder.iterdir()], 1, 0.5)
    return f"There is no `{path.name}` in `{folder}`; " + (f"did you mean `{near[0]}`?" if near else "check the path.")


def _files(folder: Path, split: str | None) -> list[Path]:
    files = sorted(file for file in folder.iterdir() if _suffix(file) and not file.is_dir())
    if not files:
        raise ValueError(f"`{folder}` holds no data file ({', '.join(_SUFFIXES)}); name the folder that does.")
    by_split: dict[str, list[Path]] = {}
    for file in files:
        if word := _SPLIT_WORD.search(file.name):
            by_split.setdefault(_SPLITS[word[1]], []).append(file)
    if not by_split and split is None:
        return files
    wanted = split or "train"
    if wanted not in by_split:
        raise ValueError(
            f"`{folder}` has no file of the split `{wanted}`; it has {', '.join(sorted(by_split)) or 'no splits'}, "
            f"so name one as `{folder}:split`, or name a file."
        )
    return by_split[wanted]


def _read_file(path: Path, shown: str, bad: OnBadRow, most: int) -> Iterator[Row]:
    refuse_special(path)
    suffix, gzipped = _suffix(path), path.name.endswith(".gz")
    with path.open("rb") as file:
        head = file.read(len(_LFS))
    if head == _LFS:
        raise RowError(f"{shown}:1", None, "this is a git-lfs pointer, not the data", "fetch it with `git lfs pull`")
    if gzipped != head.startswith(_GZIP):
        remedy = "drop the `.gz` from its name, or fetch it again" if gzipped else "add `.gz` to its name"
        raise RowError(f"{shown}:1", None, f"the file is {'not ' if gzipped else ''}gzip-compressed", remedy)
    if suffix == ".jsonl":
        yield from _read_jsonl(path, shown, bad, most)
    elif suffix == ".json":
        yield from _read_json(path, shown, bad, most)
    elif suffix == ".csv":
        yield from _read_csv(path, shown, bad, most)
    elif suffix:
        yield from _read_arrow(path, shown)
    else:
        raise ValueError(f"`{shown}` has no known suffix; name it {', '.join(_SUFFIXES)} after what it holds.")


def _lines(path: Path, shown: str, bad: OnBadRow, most: int) -> Iterator[tuple[int, str]]:
    """Yield line numbers from 1 and lines with their ends; only a newline ends a line."""
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            while line := file.readline(most + 1):
                number += 1
                if len(line) > most:
                    bad(_too_long(f"{shown}:{number}", "the line", most))
                    while line and not line.endswith(b"\n"):
                        line = file.readline(1 << 20)
                    continue
                try:
                    yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    found = f"byte 0x{line[error.start]:02x} at column {error.start + 1}"
                    bad(RowError(f"{shown}:{number}", None, "the line is not UTF-8", f"convert the file ({found})"))
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        where = f"{shown}:{number + 1}"
        raise RowError(
            where, None, "the gzip data ends too early or is damaged", f"fetch it again ({error})"
        ) from error


def _too_long(where: str, what: str, most: int) -> RowError:
    remedy = "raise the data module's `max_line_bytes` if it should be so long"
    if what == "the file":
        remedy = "write it as JSON lines, one object a line, or raise the data module's `max_line_bytes`"
    return RowError(where, None, f"{what} has more than {most:,} bytes", remedy)


def _read_jsonl(path: Path, shown: str, bad: OnBadRow, most: int) -> Iterator[Row]:
    for number, line in _lines(path, shown, bad, most):
        if not line.strip():
            continue
        where = f"{shown}:{number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            bad(RowError(where, None, "the line is not valid JSON", f"correct it ({error})"))
            continue
        if isinstance(row, dict):
            yield where, row
        else:
            remedy = f"write one object per line (a {type(row).__name__} is here), or name an array `.json`"
            bad(RowError(where, None, "the line is not a JSON object", remedy))


def _read_json(path: Path, shown: str, bad: OnBadRow, most: int) -> Iterator[Row]:
    """An array of objects, an object with one such array in it, or JSON lines under a `.json` name."""
    kept: list[str] = []
    size = filled = 0
    for number, line in _lines(path, shown, _raise, most):
        filled += bool(line.strip())
        if filled == 2 and line.strip() and _is_object("".join(kept)):  # these are JSON lines
            yield from _read_jsonl(path, shown, bad, most)
            return
        kept.append(line)
        size += len(line.encode())
        if size > most:
            raise _too_long(f"{shown}:{number}", "the file", most)
    text = "".join(kept)
    if not text.strip():
        return
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data":
            yield from _read_jsonl(path, shown, bad, most)
            return
        where = f"{shown}:{getattr(error, 'lineno', 1)}"
        raise RowError(where, None, "the file is not valid JSON", f"correct it ({error})") from error
    if isinstance(data, dict):
        arrays = [v for v in data.values() if isinstance(v, list) and v and all(isinstance(row, dict) for row in v)]
        data = arrays[0] if len(arrays) == 1 else data
    if not isinstance(data, list):
        remedy = "write an array of objects, or an object with exactly one such array"
        raise RowError(f"{shown}:1", None, "the file holds no single array of rows", remedy)
    for index, row in enumerate(data, start=1):
        where = f"{shown}, row {index}"
        if isinstance(row, dict):
            yield where, row
        else:
            bad(RowError(where, None, "the row is not a JSON object", "write an object with one field per column"))


def _is_object(line: str) -> bool:
    """Whether a line is a JSON object by itself."""
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _read_csv(path: Path, shown: str, bad: OnBadRow, most: int) -> Iterator[Row]:
    """Cells stay text, whatever they look like; only an empty one is None."""
    start, size = 1, 0

    def lines() -> Iterator[str]:
        nonlocal size
        for _, line in _lines(path, shown, _raise, most):
            size += len(line.encode())
            if size > most:
                raise _too_long(f"{shown}:{start}", "the row", most)
            yield line

    reader = csv.reader(lines(), strict=True)
    try:
        header = next(reader, [])
        start = reader.line_num + 1
        for cells in reader:
            where, start, size = f"{shown}:{start}", reader.line_num + 1, 0
            if len(cells) == len(header):
                yield where, {name: cell or None for name, cell in zip(header, cells, strict=True)}
            elif cells:
                remedy = f"it has {len(cells)} cells under {len(header)} names: quote cells that hold commas"
                bad(RowError(where, None, "the row does not fit the header", remedy))
    except csv.Error as error:
        raise RowError(f"{shown}:{start}", None, "the file is not valid CSV", f"correct the row ({error})") from error


def _read_arrow(path: Path, shown: str) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    index = 0
    try:
        with path.open("rb") as file:
            batches = pq.ParquetFile(file).iter_batches(1024) if path.suffix == ".parquet" else pa.ipc.open_stream(file)
            for batch in batches:
                for row in batch.to_pylist():
                    index += 1
                    yield f"{shown}, row {index}", row
    except (pa.ArrowInvalid, OSError) as error:
        where = f"{shown}, row {index + 1}"
        raise RowError(
            where, None, f"the file is not readable {path.suffix[1:]}", f"fetch it again ({error})"
        ) from error


def _read_datasets(folder: Path | None, name: str, split: str | None) -> Iterator[Row]:
    """A `save_to_disk` folder, or a hub name if `folder` is None."""
    import datasets

    hub, options = bracketed(name)
    try:
        for file in () if folder is None else folder.rglob("*"):
            if not file.is_dir():
                refuse_special(file)
        if folder is None:
            data = datasets.load_dataset(hub, split=split or "train", **options)
        else:
            data = datasets.load_from_disk(str(folder))
    except (OSError, ValueError) as error:
        raise ValueError(f"`{name}` cannot be read as a dataset, from disk or the hub: {error}") from error
    if isinstance(data, datasets.DatasetDict):
        if (split or "train") not in data:
            raise ValueError(f"`{name}` has no split `{split or 'train'}`; it has {', '.join(data)}.")
        data = data[split or "train"]
    for index, row in enumerate(data, start=1):
        yield f"{name}, row {index}", row
