"""What a trained student is measured by: the measures of `launcher/evaluate.py` over one part of the held-out text
alone and the distance of its states to the teacher's there; and where it is tested, what it knows of held-out words
(:mod:`dskd.lexical`).
"""

import functools
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.quality.measures import GEOMETRY, HIDDEN, LEXICAL
from benchmarks.quality.splits import Split, rows_of
from dskd import evaluate, shards
from dskd.config import Config
from dskd.distributed import World
from dskd.export import find_export
from dskd.lexical.held_out import build_items, load_items
from dskd.lexical.run import measure_items
from dskd.lexical.scores import summarize
from dskd.losses import hidden_distance
from dskd.model_folder import ModelFolder, find_teacher
from dskd.models import FrozenModel, load_frozen
from dskd.senses.dictionary import load_dictionary
from dskd.senses.geometry import COMPARISONS, DISTANCES, measure_geometry

_TEXTS_AT_ONCE = 32


class _Part(evaluate.HeldOutText):
    """One part of the held-out shards, kept in memory."""

    def __init__(self, config: Config, split: Split, vectors_path: Path, world: World) -> None:
        super().__init__(config, shards.load_manifest(config, "validation"), vectors_path, world)
        begins = [bool(self._dataset[row]["document_starts"][1:].any()) for row in range(self.num_samples)]
        rows = rows_of(split, begins)
        self._dataset = [self._dataset[row] for row in rows]
        self.num_samples = len(rows)
        self._kept = list(super().batches())

    def batches(self) -> Iterator[dict[str, torch.Tensor]]:
        """Yields the batches, as they were read."""
        yield from self._kept


class Judge:
    """Measures students of one teacher on one part of the held-out text.

    Args:
        config: of a work directory with shards.
        split: the part.
        world: one rank.
    """

    def __init__(self, config: Config, split: Split, world: World) -> None:
        self._config, self._world = config, world
        dictionary, _ = load_dictionary(config)
        self._part = _Part(config, split, dictionary.path, world)
        self._predictions: list[torch.Tensor] = []
        teacher = load_frozen(find_teacher(config), config, world)
        examples = evaluate.measure(teacher, self._part, self._predictions, world, label="teacher")
        self._states = self._read(teacher)
        self._items = None
        if split == "test":
            build_items(config, find_teacher(config))
            self._items = load_items(config)
        self.teacher = examples.values() | self._know_words(teacher) | {HIDDEN: 0.0}
        teacher.close()
        geometry = measure_geometry(dictionary, seed=0)
        if geometry is not None:
            self.teacher |= {GEOMETRY: geometry[DISTANCES[0]][COMPARISONS[0]].value}

    def measure_run(self, config: Config) -> dict[str, float]:
        """{measure: value} of the exported student of a config's run."""
        return self.measure(find_export(config, config.run)[0])

    def measure(self, folder: ModelFolder) -> dict[str, float]:
        """{measure: value} of a model."""
        model = load_frozen(folder, self._config, self._world)
        examples = evaluate.measure(model, self._part, self._predictions, self._world, label="measuring")
        states = self._read(model)
        words = self._know_words(model)
        model.close()
        total = sum(float(hidden_distance(*pair)[0]) for pair in zip(states, self._states, strict=True))
        return examples.values() | words | {HIDDEN: total / sum(len(part) for part in states)}

    def _know_words(self, model: FrozenModel) -> dict[str, float]:
        """{measure: value} of LEXICAL, as far as there are items."""
        if self._items is None:
            return {}
        found, _ = measure_items(model, self._items, _TEXTS_AT_ONCE, self._world)
        summary = summarize(found)
        return {name: summary[name]["value"] for name in LEXICAL if name in summary}

    def _read(self, model: FrozenModel) -> list[torch.Tensor]:
        """The last hidden states [targets, D] of each batch."""
        return [
            model.read(
                batch["input_ids"], batch.get("position_ids"), functools.partial(_at_targets, mask=batch["loss_mask"])
            )
            for batch in self._part.batches()
        ]


def _at_targets(hidden: torch.Tensor, _: torch.Tensor, *, mask: torch.Tensor) -> torch.Tensor:
    return hidden[mask.to(hidden.device)].float().cpu()
