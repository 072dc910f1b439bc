"""Training on real shards and ranks: against a plain loop, one rank against two, resumed against uninterrupted."""

import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from artifact_folders import open_dataset, update_manifest
from config_files import write_config
from plain_reading import steps_of_run
from plain_training import PlainTraining
from rank_processes import ONE_RANK, run_program, start_ranks, wait_for_checkpoint
from safetensors.torch import load_file, save_file
from tiny_work import BEFORE_TRAINING, TINY, copy_work
from torch.distributions import Categorical, kl_divergence
from tracked_results import losses_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from dskd import shards
from dskd.artifacts import kinds
from dskd.artifacts.manifest import read_manifest
from dskd.config.reading import load_config
from dskd.errors import UserError
from dskd.random_numbers import derived_seed
from dskd.shards.annotate import annotate
from dskd.tracking import read_runs
from dskd.training.checkpoints import checkpoint
from dskd.training.data.distribution_candidates import CandidateRows
from dskd.training.data.positions import SensePositions, TargetPositions
from dskd.training.exporting.export import build_export
from dskd.training.inputs import load_inputs
from dskd.training.status import report_status
from dskd.training.train import train

pytestmark = pytest.mark.slow


def _trained(config):
    newest = checkpoint.latest(load_config(config))
    return newest.step, load_file(newest.path / checkpoint.TRAINED_FILE)


@pytest.fixture(scope="module")
def one_rank(tiny, world, tmp_path_factory):
    """The config of the run of `tiny`, which one rank trained."""
    config = copy_work(tiny, tmp_path_factory.mktemp("one-rank"), *BEFORE_TRAINING)
    train(load_config(config), world)
    return config


def test_one_rank_equals_two(tiny, one_rank):
    for term in ("loss", "ce", "kl", "sense", "sense_synonym", "sense_antonym", "sense_own", "grad_norm"):
        one, two = losses_of(one_rank, f"train/{term}"), losses_of(tiny, f"train/{term}")
        assert [step for step, _ in one] == [step for step, _ in two] == list(range(1, 7))
        assert [value for _, value in one] == pytest.approx([value for _, value in two], rel=2e-4), term
    (_, one), (_, two) = _trained(one_rank), _trained(tiny)
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, two[name], rtol=1e-3, atol=2e-5)


def test_a_killed_run_resumes_from_its_last_checkpoint_in_the_same_tracked_run(tiny, copy_of_tiny):
    # `tiny` has one worker and a checkpoint every 3 steps.
    config = copy_of_tiny(*BEFORE_TRAINING, train={**TINY["train"], "checkpoint_every": 1, "num_workers": 2})
    loaded = load_config(config)
    ranks = start_ranks("train.py", config, ranks=2)
    try:
        wait_for_checkpoint(loaded)
        ranks[1].kill()
        # The other rank must notice: without its peer it can only fail.
        assert ranks[0].wait(60) != 0
    finally:
        for process in ranks:
            process.kill()
    assert 1 <= checkpoint.latest(loaded).step < 6
    run_program("train.py", config, "--resume", ranks=2)
    assert losses_of(config) == losses_of(tiny)
    base = kinds.checkpoint_folder(loaded)
    assert len(list(base.glob("step-*"))) == loaded.train.keep_last
    assert (base / "latest").read_text() == "step-00000006\n"
    (_, resumed), (_, undisturbed) = _trained(config), _trained(tiny)
    for name, tensor in undisturbed.items():
        assert torch.equal(tensor, resumed[name]), name


