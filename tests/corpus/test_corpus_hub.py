"""Datasets of Hugging Face: the library reads local folders here; errors name what cannot be reached."""

import json
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dskd.config import Config
from dskd.corpus.build import build_corpus, read_texts, recipe
from dskd.errors import UserError


def _config(tmp_path, **corpus):
    settings = {"source": "huggingface", "dataset": str(tmp_path / "data"), **corpus}
    return Config(workdir=str(tmp_path / "work"), teacher={"path": "unused"}, corpus=settings)


def _write_parquet(tmp_path, **splits):
    (tmp_path / "data").mkdir()
    for split, texts in splits.items():
        table = pa.table({"body": texts, "id": list(range(len(texts)))})
        pq.write_table(table, tmp_path / "data" / f"{split}-00000.parquet")


@pytest.fixture
def datasets():
    return pytest.importorskip("datasets", reason="the optional package `datasets` is not installed")


def test_the_splits_of_a_dataset_are_the_splits_of_the_corpus(tmp_path, datasets):
    _write_parquet(tmp_path, train=["one", None, "two", "", "three"], test=["four", "two"])
    config = _config(tmp_path, validation_split="test", text_field="body")
    build_corpus(config)
    assert list(read_texts(config, "train")) == ["one", "three"]  # "two" is held out
    assert list(read_texts(config, "validation")) == ["four", "two"]
    table = pq.read_table(config.path("corpus", "train.parquet"))
    assert table["document"].to_pylist() == [f"{tmp_path / 'data'}/train:{row}" for row in (0, 4)]


def test_without_a_held_out_split_a_share_of_the_documents_is_held_out(tmp_path, datasets):
    (tmp_path / "data").mkdir()
    texts = [f"text {index}" for index in range(300)]
    lines = "".join(f"{json.dumps({'text': text, 'id': 1})}\n" for text in texts)
    (tmp_path / "data" / "train.jsonl").write_text(lines, encoding="utf-8")
    config = _config(tmp_path, validation_share=0.2)
    build_corpus(config)
    train, validation = list(read_texts(config, "train")), list(read_texts(config, "validation"))
    assert sorted(train + validation) == sorted(texts)
    assert 30 <= len(validation) <= 90
    before = recipe(config)
    (tmp_path / "data" / "train.jsonl").write_text(lines * 2, encoding="utf-8")
    assert recipe(config).inputs != before.inputs


@pytest.mark.parametrize(
    ("corpus", "message"),
    [
        ({"train_split": "train", "text_field": "text"}, r"train:0: expected .* under 'text', but it has body, id"),
        ({"train_split": "dev", "text_field": "body"}, r"split 'dev' of .* cannot be read \(ValueError: "),
        ({"dataset": "no/such-data-set"}, r"split 'train' of 'no/such-data-set' cannot be read \(.*set corpus.source"),
        ({"dataset": "/no/such/folder"}, r"split 'train' of '/no/such/folder' cannot be read"),
    ],
)
def test_a_dataset_that_cannot_be_found_or_reached_is_a_user_error(tmp_path, datasets, monkeypatch, corpus, message):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    _write_parquet(tmp_path, train=["one"])
    with pytest.raises(UserError, match=message):
        build_corpus(_config(tmp_path, **corpus))
    assert not list((tmp_path / "work").iterdir())


def test_a_truncated_file_is_a_user_error(tmp_path, datasets):
    _write_parquet(tmp_path, train=["one"])
    file = tmp_path / "data" / "train-00000.parquet"
    file.write_bytes(file.read_bytes()[:-30])
    with pytest.raises(UserError, match=r"split 'train' of .* cannot be read"):
        build_corpus(_config(tmp_path, text_field="body"))


def test_without_the_package_the_message_tells_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"needs the package `datasets`.*pip install 'datasets>=4,<6'"):
        build_corpus(_config(tmp_path))
