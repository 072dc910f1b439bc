"""Which trainings of the study are next, and doing them in this process, one after the other.

Finished trainings are skipped, so the same command resumes. Two arms that try the same settings share a training.
"""

import datetime
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality.arms import ARMS, BY_NAME, LOOK_SEEDS, TEST_SEEDS, TUNING_SEED, Arm
from benchmarks.quality.measures import BY_TEXT, describe, measure
from benchmarks.quality.pairs import Pairs
from benchmarks.quality.questions import Questions, folder_of
from benchmarks.quality.results import (
    TEACHER,
    UNTRAINED,
    Result,
    Stage,
    append_result,
    chosen_values,
    read_results,
    require_same_judges,
    require_same_source,
    settings_of_length,
)
from benchmarks.quality.separation import Examples
from benchmarks.quality.settings import Settings
from benchmarks.quality.teacher import Student, Teacher, lower_states, run_layers
from benchmarks.quality.terms import entropies
from benchmarks.quality.text import Text, Words, file_of_text, load_text, parts_of, work_folder
from benchmarks.quality.training import Cost, Diverged, Material, train
from benchmarks.report import machine, processor
from dskd.artifacts.hashing import digest_of_json
from dskd.artifacts.lock import lock_if_free
from dskd.config import Config
from dskd.console import say
from dskd.errors import UserError
from dskd.lexicon.relations import load_lexicon
from dskd.senses.dictionary import load_dictionary, map_vectors

DIVERGED = dict.fromkeys(BY_TEXT, math.nan) | {"kl": math.inf}  # measures of a training that diverged
_WAIT_S = 5.0  # between two checks of other processes' trainings, on which more trainings may depend


@dataclass(frozen=True)
class Training:
    """A training of the study, finished or not."""

    stage: Stage
    arm: Arm
    seed: int
    value: object
    settings: Settings
    length: int = 0  # tokens that the stage "length" asks for
    values_of: str = ""  # another text, whose values come before those chosen on this one


def planned_trainings(
    results: Sequence[Result],
    text: str,
    names: Sequence[str],
    seeds: Sequence[int] = TEST_SEEDS,
    values_of: str = "",
) -> Iterator[Training]:
    """Yields the trainings in order; those that depend on a value that is not chosen yet are left out.

    Args:
        results: the results so far.
        text: the name of the text.
        names: the arms to train, with those that they build on; empty for all.
        seeds: of the test; none for tuning alone.
        values_of: another text, whose chosen values are tested on this one. Of the arms without a value there, only
            those in `names` are tuned, on this text.

    Raises:
        UserError: when the value of an arm that they build on is not chosen on `values_of` yet.
    """
    wanted = _with_bases(names)
    known: dict[str, Any] = {}
    if values_of:
        require_values(results, values_of, names)
        known = chosen_values(results, values_of, wanted)
        wanted = known.keys() | set(names)
    chosen = chosen_values(results, text, wanted, values_of)
    for arm in ARMS:
        if arm.name in wanted - known.keys() and (arm.based_on is None or arm.based_on in chosen):
            for value in arm.values(chosen):
                yield Training("tune", arm, TUNING_SEED, value, arm.settings(chosen, value))
    for seed in seeds:  # seed by seed, so that an early end leaves complete pairs
        for name, value in chosen.items():
            if BY_NAME[name].tested:
                settings = BY_NAME[name].settings(chosen, value)
                yield Training("test", BY_NAME[name], seed, value, settings, values_of=values_of)


