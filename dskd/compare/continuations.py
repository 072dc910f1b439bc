"""Continuations of the same prompts by the compared models."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from dskd.artifacts.manifest import read_file
from dskd.config import Config
from dskd.errors import UserError
from dskd.evaluation.continued_texts import CONTINUATIONS_TABLE, ContinuationTable, parse_continuations
from dskd.evaluation.evaluations import HELD_OUT
from dskd.evaluation.models import TEACHER, UNTRAINED_STUDENT
from dskd.tracking import TrackedRun, read_artifact

_LONGEST_PROMPT = 160  # characters that are shown of a prompt, its last ones


@dataclass(frozen=True)
class Continuations:
    """A prompt, and how models continue it, in one line each."""

    prompt: str
    continuations: Sequence[tuple[str, str]]  # name of the model, and its continuation
    itself: str  # how the text itself continues; empty if the prompt is a request


def read_continuations(config: Config, runs: Sequence[TrackedRun], references: Sequence[str]) -> list[Continuations]:
    """Returns the prompts of the first model that has any, with the continuations of all models that have them too.

    `runs` are tracked; `references` are names of models that are evaluated in the work directory.
    """
    models = list(_read(config, runs, references))
    if not models:
        return []
    models.sort(key=lambda model: (model.name != TEACHER, model.name != UNTRAINED_STUDENT))  # otherwise as they come
    first = models[0].table
    return [
        Continuations(
            _end_of(prompt),
            [
                (model.label, _line(model.continuation_of[prompt]))
                for model in models
                if prompt in model.continuation_of
            ],
            _line(first.texts_themselves.get(prompt, "")),
        )
        for prompt in models[0].continuation_of
    ]


@dataclass(frozen=True)
class _Model:
    """A model whose continuations were found."""

    name: str
    label: str  # its name, or its name and id if several runs have that name
    table: ContinuationTable

    @property
    def continuation_of(self) -> Mapping[str, str]:
        """{prompt: its continuation}."""
        return self.table.of_models.get(self.name, {})


def _read(config: Config, runs: Sequence[TrackedRun], references: Sequence[str]) -> Iterator[_Model]:
    for name in references:
        folder = HELD_OUT.folder_of(config, name)
        if (content := read_file(folder, CONTINUATIONS_TABLE)) is not None:
            yield _Model(name, name, _parse(content, str(folder / CONTINUATIONS_TABLE)))
    names = [*references, *(run.name for run in runs)]
    for run in runs:
        label = run.name if names.count(run.name) == 1 else run.label
        if HELD_OUT.tag in run.tags and (content := read_artifact(config, run.run_id, CONTINUATIONS_TABLE)) is not None:
            table = _parse(content, f"artifact {CONTINUATIONS_TABLE} of run {run.name} ({run.run_id})")
            yield _Model(run.name, label, table)


def _parse(content: bytes, source: str) -> ContinuationTable:
    try:
        return parse_continuations(content)
    except ValueError as error:
        raise UserError(f"{source}: {error}; evaluate it again with `{HELD_OUT.made_by}`") from None


def _end_of(prompt: str) -> str:
    line = _line(prompt)
    return line if len(line) <= _LONGEST_PROMPT else f"… {line[-_LONGEST_PROMPT:].partition(' ')[2]}"


def _line(text: str) -> str:
    """Returns a text in one line, with a mark for characters that cannot be printed."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in " ".join(text.split()))
