"""The pipeline: runs all stages in order, and skips each one whose artifact is up to date.

Stages of one process run here; stages of several ranks are started through DeepSpeed's launcher, as a user would start
them. A stage counts as finished if its artifact is up to date: the launcher's exit code is 0 even if its ranks were
killed.
"""

import contextlib
import ctypes
import functools
import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml

from dskd.artifacts import kinds
from dskd.artifacts.building import LOCK_PATIENCE_S
from dskd.artifacts.kinds import Kind
from dskd.artifacts.lock import hold_lock
from dskd.artifacts.manifest import Recipe, is_current
from dskd.cli.launching import StageFailedError, launch
from dskd.config import Config
from dskd.config.reading import load_config
from dskd.console import say
from dskd.corpus import build as corpus
from dskd.corpus import sequences
from dskd.corpus.written import write as writing
from dskd.distributed import stopping
from dskd.distributed.world import World
from dskd.errors import UserError
from dskd.evaluation.programs import PROGRAMS, InPipeline, Program
from dskd.evaluation.results_in_cards import update_cards
from dskd.lexicon import build as lexicon
from dskd.lexicon.wordnet import open_wordnet
from dskd.models.checks.architecture import check_architecture
from dskd.models.files.folder import FindTeacher, find_pretrained_student, find_teacher
from dskd.models.gguf import teacher as gguf_teacher
from dskd.models.limits import vocabulary_size
from dskd.models.structure.trained import trained_layers
from dskd.senses import build as senses
from dskd.shards.recipe import open_inputs, stale_splits
from dskd.students import student
from dskd.students.copies import copies_are_current
from dskd.students.spacing import require_layers
from dskd.training import inputs, teacher_from_scratch
from dskd.training.checkpoints import checkpoint
from dskd.training.exporting import export

LOCK = ".pipeline.lock"  # in the work directory


@dataclass(frozen=True)
class Stage:
    """A step of the pipeline: its name, the check that its artifact is up to date, and the function that builds it."""

    name: str
    is_current: Callable[[], bool]
    build: Callable[[], None]


def run_pipeline(path: Path, overrides: Sequence[str], *, until: str | None = None) -> None:
    """Brings every artifact of the config up to date, and prints the results unless `until` names the last stage to
    run.

    Raises:
        UserError: for errors that the user has to fix.
        StageFailedError: if a stage of several ranks failed.
    """
    stopping.listen()
    config = load_config(path, overrides)
    hold_lock(config.path(LOCK), "runs the pipeline in this work directory", wait_s=LOCK_PATIENCE_S)
    started = time.perf_counter()
    # Found when it is first needed: a teacher that the pipeline makes exists only after its stage. Functions that do
    # not take it find it again, but do not hash its weights again (`digest_cache`).
    teacher = functools.cache(lambda: find_teacher(config))
    if not config.teacher.is_made:
        teacher()  # fails early, before the corpus is read, if the model does not fit
    if config.student.path is not None:
        pretrained = find_pretrained_student(config)  # likewise, and if it lacks layers that are to be trained
        trained_layers(config.student, pretrained.load_config().num_hidden_layers)
    if config.teacher.train_from_scratch is not None:
        require_layers(config.student, config.teacher.train_from_scratch.num_layers)  # before the teacher is trained
    stages = plan_stages(config, path, overrides, teacher)
    if until is not None:
        names = [stage.name for stage in stages]
        if until not in names:
            raise UserError(f"--until {until}: there is no such stage; stages of this config: {', '.join(names)}")
        stages = stages[: names.index(until) + 1]
    current: list[str] = []
    is_checked = config.teacher.path is None  # the architecture of a teacher from scratch is known to work
    for stage in stages:
        if stage.is_current():
            current.append(stage.name)
            continue
        if not is_checked and stage.name != kinds.TEACHER.name:
            check_architecture(teacher(), config.corpus)
            require_layers(config.student, teacher().load_config().num_hidden_layers)
            is_checked = True
        if current:
            say(f"up to date: {', '.join(current)}")
            current = []
        stage.build()
        if not stage.is_current():
            raise StageFailedError(f"stage {stage.name!r} ended without its artifact")
    if current:
        say(f"up to date: {', '.join(current)}")
    if until is None:
        from dskd.cli.results import describe_results  # here: it imports scipy.stats and matplotlib, for a second

        update_cards(config)
        print(
            f"\n{describe_results(config, teacher())}\n\nPipeline finished in {time.perf_counter() - started:.0f} s.",
            flush=True,
        )


