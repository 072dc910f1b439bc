"""Benchmarks in the formats in which they are published. The files of tests/support/task_data are written by hand."""

import csv
import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from repository import REPOSITORY
from task_files import DATA

from dskd.corpus.tasks.benchmarks import BENCHMARKS, Example
from dskd.corpus.tasks.reading import read_examples
from dskd.errors import UserError

SHARED = REPOSITORY.parent / "shared"
FOLDERS = {
    "arc_challenge": "arc",
    "commonsense_qa": "commonsense_qa",
    "piqa": "piqa",
    "mmlu": "mmlu",
    "squad_v2": "squad",
}


def _read(name, split, folder=None):
    return read_examples(BENCHMARKS[name], str(folder or DATA / FOLDERS[name]), split)


def _lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    ("name", "split", "count", "number", "expected"),
    [
        (
            "arc_challenge",
            "validation",
            5,
            2,
            Example("d3", "Which number of legs has a spider?", ("C",), ("four", "six", "eight", "ten")),
        ),
        (
            "commonsense_qa",
            "train",
            7,
            4,
            Example("c5", "Where do fish live?", ("E",), ("desert", "tree", "shop", "sky", "lake")),
        ),
        (
            "piqa",
            "validation",
            4,
            1,
            Example(
                "validation:2", "water a plant", ("1",), ("pour sand on the soil", "pour water on the soil"), subject=""
            ),
        ),
        (
            "mmlu",
            "test",
            5,
            4,
            Example(
                "plain sums:3",
                'What is "two" times two,\nas a number?',
                ("B",),
                ("2", "4", "6", "8"),
                subject="plain sums",
            ),
        ),
        (
            "mmlu",
            "auxiliary_train",
            8,
            3,
            Example(
                "auxiliary_train:4", "Eve saw a fox. What did Eve see?", ("D",), ("a cat", "a cow", "a hen", "a fox")
            ),
        ),
        (
            "squad_v2",
            "validation",
            5,
            0,
            Example(
                "e1",
                "How many arches has the bridge?",
                ("seven", "seven arches"),
                passage="The stone bridge has seven arches. It was paid for by the Weavers' Guild.",
            ),
        ),
        (
            "squad_v2",
            "validation",
            5,
            4,
            Example("e5", "What does the ferry cost?", (), passage="The ferry crosses the lake twice a day."),
        ),
    ],
)
def test_an_example_is_what_its_published_file_says(name, split, count, number, expected):
    examples = _read(name, split)
    assert len(examples) == count
    assert examples[number] == expected


def _labelled_row(record):
    question = record.pop("question")
    choices = {key: [choice[key] for choice in question["choices"]] for key in ("text", "label")}
    return {"id": record["id"], "question": question["stem"], "choices": choices, "answerKey": record["answerKey"]}


def _hub_rows(name, split):
    """Returns the rows that the Hub has of the same examples, from the published files."""
    folder = DATA / FOLDERS[name]
    if name in ("arc_challenge", "commonsense_qa"):
        return [_labelled_row(record) for record in _lines(folder / BENCHMARKS[name].files[split][0])]
    if name == "piqa":
        (path,) = (folder / f for f in BENCHMARKS[name].files[split] if (folder / f).exists())
        labels = path.with_name(f"{path.stem}-labels.lst").read_text().split()
        return [{**row, "label": int(label)} for row, label in zip(_lines(path), labels, strict=True)]
    if name == "mmlu":
        rows = []
        for path in sorted((folder / split).glob("*.csv")):
            subject = "" if split == "auxiliary_train" else path.stem.removesuffix(f"_{split}")
            with path.open(newline="") as stream:
                for question, *choices, answer in csv.reader(stream):
                    row = {"question": question, "subject": subject, "choices": choices, "answer": "ABCD".index(answer)}
                    rows.append(row)
        return rows
    rows = []
    for article in json.loads((folder / BENCHMARKS[name].files[split][0]).read_text())["data"]:
        for paragraph in article["paragraphs"]:
            for qa in paragraph["qas"]:
                answers = {key: [answer[key] for answer in qa["answers"]] for key in ("text", "answer_start")}
                row = {"id": qa["id"], "title": article["title"], "context": paragraph["context"]}
                rows.append(row | {"question": qa["question"], "answers": answers})
    return rows


