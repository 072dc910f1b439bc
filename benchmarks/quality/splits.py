"""Two parts of the held-out sequences: one to choose weights on, and one to test on, which no choice uses.

Documents are packed end to end, so a document that is cut continues in the next sequence. To keep every document in one
part only, sequences between the parts are left out, up to and including the first in which a document begins.
"""

from collections.abc import Sequence
from typing import Literal

Split = Literal["validation", "test"]


def rows_of(split: Split, begins_document: Sequence[bool]) -> range:
    """Returns the indices of a part's sequences.

    Args:
        split: the part.
        begins_document: for each held-out sequence, in the order of the text, whether a document begins after its
            first token.

    Raises:
        ValueError: when nothing is left for one of the parts.
    """
    half = len(begins_document) // 2
    left_out = next((row for row in range(half, len(begins_document)) if begins_document[row]), len(begins_document))
    if not half or left_out + 1 >= len(begins_document):
        raise ValueError(f"{len(begins_document)} held-out sequences cannot be split between documents")
    return range(half) if split == "validation" else range(left_out + 1, len(begins_document))
