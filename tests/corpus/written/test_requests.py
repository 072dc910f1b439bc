"""The requests for texts, and their prompts for chat models and base models."""

import pytest
from small_teachers import CHAT_TEMPLATE, NUM_SENSES, WORDS, write_job
from tiny_models import word_tokenizer
from tiny_wordnet import write_wordnet

from dskd.config import CorpusConfig
from dskd.corpus.written.prompts import THOUGHTS, WritingPrompter
from dskd.corpus.written.requests import Request, Sense, find_senses, make_requests
from dskd.errors import UserError
from dskd.lexicon.wordnet import open_wordnet
from dskd.models.files.folder import load_tokenizer

BANK = Request(Sense("bank", "bank.n.01", "n", "sloping land beside water"), 0)


def _senses(folder, words, seed=0, vocab_size=1000):
    write_wordnet(folder / "wordnet")
    return find_senses(open_wordnet(str(folder / "wordnet")), word_tokenizer(words), vocab_size, seed)


def test_senses_are_those_of_words_that_are_one_token(tmp_path):
    senses = _senses(tmp_path, WORDS)
    assert len(senses) == NUM_SENSES
    assert {sense.word for sense in senses} == set(WORDS)
    assert {sense.synset for sense in senses if sense.word == "hot"} == {"hot.a.01", "torrid.s.01"}


def test_words_that_the_model_lacks_or_that_are_short_are_left_out(tmp_path):
    tokenizer = word_tokenizer(WORDS)
    below = tokenizer.convert_tokens_to_ids("hot")
    assert "hot" not in {sense.word for sense in _senses(tmp_path, WORDS, vocab_size=below)}


def test_the_order_is_a_function_of_the_seed_and_a_limit_takes_its_beginning(tmp_path):
    senses = _senses(tmp_path, WORDS)
    wordnet, tokenizer = open_wordnet(str(tmp_path / "wordnet")), word_tokenizer(WORDS)
    assert find_senses(wordnet, tokenizer, 1000, 0) == senses
    other = find_senses(wordnet, tokenizer, 1000, 1)
    assert other != senses
    assert sorted(map(repr, other)) == sorted(map(repr, senses))
    requests = make_requests(senses, CorpusConfig(source="teacher", max_senses=3, texts_per_sense=2))
    assert [(request.sense, request.number) for request in requests] == [(s, n) for s in senses[:3] for n in (0, 1)]
    assert len({request.name for request in requests}) == 6


def test_seeds_differ_between_senses_texts_and_experiments():
    others = [
        Request(BANK.sense, 1),
        Request(Sense("bank", "bank.n.02", "n", BANK.sense.gloss), 0),
        Request(Sense("shore", "bank.n.01", "n", BANK.sense.gloss), 0),
    ]
    assert len({BANK.seed(0), BANK.seed(1), *(other.seed(0) for other in others)}) == 5
    assert BANK.seed(0) == Request(BANK.sense, 0).seed(0)


def test_a_chat_model_is_asked_with_its_template_and_a_base_model_gets_a_beginning():
    tokenizer = word_tokenizer(["bank"])
    plain = WritingPrompter(tokenizer, 0)
    assert not plain.is_chat
    assert plain.text(BANK) == ('bank (noun): sloping land beside water.\nA text that uses "bank" in this sense:\n')
    tokenizer.chat_template = CHAT_TEMPLATE
    chat = WritingPrompter(tokenizer, 0)
    assert chat.is_chat
    assert chat.text(BANK) == f"user {chat.question(BANK)} assistant "
    assert chat.question(BANK).startswith('"bank" (noun) means: sloping land beside water.\n\nWrite ')
    assert chat.question(BANK).endswith(' with the word "bank" in this sense.')


def test_special_tokens_are_written_once(tmp_path):
    write_job(tmp_path)
    tokenizer = load_tokenizer(tmp_path / "teacher")
    request = Request(Sense("hot", "hot.a.01", "a", "cold"), 0)
    assert (
        WritingPrompter(tokenizer, 0).tokens(request)
        == tokenizer(WritingPrompter(tokenizer, 0).text(request))["input_ids"]
    )


def test_only_the_first_paragraph_of_a_base_models_text_is_its_answer():
    tokenizer = word_tokenizer(["bank"])
    text = "  One.\nStill one.\n\nAnother text."
    assert WritingPrompter(tokenizer, 0).answer(text, BANK) == "One.\nStill one."
    tokenizer.chat_template = CHAT_TEMPLATE
    assert WritingPrompter(tokenizer, 0).answer(text, BANK) == "One.\nStill one.\n\nAnother text."
    assert WritingPrompter(tokenizer, 0).answer("half \ud800 a pair", BANK) == ""


def test_thoughts_are_not_part_of_an_answer_whether_they_end_or_not():
    tokenizer = word_tokenizer(["bank"])
    tokenizer.chat_template = CHAT_TEMPLATE
    chat = WritingPrompter(tokenizer, 0)
    assert chat.answer("<think>How?</think>\n\nSo.", BANK) == "So."
    assert chat.answer("<think>\nOkay, the user wants a bank. It", BANK) == THOUGHTS
    assert chat.answer("<think>One.</think>Two.<think>Three.", BANK) == THOUGHTS


def test_thoughts_that_begin_in_the_prompt_are_not_an_answer():
    tokenizer = word_tokenizer(["bank"])
    tokenizer.chat_template = CHAT_TEMPLATE + "<think>\n"
    chat = WritingPrompter(tokenizer, 0)
    assert chat.answer("Okay, the user wants a bank. It", BANK) == THOUGHTS
    assert chat.answer("Okay.\n</think>\n\nThe bank.", BANK) == "The bank."
    # As in Qwen3: the template closes the thoughts itself if none are wanted.
    tokenizer.chat_template = (
        CHAT_TEMPLATE + "<think>\n{% if enable_thinking is defined and not enable_thinking %}</think>{% endif %}"
    )
    assert chat.answer("The bank.", BANK) == "The bank."
    assert chat.answer("The bank.", BANK, may_think=True) == THOUGHTS


def test_a_template_that_refuses_the_question_is_named():
    tokenizer = word_tokenizer(["bank"])
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(UserError, match="its chat template refuses a chat of one question"):
        WritingPrompter(tokenizer, 0).text(BANK)
