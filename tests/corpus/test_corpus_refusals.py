"""Files that are damaged, cut, of another kind than their names say, or without text: each is refused by name."""

import bz2
import gzip
import json
import lzma

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from streaming import JSONWriter
from text_files import write_arrow_stream, write_mds, zstd

from dskd.corpus.files import read_file
from dskd.errors import UserError


def _write_cut_gzip(path):
    path.write_bytes(gzip.compress("\n\n".join(f"text {i}" for i in range(1000)).encode())[:-20])


def _write_damaged_gzip(path):
    data = bytearray(gzip.compress("\n\n".join(f"text {i}" for i in range(1000)).encode()))
    data[len(data) // 2] ^= 255
    path.write_bytes(data)


def _write_cut_parquet(path):
    pq.write_table(pa.table({"text": ["x"] * 100}), path)
    path.write_bytes(path.read_bytes()[:-10])


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
HTML = b"\n<!DOCTYPE html>\n<html><head><title>404 Not Found</title></head></html>\n"
ENDINGS = ("txt", "jsonl", "json", "txt.gz", "jsonl.zst", "parquet", "arrow")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', r"a.jsonl:2: this line is not JSON"),
        ("a.jsonl", b'{"body": "x"}\n', r"a.jsonl:1: expected an object with a text under 'text', but it has body"),
        ("a.jsonl", b'{"text": 3}\n', r"a.jsonl:1: expected an object with a text under 'text'"),
        ("a.jsonl", b"[1]\n", r"a.jsonl:1: expected an object .* it is not an object"),
        ("a.txt", b"\xff\xfe\x00", r"a.txt: this is not UTF-8 text"),
        ("a.txt.gz", _write_cut_gzip, r"a.txt.gz: the compressed file ends too early"),
        ("a.txt.gz", _write_damaged_gzip, r"a.txt.gz: (this is not whole gzip data|this is not UTF-8 text)"),
        ("a.txt.gz", b"plain text", r"a.txt.gz: this is not whole gzip data \(Not a gzipped file"),
        ("a.parquet", _write_cut_parquet, r"a.parquet: this is not a readable Parquet file"),
        ("a.parquet", b"", r"a.parquet: this is not a readable Parquet file"),
        (
            "a.txt",
            gzip.compress(b"text", mtime=0),
            r"a\.txt: this is not plain text: its content is that of a \.gz file",
        ),
        ("a.jsonl", zstd(b"{}"), r"a\.jsonl: this is not plain text: its content is that of a \.zst file"),
        ("a.jsonl.zst", zstd(b'{"text": "x"}\n' * 999)[:-3], r"a\.jsonl\.zst: .*ends too early"),
        ("a.jsonl.zst", b"plain", r"a\.jsonl\.zst: cannot be read \(ZSTD decompress failed"),
        ("a.jsonl.zst", b"", r"a\.jsonl\.zst: the compressed file is empty"),
        ("a.txt.gz", b"", r"a\.txt\.gz: the compressed file is empty"),
        ("a.txt.bz2", bz2.compress(b"text" * 999)[:-9], r"a\.txt\.bz2: the compressed file ends too early"),
        ("a.txt.bz2", b"plain", r"a\.txt\.bz2: cannot be read"),
        ("a.txt.xz", lzma.compress(b"text" * 999)[:-9], r"a\.txt\.xz: the compressed file ends too early"),
        ("a.txt.xz", b"plain text", r"a\.txt\.xz: this is not whole xz data"),
        *((f"a.{ending}", LFS, r"only a pointer of git .* `git lfs pull`") for ending in ENDINGS),
        *((name, HTML, r": this is a page of a web server") for name in ("a.txt", "a.jsonl", "a.json")),
        ("a.txt.gz", gzip.compress(HTML, mtime=0), r"a\.txt\.gz: this is a page of a web server"),
        ("a.txt", b"<?xml version='1.0'?><Error><Code>AccessDenied</Code>", r"this is a page of a web server"),
        ("a.txt", "text".encode("utf-16"), r"a\.txt: .*looks like UTF-16"),
        ("a.txt", "a longer text".encode("utf-16-le"), r"a\.txt: .*looks like UTF-16"),
        ("a.txt", "fünf".encode("latin-1"), r"a\.txt: this is not UTF-8 text .*iconv"),
        ("a.jsonl", b'{"text": "x"}\n{"text": ["y"]}\n', r'a\.jsonl:2: .* that is \["y"\]'),
        ("a.jsonl", b'{"text": "x"}\n{"id": 3}\n', r"a\.jsonl:2: .* it has id; name the key"),
        ("a.jsonl", b'{"instruction": "x", "output": "y"}', r"a\.jsonl:1: .* an instruction and its answer.*training"),
        ("a.json", b'{\n  "text": "x"\n}\n', r"a\.json:1: this line is not JSON .* an object a line, or one array"),
        (
            "a.json",
            b'[{"text": "x"}, {"text": 3}]',
            r"a\.json:2: expected an object with a text under 'text', but that is 3",
        ),
        ("a.json", b'[{"text": "x"}', r"a\.json: after element 1 of the array: expected , or \], found the end"),
        ("a.json", b'[{"text": "x"}, {"te', r"a\.json: element 2 of the array is not JSON"),
        ("a.json", b'[{"text": "x"}]\n[{"text": "y"}]', r"a\.json: there is more text after its array"),
        ("a.json", b'[{"text": "x"},]', r"a\.json: after element 1 of the array: a comma, and no element"),
        ("a.arrow", b"ARROW1", r"a\.arrow: this is not a readable Arrow file"),
        ("a.arrow", b"", r"a\.arrow: this Arrow stream has no end mark"),
        (
            "a.arrow",
            lambda path: write_arrow_stream(path, is_closed=False),
            r"a\.arrow: .*no end mark.* close the writer",
        ),
        (
            "a.parquet",
            lambda path: pq.write_table(pa.table({"text": pa.array([b"x"], pa.binary())}), path),
            r"a\.parquet: expected a column 'text' of strings, but it has text \(binary\); cast it",
        ),
        (
            "a.parquet",
            lambda path: pq.write_table(pa.table({"messages": [[{"role": "user", "content": "Hi"}]]}), path),
            r"a\.parquet: expected a column 'text' .* 'messages' holds chats.*docs/training\.md",
        ),
        (
            "a.parquet",
            lambda path: pq.write_table(pa.table({"text": [{"body": "x"}]}), path),
            r"a\.parquet: expected a column 'text' of strings, but it has text \(struct<",
        ),
        (
            "a.parquet",
            lambda path: pq.write_table(pa.table({"body": ["x"], "id": [1]}), path),
            r"a.parquet: expected a column 'text' of strings, but it has body \(string\), id \(int64\); name it with",
        ),
        (
            "a.parquet",
            lambda path: pq.write_table(pa.table({"text": [1]}), path),
            r"a.parquet: expected a column 'text' of strings, but it has text \(int64\)",
        ),
    ],
)
def test_unreadable_text_is_named(tmp_path, name, content, message):
    if callable(content):
        content(tmp_path / name)
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        list(read_file(tmp_path / name, "text"))


TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (TURNS, "one turn of a chat"),  # a line that begins with [ is read as an array
        ({"conversation": TURNS}, "this is a chat: 'conversation' has 2 turns, the first by 'user'"),
        ({"messages": json.dumps(TURNS)}, "this is a chat: 'messages' is a text, of JSON as it seems"),
        ({"dialog": ["Hi", "Hello"]}, "this is a chat: 'dialog' is a list of 2"),
        ({"title": "x", "mapping": {"a": {"id": "b"}}}, "this is a chat: 'mapping' is an object of 1"),
        ({"chosen": "x", "rejected": "y"}, "an instruction and its answer"),
        ({"instruction": "x", "context": "", "response": "y"}, "an instruction and its answer"),
        ({"question": "x", "answer": "y"}, "an instruction and its answer"),
        ({"inputs": "x", "targets": "y"}, "an instruction and its answer"),
    ],
)
def test_chats_in_every_layout_point_to_the_page_on_chats(tmp_path, record, message):
    (tmp_path / "a.jsonl").write_text(f"{json.dumps(record)}\n" * 2)
    with pytest.raises(UserError, match=rf"a\.jsonl:1: .*{message}.*docs/training\.md"):
        list(read_file(tmp_path / "a.jsonl", "text"))
    (tmp_path / "a.json").write_text(json.dumps([record]))
    with pytest.raises(UserError, match=r"a\.json:1: .*docs/training\.md"):
        list(read_file(tmp_path / "a.json", "text"))
    if isinstance(record, dict):
        pq.write_table(pa.Table.from_pylist([record]), tmp_path / "a.parquet")
        with pytest.raises(UserError, match=r"a\.parquet: expected a column 'text' .*docs/training\.md"):
            list(read_file(tmp_path / "a.parquet", "text"))


