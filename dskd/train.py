"""Training a student: loads teacher, student and shards, loops over optimizer steps, checkpoints and tracks.

A run is a function of its config, seed and data: any number of ranks sees the same global batches, and a run that was
stopped and resumed equals one that was not (docs/invariants.md).
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dskd import checkpoint, shards, stopping
from dskd.candidates import Candidates
from dskd.config import Config
from dskd.console import progress_bar, say, stage
from dskd.distributed import World, any_rank, main_first, on_main
from dskd.errors import UserError, listed
from dskd.loader import load_steps
from dskd.lock import hold_lock
from dskd.manifest import LOCK_PATIENCE_S, Manifest, Recipe, digest_of_json, read_manifest, verify_files
from dskd.model_folder import ModelFolder, find_teacher
from dskd.node_cache import open_node_cache
from dskd.pair import load_pair
from dskd.precision import compute_dtype, resolve_precision
from dskd.random_numbers import derived_seed
from dskd.rehearsal import rehearse_export
from dskd.schedule import Schedule, describe_learning_rate, plan_schedule
from dskd.senses.bank import load_bank
from dskd.senses.dictionary import MADE_BY as SENSES_MADE_BY
from dskd.senses.dictionary import dictionary_folder, load_dictionary, require_fitting
from dskd.step import StepResult, train_step
from dskd.student import MADE_BY as STUDENT_MADE_BY
from dskd.student import find_student
from dskd.tracking import Start, describe_dataset, git_commit, start_tracking

# Settings of `train` that change how a run is carried out, and not what comes out but for rounding.
_NOT_IN_RECIPE = {
    *("checkpoint_every", "keep_last", "keep_every", "num_workers", "collective_timeout_s", "shard_cache"),
    *("loss_chunk_size", "compile_losses", "activation_checkpointing", "sense_bank", "shard_remote"),
    *("learning_rate_batch_size", "learning_rate_rule"),  # the recipe has the rate that they give
    "micro_batch_size",
}

# By `loss.sense_form`, beside the other terms.
_SENSE_METRICS = {
    "distance": ("sense", "sense_synonym", "sense_antonym", "sense_own", "active_hinges"),
    "distribution": ("sense", "sense_teacher_entropy"),
}


@dataclass(frozen=True)
class Inputs:
    """What a run is made from, checked to fit together."""

    teacher: ModelFolder
    student: ModelFolder
    senses: Manifest
    shards: Manifest
    vectors_path: Path
    num_senses: int  # rows of the sense dictionary


def recipe(config: Config) -> Recipe:
    """What decides the result of a run. The number of ranks does not."""
    inputs = load_inputs(config)
    return _recipe(config, inputs)


def train(config: Config, world: World, *, resume: bool = False, overwrite: bool = False) -> None:
    """Trains the run `config.run`.

    Args:
        config: the experiment, with the run's keys laid over it.
        world: the ranks.
        resume: go on from the last checkpoint, if there is one.
        overwrite: start from scratch; the run's old checkpoints go when the first new one is whole.

    Raises:
        UserError: when inputs do not fit, or checkpoints exist and neither flag says what to do with them.
    """
    began = time.perf_counter()
    with stage(
        f"train: run {config.run!r}",
        reads=[config.path("student"), config.path(shards.FOLDER, "train"), dictionary_folder(config)],
        writes=checkpoint.folder(config),
    ):
        inputs = main_first(lambda: load_inputs(config))
        on_main(lambda: _verify_inputs(config, inputs))
        wanted = _recipe(config, inputs)
        schedule = main_first(lambda: plan_schedule(config, inputs.shards, world.world_size))
        step = on_main(lambda: _starting_step(config, wanted, resume=resume, overwrite=overwrite))
        start = None if step is None else main_first(lambda: checkpoint.at_step(config, step))
        if start is not None and start.step >= schedule.total_steps:
            say(f"  run {config.run!r} is at its end already: {start.step} of {schedule.total_steps} steps")
            return
        _run(config, world, inputs, wanted, schedule, start, began=began, overwrite=overwrite)


def report_status(config: Config) -> bool:
    """Prints where the run stands, and returns whether it was trained to its end with this very config."""
    newest = checkpoint.latest(config)
    if newest is not None and newest.is_final:  # nobody looks at it again before it is used
        newest = checkpoint.latest(config, verify=True)
    if newest is None:
        print(f"run {config.run!r}: no checkpoint in {checkpoint.folder(config)}")
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


def load_inputs(config: Config) -> Inputs:
    """Finds the inputs of training and refuses what does not fit together.

    Raises:
        UserError: naming both sides of the first misfit.
    """
    teacher, student = find_teacher(config), find_student(config)
    dictionary, senses = load_dictionary(config)
    hidden_size = student.load_config().hidden_size
    require_fitting(
        dictionary, senses, teacher=teacher.digest, tokenizer=teacher.tokenizer_digest, hidden_size=hidden_size
    )
    train_shards = shards.load_manifest(config, "train")
    if _reads_teacher_cache(config):
        shards.require_teacher_cache(config, "train", train_shards)
        _require_one_vocabulary(teacher, student)
    return Inputs(teacher, student, senses, train_shards, dictionary.path, dictionary.num_rows)


def build_collator(config: Config, inputs: Inputs, schedule: Schedule) -> shards.Collator:
    """What makes the batches that the loss of the run reads."""
    loss = config.loss
    positions = candidates = None
    if loss.sense_weight:
        positions = shards.SensePositions.of(loss, derived_seed(config.seed, "train", "positions"))
    if loss.compares_sense_distributions:
        candidates = Candidates.of(loss, derived_seed(config.seed, "train", "candidates"), inputs.num_senses)
    return shards.Collator(
        None if _bank_on_device(config) else inputs.vectors_path,
        positions,
        micro_batch_size=schedule.micro_batch_size,
        candidates=candidates,
        lexical=loss.lexical_weight != 1,
        teacher_cache=_reads_teacher_cache(config),
    )


def load_sense_bank(config: Config, inputs: Inputs, world: World) -> torch.Tensor | None:
    """All sense embeddings [R, D] on the device, where batches bring none."""
    return load_bank(inputs.vectors_path, world.device) if _bank_on_device(config) else None


def _bank_on_device(config: Config) -> bool:
    return config.loss.sense_weight > 0 and config.train.sense_bank == "device"


def _require_one_vocabulary(teacher: ModelFolder, student: ModelFolder) -> None:
    # A distribution over n tokens and the rest cannot be restricted to the tokens that both have.
    sizes = [folder.load_config().vocab_size for folder in (teacher, student)]
    if sizes[0] != sizes[1]:
        raise UserError(
            f"teacher.mode: cached needs teacher and student of one vocabulary size, but {teacher.path} has {sizes[0]} "
            f"tokens and {student.path} has {sizes[1]}; cut the student from the teacher (`dskd student`), or set "
            "teacher.mode to zero3 or resident"
        )


def _reads_teacher_cache(config: Config) -> bool:
    return config.teacher.mode == "cached" and config.loss.kd_weight > 0


def _verify_inputs(config: Config, inputs: Inputs) -> None:
    """Reads every file of the inputs and compares it with its manifest."""
    verify_files(inputs.vectors_path.parent, inputs.senses, made_by=SENSES_MADE_BY)
    student = read_manifest(inputs.student.path, "student", made_by=STUDENT_MADE_BY)
    verify_files(inputs.student.path, student, made_by=STUDENT_MADE_BY)
    shards.require_fitting(
        config,
        "train",
        inputs.shards,
        senses=inputs.senses.digest,
        teacher=inputs.teacher.digest,
        tokenizer=inputs.teacher.tokenizer_digest,
    )


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
    import dskd.shards.dataset  # noqa: F401  # seconds that else the first step would take

    loss, train_settings = config.loss, config.train
    pair = load_pair(
        config,
        world,
        inputs.teacher,
        inputs.student,
        margin=_margin(config, inputs.shards),
        accumulation_steps=schedule.accumulation_steps,
        load_universal=checkpoint.needs_universal(start, world),
    )
    engine = pair.engine
    checkpoint.require_space(engine, config)
    rehearse_export(pair, inputs.student, config, world)
    if start is not None:
        checkpoint.load(engine, start, world, trunk_depth=pair.trunk_depth)
    first_step = start.step if start is not None else 0
    _say_what_runs(config, world, engine, schedule, first_step)
    collate = build_collator(config, inputs, schedule)
    bank = load_sense_bank(config, inputs, world)
    cache = open_node_cache(config.train.shard_cache, world)
    steps = load_steps(config, schedule, collate, cache, world, start_step=first_step, sense_bank=bank)
    facts = start.manifest.facts if start is not None else {}
    tracker = start_tracking(
        config,
        world,
        tags=_tags(config, inputs, world),
        datasets=lambda: _datasets(config, inputs),
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
    with stopping.deferred() as stop_request:  # until the tracked run is marked as ended
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
                        metrics = _metrics(result, config, rate, elapsed, waited)
                        tracker.log_metrics(metrics | {"cost/device_hours": device_hours}, done)
                    bar.set_postfix(loss=f"{result.loss:.4f}", tok_s=f"{result.tokens / elapsed:,.0f}", refresh=False)
                    bar.update(1)
                    is_last = done == schedule.total_steps
                    is_due = done % train_settings.checkpoint_every == 0
                    # Who is asked during a step with a checkpoint does not train one more for another checkpoint.
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
                        checkpoint.save(engine, pair.student_logits, config, wanted, facts, world)
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
    # What was there before a restart may still be ending.
    wait_s = LOCK_PATIENCE_S if resume else 0.0
    # An export or evaluation holds it too, for as long as it tells MLflow of the run.
    what = f"trains run {config.run!r}, or sends its results to MLflow"
    hold_lock(checkpoint.lock_path(config, config.run), what, wait_s=wait_s)
    checkpoint.remove_leftovers(checkpoint.folder(config))
    if overwrite:
        return None  # the old checkpoints stay until the first new one is whole
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


def _recipe(config: Config, inputs: Inputs) -> Recipe:
    train = {key: value for key, value in config.train.as_dict().items() if key not in _NOT_IN_RECIPE}
    train["learning_rate"] = config.train.peak_learning_rate  # however it was given
    student = {key: value for key, value in config.student.as_dict().items() if key.startswith("train_")}
    settings = {
        "loss": config.loss.as_dict(),
        "train": train,
        "student": student,
        "seed": config.seed,
        "precision": resolve_precision(config.precision),
        # Another objective, where the shards have fewer than all tokens.
        "teacher": {"mode": "cached" if _reads_teacher_cache(config) else "loaded"},
    }
    digests = {"student": inputs.student.digest, "shards": inputs.shards.digest, "senses": inputs.senses.digest}
    return Recipe("checkpoint", digests, settings, inputs.teacher.digest, inputs.teacher.tokenizer_digest)


def _margin(config: Config, manifest: Manifest) -> float:
    """The margin in units of |h - s|² / D: the config's, or a multiple of what the teacher itself keeps."""
    if config.loss.relative_margin is None:
        return config.loss.margin
    return config.loss.relative_margin * manifest.facts["teacher_antonym_distance"]


def _tags(config: Config, inputs: Inputs, world: World) -> dict[str, str]:
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


def _datasets(config: Config, inputs: Inputs) -> list[dict[str, Any]]:
    """What the run reads, as MLflow's dataset API has it."""
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


def _metrics(result: StepResult, config: Config, rate: float, elapsed: float, waited: float) -> dict[str, float]:
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


def _say_what_runs(config: Config, world: World, engine: Any, schedule: Schedule, first_step: int) -> None:
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
