"""The command `dskd inspect`, on a work directory that the real pipeline made."""

import re
from pathlib import Path

import numpy as np
import pytest
from artifact_folders import open_dataset, update_manifest
from safetensors.torch import load_file
from tiny_work import BEFORE_TRAINING

from dskd.artifacts.hashing import hash_files
from dskd.config.reading import load_config
from dskd.inspection.lexicon import inspect_lexicon
from dskd.inspection.word import inspect_word
from dskd.lexicon.relations import load_lexicon
from dskd.models.files.folder import find_teacher
from dskd.senses.dictionary import load_dictionary
from dskd.senses.entries import build_entries, tokenize_words

pytestmark = pytest.mark.slow


def _words_with_senses(config):
    """Words of the lexicon that are one token with synonyms, antonyms and at least two senses; most senses first."""
    dictionary, _ = load_dictionary(config)
    entries, tokenizer = dictionary.entries, find_teacher(config).tokenizer
    words = sorted({relation.head for relation in load_lexicon(config) if len(relation.head) > 2})
    token_of = {
        word: ids[0] for word, ids in zip(words, tokenize_words(words, tokenizer), strict=True) if len(ids) == 1
    }
    senses = dictionary.entry_offsets.diff()
    related = (entries.synonym_offsets.diff() > 0) & (entries.antonym_offsets.diff() > 0)
    return {word: token for word, token in token_of.items() if related[token] and senses[token] > 1}


def test_a_word_is_shown_with_the_content_of_all_artifacts(tiny, dskd, tmp_path):
    config = load_config(tiny)
    word, token = next(iter(_words_with_senses(config).items()))
    work = config.path()
    before = hash_files(work)
    code, out, _ = dskd("inspect", "word", word, "--config", tiny, "--neighbours", 5, "--contexts", 2, "seed=3")
    assert code == 0
    assert hash_files(work) == before  # inspecting changes nothing

    # The relations are the lexicon's.
    lines = [line.split() for line in out.splitlines()]
    relations = [relation for relation in load_lexicon(config) if relation.head == word]
    for relation in relations:
        assert any(line[:-2] == [relation.relation, *relation.tail.split(), "own.tsv"] for line in lines if line)

    # The nearest entries are those of a brute-force search over all tokens and spans.
    tensors = load_file(work / "senses" / "senses.safetensors")
    vectors, offsets = tensors["vectors"].double().numpy(), tensors["entry_offsets"].tolist()
    report = inspect_word(config, word, neighbours=5, contexts=2)
    assert [sense.row for sense in report.senses] == list(range(offsets[token], offsets[token + 1]))
    assert [sense.count for sense in report.senses] == tensors["counts"][offsets[token] : offsets[token + 1]].tolist()
    for sense in report.senses:
        distances = np.linalg.norm(vectors - vectors[sense.row], axis=1)
        by_entry = sorted(
            distances[offsets[entry] : offsets[entry + 1]].min()
            for entry in range(len(offsets) - 1)
            if offsets[entry + 1] > offsets[entry] and entry != token
        )
        np.testing.assert_allclose([far for _, far, _ in sense.neighbours], by_entry[:5], rtol=1e-4)

    # There are as many contexts as mosaicml-streaming's own reader finds, and they show the word.
    dataset = open_dataset(work / "shards" / "train", tmp_path / "cache")
    nearest = np.concatenate([dataset[index]["sense_ids"][:, 0] for index in range(len(dataset))])
    for sense in report.senses:
        assert len(sense.contexts) == min(2, int((nearest == sense.row).sum()))
        assert all(f"«{word}»" in context for context in sense.contexts)
        assert all(context in out for context in sense.contexts)


def test_a_span_is_shown_and_other_words_without_an_entry_are_explained(tiny, dskd):
    config = load_config(tiny)
    dictionary, _ = load_dictionary(config)
    tokenizer = find_teacher(config).tokenizer
    words = sorted({relation.head for relation in load_lexicon(config)})
    spans = {tuple(t for t in row if t >= 0): e for e, row in enumerate(dictionary.entries.span_tokens.tolist())}
    has_senses = dictionary.entry_offsets.diff()[dictionary.vocab_size :] > 0
    span = next(
        word
        for word, ids in zip(words, tokenize_words(words, tokenizer), strict=True)
        if ids in spans and has_senses[spans[ids]]
    )
    code, out, _ = dskd("inspect", "word", span, "--config", tiny)
    assert code == 0
    assert re.search(r"no usable head: it is [23] tokens, and a head must be one", out)
    assert re.search(r"Senses: \d, of \d+ states\n  row \d+: ", out)
    code, _, err = dskd("inspect", "word", "xyzzyqx", "--config", tiny)
    assert code == 2
    assert re.search(
        r"'xyzzyqx' is not in the lexicon, and has no senses of its own: the tokenizer makes \d tokens", err
    )


