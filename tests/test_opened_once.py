"""A stage opens each model once: reading a tokenizer takes seconds for a large vocabulary."""

import functools
import shutil
from collections import Counter
from pathlib import Path

import pytest
from tiny_work import BEFORE_TRAINING
from transformers import AutoTokenizer

from dskd.config.reading import load_config
from dskd.evaluation.held_out_text import evaluate
from dskd.inspection.examples import describe_examples
from dskd.models.files.folder import find_teacher
from dskd.pipeline import plan_stages
from dskd.training.exporting.export import build_export
from dskd.training.train import train

TRAINED = (*BEFORE_TRAINING, "checkpoints", "export", "evaluation")
UNTRACKED = ["tracking.enabled=false"]


@pytest.fixture
def loaded(monkeypatch):
    """Counts how often the tokenizer of each folder is loaded."""
    counts, load = Counter(), AutoTokenizer.from_pretrained

    def counted(folder, **options):
        counts[Path(folder).name] += 1
        return load(folder, **options)

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", counted)
    return counts


def test_the_checks_of_the_pipeline_load_the_teachers_tokenizer_once(copy_of_tiny, loaded):
    path = copy_of_tiny(*TRAINED)
    config = load_config(path)
    stages = plan_stages(config, path, [], functools.cache(lambda: find_teacher(config)))
    assert all(stage.is_current() for stage in stages)
    assert loaded == {"teacher": 1}


def test_the_examples_at_the_end_of_the_pipeline_load_it_once(tiny, loaded):
    assert "senses" in describe_examples(load_config(tiny))
    assert loaded == {"teacher": 1}


def test_training_loads_each_tokenizer_once(copy_of_tiny, world, loaded):
    train(load_config(copy_of_tiny(*BEFORE_TRAINING), [*UNTRACKED, "train.steps=1"]), world)
    assert loaded["teacher"] == 1
    assert set(loaded.values()) == {1}


def test_an_export_loads_each_tokenizer_once(copy_of_tiny, loaded):
    config = load_config(copy_of_tiny(*TRAINED), UNTRACKED)
    shutil.rmtree(config.path("export"))
    build_export(config)
    assert loaded["student"] == 1
    assert set(loaded.values()) == {1}


def test_an_evaluation_loads_each_tokenizer_once(copy_of_tiny, world, loaded):
    evaluate(load_config(copy_of_tiny(*TRAINED), UNTRACKED), world, force=True)
    assert loaded["teacher"] == 1
    assert set(loaded.values()) == {1}
