"""Every kind of file that text is read from, written by the tools that users write them with."""

import bz2
import gzip
import json
import lzma
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from streaming import JSONWriter, MDSWriter

from dskd.corpus import finding, records
from dskd.corpus.files import read_file
from dskd.corpus.finding import fingerprint
from dskd.errors import UserError


def _texts(path, field="text"):
    return [document.text for document in read_file(path, field)]


def expand(patterns, key, workdir="/no/work"):
    return finding.find_files(patterns, key, workdir=Path(workdir)).files


def _write_mds(folder, samples, columns=None, **options):
    with MDSWriter(out=str(folder), columns=columns or {"text": "str", "id": "int"}, **options) as writer:
        for sample in samples:
            writer.write(sample)
    return folder / "index.json"


def test_paragraphs_and_lines_become_documents_with_their_line_numbers(tmp_path):
    (tmp_path / "a.txt").write_text("one\nstill one\n\n\ntwo\n", encoding="utf-8")
    assert [(d.name.rsplit(":", 1)[1], d.text) for d in read_file(tmp_path / "a.txt", "text")] == [
        ("1", "one\nstill one"),
        ("5", "two"),
    ]
    (tmp_path / "b.jsonl").write_text('{"body": "x"}\n\n{"body": "y"}\n', encoding="utf-8")
    assert _texts(tmp_path / "b.jsonl", "body") == ["x", "y"]


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.txt", "one\nstill one\n\ntwo ünï\n"), ("a.jsonl", '{"text": "one\\nstill one"}\n{"text": "two ünï"}\n')],
)
def test_compressed_files_hold_what_the_plain_ones_do(tmp_path, name, content):
    data = content.encode()
    compressed = {
        "": data,
        ".gz": gzip.compress(data, mtime=0),
        ".zst": _zstd(data[:9]) + _zstd(data[9:]),  # several frames
        ".bz2": bz2.compress(data),
        ".xz": lzma.compress(data),
        ".GZ": gzip.compress(b"\xef\xbb\xbf" + data.replace(b"\n", b"\r\n")),
    }
    for ending, packed in compressed.items():
        (tmp_path / f"{name}{ending}").write_bytes(packed)
        assert _texts(tmp_path / f"{name}{ending}") == ["one\nstill one", "two ünï"], ending


@pytest.mark.parametrize("size", [0, 3, 5000])
def test_an_array_of_objects_is_read_in_parts(tmp_path, monkeypatch, size):
    monkeypatch.setattr(records, "_CHUNK_CHARACTERS", 100)
    rows = [{"id": number, "text": f"text {number} " + "[{,é" * (number % 40)} for number in range(size)]
    (tmp_path / "a.json").write_text("\n " + json.dumps(rows, indent=1) + "\n")
    (tmp_path / "b.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    expected = [row["text"].strip() for row in rows]
    assert _texts(tmp_path / "a.json") == _texts(tmp_path / "b.json") == expected


def test_json_with_an_object_a_line_is_read_whatever_it_is_called(tmp_path):
    for name in ("a.json", "a.ndjson", "a.jsonl"):
        (tmp_path / name).write_text('\n{"text": "one"}\r\n{"text": "two"}')
        assert [document.name.rsplit(":", 1)[1] for document in read_file(tmp_path / name, "text")] == ["2", "3"]


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]
)
def test_parquet_is_read_over_all_row_groups(tmp_path, kind):
    texts = [None if i % 7 == 3 else f"text {i % 50}" for i in range(5000)]
    column = (
        pa.array(texts, pa.string()).cast(kind)
        if not pa.types.is_dictionary(kind)
        else pa.array(texts).dictionary_encode()
    )
    table = pa.table({"id": pa.array(range(5000)), "body": column})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=1234)
    documents = list(read_file(tmp_path / "a.parquet", "body"))
    assert [document.text for document in documents] == [text for text in texts if text is not None]
    assert documents[3].name == f"{tmp_path / 'a.parquet'}:5"  # the fourth row has no text


@pytest.mark.parametrize("compression", [None, "zstd", "gz", "snappy"])
def test_mds_shards_are_read_as_mosaicml_streaming_reads_them(tmp_path, compression):
    samples = [{"text": f"text {i} ünï " * (i % 9 + 1), "id": i} for i in range(300)]
    index = _write_mds(tmp_path / "mds", samples, compression=compression, size_limit=4000, hashes=["sha1"])
    assert len(json.loads(index.read_text())["shards"]) > 3
    before = sorted(path.name for path in index.parent.iterdir())
    documents = list(read_file(index, "text"))
    assert [document.text for document in documents] == [sample["text"].strip() for sample in samples]
    assert documents[200].name == f"{index}:200"
    assert sorted(path.name for path in index.parent.iterdir()) == before  # nothing is unpacked next to the shards