@pytest.mark.parametrize(
    "loss",
    [
        {"kd_weight": 0.0, "sense_weight": 0.0},
        {
            "kd_weight": 0.7,
            "temperature": 1.5,
            "lexical_weight": 1.4,
            "position_share": 0.4,
            "hidden_weight": 2.0,
            "sense_weight": 0.8,
            "sense_form": "distribution",
            "sense_temperature": 0.3,
            "sense_random_candidates": 20,
            "min_relations": 3,
        },
    ],
    ids=["plain fine-tuning", "all that the paper has not"],
)
def test_training_is_what_a_plain_loop_with_transformers_and_torch_does(copy_of_tiny, tmp_path, world, loss):
    settings = {**TINY["train"], "warmup_share": 0.0, "gradient_clipping": 0.5, "steps": 3, "num_workers": 0}
    config_path = copy_of_tiny(*BEFORE_TRAINING, loss=loss, train=settings)
    config = load_config(config_path)
    train(config, world)

    teacher = AutoModelForCausalLM.from_pretrained(config.path("teacher"), dtype=torch.float32)
    student = AutoModelForCausalLM.from_pretrained(config.path("student"), dtype=torch.float32)
    end = AutoTokenizer.from_pretrained(config.path("teacher")).eos_token_id
    dataset = open_dataset(config.path("shards", "train"), tmp_path / "again")
    vectors = load_file(config.path("senses", "senses.safetensors"))["vectors"].float()
    parameters = student.model.layers[-1].parameters()
    plain = PlainTraining(
        config, tmp_path / "cache", student=student, teacher=teacher, end=end, parameters=[*parameters]
    )
    expected = []
    for step in plain.steps():
        samples = [{**dataset[i], "sample_id": i} for batch in step.micro_batches for i in batch["sample_ids"].tolist()]
        lexical = [max(row) >= 0 for sample in samples for row in _rows(sample, "synonym_ids", "antonym_ids")]
        assert 0 < sum(lexical) < len(lexical)
        drawn = _drawn_targets(config, samples)
        at_drawn = replace(step, has_target=drawn, labels=step.labels[drawn[step.has_target]])
        weights = torch.where(torch.tensor(lexical)[drawn], loss.get("lexical_weight", 1.0), 1.0)
        weights = weights / weights.sum()
        total = weights @ at_drawn.ce()
        if loss["kd_weight"]:
            temperature = loss["temperature"]
            total = total + loss["kd_weight"] * temperature**2 * (weights @ at_drawn.kl(temperature))
            total = total + loss["hidden_weight"] * at_drawn.hidden()
            divergences = _sense_divergences(config, step.number, samples, vectors, step.states, step.teacher_states)
            total = total + loss["sense_weight"] * torch.stack(divergences).mean()
        plain.minimise(total)
        expected.append(total.item())
    assert [value for _, value in losses_of(config_path)] == pytest.approx(expected, rel=1e-4)
    assert bool(losses_of(config_path, "train/sense_teacher_entropy")) == bool(loss["sense_weight"])
    _, trained = _trained(config_path)
    names = {name for name, _ in student.named_parameters() if name.startswith("model.layers.1.")}
    assert set(trained) == names
    for name, parameter in student.named_parameters():
        if name in names:
            torch.testing.assert_close(trained[name], parameter.detach(), rtol=1e-3, atol=2e-5)


def _rows(sample, *columns):
    """Returns the row numbers of each position, padded with -1."""
    return np.concatenate([sample[name] for name in columns], axis=-1).tolist()


def _drawn_targets(config, samples):
    """Returns where CE, KL and hidden-state distance are computed [B·T] bool."""
    masks = torch.tensor(np.stack([sample["loss_mask"] for sample in samples])).bool()
    if config.loss.position_share < 1:
        rule = TargetPositions(derived_seed(config.seed, "train", "targets"), config.loss.position_share)
        drawn = torch.stack([torch.from_numpy(rule.draw_each([{**sample, "epoch": 0}])[0]) for sample in samples])
        assert 0.35 < drawn.sum() / masks.sum() < 0.45
        return drawn.flatten()
    return masks.flatten()


def _sense_divergences(config, step, samples, vectors, states, target_states):
    """Returns KL of softmax(-D / tau) over each drawn position's rows and the random ones, from sets of row numbers."""
    rule = SensePositions.of(config.loss, derived_seed(config.seed, "train", "positions"))
    random = CandidateRows.of(config.loss, derived_seed(config.seed, "train", "candidates"), len(vectors)).draw(step)
    divergences = []
    for number, sample in enumerate(samples):
        named = _rows(sample, "sense_ids", "synonym_ids", "antonym_ids")
        relation, own = rule.draw(sample, sample["sample_id"], 0)
        for position in {*relation.tolist(), *own.tolist()}:
            rows = vectors[sorted(({*named[position]} - {-1}) | {*random.tolist()})]
            q, p = (
                Categorical(logits=-(h[number * len(named) + position] - rows).square().mean(-1) / 0.3)
                for h in (states, target_states)
            )
            divergences.append(kl_divergence(p, q))
    return divergences


