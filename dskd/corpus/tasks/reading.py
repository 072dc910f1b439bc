"""Reads a benchmark's examples from a folder with its published files or the Hub's Parquet files, or from the Hub.

| benchmark | published as |
|---|---|
| arc_challenge, commonsense_qa | JSON lines: `question` with `stem` and `choices` (`label`, `text`); `answerKey` |
| piqa | JSON lines: `goal`, `sol1`, `sol2`; in the same folder `NAME-labels.lst` with one 0 or 1 per line |
| mmlu | one CSV per subject, without a header: question, four choices, the letter of the right one |
| squad_v2 | one JSON: `data[].paragraphs[]` with `context` and `qas[]`: `question`, `answers[].text`, `is_impossible` |

The Hub has the same fields as rows. A folder may hold either form, at any depth. Examples keep the order of the files,
and error messages name file and line.
"""

import csv
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

import pyarrow.parquet as pq

from dskd.artifacts.pointers import refuse_pointer
from dskd.corpus.hub import read_rows
from dskd.corpus.opening import COMPRESSIONS, open_text, reading_errors, without_compression
from dskd.corpus.tasks.benchmarks import LETTERS, Benchmark, Example
from dskd.errors import UserError, counted

Row = Any  # one record of JSON or Parquet
Location = str  # FILE:LINE


class _NoExampleError(ValueError):
    """A record that is not in the benchmark's format."""


def read_examples(benchmark: Benchmark, location: str, split: str) -> list[Example]:
    """Returns the examples of a split from `location`, a folder or the name of a dataset on the Hub. Raises a UserError
    when there are none, a record is not in the benchmark's format, or two examples have the same id.
    """
    folder = Path(location).expanduser()
    if folder.is_dir():
        source, rows = _rows_of_folder(benchmark, folder, split)
    else:
        source, rows = f"{location}, split {split!r}", _rows_of_hub(benchmark, location, split)
    examples = []
    _, parse = _FORMATS[benchmark.name]
    for row_location, row in rows:
        try:
            example = parse(benchmark, row)
            _require_whole_characters(example)
            if benchmark.one_score_a_subject and split != benchmark.trained and not example.subject:
                raise _NoExampleError("it has no subject, and the score is a mean over subjects")
            examples.append(example)
        except (_NoExampleError, KeyError, TypeError, AttributeError, IndexError) as error:
            reason = f"{error}" if isinstance(error, _NoExampleError) else f"{type(error).__name__}: {error}"
            raise UserError(
                f"{row_location}: this is not an example of {benchmark.name} as it is published ({reason}); "
                "docs/formats.md has the formats"
            ) from None
    if not examples:
        raise UserError(f"tasks.{benchmark.name}: {source} has no examples; is it whole?")
    named = _named(examples, split)
    twice = [name for name, count in Counter(example.name for example in named).items() if count > 1]
    if twice:
        raise UserError(f"tasks.{benchmark.name}: {source} has the id {twice[0]!r} more than once; keep one of them")
    return named


def _require_whole_characters(example: Example) -> None:
    """Raises a _NoExampleError if a text of the example has half of a surrogate pair: JSON can express it, but no
    tokenizer can read it.
    """
    for text in (example.name, example.question, *example.answers, *example.choices, example.passage, example.subject):
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise _NoExampleError(f"{text[:40]!r} has half of a character, {text[error.start]!r}; remove it") from None


def _named(examples: list[Example], split: str) -> list[Example]:
    """Names examples without ids by their number in subject or split, so that names agree in all published forms."""
    numbers = Counter[str]()
    named = []
    for example in examples:
        kind = example.subject or split
        numbers[kind] += 1
        named.append(example if example.name else replace(example, name=f"{kind}:{numbers[kind]}"))
    return named


def _rows_of_folder(benchmark: Benchmark, folder: Path, split: str) -> tuple[str, Iterator[tuple[Location, Row]]]:
    """Returns the files that hold the rows of a split, for messages, and the rows with their places."""
    for pattern in benchmark.files[split]:
        endings = ("", *COMPRESSIONS)
        files = sorted(path for ending in endings for path in _visible(folder, pattern + ending))
        if files:
            _require_one_version(benchmark, folder, files)
            return ", ".join(map(str, files[:3])), _published_rows(benchmark, files)
    files = _parquet_files(benchmark, folder, split)
    if files:
        return ", ".join(map(str, files[:3])), _parquet_rows(files)
    patterns = " or ".join(benchmark.files[split])
    raise UserError(
        f"tasks.{benchmark.name}: {folder} has neither {patterns}, as published, nor {split}-*.parquet, as on the Hub; "
        "name the folder that has them"
    )


def _visible(folder: Path, pattern: str) -> Iterator[Path]:
    """Yields the files of a pattern, except hidden ones and those that archives made on a Mac have for each file."""
    for path in folder.rglob(pattern):
        parts = path.relative_to(folder).parts
        if path.is_file() and "__MACOSX" not in parts and not any(part.startswith(".") for part in parts):
            yield path