@pytest.mark.parametrize("name", BENCHMARKS)
def test_the_hubs_files_have_the_examples_of_the_published_ones(tmp_path, name):
    benchmark = BENCHMARKS[name]
    for split in {benchmark.evaluated, benchmark.shots_from, benchmark.trained}:
        folder = tmp_path / (benchmark.hub_config or "data")
        folder.mkdir(exist_ok=True)
        rows = _hub_rows(name, split)
        for part, piece in enumerate((rows[:2], rows[2:])):
            pq.write_table(pa.Table.from_pylist(piece), folder / f"{split}-{part:05d}-of-00002.parquet")
        (tmp_path / "ARC-Easy").mkdir(exist_ok=True)  # another configuration in the same folder
        pq.write_table(pa.table({"id": ["easy"]}), tmp_path / "ARC-Easy" / f"{split}-00000-of-00001.parquet")
        if benchmark.hub_config is None:
            shutil.rmtree(tmp_path / "ARC-Easy")
        assert _read(name, split, tmp_path) == _read(name, split)


def _copy(tmp_path, name):
    shutil.copytree(DATA / FOLDERS[name], tmp_path / name)
    return tmp_path / name


def _refused(name, split, folder, *parts):
    with pytest.raises(UserError) as error:
        _read(name, split, folder)
    for part in parts:
        assert part in str(error.value)


def test_mistakes_in_files_are_named_with_file_and_line(tmp_path):
    arc = _copy(tmp_path, "arc_challenge")
    path = arc / "ARC-Challenge-Dev.jsonl"
    whole = path.read_text()
    path.write_text(whole.replace('"answerKey": "A"', '"answerKey": "Z"'))
    _refused("arc_challenge", "validation", arc, f"{path}:2:", "'Z' is none of its labels A, B, C, D")
    path.write_text(whole[:-20])
    _refused("arc_challenge", "validation", arc, f"{path}:5: this is not JSON")
    path.write_text(whole + whole.splitlines()[0])
    _refused("arc_challenge", "validation", arc, "the id 'd1' more than once")
    path.write_text("\n")
    _refused("arc_challenge", "validation", arc, "tasks.arc_challenge:", "has no examples")
    path.unlink()
    _refused("arc_challenge", "validation", arc, "has neither ARC-Challenge-Dev.jsonl, as published, nor validation-")

    piqa = _copy(tmp_path, "piqa")
    labels = piqa / "valid-labels.lst"
    labels.write_text("0\n1\n")
    _refused("piqa", "validation", piqa, f"{labels}: there are 2 labels, but 4 lines in valid.jsonl")
    for wrong in ("2", "²", "-1"):
        labels.write_text(f"0\n1\n\n{wrong}\n0\n", encoding="utf-8")
        _refused("piqa", "validation", piqa, f"{labels}:4: expected 0 or 1, which solution is right, found {wrong!r}")
    labels.write_bytes(b"0\n\xff\n")
    _refused("piqa", "validation", piqa, f"{labels}: this is not UTF-8 text")
    labels.unlink()
    _refused("piqa", "validation", piqa, "put valid-labels.lst into the same folder")

    mmlu = _copy(tmp_path, "mmlu")
    path = mmlu / "test" / "old_towns_test.csv"
    path.write_text('one,"a, b",c,d,e,A\nquestion,a,b,c,d\n')
    _refused("mmlu", "test", mmlu, f"{path}:2:", "found 5 fields, the last of them 'd'")
    shutil.copytree(mmlu / "dev", mmlu / "again" / "dev")
    _refused("mmlu", "dev", mmlu, "old_towns_dev.csv more than once")

    squad = _copy(tmp_path, "squad_v2")
    path = squad / "dev-v2.0.json"
    path.write_text(path.read_text().replace('"question"', '"query"', 1))
    _refused("squad_v2", "validation", squad, f"{path}: question 1:", "KeyError: 'question'")


@pytest.mark.parametrize("line", ["[1]", '"abc"', "3", "null"])
def test_a_line_of_json_that_is_not_an_object_is_named(tmp_path, line):
    path = _copy(tmp_path, "piqa") / "valid.jsonl"
    _, *others = path.read_text().splitlines()
    path.write_text("\n".join(["", line, *others]))
    _refused("piqa", "validation", path.parent, f'{path}:2: expected an object, {{"…": …}}, found {line}')


