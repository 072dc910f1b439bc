"""The tokenizer of a GGUF file, built from what the file says.

Transformers 4.57 has a conversion of its own, which this one replaces: for Llama's architecture it makes the
beginning-of-text token the end-of-text token too, puts it before every text whatever the file says, and splits text
like GPT-2 whatever the file names. Here, everything comes from the file's keys; if they do not determine the tokenizer,
it is refused, and `teacher.tokenizer` names another.
"""

import unicodedata
from collections.abc import Callable, Mapping
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from dskd.errors import UserError
from dskd.models.files.gguf_file import GgufFile
from dskd.models.tokenizing import answer_end

# The types of tokens, in tokenizer.ggml.token_type.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
# How text is split before the merges, by tokenizer.ggml.pre: the patterns that the models were trained with.
_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)"
    r"|\s+"
)
_QWEN_2 = _LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}")
_SPLITS: Mapping[str, Callable[[], Any]] = {
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "llama-bpe": lambda: _split_by(_LLAMA_3),
    "qwen2": lambda: _split_by(_QWEN_2),
}
_SAME_SPLIT = {"gpt2": "gpt-2", "starcoder": "smollm", "llama3": "llama-bpe", "llama-v3": "llama-bpe"}
_BEGINS = ("llama-bpe", "llama3", "llama-v3")  # encodings that put the beginning-of-text token before a text
PROBES = (
    "The opposite of hot is cold.",
    "  Two spaces, a\ttab\nand two lines.\n\n",
    "It's 2026: 1,234,567.89 = x² + 3y; don't we'll I'M",
    "Grüße aus Köln — 東京 の 天気, مرحبا, Привет, e\u0301, 🙂👍🏽",
    "def f(x):\n    return {'a': [x] * 10}  # 100%\r\n",
)


def _split_by(pattern: str) -> Any:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def build_tokenizer(file: GgufFile) -> Any:
    """Returns the file's tokenizer, as transformers' `PreTrainedTokenizerFast`.

    Raises:
        UserError: if the file has none, its keys do not determine it, or it loses characters of a text.
    """
    from transformers import PreTrainedTokenizerFast

    tokens = _tokens(file)
    kind = file.value("tokenizer.ggml.model", str)
    if not tokens or kind is None:
        raise _undetermined(file, "it has no tokenizer (no tokenizer.ggml.tokens)")
    if twice := len(tokens) - len(set(tokens)):
        raise _undetermined(file, f"{twice} of its {len(tokens):,} tokens are duplicates")
    if kind == "gpt2":
        backend = _byte_level(file, tokens)
    elif kind == "llama":
        backend = _sentencepiece(file, tokens)
    else:
        raise _undetermined(file, f"its tokenizer is of the kind {kind!r}, and only gpt2 and llama can be read")
    _mark_special_tokens(backend, file, tokens)
    special = {name: token for name in ("bos", "eos", "unknown", "padding") if (token := _special(file, name))}
    # Byte-pair encodings mostly have no token before a text, sentencepiece's have; keys that are missing mean that.
    begins = file.value("tokenizer.ggml.add_bos_token", bool)
    if begins is None:
        begins = kind == "llama" or file.value("tokenizer.ggml.pre", str) in _BEGINS
    before = [special["bos"]] if begins and "bos" in special else []
    after = [special["eos"]] if file.value("tokenizer.ggml.add_eos_token", bool) and "eos" in special else []
    if before or after:
        _add_to_texts(backend, before, after)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=special.get("bos"),
        eos_token=special.get("eos"),
        unk_token=special.get("unknown"),
        pad_token=special.get("padding"),
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],  # transformers adds token types, which decoders do not take
    )
    tokenizer.chat_template = file.value("tokenizer.chat_template", str)
    _check_probes(tokenizer, file)
    return tokenizer


def turn_ends(file: GgufFile, tokenizer: Any) -> list[int]:
    """Returns the tokens that end a generation: the end-of-text token, and those that end an assistant's turn.

    The file names some; the token that follows an answer in the chat template ends one too.
    """
    named = [file.value(f"tokenizer.ggml.{name}_token_id", int) for name in ("eos", "eot", "eom")]
    ends = {tokenizer.eos_token_id, *named, answer_end(tokenizer)} - {None}
    return sorted(token for token in ends if 0 <= token < len(tokenizer))


