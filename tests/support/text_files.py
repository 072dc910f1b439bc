"""Files that tests of the corpus read text from."""

import pyarrow as pa
from streaming import MDSWriter


def write_mds(folder, samples, columns=None, **options):
    """Writes samples as MDS shards with the library, and returns the path of their index."""
    with MDSWriter(out=str(folder), columns=columns or {"text": "str", "id": "int"}, **options) as writer:
        for sample in samples:
            writer.write(sample)
    return folder / "index.json"


def zstd(data):
    """Returns bytes compressed as a Zstandard frame."""
    return pa.compress(data, codec="zstd", asbytes=True)


def write_arrow_stream(path, texts=("one", "two", "three"), *, is_closed=True):
    """Appends a stream of records with one text each to an Arrow file; one that is not closed has no end mark."""
    table = pa.table({"text": texts})
    with path.open("ab") as file:
        writer = pa.ipc.new_stream(file, table.schema)
        for batch in table.to_batches(max_chunksize=1):
            writer.write_batch(batch)
        if is_closed:
            writer.close()