def test_other_columns_of_mds_shards_are_not_decoded(tmp_path):
    """A pickle among them would be run; this one cannot even be loaded."""
    samples = [{"text": f"t{i}", "object": {"i": i}, "ids": np.arange(i + 1)} for i in range(5)]
    columns = {"object": "pkl", "text": "str", "ids": "ndarray:int64"}
    index = _write_mds(tmp_path / "mds", samples, columns)
    shard = tmp_path / "mds" / "shard.00000.mds"
    data = shard.read_bytes()
    assert data.count(b"\x80\x04") == 5  # where a pickle begins
    shard.write_bytes(data.replace(b"\x80\x04", b"\xff\xff"))
    assert _texts(index) == [f"t{i}" for i in range(5)]


def test_files_folders_and_globs_name_each_file_once(tmp_path):
    for name in ("a.txt", "sub/b.jsonl", "sub/c.txt.gz", "sub/deep/d.parquet", "sub/notes.md", "plain/index.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"{}")
    index = _write_mds(tmp_path / "sub" / "mds", [{"text": "x", "id": 1}])
    everything = [tmp_path / n for n in ("a.txt", "sub/b.jsonl", "sub/c.txt.gz", "sub/deep/d.parquet")] + [index]
    assert expand([str(tmp_path)], "corpus.train") == sorted(everything)
    assert expand([str(tmp_path / "s*"), str(tmp_path / "a.txt")], "corpus.train") == sorted(everything)
    assert expand([str(tmp_path / "sub" / "*.gz")], "corpus.train") == [tmp_path / "sub" / "c.txt.gz"]
    assert expand([str(tmp_path / "s*" / "mds")], "corpus.train") == [index]
    assert expand([str(index)], "corpus.train") == [index]


def test_a_folder_around_the_work_directory_is_searched_without_it(tmp_path):
    for name in ("a.txt", "c.parquet", "work/corpus/train.parquet", "work/own/b.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert expand([str(tmp_path)], "corpus.train", tmp_path / "work") == [
        tmp_path / "a.txt",
        tmp_path / "c.parquet",
    ]
    inside = [str(tmp_path / "work" / "own"), str(tmp_path / "work" / "corpus" / "train.parquet")]
    assert len(expand(inside, "corpus.train", tmp_path / "work")) == 2  # a file that the config names is always read
    assert expand([str(tmp_path / "**" / "*.parquet"), str(tmp_path / "*.txt")], "corpus.train", tmp_path / "work") == [
        tmp_path / "a.txt",
        tmp_path / "c.parquet",
    ]


def test_one_file_of_many_names_is_read_once(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "b.txt").write_text("x")
    monkeypatch.chdir(tmp_path)
    assert len(expand(["a.txt", "./a.txt", str(tmp_path / "a.txt"), ".", "*"], "corpus.train")) == 1


def test_shards_that_were_written_in_parallel_are_read_once(tmp_path):
    from streaming.base.util import merge_index

    for name in ("a", "b"):
        _write_mds(tmp_path / name, [{"text": f"{name}{i}", "id": i} for i in range(4)])
    merge_index(str(tmp_path), keep_local=True)
    (index,) = expand([str(tmp_path)], "corpus.train")
    assert index == tmp_path / "index.json"
    assert [document.text for document in read_file(index, "text")] == [f"{name}{i}" for name in "ab" for i in range(4)]
    before = fingerprint(index)
    (shard,) = (tmp_path / "a").glob("shard.*")
    os.utime(shard, ns=(1, 1))
    assert fingerprint(index) != before


def test_missing_and_wrong_files_are_all_named(tmp_path):
    (tmp_path / "a.pdf").write_text("x")
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_text("x")
    patterns = [str(tmp_path / name) for name in ("none.txt", "*.jsonl", "a.pdf", "pictures")]
    with pytest.raises(UserError) as error:
        expand(patterns, "corpus.train")
    for part in (
        "none.txt' names no file",
        "*.jsonl' names no file",
        "a.pdf: expected .txt, ",
        "pictures' names no file",
    ):
        assert part in str(error.value)


def _write_cut_gzip(path):
    path.write_bytes(gzip.compress("\n\n".join(f"text {i}" for i in range(1000)).encode())[:-20])


def _write_damaged_gzip(path):
    data = bytearray(gzip.compress("\n\n".join(f"text {i}" for i in range(1000)).encode()))
    data[len(data) // 2] ^= 255
    path.write_bytes(data)


def _write_cut_parquet(path):
    pq.write_table(pa.table({"text": ["x"] * 100}), path)
    path.write_bytes(path.read_bytes()[:-10])


def _write_stream(path, texts=("one", "two", "three"), *, is_closed=True):
    table = pa.table({"text": texts})
    with path.open("ab") as file:  # appends, for files of several streams
        writer = pa.ipc.new_stream(file, table.schema)
        for batch in table.to_batches(max_chunksize=1):
            writer.write_batch(batch)
        if is_closed:
            writer.close()


def _zstd(data):
    return pa.compress(data, codec="zstd", asbytes=True)


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
        ("a.jsonl", _zstd(b"{}"), r"a\.jsonl: this is not plain text: its content is that of a \.zst file"),
        ("a.jsonl.zst", _zstd(b'{"text": "x"}\n' * 999)[:-3], r"a\.jsonl\.zst: .*ends too early"),
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
        ("a.arrow", lambda path: _write_stream(path, is_closed=False), r"a\.arrow: .*no end mark.* close the writer"),
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


def test_all_streams_of_an_arrow_file_are_read(tmp_path):
    """Streams that were appended to each other: pyarrow's reader stops at the end of the first."""
    path = tmp_path / "a.arrow"
    _write_stream(path)
    _write_stream(path, ["four"])
    assert [(d.name, d.text) for d in read_file(path, "text")] == [
        (f"{path}:{row}", text) for row, text in enumerate(("one", "two", "three", "four"), start=1)
    ]
    path.write_bytes(path.read_bytes()[:-8])  # whole batches, without the last end mark
    with pytest.raises(UserError, match="no end mark"):
        list(read_file(path, "text"))


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
    index = _write_mds(tmp_path / "ids", [{"ids": np.arange(3), "text": 3}], {"ids": "ndarray:int64", "text": "int"})
    with pytest.raises(UserError, match=r"expected a column 'text' of strings, but it has ids \(ndarray:int64\), text"):
        list(read_file(index, "text"))
    with JSONWriter(out=str(tmp_path / "json"), columns={"text": "str"}) as writer:
        writer.write({"text": "x"})
    with pytest.raises(UserError, match="expected shards of the format 'mds', found 'json'"):
        list(read_file(tmp_path / "json" / "index.json", "text"))


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("a.txt", b"one\n\n\x00\x00\n\ntwo", 3),
        ("a.jsonl", b'{"text": "one"}\n{"text": "\\ud800"}\n{"text": "two"}\n', 2),
    ],
)
def test_values_that_are_not_text_are_left_out_and_reported(tmp_path, capsys, name, content, line):
    (tmp_path / name).write_bytes(content)
    assert [document.text for document in read_file(tmp_path / name, "text")] == ["one", "two"]
    assert (
        f"1 documents are not text (a NUL or half a surrogate pair) and are left out: {line}" in capsys.readouterr().err
    )


