"""Which files a pattern or a folder names, also in folders with checksums, licences, descriptions and broken links."""

import json
import os
from pathlib import Path

import pyarrow as pa
import pytest
from repository import REPOSITORY
from text_files import write_mds

from dskd.config import Config
from dskd.corpus import finding
from dskd.corpus.build import build_corpus, read_texts, recipe
from dskd.corpus.files import read_file
from dskd.corpus.finding import fingerprint_of_text
from dskd.errors import UserError

SHARED = REPOSITORY.parent / "shared" / "cases" / "corpus"
LINES = "".join(json.dumps({"text": f"text {number}"}) + "\n" for number in range(40))
SHA256 = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def _find(*patterns, key="corpus.train", workdir="/no/work"):
    return finding.find_files([str(pattern) for pattern in patterns], key, workdir=Path(workdir))


def _write(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        path = folder / name.replace("__", ".")
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def _save_to_disk(folder, shards, **state):
    """Writes what `Dataset.save_to_disk` writes."""
    folder.mkdir(parents=True)
    names = [f"data-{number:05d}-of-{len(shards):05d}.arrow" for number in range(len(shards))]
    for name, texts in zip(names, shards, strict=True):
        table = pa.table({"id": range(len(texts)), "text": pa.array(texts, pa.string())})
        with pa.OSFile(str(folder / name), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names], **state}))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def test_files_folders_and_globs_name_each_file_once(tmp_path):
    for name in ("a.txt", "sub/b.jsonl", "sub/c.txt.gz", "sub/deep/d.parquet", "sub/notes.md", "plain/index.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"{}")
    index = write_mds(tmp_path / "sub" / "mds", [{"text": "x", "id": 1}])
    everything = [tmp_path / n for n in ("a.txt", "sub/b.jsonl", "sub/c.txt.gz", "sub/deep/d.parquet")] + [index]
    assert _find(tmp_path).files == sorted(everything)
    assert _find(tmp_path / "s*", tmp_path / "a.txt").files == sorted(everything)
    assert _find(tmp_path / "sub" / "*.gz").files == [tmp_path / "sub" / "c.txt.gz"]
    assert _find(tmp_path / "s*" / "mds").files == [index]
    assert _find(index).files == [index]


def test_a_folder_around_the_work_directory_is_searched_without_it(tmp_path):
    for name in ("a.txt", "c.parquet", "work/corpus/train.parquet", "work/own/b.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert _find(tmp_path, workdir=tmp_path / "work").files == [
        tmp_path / "a.txt",
        tmp_path / "c.parquet",
    ]
    inside = [str(tmp_path / "work" / "own"), str(tmp_path / "work" / "corpus" / "train.parquet")]
    assert len(_find(*inside, workdir=tmp_path / "work").files) == 2  # a file that the config names is always read
    assert _find(tmp_path / "**" / "*.parquet", tmp_path / "*.txt", workdir=tmp_path / "work").files == [
        tmp_path / "a.txt",
        tmp_path / "c.parquet",
    ]


def test_one_file_of_many_names_is_read_once(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "b.txt").write_text("x")
    monkeypatch.chdir(tmp_path)
    assert len(_find("a.txt", "./a.txt", tmp_path / "a.txt", ".", "*").files) == 1


def test_shards_that_were_written_in_parallel_are_read_once(tmp_path):
    from streaming.base.util import merge_index

    for name in ("a", "b"):
        write_mds(tmp_path / name, [{"text": f"{name}{i}", "id": i} for i in range(4)])
    merge_index(str(tmp_path), keep_local=True)
    (index,) = _find(tmp_path).files
    assert index == tmp_path / "index.json"
    assert [document.text for document in read_file(index, "text")] == [f"{name}{i}" for name in "ab" for i in range(4)]
    before = fingerprint_of_text(index)
    (shard,) = (tmp_path / "a").glob("shard.*")
    os.utime(shard, ns=(1, 1))
    assert fingerprint_of_text(index) != before


def test_missing_and_wrong_files_are_all_named(tmp_path):
    (tmp_path / "a.pdf").write_text("x")
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_text("x")
    patterns = [str(tmp_path / name) for name in ("none.txt", "*.jsonl", "a.pdf", "pictures")]
    with pytest.raises(UserError) as error:
        _find(*patterns)
    for part in (
        "none.txt' names no file",
        "*.jsonl' names no file",
        "a.pdf: expected .txt, ",
        "pictures' names no file",
    ):
        assert part in str(error.value)


def test_a_fingerprint_changes_with_the_shards_of_an_index(tmp_path):
    index = write_mds(tmp_path / "mds", [{"text": "x", "id": 1}])
    before = fingerprint_of_text(index)
    assert fingerprint_of_text(index) == before
    (shard,) = (tmp_path / "mds").glob("shard.*")
    shard.write_bytes(shard.read_bytes() + b"x")
    assert fingerprint_of_text(index) != before


@pytest.mark.parametrize(
    "content",
    [
        f"{SHA256}\n{SHA256[:32]}\n",
        f"a.txt: {SHA256}\n\nb.txt: {SHA256}\n",
        f"# made by us\n#\n# on a day\n# of May\n# here\n# there\n{SHA256}  a.jsonl.zst\n",
        f"SHA256 (a.txt) = {SHA256}\n",
        f"a.txt sha1 {SHA256[:40]} 300 bytes\n",
    ],
)
def test_checksums_are_recognised_in_every_layout(tmp_path, content):
    folder = _write(tmp_path / "data", a__txt="The text.\n", files__txt=content)
    found = _find(folder)
    assert [file.name for file in found.files] == ["a.txt"]
    assert found.left_out == {"files.txt (checksums)": 1}


@pytest.mark.parametrize(
    "content", ["# a title\n\nA text.\n", f"{SHA256} " + "and a long text " * 40, "# only\n", SHA256[:30]]
)
def test_text_is_not_taken_for_checksums(tmp_path, content):
    folder = _write(tmp_path / "data", a__txt=content)
    assert [file.name for file in _find(folder).files] == ["a.txt"]


def test_leaving_out_most_of_the_bytes_is_noted(tmp_path):
    folder = _write(tmp_path / "data", a__txt="The text.\n", b__tex="x" * 9)
    assert _find(folder).notes == []
    _write(folder, b__tex="x" * 900)
    (note,) = _find(folder).notes
    assert "most of its bytes are left out, 900 (b.tex has 900)" in note


def test_a_folder_of_records_is_not_trained_on_its_checksums(tmp_path, capsys):
    data = _write(
        tmp_path / "pile",
        a__jsonl__zst=pa.compress(LINES.encode(), codec="zstd", asbytes=True),
        SHA256SUMS__txt="abc  a.jsonl.zst\n",
        README__txt="read me",
        files__txt=f"{SHA256}  a.jsonl.zst\n",
        notes__md="# notes",
        dataset_info__json="{}",
        LICENSE="Apache",
    )
    config = Config(
        workdir=str(tmp_path / "work"), teacher={"path": "x"}, corpus={"source": "files", "train": (str(data),)}
    )
    build_corpus(config)
    texts = [text for split in ("train", "validation") for text in read_texts(config, split)]
    assert sorted(texts) == sorted(f"text {number}" for number in range(40))
    printed = capsys.readouterr().err
    for part in (
        "reads 1 .jsonl.zst",
        "1 SHA256SUMS.txt (named like a file about the data)",
        "1 README.txt (named like a file",
        "1 files.txt (checksums)",
        "1 .md",
        "1 without an ending",
        "1 dataset_info.json (a description)",
    ):
        assert part in printed


def test_a_file_that_the_config_names_is_always_read(tmp_path):
    data = _write(tmp_path / "d", README__txt="read me", a__txt="text")
    assert _find(data / "README.txt").files == [data / "README.txt"]
    assert _find(data / "*.txt").files == [data / "a.txt"]
    (data / "a.txt").unlink()
    with pytest.raises(UserError, match=r"names no file with text.*left out there: 1 README\.txt"):
        _find(data)


def test_text_files_in_folders_of_records_are_reported(tmp_path):
    data = _write(tmp_path / "d", a__jsonl=LINES, b__txt="text")
    found = _find(data)
    assert found.files == [data / "a.jsonl", data / "b.txt"]
    assert any("1 .txt in folders with files of records (b.txt) are read too" in line for line in found.describe())


def test_a_file_that_is_named_twice_is_reported(tmp_path):
    data = _write(tmp_path / "d", a__txt="text")
    found = _find(data / "a.txt", data / "a.txt")
    assert len(found.files) == 1
    assert f"named more than once, and read once: {data / 'a.txt'}" in "".join(found.describe())


def test_links_are_followed_once_and_dead_ones_are_named(tmp_path):
    data = _write(tmp_path / "d", a__txt="text")
    elsewhere = _write(tmp_path / "elsewhere", b__jsonl=LINES)
    (data / "more").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(data)
    (data / "loop").symlink_to("loop")
    assert _find(data).files == [data / "a.txt", data / "more" / "b.jsonl"]
    (data / "c.jsonl").symlink_to(tmp_path / "gone.jsonl")
    (data / "d.txt").symlink_to("d.txt")
    with pytest.raises(UserError) as error:
        _find(data, data / "d.txt")
    assert f"{data / 'c.jsonl'} is a broken link" in str(error.value)
    assert f"{data / 'd.txt'} is a broken link" in str(error.value)


def test_saved_datasets_are_read_in_the_order_of_their_state(tmp_path):
    saved = _save_to_disk(tmp_path / "d", [["one", None, "two"], ["three"]])
    state = json.loads((saved / "state.json").read_text())
    state["_data_files"].reverse()
    (saved / "state.json").write_text(json.dumps(state))
    (saved / "cache-1.arrow").write_bytes(b"x")
    found = _find(saved)
    assert found.files == [saved / "state.json"]
    assert found.left_out == {".arrow that its state.json does not name": 1}
    documents = list(read_file(saved / "state.json", "text"))
    assert [(document.name.rsplit(":", 1)[1], document.text) for document in documents] == [
        ("1", "three"),
        ("2", "one"),
        ("4", "two"),
    ]
    before = finding.fingerprint_of_text(saved / "state.json")
    os.utime(saved / "data-00001-of-00002.arrow", ns=(1, 1))
    assert finding.fingerprint_of_text(saved / "state.json") != before


def test_a_saved_dataset_that_was_cut_is_refused(tmp_path):
    saved = _save_to_disk(tmp_path / "d", [["one"], ["two"] * 5])
    shard = saved / "data-00001-of-00002.arrow"
    shard.write_bytes(shard.read_bytes()[:-8])  # whole records without the end mark, which Arrow alone does not miss
    with pytest.raises(UserError, match=r"data-00001-of-00002\.arrow: this Arrow stream has no end mark"):
        list(read_file(saved / "state.json", "text"))
    shard.unlink()
    with pytest.raises(UserError, match=r"data-00001-of-00002\.arrow: this file is missing, but state\.json names it"):
        list(read_file(saved / "state.json", "text"))


def test_the_right_split_of_a_saved_dataset_is_read(tmp_path):
    for split in ("train", "validation", "test"):
        _save_to_disk(tmp_path / "d" / split, [[split]])
    _write(tmp_path / "d", dataset_dict__json='{"splits": ["train", "validation", "test"]}')
    found = _find(tmp_path / "d")
    assert found.files == [tmp_path / "d" / "train" / "state.json"]
    assert "reads the split 'train'; test, validation can be named" in "".join(found.notes)
    (held_out,) = _find(tmp_path / "d", key="corpus.validation").files
    assert held_out == tmp_path / "d" / "validation" / "state.json"
    assert _find(tmp_path / "d" / "test").files == [tmp_path / "d" / "test" / "state.json"]
    (tmp_path / "d" / "train").rename(tmp_path / "d" / "dev")
    with pytest.raises(UserError, match="has the splits dev, test, validation, and none is called 'train'"):
        _find(tmp_path / "d")


def test_the_library_itself_saves_what_is_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    texts = [f"text {number}" for number in range(50)]
    dataset = datasets.Dataset.from_dict({"text": texts, "n": list(range(50))})
    dataset.save_to_disk(str(tmp_path / "one"), num_shards=3)
    (state,) = _find(tmp_path / "one").files
    assert [document.text for document in read_file(state, "text")] == texts
    datasets.DatasetDict({"train": dataset.select(range(9, 20))}).save_to_disk(str(tmp_path / "splits"))
    (state,) = _find(tmp_path / "splits").files
    assert [document.text for document in read_file(state, "text")] == texts[9:20]


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path, monkeypatch):
    from dskd.corpus import build

    data = _write(tmp_path / "d", a__jsonl=LINES)
    config = Config(
        workdir=str(tmp_path / "work"), teacher={"path": "x"}, corpus={"source": "files", "train": (str(data),)}
    )

    def read_and_append(path, text_field):
        yield from read_file(path, text_field)
        path.write_text(LINES + LINES)

    monkeypatch.setattr(build, "read_file", read_and_append)
    with pytest.raises(UserError, match=r"a\.jsonl: changed while it was read"):
        build_corpus(config)
    assert not [path for path in (tmp_path / "work").iterdir() if not path.name.startswith(".")]
    monkeypatch.undo()
    build_corpus(config)
    assert recipe(config).inputs


@pytest.mark.skipif(not SHARED.is_dir(), reason="the inputs are in ../shared/cases, which is not there")
def test_shared_inputs_are_read_as_their_table_says():
    (zst,) = _find(SHARED / "pile").files
    assert [document.text for document in read_file(zst, "text")] == ["one"]
    (saved,) = _find(SHARED / "saved_to_disk").files
    assert [document.text for document in read_file(saved, "text")] == ["a", "b", "c"]
    assert [document.text for document in read_file(SHARED / "c4.json.gz", "text")][:1] == ["one"]
    for name, key in (("messages", "messages"), ("sharegpt", "conversations")):
        with pytest.raises(UserError, match=rf"{name}\.jsonl:1: .*this is a chat: '{key}' has 2 turns.*docs/training"):
            list(read_file(SHARED / f"{name}.jsonl", "text"))
