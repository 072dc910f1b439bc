"""Text to documents, and documents to token sequences.

Two artifacts. `corpus/` holds the documents, split into training and held-out ones by a hash of their content, so that
the split does not depend on their order and equal texts are never on both sides. `sequences/` holds them tokenized by
the teacher's tokenizer and packed to `corpus.sequence_length`. Every later stage reads `sequences/`; nothing but the
evaluation reads its held-out part.
"""

import glob
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from dskd.config import Config, CorpusConfig
from dskd.console import progress, progress_bar, say, stage
from dskd.errors import UserError, listed
from dskd.manifest import Manifest, Recipe, build_artifact, digest_of_json, read_manifest, require_same
from dskd.wordnet import WordNet, open_wordnet

FOLDER, SEQUENCES_FOLDER = "corpus", "sequences"
MADE_BY = "launcher/pipeline.py --config FILE"
SPLITS = ("train", "validation")
TEXT_SUFFIXES = (".txt", ".jsonl")
_SCHEMA = pa.schema([("document", pa.string()), ("text", pa.string())])
_BATCH = 1000


@dataclass(frozen=True)
class Document:
    """A text, a name for it that people can find it by, and the key by which it is put on one side of the split."""

    name: str
    text: str
    split_key: str


@dataclass(frozen=True)
class Sequences:
    """Packed token sequences on disk: S sequences of T tokens, read by slices through a memory map.

    `lengths` [S] counts the real tokens of each; what follows is padding that no loss looks at.
    """

    path: Path
    lengths: torch.Tensor
    sequence_length: int

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def num_tokens(self) -> int:
        """Real tokens in all sequences."""
        return int(self.lengths.sum())

    def batch(self, start: int, stop: int) -> torch.Tensor:
        """`input_ids` [stop - start, T] int64 of the sequences from `start` to `stop`."""
        with safe_open(self.path, framework="pt") as stored:
            return stored.get_slice("input_ids")[start:stop].long()


# ---------------------------------------------------------------------------------------------------------- documents


def recipe(config: Config) -> Recipe:
    """What decides the content of the documents."""
    corpus = config.corpus
    if corpus.source == "wordnet":
        inputs = {"wordnet": open_wordnet(config.wordnet.path).digest}
    else:
        files = [*expand(corpus.train, "corpus.train"), *expand(corpus.validation, "corpus.validation")]
        inputs = {str(path): _fingerprint(path) for path in files}
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
    for batch in pq.ParquetFile(config.path(FOLDER, f"{split}.parquet")).iter_batches(_BATCH, columns=["text"]):
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
        with path.open(encoding="utf-8") as stream:
            for number, text in read(path, stream, text_field):
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
    for path in expand(corpus.train, "corpus.train"):
        for document in read_file(path, corpus.text_field):
            yield "train" if corpus.validation else _side(document, corpus.validation_share), document
    for path in expand(corpus.validation, "corpus.validation"):
        for document in read_file(path, corpus.text_field):
            yield "validation", document


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
            if len(pending[split]) == _BATCH:
                flush(split)
                bar.update(_BATCH)
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
        except ValueError as error:
            raise UserError(f"{path}:{number}: this line is not JSON ({error})") from None
        if not isinstance(record, dict) or not isinstance(record.get(text_field), str):
            has = (
                f"it has {', '.join(map(str, record)) or 'no keys'}" if isinstance(record, dict) else "it is no object"
            )
            raise UserError(f"{path}:{number}: expected an object with a text under {text_field!r}, but {has}")
        yield number, record[text_field]


def _side(document: Document, validation_share: float) -> str:
    return "validation" if _hash(document.split_key) < validation_share * 2**64 else "train"


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _fingerprint(path: Path) -> str:
    # Large corpora are not read only to find that nothing changed: size and time of change stand for the content.
    status = path.stat()
    return digest_of_json([str(path), status.st_size, status.st_mtime_ns])


# ---------------------------------------------------------------------------------------------------------- sequences


