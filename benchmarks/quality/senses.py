"""The inputs of the sense loss in a training of the study: rows of the sense dictionary for each position.

Positions and rows are drawn as `launcher/train.py` draws them. Shapes: S sequences, T tokens, K = kappa.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from benchmarks.quality.settings import Settings
from benchmarks.quality.text import Text, similar_words
from dskd.senses.csr import sums_of_lists
from dskd.senses.dictionary import SenseDictionary
from dskd.shards.schema import ANTONYM_ROWS, OWN_ROWS, SYNONYM_ROWS
from dskd.shards.search import NearestRows, Searcher
from dskd.training.data.collator import Collator
from dskd.training.data.distribution_candidates import CandidateRows
from dskd.training.data.positions import SensePositions

MICRO_BATCH = 8  # sequences: more would not be faster, and need more memory


class SenseInputs:
    """The inputs of the sense loss for the micro-batches of every step."""

    def __init__(
        self, text: Text, dictionary: SenseDictionary, vectors: torch.Tensor, settings: Settings, seed: int
    ) -> None:
        """Finds the rows of all positions.

        Args:
            text: the training text.
            dictionary: the sense dictionary.
            vectors: its vectors.
            settings: those of the training.
            seed: of the draw of positions.
        """
        self._text, self._vectors, self._settings = text, vectors, settings
        self._rows = sense_rows(text, dictionary, settings)
        candidates = None
        if settings.sense_form == "distribution":
            candidates = CandidateRows.of(settings.loss, seed, dictionary.num_rows)
        draw = SensePositions.of(settings.loss, seed)
        self._collate = Collator(None, draw, micro_batch_size=MICRO_BATCH, candidates=candidates)

    def of_step(
        self, chosen: torch.Tensor, mask: torch.Tensor, step: int, epoch: int
    ) -> tuple[torch.Tensor, torch.Tensor, list[dict[str, Any]]]:
        """Returns a step's sequences and positions in the collator's order, with the senses of its micro-batches."""
        text = self._text
        samples = []
        for row in chosen.tolist():
            sample = {
                "input_ids": text.input_ids[row].numpy(),
                # All positions with a target: which of them get a sense term does not depend on `position_share`.
                "loss_mask": text.loss_mask[row].numpy().astype(np.uint8),
                "document_starts": text.document_starts[row].numpy().astype(np.uint8),
                **{name: rows[row].numpy() for name, rows in self._rows.items()},
            }
            samples.append(sample | {"sample_id": row, "epoch": epoch, "step": step})
        batches = self._collate(samples)
        # A sequence that is twice in a step, at the end of one epoch and the start of the next, is the same both times.
        number_of = {row: number for number, row in enumerate(chosen.tolist())}
        order = torch.tensor([number_of[row] for batch in batches for row in batch["sample_ids"].tolist()])
        shift = int(self._settings.sense_at != "prediction")
        senses, total = [], 0
        for batch in batches:
            found = _placed(batch["senses"], batch["input_ids"].shape[1], text.input_ids.shape[1], shift)
            total += sum(len(value) for name, value in found.items() if name.endswith("positions"))
            senses.append(found | {"sense_rows": self._vectors})
        return chosen[order], mask[order], [found | {"count": total} for found in senses]


def _placed(senses: Mapping[str, torch.Tensor], trimmed: int, length: int, shift: int) -> dict[str, torch.Tensor]:
    """Returns senses with positions, `shift` tokens later, into B·T of whole sequences; the collator trims them."""
    return {
        name: value // trimmed * length + value % trimmed + shift if name.endswith("positions") else value
        for name, value in senses.items()
    }


def sense_rows(text: Text, dictionary: SenseDictionary, settings: Settings) -> dict[str, torch.Tensor]:
    """Returns the rows [S, T, K] of the target of every position, its own and those that pull and push, -1 for none."""
    rows = dict(text.rows)
    if settings.sense_words == "random":
        related = text.lexical.unsqueeze(-1)
        found = nearest_rows(text, with_random_words(dictionary), text.lexical, rows[OWN_ROWS].shape[-1])
        for name, values in ((SYNONYM_ROWS, found.synonym_rows), (ANTONYM_ROWS, found.antonym_rows)):
            rows[name] = torch.full_like(rows[name], -1).masked_scatter(related, values.long())
    if settings.antonyms == "nearer":
        rows = _related_only_at(rows, nearer_to_antonyms(text, dictionary))
    elif not settings.sense_own and not settings.synonym_weight:
        # A push alone: at positions without antonyms there is nothing to learn, so none of them is drawn.
        rows = _related_only_at(rows, text.rows[ANTONYM_ROWS][..., 0] >= 0)
    if not settings.sense_own:
        rows[OWN_ROWS] = torch.full_like(rows[OWN_ROWS], -1)
    if settings.sense_at != "prediction":
        unread = ~text.is_before_another.unsqueeze(-1)
        rows = {name: values.masked_fill(unread, -1) for name, values in rows.items()}
    return rows


def _related_only_at(rows: Mapping[str, torch.Tensor], at: torch.Tensor) -> dict[str, torch.Tensor]:
    """Returns the rows [S, T, K] without those of synonyms and antonyms at positions other than `at` [S, T]."""
    others = ~at.unsqueeze(-1)
    return {**rows, **{name: rows[name].masked_fill(others, -1) for name in (SYNONYM_ROWS, ANTONYM_ROWS)}}


def nearest_rows(text: Text, dictionary: SenseDictionary, at: torch.Tensor, count: int) -> NearestRows:
    """Returns the rows that are nearest to the teacher's states at positions `at` [S, T], found as annotation does."""
    searcher = Searcher(dictionary, count, torch.device("cpu"))
    return searcher.search(text.teacher_states[at], text.labels[at])


def with_random_words(dictionary: SenseDictionary) -> SenseDictionary:
    """Returns the dictionary with other words, about as frequent, in the place of all synonyms and antonyms.

    A word's frequency is the number of states that its rows represent. Words without rows stay.
    """
    entries = dictionary.entries
    counts = sums_of_lists(dictionary.counts, dictionary.entry_offsets)
    related = torch.zeros(len(counts), dtype=torch.bool)
    related[torch.cat([entries.synonym_entries, entries.antonym_entries]).long()] = True
    others = torch.where(counts > 0, similar_words(counts.float(), related & (counts > 0)), torch.arange(len(counts)))
    exchanged = {
        name: others[getattr(entries, name).long()].to(getattr(entries, name).dtype)
        for name in ("synonym_entries", "antonym_entries")
    }
    return dataclasses.replace(dictionary, entries=dataclasses.replace(entries, **exchanged))


def nearer_to_antonyms(text: Text, dictionary: SenseDictionary) -> torch.Tensor:
    """Returns True [S, T] where the teacher's state is nearer to a row of the target's antonyms than to any of its
    synonyms: where its geometry is wrong. Both kinds of words must have rows.
    """
    entries = dictionary.entries
    swapped = dataclasses.replace(
        entries, antonym_offsets=entries.synonym_offsets, antonym_entries=entries.synonym_entries
    )
    at = text.rows[ANTONYM_ROWS][..., 0] >= 0
    antonyms = nearest_rows(text, dictionary, at, 1)
    synonyms = nearest_rows(text, dataclasses.replace(dictionary, entries=swapped), at, 1)
    is_nearer = (synonyms.antonym_rows[:, 0] >= 0) & (antonyms.antonym_distance < synonyms.antonym_distance)
    return torch.zeros_like(at).masked_scatter(at, is_nearer)
