"""Relations between words, written by hand."""

from dskd.lexicon.relations import Pairs, Relation


def relations_of(*lines: str) -> list[Relation]:
    """Returns the relations of lines such as `big|large|synonym`, as the lexicon resolves them."""
    return Pairs(Relation(*line.split("|"), "test") for line in lines).resolved()
