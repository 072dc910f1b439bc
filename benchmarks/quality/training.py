"""One training of the study: plain torch on stored states, and the loss of `dskd`.

Shapes: S sequences of the text, B of a micro-batch, T tokens, D hidden.
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from benchmarks.quality.senses import MICRO_BATCH, SenseInputs
from benchmarks.quality.settings import Settings
from benchmarks.quality.teacher import Student
from benchmarks.quality.terms import lexical_divergence, synonym_targets
from benchmarks.quality.text import Text, Words
from dskd.losses.head import DistillationHead, HeadSizes, Normalizers
from dskd.random_numbers import derived_seed, uniform
from dskd.senses.dictionary import SenseDictionary
from dskd.training.muon import Float32Muon

_MOST_GRADIENT = 1.0  # norm, as in `dskd`


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
    """The cost of a training. CPU seconds hardly grow if others use the machine; on a GPU they are a clock's."""

    steps: int
    tokens: int
    positions: int  # in the loss
    cpu_seconds: float


class Diverged(FloatingPointError):
    """A loss that is not finite, with the cost of the training so far."""

    def __init__(self, message: str, cost: Cost) -> None:
        """Keeps the cost."""
        super().__init__(message)
        self.cost = cost


def train(student: Student, material: Material, settings: Settings, seed: int) -> Cost:
    """Trains a student in place.

    Raises:
        Diverged: when the loss is not finite.
    """
    torch.manual_seed(seed)
    text, trained = material.text, student.trained()
    sense_map = _sense_map(student, settings)
    optimizers = _optimizers(trained | _named(sense_map), settings)
    steps = max(1, round(settings.epochs * len(text) / settings.batch_size))
    weights = _position_weights(material, settings)
    head = build_head(student, settings, text)
    inputs = None
    if settings.sense_weight:
        vectors = material.vectors.to(student.output_matrix.device)
        inputs = SenseInputs(text, material.dictionary, vectors, settings, seed)
    batches = _batches(text, settings, seed, steps, inputs)
    began, positions, tokens = _seconds(student), 0, 0
    for step, (sequences, mask, senses) in enumerate(batches):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * _share_of_rate(settings, step, steps)
        count, tokens = int(mask.sum()), tokens + sequences.numel() * text.input_ids.shape[1]
        positions += count
        for number, at in enumerate(sequences.split(MICRO_BATCH)):
            part = slice(number * MICRO_BATCH, number * MICRO_BATCH + len(at))
            entering = material.states[at], text.position_ids[at], text.attention_mask(at)
            hidden, mapped = _states(student, sense_map, settings, *entering)
            loss = _loss(head, hidden, mapped, material, settings, at, mask[part], weights, count, senses[number])
            if not loss.isfinite():
                cost = Cost(step + 1, tokens, positions, _seconds(student) - began)
                raise Diverged(f"the loss of step {step + 1} is {loss.item()}", cost)
            loss.backward()
        nn.utils.clip_grad_norm_(list(trained.values()), _MOST_GRADIENT)
        nn.utils.clip_grad_norm_(list(_named(sense_map).values()), _MOST_GRADIENT)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return Cost(steps, tokens, positions, _seconds(student) - began)


def _seconds(student: Student) -> float:
    if student.output_matrix.device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def _sense_map(student: Student, settings: Settings) -> nn.Linear | None:
    """Returns the map [D, D] from the states that the sense loss reads to sense embeddings, at first the identity.

    It is trained with the student and not part of it. The states that predict a target need none.
    """
    if not settings.sense_weight or settings.sense_at == "prediction":
        return None
    width = student.output_matrix.shape[1]
    found = nn.Linear(width, width, bias=False)
    nn.init.eye_(found.weight)
    return found.to(student.output_matrix.device)


def _named(sense_map: nn.Linear | None) -> dict[str, nn.Parameter]:
    return {} if sense_map is None else {"sense_map": sense_map.weight}


