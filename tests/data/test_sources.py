from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from toolkit.data import sources
from toolkit.errors import UserError

ROWS = [{"prompt": f"p{n}", "chosen": f"c{n}", "rejected": f"r{n}", "score": n} for n in range(5)]


def write(path: Path) -> Path:
    table = pa.Table.from_pylist(ROWS)
    lines = "\n".join(json.dumps(row) for row in ROWS) + "\n\n"
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    elif path.name == "file.arrow":
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
    elif path.suffix == ".arrow":
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines.encode()))
    elif path.suffix == ".zst":
        with pa.output_stream(path, compression="zstd") as sink:
            sink.write(lines.encode())
    else:
        path.write_text(json.dumps(ROWS, indent=1) if path.suffix == ".json" else lines)
    return path


@pytest.mark.parametrize(
    "name",
    ["a.parquet", "odd [1] *.parquet", "file.arrow", "stream.arrow", "a.jsonl", "a.json", "a.jsonl.gz", "a.jsonl.zst"],
)
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name)
    source = sources.load(path, cache_dir=tmp_path / "cache")
    wanted = ("prompt", "chosen", "rejected")
    expected = [(n, {key: row[key] for key in wanted}) for n, row in enumerate(ROWS)]
    assert [(n, {key: row[key] for key in wanted}) for n, row in source.rows(wanted)] == expected
    assert set(source.columns) == set(ROWS[0])
    assert len(source) == 5

    cut = sources.load(path, cache_dir=tmp_path / "cache", limit=2)
    assert [n for n, _ in cut.rows(wanted)] == [0, 1]
    assert cut.digest == source.digest


def test_the_digest_is_that_of_the_bytes(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a.jsonl"), write(tmp_path / "b.jsonl")
    digest = sources.load(first).digest
    assert sources.load(second).digest == digest
    second.write_text(second.read_text() + "\n")
    assert sources.load(second).digest != digest


def test_a_changed_file_is_not_read_from_the_cache(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet")
    sources.load(path, cache_dir=tmp_path / "cache")
    pq.write_table(pa.table({"prompt": ["new"]}), path)
    assert list(sources.load(path, cache_dir=tmp_path / "cache").rows(["prompt"])) == [(0, {"prompt": "new"})]


def test_json_values_keep_their_types_in_a_large_file(tmp_path: Path) -> None:
    path = tmp_path / "large.jsonl"
    line = json.dumps({"prompt": "p", "chosen": "c" * 1000, "rejected": "r"}) + "\n"
    path.write_text(line * 12_000 + '{"prompt": "p", "chosen": 5, "rejected": "r"}\n')  # beyond any reader's block
    *_, (number, row) = sources.load(path).rows(["chosen"])
    assert (number, row["chosen"]) == (12_000, 5)


def test_a_file_needs_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(event: str, _: object) -> None:
        if watching and event in ("socket.connect", "socket.getaddrinfo"):
            raise AssertionError(f"network used: {event}")

    watching = True
    sys.addaudithook(refuse)
    try:
        assert len(sources.load(write(tmp_path / "a.parquet"), cache_dir=tmp_path / "cache")) == 5
    finally:
        watching = False


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"prompt": "p"}\n\n{"prompt" "q"}\n', r"a\.jsonl line 3: not readable as JSON"),
        ("a.jsonl", b'{"prompt": "p"}\n"text"\n', r"row 1: found str, expected an object"),
        ("a.jsonl", b'{"prompt": "\xff"}\n', "not readable as JSON"),
        ("a.json", b'[{"prompt": "p"}, 3]', r"row 1: found int"),
        ("a.jsonl.gz", b"plain", "not readable as JSON"),
        ("a.jsonl", b"\n", "holds no rows"),
        ("a.parquet", b"hello", r"cannot read .*a\.parquet"),
        ("a.arrow", b"hello hello", r"cannot read .*a\.arrow"),
        ("a.csv", b"prompt\n", r"unknown kind of name; expected one of \.parquet"),
    ],
)
def test_unreadable_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        sources.load(tmp_path / name, cache_dir=tmp_path / "cache")


def test_empty_tables_and_wrong_places(tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), tmp_path / "none.parquet")
    with pytest.raises(UserError, match=r"none\.parquet"):
        sources.load(tmp_path / "none.parquet", cache_dir=tmp_path / "cache")
    with pytest.raises(UserError, match=r"pairs\.jsonl does not exist"):
        sources.load("data/pairs.jsonl")
    with pytest.raises(UserError, match="is not a file"):
        sources.load(tmp_path)
    with pytest.raises(UserError, match=r"expected a file .* or a Hugging Face dataset id"):
        sources.load("no-such-thing")
    with pytest.raises(UserError, match="limit of rows is 0"):
        sources.load(write(tmp_path / "a.jsonl"), limit=0)


def test_a_byte_order_mark_is_no_part_of_the_data(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl")
    plain = list(sources.load(path).rows(["prompt"]))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert list(sources.load(path).rows(["prompt"])) == plain


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"made.py": "import datasets"}, "Dataset scripts are no longer supported"),
        (
            {
                "README.md": "---\nconfigs:\n- {config_name: one, data_files: a.jsonl}\n- {config_name: two, data_files: a.jsonl}\n---",
                "a.jsonl": '{"prompt": "p"}',
            },
            "Config name is missing",
        ),
    ],
)
def test_a_dataset_that_its_id_does_not_settle_says_what_to_do(
    tmp_path: Path, files: dict[str, str], message: str
) -> None:
    (tmp_path / "made").mkdir()
    for name, text in files.items():
        (tmp_path / "made" / name).write_text(text)
    with pytest.raises(UserError, match=rf"cannot read an/id: {message}(.|\n)*export the rows wanted to Parquet"):
        sources._load_dataset("an/id", str(tmp_path / "made"), tmp_path / "cache", split="train")


def test_a_dataset_id_without_network_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"cannot read nobody/nothing: .*; without internet here, fetch it"):
        sources.load("nobody/nothing", cache_dir=tmp_path / "cache")
