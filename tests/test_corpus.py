import json

import pyarrow.parquet as pq
import pytest
import torch
from tiny_models import word_tokenizer

from dskd.config import Config
from dskd.corpus import build_corpus, expand, read_file, read_texts
from dskd.errors import UserError
from dskd.sequences import build_sequences, load_sequences, pack
from dskd.wordnet import open_wordnet


def _config(tmp_path, **corpus):
    return Config(
        workdir=str(tmp_path / "work"),
        teacher={"path": "unused"},
        corpus={"source": "files", "sequence_length": 8, **corpus},
    )


def _texts(config, split):
    return list(read_texts(config, split))


def test_documents_are_split_by_content_wherever_they_stand(tmp_path):
    texts = [f"text number {index}" for index in range(200)]
    (tmp_path / "a.txt").write_text("\n\n".join(texts), encoding="utf-8")
    lines = "\n".join(json.dumps({"text": text}) for text in reversed(texts))
    (tmp_path / "b.jsonl").write_text(lines, encoding="utf-8")
    config = _config(tmp_path, train=(str(tmp_path),), validation_share=0.2)
    build_corpus(config)
    train, validation = _texts(config, "train"), _texts(config, "validation")
    assert set(train) | set(validation) == set(texts)
    assert not set(train) & set(validation)  # every text stands in both files, and on one side
    assert len(train) + len(validation) == 400
    assert 20 <= len(set(validation)) <= 60


def test_held_out_files_are_held_out_whole(tmp_path):
    (tmp_path / "train.txt").write_text("one\n\ntwo", encoding="utf-8")
    (tmp_path / "held.txt").write_text("three", encoding="utf-8")
    config = _config(tmp_path, train=(str(tmp_path / "train.txt"),), validation=(str(tmp_path / "held.txt"),))
    build_corpus(config)
    assert (_texts(config, "train"), _texts(config, "validation")) == (["one", "two"], ["three"])


def test_a_training_text_that_is_held_out_is_left_out(tmp_path):
    (tmp_path / "train.txt").write_text("one\n\ntwo\n\nthree", encoding="utf-8")
    (tmp_path / "held.txt").write_text("three\n\nfour", encoding="utf-8")
    config = _config(tmp_path, train=(str(tmp_path / "train.txt"),), validation=(str(tmp_path / "held.txt"),))
    build_corpus(config)
    assert (_texts(config, "train"), _texts(config, "validation")) == (["one", "two"], ["three", "four"])


def test_paragraphs_and_lines_become_documents_with_their_line_numbers(tmp_path):
    (tmp_path / "a.txt").write_text("one\nstill one\n\n\ntwo\n", encoding="utf-8")
    assert [(d.name.rsplit(":", 1)[1], d.text) for d in read_file(tmp_path / "a.txt", "text")] == [
        ("1", "one\nstill one"),
        ("5", "two"),
    ]
    (tmp_path / "b.jsonl").write_text('{"body": "x"}\n\n{"body": "y"}\n', encoding="utf-8")
    assert [d.text for d in read_file(tmp_path / "b.jsonl", "body")] == ["x", "y"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', r"a.jsonl:2: this line is not JSON"),
        ("a.jsonl", b'{"body": "x"}\n', r"a.jsonl:1: expected an object with a text under 'text', but it has body"),
        ("a.jsonl", b'{"text": 3}\n', r"a.jsonl:1: expected an object with a text under 'text'"),
        ("a.jsonl", b"[1]\n", r"a.jsonl:1: expected an object .* it is no object"),
        ("a.txt", b"\xff\xfe\x00", r"a.txt: this is not UTF-8 text"),
        ("a.txt", b"one\n\n\x00\x00", r"a.txt:3: this is not text"),
        ("a.jsonl", b'{"text": "\\ud800abc"}\n', r"a.jsonl:1: this is not text"),
    ],
)
def test_unreadable_text_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        list(read_file(tmp_path / name, "text"))


def test_missing_and_wrong_files_are_all_named(tmp_path):
    (tmp_path / "a.pdf").write_text("x")
    with pytest.raises(UserError) as error:
        expand([str(tmp_path / "none.txt"), str(tmp_path / "*.jsonl"), str(tmp_path / "a.pdf")], "corpus.train")
    assert "none.txt' names no file" in str(error.value)
    assert "*.jsonl' names no file" in str(error.value)
    assert "a.pdf: expected a .txt or .jsonl file" in str(error.value)


def test_an_empty_corpus_is_refused_and_leaves_nothing(tmp_path):
    (tmp_path / "a.txt").write_text("\n\n")
    config = _config(tmp_path, train=(str(tmp_path / "a.txt"),))
    with pytest.raises(UserError, match="the corpus has no train documents"):
        build_corpus(config)
    assert not list((tmp_path / "work").iterdir())


def test_packing_keeps_every_token_in_order():
    tokenizer = word_tokenizer(["a", "b", "c"])
    end, a, b, c = (tokenizer.get_vocab()[word] for word in ("<end>", "a", "b", "c"))
    tokens, lengths = pack(iter(["a b", "c", "b b b a"]), tokenizer, 4, None)
    assert tokens.tolist() == [[a, b, end, c], [end, b, b, b]]  # the rest, "a <end>", fills no sequence
    assert lengths.tolist() == [4, 4]
    assert tokens.dtype == lengths.dtype == torch.int32
    assert pack(iter(["a b", "c", "b b b a"]), tokenizer, 4, 1)[0].tolist() == [[a, b, end, c]]


def test_a_text_shorter_than_one_sequence_is_padded():
    tokenizer = word_tokenizer(["a", "b"])
    tokens, lengths = pack(iter(["a b"]), tokenizer, 8, None)
    assert tokens.shape == (1, 8)
    assert lengths.tolist() == [3]


def test_sequences_of_another_tokenizer_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text("\n\n".join(f"a b w{i}" for i in range(100)), encoding="utf-8")
    config = _config(tmp_path, train=(str(tmp_path / "a.txt"),), validation_share=0.3)
    build_corpus(config)
    build_sequences(config, word_tokenizer(["a", "b"]), "0123456789abcdef")
    sequences, _ = load_sequences(config, "train", "0123456789abcdef")
    assert sequences.batch(1, 3).input_ids.shape == (2, 8)
    with pytest.raises(UserError, match=r"different tokenizers \(fedcba987654… and 0123456789ab…\)"):
        load_sequences(config, "train", "fedcba9876543210")


@pytest.mark.slow
def test_wordnet_is_split_by_synset_and_definition(tmp_path):
    config = Config(workdir=str(tmp_path), teacher={"path": "unused"}, corpus={"source": "wordnet"})
    build_corpus(config)
    train, validation = _texts(config, "train"), _texts(config, "validation")
    assert len(train) + len(validation) == 117_659
    assert 0.03 < len(validation) / 117_659 < 0.07
    reader = open_wordnet().reader
    (found,) = [text for text in (*train, *validation) if text.startswith("happy: enjoying or showing")]
    assert "a happy smile." in found
    sides = []
    for split in ("train", "validation"):
        names = pq.read_table(config.path("corpus", f"{split}.parquet"))["document"].to_pylist()
        sides.append({reader.synset(name).definition() for name in names})
    assert not sides[0] & sides[1]
