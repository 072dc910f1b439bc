"""The text of a study with everything that the teacher says about it, in memory: what training and measures read.

Everything is of the shards in a work directory, which the pipeline wrote with `annotation.store: [teacher_states,
trunk_states]`, and of the sense dictionary. Shapes: S sequences, T tokens, D hidden, K = kappa, V vocabulary.
"""

import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.quality.teacher import Teacher, run_layers
from dskd import shards
from dskd.artifacts import kinds
from dskd.artifacts.manifest import Manifest
from dskd.artifacts.mds import INDEX, read_samples
from dskd.config import Config
from dskd.corpus.sequences import position_ids_of
from dskd.errors import UserError
from dskd.lexicon.wordnet import open_wordnet
from dskd.senses.dictionary import SenseDictionary
from dskd.shards.schema import ANTONYM_ROWS, OWN_ROWS, SYNONYM_ROWS, TEACHER_STATES, TRUNK_STATES

_MOST_WORDS = 8  # synonyms or antonyms of a target, one token each, that count in the study's own terms


@dataclass(frozen=True)
class Text:
    """Sequences of a split. States are float32, and 0 after a sequence's last target."""

    name: str  # digest of its tokens
    teacher: str  # digest of the teacher whose states these are
    input_ids: torch.Tensor  # [S, T] int64
    labels: torch.Tensor  # [S, T] int64, the token after each position
    loss_mask: torch.Tensor  # [S, T] bool
    document_starts: torch.Tensor  # [S, T] bool
    teacher_states: torch.Tensor  # [S, T, D], after the final norm
    trunk_states: torch.Tensor  # [S, T, D], those that enter the teacher's layer `trunk_depth`
    trunk_depth: int
    rows: dict[str, torch.Tensor]  # {OWN_ROWS, SYNONYM_ROWS, ANTONYM_ROWS: [S, T, K] int64, padded with -1}
    antonym_distance: float  # the mean of the teacher's distances |t - s|²/D to antonyms' rows

    @functools.cached_property
    def position_ids(self) -> torch.Tensor:
        """The position [S, T] of each token in its document."""
        found = position_ids_of(self.document_starts.long())
        return torch.arange(self.input_ids.shape[1]).expand_as(self.input_ids) if found is None else found

    @functools.cached_property
    def lexical(self) -> torch.Tensor:
        """True [S, T] where the target has a synonym or antonym in the dictionary."""
        return (self.rows[SYNONYM_ROWS][..., 0] >= 0) | (self.rows[ANTONYM_ROWS][..., 0] >= 0)

    @functools.cached_property
    def is_before_another(self) -> torch.Tensor:
        """True [S, T] where the next position has states, too: before a sequence's last target."""
        return self.loss_mask.flip(-1).cumsum(-1).flip(-1) > self.loss_mask.long()

    def attention_mask(self, at: torch.Tensor) -> torch.Tensor:
        """Returns which positions each position of the sequences `at` [B] sees: [B, 1, T, T] bool."""
        documents = self.document_starts[at].cumsum(-1)
        same = documents.unsqueeze(-1) == documents.unsqueeze(-2)
        return (same & torch.ones(same.shape[1:], dtype=torch.bool).tril()).unsqueeze(1)

    def __len__(self) -> int:
        return len(self.input_ids)


def load_text(config: Config, split: str, teacher: Teacher) -> Text:
    """Loads a split of the shards. Those of held-out text hold no states, so these are computed here.

    Raises:
        UserError: when the shards are missing or damaged, or hold no float32 states.
    """
    manifest = shards.load_manifest(config, split)
    trained = manifest if split == "train" else shards.load_manifest(config, "train")
    stored = shards.StoredStates.of(trained)
    folder = config.path(kinds.SHARDS.folder, split)
    if stored is None or set(stored.columns) != {TEACHER_STATES, TRUNK_STATES} or stored.dtype != "float32":
        raise UserError(
            f"{folder}: the study needs shards with teacher_states and trunk_states in float32; set annotation.store "
            "to [teacher_states, trunk_states] and precision to fp32, and make them again with "
            f"`{kinds.SHARDS.made_by}`"
        )
    columns: dict[str, list[np.ndarray]] = {}
    for sample in read_samples(folder / INDEX):
        for name, value in sample.items():
            columns.setdefault(name, []).append(np.array(value))
    tokens = torch.from_numpy(np.stack(columns["input_ids"])).long()
    empty = torch.empty(0)
    text = Text(
        name_of(manifest),
        str(trained.teacher),
        tokens,
        torch.nn.functional.pad(tokens[:, 1:], (0, 1)),
        torch.from_numpy(np.stack(columns["loss_mask"])).bool(),
        torch.from_numpy(np.stack(columns["document_starts"])).bool(),
        empty,
        empty,
        stored.trunk_depth,
        {name: torch.from_numpy(np.stack(columns[name])).long() for name in (OWN_ROWS, SYNONYM_ROWS, ANTONYM_ROWS)},
        manifest.facts["teacher_antonym_distance"],
    )
    if TEACHER_STATES in columns:
        states = (_padded(columns[name], tokens.shape[1]) for name in (TEACHER_STATES, TRUNK_STATES))
    else:
        lower, upper = range(stored.trunk_depth), range(stored.trunk_depth, teacher.num_layers)
        trunk = run_layers(teacher, tuple(lower), text)
        states = (run_layers(teacher, tuple(upper), text, trunk, with_norm=True), trunk)
    last, trunk = states
    return dataclasses.replace(text, teacher_states=last, trunk_states=trunk)


