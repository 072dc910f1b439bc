"""The annotated streaming shards: a sample is one sequence with the rows of the sense dictionary for each position.

schema           the columns, and checks that shards fit a config, a teacher and a sense dictionary
blocks           the sizes and the format of the blocks that annotation writes, and the thread that writes them
writing          writes blocks of samples, and joins many blocks into one dataset
unpacked_writer  writes shards that are not compressed, without copies
opening          opens the dataset, from the work directory or a remote copy
dataset          the dataset class: mosaicml-streaming's, with sample ids added to the samples
sample_files     reads the states of samples from shard files, to where a step needs them
batches          collates samples into batches of tokens, and reads the rows that they point to
annotate         the stage: finds the rows of the dictionary for each position
recipe           what annotation reads, and what its shards depend on
storing_states   plans which of the teacher's states are stored, and makes their columns
text_reader      lets the teacher read batches of text
reading          keeps the teacher's states while the sense dictionary's are gathered, and gives them to annotation
search           finds the rows nearest to the teacher's states
continuations    lets the teacher continue the training texts
"""

from dskd.shards.batches import collate_tokens, gather_rows
from dskd.shards.opening import is_lasting, location_of, open_shards, require_remote
from dskd.shards.schema import (
    ANTONYM_ROWS,
    COLUMNS,
    OWN_ROWS,
    PRECISION_OF,
    SYNONYM_ROWS,
    TEACHER_COLUMNS,
    TEACHER_STATES,
    TRUNK_STATES,
    StoredStates,
    columns_of,
    digest_without_states,
    load_manifest,
    require_fitting,
    require_samples,
    require_teacher_cache,
    sample_bytes,
)
from dskd.shards.writing import join_blocks

__all__ = [
    "ANTONYM_ROWS",
    "COLUMNS",
    "OWN_ROWS",
    "PRECISION_OF",
    "SYNONYM_ROWS",
    "TEACHER_COLUMNS",
    "TEACHER_STATES",
    "TRUNK_STATES",
    "StoredStates",
    "collate_tokens",
    "columns_of",
    "digest_without_states",
    "gather_rows",
    "is_lasting",
    "join_blocks",
    "load_manifest",
    "location_of",
    "open_shards",
    "require_fitting",
    "require_remote",
    "require_samples",
    "require_teacher_cache",
    "sample_bytes",
]