def compare_tokenizers(named: Any, file: GgufFile, name: str) -> str:
    """Checks that a tokenizer gives tokens the ids that the file gives them; returns what else differs, for people.

    Args:
        named: the tokenizer that `teacher.tokenizer` names.
        file: the GGUF file.
        name: the value of `teacher.tokenizer`, for messages.

    Raises:
        UserError: if tokens have other ids, with the first ones, or an id is too large for the model's embeddings.
    """
    rows = vocabulary_rows(file)
    ids = named.get_vocab().values()
    if (largest := max(ids, default=0)) >= rows:
        raise UserError(
            f"teacher.tokenizer: {name} has the token {named.convert_ids_to_tokens(largest)!r} with the id "
            f"{largest:,}, and {file.path} has {rows:,} embeddings; name the tokenizer that belongs to the model"
        )
    tokens = _tokens(file)
    kinds = file.list_of("tokenizer.ggml.token_type", int) or [_NORMAL] * len(tokens)
    others = [
        f"{token_id} is {theirs!r} there and {token!r} in the file"
        for token_id, (token, kind) in enumerate(zip(tokens, kinds, strict=False))
        if kind not in (_UNUSED, _BYTE) and (theirs := named.convert_ids_to_tokens(token_id)) != token
    ]
    if others:
        raise UserError(
            f"teacher.tokenizer: {name} is not the tokenizer of {file.path}: {len(others):,} of {len(tokens):,} tokens "
            f"differ ({'; '.join(others[:3])}); name the tokenizer that belongs to the model"
        )
    if not tokens:
        return "the file has no tokenizer to compare it with"
    try:
        own = build_tokenizer(file)
    except UserError as problem:
        return f"the same {len(tokens):,} tokens as in the file; not compared further, because {_short(problem, file)}"
    differ = sum(_ids(named, text) != _ids(own, text) for text in PROBES)
    differences = [
        f"the same {len(tokens):,} tokens as in the file, and {differ or 'none'} of {len(PROBES)} texts split "
        "differently"
    ]
    for attribute in ("bos_token", "eos_token"):
        if (theirs := getattr(named, attribute)) != (file_token := getattr(own, attribute)):
            differences.append(f"its {attribute} is {theirs!r}, the file's {file_token!r}")
    return "; ".join(differences)


def vocabulary_rows(file: GgufFile) -> int:
    """Returns the number of the model's embeddings.

    Raises:
        UserError: if the file has no matrix of embeddings.
    """
    shape = next((tensor.shape for tensor in file.tensors if tensor.name == "token_embd.weight"), None)
    if shape is None:
        raise UserError(
            f"teacher.path: {file.path}: there are no embeddings (token_embd.weight); it is not a whole language model"
        )
    if len(shape) != 2:
        raise UserError(
            f"teacher.path: {file.path}: the embeddings (token_embd.weight) have the shape {list(shape)}, which must "
            "be two numbers; the file is damaged"
        )
    return shape[0]


def _tokens(file: GgufFile) -> list[str]:
    return file.list_of("tokenizer.ggml.tokens", str) or []


def _undetermined(file: GgufFile, reason: str) -> UserError:
    return UserError(
        f"teacher.path: {file.path}: the tokenizer cannot be built from this file: {reason}; name the model's "
        "tokenizer, a folder or a model of the Hub, with teacher.tokenizer"
    )


def _short(problem: UserError, file: GgufFile) -> str:
    return str(problem).partition("from this file: ")[2].partition("; name the")[0] or f"{file.path} has none"


