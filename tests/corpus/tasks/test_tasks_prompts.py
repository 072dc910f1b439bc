"""Prompts: their texts, their examples, and their tokens, which are those of the chat template."""

import pytest
from task_files import DATA
from tiny_models import word_tokenizer
from tokenizers.processors import TemplateProcessing

from dskd.artifacts.hashing import digest_of_json
from dskd.config import TasksConfig
from dskd.corpus.tasks.benchmarks import BENCHMARKS, Example
from dskd.corpus.tasks.prompts import Prompter, Question, digest_of, with_shots
from dskd.corpus.tasks.reading import read_examples
from dskd.errors import UserError

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('turns') }}{% endif %}"
    " <{{ m['role'] }}> {{ m['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %} <assistant> {% if date_string is not defined %}today{% endif %}{% endif %}"
)


def _examples(name, split, folder):
    return read_examples(BENCHMARKS[name], str(DATA / folder), split)


def _questions(name, folder, shots, seed=0):
    benchmark = BENCHMARKS[name]
    examples, pool = (_examples(name, split, folder) for split in (benchmark.evaluated, benchmark.shots_from))
    return list(with_shots(benchmark, examples, pool, shots, seed))


def _chat_tokenizer(*, writes_start):
    words = ["<start>", "<user>", "<assistant>", "Question:", "Answer:", "A", "B", "C", "D"]
    tokenizer = word_tokenizer(words)
    tokenizer.bos_token = "<start>"
    tokenizer.chat_template = TEMPLATE
    if writes_start:
        start = [("<start>", tokenizer.bos_token_id)]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<start> $A", special_tokens=start)
    return tokenizer


def test_without_a_template_a_prompt_is_plain():
    tokenizer = word_tokenizer(["a"])
    shot = Example("s", "Is ice cold?", ("A",), ("yes", "no"))
    question = Question(BENCHMARKS["arc_challenge"], Example("e", "Is fire cold?", ("B",), ("yes", "no")), (shot,))
    assert Prompter(tokenizer).text(question) == (
        "Answer the question with the letter of the right choice and nothing else.\n\n"
        "Question: Is ice cold?\nA. yes\nB. no\nAnswer: A\n\n"
        "Question: Is fire cold?\nA. yes\nB. no\nAnswer:"
    )


def test_every_task_has_its_own_form_of_prompt():
    prompter = Prompter(word_tokenizer(["a"]))
    piqa = prompter.text(_questions("piqa", "piqa", 0)[0])
    assert piqa.endswith("Goal: light a candle\n0. hold a match to it\n1. hold a spoon to it\nAnswer:")
    assert prompter.text(_questions("mmlu", "mmlu", 0)[0]).startswith("Answer the question about old towns with")
    squad = prompter.text(_questions("squad_v2", "squad", 1)[4])
    assert squad.endswith(
        "\n\nPassage: The ferry crosses the lake twice a day.\nQuestion: What does the ferry cost?\nAnswer:"
    )
    assert "No answer\n\nPassage: " in squad


@pytest.mark.parametrize("writes_start", [True, False])
def test_the_tokens_of_a_chat_are_those_that_the_template_gives(writes_start):
    """A tokenizer that begins every text by itself does not begin a chat twice."""
    tokenizer = _chat_tokenizer(writes_start=writes_start)
    prompter = Prompter(tokenizer)
    for question in _questions("arc_challenge", "arc", 3):
        messages = [message for shot in question.shots for message in _turns(shot)] + _turns(question.example)[:1]
        messages[0]["content"] = f"{question.benchmark.instruction}\n\n{messages[0]['content']}"
        expected = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, date_string="-", return_dict=False
        )
        prompt = prompter.prompt(question, None)
        assert prompt.input_ids == list(expected)
        assert prompt.input_ids.count(tokenizer.bos_token_id) == 1
        assert (prompt.num_shots, prompt.is_cut) == (3, False)


