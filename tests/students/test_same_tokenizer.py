"""A student's tokenizer compared with its teacher's: the first difference is named, whatever it is."""

import re

import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dskd.students.same_tokenizer import differences

LETTERS = [*"abcdefghijklmnopqrstuvwxyzH'.,!?:$%()/#_=&*[]<>0123456789\u0120\u010a"]
MERGES = [("t", "w"), ("tw", "o"), ("l", "i"), ("li", "n"), ("q", "z"), ("z", "q")]


def _tokenizer(*, swapped=False, merges=MERGES, normalizer=None, special=None, added=None, tokens=()):
    words = ["<end>", "<unk>", *LETTERS, *("".join(pair) for pair in MERGES), *tokens]
    if swapped:
        words[2], words[3] = words[3], words[2]
    model = models.BPE({word: number for number, word in enumerate(words)}, merges, unk_token="<unk>")
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if normalizer is not None:
        backend.normalizer = normalizer
    if added is not None:
        backend.add_tokens([added])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, **({"eos_token": "<end>", "unk_token": "<unk>"} | (special or {}))
    )


def test_equal_tokenizers_do_not_differ_even_if_they_pad_with_other_tokens():
    assert not [*differences(_tokenizer(), _tokenizer())]
    assert not [*differences(_tokenizer(), _tokenizer(special={"pad_token": "<end>"}))]


@pytest.mark.parametrize(
    ("student", "expected"),
    [
        ({"swapped": True}, "the token with id 2 is 'a' in the teacher's, and 'b' in the student's"),
        ({"tokens": ["zz"]}, "the token with id {next} is missing in the teacher's, and 'zz' in the student's"),
        (
            {"special": {"eos_token": "a"}},
            r"eos_token is '<end>' (id 0) in the teacher's, and 'a' (id 2) in the student's",
        ),
        ({"special": {"bos_token": "<end>"}}, "bos_token is missing (id None) in the teacher's, and '<end>' (id 0) in"),
        ({"normalizer": normalizers.Lowercase()}, 'token 0 of the text "Hello, world!'),
        ({"merges": MERGES[2:]}, "token 0 of the text 'two  spaces,"),
        ({"merges": [*MERGES[:4], *MERGES[:3:-1]]}, "merge 4 is ['q', 'z'] in the teacher's, and ['z', 'q'] in the"),
    ],
    ids=["token", "further token", "special token", "new special token", "normaliser", "merges", "order of merges"],
)
def test_the_first_difference_is_named(student, expected):
    teacher = _tokenizer()
    found = next(differences(teacher, _tokenizer(**student)))
    assert re.match(re.escape(expected.replace("{next}", str(len(teacher)))), found), found


def test_flags_of_added_tokens_are_compared():
    tokenizers = [_tokenizer(added=AddedToken("<x>", lstrip=lstrip, normalized=False)) for lstrip in (True, False)]
    number = tokenizers[0].convert_tokens_to_ids("<x>")
    assert next(differences(*tokenizers)) == (
        f"the added token '<x>' (id {number}) has lstrip: True in the teacher's, and lstrip: False in the student's"
    )