def _require_one_version(benchmark: Benchmark, folder: Path, files: list[Path]) -> None:
    names = [without_compression(path.name) for path in files]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        places = ", ".join(str(path) for path, name in zip(files, names, strict=True) if name == twice[0])
        raise UserError(
            f"tasks.{benchmark.name}: {folder} has {twice[0]} more than once ({places}); name the folder that has the "
            "right one only"
        )


def _parquet_files(benchmark: Benchmark, folder: Path, split: str) -> list[Path]:
    """Returns the Hub's Parquet files of a split: those in the configuration's folder, or all if it has none."""
    files = sorted({*_visible(folder, f"{split}-*.parquet"), *_visible(folder, f"{split}/*.parquet")})
    of_config = [path for path in files if benchmark.hub_config in path.relative_to(folder).parts]
    return of_config or files


def _parquet_rows(files: Iterable[Path]) -> Iterator[tuple[Location, Row]]:
    for path in files:
        with reading_errors(path):
            refuse_pointer(path)
            rows = pq.read_table(path).to_pylist()
        for number, row in enumerate(rows, start=1):
            yield f"{path}:{number}", row


def _rows_of_hub(benchmark: Benchmark, dataset: str, split: str) -> Iterator[tuple[Location, Row]]:
    rows = read_rows(
        dataset,
        split,
        benchmark.hub_config,
        key=f"tasks.{benchmark.name}",
        instead="or fetch the benchmark's files where the Hub can be reached, and name their folder here",
    )
    for number, row in enumerate(rows):
        yield f"{dataset}/{split}:{number}", row


def _published_rows(benchmark: Benchmark, files: list[Path]) -> Iterator[tuple[Location, Row]]:
    rows_of, _ = _FORMATS[benchmark.name]
    for path in files:
        with reading_errors(path):
            for line, row in rows_of(path):
                yield f"{path}:{line}", row


def _json_lines(path: Path) -> Iterator[tuple[int, Row]]:
    with open_text(path) as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                row = _from_json(line, f"{path}:{number}")
                if not isinstance(row, dict):
                    raise UserError(
                        f'{path}:{number}: expected an object, {{"…": …}}, found {line.strip()[:20]}; docs/formats.md '
                        "has the formats"
                    )
                yield number, row


def _piqa_rows(path: Path) -> Iterator[tuple[int, Row]]:
    name = path.name[: len(without_compression(path.name))]
    labels_path = path.with_name(f"{Path(name).stem}-labels.lst")
    if not labels_path.is_file():
        raise UserError(f"{path}: its labels are missing; put {labels_path.name} into the same folder")
    labels = _piqa_labels(labels_path)
    rows = list(_json_lines(path))
    if len(rows) != len(labels):
        raise UserError(
            f"{labels_path}: there are {len(labels):,} labels, but {len(rows):,} lines in {path.name}; the two belong "
            "to different versions, or a download was cut"
        )
    for (number, row), label in zip(rows, labels, strict=True):
        yield number, {**row, "label": label}


def _piqa_labels(path: Path) -> list[int]:
    with reading_errors(path), open_text(path) as stream:
        lines = stream.read().split("\n")
    labels = []
    for number, label in enumerate(map(str.strip, lines), start=1):
        if label not in ("", "0", "1"):
            raise UserError(f"{path}:{number}: expected 0 or 1, which solution is right, found {label[:20]!r}")
        labels += [int(label)] if label else []
    return labels


def _mmlu_rows(path: Path) -> Iterator[tuple[int, Row]]:
    stem = Path(path.name[: len(without_compression(path.name))]).stem
    subject = stem.rsplit("_", 1)[0].replace("_", " ") if path.parent.name != "auxiliary_train" else ""
    with open_text(path, newline="") as stream:
        for line, record in _csv_records(path, stream):
            if len(record) != 6 or record[5].strip() not in tuple(LETTERS[:4]):
                raise UserError(
                    f"{path}:{line}: expected question, four choices and a letter of A to D, found "
                    f"{counted(len(record), 'field')}, the last of them {record[-1][:20]!r}"
                )
            answer = LETTERS.index(record[5].strip())
            yield line, {"question": record[0], "choices": record[1:5], "answer": answer, "subject": subject}


def _csv_records(path: Path, stream: TextIO) -> Iterator[tuple[int, list[str]]]:
    """Yields the records that are not blank, each after the number of the line on which it begins."""
    reader = csv.reader(stream)
    while True:
        line = reader.line_num + 1
        try:
            record = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise UserError(
                f"{path}:{line}: the record that begins here is not CSV ({error}); is a quote in it never closed?"
            ) from None
        if len(record) > 1 or any(field.strip() for field in record):
            yield line, record


