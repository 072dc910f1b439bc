"""Stages and ways to train on a GPU that test_gpu.py has not, against the CPU."""

import json
import os
import re
import shutil

import pytest
import torch
import yaml
from gpus import launch, needs_gpu, needs_two_gpus, run_on_gpu
from safetensors.torch import load_file
from tiny_work import BEFORE_TRAINING, NO_RUNS, copy_work
from tracked_results import losses_of

from benchmarks.flops import Shape
from benchmarks.report import parse_result
from benchmarks.workload import Preset, write_work_directory
from dskd.artifacts import kinds
from dskd.config.reading import load_config
from dskd.senses.dictionary import load_dictionary
from dskd.tracking import read_runs
from dskd.training.train import train

pytestmark = [pytest.mark.slow, needs_gpu]
TERMS = ("loss", "ce", "kl", "sense")
DISTRIBUTION = ["loss.sense_form=distribution"]
CACHED = ["teacher.mode=cached"]  # of the most probable tokens, of which the shards have four a position


def _values(config, term):
    return [value for _, value in losses_of(config, f"train/{term}")]


def _require_same_losses(config, expected, tolerance=5e-4):
    for term in TERMS:
        found, other = _values(config, term), _values(expected, term)
        assert found == pytest.approx(other, rel=tolerance, abs=1e-2 * tolerance), term


@pytest.mark.parametrize("overrides", [DISTRIBUTION, CACHED], ids=["distribution", "cached"])
def test_other_losses_are_those_of_the_cpu(tiny, tmp_path, world, overrides):
    """On the CPU: losses/test_sense_losses.py, training/test_training.py."""
    on_cpu, on_gpu = (copy_work(tiny, tmp_path / device, *BEFORE_TRAINING) for device in ("host", "device"))
    train(load_config(on_cpu, [*overrides, "train.num_workers=0"]), world)
    launch("train.py", on_gpu, *overrides)
    _require_same_losses(on_gpu, on_cpu)


def test_states_that_a_gpu_stores_give_the_losses_of_a_teacher_on_the_cpu(tiny, tmp_path):
    """On the CPU: training/test_stored_states.py."""
    annotation = yaml.safe_load(tiny.read_text())["annotation"]
    stores = {"teacher_top_n": 0, "store": ["teacher_states", "trunk_states"]}
    artifacts = (artifact for artifact in BEFORE_TRAINING if artifact != "shards")
    config = copy_work(tiny, tmp_path, *artifacts, annotation=annotation | stores)
    launch("annotate.py", config)
    printed = launch("train.py", config)
    assert "1 rank on cuda" in printed and "no teacher" in printed.lower()
    _require_same_losses(config, tiny)


def test_a_run_that_two_ranks_began_on_the_cpu_continues_on_a_gpu(tiny, copy_of_tiny):
    """On the CPU: training/checkpoints/test_checkpoint.py::test_a_run_resumes_on_any_number_of_ranks."""
    config = copy_of_tiny(*BEFORE_TRAINING, "checkpoints")
    shutil.rmtree(kinds.checkpoint_folder(load_config(config)) / "step-00000006")
    printed = launch("train.py", config, "--resume")
    assert "into one for any number of ranks" in printed
    (run,) = [run for run in read_runs(load_config(config)) if run.name == "dskd"]
    assert run.tags["device"] == "cuda"
    for term in TERMS:
        assert _values(config, term) == pytest.approx(_values(tiny, term)[3:], rel=5e-4, abs=5e-6), term


def test_the_sense_dictionary_is_that_of_the_cpu(tiny, copy_of_tiny):
    """On the CPU: senses/test_senses.py."""
    config = copy_of_tiny("corpus", "lexicon", "teacher", "sequences")
    launch("build_senses.py", config)
    ours, theirs = (load_dictionary(load_config(path))[0] for path in (config, tiny))
    assert torch.equal(ours.entry_offsets, theirs.entry_offsets)
    files = [load_config(path).path(kinds.SENSES.folder, "senses.safetensors") for path in (config, tiny)]
    (found, expected) = map(load_file, files)
    # The states are sampled by their tokens and places, so the same ones are clustered; at equal distances a state may
    # fall into another cluster.
    same = (found["vectors"].float() - expected["vectors"].float()).norm(dim=1) < 1e-2 * expected["vectors"].norm(dim=1)
    assert same.float().mean() > 0.95
    assert (found["counts"] == expected["counts"]).float().mean() > 0.95


