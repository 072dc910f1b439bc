"""The map from the states of a student of another width to the teacher's: its fit, and runs that train it."""

import contextlib
import io
import shutil

import numpy as np
import pytest
import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from plain_reading import run_apart
from plain_training import PlainTraining
from rank_processes import ONE_RANK, run_program
from safetensors.torch import load_file
from tiny_work import BEFORE_TRAINING, RESIDENT, TINY, copy_work
from torch.nn import functional as F
from tracked_results import losses_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from dskd import shards
from dskd.artifacts import kinds
from dskd.config.reading import load_config
from dskd.errors import UserError
from dskd.shards.annotate import annotate
from dskd.students.student import build_student
from dskd.training.checkpoints import checkpoint
from dskd.training.exporting.export import build_export
from dskd.training.inputs import load_inputs
from dskd.training.models.width_map import StateSums
from dskd.training.train import train

WIDTH, TEACHER_WIDTH = 48, TINY["teacher"]["train_from_scratch"]["hidden_size"]
LOSS = {**TINY["loss"], "hidden_weight": 2.0}
# On one rank two micro-batches a step: with a small model, each takes as long as a larger one would.
SETTINGS = {**TINY["train"], "steps": 4, "checkpoint_every": 2, "micro_batch_size": 4, "num_workers": 0}
R_SQUARED = "width_map/r_squared"
TERMS = ("loss", "ce", "kl", "sense", "hidden", "grad_norm")


@pytest.mark.parametrize("rank", [5, 3])
def test_the_fit_is_the_least_squares_solution(rank):
    """With fewer dimensions than the width there are many solutions, of which it is the smallest, as numpy's is."""
    random = np.random.default_rng(0)
    states = random.normal(size=(40, rank)) @ random.normal(size=(rank, 5))
    targets = states @ random.normal(size=(5, 7)) + random.normal(size=(40, 7)) + 3
    sums = StateSums.zeros(5, 7, torch.device("cpu"))
    for part in (slice(0, 15), slice(15, 40)):
        sums.add(torch.tensor(states[part]), torch.tensor(targets[part]))
    weight, r_squared = sums.solve()
    expected, _, found_rank, _ = np.linalg.lstsq(states, targets, rcond=1e-8)
    assert found_rank == rank
    np.testing.assert_allclose(weight.numpy().T, expected, rtol=1e-4, atol=1e-5)
    residual = ((targets - states @ expected) ** 2).sum() / ((targets - targets.mean(0)) ** 2).sum()
    assert r_squared == pytest.approx(1 - residual, rel=1e-8)


def test_a_teacher_without_variance_has_nothing_to_explain():
    sums = StateSums.zeros(5, 7, torch.device("cpu"))
    states = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
    sums.add(states, torch.linspace(0.1, 3.3, 7).expand(40, 7))
    weight, r_squared = sums.solve()
    assert r_squared == 0 and weight.isfinite().all()
    sums = StateSums.zeros(5, 7, torch.device("cpu"))
    sums.add(states, torch.zeros(40, 7))
    assert sums.solve()[1] == 0


def test_a_fit_needs_positions():
    with pytest.raises(UserError, match="no position of the first training sequences counts in the loss"):
        StateSums.zeros(5, 7, torch.device("cpu")).solve()


def _work(tiny, folder, **changes):
    """Writes a config in `folder`, with a work directory up to training, whose student is narrower than the teacher."""
    student = {"from_config": {"layers": 2, "hidden_size": WIDTH, "heads": 4}}
    kept = (name for name in BEFORE_TRAINING if name != "student")
    settings = {"teacher": RESIDENT, "loss": LOSS, "student": student, "train": SETTINGS}
    path = copy_work(tiny, folder, *kept, **{**settings, **changes})
    build_student(load_config(path))
    return path


@pytest.fixture(scope="module")
def narrow(tiny, world, tmp_path_factory):
    """The config of a run with all terms and such a student, which one rank trained."""
    path = _work(tiny, tmp_path_factory.mktemp("narrow"))
    train(load_config(path), world)
    return path