@pytest.mark.parametrize("letter", ["", " ", "BC", "AB", "E", "b"])
def test_an_answer_that_is_not_a_single_letter_is_refused(tmp_path, letter):
    path = _copy(tmp_path, "mmlu") / "test" / "old_towns_test.csv"
    path.write_text(f"one,a,b,c,d,A\ntwo,a,b,c,d,{letter}\n")
    message = f"{path}:2: expected question, four choices and a letter of A to D, found 6 fields, the last of them "
    _refused("mmlu", "test", path.parents[1], f"{message}{letter!r}")


def test_a_quote_that_is_never_closed_is_named_with_the_line_that_opens_it(tmp_path):
    path = _copy(tmp_path, "mmlu") / "test" / "old_towns_test.csv"
    for rest in ("two,a,b,c,d,B\n", "two,a,b,c,d,B\n" * 20_000):  # up to the end, and more than csv takes for a field
        path.write_text(f'one,a,"b\nb",c,d,A\n"two,a,b,c,d,A\n{rest}')
        _refused("mmlu", "test", path.parents[1], f"{path}:3: ")


def test_blank_lines_are_skipped(tmp_path):
    for name, split, file in (("piqa", "validation", "valid.jsonl"), ("mmlu", "test", "test/old_towns_test.csv")):
        path = _copy(tmp_path, name) / file
        path.write_text("\n" + path.read_text().replace("\n", "\n\n  \n"))
        assert _read(name, split, tmp_path / name) == _read(name, split)


def test_half_of_a_surrogate_pair_is_refused_when_it_is_read(tmp_path):
    piqa = _copy(tmp_path, "piqa") / "valid.jsonl"
    piqa.write_text(piqa.read_text().replace("water a plant", r"water \ud800 a plant"))
    message = r"'water \ud800 a plant' has half of a character, '\ud800'"
    _refused("piqa", "validation", piqa.parent, f"{piqa}:2:", message)
    squad = _copy(tmp_path, "squad_v2") / "dev-v2.0.json"
    squad.write_text(squad.read_text().replace("seven arches.", r"seven \udc00 arches."))
    _refused("squad_v2", "validation", squad.parent, f"{squad}:1:", r"has half of a character, '\udc00'")


@pytest.mark.parametrize("broken", ['{"qas": ["x"]}', '{"qas": "x"}', '["x"]', '{"qas": [{"answers": ["x"]}]}'])
def test_a_passage_in_another_form_is_named(tmp_path, broken):
    path = _copy(tmp_path, "squad_v2") / "dev-v2.0.json"
    path.write_text(f'{{"data": [{{"paragraphs": [{broken}]}}]}}')
    _refused("squad_v2", "validation", path.parent, f"{path}: question ", "expected data[].paragraphs[] with context")


def test_a_dataset_that_cannot_be_reached_is_named_with_what_to_do_instead(monkeypatch):
    pytest.importorskip("datasets", reason="the optional package `datasets` is not installed")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    _refused("mmlu", "test", "cais/no-such-data-set", "tasks.mmlu: split 'test' of", "and name their folder here")


@pytest.mark.parametrize("name", sorted(FOLDERS))
def test_compressed_files_have_the_examples_of_the_plain_ones(tmp_path, name):
    split = BENCHMARKS[name].evaluated
    shutil.copytree(DATA / FOLDERS[name], tmp_path / "zst")
    for path in [path for path in (tmp_path / "zst").rglob("*") if path.is_file() and path.suffix != ".lst"]:
        path.with_name(f"{path.name}.zst").write_bytes(pa.compress(path.read_bytes(), codec="zstd", asbytes=True))
        path.unlink()
    assert _read(name, split, tmp_path / "zst") == _read(name, split)