def test_the_pipeline_makes_everything_on_a_gpu(tiny, tmp_path):
    """On the CPU: test_pipeline.py. Another teacher is trained here, in other rounding, so figures are only similar."""
    config = copy_work(tiny, tmp_path, NO_RUNS)
    run_on_gpu("launcher/pipeline.py", "--config", str(config), timeout_s=600)
    measures = [
        {
            model: json.loads(load_config(path).path("evaluation", model, "measures.json").read_text())
            for model in ("teacher", "dskd")
        }
        for path in (config, tiny)
    ]
    for model in ("teacher", "dskd"):
        found, expected = (of_path[model]["perplexity"] for of_path in measures)
        assert found == pytest.approx(expected, rel=0.1), model
    (run,) = [run for run in read_runs(load_config(config)) if run.name == "dskd"]
    assert run.tags["device"] == "cuda"


def test_preflight_names_the_gpu(copy_of_tiny):
    """On the CPU: plan/test_preflight.py."""
    printed = run_on_gpu("-m", "dskd", "preflight", "--config", str(copy_of_tiny()))
    assert torch.cuda.get_device_name(0) in printed and "all checks passed" in printed


def test_planned_memory_is_within_a_tenth_of_what_training_allocates(tmp_path):
    """On the CPU: plan/test_memory.py::test_memory_is_within_a_tenth_of_what_training_allocates."""
    shape = Shape(4096, 512, 1536, 8, 2, teacher_layers=4, student_layers=3, trained_layers=2, sequence_length=64)
    write_work_directory(tmp_path, Preset(shape, global_batch_size=8, micro_batch_size=4), steps=15)
    settings = ["teacher.mode=resident", "precision=bf16", "train.global_batch_size=4"]
    command = ["-m", "benchmarks.plan_memory", "--child", str(tmp_path / "config.yaml"), *settings]
    # The libraries' own workspaces, 32 MB each on large GPUs, would be much for so small a model. The plan has them in
    # `reserved`.
    small_workspaces = {"CUBLAS_WORKSPACE_CONFIG": ":16:8", "CUBLASLT_WORKSPACE_SIZE": "128"}
    (measured,) = parse_result(command, 0, run_on_gpu(*command, **small_workspaces))
    program = (
        "import sys; from pathlib import Path; from benchmarks.plan_memory import plan_bytes\n"
        "print(plan_bytes(Path(sys.argv[1]), 1, sys.argv[2:]))"
    )
    planned = int(run_on_gpu("-c", program, str(tmp_path / "config.yaml"), *settings).split()[-1])
    assert planned == pytest.approx(measured, rel=0.1)


@pytest.mark.skipif(
    "DSKD_TEST_NVME" not in os.environ, reason="DeepSpeed's async_io compiles for minutes: DSKD_TEST_NVME=1"
)
def test_a_teacher_on_a_local_disk_gives_the_losses_of_the_cpu(tiny, copy_of_tiny, tmp_path):
    """On the CPU: models/running/test_nvme.py."""
    (tmp_path / "disk").mkdir()
    config = copy_of_tiny(*BEFORE_TRAINING)
    launch("train.py", config, "teacher.mode=zero3", "teacher.offload=nvme", f"teacher.nvme_path={tmp_path / 'disk'}")
    _require_same_losses(config, tiny)


@needs_two_gpus
def test_two_gpus_have_the_losses_of_two_ranks_on_the_cpu(tiny, copy_of_tiny):
    """On the CPU, with gloo: test_training.py::test_one_rank_equals_two."""
    config = copy_of_tiny(*BEFORE_TRAINING)
    assert re.search("2 ranks on cuda", launch("train.py", config, gpus=2))
    _require_same_losses(config, tiny)
