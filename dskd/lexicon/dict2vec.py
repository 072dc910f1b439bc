"""Reads Dict2Vec's pair lists: two words per line, separated by white space; synonyms in both directions."""

from collections.abc import Iterator
from pathlib import Path
from sys import intern

from dskd.lexicon.reading import Report, stream_lines
from dskd.lexicon.relations import Relation

SOURCE = "dict2vec"


def read_dict2vec(path: Path, report: Report) -> Iterator[Relation]:
    """Yields the pairs of one file; skips lines that do not have exactly two words, and reports them. Raises a
    UserError when these are most lines.
    """
    lines = 0
    for number, line in stream_lines(path, report):
        lines += 1
        words = line.split()
        if len(words) == 2:
            yield Relation(intern(words[0]), intern(words[1]), "synonym", SOURCE)
        else:
            report.add_malformed(str(path), number, f"{len(words)} words")
    report.finish(str(path), lines, "two words separated by white space")
