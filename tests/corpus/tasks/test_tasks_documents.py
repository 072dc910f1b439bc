"""Training splits as documents: a quarter of them, nothing that is evaluated on, and nothing on both sides."""

import json

import pytest
import torch
from stages import build_sequences_of
from task_files import DATA, PLACES
from tiny_models import save_model, word_tokenizer

from dskd.config import Config
from dskd.corpus.build import build_corpus, read_continuation_tokens, read_texts, recipe
from dskd.corpus.sequences import load_sequences
from dskd.corpus.tasks.benchmarks import BENCHMARKS, Example
from dskd.corpus.tasks.documents import split
from dskd.errors import UserError
from dskd.models.running.frozen import load_frozen
from dskd.shards.continuations import Continuer


def _config(tmp_path, *, teacher=None, sequence_length=128, tasks=tuple(PLACES), **settings):
    return Config(
        workdir=str(tmp_path / "work"),
        precision="fp32",
        teacher={"path": str(teacher), "mode": "resident"} if teacher else {"train_from_scratch": {}},
        corpus={"source": "tasks", "tasks": tasks, "packing": "none", "sequence_length": sequence_length}
        | {"validation_share": 0.4},
        tasks={**PLACES, "choice_shots": 2, "train_share": 0.5, **settings},
    )


def _question_of(text):
    lines = [line for line in text.splitlines() if line.startswith(("Question: ", "Goal: "))]
    return [line.split(": ", 1)[1] for line in lines]


def test_every_prompt_is_of_a_training_split_and_both_sides_have_nothing_in_common(tmp_path):
    config = _config(tmp_path)
    build_corpus(config)
    train, validation = (list(read_texts(config, side)) for side in ("train", "validation"))
    # Half of 8, 7, 7 and 8, and 2 of each held out; of SQuAD's 9 what the passages leave that are held out.
    assert len(train) + len(validation) == 4 * 4 + 4 * 2 + 9
    assert 4 * 2 + 4 <= len(validation) <= 4 * 2 + 5
    shown = [{question for text in side for question in _question_of(text)} for side in (train, validation)]
    assert not shown[0] & shown[1]
    passages = [
        {line for text in side for line in text.splitlines() if line.startswith("Passage: ")}
        for side in (train, validation)
    ]
    assert passages[0]
    assert passages[1]
    assert not passages[0] & passages[1]
    evaluated = "".join(
        path.read_text()
        for pattern in ("arc/*-Dev.jsonl", "commonsense_qa/dev*", "piqa/valid.jsonl", "mmlu/*/*_test.csv", "squad/dev*")
        for path in DATA.glob(pattern)
        if path.name != "mc_test.csv"  # which is for training
    )
    assert "How many arches has the bridge?" in evaluated
    assert "Which of these conducts heat best?" in evaluated
    for question in shown[0] | shown[1]:
        assert question not in evaluated, question


def test_a_document_ends_where_the_answer_begins_and_shows_answers_to_others(tmp_path):
    config = _config(tmp_path, tasks=("piqa",))
    build_corpus(config)
    goals = {json.loads(line)["goal"]: line for line in (DATA / "piqa" / "train.jsonl").read_text().splitlines()}
    labels = dict(zip(goals, (DATA / "piqa" / "train-labels.lst").read_text().split(), strict=True))
    texts = list(read_texts(config, "train"))
    assert len(texts) == round(7 * 0.5)
    for text in texts:
        instruction, *shots, question = text.split("\n\n")
        assert instruction.startswith("Answer with the number")
        assert question.endswith("\nAnswer:")
        assert len(shots) == 2
        for shot in shots:
            goal, answer = shot.splitlines()[0].removeprefix("Goal: "), shot[-1]
            assert shot.splitlines()[-1] == f"Answer: {answer}"
            assert answer == labels[goal]


def test_with_examples_of_the_same_passage_a_prompt_has_one_passage(tmp_path):
    config = _config(tmp_path, tasks=("squad_v2",), squad_shots_from="same_passage")
    build_corpus(config)
    shown = [text for side in ("train", "validation") for text in read_texts(config, side)]
    assert len(shown) == 9
    assert {text.count("Passage: ") for text in shown} == {1}
    assert {text.count("Question: ") for text in shown} == {1, 2}
    for text in shown:
        *_, question = text.split("\n\n")
        assert question.endswith("\nAnswer:")
        answers = [part.rsplit("Answer: ", 1)[1] for part in text.split("\n\n") if "Answer: " in part]
        assert len(answers) == text.count("Question: ") - 1
        assert "No answer" not in answers


