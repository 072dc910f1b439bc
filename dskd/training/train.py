"""Training of a student: loads its inputs, loops over optimizer steps, saves checkpoints and logs metrics.

The result of a run is a function of its config, seed and data: any number of ranks sees the same global batches, and a
run that was stopped and resumed equals one that was not (docs/invariants.md).
"""

import time

from dskd.artifacts import kinds
from dskd.artifacts.building import LOCK_PATIENCE_S
from dskd.artifacts.hashing import digest_of_json
from dskd.artifacts.lock import hold_lock
from dskd.artifacts.manifest import Recipe
from dskd.config import Config
from dskd.console import progress_bar, say, stage
from dskd.distributed import stopping
from dskd.distributed.collectives import any_rank, main_first, on_main
from dskd.distributed.node_cache import open_node_cache
from dskd.distributed.world import World
from dskd.errors import UserError
from dskd.models.precision import compute_dtype
from dskd.senses.dictionary import dictionary_folder
from dskd.tracking import Start, start_tracking
from dskd.training import checkpoint, saving
from dskd.training.inputs import (
    Inputs,
    build_collator,
    load_inputs,
    load_sense_bank,
    margin_of,
    recipe_of,
    verify_inputs,
)
from dskd.training.loader import load_steps
from dskd.training.pair import load_pair
from dskd.training.records import datasets_of, metrics_of, say_what_runs, tags_of
from dskd.training.rehearsal import rehearse_export
from dskd.training.schedule import Schedule, plan_schedule
from dskd.training.step import train_step


def train(config: Config, world: World, *, resume: bool = False, overwrite: bool = False) -> None:
    """Trains the run `config.run`.

    Args:
        config: the experiment, with the run's keys laid over it.
        world: the ranks.
        resume: continue from the last checkpoint, if there is one.
        overwrite: start from scratch; the run's old checkpoints are removed when the first new one is complete.

    Raises:
        UserError: if inputs do not fit together, or checkpoints exist and neither flag is set.
    """
    began = time.perf_counter()
    with stage(
        f"train: run {config.run!r}",
        reads=[config.path("student"), config.path(kinds.SHARDS.folder, "train"), dictionary_folder(config)],
        writes=kinds.folder(config),
    ):
        inputs = main_first(lambda: load_inputs(config))
        on_main(lambda: verify_inputs(config, inputs))
        wanted = recipe_of(config, inputs)
        schedule = main_first(lambda: plan_schedule(config, inputs.shards, world.world_size))
        step = on_main(lambda: _starting_step(config, wanted, resume=resume, overwrite=overwrite))
        start = None if step is None else main_first(lambda: checkpoint.at_step(config, step))
        if start is not None and start.step >= schedule.total_steps:
            say(f"  run {config.run!r} is at its end already: {start.step} of {schedule.total_steps} steps")
            return
        _run(config, world, inputs, wanted, schedule, start, began=began, overwrite=overwrite)


