"""`dskd inspect plot`: a picture of senses of words, synonyms and antonyms in two dimensions (the paper's figure 1)."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from dskd.artifacts.hashing import digest_of_json
from dskd.config import Config
from dskd.errors import UserError, listed
from dskd.inspection.artifacts import Teacher, open_teacher
from dskd.inspection.drawing import DrawnEntry, Picture, draw_picture
from dskd.inspection.tokens import entry_texts, readable, token_texts
from dskd.lexicon.relations import RELATIONS
from dskd.senses.dictionary import SenseDictionary, load_fitting_dictionary
from dskd.senses.entries import tokenize_words

Method = Literal["pca", "tsne"]
_MIN_POINTS = 3
_MOST_PERPLEXITY = 30.0
_WORDS_IN_A_FILE_NAME = 4


def plot_words(
    config: Config, words: Sequence[str], *, method: Method = "pca", neighbours: int = 10, output: Path | None = None
) -> str:
    """Draws the picture, and returns a line with its path and contents.

    Each word is one token and has senses; `neighbours` is the most synonyms, and the most antonyms, that it gets
    (:func:`choose_entries`). `output` is the path of a .png; None chooses a name in `WORKDIR/plots`.

    Raises:
        UserError: when words cannot be drawn, naming all of them; when there are too few points; when an artifact is
            missing; or when `output` is not a .png file.
    """
    path = output or config.path("plots", _file_name(words, method))
    if path.suffix.lower() != ".png":
        raise UserError(f"--output {path}: pictures are PNG files; give it a name that ends in .png")
    if path.is_dir():
        raise UserError(f"--output {path}: this is a folder; name a file in it")
    teacher = open_teacher(config)
    dictionary, _ = load_fitting_dictionary(config, teacher.folder)
    picture = compose_picture(dictionary, teacher, words, method=method, neighbours=neighbours, seed=config.seed)
    unlabelled = draw_picture(picture, path)
    drawn = {kind: sum(entry.kind == kind for entry in picture.entries) for kind in ("word", *RELATIONS)}
    text = (
        f"{path}: {len(picture.points):,} senses of {', '.join(picture.words)}, and of {drawn['synonym']} synonyms and "
        f"{drawn['antonym']} antonyms of them"
    )
    return text + (f"; no room for {unlabelled} labels, lower --neighbours" if unlabelled else "")


def compose_picture(
    dictionary: SenseDictionary,
    teacher: Teacher,
    words: Sequence[str],
    *,
    method: Method,
    neighbours: int,
    seed: int,
) -> Picture:
    """Chooses the entries, reads their senses and projects them to two dimensions. Raises a UserError that names all
    words which cannot be drawn, or when there are too few points.
    """
    words = tuple(dict.fromkeys(words))
    chosen = choose_entries(dictionary, tokens_of_words(dictionary, teacher, words), neighbours)
    rows = [dictionary.rows_of(entry) for entry, _, _ in chosen]
    vectors = np.concatenate([dictionary.read(part).float().numpy() for part in rows])
    different = len(np.unique(vectors, axis=0))
    if different < _MIN_POINTS:
        raise UserError(
            f"{', '.join(words)}: there are {different} different senses to draw, and a picture needs {_MIN_POINTS}; "
            "add words, or raise --neighbours"
        )
    points, how = project(vectors, method, seed)
    texts = list(words) + entry_texts(dictionary.entries, [e for e, _, _ in chosen[len(words) :]], teacher.tokenizer)
    stops = np.cumsum([len(part) for part in rows]).tolist()
    entries = tuple(
        DrawnEntry(text, owner, kind, slice(stop - len(part), stop))
        for text, (_, owner, kind), part, stop in zip(texts, chosen, rows, stops, strict=True)
    )
    counts = np.concatenate([dictionary.counts[part.start : part.stop].numpy() for part in rows])
    return Picture(words, entries, points, counts, f"Senses of {_and(words)}: {how}")


def tokens_of_words(dictionary: SenseDictionary, teacher: Teacher, words: Sequence[str]) -> list[int]:
    """Returns the token of each word. Raises a UserError that names all words which are not one token or have no
    sense.
    """
    kept, problems = [], []
    for word, tokens in zip(words, tokenize_words(list(words), teacher.tokenizer, teacher.vocab_size), strict=True):
        if len(tokens) != 1:
            pieces = [readable(text) for text in token_texts(teacher.tokenizer, [[token] for token in tokens])]
            problems.append(f"{word}: the tokenizer makes {len(tokens)} tokens of it ({' | '.join(pieces)})")
        elif not dictionary.rows_of(tokens[0]):
            problems.append(f"{word}: it has no senses, because the teacher has no state of it")
        else:
            kept.append(tokens[0])
    if problems:
        raise UserError(
            listed(f"{len(problems)} of {len(words)} words cannot be drawn; choose words of one token", problems)
        )
    return kept


def choose_entries(dictionary: SenseDictionary, tokens: Sequence[int], neighbours: int) -> list[tuple[int, int, str]]:
    """Returns (entry, index of its word, kind) for the words, then for their neighbours with most states.

    Each entry occurs once. Among the neighbours, tokens come before spans, since a span has no states of its own, only
    those of its parts.
    """
    chosen = [(token, owner, "word") for owner, token in enumerate(tokens)]
    taken = set(tokens)
    for owner, token in enumerate(tokens):
        for relation in RELATIONS:
            states = {}
            for entry in dictionary.entries.neighbours(relation).of(token):
                rows = dictionary.rows_of(entry)
                if rows and entry not in taken:
                    states[entry] = int(dictionary.counts[rows.start : rows.stop].sum())
            most = sorted(states, key=lambda entry: (entry >= dictionary.vocab_size, -states[entry], entry))
            for entry in most[:neighbours]:
                chosen.append((entry, owner, relation))
                taken.add(entry)
    return chosen


def project(vectors: np.ndarray, method: Method, seed: int) -> tuple[np.ndarray, str]:
    """Projects vectors [P, D] to points [P, 2], and returns these with a description of the projection."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    random_state = seed % 2**32  # sklearn accepts no larger seeds
    if method == "pca":
        pca = PCA(n_components=2, random_state=random_state)
        points = pca.fit_transform(vectors)
        first, second = (100 * pca.explained_variance_ratio_).tolist()
        return points, f"PCA, {first:.0f} % + {second:.0f} % of the variance"
    perplexity = min(_MOST_PERPLEXITY, (len(vectors) - 1) / 3)
    points = TSNE(n_components=2, perplexity=perplexity, init="pca", random_state=random_state).fit_transform(vectors)
    return points, f"t-SNE, perplexity {perplexity:.3g}"


def _file_name(words: Sequence[str], method: Method) -> str:
    names = [re.sub(r"[^\w-]+", "_", word) for word in words[:_WORDS_IN_A_FILE_NAME]]
    others = words[_WORDS_IN_A_FILE_NAME:]
    more = [f"and-{len(others)}-more-{digest_of_json(others)[:6]}"] if others else []
    return f"senses-{'-'.join([*names, *more])}{'-tsne' if method == 'tsne' else ''}.png"


def _and(words: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))
