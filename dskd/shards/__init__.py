"""The annotated streaming shards: a sample is one sequence with the rows of the sense dictionary for each position.

schema     the columns, and which shards fit a config, a teacher and a sense dictionary
writing    blocks of samples, and one dataset of many blocks
opening    the dataset, from the work directory or a remote copy
dataset    what is opened: mosaicml-streaming's, whose samples say which they are
batches    samples as batches of tokens, and the rows they point to
annotate   the stage: which rows of the dictionary each position gets
search     the rows nearest to the teacher's states
continuations
           texts that the teacher goes on with
"""

from dskd.shards.batches import collate_tokens, gather_rows
from dskd.shards.opening import is_lasting, open_shards, place, require_remote
from dskd.shards.schema import (
    COLUMNS,
    TEACHER_COLUMNS,
    columns_of,
    load_manifest,
    require_fitting,
    require_samples,
    require_teacher_cache,
)
from dskd.shards.writing import join_blocks, write_block

__all__ = [
    "COLUMNS",
    "TEACHER_COLUMNS",
    "collate_tokens",
    "columns_of",
    "gather_rows",
    "is_lasting",
    "join_blocks",
    "load_manifest",
    "open_shards",
    "place",
    "require_fitting",
    "require_remote",
    "require_samples",
    "require_teacher_cache",
    "write_block",
]