def planned_lengths(
    results: Sequence[Result],
    text: str,
    names: Sequence[str],
    seeds: Sequence[int],
    lengths: Sequence[int],
    text_tokens: int,
    values_of: str = "",
) -> Iterator[Training]:
    """Yields the trainings of arms with their chosen values on other numbers of tokens, the shortest first.

    An arm that tuning lets read the text once reads it `lengths` / `text_tokens` times; one that reads half of it in
    the same time reads half as much of each length. Values that were chosen on the text `values_of` come before those
    of this one.

    Raises:
        UserError: when an arm's value is not chosen yet.
    """
    names = names or [arm.name for arm in ARMS if arm.tested]
    chosen = chosen_values(results, text, _with_bases(names), values_of)
    if missing := [name for name in names if name not in chosen]:
        raise UserError(
            f"--length: the value of {missing[0]!r} is not chosen yet; tune it first, without --length and --looks"
        )
    for length in sorted(lengths):
        for seed in seeds:
            for name in names:
                settings = BY_NAME[name].settings(chosen, chosen[name])
                longer = settings_of_length(settings, length, text_tokens)
                yield Training("length", BY_NAME[name], seed, chosen[name], longer, length, values_of)


def planned_looks(names: Sequence[str], seeds: Sequence[int] = LOOK_SEEDS) -> Iterator[Training]:
    """Yields the looks at arms, seed by seed; without `names` at all that change layers or loss."""
    for seed in seeds:
        for arm in ARMS:
            if arm.name in names or (not names and (arm.tested or arm.tuned is None)):
                yield Training("look", arm, seed, arm.look, arm.look_settings())


def _with_bases(names: Sequence[str]) -> set[str]:
    wanted: set[str] = set()
    for name in names or BY_NAME:
        arm: Arm | None = BY_NAME[name]
        while arm is not None:
            wanted.add(arm.name)
            arm = None if arm.based_on is None else BY_NAME[arm.based_on]
    return wanted


def require_arms(names: Sequence[str]) -> None:
    """Checks that there are arms with these names.

    Raises:
        UserError: when there is one without.
    """
    if unknown := [name for name in names if name not in BY_NAME]:
        raise UserError(f"--arms: there is no {unknown[0]!r}; the arms are {', '.join(BY_NAME)}")


def require_values(results: Sequence[Result], values_of: str, names: Sequence[str]) -> None:
    """Checks that a text has the values that arms need: their own, or those of the arms that they build on.

    Raises:
        UserError: when a value is missing, or with no `names` that of `kd`.
    """
    chosen = chosen_values(results, values_of, _with_bases(names))
    bases = [BY_NAME[name].based_on or name for name in names if name not in chosen]
    missing = [name for name in (bases if names else ("kd",)) if name not in chosen]
    if missing:
        texts = ", ".join(sorted({result.text for result in results})) or "none"
        raise UserError(
            f"--values-of {values_of}: the value of {missing[0]!r} is not chosen on this text yet (texts with results: "
            f"{texts}); tune it there first, without --values-of"
        )