def _squad_rows(path: Path) -> Iterator[tuple[int, Row]]:
    with open_text(path) as stream:
        content = _from_json(stream.read(), str(path))
    number = 0
    try:
        for article in content["data"]:
            for paragraph in article["paragraphs"]:
                for question in paragraph["qas"]:
                    number += 1
                    texts = _squad_answers(question, f"{path}: question {number} ({question['id']!r})")
                    yield (
                        number,
                        {
                            "id": question["id"],
                            "context": paragraph["context"],
                            "question": question["question"],
                            "answers": {"text": texts},
                        },
                    )
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: question {number}: expected data[].paragraphs[] with context and qas[], as SQuAD v2 is "
            f"published ({type(error).__name__}: {error})"
        ) from None


def _squad_answers(question: dict[str, Any], location: str) -> list[str]:
    is_impossible = question.get("is_impossible", False)
    if not isinstance(is_impossible, bool):
        raise UserError(f"{location}: is_impossible is {is_impossible!r}; expected true or false")
    if not is_impossible and not question["answers"]:
        raise UserError(
            f"{location}: it has no answers, but is_impossible is not true; if the passage does not answer it, set it"
        )
    return [] if is_impossible else [each["text"] for each in question["answers"]]


def _from_json(text: str, location: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{location}: this is not JSON ({error}); was its download truncated?") from None


def _parse_labelled(benchmark: Benchmark, row: Row) -> Example:
    """Parses a row of ARC or CommonsenseQA. Some questions of ARC have numbers as labels; letters replace them."""
    question, choices = row["question"], row.get("choices")
    if isinstance(question, dict):
        question, choices = question["stem"], question["choices"]
    if isinstance(choices, dict):
        labels, texts = list(choices["label"]), list(choices["text"])
        if len(labels) != len(texts):
            raise _NoExampleError(f"its choices have {len(labels)} labels, but {len(texts)} texts")
    else:
        labels, texts = ([choice[key] for choice in choices] for key in ("label", "text"))
    labels, key = [str(label) for label in labels], str(row["answerKey"])  # numbers as labels are strings in some files
    if len(set(labels)) < len(labels):
        raise _NoExampleError(f"its choices have a label twice: {', '.join(labels)}")
    if key not in labels:
        raise _NoExampleError(f"the answerKey {key!r} is none of its labels {', '.join(labels)}")
    return _choice(benchmark, _id_of(row), question, tuple(texts), labels.index(key))


def _id_of(row: Row) -> str:
    if isinstance(row["id"], bool) or not isinstance(row["id"], (str, int)) or not str(row["id"]).strip():
        raise _NoExampleError(f"its id is {row['id']!r}; expected a text that no other question has")
    return str(row["id"])


def _parse_piqa(benchmark: Benchmark, row: Row) -> Example:
    return _choice(benchmark, "", row["goal"], (row["sol1"], row["sol2"]), row["label"])


def _parse_mmlu(benchmark: Benchmark, row: Row) -> Example:
    subject = str(row.get("subject") or "").replace("_", " ")
    return _choice(benchmark, "", row["question"], tuple(row["choices"]), row["answer"], subject)


def _choice(
    benchmark: Benchmark, name: str, question: str, choices: tuple[str, ...], right: Any, subject: str = ""
) -> Example:
    texts = (question, *choices)
    if not all(isinstance(text, str) for text in texts):
        raise _NoExampleError("question and choices are to be strings")
    if not 2 <= len(choices) <= len(benchmark.labels):
        raise _NoExampleError(f"it has {len(choices)} choices; expected 2 to {len(benchmark.labels)}")
    # The choices of MMLU's auxiliary split, which has no subjects and is collected from other data, stay as published.
    is_auxiliary = benchmark.one_score_a_subject and not subject
    if not question.strip() or not (is_auxiliary or all(choice.strip() for choice in choices)):
        raise _NoExampleError("the question or a choice is empty")
    if isinstance(right, bool) or not isinstance(right, int) or not 0 <= right < len(choices):
        raise _NoExampleError(f"its right choice is {right!r}; expected a number from 0 to {len(choices) - 1}")
    stripped = tuple(choice.strip() for choice in choices)
    return Example(name, question.strip(), (benchmark.labels[right],), stripped, subject=subject)


def _parse_squad(benchmark: Benchmark, row: Row) -> Example:
    texts = (row["question"], row["context"], *row["answers"]["text"])
    if not all(isinstance(text, str) for text in texts):
        raise _NoExampleError("question, context and answers are to be strings")
    question, passage, *answers = (text.strip() for text in texts)
    if not question or not passage or not all(answers):
        raise _NoExampleError("the question, its passage or an answer is empty")
    return Example(_id_of(row), question, tuple(answers), passage=passage)


# How the published files of each benchmark become rows, and rows examples.
_FORMATS: dict[str, tuple[Callable[[Path], Iterator[tuple[int, Row]]], Callable[[Benchmark, Row], Example]]] = {
    "arc_challenge": (_json_lines, _parse_labelled),
    "commonsense_qa": (_json_lines, _parse_labelled),
    "piqa": (_piqa_rows, _parse_piqa),
    "mmlu": (_mmlu_rows, _parse_mmlu),
    "squad_v2": (_squad_rows, _parse_squad),
}
