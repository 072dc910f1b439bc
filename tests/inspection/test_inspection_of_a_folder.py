"""The inspections of work directories made by hand: one with a lexicon only, and one that has everything."""

import pytest
import torch
from config_files import write_config
from small_dictionaries import save_dictionary
from tiny_models import save_model

from dskd.errors import UserError
from dskd.inspection.artifacts import open_teacher
from dskd.inspection.lexicon import inspect_lexicon
from dskd.inspection.word import format_word, inspect_word
from dskd.lexicon.relations import load_lexicon
from dskd.senses.entries import build_entries


@pytest.fixture
def lexicon_only(tmp_path, dskd):
    """Runs `dskd` with a work directory that has only a lexicon."""
    (tmp_path / "own.tsv").write_text("big\tsynonym\tlarge\nbig\tantonym\tsmall\nbig\tsynonym\tbig\n", encoding="utf-8")
    (tmp_path / "more.tsv").write_text("big\tsynonym\tlarge\nbig\tsynonym\tvery large\n", encoding="utf-8")
    config = {
        "workdir": str(tmp_path / "work"),
        "teacher": {"train_from_scratch": {}},
        "lexicon": {"wordnet": False, "tsv": [str(tmp_path / "own.tsv"), str(tmp_path / "more.tsv")]},
    }
    write_config(tmp_path / "config.yaml", config)

    def run(*arguments):
        return dskd(*arguments, "--config", tmp_path / "config.yaml")

    assert run("lexicon")[0] == 0
    return run


def test_a_lexicon_is_counted_by_source_without_a_teacher(lexicon_only):
    code, out, _ = lexicon_only("inspect", "lexicon")
    assert code == 0
    rows = [line.split() for line in out.splitlines()]
    assert ["own.tsv", "2", "2"] in rows
    assert ["more.tsv", "4", "0"] in rows
    assert ["all,", "each", "pair", "once", "4", "2"] in rows
    assert ["self-pairs", "1"] in rows
    assert "no coverage of the vocabulary: " in out
    assert "make it with `python launcher/pipeline.py --config FILE --until teacher`" in out


def test_a_word_shows_its_relations_with_all_sources_without_a_teacher(lexicon_only):
    code, out, _ = lexicon_only("inspect", "word", "big")
    assert code == 0
    rows = [line.split() for line in out.splitlines()]
    assert ["synonym", "large", "more.tsv,", "own.tsv"] in rows
    assert ["synonym", "very", "large", "more.tsv"] in rows
    assert ["antonym", "small", "own.tsv"] in rows
    assert "no tokens and senses: " in out
    assert lexicon_only("inspect", "word", "very large")[0] == 0


def test_an_unknown_word_gets_near_spellings(lexicon_only):
    code, _, err = lexicon_only("inspect", "word", "lagre")
    assert code == 2
    assert "'lagre' is not in the lexicon; near spellings: large" in err


def test_a_missing_artifact_is_refused_with_the_command_that_makes_it(lexicon_only):
    code, _, err = lexicon_only("inspect", "senses")
    assert code == 2
    assert "there is no sense dictionary here; make it with `deepspeed launcher/build_senses.py --config FILE`" in err
    code, _, err = lexicon_only("inspect", "plot", "big")
    assert code == 2
    assert "there is no teacher here; make it with `python launcher/pipeline.py --config FILE --until teacher`" in err


def test_wrong_arguments_are_refused_with_the_right_ones(lexicon_only):
    for words, message in (
        (
            ("word", "big", "small"),
            "inspect word takes exactly one WORD (quote one with a space in it); found big, small",
        ),
        (("word", " "), "an empty text is not a word"),
        (("plot",), "inspect plot takes one WORD or more; found none"),
        (("senses", "big"), "inspect senses takes no word"),
    ):
        code, out, error = lexicon_only("inspect", *words)
        assert (code, out) == (2, "")
        assert message in error
    code, _, error = lexicon_only("inspect", "word", "big", "--neighbours", "-1")
    assert code == 2
    assert "expected a whole number, 0 or more, found '-1'" in error


