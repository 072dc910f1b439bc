"""Reads the documents of a Hugging Face dataset: one on the Hub, or a folder that the `datasets` library reads.

The dataset is streamed: it is neither downloaded in advance nor stored. The library is an optional dependency.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dskd.artifacts.hashing import digest_of_json, fingerprint
from dskd.config import CorpusConfig
from dskd.corpus.files import Document, as_documents
from dskd.corpus.finding import DATASET_SPLITS, DATASET_STATE
from dskd.corpus.records import text_of
from dskd.errors import UserError


def inputs_of_dataset(corpus: CorpusConfig) -> dict[str, str]:
    """Returns {folder: digest of its files} if the dataset is a folder.

    Returns {} for a dataset on the Hub, which only its name identifies.
    """
    folder = Path(corpus.dataset or "").expanduser()
    if not folder.is_dir():
        return {}
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {str(folder): digest_of_json([fingerprint(file) for file in files])}


def read_dataset(corpus: CorpusConfig, split: str) -> Iterator[Document]:
    """Yields the documents of a split of `corpus.dataset`, in its order; raises the errors of :func:`read_rows`."""
    name = f"{corpus.dataset}/{split}"
    rows = read_dataset_rows(corpus, split, [corpus.text_field])
    texts = ((number, text_of(row, corpus.text_field, f"{name}:{number}")) for number, row in enumerate(rows))
    yield from as_documents(name, texts)


def read_dataset_rows(corpus: CorpusConfig, split: str, columns: Sequence[str]) -> Iterator[Any]:
    """Yields the rows of a split of `corpus.dataset`, with those of `columns` that it has, or all if it has none of
    them. Raises the errors of :func:`read_rows`.
    """
    source = "chat" if corpus.source == "chat" else "files"
    yield from read_rows(
        str(corpus.dataset),
        split,
        corpus.dataset_config,
        key="corpus.dataset",
        instead=f"or save it as files, set corpus.source: {source} and name them in corpus.train",
        revision=corpus.dataset_revision,
        columns=columns,
    )


def read_rows(
    dataset: str,
    split: str,
    config: str | None = None,
    *,
    key: str,
    instead: str,
    revision: str | None = None,
    columns: Sequence[str] = (),
) -> Iterator[Any]:
    """Yields the rows of a split of a dataset, which is a name on the Hub or a folder, in its order.

    `config` is the dataset's configuration, if it has several; `revision` a branch, tag or commit on the Hub; `columns`
    the only columns to read, if the files have any of them.

    Raises:
        UserError: when the library is missing, or the dataset cannot be found, reached or read. It names `key`, the
            config's, and says with `instead` what to do if the Hub cannot be reached.
    """
    try:
        from datasets import load_dataset
    except ImportError:
        raise UserError(
            f"{key}: a dataset of the Hub needs the package `datasets`, which is not installed; install it with "
            f"`pip install 'datasets>=4,<6'`, {instead}"
        ) from None
    folder = Path(dataset).expanduser()
    if (folder / DATASET_STATE).is_file() or (folder / DATASET_SPLITS).is_file():
        remedy = (
            f"name it in corpus.train: [{folder}], which corpus.source: files and chat read"
            if key == "corpus.dataset"
            else "write it as Parquet files"
        )
        raise UserError(f"{key}: {folder} was written by save_to_disk, which load_dataset does not read; {remedy}")
    try:
        loaded = load_dataset(
            str(folder) if folder.is_dir() else dataset, config, split=split, revision=revision, streaming=True
        )
        if chosen := [name for name in columns if name in (loaded.features or ())]:
            loaded = loaded.select_columns(chosen)
        yield from loaded
    except Exception as error:  # the Hub, the network and every file format raise their own kinds
        reason = next(iter(str(error).strip().splitlines()), "no reason given")
        raise UserError(
            f"{key}: split {split!r} of {dataset!r} cannot be read ({type(error).__name__}: {reason}); "
            "name a dataset of the Hub that can be reached from here, or a folder of one, and one of its splits and "
            f"configurations; {instead}"
        ) from None
