import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from streaming import MDSWriter
from tiny_models import word_tokenizer
from tiny_wordnet import SYNSETS, write_wordnet

from dskd.config import Config
from dskd.corpus.build import build_corpus, read_texts, recipe
from dskd.corpus.sequences import build_sequences, load_sequences
from dskd.errors import UserError


def _config(tmp_path, **corpus):
    return Config(
        workdir=str(tmp_path / "work"),
        teacher={"path": "unused"},
        corpus={"source": "files", "sequence_length": 8, **corpus},
    )


def _texts(config, split):
    return list(read_texts(config, split))


def test_documents_are_split_by_content_in_any_order(tmp_path):
    texts = [f"text number {index}" for index in range(200)]
    (tmp_path / "a.txt").write_text("\n\n".join(texts), encoding="utf-8")
    lines = "\n".join(json.dumps({"text": text}) for text in reversed(texts))
    (tmp_path / "b.jsonl").write_text(lines, encoding="utf-8")
    config = _config(tmp_path, train=(str(tmp_path),), validation_share=0.2)
    build_corpus(config)
    train, validation = _texts(config, "train"), _texts(config, "validation")
    assert set(train) | set(validation) == set(texts)
    assert not set(train) & set(validation)  # every text is in both files, and on one side
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


def test_files_of_every_kind_form_one_corpus(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    (data / "a.txt").write_text("one", encoding="utf-8")
    (data / "b.jsonl").write_text('{"text": "two"}', encoding="utf-8")
    pq.write_table(pa.table({"text": ["three", "four"]}), data / "c.parquet")
    with MDSWriter(out=str(data / "d"), columns={"text": "str"}, compression="zstd") as writer:
        writer.write({"text": "five"})
    (tmp_path / "held.txt").write_text("four\n\nsix", encoding="utf-8")
    config = _config(tmp_path, train=(str(data),), validation=(str(tmp_path / "held.txt"),))
    build_corpus(config)
    assert _texts(config, "train") == ["one", "two", "three", "five"]
    assert _texts(config, "validation") == ["four", "six"]
    before = recipe(config)
    pq.write_table(pa.table({"text": ["three", "seven"]}), data / "c.parquet")
    assert recipe(config).inputs != before.inputs


def test_an_empty_corpus_is_refused_and_leaves_nothing(tmp_path):
    (tmp_path / "a.txt").write_text("\n\n")
    config = _config(tmp_path, train=(str(tmp_path / "a.txt"),))
    with pytest.raises(UserError, match="the corpus has no train documents"):
        build_corpus(config)
    assert not list((tmp_path / "work").iterdir())


def test_sequences_of_another_tokenizer_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text("\n\n".join(f"a b w{i}" for i in range(100)), encoding="utf-8")
    config = _config(tmp_path, train=(str(tmp_path / "a.txt"),), validation_share=0.3)
    build_corpus(config)
    build_sequences(config, word_tokenizer(["a", "b"]), "0123456789abcdef")
    sequences, _ = load_sequences(config, "train", "0123456789abcdef")
    assert sequences.batch(1, 3).input_ids.shape == (2, 8)
    with pytest.raises(UserError, match=r"different tokenizers \(fedcba987654… and 0123456789ab…\)"):
        load_sequences(config, "train", "fedcba9876543210")


@pytest.mark.parametrize("has_end", [True, False])
def test_a_tokenizer_without_an_end_token_causes_a_warning(tmp_path, capsys, has_end):
    (tmp_path / "a.txt").write_text("\n\n".join(f"a b w{i}" for i in range(100)), encoding="utf-8")
    config = _config(tmp_path, train=(str(tmp_path / "a.txt"),), validation_share=0.3)
    build_corpus(config)
    tokenizer = word_tokenizer(["a", "b"])
    if not has_end:
        tokenizer.eos_token = None
    build_sequences(config, tokenizer, "0123456789abcdef")
    assert ("no token ends a document" in capsys.readouterr().err) == (not has_end)


def test_wordnet_is_split_by_synset_and_definition(tmp_path):
    """Every third synset has the definition of the one before it."""
    synsets = [(f"thing-{number}", "n", [f"thing-{number}", "a_thing"], []) for number in range(600)]
    definitions = {name: f"definition {number - (number % 3 == 2)}" for number, (name, *_) in enumerate(synsets)}
    synsets.append(("happy", "a", ["happy", "glad(ip)"], []))
    examples = 'enjoying or showing joy; "a happy smile"; "are you happy?"'
    write_wordnet(tmp_path / "dict", [*synsets, *SYNSETS], definitions | {"happy": examples})
    config = Config(
        workdir=str(tmp_path / "work"),
        teacher={"path": "unused"},
        corpus={"source": "wordnet"},
        wordnet={"path": str(tmp_path / "dict")},
    )
    build_corpus(config)
    texts = [text for split in ("train", "validation") for text in _texts(config, split)]
    assert "happy, glad: enjoying or showing joy. a happy smile. are you happy?" in texts
    sides = []
    for split in ("train", "validation"):
        names = pq.read_table(config.path("corpus", f"{split}.parquet"))["document"].to_pylist()
        sides.append([name.split(".")[0] for name in names])
    assert sorted(sides[0] + sides[1]) == sorted([*definitions, "happy", *(name for name, *_ in SYNSETS)])
    assert 0.03 < len(sides[1]) / len(texts) < 0.07
    train, validation = ({definitions[name] for name in side if name in definitions} for side in sides)
    assert not train & validation
