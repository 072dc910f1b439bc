"""Reads text as documents, and splits them into training and held-out ones: `WORKDIR/corpus`.

A hash of a document's content decides its side of the split. So the split does not depend on the order of the
documents, and equal texts are always on the same side.
"""

import functools
import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dskd.artifacts import kinds
from dskd.artifacts.building import build_artifact
from dskd.artifacts.manifest import Recipe, read_manifest
from dskd.config import Config, CorpusConfig
from dskd.config.data import WRITING_KEYS
from dskd.console import progress, progress_bar, say, stage, warn
from dskd.corpus import hub
from dskd.corpus.chats import documents as chats
from dskd.corpus.files import Document, read_file
from dskd.corpus.finding import TextFiles, find_files, fingerprint_of_text
from dskd.corpus.hub import read_dataset
from dskd.corpus.tasks import documents as tasks
from dskd.corpus.written.blocks import FILE
from dskd.corpus.written.judging import Judged, documents_of, judge_texts, write_senses
from dskd.errors import UserError, shortened
from dskd.lexicon.wordnet import WordNet, open_wordnet, spelled
from dskd.models.files.folder import FindTeacher, find_teacher

SPLITS = ("train", "validation")
_SCHEMA = pa.schema([("document", pa.string()), ("text", pa.string())])
_SCHEMAS = {
    "tasks": _SCHEMA.append(pa.field("continuation_tokens", pa.int32())),
    "chat": _SCHEMA.append(pa.field("tokens", pa.list_(pa.int32()))).append(pa.field("counted", pa.list_(pa.uint8()))),
}
_BATCH_DOCUMENTS = 1000
_BATCH_CHARACTERS = 32_000_000  # written earlier at this size: a thousand books would need too much memory
# Settings of `corpus` that do not affect its documents; the digests of benchmarks' documents stand for `tasks`, and the
# digest of the teacher's texts for how they were written.
_NOT_IN_RECIPE = (
    *("tasks", "sequence_length", "packing", "long_chats", "max_sequences", "max_validation_sequences"),
    *WRITING_KEYS,
)


def recipe(config: Config, find: FindTeacher | None = None) -> Recipe:
    """Returns the recipe of the documents: every input and setting that affects their content.

    `find` finds the teacher, whose tokenizer and chat template write some documents; None: it is searched here.
    """
    corpus, find = config.corpus, find or functools.partial(find_teacher, config)
    if corpus.source == "wordnet":
        inputs = {"wordnet": open_wordnet(config.wordnet.path).digest}
    elif corpus.source == "tasks":
        inputs = tasks.inputs_of_tasks(config, find)
    elif corpus.source == "teacher":
        inputs = {
            "wordnet": open_wordnet(config.wordnet.path).digest,  # its morphology finds a text's word
            "written": read_manifest(config.path(kinds.WRITTEN.folder), kinds.WRITTEN.name).digest,
        }
    elif corpus.dataset is not None:
        inputs = hub.inputs_of_dataset(corpus)
    else:
        paths = [*_find(config, "train").files, *_find(config, "validation").files]
        inputs = {str(path): fingerprint_of_text(path) for path in paths}
    settings = {key: value for key, value in corpus.as_dict().items() if key not in _NOT_IN_RECIPE}
    if corpus.source == "chat":
        inputs |= chats.inputs_of_chats(find())
    else:
        del settings["loss_on"]  # so that a corpus written before chats could be read stays up to date
    return Recipe(kinds.CORPUS.name, inputs, settings)


