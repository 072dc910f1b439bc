"""Text to documents: `WORKDIR/corpus`, split into training and held-out ones.

The split is by a hash of the documents' content, so it does not depend on their order, and equal texts are never on
both sides.
"""

import glob
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dskd.config import Config, CorpusConfig
from dskd.console import progress, progress_bar, say, stage
from dskd.errors import UserError, listed
from dskd.manifest import Recipe, build_artifact, fingerprint
from dskd.wordnet import WordNet, open_wordnet

FOLDER = "corpus"
MADE_BY = "launcher/pipeline.py --config FILE"
SPLITS = ("train", "validation")
TEXT_SUFFIXES = (".txt", ".jsonl")
_SCHEMA = pa.schema([("document", pa.string()), ("text", pa.string())])
BATCH_DOCUMENTS = 1000


@dataclass(frozen=True)
class Document:
    """A text, a name for it that people can find it by, and the key by which it is put on one side of the split."""

    name: str
    text: str
    split_key: str


def recipe(config: Config) -> Recipe:
    """What decides the content of the documents."""
    corpus = config.corpus
    if corpus.source == "wordnet":
        inputs = {"wordnet": open_wordnet(config.wordnet.path).digest}
    else:
        files = [*expand(corpus.train, "corpus.train"), *expand(corpus.validation, "corpus.validation")]
        inputs = {str(path): fingerprint(path) for path in files}
    keys = ("source", "train", "validation", "text_field", "validation_share")
    return Recipe("corpus", inputs, {key: corpus.as_dict()[key] for key in keys})


def build_corpus(config: Config) -> None:
    """Reads the text and writes `WORKDIR/corpus/{train,validation}.parquet`."""
    target = config.path(FOLDER)
    corpus = config.corpus
    sources = ["WordNet's definitions and examples"] if corpus.source == "wordnet" else list(corpus.train)
    with stage("corpus: text to documents", reads=sources, writes=target):
        wanted = recipe(config)
        with build_artifact(target, wanted) as building:
            counts = _write_splits(building.folder, _read_documents(config), corpus)
            for split in SPLITS:
                if not counts[split]:
                    raise UserError(
                        f"the corpus has no {split} documents (read from {', '.join(sources)}); "
                        + ("add text" if split == "train" else "add text, or raise corpus.validation_share")
                    )
            building.facts["documents"] = counts
        say(f"  {counts['train']:,} documents for training, {counts['validation']:,} held out")


def read_texts(config: Config, split: str) -> Iterator[str]:
    """The texts of one split of `WORKDIR/corpus`, in their order on disk."""
    for batch in pq.ParquetFile(config.path(FOLDER, f"{split}.parquet")).iter_batches(
        BATCH_DOCUMENTS, columns=["text"]
    ):
        yield from batch.column(0).to_pylist()


def read_wordnet_documents(wordnet: WordNet) -> Iterator[Document]:
    """One document a synset: its lemmas, its definition and its examples, in an order that mixes parts of speech.

    Synsets with the same definition share a split key, so that no held-out definition was seen in training.
    """
    documents = []
    for synset in progress(wordnet.reader.all_synsets(), total=None, label="reading WordNet", unit="synsets"):
        lemmas = ", ".join(name.split("(")[0].replace("_", " ") for name in synset.lemma_names())
        sentences = [f"{lemmas}: {synset.definition()}", *synset.examples()]
        text = " ".join(sentence if sentence.endswith((".", "!", "?")) else f"{sentence}." for sentence in sentences)
        documents.append(Document(synset.name(), text, synset.definition()))
    return iter(sorted(documents, key=lambda document: _hash(f"order:{document.name}")))


