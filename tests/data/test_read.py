import gzip
import json
import os
import socket
import subprocess
import sys

import pytest

from lit_dpo.data.read import read_rows, source_name
from lit_dpo.data.rows import RowError

ROWS = [{"prompt": "a\u2028b", "chosen": "007", "rejected": "null"}, {"prompt": "é", "chosen": "x", "rejected": "y"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def rows(spec):
    return [row for _, row in read_rows(str(spec))]


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", LINES),
        ("a.jsonl", b"\xef\xbb\xbf" + LINES.encode()),
        ("a.jsonl", LINES.replace("\n", "\r\n")),
        ("a.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)),
        ("a.json", LINES),
        ("a.json", json.dumps(ROWS)),
        ("a.json.gz", gzip.compress(json.dumps({"version": 1, "data": ROWS}).encode(), mtime=0)),
        ("a.csv", "prompt,chosen,rejected\na\u2028b,007,null\né,x,y\n"),
    ],
)
def test_formats_give_the_same_rows(tmp_path, name, content):
    assert rows(write(tmp_path / name, content)) == ROWS


def test_parquet_arrow_and_save_to_disk(tmp_path):
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list(ROWS)
    data.to_parquet(str(tmp_path / "a.parquet"))
    data.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict({"train": data, "test": data.select([1])}).save_to_disk(str(tmp_path / "splits"))
    assert list(read_rows(str(tmp_path / "a.parquet")))[1] == (f"{tmp_path}/a.parquet, row 2", ROWS[1])
    assert rows(next((tmp_path / "saved").glob("*.arrow"))) == ROWS
    assert rows(tmp_path / "saved") == rows(tmp_path / "splits") == ROWS
    assert rows(f"{tmp_path}/splits:test") == ROWS[1:]
    with pytest.raises(ValueError, match="no split `dev`; it has train, test"):
        rows(f"{tmp_path}/splits:dev")


def test_hub_name(monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: [{"name": name, "split": split}])
    assert list(read_rows("org/set")) == [("org/set, row 1", {"name": "org/set", "split": "train"})]
    assert rows("org/set:test_prefs") == [{"name": "org/set", "split": "test_prefs"}]


def test_places_are_true_line_numbers(tmp_path):
    blank = write(tmp_path / "a.jsonl", "\n" + LINES.replace("\n", "\n\n"))
    assert [where for where, _ in read_rows(str(blank))] == [f"{blank}:2", f"{blank}:4"]
    table = write(tmp_path / "a.csv", 'prompt,chosen\n"two\nlines",a\n\nb,\n')
    assert list(read_rows(str(table))) == [
        (f"{table}:2", {"prompt": "two\nlines", "chosen": "a"}),
        (f"{table}:5", {"prompt": "b", "chosen": None}),
    ]


@pytest.mark.parametrize(
    ("name", "content", "place", "part"),
    [
        ("a.jsonl", "{}\n{} {}\n", ":2", "not valid JSON"),
        ("a.jsonl", "{}\n[{}]\n", ":2", "not a JSON object"),
        ("a.jsonl", b'{}\n{"a": "caf\xe9"}\n', ":2", "not UTF-8"),
        ("a.jsonl", '{"a": ' + "9" * 5000 + "}", ":1", "not valid JSON"),
        ("a.jsonl", "[" * 100_000, ":1", "not valid JSON"),
        ("a.jsonl", "version https://git-lfs.github.com/spec/v1\noid sha256:0\n", ":1", "git-lfs"),
        ("a.jsonl.gz", LINES, ":1", "not gzip-compressed"),
        ("a.jsonl", gzip.compress(LINES.encode(), mtime=0), ":1", "add `.gz`"),
        ("a.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)[:-12], ":", "gzip data"),
        ("a.json", '[{},\n{"a": 1},]', ":2", "not valid JSON"),
        ("a.json", '{"a": [{}], "b": [{}]}', ":1", "no single array"),
        ("a.json", "[{}, 4]", ", row 2", "not a JSON object"),
        ("a.csv", "a,b\n1,2\n1,2,3\n", ":3", "3 cells under 2 names"),
        ("a.csv", 'a,b\n1,2\n1,"2\n', ":3", "not valid CSV"),
        ("a.parquet", "PAR1 not really", ", row 1", "not readable parquet"),
    ],
)
def test_damage_names_file_and_place(tmp_path, name, content, place, part):
    path = write(tmp_path / name, content)
    with pytest.raises(RowError, match=part) as caught:
        rows(path)
    assert str(caught.value).startswith(f"{path}{place}")


def test_reading_goes_on_behind_a_bad_line(tmp_path):
    path = write(tmp_path / "a.jsonl", b'{"a": 1}\n{"a": \n4\n\xff\n{"a": 2}\n')
    bad = []
    assert [row for _, row in read_rows(str(path), bad.append)] == [{"a": 1}, {"a": 2}]
    assert [error.where for error in bad] == [f"{path}:{line}" for line in (2, 3, 4)]


def test_folder_and_split(tmp_path):
    for number, name in enumerate(("train-1.jsonl", "train-0.jsonl", "val.jsonl", "README.md")):
        write(tmp_path / name, f'{{"n": {number}}}')
    assert rows(tmp_path) == [{"n": 1}, {"n": 0}]
    assert rows(f"{tmp_path}:validation") == [{"n": 2}]
    with pytest.raises(ValueError, match="no file of the split `test`; it has train, validation"):
        rows(f"{tmp_path}:test")
    with pytest.raises(ValueError, match="one file and has no split `test`"):
        rows(f"{tmp_path}/val.jsonl:test")
    assert rows(write(tmp_path / "plain" / "b.jsonl", "{}").parent) == [{}]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no data file"):
        rows(tmp_path / "empty")


def test_missing_file_names_the_nearest(tmp_path):
    write(tmp_path / "train.jsonl.gz", b"")
    with pytest.raises(FileNotFoundError, match=r"There is no `train.jsonl` in .*; did you mean `train.jsonl.gz`\?"):
        rows(tmp_path / "train.jsonl")
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        rows(tmp_path / "nowhere" / "train.jsonl")


def test_source_name(tmp_path):
    write(tmp_path / "sums" / "train.messages.jsonl.gz", b"")
    assert source_name(f"{tmp_path}/sums") == source_name(f"{tmp_path}/sums:train") == "sums"
    assert source_name(f"{tmp_path}/sums/train.messages.jsonl.gz") == "sums"
    assert source_name("sums/test-00000-of-00001.parquet") == "sums"
    assert source_name("sums/v1.5_pairs.csv") == "v1.5_pairs"
    assert source_name("org/set:train") == source_name("org/set") == "org/set"
    assert source_name("quickstart") == "quickstart"


# -- files of somebody else's -----------------------------------------------------------------------------------------


def special(folder, kind):
    """What is no regular file, under the name of a data file."""
    path = folder / "a.jsonl"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as opened:
            opened.bind(str(path))
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        (folder / "other").mkdir()
        path.symlink_to("other/nothing.jsonl")
    return path


@pytest.mark.parametrize("kind", ["pipe", "socket", "device"])
@pytest.mark.parametrize("whole", ["file", "folder"])
def test_what_is_no_regular_file_is_refused_without_waiting_for_it(tmp_path, kind, whole):
    path = special(tmp_path, kind)
    with pytest.raises(ValueError, match=rf"a\.jsonl` is a {kind}, and only regular files are read"):
        rows(path if whole == "file" else tmp_path)


def test_a_link_is_read_and_one_to_nothing_is_not_passed_over(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "b.jsonl").symlink_to(write(tmp_path / "real.jsonl", '{"a": 1}\n'))
    assert rows(tmp_path / "data") == [{"a": 1}]
    special(tmp_path / "data", "nothing")
    with pytest.raises(OSError, match=r"a\.jsonl"):
        rows(tmp_path / "data")


def test_a_pipe_in_a_saved_dataset_is_refused(tmp_path):
    (tmp_path / "dataset_info.json").write_text("{}")
    os.mkfifo(tmp_path / "state.json")
    with pytest.raises(ValueError, match="is a pipe"):
        rows(tmp_path)


LONG = '{"a": "' + "x" * 200 + '"}'
SHORT = '{"a": "x"}'


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize(
    ("name", "text", "place", "what"),
    [
        ("a.jsonl", f"{SHORT}\n{LONG}\n{SHORT}\n", "a.jsonl:2", "the line"),
        ("a.jsonl", f"{SHORT}\n{LONG}", "a.jsonl:2", "the line"),
        ("a.json", f"[{SHORT},\n{LONG}]", "a.json:2", "the line"),
        ("a.json", "[" + ",\n".join([SHORT] * 20) + "]", "a.json:9", "the file"),
        ("a.json", f"{SHORT}\n\n{LONG}\n", "a.json:3", "the line"),
        ("a.csv", f"a,b\nx,y\n{'x' * 200},y\n", "a.csv:3", "the line"),
        ("a.csv", 'a,b\nx,y\n"' + "x\n" * 200 + '",y\n', "a.csv:3", "the row"),
    ],
)
def test_a_line_above_the_bound_is_refused_by_its_number(tmp_path, name, text, place, what, suffix):
    path = tmp_path / f"{name}{suffix}"
    path.write_bytes(gzip.compress(text.encode()) if suffix else text.encode())
    with pytest.raises(RowError) as error:
        list(read_rows(str(path), max_line_bytes=100))
    assert error.value.where.endswith(place.replace(name, path.name))
    assert f"{what} has more than 100 bytes" in str(error.value)
    assert "max_line_bytes" in str(error.value)
    assert list(read_rows(str(path), max_line_bytes=10_000))


def test_rows_behind_a_line_that_is_too_long_are_read(tmp_path):
    path = write(tmp_path / "a.jsonl", f"{SHORT}\n{LONG}\n{SHORT}\n")
    found = []
    places = [where for where, _ in read_rows(str(path), found.append, max_line_bytes=100)]
    assert [where.rpartition(":")[2] for where in places] == ["1", "3"]
    assert [error.where.rpartition(":")[2] for error in found] == ["2"]


def test_json_lines_under_a_json_name_may_be_longer_than_the_bound_in_all(tmp_path):
    path = write(tmp_path / "a.json", f"{SHORT}\n" * 50)
    assert len(list(read_rows(str(path), max_line_bytes=100))) == 50


BOMB = """
import resource, sys
import lit_dpo.data.read as read
resource.setrlimit(resource.RLIMIT_AS, (USED + 200 * 2**20,) * 2)
for path in sys.argv[1:]:
    try:
        list(read.read_rows(path))
    except read.RowError as error:
        print(error)
"""


def test_a_gzip_bomb_does_not_fill_the_memory(tmp_path):
    """300 MB of one line in 300 kB, read by a process that may take 200 MB more than the import did."""
    with gzip.open(tmp_path / "a.jsonl.gz", "wb") as file:
        for _ in range(300):
            file.write(b"[" * 1_000_000)
    (tmp_path / "a.json.gz").hardlink_to(tmp_path / "a.jsonl.gz")
    used = "__import__('os').sysconf('SC_PAGE_SIZE') * int(open('/proc/self/statm').read().split()[0])"
    code = BOMB.replace("USED", used)
    files = [str(path) for path in tmp_path.iterdir()]
    done = subprocess.run([sys.executable, "-c", code, *files], capture_output=True, text=True)
    assert done.stdout.count("the line has more than 67,108,864 bytes") == 2, done.stderr[-2000:]