def _run(
    config: Config,
    world: World,
    inputs: Inputs,
    wanted: Recipe,
    schedule: Schedule,
    start: checkpoint.Checkpoint | None,
    *,
    began: float,
    overwrite: bool,
) -> None:
    import dskd.shards.dataset  # noqa: F401  # takes seconds, which would otherwise count as the first step's

    # Load the models. Check disk space and rehearse the export before a checkpoint changes the student's weights.
    loss, train_settings = config.loss, config.train
    pair = load_pair(
        config,
        world,
        inputs.teacher,
        inputs.student,
        margin=margin_of(config, inputs.shards),
        accumulation_steps=schedule.accumulation_steps,
        load_universal=saving.needs_universal(start, world),
    )
    engine = pair.engine
    saving.require_space(engine, config)
    rehearse_export(pair, inputs.student, config, world)
    if start is not None:
        saving.load(engine, start, world, trunk_depth=pair.trunk_depth)
    first_step = start.step if start is not None else 0
    say_what_runs(config, world, engine, schedule, first_step)
    # The data, from the first step on that is still to be trained.
    collate = build_collator(config, inputs, schedule)
    bank = load_sense_bank(config, inputs, world)
    cache = open_node_cache(config.train.shard_cache, world)
    steps = load_steps(config, schedule, collate, cache, world, start_step=first_step, sense_bank=bank)
    # In MLflow, a new run or the one to resume.
    facts = start.manifest.facts if start is not None else {}
    tracker = start_tracking(
        config,
        world,
        tags=tags_of(config, inputs, world),
        datasets=lambda: datasets_of(config, inputs),
        start=Start(
            recipe=digest_of_json([wanted.config, wanted.inputs]),
            first_step=first_step,
            run_id=facts.get("mlflow_run_id"),
            device_hours=facts.get("device_hours", 0.0),
            overwrite=overwrite,
        ),
    )
    tracker.log_metrics(
        {f"coverage/{name}": share for name, share in inputs.shards.facts["coverage"].items()}, first_step
    )
    status = "FAILED"
    trained_seconds = 0.0
    with stopping.deferred() as stop_request:  # signals take effect only after the tracked run is marked as ended
        try:
            with progress_bar(total=schedule.total_steps, label="training", unit="steps", initial=first_step) as bar:
                for step in range(first_step, schedule.total_steps):
                    started = time.perf_counter()
                    step_batches = next(steps)
                    waited = time.perf_counter() - started
                    rate = schedule.learning_rate(step, train_settings.peak_learning_rate, train_settings.warmup_share)
                    for group in engine.optimizer.param_groups:
                        group["lr"] = rate
                    result = train_step(
                        pair, step_batches, loss, world, step=step + 1, stop_requested=stop_request.is_pending
                    )
                    elapsed = time.perf_counter() - started
                    trained_seconds += elapsed
                    done = step + 1
                    device_hours = tracker.device_hours + world.world_size * (time.perf_counter() - began) / 3600
                    if done % config.tracking.log_every == 0 or done == schedule.total_steps:
                        metrics = metrics_of(result, config, rate, elapsed, waited)
                        tracker.log_metrics(metrics | {"cost/device_hours": device_hours}, done)
                    bar.set_postfix(loss=f"{result.loss:.4f}", tok_s=f"{result.tokens / elapsed:,.0f}", refresh=False)
                    bar.update(1)
                    is_last = done == schedule.total_steps
                    is_due = done % train_settings.checkpoint_every == 0
                    # A request that arrives during a step with a checkpoint stops the run now: otherwise it would
                    # train one more step and write another checkpoint.
                    stops = result.stop_requested or (is_due and any_rank(stop_request.is_pending, world))
                    if is_last or stops or is_due:
                        facts = {
                            "step": done,
                            "total_steps": schedule.total_steps,
                            "world_size": world.world_size,
                            "trunk_depth": pair.trunk_depth,
                            "mlflow_run_id": tracker.run_id,
                            "device_hours": device_hours,
                            "loss": result.loss,
                            "dtype": str(compute_dtype(config.precision, world.device)).removeprefix("torch."),
                        }
                        tracker.before_checkpoint()
                        saving.save(engine, pair.student_logits, config, wanted, facts, world)
                    if stops and not is_last:
                        raise stopping.Stopped(
                            f"stopped at step {done} of {schedule.total_steps}, as asked; continue with --resume"
                        )
            status = "FINISHED"
            say(f"  loss {result.loss:.4f}; {trained_seconds / (schedule.total_steps - first_step):.2f} s a step")
        except KeyboardInterrupt:
            status = "KILLED"
            raise
        finally:
            steps.close()
            tracker.finish(status)


def _starting_step(config: Config, wanted: Recipe, *, resume: bool, overwrite: bool) -> int | None:
    # After a restart, the previous process may still be ending.
    wait_s = LOCK_PATIENCE_S if resume else 0.0
    # An export or evaluation also holds this lock while it sends the run's results to MLflow.
    what = f"trains run {config.run!r}, or sends its results to MLflow"
    hold_lock(kinds.lock_path(config, config.run), what, wait_s=wait_s)
    saving.remove_leftovers(kinds.folder(config))
    if overwrite:
        return None  # the old checkpoints stay until the first new one is complete
    newest = checkpoint.latest(config, verify=True)
    if newest is None:
        return None
    checkpoint.require_same_run(newest, wanted, config)
    if not resume and not newest.is_final:
        raise UserError(
            f"{newest.path}: run {config.run!r} was stopped at step {newest.step} of "
            f"{newest.manifest.facts['total_steps']}; continue with --resume, or start from scratch with --overwrite"
        )
    return newest.step
