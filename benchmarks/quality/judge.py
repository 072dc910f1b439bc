"""What a trained student is measured by, on one part of the held-out text: the measures of `launcher/evaluate.py` over
that part alone, and the distance of its states to the teacher's.
"""

import functools
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.quality.splits import Split, rows_of
from dskd import evaluate, shards
from dskd.config import Config
from dskd.distributed import World
from dskd.export import find_export
from dskd.losses import hidden_distance
from dskd.model_folder import ModelFolder, find_teacher
from dskd.models import FrozenModel, load_frozen
from dskd.senses.dictionary import load_dictionary

HIDDEN = "hidden_distance"  # mean over positions of |h - t|² / D


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
        teacher.close()
        self.teacher = examples.values() | {HIDDEN: 0.0}

    def measure_run(self, config: Config) -> dict[str, float]:
        """{measure: value} of the exported student of a config's run."""
        return self.measure(find_export(config, config.run)[0])

    def measure(self, folder: ModelFolder) -> dict[str, float]:
        """{measure: value} of a model."""
        model = load_frozen(folder, self._config, self._world)
        examples = evaluate.measure(model, self._part, self._predictions, self._world, label="measuring")
        states = self._read(model)
        model.close()
        total = sum(float(hidden_distance(*pair)[0]) for pair in zip(states, self._states, strict=True))
        return examples.values() | {HIDDEN: total / sum(len(part) for part in states)}

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
