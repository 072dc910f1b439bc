"""Tests that each device computes what the CPU does. Only these and tests/gpu use GPUs (conftest.py says why).

Tests over `DEVICES` run everywhere, on a GPU too where there is one. The others need a GPU: on the CPU they would
compare a number with itself, and another test asks more, which each of them names.
"""

import json
import shutil

import numpy as np
import pytest
import torch
from artifact_folders import open_dataset
from gpus import CPU, DEVICES, GPU, launch, needs_gpu
from layer_angles import plain_angles
from tiny_models import save_model
from tiny_work import BEFORE_TRAINING
from tracked_results import losses_of
from transformers import AutoModelForCausalLM

from dskd.artifacts import kinds
from dskd.config import LossConfig
from dskd.config.reading import load_config
from dskd.losses.head import DistillationHead, Normalizers
from dskd.losses.terms import SUMS
from dskd.models.running.frozen import Decoder
from dskd.models.structure.base_model import base_model
from dskd.senses.kmeans import kmeans
from dskd.students.importance import Text, measure_blocks
from dskd.training.train import train

pytestmark = pytest.mark.slow
OFFLOADED = ["teacher.mode=zero3", "teacher.offload=cpu"]
RESIDENT = ["teacher.mode=resident"]
WITHOUT_TRUNK = ["student.shared_trunk='off'", "train.activation_checkpointing=true"]
FUSED = ["train.compile_losses=true"]
BANK = ["train.sense_bank=device"]
BF16 = ["precision=bf16"]


def _values(config, term):
    return [value for _, value in losses_of(config, f"train/{term}")]


@pytest.mark.parametrize(
    ("device", "overrides", "tolerance"),
    [
        # On the CPU, in test_training.py: test_one_rank_equals_two; without a trunk and with recomputed activations,
        # test_what_saves_work_or_memory_changes_neither_the_losses_nor_the_export.
        pytest.param("cuda", [], 5e-4, marks=needs_gpu),
        pytest.param("cuda", OFFLOADED, 5e-4, marks=needs_gpu),
        pytest.param("cuda", RESIDENT, 5e-4, marks=needs_gpu),
        pytest.param("cuda", WITHOUT_TRUNK, 5e-4, marks=needs_gpu),
        pytest.param("cuda", FUSED, 5e-4, marks=needs_gpu),
        pytest.param("cuda", BANK, 5e-4, marks=needs_gpu),
        pytest.param("cuda", BF16, 2e-2, marks=needs_gpu),
        ("cpu", BF16, 2e-2),
    ],
)
def test_training_on_one_rank_has_the_losses_of_two_on_the_cpu(
    tiny, copy_of_tiny, world, capsys, device, overrides, tolerance
):
    config = copy_of_tiny(*BEFORE_TRAINING)
    if device == "cpu":  # in this process, since importing takes longer than training
        train(load_config(config, [*overrides, "train.num_workers=0"]), world)
        printed = capsys.readouterr().err
    else:
        printed = launch("train.py", config, *overrides)
    assert f"1 rank on {device}" in printed
    for term in ("loss", "ce", "kl", "sense_synonym", "sense_own"):
        # A small divergence is a difference of two large numbers, which are the ones that are rounded.
        expected = pytest.approx(_values(tiny, term), rel=tolerance, abs=1e-2 * tolerance)
        assert _values(config, term) == expected, term


@needs_gpu
def test_a_resumed_run_has_the_losses_of_one_that_was_not_stopped(copy_of_tiny):
    """On the CPU they are the same bits (distributed/test_stopping.py)."""
    config = copy_of_tiny(*BEFORE_TRAINING)
    launch("train.py", config)
    undisturbed = losses_of(config)
    base = kinds.checkpoint_folder(load_config(config))
    shutil.rmtree(base / "step-00000006")
    launch("train.py", config, "--resume")
    (_, again), (_, once) = zip(*losses_of(config)[-3:], strict=True), zip(*undisturbed[-3:], strict=True)
    assert again == pytest.approx(once, rel=1e-6)


@needs_gpu
def test_annotation_names_the_rows_that_the_cpu_names(tiny, copy_of_tiny, tmp_path):
    """On the CPU: test_stages.py::test_every_row_of_the_annotation_is_what_brute_force_finds."""
    config = copy_of_tiny(*(artifact for artifact in BEFORE_TRAINING if artifact not in {"shards", "student"}))
    launch("annotate.py", config)
    folders = [load_config(path).path(kinds.SHARDS.folder, "train") for path in (config, tiny)]
    ours, theirs = (open_dataset(folder, tmp_path / str(i)) for i, folder in enumerate(folders))
    assert len(ours) == len(theirs)
    same = {name: [] for name in ours[0] if not name.startswith("teacher_")}
    for one, other in zip(ours, theirs, strict=True):
        for name, values in same.items():
            values.append(np.mean(np.atleast_1d(one[name] == other[name])))
    # Sums in another order: of two senses that are as near the other may be named.
    assert min(np.mean(values) for values in same.values()) > 0.999


