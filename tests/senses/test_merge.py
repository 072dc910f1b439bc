"""Merging sense dictionaries, against results computed by hand."""

import pytest
import torch
from config_files import write_config
from small_dictionaries import all_vectors, save_dictionary
from tiny_models import SHAPE, save_model
from torch.nn import functional as F

from dskd.artifacts.building import build_artifact
from dskd.artifacts.manifest import Recipe
from dskd.config.reading import load_config
from dskd.errors import UserError
from dskd.lexicon.build import build_lexicon
from dskd.lexicon.relations import load_lexicon
from dskd.models.files.folder import find_teacher
from dskd.senses.dictionary import FILE, load_dictionary
from dskd.senses.entries import build_entries
from dskd.senses.merge import merge_dictionaries

V, D = SHAPE["vocab_size"], SHAPE["hidden_size"]
FEW, MANY, ONE_SIDE = 10, 11, 12  # tokens


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    """Two dictionaries with some senses for three tokens, and the merged one: (config, first, second)."""
    folder = tmp_path_factory.mktemp("merge")
    save_model(folder / "teacher")
    (folder / "own.tsv").write_text(f"w{FEW}\tsynonym\tw{MANY} w{ONE_SIDE}\n", encoding="utf-8")
    settings = {
        "workdir": str(folder / "work"),
        "teacher": {"path": str(folder / "teacher")},
        "lexicon": {"wordnet": False, "tsv": [str(folder / "own.tsv")]},
        "senses": {"k": 3, "path": str(folder / "merged")},
    }
    write_config(folder / "config.yaml", settings)
    config = load_config(folder / "config.yaml")
    build_lexicon(config)
    vocabulary = find_teacher(config).tokenizer.get_vocab()
    ids = {word: vocabulary[f"w{word}"] for word in (FEW, MANY, ONE_SIDE)}
    # MANY: three pairs of almost equal rows, with very different weights.
    near = torch.eye(D)[:3].repeat_interleave(2, dim=0) * 10 + torch.randn(6, D, generator=_seed(0)) / 100
    one = {ids[FEW]: (torch.ones(1, D), [4]), ids[MANY]: (near[0::2], [1, 100, 7])}
    two = {ids[FEW]: (-torch.ones(2, D), [2, 3]), ids[MANY]: (near[1::2], [3, 1, 7]), ids[ONE_SIDE]: (near[:1], [9])}
    for name, senses in (("one", one), ("two", two)):
        _write(config, folder / name, senses)
    merge_dictionaries(config, [folder / "one", folder / "two"], folder / "merged")
    return config, ids, one, two


def test_rows_that_fit_are_kept_with_their_counts(merged):
    config, ids, one, two = merged
    vectors, counts = _senses(config, ids[FEW])
    assert torch.equal(vectors, torch.cat([one[ids[FEW]][0], two[ids[FEW]][0]]))
    assert counts == [4, 2, 3]
    vectors, counts = _senses(config, ids[ONE_SIDE])
    assert torch.equal(vectors, two[ids[ONE_SIDE]][0].bfloat16().float())
    assert counts == [9]


def test_rows_beyond_k_become_means_by_weight(merged):
    config, ids, one, two = merged
    vectors, counts = _senses(config, ids[MANY])
    (first, first_counts), (second, second_counts) = one[ids[MANY]], two[ids[MANY]]
    weights = torch.tensor([first_counts, second_counts]).unsqueeze(-1)
    rows = torch.stack([first.bfloat16().float(), second.bfloat16().float()])
    expected = (rows * weights).sum(0) / weights.sum(0)
    order = torch.cdist(expected, vectors).argmin(-1)
    assert sorted(order.tolist()) == [0, 1, 2]
    torch.testing.assert_close(vectors[order], expected, rtol=1e-2, atol=1e-2)
    assert [counts[index] for index in order] == [4, 101, 14]


def test_spans_are_composed_of_the_merged_tokens(merged):
    config, ids, *_ = merged
    many, _ = _senses(config, ids[MANY])
    (only,), _ = _senses(config, ids[ONE_SIDE])
    vectors, counts = _senses(config, V)  # the first entry after the tokens
    torch.testing.assert_close(vectors, (many + only) / 2, rtol=1e-2, atol=1e-2)
    assert sum(counts) == 119 + 3 * 9


def test_the_manifest_of_a_merged_dictionary_names_its_inputs(merged):
    config, *_ = merged
    _, manifest = load_dictionary(config)
    assert set(manifest.inputs) == {"lexicon", "merged 0", "merged 1"}
    assert manifest.teacher == find_teacher(config).digest


def test_every_dictionary_that_cannot_be_merged_is_named_at_once(merged, tmp_path):
    config, ids, *_ = merged
    _write(config, tmp_path / "other teacher", {ids[FEW]: (torch.ones(1, D), [1])}, teacher="another")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(UserError) as refused:
        merge_dictionaries(config, [tmp_path / "other teacher", tmp_path / "nothing"], tmp_path / "out")
    assert "made with different teachers" in str(refused.value)
    assert "there is no sense dictionary here" in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_not_a_dictionary_is_not_overwritten(merged, tmp_path):
    config, *_ = merged
    (tmp_path / "precious").mkdir()
    folders = [config.path("..", "one"), config.path("..", "two")]
    with pytest.raises(UserError, match="is not a sense dictionary"):
        merge_dictionaries(config, folders, tmp_path / "precious")
    with pytest.raises(UserError, match="is not a sense dictionary"):  # nor is another artifact
        merge_dictionaries(config, folders, config.path("lexicon"))
    assert load_lexicon(config)
    with pytest.raises(UserError, match="is one of the dictionaries"):
        merge_dictionaries(config, folders, folders[0])
    with pytest.raises(UserError, match="two or more"):
        merge_dictionaries(config, folders[:1], tmp_path / "out")


def _seed(seed):
    return torch.Generator().manual_seed(seed)


def _write(config, folder, senses, teacher=None):
    source = find_teacher(config)
    recipe = Recipe("senses", {}, {}, teacher or source.digest, source.tokenizer_digest)
    entries, _ = build_entries(load_lexicon(config), source.tokenizer, V)
    sizes = torch.tensor([len(senses[token][1]) if token in senses else 0 for token in range(entries.num_entries)])
    tokens = sorted(senses)
    vectors = torch.cat([senses[token][0] for token in tokens])
    counts = torch.tensor([count for token in tokens for count in senses[token][1]])
    with build_artifact(folder, recipe) as building:
        save_dictionary(building.folder / FILE, vectors, counts, F.pad(sizes.cumsum(0), (1, 0)), entries)


def _senses(config, entry):
    dictionary, _ = load_dictionary(config)
    rows = slice(*dictionary.entry_offsets[entry : entry + 2].tolist())
    return all_vectors(dictionary)[rows].float(), dictionary.counts[rows].tolist()