def test_each_missing_artifact_gets_a_line(copy_of_tiny, dskd):
    config = copy_of_tiny("lexicon", "teacher", "sequences", "senses")
    word = next(iter(_words_with_senses(load_config(config))))
    for arguments, what in ((("word", word), "example contexts"), (("senses",), "share of training targets")):
        code, out, _ = dskd("inspect", *arguments, "--config", config)
        assert code == 0
        assert f"(no {what}: " in out
        assert "with `deepspeed launcher/annotate.py --config FILE`)" in out


def test_row_numbers_of_another_dictionary_are_not_looked_up(copy_of_tiny, dskd):
    config = copy_of_tiny(*BEFORE_TRAINING)
    folder = load_config(config).path("shards", "train")
    update_manifest(folder, inputs={"senses": "f" * 64})
    word = next(iter(_words_with_senses(load_config(config))))
    code, out, _ = dskd("inspect", "word", word, "--config", config)
    assert code == 0
    assert "no example contexts: " in out
    assert "made with different sense dictionaries (" in out
    assert "«" not in out


def test_the_lexicon_is_the_same_with_and_without_a_dictionary(tiny, copy_of_tiny, dskd):
    built = inspect_lexicon(load_config(tiny))
    config = load_config(copy_of_tiny("lexicon", "teacher"))
    on_the_spot = inspect_lexicon(config)
    assert built.coverage.with_senses is not None
    assert on_the_spot.coverage.with_senses is None
    for name in ("vocab_size", "whole_words", "heads", "other_heads", "unusable", "usable"):
        assert getattr(built.coverage, name) == getattr(on_the_spot.coverage, name)
    relations = load_lexicon(config)
    entries, facts = build_entries(relations, find_teacher(config).tokenizer, built.coverage.vocab_size)
    both = (entries.synonym_offsets.diff() > 0) | (entries.antonym_offsets.diff() > 0)
    assert built.coverage.heads["either"] + built.coverage.other_heads == int(both.sum())
    assert sum(built.coverage.unusable.values()) + sum(built.coverage.usable.values()) == len(relations)
    code, out, _ = dskd("inspect", "lexicon", "--config", tiny)
    assert code == 0
    assert re.search(rf"head is not one token +{facts['head_is_not_one_token']:,}\n", out)
    assert re.search(rf"tokens of the vocabulary +{built.coverage.vocab_size:,}\n", out)


def test_the_senses_are_counted_and_drawn(copy_of_tiny, dskd, tmp_path):
    config = copy_of_tiny(*BEFORE_TRAINING)
    code, out, _ = dskd("inspect", "senses", "--config", config, "--plot")
    assert code == 0
    path = Path(re.search(r"Picture: (.+)", out).group(1))
    assert path == load_config(config).path("plots", "senses.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    dataset = open_dataset(load_config(config).path("shards", "train"), tmp_path / "cache")
    samples = [dataset[index] for index in range(len(dataset))]
    targets = sum(int(sample["loss_mask"].sum()) for sample in samples)
    covered = sum(int((sample["sense_ids"][:, 0] >= 0).sum()) for sample in samples)
    assert re.search(rf"with senses +{100 * covered / targets:.1f} %", out)
    tensors = load_file(load_config(config).path("senses", "senses.safetensors"))
    sizes = tensors["entry_offsets"].diff()[: len(tensors["synonym_offsets"]) - 1]
    assert re.search(rf"\n  3 +{int((sizes == 3).sum()):,}  █", out)
    # With senses.key: target, every token that is a target has a state.
    assert "most frequent tokens without a sense" not in out


@pytest.mark.parametrize("method", ["pca", "tsne"])
def test_words_are_drawn(copy_of_tiny, dskd, method):
    config = copy_of_tiny("lexicon", "teacher", "senses")
    first, second = list(_words_with_senses(load_config(config)))[:2]
    code, out, _ = dskd(
        "inspect", "plot", first, "--config", config, second, "seed=5", "--method", method, "--neighbours", "4"
    )
    assert code == 0
    suffix = "-tsne" if method == "tsne" else ""
    path = load_config(config).path("plots", f"senses-{first}-{second}{suffix}.png")
    assert out.startswith(f"{path}: ")
    assert f"senses of {first}, {second}, and of" in out
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [file.name for file in path.parent.iterdir()] == [path.name]