def _states(
    student: Student,
    sense_map: nn.Linear | None,
    settings: Settings,
    states: torch.Tensor,
    position_ids: torch.Tensor,
    mask: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Returns the last hidden states [B, T, D], and those that the sense loss reads if they are others."""
    if sense_map is None:
        return student(states, position_ids, mask), None
    if settings.sense_at == "middle":
        last, middle = student.forward_from_middle(states, position_ids, mask)
        return last, sense_map(middle)
    last = student(states, position_ids, mask)
    return last, sense_map(last)


def _loss(
    head: DistillationHead,
    hidden: torch.Tensor,
    mapped: torch.Tensor | None,
    material: Material,
    settings: Settings,
    at: torch.Tensor,
    mask: torch.Tensor,
    weights: torch.Tensor | None,
    count: int,
    senses: dict[str, Any] | None,
) -> torch.Tensor:
    """Returns the part of a step's mean loss that the sequences `at` have; `count` positions count in the step."""
    text, device = material.text, hidden.device
    counted = 0 if senses is None else senses.pop("count")
    teacher_states = text.teacher_states[at].to(device)
    loss, _ = head(
        hidden,
        labels=text.labels[at].to(device),
        loss_mask=mask.to(device),
        normalizers=Normalizers(targets=1 / max(count, 1), senses=1 / max(counted, 1)),
        teacher_hidden=teacher_states,
        senses=None if senses is None else {name: value.to(device) for name, value in senses.items()},
        token_weights=None if weights is None else weights[at].to(device),
        mapped=mapped,
    )
    if settings.lexical_divergence or settings.synonym_targets:
        own, teacher, labels = hidden[mask], teacher_states[mask], text.labels[at][mask]
        words = material.words.related if settings.lexical_words == "related" else material.words.random
        related, targets = words[labels].to(device), labels.to(device)
        share = len(targets) / max(count, 1)
        if settings.lexical_divergence:
            value = lexical_divergence(own, teacher, head.weight.detach(), targets, related, settings.temperature)
            loss = loss + settings.lexical_divergence * share * value
        if settings.synonym_targets:
            synonyms = related[:, : related.shape[-1] // 2]
            value = synonym_targets(own, teacher, head.weight.detach(), targets, synonyms, settings.synonym_targets)
            loss = loss + settings.ce_weight * share * value
    return loss


def build_head(student: Student, settings: Settings, text: Text) -> DistillationHead:
    """Returns the head that computes the loss of a training; the text has the teacher's distances for the margin."""
    matrix = student.output_matrix
    sizes = HeadSizes.of(None, len(matrix), matrix.device)
    teacher = matrix.detach().clone() if matrix.requires_grad else None
    margin = None if settings.relative_margin is None else settings.relative_margin * text.antonym_distance
    return DistillationHead(
        matrix, teacher, settings.loss, chunk_size=sizes.chunk, block_size=sizes.block, margin=margin
    )


def _batches(
    text: Text, settings: Settings, seed: int, steps: int, inputs: SenseInputs | None
) -> Iterator[tuple[torch.Tensor, torch.Tensor, Sequence[dict[str, Any] | None]]]:
    """Yields the sequences [B] of each step, the positions [B, T] bool that count, and each micro-batch's senses."""
    size, places = settings.batch_size, torch.arange(text.input_ids.numel()).view_as(text.input_ids)
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
        if inputs is None:
            yield chosen, mask, [None] * -(-size // MICRO_BATCH)
        else:
            yield inputs.of_step(chosen, mask, step, epoch)


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
    others_than_layers = ("output_matrix", "sense_map")
    matrices = [value for name, value in trained.items() if value.ndim == 2 and name not in others_than_layers]
    others = [value for value in trained.values() if not any(value is matrix for matrix in matrices)]
    found: list[torch.optim.Optimizer] = []
    if settings.optimizer == "muon":
        found.append(Float32Muon(matrices, settings.muon_rate))
    else:
        others = [*matrices, *others]
    if others:
        betas = (0.9, settings.beta2)
        found.append(torch.optim.AdamW(others, settings.learning_rate, betas=betas, weight_decay=settings.weight_decay))
    for optimizer in found:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return found


def _share_of_rate(settings: Settings, step: int, steps: int) -> float:
    """Returns which share of its learning rate each optimizer has in a step."""
    warmup = round(settings.warmup * steps)
    if step < warmup:
        return (step + 1) / warmup
    passed = (step - warmup) / max(1, steps - warmup)
    return 0.5 * (1 + math.cos(math.pi * passed)) if settings.decay == "cosine" else 1 - passed
