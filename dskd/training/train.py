"""Training of a student: the loop over optimizer steps.

The result of a run is a function of its config, seed and data: any number of ranks sees the same global batches, and a
run that was stopped and resumed equals one that was not (docs/invariants.md).
"""

import contextlib
import time

from dskd.artifacts import kinds
from dskd.config import Config
from dskd.console import stage
from dskd.distributed import stopping
from dskd.distributed.collectives import any_rank
from dskd.distributed.world import World
from dskd.senses.dictionary import dictionary_folder
from dskd.training.checkpoints.writing import save_checkpoint
from dskd.training.data.loader import shorter_shards_named
from dskd.training.prepared_run import Run
from dskd.training.records import TrainingProgress, ended_in_mlflow
from dskd.training.setup import set_up
from dskd.training.step import Step, StepResult, train_step


def train(config: Config, world: World, *, resume: bool = False, overwrite: bool = False) -> None:
    """Trains the run `config.run`.

    Args:
        config: the experiment, with the run's keys applied.
        world: the ranks.
        resume: continue from the last checkpoint, if there is one.
        overwrite: start from scratch; the run's old checkpoints are removed when the first new one is complete.

    Raises:
        UserError: if inputs do not fit together, or checkpoints exist and neither flag is set.
    """
    began = time.perf_counter()
    with stage(
        f"train: run {config.run!r}",
        reads=[config.path(kinds.STUDENT.folder), config.path(kinds.SHARDS.folder, "train"), dictionary_folder(config)],
        writes=kinds.checkpoint_folder(config),
    ):
        run = set_up(config, world, began=began, resume=resume, overwrite=overwrite)
        if run is not None:
            _train(run)


def _train(run: Run) -> None:
    with (
        stopping.deferred() as stop_request,  # signals take effect only after MLflow's run has ended
        ended_in_mlflow(run.tracker),
        shorter_shards_named(run.config),
        contextlib.closing(run.batches),
        TrainingProgress(run) as progress,
    ):
        for step in run.steps():
            run.pair.set_learning_rate(step.learning_rate)
            result = train_step(
                run.pair,
                step.batches,
                run.config.loss,
                run.world,
                step=step.number,
                stop_requested=stop_request.is_pending,
            )
            progress.report(step, result)
            stops = _stops_after(step, result, stop_request, run.world)
            if stops or step.needs_checkpoint:
                run.tracker.save_unsent()
                save_checkpoint(run.pair, run.config, run.recipe, progress.checkpoint_facts(step), run.world)
            if stops and not step.is_last:
                raise stopping.Stopped(
                    f"stopped at step {step.number} of {run.schedule.total_steps} on request; continue with --resume"
                )


def _stops_after(step: Step, result: StepResult, stop_request: stopping.StopRequest, world: World) -> bool:
    """Returns True if the run stops after a step, with the same answer on every rank; they all must call it.

    A request that arrives during a step with a checkpoint stops the run now: otherwise it would train one more step and
    write another checkpoint.
    """
    return result.stop_requested or (step.needs_checkpoint and any_rank(stop_request.is_pending, world))
