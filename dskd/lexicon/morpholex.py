"""Reads the workbook (.xlsx) of MorphoLEX, which gives the affixes and roots of English words.

It reads every sheet whose first row has the columns `Word` and `MorphoLexSegm`, and skips the others (a presentation,
lists of affixes). A segmentation marks prefixes `<un<`, roots `(happy)` and suffixes `>less>`, with braces around
stems: `{<un<(happy)}>ness>`.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dskd.artifacts.pointers import refuse_pointer_beginning
from dskd.console import progress, warn
from dskd.errors import UserError, listed
from dskd.lexicon.reading import MalformedError, Report

WORD, SEGMENTATION = "Word", "MorphoLexSegm"
_EXPECTED = "words with a segmentation"
_MORPHEME = re.compile(r"<(?P<prefix>[^<>(){}]+)<|\((?P<root>[^<>(){}]+)\)|>(?P<suffix>[^<>(){}]+)>|[{}]")


# The morphemes of a word in order, each as (`prefix`, `root` or `suffix`; its letters in lower case).
Segmentation = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class MorphoLex:
    """The words of MorphoLEX and their segmentations."""

    words: dict[str, Segmentation]  # by word in lower case; the first row of a word counts
    repeated: int  # number of rows that repeat a word


def parse_segmentation(text: str) -> Segmentation:
    """Parses a segmentation like `{<un<(happy)}>ness>`. Raises a MalformedError if it does not have that form, or has
    no root.
    """
    morphemes = []
    position = 0
    while position < len(text):
        match = _MORPHEME.match(text, position)
        if match is None:
            raise MalformedError(f"{text!r} is not a segmentation (from {text[position:]!r} on)")
        if match.lastgroup is not None:
            morphemes.append((match.lastgroup, match[match.lastgroup].strip().lower()))
        position = match.end()
    if not any(kind == "root" for kind, _ in morphemes):
        raise MalformedError(f"{text!r} has no root")
    return tuple(morphemes)


def read_morpholex(path: Path, report: Report) -> MorphoLex:
    """Reads the words of all sheets; adds rows without a word or a segmentation to the report, by sheet.

    A sheet whose rows are mostly malformed is left out as a whole, with a warning, if another sheet is good.

    Raises:
        UserError: when the file is not a workbook, no sheet has both columns, or all sheets with both are mostly
            malformed.
    """
    words: dict[str, Segmentation] = {}
    repeated = 0
    headers: dict[str, list[str]] = {}
    good = 0
    odd: list[str] = []
    with path.open("rb") as stream:
        workbook = _open(stream, path)
        for sheet in workbook.worksheets:
            sheet.reset_dimensions()  # the size that a file states for a sheet is not always true
            rows = _rows(sheet, path)
            _, first = next(rows, (0, ()))
            header = [str(cell).strip() for cell in first if cell is not None]
            headers[sheet.title] = header
            if WORD not in header or SEGMENTATION not in header:
                continue
            # Find the columns by the names in the first row, and read all rows before deciding if the sheet is good.
            cells = [None if cell is None else str(cell).strip() for cell in first]
            columns = cells.index(WORD), cells.index(SEGMENTATION)
            name, count = f"{path}[{sheet.title}]", 0
            entries = []
            for number, row in progress(rows, total=None, label=f"reading {path.name} {sheet.title}", unit="rows"):
                count += 1
                try:
                    entries.append(_entry(row, columns))
                except MalformedError as malformed:
                    report.add_malformed(name, number, str(malformed))
            # Keep the words of a good sheet; remember a sheet that is mostly malformed.
            if report.is_mostly_malformed(name, count):
                odd.append(f"{name}: {report.describe(name, count, _EXPECTED)}")
                continue
            good += 1
            report.finish(name, count, _EXPECTED)
            for word, segmentation in entries:
                repeated += word in words
                words.setdefault(word, segmentation)
        workbook.close()
    if odd and not good:
        raise UserError(listed(f"{path}: no sheet has words with a segmentation; name the workbook of MorphoLEX", odd))
    for sheet_problem in odd:
        warn(f"{sheet_problem}; the whole sheet is left out")
    if not good:
        sheets = [f"{title}: {', '.join(header) or 'empty'}" for title, header in headers.items()]
        raise UserError(
            listed(
                f"{path}: no sheet has the columns {WORD} and {SEGMENTATION}; name the workbook of MorphoLEX", sheets
            )
        )
    return MorphoLex(words, repeated)


def _open(stream: Any, path: Path) -> Any:
    from openpyxl import load_workbook  # here: only a workbook is worth its import

    beginning = stream.read(256)
    stream.seek(0)
    refuse_pointer_beginning(beginning, path)
    try:
        return load_workbook(stream, read_only=True, data_only=True)
    except Exception as error:  # openpyxl can raise any kind of error for a damaged file
        raise UserError(
            f"{path}: this is not a workbook (.xlsx) that can be read ({type(error).__name__}: {error}); name the one "
            "of MorphoLEX"
        ) from None


def _rows(sheet: Any, path: Path) -> Iterator[tuple[int, tuple[Any, ...]]]:
    """Yields (number, cells) for every row that is not empty."""
    rows = enumerate(sheet.iter_rows(values_only=True), start=1)
    while True:
        try:
            number, row = next(rows)
        except StopIteration:
            return
        except Exception as error:  # any kind, as in `_open`: a sheet is read only when its rows are
            raise UserError(
                f"{path}: the sheet {sheet.title!r} cannot be read ({type(error).__name__}: {error})"
            ) from None
        if any(cell is not None for cell in row):
            yield number, row


def _entry(row: tuple[Any, ...], columns: tuple[int, int]) -> tuple[str, Segmentation]:
    word, segmentation = (row[column] if column < len(row) else None for column in columns)
    if isinstance(word, bool):  # spreadsheets turn the words true and false into boolean values
        word = str(word)
    if not isinstance(word, str) or not word.strip():
        raise MalformedError(f"there is {word!r} in place of a word")
    if not isinstance(segmentation, str):
        raise MalformedError(f"{word!r} has {segmentation!r} in place of a segmentation")
    return word.strip().lower(), parse_segmentation(segmentation.strip())
