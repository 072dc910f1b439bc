"""Judges of the study from outside: pairs of words, questions of benchmarks, and senses of words."""

import pytest
import torch
from task_files import DATA

from benchmarks.quality.pairs import Pairs
from benchmarks.quality.questions import Questions
from benchmarks.quality.separation import Examples
from benchmarks.quality.settings import Settings
from benchmarks.quality.teacher import Student, Teacher, run_layers
from dskd.config.reading import load_config
from dskd.corpus.tasks.benchmarks import BENCHMARKS
from dskd.corpus.tasks.reading import read_examples
from dskd.evaluation.lexical.contexts import Context
from dskd.evaluation.lexical.states import tokenize


@pytest.fixture(scope="module")
def teacher(tiny):
    return Teacher.load(load_config(tiny))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["arc_challenge", "piqa", "commonsense_qa"])
def test_choices_are_as_likely_as_one_by_one_in_transformers(teacher, name):
    questions = Questions.read(name, str(DATA / name.removesuffix("_challenge")), teacher)
    student = Student(teacher, Settings(layers=teacher.num_layers, train_layers=1))
    states = run_layers(teacher, student.frozen, questions)
    found, expected, right, right_by_length = questions.log_likelihoods(student, states), [], [], []
    examples = read_examples(BENCHMARKS[name], str(DATA / name.removesuffix("_challenge")), "validation")
    by_row = {
        tuple(row[part == 0].tolist()): n
        for n, (row, part) in enumerate(zip(questions.input_ids, questions.parts, strict=True))
    }
    order = []
    for example in examples:
        context = teacher.tokenizer.encode(f"Question: {example.question}\nAnswer:")
        if tuple(context) not in by_row:
            continue
        order.append(by_row[tuple(context)])
        chances = []
        for choice in example.choices:
            ids = teacher.tokenizer.encode(f"Question: {example.question}\nAnswer: {choice}")
            with torch.no_grad():
                log_shares = teacher.causal_lm(torch.tensor([ids])).logits[0].log_softmax(-1)
            chances.append(sum(float(log_shares[at - 1, ids[at]]) for at in range(len(context), len(ids))))
        expected.append(chances)
        gold = BENCHMARKS[name].labels.index(example.answers[0])
        right.append(max(range(len(chances)), key=chances.__getitem__) == gold)
        by_length = [chance / len(choice) for chance, choice in zip(chances, example.choices, strict=True)]
        right_by_length.append(max(range(len(chances)), key=by_length.__getitem__) == gold)
    assert sorted(order) == list(range(len(questions.input_ids)))
    for row, chances in zip(order, expected, strict=True):
        torch.testing.assert_close(found[questions.row_of_choice == row], torch.tensor(chances), rtol=1e-4, atol=1e-3)
    measured = questions.measure(student, states)
    assert measured[name] == pytest.approx(sum(right) / len(right))
    assert measured[f"{name}_norm"] == pytest.approx(sum(right_by_length) / len(right))
    assert measured[f"{name}_n"] == len(right)


@pytest.mark.slow
def test_pairs_that_the_lexicon_has_are_measured_apart(teacher, tmp_path):
    words = [teacher.tokenizer.decode([token]) for token in range(len(teacher.tokenizer))]
    words = [word[1:] for word in words if word.startswith(" ") and word[1:].isalpha()][:9]
    path = tmp_path / "pairs.test"
    path.write_text("".join(f"{words[0]}\t{word}\t{number % 2}\n" for number, word in enumerate(words[1:])))
    known = {frozenset((words[0], words[1])), frozenset((words[2], words[0]))}
    pairs = Pairs.read([path], teacher, known)
    assert pairs.are_new.tolist() == [False, False, *[True] * 6]
    student = Student(teacher, Settings(layers=teacher.num_layers, train_layers=1))
    found = pairs.measure(student, run_layers(teacher, student.frozen, pairs))
    path.write_text("".join(path.read_text().splitlines(keepends=True)[2:]))
    alone = Pairs.read([path], teacher, ())
    expected = alone.measure(student, run_layers(teacher, student.frozen, alone))
    assert found["opposites_new"] == pytest.approx(expected["opposites"])
    assert found["opposites_new_n"] == 6
    assert set(pairs.measures) <= found.keys()
    known = {frozenset((words[0], word)) for word in words[1:]}
    assert "opposites_new" not in Pairs.read([path], teacher, known).measures


@pytest.mark.slow
def test_senses_are_told_apart_as_by_the_states_of_transformers(teacher):
    sentences = {
        "a.n.01": ["the bank of the river", "along the bank", "a steep bank was there"],
        "b.n.01": ["she works at the bank", "a bank account"],
    }
    contexts, tokens = [], []
    for synset, texts in sentences.items():
        for text in texts:
            start = text.index("bank")
            contexts.append(Context("bank", "n", synset, text, start, start + 4))
            tokens.append(tokenize(teacher.tokenizer, text, start, start + 4))
    examples = Examples.packed(contexts, tokens)
    student = Student(teacher, Settings(layers=teacher.num_layers, train_layers=1))
    found = examples.measure(student, run_layers(teacher, student.frozen, examples))
    for name, place in (("sense_separation", 0), ("sense_separation_target", -1)):
        states = []
        for each in tokens:
            at = each.last if place == 0 else each.first - 1
            with torch.no_grad():
                states.append(teacher.causal_lm.model(torch.tensor([each.input_ids])).last_hidden_state[0, at])
        cosines = torch.nn.functional.cosine_similarity(torch.stack(states)[:, None], torch.stack(states)[None], dim=-1)
        same = [cosines[0, 1], cosines[0, 2], cosines[1, 2], cosines[3, 4]]
        different = [cosines[one, other] for one in range(3) for other in (3, 4)]
        wins = [(a > b).float() + 0.5 * (a == b).float() for a in same for b in different]
        assert found[name] == pytest.approx(float(torch.stack(wins).mean()), abs=1e-6)
    assert found["sense_separation_n"] == 1
