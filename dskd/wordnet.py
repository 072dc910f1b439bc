"""Finding WordNet, and opening it through nltk's reader.

Places are tried in a fixed order: the config's `wordnet.path`, nltk's data folders, `nltk.download`, and the dictionary
files of Debian's `wordnet-base`. Dictionary files alone are not what nltk expects (there is no `lexnames`, and nltk
refuses folders outside its data path), so they are copied once into a cache folder and completed there.

Other languages come from Open Multilingual WordNet, which gives the synsets of WordNet 3.0 lemmas in them. It is read
where it lies in nltk's data folders.
"""

import functools
import hashlib
import io
import os
import re
import shutil
import socket
import sys
import uuid
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dskd.errors import UserError
from dskd.manifest import digest_of_json, sha256_of_file

# The second is where the Makefile unpacks the Debian package for users who may not install it.
DICTIONARY_FOLDERS = (Path("/usr/share/wordnet"), Path(sys.prefix) / "share" / "wordnet")
_PARTS_OF_SPEECH = ("noun", "verb", "adj", "adv")
DICTIONARY_FILES = tuple(f"{kind}.{part}" for kind in ("data", "index") for part in _PARTS_OF_SPEECH)

# The lexicographer files of WordNet 3.0 in the order of their numbers (lexnames(5WN)); nltk reads them from `lexnames`.
_NOUN_FILES = (
    "Tops act animal artifact attribute body cognition communication event feeling food group location motive object "
    "person phenomenon plant possession process quantity relation shape state substance time"
)
_VERB_FILES = (
    "body change cognition communication competition consumption contact creation emotion motion perception possession "
    "social stative weather"
)

# Open Multilingual WordNet as nltk distributes it, the newest first, and the WordNet whose synsets it names.
OMW_PACKAGES = ("omw-2.0", "omw-1.4")
OMW_VERSION = "3.0"
_OMW_SYNSET = re.compile(r"[0-9]{8}-[nvars]")


@dataclass(frozen=True)
class WordNet:
    """An opened WordNet: nltk's reader, the folder it reads, and the digest of what is in it."""

    reader: Any
    folder: Path
    digest: str


@functools.cache  # nltk parses a synset when it is first read: the stages of one process share that work
def open_wordnet(path: str | None = None, *, allow_download: bool = True) -> WordNet:
    """Opens the first WordNet that is found.

    Args:
        path: the config's `wordnet.path`; when given, no other place is tried.
        allow_download: try `nltk.download` when nothing lies on disk.

    Raises:
        UserError: when there is none, with the ways to get one.
    """
    import nltk

    cache = _cache_folder()
    if str(cache) not in nltk.data.path:
        nltk.data.path.append(str(cache))
    if path is not None:
        folder = Path(path).expanduser()
        missing = [name for name in DICTIONARY_FILES if not (folder / name).is_file()]
        if missing:
            raise UserError(
                f"wordnet.path: {folder} is not a WordNet dictionary folder: it lacks {', '.join(missing)}; name the "
                "folder that has data.noun and index.noun, or remove the key to let WordNet be looked for"
            )
        digest = digest_of_json({name: sha256_of_file(folder / name) for name in DICTIONARY_FILES})
        return _open(_completed_copy(folder, cache / "corpora" / f"wordnet-{digest[:12]}"))
    found = _in_nltk_data()
    if found is None and allow_download:
        found = _downloaded(cache)
    if found is None:
        debian = next((folder for folder in DICTIONARY_FOLDERS if _is_dictionary(folder)), None)
        found = debian and _completed_copy(debian, cache / "corpora" / "wordnet")
    if found is None:
        raise UserError(
            "WordNet was found neither in nltk's data folders nor in "
            f"{' or '.join(str(folder) for folder in DICTIONARY_FOLDERS)}, and nltk could not download it. Three ways "
            "out:\n"
            "  with the internet:   python -m nltk.downloader wordnet\n"
            "  on Debian or Ubuntu: apt-get install wordnet-base\n"
            "  from another place:  wordnet.path=FOLDER, a folder with WordNet's data.noun, index.noun, …"
        )
    return _open(found)


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
        UserError: when the language is not there, its file is not UTF-8, or it names synsets of another WordNet.
    """
    version = wordnet.reader.get_version()
    if version != OMW_VERSION:
        raise UserError(
            f"lexicon.languages: Open Multilingual WordNet names synsets of WordNet {OMW_VERSION}, but "
            f"{wordnet.folder} is WordNet {version}; set wordnet.path to a WordNet {OMW_VERSION}, or "
            "lexicon.languages=[eng]"
        )
    file = find_language(code)
    try:
        lines = file.content.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{file.name}: this is not UTF-8 text ({error}); fetch it again") from None
    malformed: list[tuple[int, str]] = []
    kept: list[str] = []
    count = 0
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.startswith("#"):
            continue
        count += 1
        problem = _problem_of(line, wordnet)
        if problem:
            malformed.append((number, problem))
        else:
            kept.append(f"{line}\n")
    # nltk's own way to bring in a language; what it would skip in silence or fail on has been taken out.
    wordnet.reader.custom_lemmas(io.StringIO("".join(kept)), code)
    return Language(file.name, count, tuple(malformed))


def _problem_of(line: str, wordnet: WordNet) -> str | None:
    fields = line.strip().split("\t")
    if len(fields) < 3:
        return f"{len(fields)} fields"
    if not _OMW_SYNSET.fullmatch(fields[0]):
        return f"{fields[0]!r} names no synset"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # nltk warns of what is returned as a problem here
        synset = wordnet.reader.of2ss(fields[0])
    return None if synset else f"WordNet {OMW_VERSION} has no synset {fields[0]}"


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


def _open(folder: Path) -> WordNet:
    from nltk.corpus.reader.wordnet import WordNetCorpusReader

    class EnglishReader(WordNetCorpusReader):
        """nltk's reader without the map to other WordNet versions, which needs files that dictionaries lack."""

        def map_wn(self, version: str = "wordnet") -> None:
            return None

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # "multilingual functions are not available"
            reader = EnglishReader(str(folder), omw_reader=None)
        reader.synset("entity.n.01")
    except Exception as error:  # nltk raises what the damage makes it raise
        raise UserError(
            f"{folder}: nltk cannot read this WordNet ({type(error).__name__}: {error}); remove the folder, and it is "
            "made or downloaded again"
        ) from error
    names = [name for name in DICTIONARY_FILES if (folder / name).is_file()]
    return WordNet(reader, folder, digest_of_json({name: sha256_of_file(folder / name) for name in names}))


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "dskd" / "nltk_data"