def test_a_word_of_a_hand_made_work_directory(tmp_path):
    """Every number of the report can be read off the files that are written here."""
    from dskd.artifacts.building import build_artifact
    from dskd.artifacts.manifest import Recipe, read_manifest
    from dskd.config.reading import load_config
    from dskd.lexicon.build import build_lexicon

    save_model(
        tmp_path / "teacher",
        words=[*["big", "large", "huge", "small", "of", "very", "the", "size", "x2y", "tiny"], "Big"],
    )
    (tmp_path / "own.tsv").write_text("big\tsynonym\tvery large\nbig\tantonym\tsmall\n", encoding="utf-8")
    settings = {
        "workdir": str(tmp_path / "work"),
        "teacher": {"path": str(tmp_path / "teacher")},
        "lexicon": {"wordnet": False, "tsv": [str(tmp_path / "own.tsv")]},
        "senses": {"surface_forms": ["capitalized"]},
    }
    write_config(tmp_path / "config.yaml", settings)
    config = load_config(tmp_path / "config.yaml")
    build_lexicon(config)
    teacher = open_teacher(config)
    ids = teacher.tokenizer.get_vocab()
    entries, facts = build_entries(
        load_lexicon(config), teacher.tokenizer, teacher.vocab_size, config.senses.surface_forms
    )
    rows_of = {ids["big"]: [[0, 0], [12, 0]], ids["small"]: [[0, 5]], teacher.vocab_size: [[12, 1], [0, -2]]}
    vectors = torch.zeros(5, teacher.folder.load_config().hidden_size)
    vectors[:, :2] = torch.tensor([row for entry in sorted(rows_of) for row in rows_of[entry]]).float()
    sizes = torch.tensor([len(rows_of.get(entry, ())) for entry in range(entries.num_entries)])
    recipe = Recipe(
        "senses",
        {"lexicon": read_manifest(config.path("lexicon"), "lexicon", made_by="").digest},
        {"surface_forms": ["capitalized"]},
        teacher=teacher.folder.digest,
        tokenizer=teacher.folder.tokenizer_digest,
    )
    with build_artifact(config.path("senses"), recipe) as building:
        offsets = torch.nn.functional.pad(sizes.cumsum(0), (1, 0))
        save_dictionary(
            building.folder / "senses.safetensors", vectors, torch.tensor([7, 3, 4, 1, 1]), offsets, entries
        )
        building.facts.update(facts, synonym_pairs_with_senses=1, antonym_pairs_with_senses=2)

    report = inspect_word(config, "big")
    assert [(r.relation, r.word, r.sources, r.tokens, r.senses) for r in report.related] == [
        ("synonym", "very large", ("own.tsv",), 2, 2),
        ("antonym", "small", ("own.tsv",), 1, 1),
    ]
    assert (report.pieces, report.tokens) == (("big",), (ids["big"],))
    assert report.head == "a usable head: 1 synonym and 1 antonym in the sense dictionary"
    assert report.forms == (("capitalized", ids["Big"]),)
    assert [(sense.row, sense.count, sense.neighbours, sense.contexts) for sense in report.senses] == [
        (0, 7, (("very large", 2.0, "synonym"), ("small", 5.0, "antonym")), ()),
        (1, 3, (("very large", 1.0, "synonym"), ("small", 13.0, "antonym")), ()),
    ]
    assert len(report.notes) == 1  # the note that there are no shards
    text = format_word(report)
    assert "    near: very large 2.00 (synonym), small 5.00 (antonym)" in text
    assert f"  also a head when capitalized (token {ids['Big']})" in text

    of_span = inspect_word(config, "very large", neighbours=1)
    assert of_span.head == "no usable head: it is 2 tokens, and a head must be one"
    assert [(sense.row, sense.neighbours) for sense in of_span.senses] == [
        (3, (("big", 1.0, ""),)),
        (4, (("big", 2.0, ""),)),
    ]
    # A word that is not in the lexicon and has no sense.
    with pytest.raises(UserError, match=r"'tiny' is not in the lexicon, and has no senses of its own: .* 1 token"):
        inspect_word(config, "tiny")
    # Without a dictionary of these surface forms, the same numbers are computed from the lexicon.
    built, other = inspect_lexicon(config), inspect_lexicon(load_config(tmp_path / "config.yaml", ["seed=9"]))
    assert built == other
    assert built.coverage.usable == {"synonym": 2, "antonym": 4}  # big and Big are both heads, and neighbours of small
    plain = inspect_lexicon(load_config(tmp_path / "config.yaml", ["senses.surface_forms=[]"]))
    assert plain.coverage.usable == {"synonym": 1, "antonym": 2}
    assert plain.coverage.with_senses is None
