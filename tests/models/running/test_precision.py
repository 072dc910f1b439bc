"""The number format that models run in, and that recipes name."""

import pytest
import torch

from dskd.artifacts.manifest import read_manifest
from dskd.config.reading import load_config
from dskd.errors import UserError
from dskd.evaluation import held_out_text, tasks
from dskd.evaluation.lexical.run import recipe as lexical_recipe
from dskd.evaluation.models import candidates
from dskd.models.files.folder import find_teacher
from dskd.models.running import precision
from dskd.models.running.precision import compute_dtype, resolve_precision
from dskd.senses import build as senses
from dskd.shards import recipe as shards
from dskd.training import inputs, teacher_from_scratch, train


def test_auto_is_the_format_that_the_machine_supports(monkeypatch):
    for has, name, dtype in ((True, "bf16", torch.bfloat16), (False, "fp32", torch.float32)):
        monkeypatch.setattr(precision, "supports_bf16", lambda _, has=has: has)
        assert resolve_precision("auto") == name
        assert compute_dtype("auto", torch.device("cpu")) == dtype
        assert [resolve_precision(precision) for precision in ("bf16", "fp32")] == ["bf16", "fp32"]


def _recipes(config):
    teacher = find_teacher(config)
    candidate = candidates(config)[0]
    measured_with = held_out_text.open_inputs(config, teacher)
    corpus = read_manifest(config.path("corpus"), "corpus", made_by="")  # a manifest of any kind will do

    class Task:
        name, digest = "task", ""
        benchmark = type("Benchmark", (), {"new_tokens": staticmethod(lambda _: 1)})

    return {
        "teacher": teacher_from_scratch.recipe(config),
        "states": senses.states_recipe(config, senses.open_inputs(config, teacher)),
        "senses": senses.recipe(config, senses.open_inputs(config, teacher)),
        "shards": shards.recipe(config, "train", shards.open_inputs(config, teacher)),
        "checkpoint": inputs.recipe(config),
        "evaluation": held_out_text.recipe(config, candidate, measured_with),
        "task": tasks.recipe(config, candidate, Task, type("Prompter", (), {"format": {}})),
        "lexical": lexical_recipe(config, candidate, measured_with, corpus),
    }


@pytest.mark.slow
def test_recipes_name_the_format_that_auto_is_on_this_machine(copy_of_tiny, monkeypatch):
    """An artifact that was begun in bf16 must not be continued in fp32, nor the other way round."""
    path = copy_of_tiny("corpus", "lexicon", "teacher", "sequences", "senses", "shards", "student")
    explicit = {name: _recipes(load_config(path, [f"precision={name}"])) for name in ("bf16", "fp32")}
    for kind in explicit["bf16"]:
        assert explicit["bf16"][kind] != explicit["fp32"][kind]
    for has, name in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(precision, "supports_bf16", lambda _, has=has: has)
        assert _recipes(load_config(path, ["precision=auto"])) == explicit[name]


@pytest.mark.slow
def test_a_run_that_was_begun_in_another_format_is_refused_with_the_key_to_set(copy_of_tiny, world, monkeypatch):
    path = copy_of_tiny("corpus", "lexicon", "teacher", "sequences", "senses", "shards", "student", "checkpoints")
    monkeypatch.setattr(precision, "supports_bf16", lambda _: True)
    with pytest.raises(UserError, match=r"auto is bf16 on this machine; set it to fp32 to continue as before"):
        train.train(load_config(path, ["precision=auto"]), world, resume=True)
