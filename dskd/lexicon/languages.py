"""Open Multilingual WordNet: lemmas of other languages for the synsets of Princeton's WordNet 3.0, named by offset.

It is read in nltk's data folders, unpacked or zipped. A WordNet with other offsets is refused.
"""

import functools
import hashlib
import io
import re
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from dskd.artifacts.pointers import refuse_pointer_beginning
from dskd.errors import UserError
from dskd.lexicon.wordnet import WordNet

# Open Multilingual WordNet as nltk distributes it, the newest first, and the WordNet whose synsets it names.
OMW_PACKAGES = ("omw-2.0", "omw-1.4")
OMW_VERSION = "3.0"
_OMW_SYNSET = re.compile(r"[0-9]{8}-[nvars]")
# Lines of a language, as a share of those of one part of speech, whose synsets a WordNet may lack. Of Princeton's 3.0
# hardly a line in a hundred is such a one; of Debian's, two of three verbs and every other adjective.
_MAX_MISSING = 0.25
_PART_NAMES = {"n": "noun", "v": "verb", "a": "adjective", "s": "adjective", "r": "adverb"}
_PRINCETONS = (
    "fetch Princeton's with `python -m nltk.downloader wordnet`, or set wordnet.path to a folder that has it; or set "
    "lexicon.languages=[eng]"
)


@dataclass(frozen=True)
class LanguageFile:
    """The file of one language of Open Multilingual WordNet: where it is, and its lines."""

    name: str
    content: bytes

    @property
    def digest(self) -> str:
        """Identity by content."""
        return hashlib.sha256(self.content).hexdigest()


@dataclass(frozen=True)
class Language:
    """A language that was opened: its file, how many lines it has, and (number, what is wrong) of malformed ones."""

    name: str
    lines: int
    malformed: tuple[tuple[int, str], ...]


def find_language(code: str) -> LanguageFile:
    """The file of a language (ISO 639-3) of Open Multilingual WordNet, unpacked or zipped, in nltk's data folders.

    Raises:
        UserError: when there is none, with the languages that are there, or the ways to get them.
    """
    import nltk

    there: set[str] = set()
    for package in OMW_PACKAGES:
        for base in nltk.data.path:
            for name, read in _language_files(Path(base) / "corpora", package):
                found = name.removesuffix(".tab").rsplit("wn-data-", 1)[1]
                if found == code:
                    return LanguageFile(name, read())
                there.add(found)
    if there:
        raise UserError(
            f"lexicon.languages: Open Multilingual WordNet has no {code!r} here; it has {', '.join(sorted(there))} "
            "(ISO 639-3 codes)"
        )
    raise UserError(
        f"lexicon.languages: {code!r} needs Open Multilingual WordNet, which is in none of nltk's data folders. Three "
        "ways out:\n"
        f"  with the internet:  python -m nltk.downloader {OMW_PACKAGES[-1]}\n"
        f"  from another place: put its folder or zip as corpora/{OMW_PACKAGES[-1]} into a folder of NLTK_DATA\n"
        "  without it:         lexicon.languages=[eng]"
    )


def open_language(wordnet: WordNet, code: str) -> Language:
    """Makes `synset.lemma_names(code)` of the reader give the lemmas of another language.

    Lines that are not `synset<TAB>kind<TAB>value` with a synset of WordNet are left out, and named in what is returned.

    Raises:
        UserError: when the language is not there, its file is not UTF-8, or the WordNet is not the one whose synsets it
            names.
    """
    version = wordnet.reader.get_version()
    if version != OMW_VERSION:
        raise UserError(
            f"lexicon.languages: Open Multilingual WordNet names synsets of WordNet {OMW_VERSION}, but "
            f"{wordnet.origin} is WordNet {version}; {_PRINCETONS}"
        )
    file = find_language(code)
    refuse_pointer_beginning(file.content, file.name)
    try:
        lines = file.content.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{file.name}: this is not UTF-8 text ({error}); fetch it again") from None
    malformed: list[tuple[int, str]] = []
    kept: list[str] = []
    named: Counter[str] = Counter()  # lines that name a synset, by its part of speech
    missing: Counter[str] = Counter()  # those whose synset this WordNet lacks
    count = 0
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.startswith("#"):
            continue
        count += 1
        fields = line.strip().split("\t")
        if len(fields) < 3:
            malformed.append((number, f"{len(fields)} fields"))
        elif not _OMW_SYNSET.fullmatch(fields[0]):
            malformed.append((number, f"{fields[0]!r} names no synset"))
        else:
            part = _PART_NAMES[fields[0][-1]]
            named[part] += 1
            if _has_synset(wordnet, fields[0]):
                kept.append(f"{line}\n")
            else:
                missing[part] += 1
                malformed.append((number, f"the WordNet in {wordnet.origin} has no synset {fields[0]}"))
    _check_offsets(wordnet, file.name, named, missing)
    # nltk's own way to bring in a language; what it would skip in silence or fail on has been taken out.
    wordnet.reader.custom_lemmas(io.StringIO("".join(kept)), code)
    return Language(file.name, count, tuple(malformed))


def _has_synset(wordnet: WordNet, name: str) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # nltk warns of what is answered here
        return wordnet.reader.of2ss(name) is not None


def _check_offsets(wordnet: WordNet, file: str, named: Mapping[str, int], missing: Mapping[str, int]) -> None:
    """Refuses a WordNet that lacks too many synsets of a part of speech: then it has other offsets."""
    if all(missing[part] <= _MAX_MISSING * named[part] for part in named):
        return
    shares = ", ".join(f"{missing[part]:,} of {named[part]:,} {part} lines" for part in named if missing[part])
    raise UserError(
        f"lexicon.languages: the WordNet in {wordnet.origin} is not the one that Open Multilingual WordNet is for: it "
        f"lacks the synsets of {shares} of {file}. These are named by their offsets in Princeton's WordNet "
        f"{OMW_VERSION}, and other editions have other offsets, as Debian's wordnet-base has; {_PRINCETONS}"
    )


def _language_files(corpora: Path, package: str) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """(name, how to read it) of the files of a package, unpacked or zipped, in the order of their names."""
    for path in sorted((corpora / package).glob("*/wn-data-*.tab")):
        yield str(path), path.read_bytes
    archive = corpora / f"{package}.zip"
    if not archive.is_file():
        return
    try:
        with zipfile.ZipFile(archive) as opened:
            for name in sorted(opened.namelist()):
                if re.fullmatch(r"[^/]+/[^/]+/wn-data-[^/]+\.tab", name):
                    yield f"{archive}/{name}", functools.partial(opened.read, name)
    except zipfile.BadZipFile as error:
        raise UserError(f"{archive}: this zip file is damaged ({error}); fetch it again") from None
