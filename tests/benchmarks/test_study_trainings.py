"""Trainings of the study of good students, and the measures of what they trained."""

import dataclasses

import pytest
import torch
from tiny_work import BEFORE_TRAINING, TINY, copy_work

from benchmarks.quality.arms import BY_NAME, TUNING_SEED
from benchmarks.quality.measures import measure
from benchmarks.quality.results import (
    read_results,
)
from benchmarks.quality.senses import SenseInputs, nearer_to_antonyms, nearest_rows, sense_rows, with_random_words
from benchmarks.quality.settings import Settings
from benchmarks.quality.teacher import Student, Teacher, lower_states, run_layers
from benchmarks.quality.terms import entropies
from benchmarks.quality.text import Words, load_text, parts_of
from benchmarks.quality.training import Material, _optimizers, build_head, train
from benchmarks.quality.trainings import (
    Runner,
    Training,
)
from dskd.config import LossConfig
from dskd.config.reading import load_config
from dskd.errors import UserError
from dskd.lexicon.wordnet import open_wordnet
from dskd.senses.dictionary import load_dictionary, map_vectors
from dskd.shards.annotate import annotate
from dskd.shards.schema import ANTONYM_ROWS, OWN_ROWS, SYNONYM_ROWS
from dskd.students.student import build_student
from dskd.training.data.positions import SensePositions


@pytest.fixture(scope="module")
def stored(tiny, world, tmp_path_factory):
    """The config of a work directory whose shards have the teacher's states."""
    annotation = {**TINY["annotation"], "teacher_top_n": 0, "store": ["teacher_states", "trunk_states"]}
    student = {"layers": 3, "train_layers": 1}
    settings = {**TINY["train"], "global_batch_size": 4, "micro_batch_size": 4, "num_workers": 0, "steps": 3}
    path = copy_work(
        tiny, tmp_path_factory.mktemp("study"), *BEFORE_TRAINING, annotation=annotation, student=student, train=settings
    )
    build_student(load_config(path))
    annotate(load_config(path), world)
    return load_config(path)


@pytest.fixture(scope="module")
def teacher(stored):
    return Teacher.load(stored)


@pytest.fixture(scope="module")
def material(stored, teacher):
    text = load_text(stored, "train", teacher)
    dictionary, _ = load_dictionary(stored)
    vectors = torch.from_numpy(map_vectors(dictionary.path).copy()).view(torch.bfloat16)
    entropy = torch.zeros(text.input_ids.shape)
    entropy[text.loss_mask] = entropies(text.teacher_states[text.loss_mask], teacher.output_matrix)
    return Material(text, text.trunk_states, Words.of(dictionary, teacher, text), entropy, dictionary, vectors)


@pytest.mark.slow
def test_states_computed_here_are_those_that_annotation_stored(stored, teacher, material):
    text = material.text
    trunk = run_layers(teacher, tuple(range(text.trunk_depth)), text)
    last = run_layers(teacher, tuple(range(text.trunk_depth, teacher.num_layers)), text, trunk, with_norm=True)
    at = text.loss_mask
    torch.testing.assert_close(trunk[at], text.trunk_states[at], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(last[at], text.teacher_states[at], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("ends", [(3, 6, 13, 18, 22), (6, 17, 20, 21), (4, 9, 14, 18), (1, 14, 15)])
def test_documents_are_in_one_part_only(material, ends):
    documents = torch.bucketize(torch.arange(24), torch.tensor(ends), right=True).view(6, 4)
    starts = torch.ones(6, 4, dtype=torch.bool)  # also where a sequence begins with the rest of a document
    starts[:, 1:] = documents.diff(dim=-1) != 0
    parts = parts_of(dataclasses.replace(material.text, document_starts=starts))
    found = [set(documents[parts[name]].flatten().tolist()) for name in ("validation", "test")]
    assert all(found)
    assert not found[0] & found[1]


_SETTINGS = Settings(layers=3, train_layers=1, batch_size=4, learning_rate=3e-4, epochs=0.5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"sense_weight": 1.0, "position_share": 0.5},
        {"sense_weight": 1.0, "sense_form": "distribution", "hidden_weight": 1.0},
        {"sense_weight": 1.0, "sense_at": "reading", "sense_words": "random"},
        {"sense_weight": 0.1, "sense_at": "middle", "train_layers": 2, "keep": "first"},
        {"sense_weight": 0.1, "synonym_weight": 0.0, "sense_own": False, "relative_margin": 1.0, "antonyms": "nearer"},
        {"lexical_divergence": 1.0, "synonym_targets": 0.2, "weights": "entropy"},
        {"optimizer": "muon", "weights": "senses", "decay": "linear", "train_norm": True},
        {"keep": "first", "train_head": True, "train_layers": 2},
    ],
)
def test_a_student_comes_nearer_to_its_teacher(stored, teacher, material, tmp_path, changes):
    settings = dataclasses.replace(_SETTINGS, **changes)
    held_out = load_text(stored, "validation", teacher)
    at = parts_of(held_out)["test"]
    student = Student(teacher, settings)
    lower = lower_states(teacher, student.frozen, held_out, tmp_path)

    def measured():
        with torch.no_grad():
            states = student(lower[at], held_out.position_ids[at], held_out.attention_mask(at))
        matrices = student.output_matrix.detach(), teacher.output_matrix
        return measure(states, *matrices, held_out, at, material.words)

    before = measured()
    states = lower_states(teacher, student.frozen, material.text, tmp_path)
    cost = train(student, dataclasses.replace(material, states=states), settings, seed=0)
    assert cost.steps == round(len(material.text) * 0.5 / 4)
    assert measured()["kl"] < before["kl"]
    frozen = [parameter for name, parameter in student.named_parameters() if name not in student.trained()]
    assert all(parameter.grad is None for parameter in frozen)


