"""The words that a tokenizer can express, for every kind of tokenizer that teachers have, each made of a few words."""

import json

import pytest
from tiny_models import word_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from dskd.config import Config
from dskd.errors import UserError
from dskd.lexicon.build import build_lexicon
from dskd.lexicon.relations import Pairs, Relation
from dskd.senses.entries import build_entries, load_entries, tokenize_form, tokenize_words

TEXT = ["the big house and the large house", "a small garden, the big garden", "the well-known house of the king"] * 50
SPECIAL = ["<unk>", "<s>", "</s>"]


def _trained(model, trainer, pre_tokenizer, decoder, normalizer=None, **options):
    inner = Tokenizer(model)
    inner.pre_tokenizer, inner.decoder = pre_tokenizer, decoder
    if normalizer is not None:
        inner.normalizer = normalizer
    inner.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, **options)


def _bytes():
    """Byte-level BPE, as in GPT-2, Llama 3 and Qwen: there is no unknown token."""
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    end = "<|endoftext|>"
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return _trained(models.BPE(), trainer, split, decoders.ByteLevel(), eos_token=end, bos_token=end, unk_token=end)


def _sentencepiece(byte_fallback):
    """BPE with a metaspace, as in Llama 2 and Mistral (with byte fallback) and in others (without)."""
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=SPECIAL, show_progress=False)
    split = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    trained = _trained(models.BPE(unk_token="<unk>", fuse_unk=True), trainer, split, decoder, **names)
    if not byte_fallback:
        return trained
    described = json.loads(trained.backend_tokenizer.to_str())
    described["model"]["byte_fallback"] = True
    vocabulary = described["model"]["vocab"]
    vocabulary |= {f"<0x{byte:02X}>": len(vocabulary) + byte for byte in range(256)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(described)), **names)


def _unigram():
    words = [f"▁{word}" for word in ("the", "big", "large", "house", "garden", "well")]
    letters = [*"▁abcdefghijklmnopqrstuvwxyz-"]
    pieces = [*((name, 0.0) for name in SPECIAL), *((word, -2.0) for word in words), *((one, -9.0) for one in letters)]
    inner = Tokenizer(models.Unigram(pieces, unk_id=0))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Metaspace(prepend_scheme="always"), decoders.Metaspace()
    inner.normalizer = normalizers.NFKC()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def _wordpiece():
    """Lower case without accents, as in uncased BERT."""
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[UNK]", "[CLS]"], show_progress=False)
    normalizer = normalizers.BertNormalizer(lowercase=True)
    model = models.WordPiece(unk_token="[UNK]")
    split = pre_tokenizers.BertPreTokenizer()
    return _trained(model, trainer, split, decoders.WordPiece(), normalizer, unk_token="[UNK]", cls_token="[CLS]")


KINDS = {
    "byte-level BPE": _bytes,
    "BPE with byte fallback": lambda: _sentencepiece(byte_fallback=True),
    "BPE with an unknown token": lambda: _sentencepiece(byte_fallback=False),
    "unigram": _unigram,
    "wordpiece": _wordpiece,
}
# Whether each kind can express a word whose letters it lacks, a word with a capital, and a word with an accent.
CAN_EXPRESS = {
    "byte-level BPE": (True, True, True),
    "BPE with byte fallback": (True, True, True),
    "BPE with an unknown token": (False, False, False),
    "unigram": (False, False, False),
    "wordpiece": (False, False, False),
}


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param, KINDS[request.param]()


def _decoded(word, tokenizer):
    """Returns the text that a word's tokens decode to, without spaces; () if the word has no tokens."""
    (ids,) = tokenize_words([word], tokenizer)
    return ids and tokenizer.decode(list(ids), clean_up_tokenization_spaces=False).replace(" ", "").replace("▁", "")


def test_words_of_the_training_text_are_one_token(kind):
    _, tokenizer = kind
    for word in ("big", "house", "garden", "the"):
        (ids,) = tokenize_words([word], tokenizer)
        assert len(ids) == 1
        assert _decoded(word, tokenizer) == word
    assert _decoded("well-known", tokenizer) == "well-known"  # a decoder may put spaces around the hyphen
    assert _decoded("big house", tokenizer) == "bighouse"


