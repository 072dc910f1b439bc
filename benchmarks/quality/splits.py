"""The held-out sequences in two: one part to choose weights on, one to test on, which no choice looks at.

Documents are packed end to end, so one that is cut goes on in the next sequence. Between the parts sequences are left
out, up to and with the first in which a document begins: no document is in both parts.
"""

from collections.abc import Sequence
from typing import Literal

Split = Literal["validation", "test"]


def rows_of(split: Split, begins_document: Sequence[bool]) -> range:
    """The numbers of a part's sequences.

    Args:
        split: the part.
        begins_document: of each held-out sequence in the order of the text, whether a document begins behind its first
            token.

    Raises:
        ValueError: when nothing is left for the test.
    """
    half = len(begins_document) // 2
    left_out = next((row for row in range(half, len(begins_document)) if begins_document[row]), len(begins_document))
    if not half or left_out + 1 >= len(begins_document):
        raise ValueError(f"{len(begins_document)} held-out sequences cannot be split between documents")
    return range(half) if split == "validation" else range(left_out + 1, len(begins_document))
