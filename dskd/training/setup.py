"""The setup of a run, from the config to everything that the loop uses.

Whatever can be wrong is checked before the work that it would waste: inputs and the checkpoint to resume from before
models are loaded, disk space and the export before the first step.
"""

from dskd.artifacts import kinds
from dskd.artifacts.building import LOCK_PATIENCE_S
from dskd.artifacts.hashing import digest_of_json
from dskd.artifacts.lock import hold_lock
from dskd.artifacts.manifest import Recipe
from dskd.config import Config
from dskd.console import say
from dskd.distributed.collectives import main_first, on_main
from dskd.distributed.node_cache import open_node_cache
from dskd.distributed.world import World
from dskd.errors import UserError
from dskd.losses.terms import curve_titles
from dskd.tracking import Start, Tracker, start_tracking
from dskd.training.checkpoints import checkpoint
from dskd.training.checkpoints.loading import load_checkpoint, needs_universal
from dskd.training.checkpoints.writing import remove_leftovers, require_space
from dskd.training.data.loader import load_steps
from dskd.training.exporting.rehearsal import rehearse_export
from dskd.training.freed_memory import keep_freed_memory
from dskd.training.inputs import (
    TrainingInputs,
    build_collator,
    load_inputs,
    load_sense_bank,
    margin_of,
    recipe,
    verify_inputs,
)
from dskd.training.models.pair import ModelPair, load_pair
from dskd.training.prepared_run import Run
from dskd.training.records import datasets_of, describe_run, report_teacher, tags_of
from dskd.training.schedule import Schedule, plan_schedule
from dskd.training.width_fit import fit_width_map


def set_up(config: Config, world: World, *, began: float, resume: bool, overwrite: bool) -> Run | None:
    """Prepares the run `config.run` for training. Every rank must call it.

    Args:
        config: the experiment, with the run's keys applied.
        world: the ranks.
        began: `time.perf_counter()` at the beginning, from which the run's cost counts.
        resume: continue from the last checkpoint, if there is one.
        overwrite: start from scratch.

    Returns:
        The run, or None if it was already trained to its end.

    Raises:
        UserError: if inputs do not fit together, or checkpoints exist and neither flag is set.
    """
    inputs = main_first(lambda: load_inputs(config))
    on_main(lambda: verify_inputs(config, inputs))
    run_recipe = recipe(config, inputs)
    schedule = main_first(lambda: plan_schedule(config, inputs.shards, world.world_size))
    step = on_main(lambda: _claim(config, run_recipe, resume=resume, overwrite=overwrite))
    start = None if step is None else main_first(lambda: checkpoint.at_step(config, step))
    steps_done = 0 if start is None else start.step
    if steps_done >= schedule.total_steps:
        say(f"  run {config.run!r} is already finished: {steps_done} of {schedule.total_steps} steps")
        return None

    import dskd.shards.dataset  # noqa: F401  # takes seconds, which would otherwise count as the first step's

    pair = _load_models(config, world, inputs, schedule, start)
    describe_run(config, world, pair, schedule, steps_done)
    collate = build_collator(config, inputs, schedule, pair.source)
    bank = load_sense_bank(config, inputs, world)
    cache = open_node_cache(config.train.shard_cache, world)
    fit = None
    if start is None and pair.engine.module.width_map is not None:  # a checkpoint has the map
        fit = fit_width_map(pair, config, inputs, schedule, cache, world)
    batches = load_steps(config, schedule, collate, cache, world, start_step=steps_done, sense_bank=bank)
    tracker = _track(config, world, inputs, pair, run_recipe, start, overwrite=overwrite)
    if fit is not None:
        tracker.log_metrics({"width_map/r_squared": fit.r_squared}, 0)
    if world.device.type == "cpu":  # not before, so that what loading the models took and freed is returned
        keep_freed_memory()
    return Run(config, world, run_recipe, schedule, steps_done, pair, batches, tracker, began)


def _claim(config: Config, run_recipe: Recipe, *, resume: bool, overwrite: bool) -> int | None:
    """Locks the run for this job, and returns the step of the checkpoint to start from; None to start from scratch."""
    # After a restart, the previous process may still be ending.
    wait_s = LOCK_PATIENCE_S if resume else 0.0
    # An export or evaluation also holds this lock while it sends the run's results to MLflow.
    purpose = f"trains run {config.run!r}, or sends its results to MLflow"
    hold_lock(kinds.run_lock_path(config, config.run), purpose, wait_s=wait_s)
    remove_leftovers(kinds.checkpoint_folder(config))
    if overwrite:
        return None  # the old checkpoints stay until the first new one is complete
    newest = checkpoint.latest(config, verify=True)
    if newest is None:
        return None
    checkpoint.require_same_run(newest, run_recipe, config)
    if not resume and not newest.is_final:
        raise UserError(
            f"{newest.path}: run {config.run!r} was stopped at step {newest.step} of "
            f"{newest.manifest.facts['total_steps']}; continue with --resume, or start from scratch with --overwrite"
        )
    return newest.step


def _load_models(
    config: Config, world: World, inputs: TrainingInputs, schedule: Schedule, start: checkpoint.Checkpoint | None
) -> ModelPair:
    """Loads teacher and student, the latter with the weights and the optimizer's state of the checkpoint `start`."""
    pair = load_pair(
        config,
        world,
        inputs.teacher,
        inputs.student,
        margin=margin_of(config, inputs.shards),
        accumulation_steps=schedule.accumulation_steps,
        source=inputs.source,
        load_universal=needs_universal(start, world),
    )
    report_teacher(config, pair)
    # Check disk space and rehearse the export before a checkpoint changes the student's weights.
    require_space(pair.engine, config)
    rehearse_export(pair, inputs.student, config, world)
    if start is not None:
        load_checkpoint(pair, start, world)
    return pair


def _track(
    config: Config,
    world: World,
    inputs: TrainingInputs,
    pair: ModelPair,
    run_recipe: Recipe,
    start: checkpoint.Checkpoint | None,
    *,
    overwrite: bool,
) -> Tracker:
    """Starts a run in MLflow, or resumes the one that the checkpoint `start` names."""
    facts = {} if start is None else start.manifest.facts
    steps_done = 0 if start is None else start.step
    tracker = start_tracking(
        config,
        world,
        tags=tags_of(inputs, pair, world),
        datasets=lambda: datasets_of(config, inputs),
        curves=curve_titles(),
        start=Start(
            recipe=digest_of_json([run_recipe.config, run_recipe.inputs]),
            first_step=steps_done,
            run_id=facts.get("mlflow_run_id"),
            device_hours=facts.get("device_hours", 0.0),
            overwrite=overwrite,
        ),
    )
    coverage = inputs.shards.facts["coverage"]
    tracker.log_metrics({f"coverage/{name}": share for name, share in coverage.items()}, steps_done)
    return tracker
