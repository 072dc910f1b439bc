"""Every kind of file that text is read from, written by the tools that users write them with."""

import bz2
import gzip
import json
import lzma

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from text_files import write_arrow_stream, write_mds, zstd

from dskd.corpus import records
from dskd.corpus.files import read_file
from dskd.errors import UserError


def _texts(path, field="text"):
    return [document.text for document in read_file(path, field)]


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
        ".zst": zstd(data[:9]) + zstd(data[9:]),  # several frames
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
    index = write_mds(tmp_path / "mds", samples, compression=compression, size_limit=4000, hashes=["sha1"])
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
    index = write_mds(tmp_path / "mds", samples, columns)
    shard = tmp_path / "mds" / "shard.00000.mds"
    data = shard.read_bytes()
    assert data.count(b"\x80\x04") == 5  # where a pickle begins
    shard.write_bytes(data.replace(b"\x80\x04", b"\xff\xff"))
    assert _texts(index) == [f"t{i}" for i in range(5)]


def test_all_streams_of_an_arrow_file_are_read(tmp_path):
    """Streams that were appended to each other: pyarrow's reader stops at the end of the first."""
    path = tmp_path / "a.arrow"
    write_arrow_stream(path)
    write_arrow_stream(path, ["four"])
    assert [(d.name, d.text) for d in read_file(path, "text")] == [
        (f"{path}:{row}", text) for row, text in enumerate(("one", "two", "three", "four"), start=1)
    ]
    path.write_bytes(path.read_bytes()[:-8])  # whole batches, without the last end mark
    with pytest.raises(UserError, match="no end mark"):
        list(read_file(path, "text"))


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