def build_corpus(config: Config, find: FindTeacher | None = None) -> None:
    """Reads the text and writes `WORKDIR/corpus/{train,validation}.parquet`. `find` is that of :func:`recipe`."""
    find = functools.cache(find or functools.partial(find_teacher, config))
    target = config.path(kinds.CORPUS.folder)
    corpus = config.corpus
    if corpus.source == "wordnet":
        sources = ["WordNet's definitions and examples"]
    elif corpus.source == "tasks":
        sources = [getattr(config.tasks, name) for name in corpus.tasks]
    elif corpus.source == "teacher":
        sources = [str(config.path(kinds.WRITTEN.folder))]
    elif corpus.dataset is not None:
        sources = [f"{corpus.dataset}, split {corpus.train_split!r}"]
    else:
        sources = list(corpus.train)
    with stage("corpus: text to documents", reads=sources, writes=target):
        before = recipe(config, find)
        for key in ("train", "validation"):
            if getattr(corpus, key):
                say("\n".join([f"  corpus.{key}:", *_find(config, key).describe()]))
        judged = judge_texts(config) if corpus.source == "teacher" else []
        with build_artifact(target, before) as building:
            counts = _write_splits(building.folder, _read_documents(config, judged, find), corpus)
            if corpus.source == "teacher":
                senses = write_senses(judged, building.folder)
                building.facts["senses"] = asdict(senses)
                say(f"  {senses.describe()}")
            for split in SPLITS:
                if not counts[split]:
                    more = _more_text(corpus, are_any_kept=any(counts.values()))
                    raise UserError(
                        f"the corpus has no {split} documents (read from {', '.join(sources)}); "
                        + (more if split == "train" else f"{more}, or raise corpus.validation_share")
                    )
            _require_unchanged(before, recipe(config, find))
            building.facts["documents"] = counts
        say(f"  {counts['train']:,} documents for training, {counts['validation']:,} held out")


def _more_text(corpus: CorpusConfig, *, are_any_kept: bool) -> str:
    """Returns what to do for more documents; `are_any_kept`: there is one at least, in another split."""
    if corpus.source != "teacher":
        return "add text"
    raised = "corpus.texts_per_sense" if corpus.max_senses is None else "corpus.max_senses or corpus.texts_per_sense"
    if are_any_kept:
        return f"raise {raised}"
    return (
        f"none of the teacher's texts could be used, for the reasons above: look at {FILE} there. Correct the cause "
        f"(the {'model of the server' if corpus.server else 'teacher'}, its chat template, corpus.max_new_tokens), and "
        "write all texts again, since finished ones are kept otherwise, with "
        f"`{'python' if corpus.server else 'deepspeed'} launcher/write_texts.py --config FILE --force`"
    )


def read_texts(config: Config, split: str) -> Iterator[str]:
    """Yields the texts of one split of `WORKDIR/corpus`, in the order on disk."""
    return _read_column(config, split, "text")


def read_continuation_tokens(config: Config, split: str) -> Iterator[int] | None:
    """Yields the maximum number of tokens by which the teacher may continue each text.

    Returns None if the limit is the same for all texts.
    """
    return _read_column(config, split, "continuation_tokens") if config.corpus.source == "tasks" else None