def sequences_recipe(config: Config, tokenizer_digest: str) -> Recipe:
    """What decides the content of the sequences."""
    documents = read_manifest(config.path(FOLDER), "corpus", made_by=MADE_BY)
    keys = ("sequence_length", "max_sequences", "max_validation_sequences")
    return Recipe(
        "sequences",
        {"corpus": documents.digest},
        {key: config.corpus.as_dict()[key] for key in keys},
        tokenizer=tokenizer_digest,
    )


def build_sequences(config: Config, tokenizer: Any, tokenizer_digest: str) -> None:
    """Tokenizes and packs the documents, and writes `WORKDIR/sequences/{train,validation}.safetensors`."""
    target = config.path(SEQUENCES_FOLDER)
    corpus = config.corpus
    with stage("sequences: documents to tokens", reads=[config.path(FOLDER)], writes=target):
        wanted = sequences_recipe(config, tokenizer_digest)
        limits = {"train": corpus.max_sequences, "validation": corpus.max_validation_sequences}
        with build_artifact(target, wanted) as building:
            for split in SPLITS:
                tokens, lengths = pack(read_texts(config, split), tokenizer, corpus.sequence_length, limits[split])
                save_file({"input_ids": tokens, "lengths": lengths}, building.folder / f"{split}.safetensors")
                building.facts[split] = {"sequences": len(lengths), "tokens": int(lengths.sum())}
                say(f"  {split}: {len(lengths):,} sequences of {corpus.sequence_length}, {int(lengths.sum()):,} tokens")


def load_sequences(config: Config, split: str, tokenizer_digest: str) -> tuple[Sequences, Manifest]:
    """The packed sequences of a split, and the manifest of `WORKDIR/sequences`.

    Raises:
        UserError: when they are missing, or were tokenized with another tokenizer.
    """
    folder = config.path(SEQUENCES_FOLDER)
    manifest = read_manifest(folder, "sequences", made_by=MADE_BY)
    require_same(
        "tokenizers",
        expected=tokenizer_digest,
        found=manifest.tokenizer,
        between=f"the teacher and {folder}",
        remedy=f"make the sequences anew with `{MADE_BY}`",
    )
    path = folder / f"{split}.safetensors"
    with safe_open(path, framework="pt") as stored:
        return Sequences(path, stored.get_tensor("lengths"), stored.get_slice("input_ids").get_shape()[1]), manifest


def pack(
    texts: Iterator[str], tokenizer: Any, sequence_length: int, max_sequences: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Documents, each ended by the tokenizer's end-of-text token, end to end in sequences of equal length.

    The rest that fills no sequence is dropped, unless it is all there is: then it is padded.

    Returns:
        `input_ids` [S, T] int32, and `lengths` [S] int32, the real tokens of each.
    """
    separator = next((i for i in (tokenizer.eos_token_id, tokenizer.bos_token_id) if i is not None), None)
    end = [] if separator is None else [separator]
    limit = None if max_sequences is None else max_sequences * sequence_length
    pieces: list[np.ndarray] = []
    size = 0
    with progress_bar(total=limit, label="tokenizing", unit="tokens") as bar:
        for batch in _batched(texts):
            for ids in tokenizer(batch, return_attention_mask=False, verbose=False)["input_ids"]:
                piece = np.asarray(ids if ids[-1:] == end else [*ids, *end], dtype=np.int32)
                pieces.append(piece)
                size += len(piece)
                bar.update(len(piece))
            if limit is not None and size >= limit:
                break
    stream = np.concatenate(pieces)[:limit] if pieces else np.empty(0, np.int32)
    whole = len(stream) // sequence_length
    if whole:
        tokens = stream[: whole * sequence_length].reshape(whole, sequence_length)
        return torch.from_numpy(tokens.copy()), torch.full((whole,), sequence_length, dtype=torch.int32)
    padding = np.full(sequence_length - len(stream), end[0] if end else 0, np.int32)
    tokens = np.concatenate([stream, padding])[None]
    return torch.from_numpy(tokens), torch.tensor([len(stream)], dtype=torch.int32)


def _batched(texts: Iterator[str]) -> Iterator[list[str]]:
    batch = []
    for text in texts:
        batch.append(text)
        if len(batch) == _BATCH:
            yield batch
            batch = []
    if batch:
        yield batch