def _is_dictionary(folder: Path) -> bool:
    return all((folder / name).is_file() for name in DICTIONARY_FILES)


def _in_nltk_data() -> Path | None:
    """The unpacked `corpora/wordnet` of one of nltk's data folders; a `wordnet.zip` is unpacked into the cache."""
    import nltk

    for base in nltk.data.path:
        folder = Path(base) / "corpora" / "wordnet"
        if _is_dictionary(folder) and (folder / "lexnames").is_file():
            return folder
    for base in nltk.data.path:
        archive = Path(base) / "corpora" / "wordnet.zip"
        if archive.is_file():
            folder = _cache_folder() / "corpora" / "wordnet"
            with _private_folder(folder) as partial:
                shutil.unpack_archive(archive, partial)
                for file in (partial / "wordnet").iterdir():
                    file.rename(partial / file.name)
            return folder
    return None


def _downloaded(cache: Path) -> Path | None:
    import nltk

    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(20)  # nltk sets none, and a network that swallows packets would hang for minutes
    try:
        cache.mkdir(parents=True, exist_ok=True)
        nltk.download("wordnet", download_dir=str(cache), quiet=True, print_error_to=io.StringIO())
    except (OSError, ValueError):
        return None
    finally:
        socket.setdefaulttimeout(before)
    return _in_nltk_data()


def _completed_copy(source: Path, folder: Path) -> Path:
    """`folder`, a copy of the dictionary files in `source` with what nltk wants beside them."""
    if not (_is_dictionary(folder) and (folder / "lexnames").is_file()):
        with _private_folder(folder) as partial:
            for file in sorted(source.iterdir()):
                if file.is_file():
                    shutil.copyfile(file, partial / file.name)
            for notice in (Path("/usr/share/doc/wordnet-base/copyright"), source / "copyright"):
                if notice.is_file():  # Princeton's licence asks that its notice goes with every copy
                    shutil.copyfile(notice, partial / "LICENSE")
            if not (partial / "lexnames").is_file():
                (partial / "lexnames").write_text(_lexnames(), encoding="ascii")
    return folder


@contextmanager
def _private_folder(target: Path) -> Iterator[Path]:
    """A folder that becomes `target` when the block ends; several processes may do it at once, one of them wins."""
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise UserError(
            f"{partial.parent}: cannot write there ({error.strerror}); set XDG_CACHE_HOME to a folder you may write"
        ) from None
    try:
        yield partial
        try:
            partial.rename(target)
        except OSError:
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _lexnames() -> str:
    names = ["adj.all", "adj.pert", "adv.all"]
    names += [f"noun.{name}" for name in _NOUN_FILES.split()]
    names += [f"verb.{name}" for name in _VERB_FILES.split()]
    names += ["adj.ppl"]
    numbers = {"noun": 1, "verb": 2, "adj": 3, "adv": 4}
    return "".join(f"{i:02d}\t{name}\t{numbers[name.split('.')[0]]}\n" for i, name in enumerate(names))
