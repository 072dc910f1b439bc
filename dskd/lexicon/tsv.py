"""The user's own lists: `head<TAB>synonym|antonym<TAB>tail`, one pair a line. Strict, because they can be mended."""

from collections.abc import Iterator
from pathlib import Path

from dskd.errors import UserError, listed
from dskd.lexicon.reading import stream_lines
from dskd.lexicon.relations import RELATIONS, Relation


def read_tsv(path: Path) -> Iterator[Relation]:
    """Lines `head<TAB>synonym|antonym<TAB>tail`; empty lines and lines that start with # are skipped.

    Raises:
        UserError: with every line that is not of that form.
    """
    problems: list[str] = []
    relations: list[Relation] = []
    for number, line in stream_lines(path):
        if line.startswith("#"):
            continue
        fields = [field.strip() for field in line.split("\t")]
        if len(fields) != 3 or not fields[0] or not fields[-1]:
            problems.append(f"{path}:{number}: expected head<TAB>synonym|antonym<TAB>tail, found {line!r}")
        elif fields[1] not in RELATIONS:
            problems.append(f"{path}:{number}: the relation must be synonym or antonym, found {fields[1]!r}")
        else:
            head, relation, tail = fields
            relations.append(Relation(head, tail, relation, path.name))
    if problems:
        raise UserError(listed(f"{len(problems)} lines of {path} are no relations; mend or remove them", problems))
    yield from relations
