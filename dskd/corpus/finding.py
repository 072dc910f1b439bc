"""Finds the files with text that the config's paths, folders and globs name.

A file that the config names itself is always read. In folders and globs the search takes only text: it leaves out
checksums, licences, READMEs, descriptions of datasets and models, and files whose ending is not that of text.
:attr:`TextFiles.left_out` counts these, for the stage to print.
"""

import glob
import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dskd.artifacts import mds
from dskd.artifacts.hashing import digest_of_json, fingerprint
from dskd.corpus.opening import COMPRESSIONS, without_compression
from dskd.corpus.tables import saved_files
from dskd.errors import UserError, listed, shortened

TEXT_SUFFIX = ".txt"
JSON_SUFFIXES = (".jsonl", ".json", ".ndjson")
TABLE_SUFFIXES = (".parquet", ".arrow")
DATASET_STATE = "state.json"  # in a folder of Dataset.save_to_disk
DATASET_SPLITS = "dataset_dict.json"  # in a folder of DatasetDict.save_to_disk, which has one folder per split
READABLE = (
    f"{', '.join((TEXT_SUFFIX, *JSON_SUFFIXES))} (also with {', '.join(COMPRESSIONS)}), {', '.join(TABLE_SUFFIXES)}, "
    "or a folder of MDS shards or of Dataset.save_to_disk"
)
# Files that describe the text, recognised by their names: in lower case, without the ending.
_ABOUT = re.compile(
    r"(readme|licen[cs]e|checksums?|(md5|sha\d+)(sums?)?)([._-].*)?|.*[._-](readme|licen[cs]e|checksums?|(md5|sha\d+)(sums?)?)"
    r"|copying|notice|changelog|citation|authors|contributing|requirements|manifest"
)
_DESCRIPTIONS = re.compile(
    r"(dataset_infos?|dataset_dict|state|config|generation_config|index|metadata|stats|manifest|package|vocab"
    r"|tokenizer.*|special_tokens_map|added_tokens|.*\.index|.*[._-]metadata)\.json"
)
# A hash by itself: MD5 has 32 digits, SHA1 40, SHA224 to SHA512 56, 64, 96 and 128.
_HASH = re.compile(
    r"(?<![0-9A-Za-z])[0-9a-fA-F]{32}(?:[0-9a-fA-F]{8}|[0-9a-fA-F]{24}|[0-9a-fA-F]{32}|[0-9a-fA-F]{64}|[0-9a-fA-F]{96})?(?![0-9A-Za-z])"
)
_COMMENT = ("#", ";", "//")
_CHECKSUM_LINES = 5  # lines to look at that are not comments
_LONGEST_CHECKSUM_LINE = 400  # characters; a longer line with a hash is text
_READ_LINES = 200
_SHOWN_KINDS = 12


@dataclass(frozen=True)
class TextFiles:
    """The files with text that a search found, and what it left out."""

    files: list[Path]
    left_out: Counter[str] = field(default_factory=Counter)  # {ending, or name and reason: number}
    notes: list[str] = field(default_factory=list)  # what the user should know about the choice

    def describe(self) -> list[str]:
        """Returns lines to print: how many files of each ending are read, what is left out, and the notes."""
        lines = [f"  reads {_counted(Counter(map(_ending, self.files)))}"]
        if self.left_out:
            lines.append(f"  leaves out {_counted(self.left_out)}")
        return [*lines, *(f"  {note}" for note in self.notes)]


def find_files(patterns: Sequence[str], key: str, *, workdir: Path) -> TextFiles:
    """Finds the files with text that paths, folders and globs name: sorted, each once, and for MDS shards their index.

    A folder or glob that contains the work directory is searched without it. Raises a UserError that lists all patterns
    of `key`, the config's, that name nothing readable.
    """
    files: dict[Path, Path] = {}  # by real path, because links can give one file several names
    left_out: Counter[str] = Counter()
    notes: list[str] = []
    problems: list[str] = []
    seen_twice: set[Path] = set()
    for pattern in patterns:
        # Exclude the work directory unless the pattern itself is inside it.
        path = Path(pattern).expanduser()
        outside = not _real(_fixed_part(path)).is_relative_to(_real(workdir))
        search = _Search(key, notes, problems, excluded=_real(workdir) if outside else None)
        if path.is_file():
            matches = {path}
            problems += [] if _is_readable(path) else [f"{key}: {path}: expected {READABLE}"]
        else:
            named = [path] if path.is_dir() else map(Path, glob.glob(str(path), recursive=True))  # noqa: PTH207
            matches = search.below(named)
        if not matches:
            problems.append(
                f"{key}: {pattern!r} names no file with text; give {READABLE}, or a folder or glob of them"
                + (f" (left out there: {_counted(search.left_out)})" if search.left_out else "")
            )
        _note_share(pattern, matches, search.left_out_bytes, notes)
        left_out |= search.left_out  # the maximum per kind, not the sum, because patterns can overlap
        for file in sorted(matches):
            real = _real(file)
            if real in files and path.is_file():
                seen_twice.add(file)
            files.setdefault(real, file)
    if problems:
        raise UserError(listed("the text of the corpus cannot be found", list(dict.fromkeys(problems))))
    if seen_twice:
        notes.append(f"named more than once, and read once: {', '.join(map(str, sorted(seen_twice)))}")
    chosen = sorted(_without_parts(files))
    _note_mixture(chosen, notes)
    return TextFiles(chosen, left_out, list(dict.fromkeys(notes)))


