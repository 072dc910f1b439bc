"""States and likelihoods of sentences, against transformers, and the measures computed from them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_models import save_model
from tokenizers.processors import TemplateProcessing
from torch.nn import functional as F

from dskd.config import Config
from dskd.evaluation.lexical.contexts import Context
from dskd.evaluation.lexical.preference import Choice, preference
from dskd.evaluation.lexical.retrieval import retrieval, scores_of
from dskd.evaluation.lexical.scores import summarize
from dskd.evaluation.lexical.separation import pooled, separation
from dskd.evaluation.lexical.states import TARGET, WORD, Tokens, read_likelihoods, read_states, tokenize
from dskd.evaluation.lexical.surface import surface_scores
from dskd.evaluation.lexical.wic import Marked, Pair
from dskd.models.files.folder import find_teacher
from dskd.models.running.frozen import load_frozen
from dskd.training.teacher_from_scratch import train_tokenizer

TEXTS = [
    Tokens([3 + (7 * n + 5 * i) % 90 for i in range(3 + n)], first, min(first + n % 2, 2 + n))
    for n, first in enumerate([0, 1, 3, 2, 6, 1, 4])
]


@pytest.fixture(scope="module")
def model(tmp_path_factory, world):
    folder = tmp_path_factory.mktemp("reading")
    plain = save_model(folder / "model")
    config = Config(workdir=str(folder), teacher={"path": str(folder / "model"), "mode": "resident"}, precision="fp32")
    frozen = load_frozen(find_teacher(config), config, world)
    yield plain, frozen
    frozen.close()


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_states_are_those_of_transformers_for_each_sentence_alone(model, world, batch_size):
    plain, frozen = model
    states = read_states(frozen, TEXTS, batch_size, world)
    for text, (at_word, at_target) in zip(TEXTS, states, strict=True):
        with torch.no_grad():
            hidden = plain.model(torch.tensor([text.input_ids])).last_hidden_state[0]
        torch.testing.assert_close(at_word, hidden[text.last], rtol=1e-4, atol=1e-4)
        expected = hidden[text.first - 1] if text.first else torch.zeros_like(hidden[0])
        torch.testing.assert_close(at_target, expected, rtol=1e-4, atol=1e-4)
    assert (WORD, TARGET) == (0, 1)
    assert read_states(frozen, [], batch_size, world).shape == (0, 2, 32)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_likelihoods_are_those_of_transformers_for_each_sentence_alone(model, world, batch_size):
    plain, frozen = model
    found = read_likelihoods(frozen, TEXTS, batch_size, world)
    for text, likelihood in zip(TEXTS, found.tolist(), strict=True):
        ids = torch.tensor(text.input_ids)
        with torch.no_grad():
            logprobs = F.log_softmax(plain(ids[None]).logits[0].double(), dim=-1)
        assert likelihood == pytest.approx(float(logprobs[:-1].gather(1, ids[1:, None]).sum()), rel=1e-5)


def test_a_word_has_exactly_the_tokens_of_its_letters():
    tokenizer = train_tokenizer(iter(["the bank of the river bank's banks"] * 9), 300)
    text = "on the banks' side"
    start = text.index("banks")
    tokens = tokenize(tokenizer, text, start, start + 5)
    assert tokenizer.decode(tokens.input_ids[tokens.first : tokens.last + 1]).strip() == "banks"
    assert tokenizer.decode(tokens.input_ids) == text
    assert tokenize(tokenizer, "bank it", 0, 4).first == 0
    whole = train_tokenizer(iter(["banks"] * 99), 300)
    assert len(whole("a banks")["input_ids"]) == 3
    assert tokenize(whole, "a banks", 2, 6) is None  # "banks" is one token: "bank" has none of its own
    assert tokenize(whole, "a banks", 3, 7) is None


def test_start_tokens_are_kept_and_end_tokens_are_removed():
    tokenizer = train_tokenizer(iter(["the bank"] * 9), 280)
    end = tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{end} $A {end}", special_tokens=[(end, tokenizer.eos_token_id)]
    )
    tokens = tokenize(tokenizer, "the bank", 4, 8)
    assert tokens.input_ids.count(tokenizer.eos_token_id) == 1
    assert tokens.input_ids[0] == tokenizer.eos_token_id
    assert tokenizer.decode(tokens.input_ids[tokens.first : tokens.last + 1]) == " bank"


def _contexts(*synsets):
    return [Context(name.split(".")[0], "n", name, f"text {n}", 0, 4) for n, name in enumerate(synsets)]


def _at(*degrees):
    angles = torch.deg2rad(torch.tensor(degrees, dtype=torch.float64))
    return torch.stack([angles.cos(), angles.sin()], dim=-1) * torch.arange(1, len(degrees) + 1)[:, None]


def test_separation_by_hand():
    contexts = _contexts(
        "bank.1", "bank.1", "bank.2", "way.1", "way.1", "way.2", "one.1", "one.1", "lone.1", "two.1", "two.2"
    )
    states = _at(0, 40, 100, 0, 90, 30, 0, 5, 0, 10, 20)
    found = {item.cluster: item for item in separation(contexts, states)}
    # bank: same 40°; other 100° and 60°: both less similar. way: same 90°; other 30° and 60°: both more similar.
    assert {name: item.total for name, item in found.items()} == {"bank.n": 1.0, "way.n": 0.0}
    assert {item.chance for item in found.values()} == {0.5}
    # All pairs: same 40, 90, 5; other 100, 60, 30, 60, 10. Of 15 comparisons 5 + 3 + 1 are won.
    summary = pooled(contexts, states)
    assert summary["value"] == pytest.approx(9 / 15)
    assert (summary["items"], summary["clusters"]) == (8, 4)


def test_states_that_encode_the_sense_separate_it_and_random_states_do_not():
    contexts = _contexts(*(f"w{word}.{sense}" for word in range(40) for sense in (1, 1, 2, 2, 3)))
    torch.manual_seed(0)
    noise = torch.randn(len(contexts), 16)
    informative = torch.stack([F.one_hot(torch.tensor(int(c.synset[-1])), 16).float() for c in contexts])
    for states, separated, retrieved in ((informative + 0.01 * noise, 1.0, 1.0), (noise, 0.5, 1 / 3)):
        items = [*separation(contexts, states), *retrieval(contexts, states)]
        summary = summarize(items)
        assert summary["sense_separation"]["value"] == pytest.approx(separated, abs=0.08)
        assert summary["sense_retrieval"]["value"] == pytest.approx(retrieved, abs=0.1)
        assert summary["sense_retrieval"]["chance"] == pytest.approx(1 / 3)
        assert summary["sense_retrieval_rank"]["chance"] == pytest.approx((1 + 1 / 2 + 1 / 3) / 3)
        assert (summary["sense_retrieval"]["items"], summary["sense_retrieval"]["clusters"]) == (160, 40)


def test_retrieval_by_hand():
    contexts = _contexts("bank.1", "bank.1", "bank.2", "bank.3")
    items = retrieval(contexts, _at(0, 80, 50, 100))
    # 0°: the other of its sense is at 80°, 50° is nearer. 80°: 0° is farther than 100° and 50°.
    # Senses with a single example have no query.
    assert [(item.measure, item.total) for item in items] == [
        ("sense_retrieval", 0.0),
        ("sense_retrieval_rank", 1 / 2),
        ("sense_retrieval", 0.0),
        ("sense_retrieval_rank", 1 / 3),
    ]
    same = torch.ones(4, 2)  # all alike: chance
    assert [item.total for item in retrieval(contexts, same)] == pytest.approx(
        [i.chance for i in retrieval(contexts, same)]
    )


def test_equal_candidates_share_their_ranks():
    assert scores_of(np.array([0.1, 0.9, 0.9]), 1) == (0.5, 0.75)
    assert scores_of(np.array([0.9, 0.5, 0.5]), 2) == (0.0, pytest.approx((1 / 2 + 1 / 3) / 2))
    assert scores_of(np.array([0.1, 0.2, 0.9]), 2) == (1.0, 1.0)


def test_a_model_that_knows_the_words_prefers_synonyms(model, world):
    """An output matrix makes one token probable everywhere and another improbable, or the other way round."""
    _, frozen = model
    liked, other = 10, 11
    choices = [
        Choice(
            f"w{n % 3}",
            str(n),
            Tokens([3 + n, liked, 20 + n], 1, 1),
            Tokens([3 + n, other, 20 + n], 1, 1),
            (5, 4 + n % 2),
        )
        for n in range(6)
    ]
    texts = [text for choice in choices for text in (choice.synonym, choice.antonym)]
    first_states = frozen.hidden_states(torch.tensor([text.input_ids for text in texts]))[:, 0].double()
    direction = torch.linalg.lstsq(first_states, torch.ones(len(texts), dtype=torch.float64)).solution.float()
    weight = frozen.engine.head.weight
    before = weight.clone()
    for sign, expected in ((1, 1.0), (-1, 0.0)):
        weight.data.zero_()
        weight.data[liked], weight.data[other] = sign * direction, -sign * direction
        items = preference(choices, read_likelihoods(frozen, texts, 4, world).tolist())
        assert summarize(items)["synonym_preference"]["value"] == expected
        assert summarize(items)["synonym_preference"]["clusters"] == 3
    weight.data.copy_(before)
    assert preference(choices[:1], [-2.0, -2.0])[0].total == 0.5
    assert surface_scores([], choices, [])["synonym_preference"] == pytest.approx((3 * 1 + 3 * 0.5) / 6)


def test_letters_alone_separate_senses_whose_examples_are_similar_strings():
    def context(synset, text):
        return Context("bank", "n", synset, text, text.index("bank"), text.index("bank") + 4)

    alike = [context("1", "they sat by the bank"), context("1", "she sat by the bank"), context("2", "a rich bank")]
    scores = surface_scores(alike, [], [])
    assert {scores[f"sense_{name}"] for name in ("separation", "separation_pooled", "retrieval_target")} == {1.0}
    other = [replace(one, synset=synset) for one, synset in zip(alike, "121", strict=True)]
    assert surface_scores(other, [], [])["sense_separation"] == 0
    pairs = [
        Pair("1", "bank", Marked("by the bank", 7, 11), Marked("at the bank", 7, 11), True),
        Pair("2", "bank", Marked("by the bank", 7, 11), Marked("rich bank by the", 5, 9), False),
    ]
    assert surface_scores([], [], pairs) == {"wic_auc": 1.0}
    assert surface_scores([], [], pairs, pairs) == {"wic_auc": 1.0, "wic_accuracy": 1.0}
    turned = [pair._replace(is_same=not pair.is_same) for pair in pairs]
    # All of them are called the same where the less alike ones are: no threshold is better on `turned`, half are right.
    assert surface_scores([], [], pairs, turned)["wic_accuracy"] == 0.5
