"""The student's output head in training, which computes all terms of the loss in one pass over last hidden states.

Logits of student and teacher exist for one chunk of positions at a time. The same pass computes the gradients, so the
memory for logits does not grow with the length of the sequences. The head must be the module that *owns* the output
matrices: ZeRO-3 only gathers a parameter during the forward of its own module, and a matrix is empty outside of it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from dskd.config import LossConfig
from dskd.losses.logits import cached_divergence, cross_entropy, divergence, hidden_distance
from dskd.losses.sense_distance import sense_loss
from dskd.losses.sense_distribution import sense_divergence
from dskd.losses.terms import SUMS
from dskd.models.readouts import TopTokens


class Normalizers(NamedTuple):
    """The factors by which the sums of a micro-batch are multiplied: world_size · accumulation_steps / count.

    The count is over all ranks and accumulation steps, as each term is a sum over all of them. DeepSpeed averages
    gradients over ranks and accumulation steps, and the other factors cancel that.
    """

    targets: float  # for CE, KL and the hidden-state distance
    senses: float  # for the sense loss


class DistillationHead(nn.Module):
    """The owner of the output matrices, which computes the loss L of :class:`dskd.config.LossConfig`."""

    def __init__(
        self,
        weight: nn.Parameter,
        teacher_weight: torch.Tensor | None,
        loss: LossConfig,
        *,
        chunk_size: int,
        margin: float | None = None,
        compile_losses: bool = False,
    ) -> None:
        """Takes ownership of the student's output matrix `weight` [V, D].

        Args:
            weight: the student's output matrix.
            teacher_weight: the teacher's output matrix [V', D'], which is not trained. None if teacher and student
                share one matrix and it is not trained, or if no term reads the teacher's logits.
            loss: weights and settings of the terms.
            chunk_size: positions whose logits exist at one time.
            margin: the margin in units of D, if it differs from `loss.margin`.
            compile_losses: whether to compile the computation on a chunk's logits with torch.compile.
        """
        super().__init__()
        self.weight = weight
        self.teacher_weight = None if teacher_weight is None else nn.Parameter(teacher_weight, requires_grad=False)
        self.loss = loss
        self.chunk_size = chunk_size
        self.margin = loss.margin if margin is None else margin
        self._logit_losses: Callable[..., Any] = torch.compile(_logit_losses) if compile_losses else _logit_losses

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
    ) -> Any:
        """Returns the loss to call backward on and the sums of its terms, or, without labels, the logits [B, T, V].

        Args:
            hidden: [B, T, D], the student's last hidden states.
            labels: [B, T], the token after each position; only read where `loss_mask` is True.
            loss_mask: [B, T] bool, the positions that count.
            normalizers: the factors for the sums.
            teacher_hidden: [B, T, D'], needed if a term reads the teacher.
            teacher_cache: replaces `teacher_hidden` for the KL: the fields of
                :class:`dskd.models.readouts.TopTokens`, [B, T, …] each.
            senses: the batch's inputs for the sense loss in the form that `loss.sense_form` names
                (:mod:`dskd.losses.sense_distance`), with positions as indices into B·T.
            token_weights: [B, T], the weight of each position in CE and KL; None means 1 everywhere.

        Returns:
            A scalar, and the detached sums [len(SUMS)] float32 of the terms over this rank's micro-batch, without
            their weights, in the order of :data:`dskd.losses.terms.SUMS`.
        """
        if labels is None:
            return F.linear(hidden, self.weight)
        assert loss_mask is not None and normalizers is not None
        flat = hidden.flatten(0, 1)
        # Take only the positions that count, so that no matrix product is spent on padding.
        valid = loss_mask.flatten().nonzero().squeeze(-1)
        teacher_states = None if teacher_hidden is None else teacher_hidden.flatten(0, 1)[valid]
        cache = None
        if teacher_cache is not None:
            cache = TopTokens(**{name: values.flatten(0, 1)[valid] for name, values in teacher_cache.items()})
        if senses is not None and self.loss.sense_form == "distribution":
            assert teacher_hidden is not None
            senses = {**senses, "teacher_hidden": teacher_hidden.flatten(0, 1)}
        # The terms come with their gradients, so autograd is off, and the loss gets the gradients for its backward.
        with torch.no_grad():
            total, sums, hidden_grad, weight_grad = self._sums_and_gradients(
                flat,
                valid,
                labels.flatten()[valid],
                normalizers,
                teacher_states,
                cache,
                senses,
                None if token_weights is None else token_weights.flatten()[valid],
            )
        loss = _GivenGradients.apply(total, hidden_grad, weight_grad, flat, self.weight)
        assert sums.keys() <= set(SUMS)
        return loss, torch.stack([sums.get(name, total.new_zeros(())) for name in SUMS]).float()

    def _sums_and_gradients(
        self,
        flat: torch.Tensor,
        valid: torch.Tensor,
        labels: torch.Tensor,
        normalizers: Normalizers,
        teacher_states: torch.Tensor | None,
        cache: TopTokens | None,
        senses: dict[str, torch.Tensor] | None,
        token_weights: torch.Tensor | None,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor, torch.Tensor | None]:
        """Computes the loss, {term: its unweighted sum}, and the loss's gradients.

        The gradients are with respect to all states [N, D] and, if it is trained, the output matrix [V, D]; the latter
        is accumulated in float32 or wider.
        """
        weights, states = self.loss, flat[valid]
        coefficients = _Coefficients(
            # Tensors, because torch.compile would compile the function again for every new Python number.
            ce=torch.tensor(weights.ce_weight * normalizers.targets, dtype=torch.float64),
            kl=torch.tensor(weights.kd_weight * weights.temperature**2 * normalizers.targets, dtype=torch.float64),
            temperature=weights.temperature,
            divergence=weights.divergence,
        )
        # Even if the output matrix is frozen, the states need gradients for whatever below them is trained.
        at_valid = torch.empty_like(states)
        weight_grad = None
        if self.weight.requires_grad:
            weight_grad = torch.zeros_like(self.weight, dtype=_accumulator(self.weight))
        logit_sums = flat.new_zeros(3, dtype=_accumulator(flat))
        # CE and KL, chunk by chunk: the logits of a chunk give its sums and their gradient by the logits, which the
        # chain rule turns into gradients by the chunk's states and by the matrix before the next chunk replaces them.
        # `dskd.models.readouts.read_logits` does not fit: the gradients need no logits after their chunk, and teacher
        # and student may share one product.
        for start in range(0, len(states), self.chunk_size):
            part = slice(start, start + self.chunk_size)
            logits, teacher = self._logits(states[part], None if teacher_states is None else teacher_states[part])
            teacher_distribution = teacher if cache is None else TopTokens(*(values[part] for values in cache))
            token_weights_of_chunk = None if token_weights is None else token_weights[part]
            chunk_sums, logits_grad = self._logit_losses(
                logits, labels[part], teacher_distribution, coefficients, token_weights_of_chunk
            )
            logit_sums += chunk_sums
            logits_grad = logits_grad.to(states.dtype)
            at_valid[part] = logits_grad @ self.weight
            if weight_grad is not None:
                weight_grad += logits_grad.T @ states[part]
        total, ce, kl = logit_sums
        sums = {"ce": ce, "kl": kl}
        # The distance of hidden states needs no logits, so one call computes it for all positions.
        if weights.hidden_weight:
            assert teacher_states is not None
            scale = weights.hidden_weight * normalizers.targets
            sums["hidden"], gradient = hidden_distance(states, teacher_states)
            total += scale * sums["hidden"]
            at_valid += gradient.mul_(scale).to(at_valid.dtype)
        # Positions of the sense loss index all N states, so the gradients first move back to their places among these.
        hidden_grad = torch.zeros_like(flat).index_copy_(0, valid, at_valid)
        if senses is not None and weights.sense_weight:
            scale = weights.sense_weight * normalizers.senses
            sums |= self._sense_sums(flat, senses, hidden_grad, scale)
            total += scale * sums["sense"]
        return total, sums, hidden_grad, weight_grad

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
        """Returns the logits [n, V] of the student, and those of the teacher if a term reads them."""
        if teacher_states is None or not self.loss.kd_weight:
            return F.linear(states, self.weight), None
        if self.teacher_weight is None:  # one product reads the matrix once for both
            logits, teacher_logits = F.linear(torch.cat([states, teacher_states]), self.weight).chunk(2)
            return logits, teacher_logits
        return F.linear(states, self.weight), F.linear(teacher_states, self.teacher_weight)


class _Coefficients(NamedTuple):
    ce: torch.Tensor  # scalars
    kl: torch.Tensor
    temperature: float
    divergence: str


def _logit_losses(
    logits: torch.Tensor,
    labels: torch.Tensor,
    teacher: torch.Tensor | TopTokens | None,
    coefficients: _Coefficients,
    token_weights: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes (weighted loss, CE sum, KL sum) [3] of a chunk, and the gradient of the first by the logits [n, V].

    `teacher` is its logits [n, V'] or a cached distribution. If the two vocabularies are padded to different sizes, the
    divergence is over the tokens that both have. `token_weights` [n] affect the loss but not the sums of its terms.
    """
    ce, gradient = cross_entropy(logits, labels)
    gradient.mul_(coefficients.ce)
    kl = torch.zeros_like(ce)
    settings = coefficients.temperature, coefficients.divergence
    if isinstance(teacher, TopTokens):
        kl, kl_gradient = cached_divergence(logits, teacher, *settings)
        gradient.add_(kl_gradient.mul_(coefficients.kl))
    elif teacher is not None:
        shared = min(logits.shape[-1], teacher.shape[-1])
        kl, kl_gradient = divergence(logits[:, :shared], teacher[:, :shared], *settings)
        gradient[:, :shared].add_(kl_gradient.mul_(coefficients.kl))
    values = coefficients.ce * ce + coefficients.kl * kl
    if token_weights is not None:
        values = values * token_weights
        gradient.mul_(token_weights.unsqueeze(-1))
    return torch.stack([values.sum(), ce.sum(), kl.sum()]), gradient


class _GivenGradients(torch.autograd.Function):
    """A loss whose gradients by the hidden states and by the output matrix are already known; backward runs only once.

    The gradients are scaled in float32. In bf16 the factor itself, such as 1/3, would be rounded, and would shift all
    gradients in the same direction. The matrix's gradient is scaled in place, since a copy would be the largest tensor
    of the step.
    """

    @staticmethod
    def forward(
        ctx: Any,
        loss: torch.Tensor,
        hidden_grad: torch.Tensor,
        weight_grad: torch.Tensor | None,
        hidden: torch.Tensor,
        weight: torch.Tensor,
    ) -> torch.Tensor:
        """Returns `loss`, as a function of `hidden` and `weight` for autograd."""
        ctx.gradients = hidden_grad, weight_grad, weight.dtype
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *output_grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Returns the gradients, multiplied by the gradient of the loss."""
        hidden_grad, weight_grad, weight_dtype = ctx.gradients
        del ctx.gradients
        scale = output_grads[0].to(_accumulator(hidden_grad))
        if weight_grad is not None:
            weight_grad = weight_grad.mul_(scale).to(weight_dtype)
        if not ctx.needs_input_grad[3]:
            return None, None, None, None, weight_grad
        # `view(1)` gives the scale a dimension, so that the product is computed in its type. A tensor without
        # dimensions would be rounded to the type of `hidden_grad` first.
        return None, None, None, (hidden_grad * scale.view(1)).to(hidden_grad.dtype), weight_grad


def _accumulator(tensor: torch.Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