def test_a_split_takes_its_share_and_no_group_is_on_both_sides():
    benchmark = BENCHMARKS["squad_v2"]
    examples = [
        Example(f"{p}-{q}", f"{q}?", ("a",), passage=f"passage {p}") for p in range(50) for q in range(1 + p % 7)
    ]
    for share, held_out_share in ((0.25, 0.1), (1.0, 0.1), (0.01, 0.01)):
        options = {"train_share": share, "validation_share": held_out_share, "seed": 3}
        train, held_out, rest = split(benchmark, examples, **options)
        assert (train, held_out, rest) == split(benchmark, examples, **options)
        assert sorted([*train, *rest], key=str) == sorted(examples, key=str)
        assert set(held_out) <= set(rest)
        assert not {e.passage for e in train} & {e.passage for e in rest}
        assert not {e.passage for e in held_out} & {e.passage for e in rest if e not in held_out}
        expected = min(len(examples) * share, len(examples) - len(examples) * share * held_out_share)
        assert abs(len(train) - expected) <= 7
        assert 1 <= len(held_out) <= max(1, len(examples) * share * held_out_share) + 7
        # The order of the files does not matter.
        again = split(benchmark, sorted(examples, key=lambda e: e.name[::-1]), **options)
        assert [set(side) for side in again] == [set(train), set(held_out), set(rest)]
    assert split(benchmark, examples, train_share=0.25, validation_share=0.1, seed=4)[0] != train


def test_everything_that_affects_the_documents_is_in_the_recipe(tmp_path):
    before = recipe(_config(tmp_path))
    assert recipe(_config(tmp_path)) == before
    changes = [{"seed": 1}, {"train_share": 0.6}, {"choice_shots": 1}, {"squad_tokens": 9}, {"piqa_tokens": 1}]
    for change in (*changes, {"squad_shots_from": "same_passage"}):
        assert recipe(_config(tmp_path, **change)) != before, change
    assert recipe(_config(tmp_path, batch_size=1, limit=3)) == before


def test_too_little_data_is_a_user_error_and_leaves_nothing(tmp_path):
    config = _config(tmp_path, choice_shots=5)
    with pytest.raises(UserError, match=r"tasks.arc_challenge: a prompt shows 5 examples, but there are only 3"):
        build_corpus(config)
    assert not list((tmp_path / "work").glob("*"))


def test_the_teacher_continues_a_prompt_by_at_most_the_tokens_of_an_answer(tmp_path, world):
    """From the files to the texts that the teacher continues: 1 or 2 tokens in a choice task, up to 10 in SQuAD."""
    teacher_folder = tmp_path / "teacher"
    save_model(teacher_folder)
    values = json.loads((teacher_folder / "config.json").read_text())
    (teacher_folder / "config.json").write_text(json.dumps(values | {"max_position_embeddings": 200}))
    words = {word for path in DATA.rglob("*") if path.is_file() for word in path.read_text().split()}
    word_tokenizer(sorted(words)[:98]).save_pretrained(teacher_folder)
    config = _config(tmp_path, teacher=teacher_folder, sequence_length=200, tasks=("piqa", "squad_v2"))
    build_corpus(config)
    folder = build_sequences_of(config)
    sequences, _ = load_sequences(config, "train", folder.tokenizer_digest)
    allowed = list(read_continuation_tokens(config, "train"))
    assert sorted(set(allowed)) == [2, 10]
    assert len(sequences) == len(allowed)  # each prompt fits into a sequence
    batch = sequences.batch(0, len(sequences))
    assert batch.continuation_tokens.tolist() == allowed

    teacher = load_frozen(folder, config, world)
    extended, added = Continuer(teacher, 10, seed=1).extend(batch, 0)
    counts = extended.has_target.sum(1) - batch.has_target.sum(1) + 1
    assert added == counts.sum()
    assert (counts <= torch.tensor(allowed)).all()
    many = Continuer(teacher, 10, seed=1).draw_lengths(0, 400, torch.tensor([2, 10] * 200))
    assert set(many[::2].tolist()) == {1, 2}
    assert set(many[1::2].tolist()) == set(range(1, 11))
    fewer = Continuer(teacher, 3, seed=1).draw_lengths(0, 400, torch.tensor([2, 10] * 200))
    assert set(fewer[::2].tolist()) == {1, 2}
    assert set(fewer[1::2].tolist()) == {1, 2, 3}
    teacher.close()
