"""Reads the chats of the corpus as documents with tokens, and refuses those that cannot be used, with their places."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dskd.artifacts.hashing import digest_of_json
from dskd.config import Config
from dskd.console import warn
from dskd.corpus.chats.rendering import ChatWriter
from dskd.corpus.chats.special_tokens import SpecialTokenError
from dskd.corpus.chats.turns import DECODER, ChatColumns, ChatError
from dskd.corpus.files import Document, read_records
from dskd.corpus.hub import read_dataset_rows
from dskd.errors import UserError, listed, shortened
from dskd.models.files.folder import ModelFolder

_MOST_PROBLEMS = 100
_SHOWN_PROBLEMS = 10


def inputs_of_chats(teacher: ModelFolder) -> dict[str, str]:
    """Returns the digests of the teacher's chat template and tokenizer, which write the chats.

    Raises:
        UserError: if it has no chat template.
    """
    return {
        "chat_template": digest_of_json(_with_template(teacher).chat_template),
        "tokenizer": teacher.tokenizer_digest,
    }


def read_chats_of_files(config: Config, teacher: ModelFolder, files: list[Path], key: str) -> Iterator[Document]:
    """Yields the chats of files as documents with tokens. `key` is the config's key that names the files.

    Raises:
        UserError: when a file cannot be read, or has chats that cannot be used: it names the first of these and their
            number.
    """
    columns = ChatColumns(config.corpus.text_field)
    without: list[str] = []

    def numbered() -> Iterator[tuple[str, Any]]:
        for path in files:
            is_empty = True
            for number, record in read_records(path, columns, DECODER):
                is_empty = False
                yield f"{path}:{number}", record
            if is_empty:
                without.append(str(path))

    yield from _documents(config, teacher, columns, numbered(), f"corpus.{key}")
    if without:
        warn(f"corpus.{key}: {len(without):,} files have no chat: {shortened(without)}")


def read_chats_of_dataset(config: Config, teacher: ModelFolder, split: str) -> Iterator[Document]:
    """Yields the chats of a split of `corpus.dataset` as documents; raises the errors of
    :func:`read_chats_of_files`.
    """
    columns = ChatColumns(config.corpus.text_field)
    name = f"{config.corpus.dataset}/{split}"
    rows = read_dataset_rows(config.corpus, split, columns.all)
    numbered = ((f"{name}:{number}", row) for number, row in enumerate(rows))
    yield from _documents(config, teacher, columns, numbered, f"corpus.dataset, split {split!r}")


def _documents(
    config: Config, teacher: ModelFolder, columns: ChatColumns, numbered: Iterator[tuple[str, Any]], source: str
) -> Iterator[Document]:
    writer = ChatWriter(_with_template(teacher), answers_only=config.corpus.loss_on == "assistant")
    problems: list[str] = []
    not_text: list[str] = []
    special: list[str] = []
    count, read = 0, ""
    for location, record in numbered:
        count += 1
        try:
            written = writer.write(columns.parse(record))
        except SpecialTokenError as error:
            special.append(f"{location}, {error}")
            continue
        except (ChatError, RecursionError) as error:
            reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
            problems.append(f"{location}: {reason}")
            if len(problems) == _MOST_PROBLEMS:
                read = "first "
                break
            continue
        if written is None:
            not_text.append(location)
        else:
            yield Document(location, written.text, written.text, tokens=written.tokens, counted=written.counted)
    if problems:
        raise UserError(
            listed(
                f"{source}: {len(problems):,} of the {read}{count:,} chats cannot be used; correct them, or leave "
                "them out",
                problems,
                _SHOWN_PROBLEMS,
            )
        )
    if writer.left_out:
        keys = ", ".join(f"{key} ({turns:,})" for key, turns in writer.left_out.most_common())
        warn(f"{source}: the chat template does not write these notes about turns, and they are left out: {keys}")
    if not_text:
        warn(
            f"{source}: {len(not_text):,} chats are not text (a NUL or half a surrogate pair) and are left out: "
            f"{shortened(not_text)}"
        )
    if special:
        warn(
            listed(
                f"{source}: {len(special):,} of the {count:,} chats say a special token, which the model would read as "
                "the end or the beginning of a turn or of the text. They are left out; to keep one, write the token "
                "differently there, with a space inside, for example",
                special,
                _SHOWN_PROBLEMS,
            )
        )


def _with_template(teacher: ModelFolder) -> Any:
    """Returns the teacher's tokenizer. Raises a UserError if it has no chat template."""
    if not getattr(teacher.tokenizer, "chat_template", None):
        raise UserError(
            f"{teacher.path}: its tokenizer has no chat template, which corpus.source: chat needs; use a "
            "teacher that was trained on chats, or add the file chat_template.jinja"
        )
    return teacher.tokenizer
