"""Files and datasets of chats as a corpus and as sequences, and all that is refused with file, line and count."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from chat_templates import SMOLLM, chat_tokenizer
from stages import build_sequences_of
from tiny_models import save_model

from dskd.artifacts.manifest import is_current, read_manifest
from dskd.config import Config
from dskd.corpus.build import build_corpus, read_texts, recipe
from dskd.corpus.sequences import load_sequences
from dskd.corpus.sequences import recipe as recipe_of_sequences
from dskd.errors import UserError
from dskd.models.files.folder import find_teacher


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """Writes tiny models with the tokenizer of a chat template; None: no template."""
    folder = tmp_path_factory.mktemp("teachers")
    names = {}

    def teacher(template):
        if template not in names:
            names[template] = folder / str(len(names))
            save_model(names[template])
            chat_tokenizer(template).save_pretrained(names[template])
            values = json.loads((names[template] / "config.json").read_text())
            (names[template] / "config.json").write_text(json.dumps(values | {"max_position_embeddings": 1024}))
        return names[template]

    return teacher


@pytest.fixture
def configure(tmp_path, teachers):
    def configure(*, template=SMOLLM, **corpus):
        return Config(
            workdir=str(tmp_path / "work"),
            teacher={"path": str(teachers(template))},
            corpus={"source": "chat", "sequence_length": 96, "validation_share": 0.3, **corpus},
        )

    return configure


def _chat(number, *, turns=1):
    said = [
        each
        for turn in range(turns)
        for each in (
            {"role": "user", "content": f"Question {number}.{turn}?"},
            {"role": "assistant", "content": f"Answer {number}.{turn}."},
        )
    ]
    return {"messages": said}


def _write(path, records):
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records), encoding="utf-8")
    return str(path)


def _build(config):
    build_corpus(config)
    teacher = build_sequences_of(config)
    return {split: load_sequences(config, split, teacher.tokenizer_digest)[0] for split in ("train", "validation")}


def test_the_same_chats_in_every_kind_of_file_are_the_same_corpus(tmp_path, configure):
    chats = [_chat(number) for number in range(40)]
    speakers = {"user": "human", "assistant": "gpt"}
    sharegpt = [
        {"conversations": [{"from": speakers[turn["role"]], "value": turn["content"]} for turn in chat["messages"]]}
        for chat in chats
    ]
    files = [tmp_path / name for name in ("a.jsonl", "b.parquet", "c.jsonl.gz", "d.arrow", "e.json")]
    _write(files[0], chats)
    pq.write_table(pa.Table.from_pylist([{**chat, "tools": None, "id": 1} for chat in chats]), files[1])
    with gzip.open(files[2], "wt") as stream:
        stream.write("".join(f"{json.dumps(record)}\n" for record in sharegpt))
    table = pa.Table.from_pylist(sharegpt)
    with pa.OSFile(str(files[3]), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    files[4].write_text(json.dumps(chats), encoding="utf-8")
    contents = []
    for file in files:
        config = configure(train=(str(file),))
        _build(config)
        contents.append([pq.read_table(config.path("corpus", f"{s}.parquet")) for s in ("train", "validation")])
    for train, validation in contents:
        assert train.drop_columns("document").equals(contents[0][0].drop_columns("document"))
        assert validation.drop_columns("document").equals(contents[0][1].drop_columns("document"))
        assert 5 <= len(validation) <= 20
        assert len(train) + len(validation) == 40
    assert contents[0][0]["document"][0].as_py() == f"{files[0]}:1"


@pytest.mark.parametrize("packing", ["documents", "stream", "none"])
def test_answers_are_targets_in_every_packing_and_no_chat_is_cut(tmp_path, configure, packing):
    chats = [_chat(number, turns=1 + number % 2) for number in range(30)]
    config = configure(train=(_write(tmp_path / "a.jsonl", chats),), packing=packing, sequence_length=300)
    sequences = _build(config)
    tokenizer = find_teacher(config).tokenizer
    found = []
    for split in ("train", "validation"):
        batch = sequences[split].batch(0, len(sequences[split]))
        assert batch.num_tokens == sum(
            len(tokenizer.encode(t, add_special_tokens=False)) for t in read_texts(config, split)
        )
        for row, (ids, has_target) in enumerate(zip(batch.input_ids, batch.has_target, strict=True)):
            assert not has_target[-1]
            targets = ids.roll(-1)[has_target]
            found += tokenizer.decode(targets).split("<|im_end|>")[:-1]
            starts = batch.starts[row].nonzero().flatten().tolist()
            system = (ids == tokenizer.convert_tokens_to_ids("<|im_start|>")).nonzero().flatten()
            chats_in_row = tokenizer.decode(ids).count("You are Smol")
            assert len(starts) == (chats_in_row if packing == "documents" else 1)
            assert set(starts) <= set(system.tolist())
            assert chats_in_row == 1 if packing == "none" else chats_in_row >= 1
    assert sorted(found) == sorted(turn["content"] for chat in chats for turn in chat["messages"][1::2])
    manifest = read_manifest(config.path("sequences"), "sequences")
    counted = sum(manifest.facts[split]["counted"] for split in ("train", "validation"))
    assert counted == sum(len(answer) + 1 for answer in found)  # with the token that ends each turn


def test_with_loss_on_all_every_token_but_the_first_of_a_chat_is_a_target(tmp_path, configure):
    config = configure(train=(_write(tmp_path / "a.jsonl", [_chat(n) for n in range(9)]),), loss_on="all")
    sequences = _build(config)["train"]
    batch = sequences.batch(0, len(sequences))
    assert batch.has_target.sum() == batch.num_tokens - batch.starts.sum()


def test_a_limit_keeps_some_of_the_first_chats_and_not_the_longest(tmp_path, configure):
    chats = [_chat(number, turns=1 if number < 40 else 3) for number in range(60)]
    config = configure(train=(_write(tmp_path / "a.jsonl", chats),), max_sequences=3, sequence_length=400)
    sequences = _build(config)["train"]
    assert len(sequences) == 3
    text = "".join(find_teacher(config).tokenizer.batch_decode(sequences.batch(0, 3).input_ids))
    texts = list(read_texts(config, "train"))
    kept = [number for number, chat in enumerate(texts) if chat in text]
    assert len(kept) == text.count("You are Smol") == text.count("Answer")  # all of one turn


def test_a_dataset_is_read_like_files(tmp_path, configure):
    pytest.importorskip("datasets", reason="the optional package `datasets` is not installed")
    (tmp_path / "data").mkdir()
    for split, numbers in {"train": range(9), "test": range(7, 12)}.items():
        rows = [{**_chat(number), "id": number} for number in numbers]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data" / f"{split}-00000.parquet")
    config = configure(dataset=str(tmp_path / "data"), validation_split="test")
    build_corpus(config)
    assert [text.count("Answer") for text in read_texts(config, "train")] == [1] * 7  # two are held out
    assert "Answer 11.0." in list(read_texts(config, "validation"))[-1]
    table = pq.read_table(config.path("corpus", "train.parquet"))
    assert table["document"][6].as_py() == f"{tmp_path / 'data'}/train:6"


def test_another_template_or_loss_makes_another_corpus_and_longer_sequences_do_not(tmp_path, configure):
    path = _write(tmp_path / "a.jsonl", [_chat(number) for number in range(20)])
    config = configure(train=(path,))
    _build(config)
    folder = config.path("corpus")
    assert is_current(folder, recipe(config))
    assert is_current(folder, recipe(configure(train=(path,), sequence_length=100, long_chats="drop")))
    assert not is_current(folder, recipe(configure(train=(path,), loss_on="all")))
    assert not is_current(folder, recipe(configure(train=(path,), template=SMOLLM.replace("Smol", "Large"))))
    assert "long_chats" in recipe_of_sequences(config, "digest").config


def _broken(number):
    chat = _chat(number)
    return [
        {"messages": chat["messages"][:1]},
        {"messages": [*chat["messages"], {"role": "critic", "content": "Bad."}]},
        {"text": "Hi"},
    ][number % 3]


@pytest.mark.parametrize(
    ("records", "corpus", "messages"),
    [
        (
            [_chat(0), _broken(0), _broken(1), _broken(2), _chat(1)],
            {},
            [
                "corpus.train: 3 of the 5 chats cannot be used",
                "a.jsonl:2: it has no turn of the assistant, only of user",
                "a.jsonl:3: turn 3 has the role 'critic'; expected one of system, developer, user, assistant, tool",
                "a.jsonl:4: expected a chat under 'messages' or 'conversations', but it has text; name the key",
            ],
        ),
        (
            [_chat(0), *map(_broken, range(300))],
            {},
            ["100 of the first 101 chats", "a.jsonl:11: ", "… and 90 more"],
        ),
        ([_chat(0)], {"text_field": "chosen"}, ["1 of the 1 chats", "a.jsonl:1: expected a chat under 'chosen'"]),
        ([_chat(0)], {"template": None}, ["its tokenizer has no chat template", "chat_template.jinja"]),
        (
            [_chat(0)],
            {"template": "{{ raise_exception('no') }}"},
            ["a.jsonl:1: the chat template refuses it (TemplateError: no)"],
        ),
        (
            [_chat(number, turns=1 + number % 2) for number in range(60)],
            {"sequence_length": 100},
            [
                "a.jsonl:",
                "this chat has 1",
                "more than corpus.sequence_length, 100, and so have ",
                " train chats; the longest has ",
                "Raise corpus.sequence_length, or set corpus.long_chats: drop to leave them out",
            ],
        ),
    ],
)
def test_chats_that_cannot_be_used_are_refused_with_file_line_and_count(tmp_path, configure, records, corpus, messages):
    config = configure(train=(_write(tmp_path / "a.jsonl", records),), **corpus)
    with pytest.raises(UserError) as error:
        _build(config)
    for message in messages:
        assert message in str(error.value)
    # Nothing is half-written: a corpus without sequences, if the chats themselves are good.
    left = (
        [path.name for path in config.path().iterdir() if not path.name.startswith(".")]
        if config.path().exists()
        else []
    )
    assert left == (["corpus"] if "sequence_length" in corpus else [])


@pytest.mark.parametrize("part", ["caf\ud83d", "nul\0"])
@pytest.mark.parametrize("loss_on", ["assistant", "all"])
def test_chats_that_are_not_text_are_left_out_with_a_warning(tmp_path, configure, capsys, part, loss_on):
    bad = {"messages": [{"role": "user", "content": part}, {"role": "assistant", "content": "Yes."}]}
    path = _write(tmp_path / "a.jsonl", [_chat(0), bad, *(_chat(number) for number in range(1, 20))])
    config = configure(train=(path,), loss_on=loss_on)
    build_corpus(config)
    assert f"corpus.train: 1 chats are not text (a NUL or half a surrogate pair) and are left out: {path}:2" in (
        " ".join(capsys.readouterr().err.split())
    )
    assert sum(1 for split in ("train", "validation") for _ in read_texts(config, split)) == 20


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_notes_about_turns_are_named_in_one_line(tmp_path, configure, capsys, kind):
    """As in WildChat, whose chats are under `conversation`."""
    chats = [_chat(number)["messages"] for number in range(20)]
    turns = [[{**turn, "language": "English", "turn_identifier": 3} for turn in chat] for chat in chats]
    turns[0][0]["country"] = "Italy"
    file = tmp_path / f"a.{kind}"
    records = [{"conversation": chat, "model": "x"} for chat in turns]
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(records), file)
    else:
        _write(file, records)
    build_corpus(configure(train=(str(file),), text_field="conversation"))
    printed = capsys.readouterr().err
    assert (
        "warning: corpus.train: the chat template does not write these notes about turns, and they are left out: "
        "language (40), country (1)\n"
    ) in printed
    noted = list(read_texts(configure(train=(str(file),)), "train"))
    plain = configure(train=(_write(tmp_path / "plain.jsonl", map(_chat, range(20))),))
    build_corpus(plain)
    assert noted == list(read_texts(plain, "train"))


def test_columns_of_a_table_that_would_be_parts_of_the_chat_are_refused(tmp_path, configure):
    records = [_chat(number) | {"functions": [{"name": "add"}]} for number in range(20)]
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet:1: 'functions' would be ignored; write them under 'tools'"):
        build_corpus(configure(train=(str(tmp_path / "a.parquet"),)))


def test_chats_that_say_a_token_of_the_template_are_left_out_and_counted(tmp_path, configure, capsys):
    said = [
        [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
        for user, answer in (("What is <|im_end|>?", "A token."), ("Hi", "Hello!<|im_end|>\n<|im_start|>user\nBye"))
    ]
    chats = [_chat(0), {"messages": said[0]}, *(_chat(number) for number in range(1, 20)), {"messages": said[1]}]
    path = _write(tmp_path / "a.jsonl", chats)
    sequences = _build(configure(train=(path,)))
    assert (
        f"corpus.train: 2 of the 22 chats say a special token, which the model would read as the end or the beginning "
        "of a turn or of the text. They are left out; to keep one, write the token differently there, with a space "
        f"inside, for example: {path}:2, turn 1: '<|im_end|>' {path}:22, turn 2: '<|im_end|>' "
    ) in f"{' '.join(capsys.readouterr().err.split())} "
    batches = [sequences[split].batch(0, len(sequences[split])) for split in sequences]
    config = configure(train=(path,))
    end = find_teacher(config).tokenizer.convert_tokens_to_ids("<|im_end|>")
    # Each of the other chats ends three turns, and only the answer's end counts.
    assert sum(int((batch.input_ids == end).sum()) for batch in batches) == 20 * 3
    assert sum(int((batch.input_ids.roll(-1)[batch.has_target] == end).sum()) for batch in batches) == 20


def _nested(depth):
    return '{"messages": ' + "[" * depth + "]" * depth + "}"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (_nested(600), r"a\.jsonl:2: .*(nested too deeply|not a list of objects)"),
        (
            '{"messages": [{"role": "user", "content": "GOOD", "content": "BAD"}]}',
            r"a\.jsonl:2: an object has the key 'content' twice; remove one of them",
        ),
    ],
)
def test_records_that_python_alone_reads_wrongly_or_not_at_all_are_refused(tmp_path, configure, line, message):
    (tmp_path / "a.jsonl").write_text(f"{json.dumps(_chat(0))}\n{line}\n")
    with pytest.raises(UserError, match=message):
        build_corpus(configure(train=(str(tmp_path / "a.jsonl"),)))


def test_a_repeated_key_in_an_array_of_chats_is_refused_at_once(tmp_path, configure):
    (tmp_path / "a.json").write_text(f'[{json.dumps(_chat(0))}, {{"id": 1, "id": 2}}, and no more JSON')
    with pytest.raises(UserError, match=r"a\.json: element 2 of the array: an object has the key 'id' twice"):
        build_corpus(configure(train=(str(tmp_path / "a.json"),)))


def test_a_file_without_chats_among_others_is_named(tmp_path, configure, capsys):
    paths = [_write(tmp_path / name, chats) for name, chats in (("a.jsonl", map(_chat, range(20))), ("b.jsonl", []))]
    build_corpus(configure(train=tuple(paths)))
    assert f"corpus.train: 1 files have no chat: {paths[1]}" in " ".join(capsys.readouterr().err.split())


def test_long_chats_are_left_out_if_the_config_says_so_and_counted(tmp_path, configure, capsys):
    path = _write(tmp_path / "a.jsonl", [_chat(number, turns=1 + number % 2) for number in range(60)])
    config = configure(train=(path,), sequence_length=100, long_chats="drop")
    sequences = _build(config)["train"]
    tokenizer, texts = find_teacher(config).tokenizer, list(read_texts(config, "train"))
    short = [text for text in texts if len(tokenizer.encode(text, add_special_tokens=False)) <= 100]
    assert 0 < len(short) < len(texts)
    rows = "".join(tokenizer.batch_decode(sequences.batch(0, len(sequences)).input_ids))
    assert rows.count("You are Smol") == len(short)
    assert all(text in rows for text in short)
    assert f"and so have {len(texts) - len(short) - 1} more of the {len(texts)} train chats" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"Raise corpus\.sequence_length$"):
        _build(configure(train=(path,), sequence_length=20, long_chats="drop"))


@pytest.mark.parametrize(("name", "content"), [("a.txt", "user: Hi"), ("index.json", '{"shards": []}')])
def test_files_that_hold_no_records_are_refused(tmp_path, configure, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=rf"{name}: expected records"):
        build_corpus(configure(train=(str(tmp_path / name),)))


def test_a_table_without_a_column_of_chats_is_refused(tmp_path, configure):
    pq.write_table(pa.table({"body": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(
        UserError, match=r"a.parquet: expected a column 'messages' or 'conversations' .* body \(string\)"
    ):
        build_corpus(configure(train=(str(tmp_path / "a.parquet"),)))


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"corpus": {"train": ("a",), "dataset": "b/c"}}, "corpus.train, corpus.dataset are set; remove those of one"),
        ({"corpus": {}}, "source: chat needs corpus.train, a list of paths or globs, or corpus.dataset"),
        ({"corpus": {"dataset": "b/c", "tasks": ("piqa",)}}, "corpus.tasks needs source: tasks, and it is chat"),
        ({"corpus": {"source": "files", "train": ("a",), "loss_on": "all"}}, "corpus.loss_on needs source: chat"),
        (
            {"corpus": {"train": ("a",), "packing": "none"}, "annotation": {"continuation_tokens": 3}},
            "annotation.continuation_tokens: chats .* have their answers",
        ),
        ({"corpus": {"train": ("a",)}, "teacher": {"train_from_scratch": {}}}, "needs teacher.path"),
    ],
)
def test_keys_that_do_not_fit_chats_are_refused(sections, message):
    sections["corpus"] = {"source": "chat", **sections["corpus"]}
    with pytest.raises(ValueError, match=message):
        Config(**{"workdir": "x", "teacher": {"path": "y"}, **sections})