def _turns(example):
    choices = "".join(f"{letter}. {text}\n" for letter, text in zip("ABCDE", example.choices, strict=False))
    turn = {"role": "user", "content": f"Question: {example.question}\n{choices}Answer:"}
    return [turn, {"role": "assistant", "content": example.answers[0]}]


def test_the_date_in_a_prompt_is_always_the_same():
    tokenizer = _chat_tokenizer(writes_start=False)
    digest = Prompter(tokenizer).format
    assert digest == digest_of_json(TEMPLATE)  # evaluations made before keep theirs
    tokenizer.chat_template = "{{ strftime_now('%d/%m/%Y') }} {{ date_string }}" + TEMPLATE
    prompter = Prompter(tokenizer)
    assert prompter.request("Hi").startswith("26/07/2024 26 Jul 2024")
    assert prompter.format not in (digest, digest_of_json(tokenizer.chat_template))  # which had the day's date


def test_a_template_that_refuses_the_turns_is_a_user_error():
    tokenizer = _chat_tokenizer(writes_start=False)
    tokenizer.chat_template = "{{ raise_exception('only one turn') }}"
    with pytest.raises(UserError, match=r"chat template refuses turns .*only one turn"):
        Prompter(tokenizer).text(_questions("piqa", "piqa", 1)[0])


def test_examples_are_left_out_until_a_prompt_fits_and_then_its_beginning():
    prompter = Prompter(word_tokenizer(["a"]))
    question = _questions("squad_v2", "squad", 3)[0]
    sizes = [len(prompter.tokens(prompter.text(question, shots))) for shots in range(4)]
    assert sizes == sorted(sizes)
    for room, shots in ((sizes[3], 3), (sizes[3] - 1, 2), (sizes[1], 1), (sizes[0], 0)):
        prompt = prompter.prompt(question, room)
        assert (prompt.num_shots, prompt.is_cut, len(prompt.input_ids)) == (shots, False, sizes[shots])
        # The last examples stay.
        assert [e.question in prompt.text for e in question.shots] == [False] * (3 - shots) + [True] * shots
    cut = prompter.prompt(question, 5)
    assert cut.is_cut
    assert cut.input_ids == prompter.tokens(prompter.text(question, 0))[-5:]


def test_examples_are_a_function_of_seed_and_question():
    one = _questions("commonsense_qa", "commonsense_qa", 5)
    assert one == _questions("commonsense_qa", "commonsense_qa", 5)
    assert [q.shots for q in one] != [q.shots for q in _questions("commonsense_qa", "commonsense_qa", 5, seed=1)]
    assert len({q.shots for q in one}) > 1
    assert all(len(set(q.shots)) == 5 for q in one)
    # Later questions do not change the examples of a question.
    benchmark, pool = BENCHMARKS["commonsense_qa"], _examples("commonsense_qa", "train", "commonsense_qa")
    assert list(with_shots(benchmark, [one[2].example], pool, 5, 0)) == [one[2]]


def test_mmlu_shows_the_examples_of_its_subject_in_their_order():
    for question in _questions("mmlu", "mmlu", 5):
        dev = [e for e in _examples("mmlu", "dev", "mmlu") if e.subject == question.example.subject]
        assert list(question.shots) == dev


def test_a_prompt_never_shows_its_own_question_or_passage():
    pool = _examples("squad_v2", "train", "squad")
    for question in with_shots(BENCHMARKS["squad_v2"], pool, pool, 4, 0):
        assert question.example.passage not in {shot.passage for shot in question.shots}


def _squad(name, question, *answers, passage="The mill stands by the river, said Ann."):
    return Example(name, question, answers, passage=passage)