@needs_gpu
def test_evaluation_measures_what_the_cpu_measures(tiny, copy_of_tiny):
    """On the CPU: test_stages.py::test_measures_are_those_of_a_plain_evaluation."""
    config = copy_of_tiny(*BEFORE_TRAINING, "checkpoints", "export")
    launch("evaluate.py", config)
    for model in ("teacher", "dskd"):
        ours, theirs = (
            json.loads(load_config(path).path("evaluation", model, "measures.json").read_text())
            for path in (config, tiny)
        )
        for name in ("perplexity", "accuracy", "sense_alignment"):
            assert ours[name] == pytest.approx(theirs[name], rel=5e-3), (model, name)


@pytest.mark.parametrize("form", ["distance", "distribution"])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jensen_shannon"])
@pytest.mark.parametrize("device", DEVICES)
def test_losses_and_gradients_in_chunks_are_those_of_the_cpu_in_float64(form, divergence, device):
    batch, length, hidden_size, vocab_size, rows = 4, 64, 48, 999, 300
    generator = torch.Generator().manual_seed(1)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    def index(*shape, low=-1, high=rows):
        return torch.randint(low, high, shape, generator=generator)

    positions = torch.randperm(batch * length, generator=generator)
    weight, teacher_weight = random(vocab_size, hidden_size), random(vocab_size, hidden_size)
    case = {
        "labels": index(batch, length, low=0, high=vocab_size),
        "loss_mask": index(batch, length, low=0, high=3) > 0,
        "teacher_hidden": random(batch, length, hidden_size),
    }
    sense_rows = random(rows, hidden_size)
    if form == "distance":
        related = {"relation_positions": positions[:50], "own_positions": positions[50:100]}
        named = {f"{kind}_rows": index(50, 5) for kind in ("synonym", "antonym", "own")}
        for indices in named.values():
            indices[:, 0].clamp_(min=0)
        senses = {"sense_rows": sense_rows, **related, **named}
    else:
        candidates = {"candidate_rows": index(50, 5), "random_rows": torch.arange(20)}
        senses = {"sense_rows": sense_rows, "positions": positions[:50], **candidates}
    loss = LossConfig(divergence=divergence, sense_form=form, hidden_weight=0.5)
    hidden = random(batch, length, hidden_size)

    def run(device, dtype, chunk_size):
        def there(value):
            return value.detach().to(device, dtype) if value.is_floating_point() else value.to(device)

        def all_there(values):
            return {name: there(value) for name, value in values.items()}

        head = DistillationHead(torch.nn.Parameter(there(weight)), there(teacher_weight), loss, chunk_size=chunk_size)
        states = there(hidden).clone().requires_grad_()
        total, sums = head(
            states, normalizers=Normalizers(targets=1 / 170, senses=1 / 50), senses=all_there(senses), **all_there(case)
        )
        total.backward()
        return {"total": total, "gradient": states.grad, **dict(zip(SUMS, sums, strict=True))}

    ours, exact = run(torch.device(device), torch.float32, 37), run(CPU, torch.float64, batch * length)
    for name, value in exact.items():
        torch.testing.assert_close(
            ours[name].cpu().double(), value.double(), rtol=2e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
        )


@needs_gpu
def test_k_means_is_as_good_as_on_the_cpu():
    """On the CPU: test_kmeans.py::test_inertia_is_close_to_that_of_scikit_learn."""
    generator = torch.Generator().manual_seed(0)
    centers = 5 * torch.randn(60, 6, 1, 32, generator=generator)
    points = (centers + torch.randn(60, 6, 20, 32, generator=generator)).reshape(60, 120, 32)
    weights = torch.ones(60, 120)
    ours, theirs = (
        kmeans(points.to(device), weights.to(device), 4, seed=3, keys=torch.arange(60, device=device)).inertia.cpu()
        for device in (GPU, CPU)
    )
    assert (ours / theirs).median().item() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("device", DEVICES)
def test_layers_turn_states_by_the_angles_that_transformers_computes_on_the_cpu(tmp_path, device):
    save_model(tmp_path)
    ids = (torch.arange(60) * 13 % 117).view(3, 20)
    decoder = Decoder(base_model(AutoModelForCausalLM.from_pretrained(tmp_path).to(device)))
    text = Text(ids, None, torch.ones_like(ids, dtype=torch.bool))
    measured = measure_blocks(decoder, [text], 2, torch.device(device))
    for found, size in ((measured.layers, 1), (measured.blocks, 2)):
        assert found == pytest.approx(plain_angles(tmp_path, list(ids), size)[0].tolist(), rel=1e-4)