class Runner:
    """A runner that does the trainings on one text and saves their results."""

    def __init__(
        self,
        config: Config,
        name: str,
        path: Path,
        pairs: Sequence[Path] = (),
        questions: Sequence[str] = (),
        device: str = "cpu",
        *,
        separation: bool = False,
    ) -> None:
        """Loads the teacher and the text.

        Args:
            config: the study's config, whose shards exist.
            name: the name of the text in the results.
            path: the results file.
            pairs: files of synonyms and antonyms; none to leave these measures out.
            questions: places of benchmarks (:func:`benchmarks.quality.questions.folder_of`), which students that tuning
                tries do not answer.
            device: of the teacher and of training.
            separation: measure how well states tell the senses of a word apart, in students that tuning does not try.

        Raises:
            UserError: when a file cannot be used, or the results of this name have another source or other judges.
        """
        self._config, self._name, self._path = config, name, path
        self._teacher = Teacher.load(config, device)
        self._text, self._held_out = (load_text(config, split, self._teacher) for split in ("train", "validation"))
        self._parts = parts_of(self._held_out)
        dictionary, manifest = load_dictionary(config)
        self._words = Words.of(dictionary, self._teacher, self._text)
        vectors = torch.from_numpy(map_vectors(dictionary.path).copy()).view(torch.bfloat16)
        self._material = Material(
            self._text, self._text.trunk_states, self._words, self._entropy(), dictionary, vectors
        )
        self._judges: dict[str, Pairs | Questions | Examples] = {}
        self._files: dict[str, str] = {}
        if separation:
            self._judges["separation"] = Examples.of(config)
            self._files["separation"] = "WordNet's examples"
        if pairs:
            known = {frozenset((relation.head, relation.tail)) for relation in load_lexicon(config)}
            self._judges["pairs"] = Pairs.read(pairs, self._teacher, known)
            self._files["pairs"] = ", ".join(file.name for file in pairs)
        for benchmark, folder in map(folder_of, questions):
            self._judges[benchmark] = Questions.read(benchmark, str(folder), self._teacher)
            self._files[benchmark] = folder.name
        self._source = describe_source(self._teacher, self._text, self._held_out, manifest.digest)
        results = read_results(path)
        require_same_source(results, path, name, self._source)
        require_same_judges(results, path, name, self._files)
        self._cut: tuple[int, ...] = ()
        self._lower: dict[str, torch.Tensor] = {}

    def run(
        self,
        names: Sequence[str],
        seeds: Sequence[int],
        budget_s: float,
        *,
        looks: bool = False,
        lengths: Sequence[int] = (),
        values_of: str = "",
    ) -> bool:
        """Does all trainings that are not done yet; returns False if the time is over first.

        Several processes can do this at once: each takes a training that no other process is doing.

        Args:
            names: the arms, empty for all.
            seeds: of the test, or the looks; none for tuning alone.
            budget_s: no training starts after so many seconds.
            looks: do the looks instead.
            lengths: numbers of tokens; do the arms with their chosen values on these instead.
            values_of: another text of the results, whose chosen values come before those of this one.
        """
        require_arms(names)
        started = time.monotonic()
        self._keep_references()
        while True:
            is_busy = False
            results = read_results(self._path)
            done = {result.identity for result in results}
            if looks:
                planned = planned_looks(names, seeds)
            elif lengths:
                tokens = self._text.input_ids.numel()
                planned = planned_lengths(results, self._name, names, seeds, lengths, tokens, values_of)
            else:
                planned = planned_trainings(results, self._name, names, seeds, values_of)
            for training in planned:
                empty = self._result(training, Cost(0, 0, 0, 0.0), {})
                if empty.identity in done:
                    continue
                if time.monotonic() - started > budget_s:
                    say("the time is over; the same command continues from here")
                    return False
                name = f"{training.stage}{training.length or ''}-{training.arm.name}-{training.value}-{training.seed}"
                lock = work_folder(self._config) / f".{name}.lock"
                with lock_if_free(lock) as is_ours:
                    done = {result.identity for result in read_results(self._path)}
                    if is_ours and empty.identity not in done:
                        self._train(training)
                        break  # start over: the result may make other trainings possible
                    is_busy = is_busy or not is_ours
            else:
                if not is_busy:
                    return True
                time.sleep(_WAIT_S)

    def _train(self, training: Training) -> None:
        student = Student(self._teacher, training.settings)
        states = self._lower_states(student, "text")
        value = "" if training.arm.tuned is None else f" {training.arm.tuned} {training.value}"
        name = f"{training.stage} {training.arm.name}{value}, seed {training.seed}"
        try:
            cost = train(student, replace(self._material, states=states), training.settings, training.seed)
        except Diverged as error:
            # A result like any other: its KL is infinite, so that it is not chosen, and not tried again.
            append_result(self._path, self._result(training, error.cost, DIVERGED))
            say(f"{name}: it diverged ({error})")
            return
        result = self._result(training, cost, self._measure(student, training.stage, is_final=training.stage != "tune"))
        append_result(self._path, result)
        say(f"{name}: {describe(result.measures)}; {cost.steps} steps, {cost.cpu_seconds:.0f} s of CPU")

    def _measure(self, student: Student, stage: Stage, *, is_final: bool) -> dict[str, float]:
        """Returns the measures of a student; if it is not `is_final`, as one that tuning tries, without slow ones."""
        at = self._parts["test" if stage in ("test", "length") else "validation"]
        held_out = self._lower_states(student, "held-out")
        student.eval()
        with torch.no_grad():
            states = torch.cat(
                [
                    student(
                        held_out[part], self._held_out.position_ids[part], self._held_out.attention_mask(part)
                    ).cpu()
                    for part in at.split(8)
                ]
            )
        matrix = self._teacher.output_matrix
        found = measure(states, student.output_matrix.detach(), matrix, self._held_out, at, self._words)
        for name, judge in self._judges.items():
            if isinstance(judge, Pairs) or is_final:
                found |= judge.measure(student, self._lower_states(student, name))
        return found

    def _lower_states(self, student: Student, of: str) -> torch.Tensor:
        """Returns the states that enter the student's upper layers, of one cut at a time because they are large."""
        if self._cut != student.frozen:
            self._cut, self._lower = student.frozen, {}
        if of not in self._lower:
            if of in self._judges:
                self._lower[of] = run_layers(self._teacher, student.frozen, self._judges[of])
            else:
                text = self._text if of == "text" else self._held_out
                self._lower[of] = lower_states(self._teacher, student.frozen, text, work_folder(self._config))
        return self._lower[of]

    def _keep_references(self) -> None:
        """Saves the measures of the teacher and of the untrained student, again if there are new judges."""
        wanted = {name for judge in self._judges.values() for name in judge.measures}
        done = {
            (result.text, result.arm, result.stage)
            for result in read_results(self._path)
            if wanted <= result.measures.keys()
        }
        everything = Settings(layers=self._teacher.num_layers, train_layers=2)
        for name, settings in ((TEACHER, everything), (UNTRAINED, Settings())):
            for stage in ("tune", "test"):
                if (self._name, name, stage) not in done:
                    student = Student(self._teacher, settings)
                    result = self._result(
                        Training(stage, Arm(name, ""), 0, None, settings),
                        Cost(0, 0, 0, 0.0),
                        self._measure(student, stage, is_final=True),
                    )
                    append_result(self._path, result)
                    say(f"{name}, {stage}: {describe(result.measures)}")

    def _entropy(self) -> torch.Tensor:
        """Returns the teacher's entropy [S, T] on the text, computed once."""
        from safetensors.torch import load_file, save_file

        file = file_of_text(work_folder(self._config), "entropy", self._text)
        if not file.is_file():
            found = torch.zeros(self._text.input_ids.shape)
            found[self._text.loss_mask] = entropies(
                self._text.teacher_states[self._text.loss_mask], self._teacher.output_matrix
            )
            partial = file.with_suffix(".partial")
            save_file({"entropy": found}, partial)
            partial.rename(file)
        return load_file(file)["entropy"]

    def _result(self, training: Training, cost: Cost, measures: dict[str, float]) -> Result:
        return Result(
            self._name,
            training.stage,
            training.arm.name,
            training.seed,
            training.settings,
            training.value,
            measures,
            cost.steps,
            cost.tokens,
            cost.positions,
            round(cost.cpu_seconds, 1),
            datetime.date.today().isoformat(),
            _where(self._teacher.device),
            self._teacher.device.type,
            self._source,
            {name: files for name, files in self._files.items() if measures.keys() & set(self._judges[name].measures)},
            training.length,
            training.values_of,
        )


def describe_source(teacher: Teacher, text: Text, held_out: Text, dictionary: str) -> dict[str, Any]:
    """Returns what binds results to a text, a teacher and a sense dictionary, whose digest is given.

    These are the digest of all of them, and facts for the report: the teacher's shape, the tokens of the training text
    and of a sequence, and the positions of each part of the held-out text.
    """
    model = teacher.causal_lm.config
    return {
        "digest": digest_of_json([text.name, held_out.name, text.teacher, dictionary]),
        "teacher": f"{model.model_type}, {teacher.num_layers} layers of width {model.hidden_size}, "
        f"{model.vocab_size:,} tokens",
        "tokens": text.input_ids.numel(),
        "sequence": text.input_ids.shape[1],
        **{part: int(held_out.loss_mask[at].sum()) for part, at in parts_of(held_out).items()},
    }


def _where(device: torch.device) -> str:
    found = machine()
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {found['torch']}"
    return f"{processor()}, {found['threads']} of {found['cores']} cores, torch {found['torch']}"