def fingerprint_of_text(path: Path) -> str:
    """Returns a digest that changes when the content of a file that :func:`find_files` found changes.

    It uses sizes and modification times, because reading a large corpus only to see that nothing changed takes too
    long.
    """
    files = _files_read_through(path)
    if files == [path]:
        return fingerprint(path)
    return digest_of_json([fingerprint(file) for file in files if file.is_file()])


def _files_read_through(path: Path) -> list[Path]:
    """Returns a found file, and the files that it names if it is an index or the state of a dataset."""
    if path.name == mds.INDEX:
        return [path, *(path.parent / name for shard in mds.read_index(path) for name in mds.files_of(shard))]
    return [path, *saved_files(path)] if path.name == DATASET_STATE else [path]


class _Search:
    """A search for text in folders, which counts what it leaves out."""

    def __init__(self, key: str, notes: list[str], problems: list[str], *, excluded: Path | None) -> None:
        self._key = key
        self._excluded = excluded
        self._notes = notes
        self._problems = problems
        self._counted: set[Path] = set()
        self.left_out: Counter[str] = Counter()
        self.left_out_bytes: Counter[Path] = Counter()

    def below(self, paths: Iterable[Path]) -> set[Path]:
        """Returns the files with text among `paths` and in the folders among them."""
        texts: set[Path] = set()
        for path in paths:
            if self._excluded is not None and _real(path).is_relative_to(self._excluded):
                continue
            if path.is_dir():
                texts |= self._in_folder(path)
            elif path.is_symlink() and not path.exists():
                self._problems.append(f"{self._key}: {path} is a broken link")
            elif not _is_readable(path):
                self._problems.append(f"{self._key}: {path}: expected {READABLE}")
            else:
                texts |= self._text_of([path])
        return texts

    def _in_folder(self, folder: Path) -> set[Path]:
        """Returns the files with text at any depth of a folder; it follows links and skips hidden files and folders."""
        texts: set[Path] = set()
        visited: set[tuple[int, int]] = set()

        def report(error: OSError) -> None:
            self._problems.append(f"{self._key}: {error.filename}: cannot be read ({error.strerror})")

        for directory, folders, names in os.walk(folder, followlinks=True, onerror=report):
            status = os.stat(directory)  # noqa: PTH116
            is_excluded = self._excluded is not None and _real(Path(directory)) == self._excluded
            if is_excluded or (status.st_dev, status.st_ino) in visited:  # the latter: a link back
                folders.clear()
                continue
            visited.add((status.st_dev, status.st_ino))
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            visible = [Path(directory, name) for name in sorted(names) if not name.startswith(".")]
            if DATASET_SPLITS in names:
                self._choose_split(Path(directory), folders)
            dangling = [file for file in visible if file.is_symlink() and not file.exists()]
            self._problems += [f"{self._key}: {file} is a broken link" for file in dangling if _has_ending(file)]
            texts |= self._text_of(file for file in visible if file.is_file())
        return texts

    def _choose_split(self, folder: Path, folders: list[str]) -> None:
        """Reduces `folders` to the `DatasetDict`'s split for this key, so that the search skips the other splits."""
        split = "validation" if self._key.endswith("validation") else "train"
        splits = [name for name in folders if (folder / name / DATASET_STATE).is_file()]
        if split in splits:
            folders[:] = [split]
            if others := [name for name in splits if name != split]:
                self._notes.append(
                    f"{folder}: reads the split {split!r}; {', '.join(others)} can be named as {folder}/SPLIT"
                )
        elif len(splits) > 1 or (splits and split == "validation"):
            folders.clear()
            self._problems.append(
                f"{self._key}: {folder} has the splits {', '.join(splits)}, and none is called {split!r}; name one of "
                f"them: {folder}/SPLIT"
            )

    def _text_of(self, files: Iterable[Path]) -> set[Path]:
        """Returns those of `files` that are text, and counts the others."""
        files = list(files)
        states = [file for file in files if file.name == DATASET_STATE and _is_dataset_state(file)]
        in_saved = {file.parent: {part.name for part in saved_files(file)} for file in states}
        texts: set[Path] = set()
        for file in files:
            if file in states:
                texts.add(file)
                continue
            name = without_compression(file.name)
            if file.parent in in_saved and (file.suffix == ".arrow" or _DESCRIPTIONS.fullmatch(name)):
                if file.suffix == ".arrow" and file.name not in in_saved[file.parent]:
                    self._leave_out(file, ".arrow that its state.json does not name")
            elif file.name == mds.INDEX and _is_mds_index(file):
                texts.add(file)
            elif not _has_ending(file):
                if ".mds" not in file.suffixes:  # a shard is read through its index
                    self._leave_out(file, _ending(file))
            elif name.endswith(JSON_SUFFIXES) and _DESCRIPTIONS.fullmatch(name):
                self._leave_out(file, f"{file.name} (a description)")
            elif _ABOUT.fullmatch(name.rsplit(".", 1)[0]) and name.endswith(TEXT_SUFFIX):
                self._leave_out(file, f"{file.name} (named like a file about the data)")
            elif name.endswith(TEXT_SUFFIX) and _holds_checksums(file):
                self._leave_out(file, f"{file.name} (checksums)")
            else:
                texts.add(file)
        return texts

    def _leave_out(self, file: Path, reason: str) -> None:
        if _real(file) not in self._counted:
            self._counted.add(_real(file))
            self.left_out[reason] += 1
            self.left_out_bytes[file] = file.stat().st_size


