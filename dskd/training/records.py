"""Records of a run: the metrics of its steps, its tags and datasets, and the summary at its beginning."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

from dskd import shards
from dskd.config import Config, LossConfig
from dskd.console import progress_bar, say
from dskd.distributed.world import World
from dskd.errors import counted
from dskd.losses.terms import LOSS_METRIC, TERMS
from dskd.models.running.precision import compute_dtype
from dskd.tracking import Tracker, describe_dataset, git_commit
from dskd.training.inputs import TrainingInputs
from dskd.training.models.pair import ModelPair
from dskd.training.prepared_run import Run
from dskd.training.schedule import Schedule, describe_learning_rate
from dskd.training.step import Step, StepResult


class TrainingProgress:
    """The progress of a run, on a progress bar, in MLflow and in the manifests of checkpoints."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._bar = progress_bar(total=run.schedule.total_steps, label="training", unit="steps", initial=run.steps_done)
        self._trained_s = 0.0  # without checkpoints
        self._loss = 0.0
        self._device_hours = 0.0

    def __enter__(self) -> "TrainingProgress":
        return self

    def report(self, step: Step, result: StepResult) -> None:
        """Reports a step that has just been computed."""
        elapsed = time.perf_counter() - step.started
        self._trained_s += elapsed
        self._loss, self._device_hours = result.loss, self._run.device_hours()
        if step.is_last or step.number % self._run.config.tracking.log_every == 0:
            metrics = metrics_of(step, result, self._run.config.loss, elapsed)
            self._run.tracker.log_metrics(metrics | {"cost/device_hours": self._device_hours}, step.number)
        self._bar.set_postfix(loss=f"{result.loss:.4f}", tok_s=f"{result.tokens / elapsed:,.0f}", refresh=False)
        self._bar.update(1)

    def checkpoint_facts(self, step: Step) -> dict[str, Any]:
        """Returns the facts for the manifest of the checkpoint after `step`, the last one that was reported."""
        run = self._run
        return {
            "step": step.number,
            "total_steps": run.schedule.total_steps,
            "world_size": run.world.world_size,
            "trunk_depth": run.pair.trunk_depth,
            "mlflow_run_id": run.tracker.run_id,
            "device_hours": self._device_hours,
            "loss": self._loss,
            "dtype": str(compute_dtype(run.config.precision, run.world.device)).removeprefix("torch."),
        }

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self._bar.close()
        if error is None:
            steps = self._run.schedule.total_steps - self._run.steps_done
            say(f"  loss {self._loss:.4f}; {self._trained_s / steps:.2f} s a step")


@contextlib.contextmanager
def ended_in_mlflow(tracker: Tracker) -> Iterator[None]:
    """Ends MLflow's run after the block: as FINISHED, as KILLED if the block was stopped, otherwise as FAILED."""
    status = "FAILED"
    try:
        yield
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        tracker.finish(status)


def tags_of(inputs: TrainingInputs, pair: ModelPair, world: World) -> dict[str, str]:
    """Returns the tags of a run in MLflow: its ranks, and digests of what it reads."""
    tags = {
        "world_size": str(world.world_size),
        "device": world.device.type,
        "dataset": shards.digest_without_states(inputs.shards),
        "sense_dictionary": inputs.senses.digest,
        "teacher": inputs.teacher.digest,
        "student": inputs.student.digest,
        "teacher_source": pair.source.kind,
    }
    if pair.source.reads_trunk:
        tags["stored_trunk_depth"] = str(pair.trunk_depth)
    commit = git_commit()
    return tags | ({"git_commit": commit} if commit else {})


def datasets_of(config: Config, inputs: TrainingInputs) -> list[dict[str, Any]]:
    """Describes the data that the run reads in the format of MLflow's dataset API."""
    described = []
    for split, context in (("train", "training"), ("validation", "validation")):
        manifest = inputs.shards if split == "train" else shards.load_manifest(config, split)
        encodings = shards.columns_of(
            teacher_top_n=manifest.config.get("teacher_top_n", 0), stored=shards.StoredStates.of(manifest)
        )
        columns = {name: kind.split(":")[1] for name, kind in encodings.items()}
        described.append(
            describe_dataset(f"shards-{split}", context, shards.location_of(config, split), manifest, columns)
        )
    vectors = {"vectors": "float32"}  # MLflow knows no bfloat16
    described.append(
        describe_dataset("sense-dictionary", "training", str(inputs.vectors_path.parent), inputs.senses, vectors)
    )
    return described


def metrics_of(step: Step, result: StepResult, loss: LossConfig, elapsed: float) -> dict[str, float]:
    """Returns the metrics of a step that took `elapsed` seconds, by their names in MLflow."""
    return {term.metric: result.terms[term.name] for term in TERMS if term.is_computed(loss)} | {
        LOSS_METRIC: result.loss,
        "train/grad_norm": result.grad_norm,
        "train/learning_rate": step.learning_rate,
        "speed/tokens_per_s": result.tokens / elapsed,
        "speed/step_s": elapsed,
        "speed/data_wait_share": step.waited_s / elapsed,
    }


def report_teacher(config: Config, pair: ModelPair) -> None:
    """Prints what the run reads of the teacher, and which stored states it does not read."""
    say(f"  {pair.describe(config)}")
    if line := pair.source.describe_unread(config):
        say(f"  {line}")


def describe_run(config: Config, world: World, pair: ModelPair, schedule: Schedule, steps_done: int) -> None:
    """Prints the run's ranks, precision, parameters, steps, batches and steps done."""
    parameters = list(pair.engine.module.parameters())
    trained = sum(p.ds_numel for p in parameters if p.requires_grad)
    say(
        f"  {counted(world.world_size, 'rank')} on {world.device.type}, "
        f"{str(compute_dtype(config.precision, world.device)).removeprefix('torch.')}; "
        f"{trained:,} of {sum(p.ds_numel for p in parameters):,} parameters are trained\n"
        f"  {schedule.total_steps} steps of {schedule.global_batch_size} sequences "
        f"({schedule.accumulation_steps} × {schedule.micro_batch_size} a rank), "
        f"{schedule.total_steps / schedule.steps_per_epoch:.2f} epochs; {describe_learning_rate(config.train)}"
        + (f"; from step {steps_done}" if steps_done else "")
    )
