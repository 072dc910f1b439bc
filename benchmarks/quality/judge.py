"""Measurement of trained students: the measures of `launcher/evaluate.py`, on only one part of the held-out text.

It adds the distance of a student's states to the teacher's on that part and, on the test part, measures of held-out
words (:mod:`dskd.evaluation.lexical`).
"""

import functools
from collections.abc import Iterator

import torch

from benchmarks.quality.measures import ERROR, GEOMETRY, HIDDEN, ITEMS, LEXICAL
from benchmarks.quality.results import CHANCE, LETTERS, TEACHER
from benchmarks.quality.splits import Split, rows_of
from dskd.artifacts import kinds
from dskd.artifacts.manifest import Manifest, read_manifest
from dskd.config import Config
from dskd.distributed.world import World
from dskd.evaluation import held_out_text
from dskd.evaluation.lexical.items import load_items
from dskd.evaluation.lexical.results import Summary
from dskd.evaluation.lexical.run import measure_items
from dskd.evaluation.lexical.scores import summarize
from dskd.inspection.geometry import COMPARISONS, DISTANCES, measure_geometry
from dskd.losses.logits import hidden_distance
from dskd.models.folder import ModelFolder, find_teacher
from dskd.models.frozen import FrozenModel, load_frozen
from dskd.models.output_head import OutputHead
from dskd.senses.dictionary import SenseDictionary
from dskd.students.student import find_student
from dskd.training.exporting.export import find_export

_BATCH_SIZE = 32


class _Part(held_out_text.HeldOutText):
    """One part of the held-out shards, in memory."""

    def __init__(self, config: Config, split: Split, inputs: held_out_text.HeldOutInputs, world: World) -> None:
        super().__init__(config, inputs, world)
        begins = [bool(self._dataset[row]["document_starts"][1:].any()) for row in range(self.num_samples)]
        rows = rows_of(split, begins)
        self._dataset = [self._dataset[row] for row in rows]
        self.num_samples = len(rows)
        self._kept = list(super().batches())

    def batches(self) -> Iterator[dict[str, torch.Tensor]]:
        """Yields the batches from memory."""
        yield from self._kept


class Judge:
    """A judge that measures students of one teacher on one part of the held-out text.

    Args:
        config: config of a work directory with shards.
        split: the part.
        world: the ranks, which must be one.
    """

    def __init__(self, config: Config, split: Split, world: World) -> None:
        self._config, self._world = config, world
        inputs = held_out_text.open_inputs(config, find_teacher(config))
        self._part = _Part(config, split, inputs, world)
        self._predictions: list[torch.Tensor] = []
        teacher = load_frozen(inputs.teacher, config, world)
        examples = held_out_text.measure(teacher, self._part, self._predictions, world, label="teacher")
        self._states = self._read(teacher)
        self._items = load_items(config, _manifest_of_items(config)) if split == "test" else None
        words = self._measure_words(teacher)
        teacher.close()
        self.references: dict[str, dict[str, float]] = {
            TEACHER: examples.values() | _values(words) | _errors(words) | _geometry(inputs.dictionary) | {HIDDEN: 0.0},
            CHANCE: {name: found["chance"] for name, found in words.items()},
            LETTERS: _of_letters(config) if words else {},
        }

    def measure_run(self, config: Config) -> dict[str, float]:
        """Returns {measure: value} of the exported student of a config's run."""
        return self.measure(find_export(config, config.run)[0])

    def measure(self, folder: ModelFolder) -> dict[str, float]:
        """Returns {measure: value} of a model."""
        model = load_frozen(folder, self._config, self._world)
        examples = held_out_text.measure(model, self._part, self._predictions, self._world, label="measuring")
        states = self._read(model)
        words = _values(self._measure_words(model))
        model.close()
        total = sum(float(hidden_distance(*pair)[0]) for pair in zip(states, self._states, strict=True))
        return examples.values() | words | {HIDDEN: total / sum(len(part) for part in states)}

    def measure_student(self) -> dict[str, float]:
        """Returns {measure: value} of the untrained student, as it was cut."""
        return self.measure(find_student(self._config))

    def _measure_words(self, model: FrozenModel) -> Summary:
        """Returns the measures in `LEXICAL` that have items; none on the validation part."""
        if self._items is None:
            return {}
        found, _ = measure_items(model, self._items, _BATCH_SIZE, self._world)
        summary = summarize(found)
        return {name: summary[name] for name in LEXICAL if name in summary}

    def _read(self, model: FrozenModel) -> list[torch.Tensor]:
        """Returns the last hidden states [targets, D] of each batch."""
        return [
            model.read(
                batch["input_ids"], batch.get("position_ids"), functools.partial(_at_targets, mask=batch["loss_mask"])
            )
            for batch in self._part.batches()
        ]


def _values(words: Summary) -> dict[str, float]:
    return {name: found["value"] for name, found in words.items()}


def _errors(words: Summary) -> dict[str, float]:
    errors = {ERROR.format(name): found["standard_error"] for name, found in words.items()}
    return errors | {ITEMS.format(name): found["items"] for name, found in words.items()}


def _manifest_of_items(config: Config) -> Manifest:
    return read_manifest(config.path(kinds.LEXICAL_ITEMS.folder), "lexical-items")


def _of_letters(config: Config) -> dict[str, float]:
    surface = _manifest_of_items(config).facts["surface"]
    return {name: surface[name] for name in LEXICAL if name in surface}


def _geometry(dictionary: SenseDictionary) -> dict[str, float]:
    shares = measure_geometry(dictionary, seed=0)
    if shares is None:
        return {}
    nearer = shares[DISTANCES[0]][COMPARISONS[0]]
    error = {} if nearer.standard_error is None else {ERROR.format(GEOMETRY): nearer.standard_error}
    return {GEOMETRY: nearer.value, ITEMS.format(GEOMETRY): nearer.heads} | error


def _at_targets(hidden: torch.Tensor, _: OutputHead, *, mask: torch.Tensor) -> torch.Tensor:
    return hidden[mask.to(hidden.device)].float().cpu()
