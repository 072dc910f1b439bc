"""The student's output head in training, which computes all terms of the loss in one pass over last hidden states.

Logits of student and teacher exist for one chunk of positions at a time. The same pass computes the gradients, so the
memory for logits does not grow with the length of the sequences. The head must be the module that *owns* the output
matrices: ZeRO-3 only gathers a parameter during the forward of its own module, and a matrix is empty outside of it.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from dskd.config import LossConfig
from dskd.losses.logits import hidden_distance, logit_losses
from dskd.losses.sense_distance import sense_loss
from dskd.losses.sense_distribution import sense_divergence
from dskd.losses.terms import DENOMINATORS, SUMS
from dskd.models.running.readouts import TopTokens
from dskd.models.structure.output_head import LogitTransform

# A matrix product needs many positions: with few, it spends its time reading the matrix. The losses pass about twenty
# times through float32 copies of the logits, which are fast if these stay in the caches. So a chunk of positions has
# logits at once, and the losses take them a block at a time. A GPU's chunks are larger here than in
# `dskd.models.running.readouts`, which makes a float32 copy of a whole chunk and has only one matrix product.
_TRAINED_CHUNK_ELEMENTS = {"cpu": 2**20, "cuda": 2**26}
_TILE = 256  # positions: whole tiles of a GPU's matrix products
_BLOCK_ELEMENTS = {"cpu": 2**18, "cuda": 2**23}
_PLAIN = LogitTransform()


class Normalizers(NamedTuple):
    """The factors by which the sums of a micro-batch are multiplied: world_size · accumulation_steps / count.

    The count is over all ranks and accumulation steps, as each term is a sum over all of them. DeepSpeed averages
    gradients over ranks and accumulation steps, and the other factors cancel that.
    """

    targets: float
    senses: float

    def of(self, term: str) -> float:
        """Returns the factor for a term of the loss, as the table :data:`dskd.losses.terms.TERMS` says."""
        factor: float = getattr(self, DENOMINATORS[term])
        return factor


class HeadSizes(NamedTuple):
    """The numbers of positions that the head computes at once."""

    chunk: int  # in a matrix product: the positions that have logits at once
    block: int  # in a pass of the losses

    @classmethod
    def of(cls, configured: int | None, vocab_size: int, device: torch.device) -> "HeadSizes":
        """Returns sizes that suit the device; `configured` replaces that of the chunk."""
        chunk = _TRAINED_CHUNK_ELEMENTS[device.type] // vocab_size // _TILE * _TILE
        return cls(configured or max(_TILE, chunk), max(1, _BLOCK_ELEMENTS[device.type] // vocab_size))


class DistillationHead(nn.Module):
    """The owner of the output matrices, which computes the loss L of :class:`dskd.config.LossConfig`."""

    def __init__(
        self,
        weight: nn.Parameter,
        teacher_weight: torch.Tensor | None,
        loss: LossConfig,
        *,
        chunk_size: int,
        block_size: int | None = None,
        margin: float | None = None,
        compile_losses: bool = False,
        transform: LogitTransform = _PLAIN,
        teacher_transform: LogitTransform = _PLAIN,
    ) -> None:
        """Takes ownership of the student's output matrix `weight` [V, D].

        Args:
            weight: the student's output matrix.
            teacher_weight: the teacher's output matrix [V', D'], which is not trained. None if teacher and student
                share one matrix and it is not trained, or if no term reads the teacher's logits.
            loss: weights and settings of the terms.
            chunk_size: positions whose logits, of the student and perhaps the teacher, exist at once.
            block_size: positions that the losses take at once; None: the whole chunk.
            margin: the margin in units of D, if it differs from `loss.margin`.
            compile_losses: whether to compile the computation on a chunk's logits with torch.compile.
            transform: what the student does with the products of states and output matrix.
            teacher_transform: what the teacher does; not applied to a cached distribution, which is the teacher's.
        """
        super().__init__()
        self.weight = weight
        self.teacher_weight = None if teacher_weight is None else nn.Parameter(teacher_weight, requires_grad=False)
        self.loss = loss
        self.chunk_size = chunk_size
        self.margin = loss.margin if margin is None else margin
        self.transform = transform
        function = functools.partial(_replace_logits, transform, teacher_transform)
        self._replace_logits = _in_blocks(_compiled(function) if compile_losses else function, block_size or chunk_size)

    def forward(
        self,
        hidden: torch.Tensor,
        *,
        labels: torch.Tensor | None = None,
        loss_mask: torch.Tensor | None = None,
        normalizers: Normalizers | None = None,
        teacher_hidden: torch.Tensor | None = None,
        teacher_cache: dict[str, torch.Tensor] | None = None,
        senses: dict[str, torch.Tensor] | None = None,
        token_weights: torch.Tensor | None = None,
        mapped: torch.Tensor | None = None,
    ) -> Any:
        """Returns the loss to call backward on and the sums of its terms, or, without labels, the logits [B, T, V].

        Args:
            hidden: [B, T, D], the student's last hidden states.
            labels: [B, T], the token after each position; only read where `loss_mask` is True.
            loss_mask: [B, T] bool, the positions that count.
            normalizers: the factors for the sums.
            teacher_hidden: [B, T, D'], needed if a term reads the teacher.
            teacher_cache: replaces `teacher_hidden` for the KL: the fields of
                :class:`dskd.models.running.readouts.TopTokens`, [B, T, …] each.
            senses: the batch's inputs for the sense loss in the form that `loss.sense_form` names
                (:mod:`dskd.losses.sense_distance`), with positions as indices into B·T.
            token_weights: [B, T], the weight of each position in CE and KL; None means 1 everywhere.
            mapped: [B, T, D'], the states at the teacher's width, which the hidden and the sense term then read instead
                of `hidden` (:mod:`dskd.training.models.width_map`).

        Returns:
            A scalar, and the detached sums [len(SUMS)] float32 of the terms over this rank's micro-batch, without
            their weights, in the order of :data:`dskd.losses.terms.SUMS`.
        """
        if labels is None:
            return self.transform.apply(F.linear(hidden, self.weight))
        assert loss_mask is not None and normalizers is not None
        flat = hidden.flatten(0, 1)
        # Take only the positions that count, so that no matrix product is spent on padding.
        valid = self.positions(loss_mask)
        teacher_states = None if teacher_hidden is None else teacher_hidden.flatten(0, 1)[valid]
        cache = None
        if teacher_cache is not None:
            cache = TopTokens(**{name: values.flatten(0, 1)[valid] for name, values in teacher_cache.items()})
        if senses is not None and self.loss.sense_form == "distribution":
            assert teacher_hidden is not None
            senses = {**senses, "teacher_hidden": teacher_hidden.flatten(0, 1)}
        flat_mapped = None if mapped is None else mapped.flatten(0, 1)
        # The terms come with their gradients, so autograd is off, and the loss gets the gradients for its backward.
        with torch.no_grad():
            total, sums, hidden_grad, mapped_grad, weight_grad = self._sums_and_gradients(
                flat,
                flat_mapped,
                valid,
                labels.flatten()[valid],
                normalizers,
                teacher_states,
                cache,
                senses,
                None if token_weights is None else token_weights.flatten()[valid],
            )
        gradients = hidden_grad, mapped_grad, weight_grad
        loss = _GivenGradients.apply(total, *gradients, flat, flat_mapped, self.weight)
        assert sums.keys() <= set(SUMS)
        return loss, torch.stack([sums.get(name, total.new_zeros(())) for name in SUMS]).float()

    def positions(self, loss_mask: torch.Tensor) -> torch.Tensor:
        """Returns the indices into B·T of the positions that count."""
        return loss_mask.flatten().nonzero().squeeze(-1)

    def _sums_and_gradients(
        self,
        flat: torch.Tensor,
        flat_mapped: torch.Tensor | None,
        valid: torch.Tensor,
        labels: torch.Tensor,
        normalizers: Normalizers,
        teacher_states: torch.Tensor | None,
        cache: TopTokens | None,
        senses: dict[str, torch.Tensor] | None,
        token_weights: torch.Tensor | None,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Computes the loss, {term: its unweighted sum}, and the loss's gradients.

        The gradients are with respect to all states [N, D], to the mapped states [N, D'], if there are any, and to the
        output matrix [V, D], if it is trained; the latter is accumulated in float32 or wider.
        """
        weights, states = self.loss, flat[valid]
        factors = torch.ones(len(states), 1, dtype=_accumulator(flat), device=flat.device)
        if token_weights is not None:
            factors *= token_weights.unsqueeze(-1)
        ce_scale = weights.ce_weight * normalizers.of("ce")
        kl_scale = weights.kd_weight * weights.temperature**2 * normalizers.of("kl")
        scales = ce_scale * factors, kl_scale * factors
        # Even if the output matrix is frozen, the states need gradients for whatever below them is trained.
        values, at_valid, weight_grad = self._logit_terms(states, labels, teacher_states, cache, scales)
        total = (torch.cat(scales, dim=-1) * values.T).sum()
        sums = dict(zip(("ce", "kl"), values.sum(-1), strict=True))
        # Positions of the sense loss index all N states, so the gradients first move back to their places among these.
        hidden_grad = torch.zeros_like(flat).index_copy_(0, valid, at_valid)
        # The other terms compare states with others of the teacher's width, so they read the mapped ones if there are
        # any. They need no logits, so one call computes each for all positions.
        compared, compared_grad, mapped_grad = flat, hidden_grad, None
        if flat_mapped is not None:
            compared, compared_grad = flat_mapped, (mapped_grad := torch.zeros_like(flat_mapped))
        if weights.hidden_weight:
            assert teacher_states is not None
            scale = weights.hidden_weight * normalizers.of("hidden")
            sums["hidden"], gradient = hidden_distance(compared[valid], teacher_states)
            total += scale * sums["hidden"]
            compared_grad[valid] += gradient.mul_(scale).to(compared_grad.dtype)
        if senses is not None and weights.sense_weight:
            scale = weights.sense_weight * normalizers.of("sense")
            sums |= self._sense_sums(compared, senses, compared_grad, scale)
            total += scale * sums["sense"]
        return total, sums, hidden_grad, mapped_grad, weight_grad

    def _logit_terms(
        self,
        states: torch.Tensor,
        labels: torch.Tensor,
        teacher_states: torch.Tensor | None,
        cache: TopTokens | None,
        scales: tuple[torch.Tensor, torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Computes CE and KL [2, N], and the gradients of their sum with the factors `scales`, [N, 1] each.

        The gradients are with respect to the states [N, D] and, if it is trained, the output matrix [V, D].
        """
        values = states.new_empty(2, len(states), dtype=_accumulator(states))
        at_states = torch.empty_like(states)
        weight_grad = None
        if self.weight.requires_grad:
            weight_grad = torch.zeros_like(self.weight, dtype=_accumulator(self.weight))
        # Chunk by chunk, the logits give the values and their own gradient, which the chain rule turns into gradients
        # with respect to the states and the matrix before the next chunk takes their place.
        # `dskd.models.running.readouts.read_logits` does not fit: the gradients need no logits after their chunk, and
        # teacher and student may share one product.
        for part in self.chunks(len(states)):
            logits, teacher = self._logits(states[part], None if teacher_states is None else teacher_states[part])
            columns = logits, labels[part], *(scale[part] for scale in scales)
            values[:, part] = self._replace_logits(
                self.loss.temperature,
                self.loss.divergence,
                *columns,
                teacher if cache is None else _rows_of(cache, part),
            )
            torch.mm(logits, self.weight, out=at_states[part])
            if weight_grad is not None and weight_grad.dtype == states.dtype:
                weight_grad.addmm_(logits.T, states[part])  # without a second tensor of the matrix's size
            elif weight_grad is not None:
                weight_grad += logits.T @ states[part]
            del logits, teacher, columns  # before the next chunk's logits exist
        return values, at_states, weight_grad

    def chunks(self, count: int) -> list[slice]:
        """Returns the chunks in which `count` positions are computed; only the last can be smaller than the others."""
        return [slice(start, start + self.chunk_size) for start in range(0, count, self.chunk_size)]

    def _sense_sums(
        self, flat: torch.Tensor, senses: dict[str, torch.Tensor], gradient: torch.Tensor, scale: float
    ) -> dict[str, torch.Tensor]:
        """Returns {term: its sum} of the sense loss in the configured form, and adds its gradient to `gradient`."""
        loss = self.loss
        if loss.sense_form == "distribution":
            divergence = sense_divergence(
                flat,
                temperature=loss.sense_temperature,
                distance=loss.sense_distance,
                gradient=gradient,
                scale=scale,
                **senses,
            )
            return {"sense": divergence.total, "sense_teacher_entropy": divergence.teacher_entropy}
        distances = sense_loss(
            flat,
            margin=self.margin,
            synonym_weight=loss.synonym_weight,
            antonym_weight=loss.antonym_weight,
            gradient=gradient,
            scale=scale,
            **senses,
        )
        return {
            "sense": distances.total,
            "sense_synonym": distances.synonym,
            "sense_antonym": distances.antonym,
            "sense_own": distances.own,
            "active_hinges": distances.active_hinges,
            "hinges": distances.hinges,
        }

    def _logits(
        self, states: torch.Tensor, teacher_states: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns the products of states and matrix [n, V] of the student, and of the teacher if a term reads them.

        These are the logits, up to the transform of each model.
        """
        if teacher_states is None or not self.loss.kd_weight:
            return F.linear(states, self.weight), None
        if self.teacher_weight is None:  # one product reads the matrix once for both
            student, teacher = F.linear(torch.cat([states, teacher_states]), self.weight).chunk(2)
            return student, teacher
        return F.linear(states, self.weight), F.linear(teacher_states, self.teacher_weight)


def _replace_logits(
    transform: LogitTransform,
    teacher_transform: LogitTransform,
    temperature: float,
    divergence: str,
    products: torch.Tensor,
    labels: torch.Tensor,
    ce_scale: torch.Tensor,
    kl_scale: torch.Tensor,
    teacher: torch.Tensor | TopTokens | None,
) -> torch.Tensor:
    """Returns CE and KL [2, n] of a chunk's products [n, V], and puts the gradient of their sum in the place of these.

    `teacher` is its products [n, V'], its cached distribution, or None.
    """
    logits = transform.apply(products)
    losses = logit_losses(
        logits,
        labels,
        teacher_transform.apply(teacher) if isinstance(teacher, torch.Tensor) else teacher,
        ce_scale=ce_scale,
        kl_scale=kl_scale,
        temperature=temperature,
        kind=divergence,
    )
    products.copy_(transform.pull_back(losses.gradient, logits))
    return torch.stack([losses.ce, losses.kl])


def _rows_of(column: torch.Tensor | TopTokens | None, rows: slice) -> torch.Tensor | TopTokens | None:
    """Returns some rows of a tensor or of a cached distribution."""
    if isinstance(column, TopTokens):
        return TopTokens(*(field[rows] for field in column))
    return None if column is None else column[rows]


def _in_blocks(function: Callable[..., torch.Tensor], size: int) -> Callable[..., torch.Tensor]:
    """Returns :func:`_replace_logits` for `size` rows at a time."""

    def run(
        temperature: float, divergence: str, products: torch.Tensor, *columns: torch.Tensor | TopTokens | None
    ) -> torch.Tensor:
        blocks = [slice(start, start + size) for start in range(0, len(products), size)]
        values = [
            function(temperature, divergence, products[block], *(_rows_of(column, block) for column in columns))
            for block in blocks
        ]
        return torch.cat(values, dim=-1)

    return run


def _compiled(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Returns the function compiled for any number of rows."""
    compiled = torch.compile(function)

    def run(temperature: float, divergence: str, *columns: torch.Tensor | TopTokens | None) -> torch.Tensor:
        for column in columns:
            tensors = column if isinstance(column, TopTokens) else () if column is None else (column,)
            for tensor in tensors:
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
        return compiled(temperature, divergence, *columns)

    return run


class _GivenGradients(torch.autograd.Function):
    """A loss whose gradients for the states and the output matrix are already known; backward runs only once.

    The gradients are scaled in float32. In bf16 the factor itself, such as 1/3, would be rounded, and would shift all
    gradients in the same direction. The matrix's gradient is scaled in place, since a copy would be the largest tensor
    of the step.
    """

    @staticmethod
    def forward(
        ctx: Any,
        loss: torch.Tensor,
        hidden_grad: torch.Tensor,
        mapped_grad: torch.Tensor | None,
        weight_grad: torch.Tensor | None,
        hidden: torch.Tensor,
        mapped: torch.Tensor | None,
        weight: torch.Tensor,
    ) -> torch.Tensor:
        """Returns `loss`, as a function of `hidden`, `mapped` and `weight` for autograd."""
        ctx.gradients = hidden_grad, mapped_grad, weight_grad, weight.dtype
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *output_grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Returns the gradients, multiplied by the gradient of the loss."""
        *of_states, weight_grad, weight_dtype = ctx.gradients
        del ctx.gradients
        scale = output_grads[0].to(_accumulator(output_grads[0]))
        if weight_grad is not None:
            weight_grad = weight_grad.mul_(scale).to(weight_dtype)
        # `view(1)` gives the scale a dimension, so that the product is computed in its type. A tensor without
        # dimensions would be rounded to the type of the states' gradient first.
        scaled = [
            (gradient * scale.view(1)).to(gradient.dtype) if gradient is not None and is_needed else None
            for gradient, is_needed in zip(of_states, ctx.needs_input_grad[4:6], strict=True)
        ]
        return None, None, None, None, *scaled, weight_grad


def _accumulator(tensor: torch.Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