def _note_share(pattern: str, files: Iterable[Path], left_out: Counter[Path], notes: list[str]) -> None:
    """Notes when the files that a search left out have more bytes than those that it found."""
    read = (part for file in files for part in _files_read_through(file) if part.is_file())
    total = left_out.total()
    if total > sum(file.stat().st_size for file in read) > 0:
        largest, size = left_out.most_common(1)[0]
        notes.append(
            f"warning: {pattern}: most of its bytes are left out, {total:,} ({largest.name} has {size:,}); if they are "
            "text, name the files themselves, or give them an ending of text"
        )


def _note_mixture(files: Sequence[Path], notes: list[str]) -> None:
    texts = [file for file in files if without_compression(file.name).endswith(TEXT_SUFFIX)]
    folders = {file.parent for file in files if file not in texts}
    if mixed := [file for file in texts if file.parent in folders]:
        shown = shortened([file.name for file in mixed], 3)
        notes.append(
            f"warning: {len(mixed):,} .txt in folders with files of records ({shown}) are read too, as paragraphs of "
            "text; if they are not text, name the others by a pattern"
        )


def _real(path: Path) -> Path:
    """Returns the path with links resolved; unlike `Path.resolve`, it does not raise if links form a circle."""
    return Path(os.path.realpath(path))


def _fixed_part(pattern: Path) -> Path:
    """Returns a pattern's path up to its first wildcard."""
    parts = itertools.takewhile(lambda part: not glob.has_magic(part), pattern.parts)
    return Path(*parts)


def _without_parts(files: Mapping[Path, Path]) -> list[Path]:
    """Returns the files without any MDS index whose shards another index lists too.

    Shards that were written in parallel have an index per part and one of the whole.
    """
    named: dict[Path, set[Path]] = {
        real: {_real(real.parent / name) for shard in mds.read_index(real) for name in mds.files_of(shard)}
        for real in files
        if real.name == mds.INDEX
    }
    return [
        file
        for real, file in files.items()
        if not any(real in named and other != real and named[real] < shards for other, shards in named.items())
    ]


def _is_readable(file: Path) -> bool:
    return _is_mds_index(file) if file.name == mds.INDEX else _has_ending(file)


def _has_ending(file: Path) -> bool:
    name = file.name.lower()
    return name.endswith(TABLE_SUFFIXES) or without_compression(name).endswith((TEXT_SUFFIX, *JSON_SUFFIXES))


def _is_mds_index(file: Path) -> bool:
    content = _json_of(file)
    return isinstance(content, dict) and isinstance(content.get("shards"), list)


def _is_dataset_state(file: Path) -> bool:
    content = _json_of(file)
    return isinstance(content, dict) and "_data_files" in content


def _json_of(file: Path) -> object:
    try:
        content: object = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content


def _holds_checksums(file: Path) -> bool:
    """Returns True if each of the first lines of a text has a hash; skips comments, and does not look into archives."""
    if file.suffix.lower() != TEXT_SUFFIX:
        return False
    try:
        with file.open(encoding="utf-8", errors="replace") as stream:
            parts = iter(lambda: stream.readline(_LONGEST_CHECKSUM_LINE + 1), "")
            lines = (line.strip() for line in itertools.islice(parts, _READ_LINES))
            entries = (line for line in lines if line and not line.startswith(_COMMENT))
            first = list(itertools.islice(entries, _CHECKSUM_LINES))
    except OSError:
        return False
    return bool(first) and all(len(line) <= _LONGEST_CHECKSUM_LINE and _HASH.search(line) for line in first)


def _ending(file: Path) -> str:
    if file.name == mds.INDEX:
        return "folder of MDS shards"
    if file.name == DATASET_STATE:
        return "folder of Dataset.save_to_disk"
    suffixes = file.suffixes[-2:] if file.suffix.lower() in COMPRESSIONS else file.suffixes[-1:]
    return "".join(suffixes).lower() or "without an ending"


def _counted(numbers: Mapping[str, int]) -> str:
    shown = [f"{number:,} {name}" for name, number in sorted(numbers.items(), key=lambda item: (-item[1], item[0]))]
    others = len(shown) - _SHOWN_KINDS
    return ", ".join(shown[:_SHOWN_KINDS]) + (f" and {others} other kinds" if others > 0 else "")