@pytest.mark.skipif(not (SHARED / "data").is_dir(), reason="the real files are in ../shared/data, which is not there")
@pytest.mark.parametrize(
    ("name", "folder", "labels"), [("arc_challenge", "arc", 4), ("commonsense_qa", "csqa", 5), ("piqa", "piqa", 2)]
)
def test_the_published_files_are_read_whole(name, folder, labels):
    (file,) = [
        path for pattern in BENCHMARKS[name].files["validation"] for path in (SHARED / "data" / folder).glob(pattern)
    ]
    examples = _read(name, "validation", SHARED / "data" / folder)
    assert len(examples) == sum(1 for line in file.read_text(encoding="utf-8").split("\n") if line.strip())
    assert {answer for example in examples for answer in example.answers} == set(BENCHMARKS[name].labels[:labels])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"choices": {"label": ["A", "B", "C"], "text": ["a", "b"]}}, "3 labels, but 2 texts"),
        ({"choices": {"label": ["A", "A"], "text": ["a", "b"]}}, "a label twice: A, A"),
        ({"choices": {"label": ["A", "B"], "text": ["a", " "]}}, "the question or a choice is empty"),
        ({"question": ""}, "the question or a choice is empty"),
        ({"id": None}, "its id is None"),
    ],
)
def test_a_damaged_question_with_choices_is_refused_with_its_row(tmp_path, changes, message):
    row = {"id": "q", "question": "What?", "choices": {"label": ["A", "B"], "text": ["a", "b"]}, "answerKey": "A"}
    pq.write_table(pa.Table.from_pylist([row, {**row, "id": "r"} | changes]), tmp_path / "validation-0.parquet")
    with pytest.raises(UserError, match=rf"validation-0\.parquet:2: .*{message}"):
        _read("arc_challenge", "validation", tmp_path)


def test_choices_may_be_empty_in_the_auxiliary_split_of_mmlu_alone(tmp_path):
    """As in the published file, which is collected from other data and has no subjects."""
    path = _copy(tmp_path, "mmlu") / "auxiliary_train" / "more.csv"
    path.parent.mkdir(exist_ok=True)
    path.write_text("Which word is missing?,, ,cat,dog,C\n")
    (example,) = (e for e in _read("mmlu", "auxiliary_train", tmp_path / "mmlu") if "missing" in e.question)
    assert (example.choices, example.answers, example.subject) == (("", "", "cat", "dog"), ("C",), "")
    test = tmp_path / "mmlu" / "test" / "old_towns_test.csv"
    test.write_text("Which word is missing?,, ,cat,dog,C\n")
    _refused("mmlu", "test", tmp_path / "mmlu", f"{test}:1: ", "the question or a choice is empty")


def test_a_question_of_mmlu_without_its_subject_is_refused(tmp_path):
    row = {"question": "What?", "subject": "", "choices": ["a", "b", "c", "d"], "answer": 1}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "test-0.parquet")
    _refused("mmlu", "test", tmp_path, "test-0.parquet:1: ", "it has no subject")


def test_labels_and_keys_are_compared_as_text(tmp_path):
    row = {"id": "q", "question": "What?", "choices": {"label": [1, 2], "text": ["a", "b"]}, "answerKey": "2"}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "validation-0.parquet")
    (example,) = _read("arc_challenge", "validation", tmp_path)
    assert example.answers == ("B",)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"is_impossible": "false"}, "is_impossible is 'false'; expected true or false"),
        ({"answers": []}, "it has no answers, but is_impossible is not true"),
        ({"answers": [{"text": ""}]}, "the question, its passage or an answer is empty"),
        ({"id": None}, "its id is None"),
    ],
)
def test_a_damaged_question_about_a_passage_is_refused_with_its_number(tmp_path, changes, message):
    question = {"id": "q", "question": "Who?", "answers": [{"text": "he"}], "is_impossible": False} | changes
    content = {"data": [{"paragraphs": [{"context": "It was he.", "qas": [question]}]}]}
    (tmp_path / "dev-v2.0.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=rf"dev-v2\.0\.json:? ?(question )?1.*{message}"):
        _read("squad_v2", "validation", tmp_path)


def test_hidden_files_are_skipped(tmp_path):
    shutil.copytree(DATA / FOLDERS["mmlu"], tmp_path / "mmlu")
    expected = _read("mmlu", "test", tmp_path)
    file = next((tmp_path / "mmlu").rglob("*_test.csv"))
    file.with_name(f"._{file.name}").write_bytes(b"\0\5\x16\7")
    (tmp_path / "__MACOSX").mkdir()
    (tmp_path / "__MACOSX" / file.name).write_bytes(b"\0\5\x16\7")
    assert _read("mmlu", "test", tmp_path) == expected
