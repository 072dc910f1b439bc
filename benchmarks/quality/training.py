"""One training of the study: plain torch on stored states, and the loss of `dskd`.

The sense loss gets its rows and positions as `launcher/train.py` draws them. Shapes: B sequences, T tokens, D hidden.
"""

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.quality.settings import Settings
from benchmarks.quality.teacher import Student
from benchmarks.quality.terms import lexical_divergence, synonym_targets
from benchmarks.quality.text import Text, Words
from dskd.losses.head import DistillationHead, HeadSizes, Normalizers
from dskd.random_numbers import derived_seed, uniform
from dskd.senses.dictionary import SenseDictionary
from dskd.shards.schema import ANTONYM_ROWS, OWN_ROWS, SYNONYM_ROWS
from dskd.training.collator import Collator
from dskd.training.distribution_candidates import CandidateRows
from dskd.training.muon import Float32Muon
from dskd.training.positions import SensePositions

_MOST_GRADIENT = 1.0  # norm, as in `dskd`
_MICRO_BATCH = 8  # sequences: more would not be faster, and need more memory


@dataclass(frozen=True)
class Material:
    """The inputs of trainings."""

    text: Text
    states: torch.Tensor  # [S, T, D], those that enter the student's upper layers
    words: Words
    entropy: torch.Tensor  # [S, T], of the teacher
    dictionary: SenseDictionary
    vectors: torch.Tensor  # of the dictionary


@dataclass(frozen=True)
class Cost:
    """The cost of a training. CPU seconds hardly grow if others use the machine."""

    steps: int
    tokens: int
    positions: int  # in the loss
    cpu_seconds: float


def train(student: Student, material: Material, settings: Settings, seed: int) -> Cost:
    """Trains a student in place.

    Raises:
        FloatingPointError: when the loss is not finite.
    """
    torch.manual_seed(seed)
    text, trained = material.text, student.trained()
    optimizers = _optimizers(trained, settings)
    steps = max(1, round(settings.epochs * len(text) / settings.batch_size))
    weights = _position_weights(material, settings)
    head = _head(student, settings)
    batches = _batches(material, settings, seed, steps)
    began, positions, tokens = time.process_time(), 0, 0
    for step, (sequences, mask, senses) in enumerate(batches):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = _rate(settings, step, steps)
        count, tokens = int(mask.sum()), tokens + sequences.numel() * text.input_ids.shape[1]
        positions += count
        for number, at in enumerate(sequences.split(_MICRO_BATCH)):
            part = slice(number * _MICRO_BATCH, number * _MICRO_BATCH + len(at))
            hidden = student(material.states[at], text.position_ids[at], text.attention_mask(at))
            loss = _loss(head, hidden, material, settings, at, mask[part], weights, count, senses[number])
            if not loss.isfinite():
                raise FloatingPointError(f"the loss of step {step + 1} is {loss.item()}")
            loss.backward()
        nn.utils.clip_grad_norm_(list(trained.values()), _MOST_GRADIENT)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return Cost(steps, tokens, positions, time.process_time() - began)