@pytest.mark.slow
def test_places_of_sense_terms_are_those_that_the_product_draws_for_a_sequence(material):
    text, settings, seed = material.text, Settings(sense_weight=1.0, batch_size=1), 3
    inputs = SenseInputs(text, material.dictionary, material.vectors, settings, seed)
    rule = SensePositions.of(LossConfig(), seed)
    found = []
    for row in (2, 5):
        order, _, (senses,) = inputs.of_step(torch.tensor([row]), text.loss_mask[[row]], step=row, epoch=1)
        assert order.tolist() == [row]
        sample = {name: rows[row].numpy() for name, rows in text.rows.items()}
        relation, own = rule.draw(sample | {"loss_mask": text.loss_mask[row].numpy()}, row, 1)
        assert senses["own_positions"].tolist() == own.tolist()
        assert senses["relation_positions"].tolist() == relation.tolist()
        of_first = rule.draw(sample | {"loss_mask": text.loss_mask[row].numpy()}, 0, 1)[1]
        found.append(own.tolist() != of_first.tolist())
    assert any(found)
    # Several in a step, one of them twice: each keeps its mask.
    chosen = torch.tensor([7, 2, 5, 2])
    mask = text.loss_mask[chosen] & (torch.arange(text.input_ids.shape[1]) % 2 == 0)
    order, masks, _ = inputs.of_step(chosen, mask, 0, 0)
    assert sorted(order.tolist()) == [2, 2, 5, 7]
    assert all(masks[place].equal(mask[chosen.tolist().index(row)]) for place, row in enumerate(order.tolist()))


@pytest.mark.slow
def test_a_push_alone_is_drawn_at_positions_with_antonyms(material):
    text = material.text
    has_antonyms = text.rows[ANTONYM_ROWS][..., 0] >= 0
    assert not has_antonyms.equal(text.lexical)
    rows = sense_rows(text, material.dictionary, BY_NAME["push"].look_settings())
    lexical = (rows[SYNONYM_ROWS][..., 0] >= 0) | (rows[ANTONYM_ROWS][..., 0] >= 0)
    assert lexical.equal(has_antonyms)
    rows = sense_rows(text, material.dictionary, BY_NAME["antonyms"].look_settings())
    assert rows[SYNONYM_ROWS].equal(text.rows[SYNONYM_ROWS])


@pytest.mark.slow
def test_numbers_of_senses_are_exchanged_among_words_with_senses(stored, teacher, material):
    words, tokenizer, reader = material.words, teacher.tokenizer, open_wordnet().reader
    has_senses = torch.zeros(len(words.senses), dtype=torch.bool)
    for token in range(len(tokenizer)):
        word = tokenizer.decode([token])
        has_senses[token] = word.startswith(" ") and word[1:].isalpha() and bool(reader.synsets(word[1:].lower()))
    assert has_senses.any() and not has_senses.all()
    assert (words.senses_of_others[~has_senses] == 1).all()
    one, other = (each[has_senses].sort().values for each in (words.senses, words.senses_of_others))
    assert one.equal(other)