def test_a_learning_rate_scaled_to_the_batch_is_shown_everywhere(one_rank, copy_of_tiny, world, capsys):
    """A quarter of the rate, meant for a quarter of the batch, is the same run as the whole rate."""
    assert report_status(load_config(one_rank))
    assert "; peak learning rate 0.001\n" in capsys.readouterr().out
    quarter = {"learning_rate": 2.5e-4, "learning_rate_batch_size": TINY["train"]["global_batch_size"] // 4}
    path = copy_of_tiny(*BEFORE_TRAINING, train={**TINY["train"], **quarter, "num_workers": 0})
    config = load_config(path)
    shown = "peak learning rate 0.001, from 0.00025 at a batch of 2 (linear rule)"
    train(config, world)
    assert shown in capsys.readouterr().err
    assert losses_of(path) == losses_of(one_rank)
    rates = dict(losses_of(path, "train/learning_rate"))
    assert max(rates.values()) == pytest.approx(1e-3)
    (run,) = read_runs(config)
    assert run.params["train.peak_learning_rate"] == "0.001"
    assert report_status(config)
    assert shown in capsys.readouterr().out
    # The same run, set by its rate; and a different one, set by another batch size.
    unset = ["train.learning_rate=1e-3", "train.learning_rate_batch_size=null"]
    assert report_status(load_config(path, unset))
    assert not report_status(load_config(path, ["train.learning_rate_batch_size=4"]))
    assert "train.learning_rate: 0.001 then, 0.0005 now" in capsys.readouterr().out


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(copy_of_tiny, tmp_path):
    """Sets to NaN the sense embeddings that the second step reads and the first does not.

    The run replaces an older one, whose checkpoints are removed when the first new one is there.
    """
    path = copy_of_tiny(*BEFORE_TRAINING, "checkpoints", train={**TINY["train"], "checkpoint_every": 1})
    config = load_config(path)
    _, steps = steps_of_run(config, tmp_path / "a")
    samples = [[int(i) for batch in next(steps).micro_batches for i in batch["sample_ids"]] for _ in range(2)]
    steps.close()
    dataset = shards.open_shards(config, "train", tmp_path / "b", ONE_RANK, batch_size=1)
    columns = ("sense_ids", "synonym_ids", "antonym_ids")
    first, second = ({int(row) for i in ids for name in columns for row in dataset[i][name].ravel()} for ids in samples)
    file = config.path("senses", "senses.safetensors")
    tensors = load_file(file)
    tensors["vectors"][sorted(second - first)] = torch.nan
    save_file(tensors, file)
    update_manifest(file.parent)
    senses = read_manifest(file.parent, "senses", made_by="").digest
    folder = config.path("shards", "train")
    update_manifest(folder, inputs={**read_manifest(folder, "shards", made_by="").inputs, "senses": senses})

    finished = run_program("train.py", path, "--overwrite", ranks=2, check=False)
    assert finished.exit_code == 2, finished.output
    assert "Traceback" not in finished.output
    assert finished.output.count("the loss is not finite") == 1  # rank 0 reports it for all ranks
    line = next(line for line in finished.output.splitlines() if "the loss is not finite" in line)
    assert "error: step 2: the loss is not finite: sense on samples [" in line
    named = {int(number) for number in re.findall(r"\d+", line.split("samples [")[1].split("]")[0])}
    assert named
    assert named <= set(samples[1])
    checkpoints = kinds.checkpoint_folder(config)
    assert sorted(found.name for found in checkpoints.iterdir()) == ["latest", "step-00000001", "tracking"]
    (run,) = read_runs(config)
    assert run.status == "FAILED"


SHORT = {**TINY["train"], "steps": 2, "checkpoint_every": 1, "micro_batch_size": 4, "num_workers": 0}


@pytest.fixture(scope="module")
def short(tiny, world, tmp_path_factory):
    """The config of a run of two steps on one rank, and of its export."""
    config = copy_work(tiny, tmp_path_factory.mktemp("short"), *BEFORE_TRAINING, run="short", train=SHORT)
    train(load_config(config), world)
    build_export(load_config(config))
    return config


@pytest.mark.parametrize(
    ("run", "changes", "tolerance"),
    [
        ("memory", {"train": {**SHORT, "activation_checkpointing": True, "sense_bank": "device"}}, 0),
        (
            "resident",
            {
                "student": {**TINY["student"], "shared_trunk": "off"},
                "teacher": {**TINY["teacher"], "mode": "resident"},
                "train": SHORT,
            },
            1e-6,
        ),
    ],
    ids=["recomputed activations and sense embeddings on the device", "a resident teacher and no shared trunk"],
)
def test_what_saves_work_or_memory_changes_neither_the_losses_nor_the_export(
    short, tmp_path, world, monkeypatch, run, changes, tolerance
):
    """Compares a run with one that keeps activations, has sense embeddings in its batches, and shares a trunk with a
    sharded teacher. Only without the trunk are its sums in another order."""
    from transformers import modeling_layers

    recomputed = []
    original = modeling_layers.GradientCheckpointingLayer.__call__

    def record(self, *args, **options):
        recomputed.append(self.gradient_checkpointing and self.training)
        return original(self, *args, **options)

    monkeypatch.setattr(modeling_layers.GradientCheckpointingLayer, "__call__", record)
    other = write_config(
        tmp_path / "other.yaml",
        yaml.safe_load(short.read_text()),
        run=run,
        **changes,
    )
    train(load_config(other), world)
    assert any(recomputed) == ("activation_checkpointing" in changes["train"])
    build_export(load_config(other))
    for term in ("loss", "sense", "grad_norm"):
        losses, others = losses_of(short, f"train/{term}"), losses_of(other, f"train/{term}")
        assert [step for step, _ in losses] == [1, 2]
        assert [value for _, value in others] == pytest.approx([value for _, value in losses], rel=tolerance, abs=0), (
            term
        )
    exports = [load_config(path).path("export", name) for path, name in ((short, "short"), (other, run))]
    names = [{file.name for file in folder.iterdir()} for folder in exports]
    assert names[0] == names[1]
    tensors = [load_file(folder / "model.safetensors") for folder in exports]
    trained = {name for name in tensors[0] if ".layers.1." in name}
    assert trained
    assert tensors[0].keys() == tensors[1].keys()
    for name, tensor in tensors[0].items():
        torch.testing.assert_close(tensor, tensors[1][name], rtol=0, atol=tolerance if name in trained else 0)
    for name in names[0] - {"model.safetensors", "manifest.json", "README.md"}:  # the card names the run
        assert (exports[0] / name).read_bytes() == (exports[1] / name).read_bytes(), name


def test_training_from_a_complete_cached_distribution_equals_training_with_the_teacher(short, copy_of_tiny, world):
    path = copy_of_tiny(
        *BEFORE_TRAINING,
        annotation={**TINY["annotation"], "teacher_top_n": TINY["teacher"]["train_from_scratch"]["vocab_size"]},
        teacher={**TINY["teacher"], "mode": "cached"},
        train=SHORT,
    )
    config = load_config(path)
    annotate(config, world)
    train(config, world)
    for term in ("ce", "kl", "sense"):
        online, cached = losses_of(short, f"train/{term}"), losses_of(path, f"train/{term}")
        assert len(online) == 2
        # The shards store log-probabilities in half precision.
        assert [value for _, value in cached] == pytest.approx([value for _, value in online], rel=1e-3), term


def test_overwriting_keeps_the_old_checkpoints_until_there_is_a_new_one(copy_of_tiny, world):
    path = copy_of_tiny(*BEFORE_TRAINING, "checkpoints")
    base = kinds.checkpoint_folder(load_config(path))
    config = load_config(path)
    nothing = config.student.model_copy(update={"train_layers": 0})  # load_config refuses it
    with pytest.raises(UserError, match="nothing would be trained"):
        train(config.model_copy(update={"student": nothing}), world, overwrite=True)
    with pytest.raises(UserError, match="is not finite"):
        train(load_config(path, ["train.learning_rate=1e30", "train.steps=1"]), world, overwrite=True)
    # The first new one: test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint.
    assert sorted(found.name for found in base.iterdir()) == ["latest", "step-00000003", "step-00000006", "tracking"]


def test_checkpoints_are_not_overwritten_or_mixed_up_by_accident(copy_of_tiny, world):
    path = copy_of_tiny(*BEFORE_TRAINING, "checkpoints")
    config = load_config(path)
    shutil.rmtree(kinds.checkpoint_folder(config) / "step-00000006")
    with pytest.raises(
        UserError, match="was stopped at step 3 of 6; continue with --resume, or start from scratch with --overwrite"
    ):
        train(config, world)
    with pytest.raises(UserError, match=r"loss.margin: 1.0 then, 7.0 now"):
        train(load_config(path, ["loss.margin=7"]), world, resume=True)
    with pytest.raises(
        UserError, match=r"trunk of 1 layers, but the run has one of 0 now; set student.shared_trunk to on"
    ):
        train(load_config(path, ["student.shared_trunk='off'"]), world, resume=True)
    assert sorted(found.name for found in kinds.checkpoint_folder(config).iterdir()) == [
        "latest",
        "step-00000003",
        "tracking",
    ]


def test_a_student_with_other_layers_than_the_config_chooses_is_refused(copy_of_tiny, world):
    path = copy_of_tiny(*BEFORE_TRAINING)  # its student has layers 0 and 3 of 4
    by_ends = r"student\.layers, student\.spacing and student\.train_layers"
    for change, keys, chosen in (
        ("student.layers=3", by_ends, "0, 1, 3"),
        ("student.layers=[0, 2]", r"student\.layers and student\.spacing", "0, 2"),
        ("student.spacing=first", r"student\.layers and student\.spacing", "0, 1"),
    ):
        message = (
            rf"student: the student has the teacher's layers 0, 3, but {keys} choose "
            rf"{chosen}; cut it again with `dskd student .* or set student\.layers to \[0, 3\]"
        )
        with pytest.raises(UserError, match=message):
            train(load_config(path, [change]), world)
    config = load_config(path, ["student.layers=[0, 3]"])  # another way to choose the same layers
    load_inputs(config)
    # A student that was cut from another teacher has its layers.
    update_manifest(config.path("student"), teacher="another")
    load_inputs(load_config(path, ["student.layers=3"]))
