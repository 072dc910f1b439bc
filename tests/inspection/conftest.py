"""A small dictionary of the senses of a few words, which the tests of several files inspect."""

import pytest
from small_dictionaries import WORDS, make_dictionary
from tiny_models import word_tokenizer


@pytest.fixture
def tokenizer():
    return word_tokenizer(WORDS)


@pytest.fixture
def ids(tokenizer):
    return tokenizer.get_vocab()


@pytest.fixture
def dictionary(tmp_path, tokenizer, ids):
    """big has a large and a very large synonym, a huge one without senses, and a small antonym."""
    pairs = ["big|large|synonym", "big|very large|synonym", "big|huge|synonym", "big|small|antonym"]
    sizes = {ids["big"]: 3, ids["large"]: 2, ids["small"]: 2, ids["the"]: 1, len(tokenizer): 2}
    return make_dictionary(tmp_path, tokenizer, pairs, sizes)[0]
