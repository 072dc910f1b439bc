"""Reads the user's own lists: `head<TAB>synonym|antonym<TAB>tail`, one pair per line.

The format is strict, because users can correct their own lists. Lines that begin with # are comments. They are counted,
and a word that begins with # cannot be a head.
"""

from collections.abc import Iterator
from pathlib import Path

from dskd.errors import UserError, listed
from dskd.lexicon.reading import Report, stream_lines
from dskd.lexicon.relations import RELATIONS, Relation

COMMENTS = "comment lines of own lists"


def read_tsv(path: Path, source: str, report: Report) -> Iterator[Relation]:
    """Yields the relations of one list, with `source` as their source. Raises a UserError that lists all lines which do
    not have the format.
    """
    problems: list[str] = []
    relations: list[Relation] = []
    for number, line in stream_lines(path):
        if line.startswith("#"):
            report.dropped[COMMENTS] += 1
            continue
        fields = [field.strip() for field in line.split("\t")]
        if len(fields) != 3 or not fields[0] or not fields[-1]:
            problems.append(f"{path}:{number}: expected head<TAB>synonym|antonym<TAB>tail, found {line!r}")
        elif fields[1] not in RELATIONS:
            problems.append(f"{path}:{number}: the relation must be synonym or antonym, found {fields[1]!r}")
        else:
            head, relation, tail = fields
            relations.append(Relation(head, tail, relation, source))
    if problems:
        raise UserError(listed(f"{len(problems)} lines of {path} are not relations; correct or remove them", problems))
    yield from relations