def test_an_example_of_the_questions_passage_is_another_answerable_one_that_does_not_give_its_answer_away():
    mill_question = _squad("1", "Where is the mill?", "by the river", "river")
    unanswerable = _squad("2", "Who built it?")
    shot = _squad("3", "Who said so?", "Ann")
    same_answer = _squad("4", "What is near?", "The river")
    longer_answer = _squad("5", "What was said?", "stands by the river")
    elsewhere = _squad("6", "Who rows?", "Tom", passage="Tom rows.")
    pool = [mill_question, unanswerable, shot, same_answer, longer_answer, elsewhere]
    shown = {
        question.example.name: [shown.name for shown in question.shots]
        for seed in range(9)
        for question in with_shots(BENCHMARKS["squad_v2"], pool, pool, 9, seed, own_passage=True)
    }
    assert shown["1"] == ["3"]
    assert shown["2"] == ["1", "3", "4", "5"]  # nothing gives away that there is no answer
    assert shown["3"] == ["1", "4", "5"]
    assert shown["4"] == shown["5"] == ["3"]
    assert shown["6"] == []  # as in the published program: no example
    one = list(with_shots(BENCHMARKS["squad_v2"], [unanswerable, mill_question], pool, 1, 0, own_passage=True))
    assert one[:1] == list(with_shots(BENCHMARKS["squad_v2"], [unanswerable], pool, 1, 0, own_passage=True))
    drawn = {
        next(with_shots(BENCHMARKS["squad_v2"], [unanswerable], pool, 1, seed, own_passage=True)).shots[0].name
        for seed in range(40)
    }
    assert drawn == {"1", "3", "4", "5"}


def test_a_passage_that_examples_share_with_the_question_is_shown_once():
    passage = "The mill stands by the river, said Ann."
    shots = (_squad("3", "Who said so?", "Ann"), _squad("4", "What stands?", "The mill"))
    question = Question(BENCHMARKS["squad_v2"], _squad("1", "Where is it?", "river"), shots)
    turns = [
        f"Passage: {passage}\nQuestion: Who said so?\nAnswer: Ann",
        "Question: What stands?\nAnswer: The mill",
        "Question: Where is it?\nAnswer:",
    ]
    assert question.plain(2).split("\n\n")[1:] == turns
    assert question.plain(1).split("\n\n")[1:] == [f"Passage: {passage}\n{turns[1]}", turns[2]]
    assert question.plain(0).split("\n\n")[1:] == [f"Passage: {passage}\n{turns[2]}"]
    chat = question.messages(2)
    assert [message["content"] for message in chat[2:]] == ["Question: What stands?\nAnswer:", "The mill", turns[2]]
    assert chat[0]["content"].count(passage) == 1
    other = Question(question.benchmark, question.example, (_squad("6", "Who rows?", "Tom", passage="Tom rows."),))
    assert other.plain(1).endswith(f"Passage: {passage}\nQuestion: Where is it?\nAnswer:")


def test_too_few_examples_are_a_user_error():
    with pytest.raises(
        UserError, match=r"tasks.mmlu: a prompt shows 6 examples about old towns, .* only 5 .*choice_shots"
    ):
        _questions("mmlu", "mmlu", 6)


def test_the_identity_of_a_task_depends_on_its_content():
    questions = _questions("piqa", "piqa", 2)
    assert digest_of(questions) == digest_of(_questions("piqa", "piqa", 2))
    assert len({digest_of(_questions("piqa", "piqa", shots)) for shots in (0, 1, 2)}) == 3
    assert digest_of(questions[1:]) != digest_of(questions)


def test_shots_and_tokens_are_the_papers():
    settings = TasksConfig()
    limits = {name: (b.shots(settings), b.new_tokens(settings)) for name, b in BENCHMARKS.items()}
    assert limits.pop("squad_v2") == (1, 10)
    assert set(limits.values()) == {(5, 2)}
    # Mistral's digits are two tokens, its letters one.
    settings = TasksConfig(choice_tokens=1, piqa_tokens=2)
    limits = {name: b.new_tokens(settings) for name, b in BENCHMARKS.items()}
    assert limits == {"arc_challenge": 1, "commonsense_qa": 1, "piqa": 2, "mmlu": 1, "squad_v2": 10}
