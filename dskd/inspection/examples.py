"""The senses of a few words, in short: what the pipeline prints at its end."""

import torch

from dskd.config import Config
from dskd.errors import UserError, counted
from dskd.inspection.artifacts import Teacher, open_teacher
from dskd.inspection.tokens import token_texts
from dskd.inspection.word import WordReport, inspect_word
from dskd.models.files.folder import ModelFolder
from dskd.models.words import MIN_HEAD_LETTERS
from dskd.senses.dictionary import SenseDictionary, load_fitting_dictionary

_WORDS = 3
_CANDIDATES = 200  # tokens that are tried, since some of them are not whole words
_STATES = 4  # for each sense of a word: with fewer, a sense is little more than one place in the text
_SENSES = 5  # of a word that are shown
_NEIGHBOURS, _CONTEXTS, _SCAN = 4, 1, 2000
_LARGEST_SEARCH = 5 * 10**8  # elements of a dictionary that is searched for neighbours: a second or two


def describe_examples(config: Config, folder: ModelFolder | None = None) -> str:
    """Returns the senses of a few words as text, of those that :func:`choose_words` chooses.

    `folder` is the teacher, if it was found before. Returns an empty text if there is no such word. Raises a UserError
    without a dictionary or the teacher.
    """
    teacher = open_teacher(config, folder)
    dictionary, _ = load_fitting_dictionary(config, teacher.folder)
    words = choose_words(dictionary, teacher, _WORDS)
    is_small = dictionary.num_rows * dictionary.hidden_size <= _LARGEST_SEARCH
    reports = []
    for word in words:
        try:
            neighbours = _NEIGHBOURS if is_small else 0
            reports.append(
                inspect_word(config, word, neighbours=neighbours, contexts=_CONTEXTS, scan=_SCAN, teacher=teacher)
            )
        except UserError:  # the lexicon was removed or made again since
            continue
    if not reports:
        return ""
    lines = [
        "Words with very different senses (of those with synonyms and antonyms; `dskd inspect word WORD` shows any):"
    ]
    for report in reports:
        lines += ["", *_lines(report)]
    return "\n".join(lines)


def choose_words(dictionary: SenseDictionary, teacher: Teacher, count: int) -> list[str]:
    """Returns whole words in small letters that are tokens with synonyms and antonyms: those whose senses differ most.

    These are words whose states are in several senses that are far apart. Words such as *used* and *out* have the most
    states, and nearly the same sense everywhere. If not enough words have several states for each sense, words with
    many senses, and many states, follow.
    """
    senses, states = dictionary.senses_per_token, dictionary.states_per_token
    chosen = senses > 0
    for relation in ("synonym", "antonym"):
        chosen &= dictionary.entries.neighbours(relation).sizes > 0
    tokens = chosen.nonzero()[:, 0].tolist()
    tokens.sort(key=lambda token: (-int(senses[token]), -int(states[token]), token))
    texts = token_texts(teacher.tokenizer, [[token] for token in tokens[:_CANDIDATES]])
    words = {text[1:]: token for text, token in zip(texts, tokens, strict=False) if text.startswith(" ")}
    whole = [word for word in words if word.isalpha() and word.islower() and len(word) >= MIN_HEAD_LETTERS]
    known = {word for word in whole if states[words[word]] >= _STATES * senses[words[word]]}
    difference = {word: sense_difference(dictionary, words[word]) for word in known}
    return sorted(whole, key=lambda word: (word not in known, -difference.get(word, 0.0)))[:count]


def sense_difference(dictionary: SenseDictionary, token: int) -> float:
    """Returns how much the senses of a token differ: their variance about their mean, per dimension, times the number
    of senses in use, which is e to the power of the entropy of their shares in the token's states.
    """
    rows = dictionary.rows_of(token)
    vectors, counts = dictionary.read(rows).float(), dictionary.counts[rows.start : rows.stop].float()  # [n, D], [n]
    shares = (counts / counts.sum())[:, None]
    variance = (shares * (vectors - (shares * vectors).sum(dim=0)).square()).sum() / dictionary.hidden_size
    return float(variance * torch.special.entr(shares).sum().exp())


def _lines(report: WordReport) -> list[str]:
    senses = sorted(report.senses or (), key=lambda sense: -sense.count)
    shown = f", of which {_SENSES} are shown" if len(senses) > _SENSES else ""
    lines = [f"{report.word}: {len(senses)} senses, of {sum(sense.count for sense in senses):,} states{shown}"]
    for sense in senses[:_SENSES]:
        near = ", ".join(f"{name}{f' ({relation})' if relation else ''}" for name, _, relation in sense.neighbours)
        states = counted(sense.count, "state")
        lines.append(f"  {states}{f'; near {near}' if near else ''}")
        lines += [f"    {context}" for context in sense.contexts]
    return lines