def test_words_whose_tokens_decode_to_other_text_get_no_tokens(kind):
    name, tokenizer = kind
    for word, can_express in zip(("友善", "BIG", "gárden"), CAN_EXPRESS[name], strict=True):
        assert bool(tokenize_words([word], tokenizer)[0]) == can_express, word
        assert _decoded(word, tokenizer) in ((), word)
    for special in tokenizer.all_special_tokens:
        assert tokenize_words([special, f"{special} house"], tokenizer) == [(), ()]


def test_no_special_token_is_a_head_or_in_a_span(kind):
    _, tokenizer = kind
    special = tokenizer.all_special_tokens
    relations = Pairs(
        Relation(head, tail, "synonym", "test")
        for head, tail in (
            ("big", "large"),
            ("友善", "good"),
            ("友善", "big"),
            ("和平", "large"),
            ("big", "big 友"),
            ("house", f"{special[0]} house"),
            (special[-1], "garden"),
        )
    ).resolved()
    entries, counts = build_entries(relations, tokenizer, len(tokenizer))
    heads = {token for token in range(len(tokenizer)) if entries.synonym_offsets.diff()[token]}
    assert {tokenizer.decode([head]).strip().strip("▁") for head in heads} <= {"big", "large"}
    used = {*heads, *entries.span_tokens.flatten().tolist()}
    assert not used & set(tokenizer.all_special_ids)
    assert counts["unknown_words"] >= 2  # the two with a special token; more where characters are unknown
    assert counts["neighbour_is_unknown_to_the_tokenizer"] + counts["head_is_unknown_to_the_tokenizer"] >= 4


def test_added_special_tokens_and_unknown_forms_do_not_count():
    tokenizer = word_tokenizer(["big", "Big", "the", "<|im_end|>"])
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken("<|im_start|>", special=True)]})
    assert tokenize_words(["<|im_start|>", "unheard", "big unheard", "big"], tokenizer)[:3] == [(), (), ()]
    assert set(tokenize_form(["big", "unheard"], "sentence_initial", tokenizer)) == {"big"}
    assert set(tokenize_form(["big", "unheard"], "capitalized", tokenizer)) == {"big"}


def test_a_word_whose_token_the_model_lacks_is_unknown():
    tokenizer = word_tokenizer(["the", "big", "large", "huge", "vast"])
    huge, vast = tokenize_words(["huge", "vast"], tokenizer)
    assert vast[0] == len(tokenizer) - 1
    pairs = [("big", "large"), ("big", "vast"), ("vast", "huge")]
    relations = Pairs(Relation(head, tail, "synonym", "test") for head, tail in pairs).resolved()
    entries, counts = build_entries(relations, tokenizer, len(tokenizer) - 1, ["sentence_initial"])
    assert entries.num_entries == entries.vocab_size == vast[0]
    assert vast[0] not in entries.synonym_entries.tolist()
    assert counts["unknown_words"] == 1
    assert (counts["synonym_pairs"], counts["head_is_unknown_to_the_tokenizer"]) == (2, 2)
    assert tokenize_words(["huge", "vast"], tokenizer, huge[0] + 1) == [huge, ()]


def test_a_lexicon_in_another_language_is_refused_with_the_tokenizer_and_the_reasons(tmp_path):
    (tmp_path / "own.tsv").write_text("友善\tsynonym\t友好\n", encoding="utf-8")
    config = Config(
        workdir=str(tmp_path / "work"),
        teacher={"path": "x"},
        lexicon={"wordnet": False, "tsv": (str(tmp_path / "own.tsv"),)},
    )
    build_lexicon(config)
    tokenizer = word_tokenizer(["big", "the"])
    tokenizer.name_or_path = "models/english"
    with pytest.raises(UserError) as error:
        load_entries(config, tokenizer, len(tokenizer))
    for part in ("no pair of the lexicon", "models/english", "友善", "2 because the head is unknown to the tokenizer"):
        assert part in str(error.value)
