"""The plan of the stage in which the teacher writes the text."""

import json
from dataclasses import replace

import pytest
from plans import LLAMA, MACHINES, SMALL, cluster_of, config_of, shapes_file
from small_teachers import NUM_SENSES, write_job

from dskd.artifacts.building import build_artifact
from dskd.config.reading import load_config
from dskd.corpus.written.write import recipe
from dskd.models.files.folder import find_teacher
from dskd.plan import GB
from dskd.plan.architecture import Architecture
from dskd.plan.shapes import teacher_shapes
from dskd.plan.writing import plan_writing

WRITES = ("corpus.source=teacher", "corpus.max_senses=1000", "corpus.max_new_tokens=20", "precision=fp32")
# Of the toy Llama: 4 layers of width 32, 4 heads of which 2 for keys and values, MLPs of 48, 120 tokens, not tied.
MATRICES = 4 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48)
NUMEL = MATRICES + 2 * 120 * 32 + (4 * 2 + 1) * 32
CACHE = 2 * 16 * 4 * 4  # bytes of the keys and values of a token, in all layers
FLOPS = 2 * MATRICES + 4 * 4 * (100 / 2) * 32 + 2 * 32 * 120  # of a token with 100 around it: 80 of a prompt, 20 new


def _plan(tmp_path, *overrides, ranks=1, device="cuda", **rates):
    architecture = Architecture(json.dumps(LLAMA), "llama")
    cluster = replace(cluster_of(ranks, device), **{"flops": 1e15, "memory_bandwidth": 1e9, **rates})
    return plan_writing(config_of(tmp_path, *WRITES, *overrides), cluster, architecture, teacher_shapes(architecture))


def test_a_job_with_text_of_its_own_has_no_plan_of_writing(tmp_path):
    architecture = Architecture(json.dumps(LLAMA), "llama")
    assert plan_writing(config_of(tmp_path), cluster_of(), architecture, teacher_shapes(architecture)) is None


def test_a_small_batch_is_limited_by_reading_the_weights(tmp_path):
    writing = _plan(tmp_path, "corpus.batch_size=8")
    seconds = (NUMEL * 4 + 8 * CACHE * (80 + 10)) / 1e9
    prompt = 8 * 80 * FLOPS / 1e15
    assert writing.tokens_per_s == pytest.approx(8 * 20 / (20 * seconds + prompt))
    assert (writing.texts, writing.tokens, writing.is_done) == (1000, 20_000, False)
    assert writing.hours == pytest.approx(20_000 / writing.tokens_per_s / 3600)
    assert writing.flops_per_token == pytest.approx(FLOPS * 100 / 20)
    assert "larger corpus.batch_size" in writing.limit
    assert writing.memory == NUMEL * 4 + 8 * (CACHE * 100 + 24 * 120) + 2 * GB


def test_a_large_batch_is_limited_by_computation_and_ranks_share_the_work(tmp_path):
    one = _plan(tmp_path, "corpus.batch_size=64", flops=1e9, memory_bandwidth=1e15)
    assert one.limit == "computation"
    assert one.tokens_per_s == pytest.approx(1e9 / FLOPS / 5)  # four tokens of a prompt for each that is written
    two = _plan(tmp_path, "corpus.batch_size=64", ranks=2, flops=1e9, memory_bandwidth=1e15)
    assert two.tokens_per_s == pytest.approx(2 * one.tokens_per_s)


def test_a_sharded_teacher_is_gathered_for_every_token(tmp_path):
    sharded = _plan(tmp_path, "teacher.mode=zero3", "corpus.batch_size=8", ranks=2, memory_bandwidth=1e15)
    assert "gathering the sharded teacher" in sharded.limit
    seconds = NUMEL * 4 / 2 / (40 * GB)
    assert sharded.tokens_per_s == pytest.approx(2 * 8 * 20 / (20 * seconds + 8 * 80 * FLOPS / 1e15))
    assert "gathering" not in _plan(tmp_path, ranks=2, memory_bandwidth=1e15).limit  # it fits, so it is whole


def test_the_plan_has_a_table_of_writing(tmp_path, dskd):
    path = tmp_path / "config.yaml"
    config_of(tmp_path)
    arguments = ["--config", path, "--teacher-config", shapes_file(tmp_path), *MACHINES, *SMALL, "--samples", 1000]
    _, out, _ = dskd("plan", *arguments, *WRITES)
    assert "the teacher writes the text" in out
    assert "tokens to write, at most" in out
    assert "20,000" in out
    _, out, _ = dskd("plan", *arguments, "corpus.source=teacher")
    assert "unknown: set corpus.max_senses, as nobody/nothing has no tokenizer on this machine" in out
    _, out, _ = dskd("plan", *arguments, *WRITES, "corpus.server=http://localhost:1")
    assert "unknown: those of corpus.server" in out
    assert "memory of a GPU" not in out
    _, out, _ = dskd("plan", *arguments)
    assert "the teacher writes" not in out


def test_texts_that_are_written_are_counted(tmp_path):
    config = load_config(write_job(tmp_path, max_senses=5))
    with build_artifact(config.path("written"), recipe(config, find_teacher(config))) as building:
        building.facts["texts"] = 40
    architecture = Architecture(json.dumps(LLAMA), "llama")
    writing = plan_writing(config, cluster_of(), architecture, teacher_shapes(architecture))
    assert (writing.is_done, writing.texts) == (True, 40)
    other = config.model_copy(update={"corpus": config.corpus.model_copy(update={"max_senses": 7})})
    writing = plan_writing(other, cluster_of(), architecture, teacher_shapes(architecture))
    assert (writing.is_done, writing.texts) == (False, 7 * 8)


def test_all_senses_are_counted_if_the_tokenizer_and_wordnet_are_here(tmp_path):
    config = load_config(write_job(tmp_path, texts_per_sense=3))
    shapes = json.loads((tmp_path / "teacher" / "config.json").read_text())
    architecture = Architecture(json.dumps(shapes), "llama")
    writing = plan_writing(config, cluster_of(), architecture, teacher_shapes(architecture))
    assert (writing.texts, writing.tokens, writing.missing) == (3 * NUM_SENSES, 3 * NUM_SENSES * 20, "")
    no_wordnet = config.model_copy(update={"wordnet": config.wordnet.model_copy(update={"path": str(tmp_path)})})
    writing = plan_writing(no_wordnet, cluster_of(), architecture, teacher_shapes(architecture))
    assert writing.texts is None
    assert "or correct this: wordnet.path: " in writing.missing