def _map_of(config):
    """Returns the map in the newest checkpoint of a run, [D', D], as DeepSpeed reads it."""
    newest = checkpoint.latest(config).path
    with contextlib.redirect_stdout(io.StringIO()):
        weights = get_fp32_state_dict_from_zero_checkpoint(newest.parent, newest.name)
    return weights["width_map.weight"].view(TEACHER_WIDTH, WIDTH)


@pytest.mark.slow
def test_training_with_a_map_is_what_a_plain_loop_does(narrow, world, tmp_path, capsys):
    """The map starts from numpy's solution over all training text, and torch's AdamW trains it with the student."""
    settings = ["train.steps=3", "train.warmup_share=0", "train.gradient_clipping=0.5", "run=plain"]
    config = load_config(narrow, ["loss.sense_weight=0", "loss.kd_weight=0", *settings])
    train(config, world)
    printed = capsys.readouterr().err

    manifest = shards.load_manifest(config, "train")
    teacher = AutoModelForCausalLM.from_pretrained(config.path("teacher"), dtype=torch.float32)
    student = AutoModelForCausalLM.from_pretrained(config.path("student"), dtype=torch.float32)
    end = AutoTokenizer.from_pretrained(config.path("teacher")).eos_token_id
    dataset = shards.open_shards(config, "train", tmp_path / "all", ONE_RANK, batch_size=1)
    everything = torch.tensor(np.stack([dataset[i]["input_ids"] for i in range(manifest.facts["samples"])])).long()
    with torch.no_grad():
        (_, x, has_target), (_, y, _) = (run_apart(model, everything, end) for model in (student, teacher))
        x, y = x[has_target].double().numpy(), y[has_target].double().numpy()
    fit = np.linalg.lstsq(x, y, rcond=None)[0]
    r_squared = 1 - ((y - x @ fit) ** 2).sum() / ((y - y.mean(0)) ** 2).sum()
    assert losses_of(narrow, R_SQUARED, "run=plain") == [(0, pytest.approx(r_squared, rel=1e-4))]
    line = f"fit over {len(everything)} sequences ({len(x):,} positions) has R² {r_squared:.4f}"
    assert f"states of width {WIDTH} are mapped to the teacher's {TEACHER_WIDTH}: the least-squares {line}" in printed

    width_map = torch.nn.Parameter(torch.tensor(fit.T, dtype=torch.float32))
    parameters = [*student.parameters(), width_map]
    plain = PlainTraining(config, tmp_path / "cache", student=student, teacher=teacher, end=end, parameters=parameters)
    expected = []
    for step in plain.steps():
        mapped = step.states[step.has_target] @ width_map.T
        total = step.ce().mean() + 2.0 * F.mse_loss(mapped, step.teacher_states[step.has_target])
        plain.minimise(total)
        expected.append(total.item())
    assert [loss for _, loss in losses_of(narrow, "train/loss", "run=plain")] == pytest.approx(expected, rel=1e-4)
    trained = load_file(checkpoint.latest(config).path / checkpoint.TRAINED_FILE)
    for name, tensor in trained.items():
        torch.testing.assert_close(tensor, student.get_parameter(name).data, rtol=1e-3, atol=2e-5)
    found = _map_of(config)
    torch.testing.assert_close(found, width_map.data, rtol=1e-3, atol=5e-5)
    assert (found - torch.tensor(fit.T)).abs().max() > 1e-3  # it was trained


@pytest.mark.slow
@pytest.mark.parametrize(("rate", "warns"), [("1e-3", True), ("1e-5", False)])
def test_a_first_step_that_is_too_large_for_a_low_fit_is_announced(narrow, world, capsys, rate, warns):
    run = f"run=rate-{rate}"
    train(load_config(narrow, [f"train.learning_rate={rate}", "train.warmup_share=0", "train.steps=1", run]), world)
    printed = " ".join(capsys.readouterr().err.split())
    ((_, r_squared),) = losses_of(narrow, R_SQUARED, run)
    assert r_squared < 0.5
    message = "warning: the first step has the learning rate 1.0e-03, which can change all states of a student"
    assert (message in printed) == warns
    assert ("so that the first step has 2e-05 or less" in printed) == warns