@pytest.mark.slow
def test_muon_leaves_norms_to_adamw_at_its_own_rate(teacher, material):
    settings = dataclasses.replace(_SETTINGS, optimizer="muon", muon_rate=0.01, train_norm=True, warmup=0.0)
    student = Student(teacher, settings)
    muon, adamw = _optimizers(student.trained(), settings)
    assert [group["lr"] for group in muon.param_groups] == [0.01]
    assert [group["lr"] for group in adamw.param_groups] == [settings.learning_rate]
    assert all(each.ndim == 1 for each in adamw.param_groups[0]["params"])
    before = {name: value.detach().clone() for name, value in student.trained().items()}
    still = dataclasses.replace(settings, muon_rate=0.0)
    states = lower_states(teacher, student.frozen, material.text, None)
    train(student, dataclasses.replace(material, states=states), still, seed=0)
    moved = {name: not value.equal(before[name]) for name, value in student.trained().items()}
    assert all(is_moved == (before[name].ndim == 1) for name, is_moved in moved.items())


@pytest.mark.slow
def test_a_training_that_diverges_is_recorded_and_not_tried_again(stored, tmp_path, capsys):
    path = tmp_path / "results.jsonl"
    runner = Runner(stored, "toy", path)
    name = "batch, equal tokens"
    arm = dataclasses.replace(BY_NAME[name], changes={"layers": 3, "train_layers": 1, "learning_rate": 1e30})
    training = Training("tune", arm, TUNING_SEED, 4, arm.settings({}, 4))
    runner._train(training)
    (result,) = read_results(path)
    assert result.measures["kl"] == float("inf")
    assert result.settings == training.settings and result.steps
    assert "it diverged (the loss of step" in capsys.readouterr().err
    assert result.source == Runner(stored, "toy", path)._source
    assert result.source["tokens"] == load_text(stored, "train", runner._teacher).input_ids.numel()
    other = dataclasses.replace(result, source=result.source | {"digest": "another"})
    path.write_text(other.to_json() + "\n")
    with pytest.raises(UserError, match="of another text, teacher or sense dictionary"):
        Runner(stored, "toy", path)


