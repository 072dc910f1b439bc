"""Finds WordNet, and opens it with nltk's reader.

It tries several places in a fixed order: the config's `wordnet.path`, nltk's data folders, `nltk.download`, and the
dictionary files of Debian's `wordnet-base`. Dictionary files alone are not enough for nltk: it needs `lexnames`, and
refuses folders outside its data path. So they are copied into a cache folder, named by their content, and completed
there.

Debian's files have other offsets than Princeton's WordNet 3.0, so they do not work for other languages
(:mod:`dskd.lexicon.languages`). For these, a download is tried even if Debian's files exist.
"""

import functools
import io
import os
import shutil
import socket
import sys
import uuid
import warnings
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dskd.artifacts.hashing import digest_of_json, sha256_of_file
from dskd.artifacts.pointers import refuse_pointer_beginning
from dskd.errors import UserError

# The second is the folder into which the Makefile unpacks the Debian package for users who may not install it.
DICTIONARY_FOLDERS = (Path("/usr/share/wordnet"), Path(sys.prefix) / "share" / "wordnet")
PARTS_OF_SPEECH = {"n": "noun", "v": "verb", "a": "adjective", "s": "adjective", "r": "adverb"}  # by WordNet's letters
_PARTS_IN_FILE_NAMES = ("noun", "verb", "adj", "adv")
DICTIONARY_FILES = tuple(f"{kind}.{part}" for kind in ("data", "index") for part in _PARTS_IN_FILE_NAMES)
_EXCEPTION_FILES = tuple(f"{part}.exc" for part in _PARTS_IN_FILE_NAMES)  # nltk does not open a WordNet without them
_COPIES = "wordnet-found"  # prefix of the names of the copies of DICTIONARY_FOLDERS

# The lexicographer files of WordNet 3.0 in the order of their numbers (lexnames(5WN)); nltk reads them from `lexnames`.
_NOUN_FILES = (
    "Tops act animal artifact attribute body cognition communication event feeling food group location motive object "
    "person phenomenon plant possession process quantity relation shape state substance time"
)
_VERB_FILES = (
    "body change cognition communication competition consumption contact creation emotion motion perception possession "
    "social stative weather"
)


@dataclass(frozen=True)
class WordNet:
    """An opened WordNet."""

    reader: Any  # nltk's
    folder: Path  # the folder that the reader reads
    origin: Path  # the folder that `folder` is a copy of, or `folder` itself
    digest: str  # of the dictionary files


@functools.cache  # nltk parses a synset when it is first read; the stages of one process share that work
def open_wordnet(path: str | None = None, *, other_languages: bool = False) -> WordNet:
    """Opens the first WordNet in the module's order of places. If `path` is set (`wordnet.path`), tries only that.

    `other_languages` tries to download Princeton's WordNet 3.0 from nltk even if the cache has a copy of another one.

    Raises:
        UserError: when there is none (it names the ways to get one), or when the first one is incomplete.
    """
    cache = _searched_cache()
    if path is not None:
        folder = Path(path).expanduser()
        missing = _missing_files(folder)
        if missing:
            raise UserError(
                f"wordnet.path: {folder} is not a complete WordNet dictionary folder: it lacks {', '.join(missing)}; "
                "add them, name the folder that has data.noun, index.noun, noun.exc, …, or remove the key, and "
                "dskd searches for WordNet"
            )
        return _open(_completed_copy(folder, cache, "wordnet"), folder)
    # Without `path`: nltk's own data first, then a download, and Debian's files last. An earlier copy of the latter
    # makes the download unnecessary, unless other languages need Princeton's.
    in_nltk = _find_in_nltk_data()
    debian = _debians_folder()
    copy = None if in_nltk else _earlier_copy(cache, debian)
    if in_nltk is None and (copy is None or other_languages):
        in_nltk = _downloaded(cache)
    if in_nltk is not None:
        return _open(in_nltk, in_nltk)
    if copy is None and debian is not None:
        copy = _completed_copy(debian, cache, _COPIES)
    if copy is None:
        raise UserError(
            "WordNet was found neither in nltk's data folders nor in "
            f"{' or '.join(str(folder) for folder in DICTIONARY_FOLDERS)}, and nltk could not download it. Three ways "
            "out:\n"
            "  with the internet:   python -m nltk.downloader wordnet\n"
            "  on Debian or Ubuntu: apt-get install wordnet-base\n"
            "  from another place:  wordnet.path=FOLDER, a folder with WordNet's data.noun, index.noun, …"
        )
    return _open(copy, debian or copy)


def needs_no_download(path: str | None = None) -> bool:
    """Returns True if :func:`open_wordnet` finds a WordNet on this machine; raises its errors for an incomplete one."""
    cache = _searched_cache()
    return path is not None or (_find_in_nltk_data() or _earlier_copy(cache, _debians_folder())) is not None


def _searched_cache() -> Path:
    """Returns the cache, after adding it to the folders in which nltk finds data: it reads no others."""
    import nltk

    cache = _cache_folder()
    if str(cache) not in nltk.data.path:
        nltk.data.path.append(str(cache))
    return cache


def _debians_folder() -> Path | None:
    return next((folder for folder in DICTIONARY_FOLDERS if _is_dictionary(folder)), None)


def _open(folder: Path, origin: Path) -> WordNet:
    from nltk.corpus.reader.wordnet import WordNetCorpusReader

    class EnglishReader(WordNetCorpusReader):
        """The reader of nltk without the map to other WordNet versions: a dictionary folder lacks its files."""

        def map_wn(self, version: str = "wordnet") -> None:
            return None

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # "multilingual functions are not available"
            reader = EnglishReader(str(folder), omw_reader=None)
        reader.synset("entity.n.01")
    except Exception as error:  # nltk can raise any kind of error for damaged files
        for name in DICTIONARY_FILES:
            refuse_pointer_beginning((folder / name).read_bytes(), origin / name)
        remedy = "remove the folder, and dskd downloads it again" if folder == origin else "repair the files there"
        raise UserError(
            f"{origin}: nltk cannot read this WordNet ({type(error).__name__}: {error}); {remedy}"
        ) from error
    return WordNet(reader, folder, origin, _digest(folder, DICTIONARY_FILES))


