"""A comparison of a student's tokenizer with its teacher's: both must give every text the same token ids.

Teacher and student read the same ids, and the shards hold those of the teacher's tokenizer. The tokens of all ids are
compared, then the special tokens, the added tokens with their flags, the ids of some texts, which show a different
normaliser or pre-tokenizer, and the merges of byte-pair encodings. Padding tokens may differ: no loss reads a padded
position.
"""

import json
from collections.abc import Iterator
from itertools import zip_longest
from typing import Any

from dskd.errors import UserError
from dskd.models.files.folder import ModelFolder

_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "cls_token", "mask_token")
# Flags of an added token that change which text becomes the token.
_FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")
_TEXTS = (
    "Hello, world! It's 12:30, and we've paid $1,234.56 (about 99%).",
    " leading and trailing spaces  ",
    "two  spaces,   three,\ttab,\nline\n\nparagraph\r\nand a carriage return",
    "UPPER lower Title camelCase snake_case 3rd 007 1000000",
    "Café naïve Straße cafe\u0301 \u2460 \ufb01 \u212b",  # also letters that a normaliser would replace
    "你好 こんにちは 한국어 Привет γειά שלום مرحبا नमस्ते",
    "\U0001f600 \U0001f44d\U0001f3fd \u2014 \u201cquotes\u201d \u2026 no\u00a0break zero\u200bwidth",
    "def f(x):\n    return [x ** 2 for _ in range(10)]  # http://example.org/a?b=c&d=%20",
    "",
)


def require_same_tokenizer(teacher: ModelFolder, student: ModelFolder) -> None:
    """Refuses a student whose tokenizer is not the teacher's.

    Raises:
        UserError: with the first difference: the token id with both strings, the flag, or the text.
    """
    difference = next(differences(teacher.tokenizer, student.tokenizer), None)
    if difference is not None:
        raise UserError(
            f"student.path: the tokenizer in {student.path} is not that of the teacher, {teacher.path}: {difference}. "
            "Teacher and student must read the same tokens; name a student of the same family, or save the teacher's "
            "tokenizer in the student's folder if it was trained with that one"
        )


def differences(teacher: Any, student: Any) -> Iterator[str]:
    """Yields what differs between two tokenizers of Hugging Face, first of all tokens in the order of their ids."""
    tokens, others = (_token_of_id(tokenizer) for tokenizer in (teacher, student))
    for token_id in sorted(tokens.keys() | others.keys()):
        if tokens.get(token_id) != others.get(token_id):
            yield (
                f"the token with id {token_id} is {_quoted(tokens.get(token_id))} in the teacher's, and "
                f"{_quoted(others.get(token_id))} in the student's"
            )
    for name in _SPECIAL:
        pair = [(getattr(each, name, None), getattr(each, f"{name}_id", None)) for each in (teacher, student)]
        if pair[0] != pair[1]:
            (one, one_id), (other, other_id) = pair
            yield (
                f"{name} is {_quoted(one)} (id {one_id}) in the teacher's, and {_quoted(other)} (id {other_id}) in the "
                "student's"
            )
    added, others_added = teacher.added_tokens_decoder, student.added_tokens_decoder
    for token_id in sorted(added.keys() & others_added.keys()):
        for flag in _FLAGS:
            one, other = (getattr(each[token_id], flag) for each in (added, others_added))
            if one != other:
                yield (
                    f"the added token {_quoted(tokens.get(token_id))} (id {token_id}) has {flag}: {one} in the "
                    f"teacher's, and {flag}: {other} in the student's"
                )
    for text in (*_TEXTS, *_around_special(teacher)):
        ids, other_ids = (each(text, verbose=False)["input_ids"] for each in (teacher, student))
        for index, (one, other) in enumerate(zip_longest(ids, other_ids)):
            if one != other:
                yield (
                    f"token {index} of the text {text!r} is {_with_id(one, tokens)} with the teacher's tokenizer, and "
                    f"{_with_id(other, others)} with the student's"
                )
                break
    merges, others_merges = _merges(teacher), _merges(student)
    for number, (one, other) in enumerate(zip_longest(merges, others_merges) if merges and others_merges else ()):
        if one != other:
            yield f"merge {number} is {_quoted(one)} in the teacher's, and {_quoted(other)} in the student's"


def _token_of_id(tokenizer: Any) -> dict[int, str]:
    return {token_id: token for token, token_id in tokenizer.get_vocab().items()}


def _merges(tokenizer: Any) -> list[Any] | None:
    """Returns the pairs that a byte-pair encoding joins, in its order; None if there are none, or none are known."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return None if backend is None else json.loads(backend.to_str())["model"].get("merges")


def _around_special(tokenizer: Any) -> list[str]:
    """Returns texts in which special tokens occur, with spaces and without."""
    return [f"a {token} b{token}c" for token in tokenizer.all_special_tokens]


def _quoted(token: Any) -> str:
    return "missing" if token is None else repr(token)


def _with_id(token_id: int | None, tokens: dict[int, str]) -> str:
    return "missing" if token_id is None else f"{tokens.get(token_id)!r} (id {token_id})"