@pytest.mark.slow
def test_what_is_kept_of_a_text_has_the_teacher_in_its_name(teacher, material, tmp_path):
    for digest in ("a" * 64, "b" * 64):
        text = dataclasses.replace(material.text, teacher=digest)
        lower_states(teacher, (1,), text, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.slow
def test_the_teacher_has_no_divergence_from_itself(stored, teacher, material):
    held_out = load_text(stored, "validation", teacher)
    at = parts_of(held_out)["test"]
    matrix = teacher.output_matrix
    found = measure(held_out.teacher_states[at], matrix, matrix, held_out, at, material.words)
    assert found["kl"] == pytest.approx(0, abs=1e-6)
    assert found["agreement"] == 1


@pytest.mark.slow
def test_rows_found_here_are_those_that_annotation_stored(material):
    text, at = material.text, material.text.lexical
    found = nearest_rows(text, material.dictionary, at, text.rows[OWN_ROWS].shape[-1])
    for name, values in (
        (OWN_ROWS, found.own_rows),
        (SYNONYM_ROWS, found.synonym_rows),
        (ANTONYM_ROWS, found.antonym_rows),
    ):
        assert (values == text.rows[name][at]).float().mean() > 0.99, name  # states differ in their last bits


@pytest.mark.slow
def test_random_words_replace_synonyms_and_antonyms_and_nothing_else(material):
    text, dictionary = material.text, material.dictionary
    rows = sense_rows(text, dictionary, Settings(sense_words="random"))
    assert rows[OWN_ROWS].equal(text.rows[OWN_ROWS])
    entry_of_row = torch.arange(dictionary.entries.num_entries).repeat_interleave(dictionary.senses_per_entry)
    exchanged = with_random_words(dictionary)
    for name, relation in ((SYNONYM_ROWS, "synonym"), (ANTONYM_ROWS, "antonym")):
        assert (rows[name][..., 0] >= 0).equal(text.rows[name][..., 0] >= 0)
        before, after = (each.entries.neighbours(relation) for each in (dictionary, exchanged))
        with_rows = dictionary.senses_per_entry[before.values] > 0
        assert (before.values != after.values).equal(with_rows)
        assert with_rows.equal(dictionary.senses_per_entry[after.values] > 0)
        for sequence, position in (rows[name][..., 0] >= 0).nonzero().tolist():
            target = int(text.labels[sequence, position])
            found = [int(entry_of_row[row]) for row in rows[name][sequence, position].tolist() if row >= 0]
            own = {target} if name == SYNONYM_ROWS else set()  # a word's own rows compete with its synonyms'
            assert set(found) <= set(after.of(target)) | own


@pytest.mark.slow
def test_antonyms_are_nearer_where_plain_distances_say_so(material):
    text, dictionary = material.text, material.dictionary
    vectors = material.vectors.float()
    found = nearer_to_antonyms(text, dictionary)

    def nearest(entries, state):
        rows = [row for entry in entries for row in dictionary.rows_of(entry)]
        return min((float((state - vectors[row]).square().sum()) for row in rows), default=None)

    relations = [dictionary.entries.neighbours(relation) for relation in ("synonym", "antonym")]
    kinds = set()
    for sequence, position in (text.rows[ANTONYM_ROWS][..., 0] >= 0).nonzero().tolist():
        target, state = int(text.labels[sequence, position]), text.teacher_states[sequence, position]
        synonym, antonym = (nearest(relation.of(target), state) for relation in relations)
        is_nearer = synonym is not None and antonym < synonym
        assert bool(found[sequence, position]) == is_nearer
        kinds.add(is_nearer)
    assert kinds == {True, False}
    assert not found[text.rows[ANTONYM_ROWS][..., 0] < 0].any()
    rows = sense_rows(text, dictionary, Settings(antonyms="nearer", sense_own=False))
    assert (rows[ANTONYM_ROWS][..., 0] >= 0).equal(found)
    assert (rows[OWN_ROWS] == -1).all()


@pytest.mark.slow
def test_after_a_word_is_read_its_rows_are_at_the_next_position_with_a_state(material):
    """The rows are those of the token that is read at the position; no position is in another sequence."""
    text, settings = material.text, Settings(sense_weight=1.0, sense_at="reading")
    dictionary = material.dictionary
    inputs = SenseInputs(text, dictionary, material.vectors, settings, seed=0)
    chosen = torch.arange(6)
    order, _, senses = inputs.of_step(chosen, text.loss_mask[chosen], 0, 0)
    owners = torch.arange(dictionary.entries.num_entries).repeat_interleave(dictionary.senses_per_entry)
    assert len(senses) == 1
    at, rows = senses[0]["own_positions"], senses[0]["own_rows"][:, 0]
    assert len(at)
    assert text.input_ids[order].flatten()[at].equal(owners[rows])
    has_state = text.trunk_states[order].abs().sum(-1).flatten() > 0
    assert has_state[at].all()
    assert has_state[senses[0]["relation_positions"]].all()


@pytest.mark.slow
def test_a_relative_margin_is_in_the_teachers_mean_distance_to_antonyms(teacher, material):
    text, student = material.text, Student(teacher, _SETTINGS)
    searched = nearest_rows(text, material.dictionary, text.rows[ANTONYM_ROWS][..., 0] >= 0, 2).antonym_distance
    assert text.antonym_distance == pytest.approx(float(searched.mean()), rel=1e-3)
    pushed = dataclasses.replace(_SETTINGS, relative_margin=2.0)
    assert build_head(student, pushed, text).margin == pytest.approx(2 * text.antonym_distance)
    assert build_head(student, _SETTINGS, text).margin == 1


@pytest.mark.slow
def test_states_from_the_middle_are_those_of_a_student_without_the_layers_above(teacher, material):
    student = Student(teacher, dataclasses.replace(_SETTINGS, train_layers=2))
    text, at = material.text, torch.arange(2)
    states = text.trunk_states[at], text.position_ids[at], text.attention_mask(at)
    with torch.no_grad():
        last, middle = student.forward_from_middle(*states)
        expected = run_layers(teacher, student.upper[:1], _Rows(text, at), states[0], with_norm=True)
        torch.testing.assert_close(last, student(*states))
    torch.testing.assert_close(middle, expected)


class _Rows:
    """Some sequences of a text."""

    def __init__(self, text, at):
        self._text, self._at = text, at
        self.input_ids, self.position_ids = text.input_ids[at], text.position_ids[at]

    def attention_mask(self, at):
        return self._text.attention_mask(self._at[at])
