"""Opens languages of Open Multilingual WordNet, which has lemmas in other languages for WordNet's synsets.

It names the synsets of Princeton's WordNet 3.0 by offset, so a WordNet with other offsets is refused. Its files are
read from nltk's data folders, unpacked or zipped.
"""

import functools
import io
import re
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from dskd.artifacts.pointers import refuse_pointer_beginning
from dskd.errors import UserError
from dskd.lexicon.reading import Report
from dskd.lexicon.wordnet import PARTS_OF_SPEECH, WordNet

# nltk's packages of Open Multilingual WordNet, newest first, and the version of the WordNet whose synsets they name.
OMW_PACKAGES = ("omw-2.0", "omw-1.4")
OMW_VERSION = "3.0"
_OMW_SYNSET = re.compile(r"[0-9]{8}-[nvars]")
# The largest share of a language's lines, for each part of speech, whose synsets a WordNet may lack. Princeton's 3.0
# lacks hardly one line in a hundred; Debian's lacks two of three verb lines and every other adjective line.
_MAX_MISSING = 0.25
_PRINCETONS = (
    "fetch Princeton's with `python -m nltk.downloader wordnet`, or set wordnet.path to a folder that has it; or set "
    "lexicon.languages=[eng]"
)


def find_language(code: str) -> tuple[str, bytes]:
    """Returns path and content of the file of a language (ISO 639-3) in nltk's data folders, unpacked or zipped. If
    there is none, the UserError names the languages that were found, or the ways to get them.
    """
    import nltk

    others: set[str] = set()
    for package in OMW_PACKAGES:
        for base in nltk.data.path:
            for name, read in _language_files(Path(base) / "corpora", package):
                language = name.removesuffix(".tab").rsplit("wn-data-", 1)[1]
                if language == code:
                    return name, read()
                others.add(language)
    if others:
        raise UserError(
            f"lexicon.languages: the Open Multilingual WordNet on this machine has no {code!r}; it has "
            f"{', '.join(sorted(others))} (ISO 639-3 codes)"
        )
    raise UserError(
        f"lexicon.languages: {code!r} needs Open Multilingual WordNet, which is in none of nltk's data folders. Three "
        "ways out:\n"
        f"  with the internet:  python -m nltk.downloader {OMW_PACKAGES[-1]}\n"
        f"  from another place: put its folder or zip as corpora/{OMW_PACKAGES[-1]} into a folder of NLTK_DATA\n"
        "  without it:         lexicon.languages=[eng]"
    )


def open_language(wordnet: WordNet, code: str, report: Report) -> None:
    """Adds a language to WordNet's reader, so that `synset.lemma_names(code)` returns its lemmas.

    Skips lines that are not `synset<TAB>kind<TAB>value` with a synset of WordNet, and adds them to the report.

    Raises:
        UserError: when the language is missing, its file is not UTF-8, or this WordNet is not the one whose synsets the
            file names.
    """
    version = wordnet.reader.get_version()
    if version != OMW_VERSION:
        raise UserError(
            f"lexicon.languages: Open Multilingual WordNet names synsets of WordNet {OMW_VERSION}, but "
            f"{wordnet.origin} is WordNet {version}; {_PRINCETONS}"
        )
    file, content = find_language(code)
    refuse_pointer_beginning(content, file)
    try:
        lines = content.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: this is not UTF-8 text ({error}); fetch it again") from None
    # Keep the lines that name a synset of this WordNet, and count the others by part of speech.
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
            report.add_malformed(file, number, f"{len(fields)} fields")
        elif not _OMW_SYNSET.fullmatch(fields[0]):
            report.add_malformed(file, number, f"{fields[0]!r} names no synset")
        else:
            part = PARTS_OF_SPEECH[fields[0][-1]]
            named[part] += 1
            if _has_synset(wordnet, fields[0]):
                kept.append(f"{line}\n")
            else:
                missing[part] += 1
                lacks = f"the WordNet in {wordnet.origin} has no synset {fields[0]}"
                report.add_malformed(file, number, lacks)
    _check_offsets(wordnet, file, named, missing)
    # nltk's own function to add a language. The lines that it would skip silently or fail on are no longer among them.
    wordnet.reader.custom_lemmas(io.StringIO("".join(kept)), code)
    report.finish(file, count, "a synset, a kind and a value, separated by tabs")


def _has_synset(wordnet: WordNet, name: str) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # nltk warns about missing synsets
        return wordnet.reader.of2ss(name) is not None


def _check_offsets(wordnet: WordNet, file: str, named: Mapping[str, int], missing: Mapping[str, int]) -> None:
    """Raises a UserError if WordNet lacks the synsets of more than `_MAX_MISSING` of the file's lines of a part of
    speech: then its offsets are others.
    """
    if all(missing[part] <= _MAX_MISSING * named[part] for part in named):
        return
    shares = ", ".join(f"{missing[part]:,} of {named[part]:,} {part} lines" for part in named if missing[part])
    raise UserError(
        f"lexicon.languages: the WordNet in {wordnet.origin} is not the one that Open Multilingual WordNet is for: it "
        f"lacks the synsets of {shares} of {file}. These lines name synsets by their offsets in Princeton's WordNet "
        f"{OMW_VERSION}, and other editions, such as Debian's wordnet-base, have other offsets; {_PRINCETONS}"
    )


def _language_files(corpora: Path, package: str) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """Yields (name, function that reads it) for the files of a package, unpacked or zipped, in the order of names."""
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
