"""Results that were published when the process was killed, before MLflow had them."""

import pytest
from tiny_work import BEFORE_TRAINING, RESIDENT

from dskd.config.reading import load_config
from dskd.evaluation import held_out_text, suite
from dskd.evaluation.held_out_text import evaluate
from dskd.tracking import read_history
from dskd.training.checkpoints import checkpoint
from dskd.training.exporting import export
from dskd.training.train import train

pytestmark = pytest.mark.slow


class _KilledError(BaseException):
    """An end of the process at once."""


def _kill(*_arguments, **_options):
    raise _KilledError


def test_an_evaluation_killed_before_mlflow_has_it_is_logged_by_the_next_call(copy_of_tiny, world, monkeypatch, capsys):
    config = load_config(copy_of_tiny(*BEFORE_TRAINING, teacher=RESIDENT))
    train(config, world)
    export.build_export(config)
    with monkeypatch.context() as killed:
        killed.setattr(suite, "log_results", _kill)
        with pytest.raises(_KilledError):
            evaluate(config, world)
    examples = config.path("evaluation", "dskd", "examples.parquet")
    written = examples.stat()
    run_id = export.find_export(config, "dskd")[1].facts["mlflow_run_id"]
    assert read_history(config, run_id, "eval/perplexity") == []
    assert not held_out_text.are_current(config)
    evaluate(config, world)
    assert examples.stat().st_ino == written.st_ino  # it was not measured again
    assert len(read_history(config, run_id, "eval/perplexity")) == 1
    assert "left by an interrupted process" in capsys.readouterr().err
    assert held_out_text.are_current(config)
    evaluate(config, world)
    assert "interrupted process" not in capsys.readouterr().err


def test_a_model_killed_before_mlflow_has_it_is_uploaded_by_the_next_call(copy_of_tiny, world, monkeypatch):
    config = load_config(copy_of_tiny(*BEFORE_TRAINING, teacher=RESIDENT, tracking={"log_model": True}))
    train(config, world)
    with monkeypatch.context() as killed:
        killed.setattr(export, "log_export", _kill)
        with pytest.raises(_KilledError):
            export.build_export(config)
    newest = checkpoint.latest(config)
    assert newest is not None
    assert config.path("export", "dskd", "manifest.json").is_file()
    assert not export.is_exported(config, newest)
    uploaded = []
    monkeypatch.setattr(export, "log_export", lambda *arguments: uploaded.append(arguments))
    export.build_export(config)
    assert len(uploaded) == 1
    assert export.is_exported(config, newest)