def test_mds_shards_of_another_kind_are_refused(tmp_path):
    index = write_mds(tmp_path / "ids", [{"ids": np.arange(3), "text": 3}], {"ids": "ndarray:int64", "text": "int"})
    with pytest.raises(UserError, match=r"expected a column 'text' of strings, but it has ids \(ndarray:int64\), text"):
        list(read_file(index, "text"))
    with JSONWriter(out=str(tmp_path / "json"), columns={"text": "str"}) as writer:
        writer.write({"text": "x"})
    with pytest.raises(UserError, match="expected shards of the format 'mds', found 'json'"):
        list(read_file(tmp_path / "json" / "index.json", "text"))


@pytest.mark.parametrize(
    "content", ['{"shards": [{"format": "mds"}]}', '{"shards": [{"format": "mds", "column_names": ["text"]}]}']
)
def test_a_damaged_index_is_named(tmp_path, content):
    (tmp_path / "index.json").write_text(content)
    with pytest.raises(UserError, match=r"index\.json: "):
        list(read_file(tmp_path / "index.json", "text"))


def test_a_changed_byte_of_a_shard_is_named(tmp_path):
    index = write_mds(tmp_path / "mds", [{"text": "abc" * 9, "id": 1}], hashes=["xxh64"])
    (shard,) = (tmp_path / "mds").glob("shard.*")
    shard.write_bytes(shard.read_bytes().replace(b"abc", b"abd"))
    with pytest.raises(UserError, match=r"the content is not what index\.json says"):
        list(read_file(index, "text"))


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_a_shard_that_git_did_not_fetch_is_named(tmp_path, compression):
    index = write_mds(tmp_path / "mds", [{"text": "abc", "id": 1}], compression=compression, hashes=["xxh64"])
    (shard,) = (tmp_path / "mds").glob("shard.*")
    shard.write_bytes(LFS)
    with pytest.raises(UserError, match=rf"{shard.name}: this is only a pointer of git.*`git lfs pull`"):
        list(read_file(index, "text"))


@pytest.mark.parametrize(("compression", "message"), [(None, "index.json says"), ("zstd", "cannot be unpacked")])
def test_a_shard_that_was_cut_or_is_missing_is_named(tmp_path, compression, message):
    samples = [{"text": f"t{i}" * 50, "id": i} for i in range(100)]
    index = write_mds(tmp_path / "mds", samples, compression=compression)
    (shard,) = (tmp_path / "mds").glob("shard.*")
    shard.write_bytes(shard.read_bytes()[:-9])
    with pytest.raises(UserError, match=message) as error:
        list(read_file(index, "text"))
    assert shard.name in str(error.value)
    shard.unlink()
    with pytest.raises(UserError, match="cannot be read"):
        list(read_file(index, "text"))