def read_file(path: Path, text_field: str) -> Iterator[Document]:
    """Documents of one file: paragraphs between empty lines of a `.txt`, lines of a `.jsonl`.

    Raises:
        UserError: naming the file and line that cannot be read.
    """
    read = _read_jsonl if path.suffix == ".jsonl" else _read_paragraphs
    try:
        with path.open(encoding="utf-8-sig") as stream:
            for number, text in read(path, stream, text_field):
                if "\0" in text or not _is_unicode(text):
                    raise UserError(f"{path}:{number}: this is not text (a NUL or half a surrogate pair); leave it out")
                if text.strip():
                    yield Document(f"{path}:{number}", text.strip(), text.strip())
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: this is not UTF-8 text ({error}); convert it, or leave it out") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def expand(patterns: Sequence[str], key: str) -> list[Path]:
    """The text files that paths, folders and globs name, sorted, each once.

    Raises:
        UserError: with every pattern that names nothing readable.
    """
    files: set[Path] = set()
    problems = []
    for pattern in patterns:
        path = Path(pattern).expanduser()
        if path.is_dir():
            found = [file for suffix in TEXT_SUFFIXES for file in path.rglob(f"*{suffix}")]
        elif path.is_file():
            found = [path]
        else:
            names = glob.glob(str(path), recursive=True)  # noqa: PTH207 - the pattern may be absolute
            found = [Path(name) for name in names if Path(name).is_file()]
        wrong = [file for file in found if file.suffix not in TEXT_SUFFIXES]
        if not found:
            problems.append(f"{key}: {pattern!r} names no file; give .txt or .jsonl files, a folder or a glob of them")
        problems += [f"{key}: {file}: expected a .txt or .jsonl file" for file in wrong]
        files.update(found)
    if problems:
        raise UserError(listed("the text of the corpus cannot be found", problems))
    return sorted(files)


def _read_documents(config: Config) -> Iterator[tuple[str, Document]]:
    """(split, document) for every document of the corpus."""
    corpus = config.corpus
    if corpus.source == "wordnet":
        for document in read_wordnet_documents(open_wordnet(config.wordnet.path)):
            yield _side(document, corpus.validation_share), document
        return
    held_out: set[int] = set()
    for path in expand(corpus.validation, "corpus.validation"):
        for document in read_file(path, corpus.text_field):
            held_out.add(_hash(document.split_key))
            yield "validation", document
    dropped = 0
    for path in expand(corpus.train, "corpus.train"):
        for document in read_file(path, corpus.text_field):
            if not corpus.validation:
                yield _side(document, corpus.validation_share), document
            elif _hash(document.split_key) in held_out:
                dropped += 1
            else:
                yield "train", document
    if dropped:
        say(f"  {dropped:,} training documents are also held out, and were left out of the training")


def _write_splits(folder: Path, documents: Iterator[tuple[str, Document]], corpus: CorpusConfig) -> dict[str, int]:
    counts = dict.fromkeys(SPLITS, 0)
    pending: dict[str, list[Document]] = {split: [] for split in SPLITS}
    writers = {split: pq.ParquetWriter(folder / f"{split}.parquet", _SCHEMA, compression="zstd") for split in SPLITS}

    def flush(split: str) -> None:
        columns = {
            "document": [document.name for document in pending[split]],
            "text": [document.text for document in pending[split]],
        }
        writers[split].write_table(pa.table(columns, schema=_SCHEMA))
        pending[split].clear()

    with progress_bar(total=None, label="reading", unit="documents") as bar:
        for split, document in documents:
            counts[split] += 1
            pending[split].append(document)
            if len(pending[split]) == BATCH_DOCUMENTS:
                flush(split)
                bar.update(BATCH_DOCUMENTS)
        for split in SPLITS:
            bar.update(len(pending[split]))
            flush(split)
            writers[split].close()
    return counts


def _read_paragraphs(path: Path, stream: Any, text_field: str) -> Iterator[tuple[int, str]]:
    start = 1
    lines: list[str] = []
    for number, line in enumerate(stream, start=1):
        if line.strip():
            if not lines:
                start = number
            lines.append(line)
        elif lines:
            yield start, "".join(lines)
            lines = []
    if lines:
        yield start, "".join(lines)


def _read_jsonl(path: Path, stream: Any, text_field: str) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(stream, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}:{number}: this line is not JSON ({error})") from None
        if not isinstance(record, dict) or not isinstance(record.get(text_field), str):
            has = (
                f"it has {', '.join(map(str, record)) or 'no keys'}" if isinstance(record, dict) else "it is no object"
            )
            raise UserError(f"{path}:{number}: expected an object with a text under {text_field!r}, but {has}")
        yield number, record[text_field]


def _is_unicode(text: str) -> bool:
    """False for lone surrogates, which JSON can escape and no encoding has."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _side(document: Document, validation_share: float) -> str:
    return "validation" if _hash(document.split_key) < validation_share * 2**64 else "train"


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