def plan_stages(config: Config, path: Path, overrides: Sequence[str], teacher: FindTeacher) -> list[Stage]:
    """Returns the stages in the order of the data flow. The single-process stages come before those of several ranks,
    except for the texts that the teacher writes, of which the corpus is made.

    `teacher` finds the teacher. The stages after that of the teacher call it.
    """
    stage = functools.partial(_stage, config)
    ranks = functools.partial(_on_ranks, config, path, overrides)

    def shards_are_current() -> bool:
        return not stale_splits(config, open_inputs(config, teacher()))

    def senses_are_current() -> bool:
        if config.senses.path is not None:
            return True
        opened = senses.open_inputs(config, teacher())
        return is_current(config.path(kinds.SENSES.folder), senses.recipe(config, opened))

    def build_sequences() -> None:
        folder = teacher()
        vocab_size = vocabulary_size(folder.load_config())
        sequences.build_sequences(config, folder.tokenizer, folder.tokenizer_digest, vocab_size)

    def student_is_current() -> bool:
        recipe = student.recipe(config, teacher())
        return is_current(config.path(kinds.STUDENT.folder), recipe) and copies_are_current(config, teacher())

    def write() -> None:
        writing.write_texts(config, World(0, 1, 0, torch.device("cpu")))

    from_gguf, written, from_scratch = [], [], []
    if config.teacher.is_gguf:
        from_gguf = [
            stage(kinds.TEACHER, lambda: gguf_teacher.recipe(config), lambda: gguf_teacher.build_teacher(config))
        ]
    if config.corpus.source == "teacher":
        build = ranks("write_texts.py") if config.corpus.server is None else write
        written = [stage(kinds.WRITTEN, lambda: writing.recipe(config, teacher()), build)]
    if config.teacher.train_from_scratch is not None:
        from_scratch = [
            stage(
                kinds.TEACHER,
                lambda: teacher_from_scratch.recipe(config),
                lambda: teacher_from_scratch.build_teacher(config),
            )
        ]
    stages = [
        *from_gguf,  # first, so that a file that does not fit is refused before the corpus is read
        stage(kinds.LEXICON, lambda: lexicon.recipe(config), lambda: lexicon.build_lexicon(config)),
        *written,
        stage(kinds.CORPUS, lambda: corpus.recipe(config, teacher), lambda: corpus.build_corpus(config, teacher)),
        *from_scratch,  # trained on the corpus
        stage(kinds.SEQUENCES, lambda: sequences.recipe(config, teacher().tokenizer_digest), build_sequences),
        Stage(kinds.STUDENT.name, student_is_current, lambda: student.build_student(config, teacher())),
        Stage(kinds.SENSES.name, senses_are_current, ranks("build_senses.py")),
        Stage(kinds.SHARDS.name, shards_are_current, ranks("annotate.py")),
    ]
    for name in config.run_names:
        run_config = load_config(path, [*overrides, run_override(name)])
        run_config.require_stored()
        stages += _run_stages(run_config, path, overrides, teacher)
    return stages + _evaluation_stages(config, path, overrides, teacher)


def _stage(config: Config, kind: Kind, recipe: Callable[[], Recipe], build: Callable[[], None]) -> Stage:
    """Returns the stage that builds the artifact of this kind, which is up to date if it has this recipe."""
    return Stage(kind.name, lambda: is_current(config.path(kind.folder), recipe()), build)


def _on_ranks(
    config: Config, path: Path, overrides: Sequence[str], program: str, *arguments: str
) -> Callable[[], None]:
    """Returns a function that runs a program of `launcher/` on all ranks."""

    def start() -> None:
        release_memory()
        launch(config, program, ["--config", str(path), *arguments, *overrides])

    return start


def _run_stages(config: Config, path: Path, overrides: Sequence[str], teacher: FindTeacher) -> list[Stage]:
    """Returns the stages of one run: training and export. `teacher` finds the teacher."""

    def run_recipe() -> Recipe:
        return inputs.recipe(config, inputs.load_inputs(config, teacher()))

    def is_finished() -> bool:
        return checkpoint.is_finished(config, run_recipe())

    def build() -> None:
        recipe = run_recipe()
        newest = checkpoint.latest(config)
        # As everywhere in the pipeline, checkpoints of another config are stale and replaced; their tracked run stays.
        is_stale = newest is not None and bool(checkpoint.changes_since(newest, recipe))
        flag = "--overwrite" if is_stale else "--resume"
        _on_ranks(config, path, [*overrides, run_override(config.run)], "train.py", flag)()

    def exported() -> bool:
        newest = checkpoint.latest(config)
        return newest is not None and export.is_exported(config, newest)

    return [
        Stage(f"train {config.run}", is_finished, build),
        Stage(f"export {config.run}", exported, lambda: export.build_export(config)),
    ]


def _evaluation_stages(config: Config, path: Path, overrides: Sequence[str], teacher: FindTeacher) -> list[Stage]:
    """Returns a stage for each evaluation that the config asks for. `teacher` finds the teacher."""

    def stage(program: Program, part: InPipeline, names: Sequence[str]) -> Stage:
        option = [f"--{program.option}"] if program.option else []
        start = _on_ranks(config, path, overrides, "evaluate.py", *option, *names)
        return Stage(part.stage, lambda: part.are_current(config, names, teacher()), start)

    return [
        stage(program, part, names)
        for program in PROGRAMS
        if (part := program.in_pipeline) is not None and (names := part.names(config)) is not None
    ]


def release_memory() -> None:
    """Gives back what earlier stages left in the memory of this process, which waits while ranks need the machine's."""
    open_wordnet.cache_clear()  # hundreds of megabytes of parsed synsets
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # only glibc has it, and only it keeps freed tensors
        ctypes.CDLL(None).malloc_trim(0)


def run_override(name: str) -> str:
    """Returns the override that selects a run; the name is quoted if YAML would read it as a number or a boolean."""
    return f"run={name}" if yaml.safe_load(name) == name else f'run="{name}"'
