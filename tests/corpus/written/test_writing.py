"""The stage in which the teacher writes: any number of ranks, and an interrupted run, write the same texts."""

import functools
import re
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from config_files import write_config
from rank_processes import ONE_RANK, run_program, start_ranks
from safetensors.torch import load_file
from small_teachers import CHAT_TEMPLATE, NUM_SENSES, write_job
from tiny_work import launch_forked

from dskd import pipeline
from dskd.artifacts.lock import release_lock
from dskd.artifacts.manifest import is_current, read_manifest
from dskd.config import CorpusConfig
from dskd.config.reading import load_config
from dskd.corpus.build import build_corpus, read_texts, recipe
from dskd.corpus.written.blocks import blocks_of
from dskd.corpus.written.judging import KEPT
from dskd.corpus.written.write import recipe as written_recipe
from dskd.corpus.written.write import write_texts
from dskd.errors import UserError
from dskd.inspection.lexicon import format_lexicon, inspect_lexicon
from dskd.models.files.folder import find_teacher

pytestmark = pytest.mark.slow
TEXTS = "written/texts.parquet"


def _recipe(config):
    return written_recipe(config, find_teacher(config))


def _copy(config: Path, folder: Path, **corpus) -> Path:
    settings = yaml.safe_load(config.read_text())
    settings["workdir"] = str(folder / "work")
    settings["corpus"] |= corpus
    path = folder / "copy.yaml"
    write_config(path, settings)
    return path


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The config of a work directory in which one rank has written the texts."""
    path = write_job(tmp_path_factory.mktemp("written"))
    write_texts(load_config(path), ONE_RANK)
    return path


def _content(path: Path, **overrides) -> bytes:
    return load_config(path).path(TEXTS).read_bytes()


def test_there_is_a_text_for_every_request(written):
    config = load_config(written)
    rows = pq.read_table(config.path(TEXTS)).to_pylist()
    assert len(rows) == NUM_SENSES * 8
    assert len({row["text"] for row in rows}) > 0.9 * len(rows)
    assert all(row["part_of_speech"] in "nas" for row in rows)
    manifest = read_manifest(config.path("written"), "written")
    assert manifest.facts["senses_of_one_token"] == NUM_SENSES
    assert manifest.facts["texts"] == len(rows)


def test_two_ranks_write_the_same_texts_as_one(written, tmp_path):
    """With a sharded teacher; two ranks with a whole one continue what one rank began, below."""
    path = _copy(written, tmp_path)
    finished = run_program("write_texts.py", path, "teacher.mode=zero3", ranks=2)
    assert "tokens/s of all ranks" in finished.output
    assert _content(path) == _content(written)
    assert "up to date" in run_program("write_texts.py", path, "teacher.mode=zero3").output


def test_a_killed_run_continues_and_writes_the_same_texts(written, tmp_path):
    path = _copy(written, tmp_path)
    (process,) = start_ranks("write_texts.py", path)
    blocks = load_config(path).path(".written.partial", ".blocks")
    while not list(blocks.glob("*.json")):
        assert process.is_running(), process.output
        time.sleep(0.002)
    process.kill()
    assert not load_config(path).path("written").exists()
    assert len(list(blocks.glob("[!.]*.json"))) < len(blocks_of(NUM_SENSES * 8))
    continued = run_program("write_texts.py", path, "teacher.mode=resident", ranks=2)
    assert "blocks were written before an interruption" in continued.output
    assert _content(path) == _content(written)


def test_the_corpus_has_the_texts_that_are_kept_and_says_what_became_of_the_others(written, capsys):
    config = load_config(written, ["corpus.validation_share=0.4"])
    build_corpus(config)
    outcomes = pq.read_table(config.path("corpus", "senses.parquet")).to_pylist()
    assert len(outcomes) == NUM_SENSES * 8
    kept = [outcome for outcome in outcomes if outcome["outcome"] == KEPT]
    texts = [text for split in ("train", "validation") for text in read_texts(config, split)]
    assert 0 < len(kept) == len(texts) < len(outcomes)
    senses = {(outcome["word"], outcome["synset"]) for outcome in kept}
    facts = read_manifest(config.path("corpus"), "corpus").facts["senses"]
    assert (facts["asked"], facts["with_text"]) == (NUM_SENSES, len(senses))
    assert f"{len(senses)} of {NUM_SENSES} senses have text" in capsys.readouterr().err
    assert is_current(config.path("corpus"), recipe(config))


@pytest.mark.parametrize(
    ("change", "is_same"),
    [
        ("corpus.max_senses=3", False),
        ("corpus.texts_per_sense=2", False),
        ("corpus.max_new_tokens=21", False),
        ("corpus.temperature=0.5", False),
        ("corpus.top_p=0.5", False),
        ("seed=1", False),
        ("precision=bf16", False),
        ("corpus.server=http://localhost:1", False),
        ("corpus.batch_size=5", True),
        ("corpus.validation_share=0.2", True),
        ("corpus.sequence_length=32", True),
        ("teacher.mode=resident", True),
    ],
)
def test_texts_are_stale_when_what_they_were_written_with_changes(written, change, is_same):
    config = load_config(written, [change])
    assert is_current(config.path("written"), _recipe(config)) == is_same


def test_texts_of_another_server_model_or_chat_template_are_stale(written, tmp_path):
    path = write_job(tmp_path)
    before = _recipe(load_config(path))
    server = ["corpus.server=http://localhost:1/v1"]
    named = _recipe(load_config(path, [*server, "corpus.server_model=a"]))
    assert named != _recipe(load_config(path, [*server, "corpus.server_model=b"]))
    assert named.teacher is None
    (tmp_path / "teacher" / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    assert _recipe(load_config(path)) != before


def test_the_pipeline_cuts_what_the_teacher_wrote_into_sequences(tmp_path, monkeypatch):
    """The stages that follow read sequences, whatever text they are of."""
    path = write_job(tmp_path, max_new_tokens=40, temperature=1.5, packing="stream")
    monkeypatch.setattr(pipeline, "launch", functools.partial(launch_forked, ranks=1))
    monkeypatch.setattr("dskd.distributed.stopping.listen", lambda: None)  # pytest handles signals to this process
    overrides = ["student.layers=2", "student.train_layers=1"]  # the teacher has 4
    pipeline.run_pipeline(path, overrides, until="sequences")
    loaded = load_config(path, overrides)
    release_lock(loaded.path(pipeline.LOCK))
    stages = pipeline.plan_stages(loaded, path, overrides, lambda: find_teacher(loaded))
    names = [stage.name for stage in stages]
    assert names[:4] == ["lexicon", "written", "corpus", "sequences"]
    assert all(stage.is_current() for stage in stages[:4])
    assert len(load_file(loaded.path("sequences", "train.safetensors"))["input_ids"])
    report = inspect_lexicon(loaded)
    assert report.texts.senses == report.texts.asked == NUM_SENSES
    assert 0 < report.texts.with_text <= NUM_SENSES
    text = format_lexicon(report)
    assert re.search(rf"of words that are one token +{NUM_SENSES}$", text, re.MULTILINE)
    assert re.search(rf"with text in the corpus +{report.texts.with_text} ", text)
    assert re.search(r"^kept +\d+$", text, re.MULTILINE)


def test_a_chat_template_changes_the_prompt(tmp_path, capsys):
    path = write_job(tmp_path, chat_template=CHAT_TEMPLATE, max_senses=2, texts_per_sense=1)
    write_texts(load_config(path), ONE_RANK)
    assert "2 texts, asked for with its chat template" in capsys.readouterr().err


def test_a_job_without_anything_to_write_is_refused(tmp_path, written):
    with pytest.raises(UserError, match=r"corpus.source is wordnet, so there is nothing for the teacher to write"):
        write_texts(load_config(written).model_copy(update={"corpus": CorpusConfig()}), ONE_RANK)
    path = write_job(tmp_path, max_new_tokens=120)
    with pytest.raises(UserError, match=r"120 tokens after a prompt of \d+ .* more than the 128 positions"):
        write_texts(load_config(path), ONE_RANK)
    assert not load_config(path).path("written").exists()


def test_a_server_writes_for_one_process_only(written, tmp_path):
    path = _copy(written, tmp_path, server="http://127.0.0.1:1")
    finished = run_program("write_texts.py", path, ranks=2, check=False)
    assert finished.exit_code == 2
    assert "start it as `python launcher/write_texts.py`" in finished.output
