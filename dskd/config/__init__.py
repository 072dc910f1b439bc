"""The typed, frozen configuration of an experiment: its sections and keys, with their defaults and meanings.

This file has the top-level keys. One file can describe several training runs that share everything up to the shards:
`runs` maps a run's name to the keys in which it differs, and `run` names the one that a process trains.

section     the base class of sections, and the type of paths
data        the sections `corpus`, `wordnet`, `lexicon`, `senses` and `annotation`
server_url  the URL of a server that writes texts: its check, and its form for records
models      the sections `teacher` and `student`
loss_terms  the table of the loss's terms: their weights, names, denominators, labels, and what they read
training    the sections `loss`, `train`, `tracking` and `pipeline`
evaluation  the sections `evaluation` and `tasks`
reading     reads a configuration from a YAML file and overrides
yaml_file   reads YAML: numbers such as 5e-5, no duplicate keys, and the line of each key
runs        chooses one of the file's runs, with one of its seeds
messages    describes keys, and explains mistakes
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from dskd.config.data import TEACHER_STATES as TEACHER_STATES
from dskd.config.data import TRUNK_STATES as TRUNK_STATES
from dskd.config.data import AnnotationConfig, CorpusConfig, LexiconConfig, SensesConfig, WordNetConfig
from dskd.config.evaluation import TASKS as TASKS
from dskd.config.evaluation import EvaluationConfig, TasksConfig
from dskd.config.models import TRUNK_IS_OFF as TRUNK_IS_OFF
from dskd.config.models import FromScratchConfig as FromScratchConfig
from dskd.config.models import NewStudentConfig as NewStudentConfig
from dskd.config.models import Spacing as Spacing
from dskd.config.models import StudentConfig, TeacherConfig
from dskd.config.models import no_trunk_to_store as no_trunk_to_store
from dskd.config.section import PathText, Section
from dskd.config.training import LossConfig, PipelineConfig, TrackingConfig, TrainConfig
from dskd.errors import UserError

# Folders and files are named after runs, and file systems allow names of 255 bytes; the rest is for prefixes, suffixes.
LONGEST_RUN_NAME = 128


def _usable_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ValueError(
            f"{name!r} cannot name a run: expected letters, digits, '.', '_' and '-', a letter or digit first"
        )
    if len(name) > LONGEST_RUN_NAME:
        raise ValueError(
            f"a run's name has at most {LONGEST_RUN_NAME} characters, with the -sSEED of `seeds`, and this one has "
            f"{len(name)}; shorten it"
        )
    if name in ("teacher", "student"):
        raise ValueError(
            f"{name!r} is reserved: evaluations use this name for another model; choose another name for the run"
        )
    return name


def _each_once(seeds: tuple[int, ...]) -> tuple[int, ...]:
    if again := sorted({seed for seed in seeds if seeds.count(seed) > 1}):
        raise ValueError(
            f"{', '.join(map(str, again))} occurs more than once: runs with the same seed are the same run"
        )
    return seeds


def _different_folders(runs: dict[str, Any]) -> dict[str, Any]:
    seen: dict[str, str] = {}
    for name in runs:
        if (other := seen.setdefault(name.lower(), name)) != name:
            raise ValueError(
                f"{other!r} and {name!r} differ in capitals only, which some file systems do not tell apart; rename one"
            )
    return runs


RunName = Annotated[str, AfterValidator(_usable_name)]


class Config(Section):
    """The whole experiment. Relative paths start at the current directory.

    In paths of a config file, ~ and environment variables ($NAME or ${NAME}) are expanded; $$ is a dollar sign.
    Top-level keys that begin with x- are ignored, except that they can hold YAML anchors to merge elsewhere
    (<<: *NAME).
    """

    workdir: PathText = Field(
        min_length=1,
        description="folder for every artifact of this experiment; here and in all other paths ~, $NAME and ${NAME} "
        "are expanded, and $$ is a dollar sign",
    )
    run: RunName = Field(
        "dskd",
        description="name of the run to train; default: dskd if `runs` is empty or has it, otherwise its first",
    )
    runs: Annotated[dict[RunName, dict[str, Any]], AfterValidator(_different_folders)] = Field(
        {}, description="runs by name, each with the keys in which it differs"
    )
    seed: int = Field(0, ge=0, lt=2**63, description="seed of every random choice, except those of tasks.seed")
    seeds: Annotated[tuple[Annotated[int, Field(ge=0, lt=2**63)], ...], AfterValidator(_each_once)] = Field(
        (),
        description="train each run with each of these seeds, as RUN-s0, …; what all runs share is made with the first",
    )
    precision: Literal["auto", "bf16", "fp32"] = Field(
        "auto", description="type to compute in; auto: bf16 if the hardware has it"
    )
    teacher: TeacherConfig
    corpus: CorpusConfig = CorpusConfig()  # type: ignore[call-arg]
    wordnet: WordNetConfig = WordNetConfig()  # type: ignore[call-arg]
    lexicon: LexiconConfig = LexiconConfig()  # type: ignore[call-arg]
    senses: SensesConfig = SensesConfig()  # type: ignore[call-arg]
    annotation: AnnotationConfig = AnnotationConfig()  # type: ignore[call-arg]
    student: StudentConfig = StudentConfig()  # type: ignore[call-arg]
    loss: LossConfig = LossConfig()  # type: ignore[call-arg]
    train: TrainConfig = TrainConfig()  # type: ignore[call-arg]
    tracking: TrackingConfig = TrackingConfig()  # type: ignore[call-arg]
    evaluation: EvaluationConfig = EvaluationConfig()  # type: ignore[call-arg]
    tasks: TasksConfig = TasksConfig()  # type: ignore[call-arg]
    pipeline: PipelineConfig = PipelineConfig()  # type: ignore[call-arg]

    def problems(self) -> Iterator[str]:
        """Yields messages about sections that do not fit together."""
        yield from self._without_a_trunk()
        if self.annotation.continuation_tokens and self.corpus.packing != "none":
            yield "annotation.continuation_tokens needs corpus.packing: none, in which each text is a sample of its own"
        if self.corpus.source == "chat":
            if self.annotation.continuation_tokens:
                yield "annotation.continuation_tokens: chats (corpus.source: chat) have their answers; set it to 0"
            if self.teacher.path is None:
                yield "corpus.source: chat needs teacher.path: a teacher trained from scratch has no chat template"

        if self.corpus.source == "teacher" and self.teacher.path is None:
            yield (
                "corpus.source: teacher needs teacher.path: a teacher that is trained from scratch learns from the "
                "corpus, and cannot write it"
            )

    def _without_a_trunk(self) -> Iterator[str]:
        """Yields why there is no shared trunk, if one is to be stored, or is required and nothing provides its states.

        Some reasons depend on the teacher; annotation and `dskd plan`, which know it, give these.
        """
        store = self.annotation.store
        if TRUNK_STATES in store and (reason := self.student.why_no_trunk):
            yield no_trunk_to_store(reason)
        if (
            (self.student.shared_trunk == "on" and self.teacher.mode == "auto" and self.loss.needs_teacher)
            and TEACHER_STATES in store
            and TRUNK_STATES not in store
        ):
            yield (
                "student.shared_trunk: on needs the trunk's states, but training reads the teacher's from the shards "
                "and computes no trunk; set annotation.store to [teacher_states, trunk_states], or teacher.mode to "
                "resident or zero3"
            )

    def require_stored(self) -> None:
        """Checks that annotation stores what training reads with teacher.mode: cached.

        Training itself does not check this: it looks at the shards, which may have been made with another config.

        Raises:
            UserError: naming all keys that do not fit.
        """
        if self.teacher.mode == "cached" and (problems := list(self._missing_in_new_shards())):
            raise UserError("; ".join(problems))

    def _missing_in_new_shards(self) -> Iterator[str]:
        """Yields what teacher.mode: cached would read from the shards, and `annotation` does not store."""
        store = self.annotation.store
        if TEACHER_STATES not in store:
            if self.loss.reads("teacher_probabilities") and not self.annotation.teacher_top_n:
                yield (
                    "teacher.mode: cached needs annotation.store: [teacher_states], or annotation.teacher_top_n, how "
                    "many tokens are stored (64, say)"
                )
            for term in self.loss.readers("teacher_states"):
                key, change = term.key_that_reads("teacher_states", self.loss)
                yield (
                    f"{key} needs the teacher's states, which teacher.mode: cached reads from the shards; set "
                    f"annotation.store to [teacher_states], or teacher.mode to resident or zero3, or {change}"
                )
        if self.student.shared_trunk == "on" and TRUNK_STATES not in store:
            yield (
                "student.shared_trunk: on needs a teacher in training, or annotation.store: [teacher_states, "
                "trunk_states], and teacher.mode: cached loads no teacher"
            )

    @property
    def run_names(self) -> tuple[str, ...]:
        """Names of the runs that the file describes, in its order."""
        return tuple(self.runs) or (self.run,)

    def path(self, *parts: str) -> Path:
        """Returns a path inside the work directory."""
        return Path(self.workdir).expanduser().joinpath(*parts)