@pytest.mark.slow
def test_a_run_with_a_map_resumes_as_if_it_had_not_been_stopped(narrow, tmp_path, world, capsys):
    """On one rank bit for bit, on two, which convert the checkpoint, to rounding. The map is not fitted again."""
    undisturbed = checkpoint.latest(load_config(narrow))
    expected = load_file(undisturbed.path / checkpoint.TRAINED_FILE), _map_of(load_config(narrow))
    for ranks in (1, 2):
        path = copy_work(
            narrow, tmp_path / str(ranks), *(n for n in BEFORE_TRAINING if n != "mlflow.db"), "checkpoints"
        )
        config = load_config(path)
        shutil.rmtree(kinds.checkpoint_folder(config) / "step-00000004")
        if ranks == 1:
            train(config, world, resume=True)
            printed = capsys.readouterr().err
        else:
            printed = run_program("train.py", path, "--resume", ranks=ranks).output
        assert "train: run 'dskd'" in printed and "least-squares fit" not in printed
        tolerance = {"rtol": 0.0, "atol": 0.0} if ranks == 1 else {"rtol": 1e-3, "atol": 2e-5}
        for name, tensor in load_file(checkpoint.latest(config).path / checkpoint.TRAINED_FILE).items():
            torch.testing.assert_close(tensor, expected[0][name], **tolerance)
        torch.testing.assert_close(_map_of(config), expected[1], **tolerance)


@pytest.mark.slow
def test_two_ranks_fit_and_train_the_map_that_one_does(narrow):
    run_program("train.py", narrow, "run=two", ranks=2)
    (_, expected), (_, found) = losses_of(narrow, R_SQUARED)[0], losses_of(narrow, R_SQUARED, "run=two")[0]
    assert found == pytest.approx(expected, rel=1e-5)
    for term in TERMS:
        of_one, of_two = ([v for _, v in losses_of(narrow, f"train/{term}", f"run={r}")] for r in ("dskd", "two"))
        assert len(of_one) == 4
        assert of_one == pytest.approx(of_two, rel=2e-4), term
    torch.testing.assert_close(
        *(_map_of(load_config(narrow, [f"run={r}"])) for r in ("two", "dskd")), rtol=1e-3, atol=2e-5
    )


@pytest.mark.slow
def test_an_export_has_no_map(narrow):
    """`build_export` itself compares the logits of the reloaded model with those of the student in training."""
    config = load_config(narrow)
    build_export(config)
    names = [set(load_file(config.path(*place) / "model.safetensors")) for place in (("student",), ("export", "dskd"))]
    assert names[0] == names[1]
    _, report = AutoModelForCausalLM.from_pretrained(config.path("export", "dskd"), output_loading_info=True)
    assert not any(report.values())


@pytest.mark.slow
def test_a_run_that_reads_no_teacher_fits_the_map_to_a_loaded_one_or_to_stored_states(tiny, narrow, tmp_path, world):
    """With CE and the paper's sense loss only: all fits are those of the run that reads the teacher."""
    of_narrow = losses_of(narrow, R_SQUARED)
    loss = {**TINY["loss"], "kd_weight": 0.0}
    settings = {**SETTINGS, "steps": 1}
    path = _work(tiny, tmp_path, loss=loss, train=settings)
    config = load_config(path)
    train(config, world)
    assert load_inputs(config).source.kind == "none"
    assert losses_of(path, R_SQUARED) == of_narrow
    losses = losses_of(path)

    with pytest.raises(UserError, match=r"no teacher_states.*another width.*annotation.store: \[teacher_states\], or"):
        load_inputs(load_config(path, ["teacher.mode=cached"]))
    shutil.rmtree(config.path("shards"))
    cached = load_config(path, ["teacher.mode=cached", "annotation.store=[teacher_states]", "run=stored"])
    annotate(cached, world)
    train(cached, world)
    assert losses_of(path, R_SQUARED, "run=stored") == [(0, pytest.approx(of_narrow[0][1], rel=1e-6))]
    assert [v for _, v in losses_of(path, "train/loss", "run=stored")] == pytest.approx(
        [v for _, v in losses], rel=1e-5
    )