def read_tokens(config: Config, split: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields the tokens [n] int32 of each chat of a split of `WORKDIR/corpus`, and which of them count [n] uint8."""
    for batch in _batches_of_columns(config, split, ["tokens", "counted"]):
        lists = (batch.column(name) for name in ("tokens", "counted"))
        yield from zip(*([each.values.to_numpy() for each in column] for column in lists), strict=True)


def lengths_of_chats(config: Config, split: str) -> np.ndarray:
    """Returns the number of tokens [documents] int64 of each chat of a split of `WORKDIR/corpus`."""
    lengths = [
        pc.list_value_length(batch.column(0)).to_numpy(zero_copy_only=False).astype(np.int64)
        for batch in _batches_of_columns(config, split, ["tokens"])
    ]
    return np.concatenate([np.empty(0, np.int64), *lengths])


def name_of_document(config: Config, split: str, number: int) -> str:
    """Returns the name of document `number`, counted from 0, of a split of `WORKDIR/corpus`."""
    names = _read_column(config, split, "document")
    name: str = next(itertools.islice(names, number, None))
    return name


def _read_column(config: Config, split: str, name: str) -> Iterator[Any]:
    for batch in _batches_of_columns(config, split, [name]):
        yield from batch.column(0).to_pylist()


def _batches_of_columns(config: Config, split: str, names: list[str]) -> Iterator[pa.RecordBatch]:
    file = pq.ParquetFile(config.path(kinds.CORPUS.folder, f"{split}.parquet"))
    yield from file.iter_batches(_BATCH_DOCUMENTS, columns=names)


def read_wordnet_documents(wordnet: WordNet) -> Iterator[Document]:
    """Returns a document per synset: its lemmas, definition and examples. The order mixes parts of speech.

    Synsets with the same definition share a split key, so that training sees no held-out definition.
    """
    documents = []
    for synset in progress(wordnet.reader.all_synsets(), total=None, label="reading WordNet", unit="synsets"):
        lemmas = ", ".join(map(spelled, synset.lemma_names()))
        sentences = [f"{lemmas}: {synset.definition()}", *synset.examples()]
        text = " ".join(sentence if sentence.endswith((".", "!", "?")) else f"{sentence}." for sentence in sentences)
        documents.append(Document(synset.name(), text, synset.definition()))
    return iter(sorted(documents, key=lambda document: _hash(f"order:{document.name}")))


def _read_documents(config: Config, judged: list[Judged], find: FindTeacher) -> Iterator[tuple[str, Document]]:
    """Yields (split, document) for every document of the corpus; `judged` are the texts of `corpus.source: teacher`."""
    corpus = config.corpus
    train, validation = _sources(config, find) if corpus.source != "teacher" else (documents_of(judged), None)
    held_out: set[int] = set()
    for document in validation or ():
        held_out.add(_hash(document.split_key))
        yield "validation", document
    dropped = 0
    for document in train:
        if validation is None:
            is_held_out = _hash(document.split_key) < corpus.validation_share * 2**64
            yield "validation" if is_held_out else "train", document
        elif _hash(document.split_key) in held_out:
            dropped += 1
        else:
            yield "train", document
    if dropped:
        say(f"  {dropped:,} training documents are also held out, and were left out of the training")


def _sources(config: Config, find: FindTeacher) -> tuple[Iterator[Document], Iterator[Document] | None]:
    """Returns the training documents, and the held-out ones or None if these are a share of the training documents."""
    corpus = config.corpus
    if corpus.source == "wordnet":
        return read_wordnet_documents(open_wordnet(config.wordnet.path)), None
    if corpus.source == "tasks":
        return tasks.read_task_documents(config, find)
    if corpus.dataset is not None:
        held_out = corpus.validation_split
        validation = None if held_out is None else _read_dataset(config, held_out, find)
        return _read_dataset(config, corpus.train_split, find), validation
    validation = _read_files(config, "validation", find) if corpus.validation else None
    return _read_files(config, "train", find), validation


def _read_dataset(config: Config, split: str, find: FindTeacher) -> Iterator[Document]:
    if config.corpus.source == "chat":
        return chats.read_chats_of_dataset(config, find(), split)
    return read_dataset(config.corpus, split)


def _read_files(config: Config, key: str, find: FindTeacher) -> Iterator[Document]:
    if config.corpus.source == "chat":
        yield from chats.read_chats_of_files(config, find(), _find(config, key).files, key)
        return
    without: list[str] = []
    for path in _find(config, key).files:
        documents = read_file(path, config.corpus.text_field)
        first = next(documents, None)
        if first is None:
            without.append(str(path))
        else:
            yield first
            yield from documents
    if without:
        warn(f"corpus.{key}: {len(without):,} files have no document: {shortened(without)}")


def _require_unchanged(before: Recipe, after: Recipe) -> None:
    changed = [name for name in {**before.inputs, **after.inputs} if before.inputs.get(name) != after.inputs.get(name)]
    if changed:
        raise UserError(
            f"{shortened(changed)}: changed while it was read; start again when nothing writes there any more"
        )


def _find(config: Config, key: str) -> TextFiles:
    return find_files(getattr(config.corpus, key), f"corpus.{key}", workdir=config.path())


def _write_splits(folder: Path, documents: Iterator[tuple[str, Document]], corpus: CorpusConfig) -> dict[str, int]:
    counts = dict.fromkeys(SPLITS, 0)
    pending: dict[str, list[Document]] = {split: [] for split in SPLITS}
    characters = dict.fromkeys(SPLITS, 0)
    schema = _SCHEMAS.get(corpus.source, _SCHEMA)
    writers = {split: pq.ParquetWriter(folder / f"{split}.parquet", schema, compression="zstd") for split in SPLITS}

    def flush(split: str) -> None:
        # A column has the name of the documents' attribute, except for their names.
        columns = {
            name: [getattr(document, "name" if name == "document" else name) for document in pending[split]]
            for name in schema.names
        }
        writers[split].write_table(pa.table(columns, schema=schema))
        bar.update(len(pending[split]))
        pending[split].clear()
        characters[split] = 0

    with progress_bar(total=None, label="reading", unit="documents") as bar:
        for split, document in documents:
            counts[split] += 1
            pending[split].append(document)
            characters[split] += len(document.text)
            if len(pending[split]) == _BATCH_DOCUMENTS or characters[split] >= _BATCH_CHARACTERS:
                flush(split)
        for split in SPLITS:
            flush(split)
            writers[split].close()
    return counts


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