def test_a_null_is_not_a_document(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text('{"text": null}\n{"text": "two"}\n')
    assert [document.text for document in read_file(tmp_path / "a.jsonl", "text")] == ["two"]
    assert "1 records without a text (null) are left out" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content", ['{"shards": [{"format": "mds"}]}', '{"shards": [{"format": "mds", "column_names": ["text"]}]}']
)
def test_a_damaged_index_is_named(tmp_path, content):
    (tmp_path / "index.json").write_text(content)
    with pytest.raises(UserError, match=r"index\.json: "):
        list(read_file(tmp_path / "index.json", "text"))


def test_a_changed_byte_of_a_shard_is_named(tmp_path):
    index = _write_mds(tmp_path / "mds", [{"text": "abc" * 9, "id": 1}], hashes=["xxh64"])
    (shard,) = (tmp_path / "mds").glob("shard.*")
    shard.write_bytes(shard.read_bytes().replace(b"abc", b"abd"))
    with pytest.raises(UserError, match=r"the content is not what index\.json says"):
        list(read_file(index, "text"))


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_a_shard_that_git_did_not_fetch_is_named(tmp_path, compression):
    index = _write_mds(tmp_path / "mds", [{"text": "abc", "id": 1}], compression=compression, hashes=["xxh64"])
    (shard,) = (tmp_path / "mds").glob("shard.*")
    shard.write_bytes(LFS)
    with pytest.raises(UserError, match=rf"{shard.name}: this is only a pointer of git.*`git lfs pull`"):
        list(read_file(index, "text"))


@pytest.mark.parametrize(("compression", "message"), [(None, "index.json says"), ("zstd", "cannot be unpacked")])
def test_a_shard_that_was_cut_or_is_missing_is_named(tmp_path, compression, message):
    samples = [{"text": f"t{i}" * 50, "id": i} for i in range(100)]
    index = _write_mds(tmp_path / "mds", samples, compression=compression)
    (shard,) = (tmp_path / "mds").glob("shard.*")
    shard.write_bytes(shard.read_bytes()[:-9])
    with pytest.raises(UserError, match=message) as error:
        list(read_file(index, "text"))
    assert shard.name in str(error.value)
    shard.unlink()
    with pytest.raises(UserError, match="cannot be read"):
        list(read_file(index, "text"))


def test_a_fingerprint_changes_with_the_shards_of_an_index(tmp_path):
    index = _write_mds(tmp_path / "mds", [{"text": "x", "id": 1}])
    before = fingerprint(index)
    assert fingerprint(index) == before
    (shard,) = (tmp_path / "mds").glob("shard.*")
    shard.write_bytes(shard.read_bytes() + b"x")
    assert fingerprint(index) != before