def _digest(folder: Path, names: Iterable[str]) -> str:
    return digest_of_json({name: sha256_of_file(folder / name) for name in names})


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "dskd" / "nltk_data"


def _missing_files(folder: Path) -> list[str]:
    return [name for name in (*DICTIONARY_FILES, *_EXCEPTION_FILES) if not (folder / name).is_file()]


def _is_dictionary(folder: Path, also: tuple[str, ...] = ()) -> bool:
    """Returns True if a folder is a complete dictionary, with the files named in `also` too. Raises a UserError when it
    has only some of the files.
    """
    missing = [*_missing_files(folder), *(name for name in also if not (folder / name).is_file())]
    if missing and any((folder / name).is_file() for name in DICTIONARY_FILES):
        raise UserError(
            f"{folder}: this WordNet is incomplete: it lacks {', '.join(missing)}; complete it, or remove the folder, "
            "and dskd searches for WordNet elsewhere"
        )
    return not missing


def _find_in_nltk_data() -> Path | None:
    """Returns the `corpora/wordnet` of one of nltk's data folders; unpacks a `wordnet.zip` into the cache if needed."""
    import nltk

    for base in map(Path, nltk.data.path):
        folder = base / "corpora" / "wordnet"
        # Earlier versions of dskd put their copy of Debian's files there; unlike nltk's data, it has no `index.sense`.
        is_copy = base == _cache_folder() and not (folder / "index.sense").is_file()
        if not is_copy and _is_dictionary(folder, ("lexnames",)):
            return folder
    for base in nltk.data.path:
        archive = Path(base) / "corpora" / "wordnet.zip"
        if archive.is_file():
            return _unpacked(archive)
    return None


def _unpacked(archive: Path) -> Path:
    """Unpacks a `wordnet.zip` into the cache, unless the same content is there already, and returns the folder."""
    folder = _cache_folder() / "corpora" / f"wordnet-zip-{sha256_of_file(archive)[:12]}"
    if not folder.is_dir():
        with _private_folder(folder) as partial:
            try:
                shutil.unpack_archive(archive, partial)
                for file in (partial / "wordnet").iterdir():
                    file.rename(partial / file.name)
            except (shutil.ReadError, zipfile.BadZipFile, OSError) as error:
                raise UserError(f"{archive}: this zip file has no readable WordNet ({error}); fetch it again") from None
            _is_dictionary(partial, ("lexnames",))
    return folder


def _downloaded(cache: Path) -> Path | None:
    import nltk

    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(20)  # nltk sets none, and would hang for minutes if the network drops packets
    try:
        cache.mkdir(parents=True, exist_ok=True)
        nltk.download("wordnet", download_dir=str(cache), quiet=True, print_error_to=io.StringIO())
    except (OSError, ValueError):
        return None
    finally:
        socket.setdefaulttimeout(before)
    return _find_in_nltk_data()


def _earlier_copy(cache: Path, source: Path | None) -> Path | None:
    """Returns the copy of `source` in the cache, or the newest copy of any source if `source` is None."""
    if source is not None:
        copy = _copy_folder(source, cache, _COPIES)
        return copy if copy.is_dir() else None
    copies = sorted((cache / "corpora").glob(f"{_COPIES}-*"), key=lambda folder: folder.stat().st_mtime)
    return copies[-1] if copies else None


def _copy_folder(source: Path, cache: Path, name: str) -> Path:
    return cache / "corpora" / f"{name}-{_digest(source, (*DICTIONARY_FILES, *_EXCEPTION_FILES))[:12]}"


def _completed_copy(source: Path, cache: Path, name: str) -> Path:
    """Copies the files in `source` into the cache, adds what nltk also needs, and returns the folder.

    The folder's name contains a digest of the content, so a corrected source gets a new copy.
    """
    folder = _copy_folder(source, cache, name)
    if not folder.is_dir():
        with _private_folder(folder) as partial:
            for file in sorted(source.iterdir()):
                if file.is_file():
                    shutil.copyfile(file, partial / file.name)
            for notice in (Path("/usr/share/doc/wordnet-base/copyright"), source / "copyright"):
                if notice.is_file():  # Princeton's licence requires its notice in every copy
                    shutil.copyfile(notice, partial / "LICENSE")
            if not (partial / "lexnames").is_file():
                (partial / "lexnames").write_text(_lexnames(), encoding="ascii")
    return folder


@contextmanager
def _private_folder(target: Path) -> Iterator[Path]:
    """Yields a temporary folder that is renamed to `target` when the block ends.

    Several processes may do this at once; one of them wins, and the others drop theirs.
    """
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


def spelled(name: str) -> str:
    """Returns a lemma's name as text has it, without the "(p)" and the like that mark an adjective's position."""
    return name.split("(")[0].replace("_", " ")


def _lexnames() -> str:
    names = ["adj.all", "adj.pert", "adv.all"]
    names += [f"noun.{name}" for name in _NOUN_FILES.split()]
    names += [f"verb.{name}" for name in _VERB_FILES.split()]
    names += ["adj.ppl"]
    numbers = {"noun": 1, "verb": 2, "adj": 3, "adv": 4}
    return "".join(f"{i:02d}\t{name}\t{numbers[name.split('.')[0]]}\n" for i, name in enumerate(names))
