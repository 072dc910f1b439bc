"""Records of a run: its tags and datasets, the metrics of a step, and the summary printed at its beginning."""

from typing import Any

from dskd import shards
from dskd.artifacts import kinds
from dskd.config import Config
from dskd.console import say
from dskd.distributed.world import World
from dskd.errors import listed
from dskd.models.precision import compute_dtype
from dskd.tracking import describe_dataset, git_commit
from dskd.training import checkpoint
from dskd.training.inputs import Inputs, recipe
from dskd.training.schedule import Schedule, describe_learning_rate
from dskd.training.step import StepResult

# By `loss.sense_form`, in addition to the other terms.
_SENSE_METRICS = {
    "distance": ("sense", "sense_synonym", "sense_antonym", "sense_own", "active_hinges"),
    "distribution": ("sense", "sense_teacher_entropy"),
}


def report_status(config: Config) -> bool:
    """Prints the progress of the run. Returns True if it was trained to its end with exactly this config."""
    newest = checkpoint.latest(config)
    if newest is not None and newest.is_final:  # read its files fully: nothing checks them again before they are used
        newest = checkpoint.latest(config, verify=True)
    if newest is None:
        print(f"run {config.run!r}: no checkpoint in {kinds.folder(config)}")
        return False
    step, total = newest.step, newest.manifest.facts["total_steps"]
    if changes := checkpoint.changes_since(newest, recipe(config)):
        print(listed(f"run {config.run!r}: step {step} of {total}, of another config", changes))
        return False
    print(
        f"run {config.run!r}: {'finished, ' if newest.is_final else ''}step {step} of {total}; "
        f"{describe_learning_rate(config.train)}"
    )
    return newest.is_final


def tags_of(config: Config, inputs: Inputs, world: World) -> dict[str, str]:
    """Returns the tags of a run in MLflow: its ranks, and digests of what it reads."""
    tags = {
        "world_size": str(world.world_size),
        "device": world.device.type,
        "dataset": inputs.shards.digest,
        "sense_dictionary": inputs.senses.digest,
        "teacher": inputs.teacher.digest,
        "student": inputs.student.digest,
    }
    commit = git_commit()
    return tags | ({"git_commit": commit} if commit else {})


def datasets_of(config: Config, inputs: Inputs) -> list[dict[str, Any]]:
    """Describes the data that the run reads in the format of MLflow's dataset API."""
    described = []
    for split, context, top_n in (
        ("train", "training", config.annotation.teacher_top_n),
        ("validation", "validation", 0),
    ):
        manifest = inputs.shards if split == "train" else shards.load_manifest(config, split)
        columns = {name: kind.split(":")[1] for name, kind in shards.columns_of(teacher_top_n=top_n).items()}
        described.append(describe_dataset(f"shards-{split}", context, shards.place(config, split), manifest, columns))
    vectors = {"vectors": "float32"}  # MLflow knows no bfloat16
    described.append(
        describe_dataset("sense-dictionary", "training", str(inputs.vectors_path.parent), inputs.senses, vectors)
    )
    return described


def metrics_of(result: StepResult, config: Config, rate: float, elapsed: float, waited: float) -> dict[str, float]:
    """Returns the metrics of a step by their names in MLflow."""
    loss = config.loss
    wanted = {"ce": True, "kl": loss.kd_weight > 0, "hidden": loss.hidden_weight > 0}
    metrics = {f"train/{name}": result.terms[name] for name, is_used in wanted.items() if is_used}
    if loss.sense_weight:
        metrics |= {f"train/{name}": result.terms[name] for name in _SENSE_METRICS[loss.sense_form]}
    return metrics | {
        "train/loss": result.loss,
        "train/grad_norm": result.grad_norm,
        "train/learning_rate": rate,
        "speed/tokens_per_s": result.tokens / elapsed,
        "speed/step_s": elapsed,
        "speed/data_wait_share": waited / elapsed,
    }


def say_what_runs(config: Config, world: World, engine: Any, schedule: Schedule, first_step: int) -> None:
    """Prints the ranks, precision, parameters, steps and batches of the run, and the step it starts from."""
    parameters = list(engine.module.parameters())
    trained = sum(p.ds_numel for p in parameters if p.requires_grad)
    say(
        f"  {world.world_size} rank{'s' * (world.world_size > 1)} on {world.device.type}, "
        f"{str(compute_dtype(config.precision, world.device)).removeprefix('torch.')}; "
        f"{trained:,} of {sum(p.ds_numel for p in parameters):,} parameters are trained\n"
        f"  {schedule.total_steps} steps of {schedule.global_batch_size} sequences "
        f"({schedule.accumulation_steps} × {schedule.micro_batch_size} a rank), "
        f"{schedule.total_steps / schedule.steps_per_epoch:.2f} epochs; {describe_learning_rate(config.train)}"
        + (f"; from step {first_step}" if first_step else "")
    )
