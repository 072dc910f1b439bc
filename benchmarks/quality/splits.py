"""The held-out sequences in two: one part to choose weights on, one to test on, which no choice looks at.

Documents are packed end to end, so one may go on in the next sequence, and only there: sequences stand in the order of
the text. Between the parts one sequence is left out, so that no document is in both; nor is any longer than a sequence.
"""

from typing import Literal

Split = Literal["validation", "test"]


def rows_of(split: Split, num_sequences: int) -> range:
    """The numbers of a part's sequences.

    Raises:
        ValueError: when there are too few for two parts with one between them.
    """
    if num_sequences < 3:
        raise ValueError(f"{num_sequences} held-out sequences cannot be split: at least 3 are needed")
    half = (num_sequences - 1) // 2
    return range(half) if split == "validation" else range(half + 1, num_sequences)