def name_of(manifest: Manifest) -> str:
    """Returns the digest of the tokens in shards."""
    return str(manifest.facts.get("text", manifest.digest))


def file_of_text(folder: Path, kind: str, text: Text, of: str = "") -> Path:
    """Returns the file of what is computed once from a text and its teacher."""
    return folder / f"{kind}-{text.name[:16]}-{text.teacher[:16]}{of and '-'}{of}.safetensors"


def _padded(states: list[np.ndarray], length: int) -> torch.Tensor:
    padded = torch.zeros(len(states), length, states[0].shape[-1])
    for row, values in zip(padded, states, strict=True):
        row[: len(values)] = torch.from_numpy(values)
    return padded


def parts_of(text: Text) -> dict[str, torch.Tensor]:
    """Splits held-out sequences into {"validation": those to choose on, "test": those that no choice uses}, as indices.

    Documents are packed end to end, so one that is cut continues in the next sequence. To keep every document in one
    part only, sequences between the parts are left out, up to and including the first in which a document begins.

    Raises:
        UserError: when nothing is left for one of the parts.
    """
    begins = text.document_starts[:, 1:].any(-1).tolist()
    half = len(begins) // 2
    left_out = next((row for row in range(half, len(begins)) if begins[row]), len(begins))
    if not half or left_out + 1 >= len(begins):
        raise UserError(
            f"{len(begins)} held-out sequences cannot be split between documents; raise corpus.max_validation_sequences"
        )
    return {"validation": torch.arange(half), "test": torch.arange(left_out + 1, len(begins))}


@dataclass(frozen=True)
class Words:
    """Facts about the words that are tokens of the vocabulary."""

    related: torch.Tensor  # [V, 2 · _MOST_WORDS] int64: synonyms, then antonyms, one token each, padded with -1
    random: torch.Tensor  # the same with other words of about the same frequency in the training text
    senses: torch.Tensor  # [V] float32, the number of WordNet's synsets of the word; at least 1
    senses_of_others: torch.Tensor  # [V], that of another word with senses, of about the same frequency
    counts: torch.Tensor  # [V], occurrences in the training text

    @classmethod
    def of(cls, dictionary: SenseDictionary, teacher: Teacher, text: Text) -> "Words":
        """Collects them for the training text."""
        size = dictionary.vocab_size
        counts = torch.bincount(text.labels[text.loss_mask], minlength=size).float()
        related = torch.full((size, 2 * _MOST_WORDS), -1)
        for number, relation in enumerate(("synonym", "antonym")):
            neighbours = dictionary.entries.neighbours(relation)
            for token in (neighbours.offsets.diff() > 0).nonzero().squeeze(-1).tolist():
                start, stop = neighbours.offsets[token : token + 2].tolist()
                tokens = [entry for entry in neighbours.values[start:stop].tolist() if entry < size][:_MOST_WORDS]
                related[token, number * _MOST_WORDS : number * _MOST_WORDS + len(tokens)] = torch.tensor(tokens).long()
        others = similar_words(counts, related.ge(0).any(-1))
        senses = _numbers_of_senses(teacher.tokenizer, size)
        of_others = senses[similar_words(counts, senses > 0)]
        exchanged = torch.where(related >= 0, others[related.clamp(min=0)], -1)
        return cls(related, exchanged, senses.clamp(min=1), of_others.clamp(min=1), counts)


def similar_words(counts: torch.Tensor, is_word: torch.Tensor) -> torch.Tensor:
    """Returns for each token [V] another one with about the same count, by a fixed shuffle; of words, words.

    Tokens are sorted by their counts and exchanged among 64 neighbours of this order.
    """
    result = torch.arange(len(counts))
    generator = torch.Generator().manual_seed(0)
    for group in (is_word, ~is_word):
        members = group.nonzero().squeeze(-1)
        order = members[counts[members].argsort(stable=True)]
        for near in order.split(64):
            shuffled = near[torch.randperm(len(near), generator=generator)]
            result[shuffled] = shuffled.roll(1)  # a cycle: no token is exchanged with itself, unless it is alone
    return result


def _numbers_of_senses(tokenizer: Any, size: int) -> torch.Tensor:
    reader = open_wordnet().reader
    numbers = torch.zeros(size)
    for token in range(min(size, len(tokenizer))):
        word = tokenizer.decode([token])
        if word.startswith(" ") and word[1:].isalpha():
            numbers[token] = len(reader.synsets(word[1:].lower()))
    return numbers


def work_folder(config: Config) -> Path:
    """Returns the folder for what the study computes once for all trainings."""
    folder = config.path("quality")
    folder.mkdir(parents=True, exist_ok=True)
    return folder