def _loss(
    head: DistillationHead,
    hidden: torch.Tensor,
    material: Material,
    settings: Settings,
    at: torch.Tensor,
    mask: torch.Tensor,
    weights: torch.Tensor | None,
    count: int,
    senses: dict[str, Any] | None,
) -> torch.Tensor:
    """Returns the part of a step's mean loss that the sequences `at` have; `count` positions count in the step."""
    text = material.text
    counted = 0 if senses is None else senses.pop("count")
    drawn = None
    if weights is not None:
        drawn = weights[at]
    loss, _ = head(
        hidden,
        labels=text.labels[at],
        loss_mask=mask,
        normalizers=Normalizers(targets=1 / max(count, 1), senses=1 / max(counted, 1)),
        teacher_hidden=text.teacher_states[at],
        senses=senses,
        token_weights=drawn,
    )
    if settings.lexical_divergence or settings.synonym_targets:
        own, teacher, targets = hidden[mask], text.teacher_states[at][mask], text.labels[at][mask]
        related = (material.words.related if settings.lexical_words == "related" else material.words.random)[targets]
        share = len(targets) / max(count, 1)
        if settings.lexical_divergence:
            value = lexical_divergence(own, teacher, head.weight.detach(), targets, related, settings.temperature)
            loss = loss + settings.lexical_divergence * share * value
        if settings.synonym_targets:
            synonyms = related[:, : related.shape[-1] // 2]
            value = synonym_targets(own, teacher, head.weight.detach(), targets, synonyms, settings.synonym_targets)
            loss = loss + settings.ce_weight * share * value
    return loss


def _head(student: Student, settings: Settings) -> DistillationHead:
    matrix = student.output_matrix
    sizes = HeadSizes.of(None, len(matrix), matrix.device)
    teacher = matrix.detach().clone() if matrix.requires_grad else None
    return DistillationHead(matrix, teacher, settings.loss, chunk_size=sizes.chunk, block_size=sizes.block)


def _batches(
    material: Material, settings: Settings, seed: int, steps: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor, list[dict[str, Any] | None]]]:
    """Yields the sequences [B] of each step, the positions [B, T] bool that count, and each micro-batch's senses."""
    text, size = material.text, settings.batch_size
    places = torch.arange(text.input_ids.numel()).view_as(text.input_ids)
    draw = SensePositions.of(settings.loss, seed)
    candidates = None
    if settings.sense_weight and settings.sense_form == "distribution":
        candidates = CandidateRows.of(settings.loss, seed, material.dictionary.num_rows)
    collate = Collator(None, draw, micro_batch_size=_MICRO_BATCH, candidates=candidates)
    order: list[int] = []
    epoch = -1
    for step in range(steps):
        while len(order) < size:
            epoch += 1
            generator = torch.Generator().manual_seed(derived_seed(seed, "order", epoch))
            order += torch.randperm(len(text), generator=generator).tolist()
        chosen, order = torch.tensor(order[:size]), order[size:]
        mask = text.loss_mask[chosen]
        if settings.position_share < 1:
            mask = mask & (uniform(derived_seed(seed, "positions", step), places[chosen]) < settings.position_share)
        senses: list[dict[str, Any] | None] = [None] * -(-size // _MICRO_BATCH)
        if settings.sense_weight:
            chosen, mask, senses = _with_senses(material, collate, chosen, mask, step, epoch)
        yield chosen, mask, senses


def _with_senses(
    material: Material, collate: Collator, chosen: torch.Tensor, mask: torch.Tensor, step: int, epoch: int
) -> tuple[torch.Tensor, torch.Tensor, list[dict[str, Any] | None]]:
    """Returns a step's sequences and positions in the collator's order, with the senses of its micro-batches."""
    text = material.text
    samples = []
    for number, row in enumerate(chosen.tolist()):
        sample = {
            "input_ids": text.input_ids[row].numpy(),
            # All positions with a target: which of them get a sense term does not depend on `position_share`.
            "loss_mask": text.loss_mask[row].numpy().astype(np.uint8),
            "document_starts": text.document_starts[row].numpy().astype(np.uint8),
            **{name: text.rows[name][row].numpy() for name in (OWN_ROWS, SYNONYM_ROWS, ANTONYM_ROWS)},
        }
        samples.append(sample | {"sample_id": number, "epoch": epoch, "step": step})
    batches = collate(samples)
    order = torch.cat([batch["sample_ids"] for batch in batches])
    senses, total = [], 0
    for batch in batches:
        found = _lengthened(batch["senses"], batch["input_ids"].shape[1], text.input_ids.shape[1])
        total += sum(len(value) for name, value in found.items() if name.endswith("positions"))
        senses.append(found | {"sense_rows": material.vectors})
    return chosen[order], mask[order], [found | {"count": total} for found in senses]


def _lengthened(senses: Mapping[str, torch.Tensor], trimmed: int, length: int) -> dict[str, torch.Tensor]:
    """Returns senses with positions into B·T of the whole sequences; the collator trims them."""
    return {
        name: value // trimmed * length + value % trimmed if name.endswith("positions") else value
        for name, value in senses.items()
    }


def _position_weights(material: Material, settings: Settings) -> torch.Tensor | None:
    """Returns the weights [S, T] of the positions in CE and KL, whose mean over the text's targets is 1."""
    text, words = material.text, material.words
    if settings.weights == "equal":
        return None
    found = {
        "lexical": lambda: 1 + text.lexical.float(),  # twice the others'; with power .585, 1.5 times
        "senses": lambda: 1 + words.senses[text.labels].log2(),
        "senses of others": lambda: 1 + words.senses_of_others[text.labels].log2(),
        "rarity": lambda: 1 + (words.counts.sum() / words.counts[text.labels].clamp(min=1)).log2(),
        "entropy": lambda: 0.1 + material.entropy,
    }[settings.weights]()
    found = found**settings.weights_power
    return found / found[text.loss_mask].mean()


def _optimizers(trained: Mapping[str, nn.Parameter], settings: Settings) -> list[torch.optim.Optimizer]:
    matrices = [value for name, value in trained.items() if value.ndim == 2 and name != "output_matrix"]
    others = [value for value in trained.values() if not any(value is matrix for matrix in matrices)]
    found: list[torch.optim.Optimizer] = []
    if settings.optimizer == "muon":
        found.append(Float32Muon(matrices, settings.learning_rate))
    else:
        others = [*matrices, *others]
    if others:
        betas = (0.9, settings.beta2)
        found.append(torch.optim.AdamW(others, settings.learning_rate, betas=betas, weight_decay=settings.weight_decay))
    return found


def _rate(settings: Settings, step: int, steps: int) -> float:
    warmup = round(settings.warmup * steps)
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    passed = (step - warmup) / max(1, steps - warmup)
    shape = 0.5 * (1 + math.cos(math.pi * passed)) if settings.decay == "cosine" else 1 - passed
    return settings.learning_rate * shape