def _byte_level(file: GgufFile, tokens: list[str]) -> Tokenizer:
    name = file.value("tokenizer.ggml.pre", str)
    split = _SPLITS.get(_SAME_SPLIT.get(str(name), str(name)))
    if split is None:
        known = ", ".join([*_SPLITS, *_SAME_SPLIT])
        what = "it does not say how text is split" if name is None else f"it splits text as {name!r}"
        raise _undetermined(file, f"{what} (tokenizer.ggml.pre); known are {known}")
    merges = [tuple(merge.split(" ")) for merge in file.list_of("tokenizer.ggml.merges", str) or []]
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    # Llama 3's encoding takes a piece of text that is a token as it is, even if no merges lead to it.
    takes_whole = split is _SPLITS["llama-bpe"]
    tokenizer = Tokenizer(_bpe(file, vocabulary, merges, ignore_merges=takes_whole))
    if split is _SPLITS["qwen2"]:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = split()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(file: GgufFile, tokens: list[str]) -> Tokenizer:
    """Returns a byte-pair encoding of sentencepiece, whose merges follow from the tokens' scores."""
    from transformers.convert_slow_tokenizer import generate_merges

    scores = file.list_of("tokenizer.ggml.scores", float)
    kinds = _kinds(file, tokens)
    if scores is None or len(scores) != len(tokens):
        raise _undetermined(file, "its tokens have no scores (tokenizer.ggml.scores)")
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    normal = {token: scores[token_id] for token, token_id in vocabulary.items() if kinds[token_id] == _NORMAL}
    merges = generate_merges({token: vocabulary[token] for token in normal}, normal)
    unknown = _special(file, "unknown")
    tokenizer = Tokenizer(_bpe(file, vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefixed = file.value("tokenizer.ggml.add_space_prefix", bool) is not False
    replaced = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replaced]) if prefixed else replaced
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if prefixed else [])])
    return tokenizer


def _bpe(file: GgufFile, vocabulary: dict[str, int], merges: list[Any], **options: Any) -> Any:
    try:
        return models.BPE(vocabulary, merges, **options)
    except Exception as error:  # tokenizers raises nothing narrower
        raise _undetermined(file, f"its merges do not fit its tokens ({error})") from None


def _kinds(file: GgufFile, tokens: list[str]) -> list[int]:
    kinds = file.list_of("tokenizer.ggml.token_type", int)
    return list(kinds) if kinds is not None and len(kinds) == len(tokens) else [_NORMAL] * len(tokens)


def _mark_special_tokens(backend: Tokenizer, file: GgufFile, tokens: list[str]) -> None:
    """Registers control and user-defined tokens, so that the tokenizer never splits them; text may contain only the
    latter.
    """
    kinds = _kinds(file, tokens)
    control = {token for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL}
    control |= {token for name in ("bos", "eos", "padding", "eot", "eom") if (token := _special(file, name))}
    defined = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _USER_DEFINED]
    id_of = {token: token_id for token_id, token in enumerate(tokens)}
    added = [AddedToken(token, special=True, normalized=False) for token in sorted(control, key=id_of.__getitem__)]
    backend.add_special_tokens(added)
    # Sentencepiece's own hold its mark of a space, which the normalizer writes.
    backend.add_tokens([AddedToken(token, special=False, normalized="▁" in token) for token in defined])


def _special(file: GgufFile, name: str) -> str | None:
    tokens = _tokens(file)
    token_id = file.value(f"tokenizer.ggml.{name}_token_id", int)
    if token_id is None or token_id == 2**32 - 1:  # -1: there is none
        return None
    if not 0 <= token_id < len(tokens):
        raise _undetermined(file, f"tokenizer.ggml.{name}_token_id is {token_id}, but there are {len(tokens):,} tokens")
    return tokens[token_id]


def _add_to_texts(backend: Tokenizer, before: list[str], after: list[str]) -> None:
    text = [*before, "$A", *after]
    second = [*before, "$B", *after]
    backend.post_processor = processors.Sequence(
        [
            processors.TemplateProcessing(
                single=text,
                pair=[*text, *(f"{part}:1" for part in second)],
                special_tokens=[(token, backend.token_to_id(token)) for token in {*before, *after}],
            )
        ]
    )


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _check_probes(tokenizer: Any, file: GgufFile) -> None:
    for text in PROBES:
        again = tokenizer.decode(_ids(tokenizer, text), clean_up_tokenization_spaces=False)
        if unicodedata.normalize("NFC", again) != unicodedata.normalize("NFC", text):
            raise _undetermined(file, f"read back, the text {text!r} becomes {again!r}")
