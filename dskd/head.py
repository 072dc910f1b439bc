"""The output head of the student in training: one pass over last hidden states gives every term of the loss.

Logits of student and teacher exist for one chunk of positions at a time, and gradients are formed in that same pass, so
memory is that of one chunk whatever the length of the sequences. The head is the module that *owns* the output matrix:
ZeRO-3 gathers a parameter for the module it belongs to, and outside of its forward the matrix would be empty.
"""

from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from dskd.config import LossConfig
from dskd.losses import cross_entropy_sum, hidden_distance_sum, kl_divergence_sum, sense_sums

# What `DistillationHead.forward` reports, in this order: sums over this rank's micro-batch, without weights.
TERMS = ("ce", "kl", "hidden", "sense", "synonym", "antonym", "own", "active_hinges", "hinges")

_CHUNK_ELEMENTS = {"cpu": 2**20, "cuda": 2**25}


def chunk_size(wanted: int | None, vocab_size: int, device: torch.device) -> int:
    """How many positions have logits at one time: as wanted, or as many as suit the device."""
    return wanted or max(1, _CHUNK_ELEMENTS[device.type] // vocab_size)


class Normalizers(NamedTuple):
    """What the sums are divided by: counts over all ranks and accumulation steps, times what DeepSpeed divides by.

    DeepSpeed averages gradients over ranks and accumulation steps, while the terms are sums over all of them: a
    micro-batch's sum is therefore scaled by world_size · accumulation_steps / count.
    """

    tokens: float  # for CE, KL and the hidden-state distance
    senses: float  # for the sense loss


class DistillationHead(nn.Module):
    """Owns the student's output matrix and computes L = ce·CE + kd·T²·KL + sense·L_sense + hidden·|h-t|²/D."""

    def __init__(
        self,
        weight: nn.Parameter,
        teacher_weight: torch.Tensor | None,
        loss: LossConfig,
        *,
        chunk_size: int,
        margin: float | None = None,
        hub_name: str = "lm_head.weight",
    ) -> None:
        """Takes over `weight` [V, D]; `teacher_weight` [V, D'] is the teacher's, read only.

        Args:
            weight: the student's output matrix.
            teacher_weight: the teacher's, or None without a KL term.
            loss: weights and settings of the terms.
            chunk_size: positions whose logits exist at one time.
            margin: the margin in units of D where it is not `loss.margin`.
            hub_name: the name of `weight` in the Hugging Face folder.
        """
        super().__init__()
        self.weight = weight
        # Not a parameter: ZeRO would shard it again and gather it for every chunk.
        self.register_buffer("teacher_weight", teacher_weight, persistent=False)
        self.loss = loss
        self.chunk_size = chunk_size
        self.margin = loss.margin if margin is None else margin
        self.hub_name = hub_name

    def forward(
        self,
        hidden: torch.Tensor,
        *,
        labels: torch.Tensor | None = None,
        loss_mask: torch.Tensor | None = None,
        normalizers: Normalizers | None = None,
        teacher_hidden: torch.Tensor | None = None,
        senses: dict[str, torch.Tensor] | None = None,
    ) -> Any:
        """The loss to call backward on, and the sums of its terms; without labels the logits [B, T, V].

        Args:
            hidden: [B, T, D], the student's last hidden states.
            labels: [B, T], the token after each position; read only where `loss_mask` is True.
            loss_mask: [B, T] bool.
            normalizers: what to multiply the sums with.
            teacher_hidden: [B, T, D'], with a KL or hidden-state term.
            senses: the keyword arguments of :func:`dskd.losses.sense_sums`, with positions into B·T.

        Returns:
            A scalar, and the detached sums [len(TERMS)] float32.
        """
        if labels is None:
            return F.linear(hidden, self.weight)
        assert loss_mask is not None and normalizers is not None
        flat = hidden.flatten(0, 1)
        # A matrix product over the positions that count, and not one over padding.
        valid = loss_mask.flatten().nonzero().squeeze(-1)
        student_states = flat[valid]
        teacher_states = None if teacher_hidden is None else teacher_hidden.flatten(0, 1)[valid]
        weights = self.loss
        zero = hidden.new_zeros((), dtype=torch.float32)

        loss, ce, kl = _ChunkedHead.apply(
            student_states,
            self.weight,
            labels.flatten()[valid],
            teacher_states,
            self.teacher_weight if weights.kd_weight else None,
            _Coefficients(
                ce=weights.ce_weight * normalizers.tokens,
                kl=weights.kd_weight * weights.temperature**2 * normalizers.tokens,
                temperature=weights.temperature,
                chunk_size=self.chunk_size,
            ),
        )
        distance = zero
        if weights.hidden_weight:
            assert teacher_states is not None
            distance = hidden_distance_sum(student_states, teacher_states)
            loss = loss + weights.hidden_weight * normalizers.tokens * distance
        sense_terms = [zero] * 6
        if senses is not None and weights.sense_weight:
            sums = sense_sums(flat, margin=self.margin, antonym_weight=weights.antonym_weight, **senses)
            loss = loss + weights.sense_weight * normalizers.senses * sums.total
            sense_terms = [term.detach().float() for term in sums]
        terms = torch.stack([ce, kl, distance.detach().float(), *sense_terms])
        return loss, terms


class _Coefficients(NamedTuple):
    ce: float
    kl: float
    temperature: float
    chunk_size: int


class _ChunkedHead(torch.autograd.Function):
    """CE and KL of all positions, chunk by chunk, with the gradients formed on the way forward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        teacher_hidden: torch.Tensor | None,
        teacher_weight: torch.Tensor | None,
        coefficients: _Coefficients,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(weighted loss, CE sum, KL sum) of hidden [N, D] with labels [N]; scalars in float32."""
        # Frozen weights of a frozen decoder still need gradients of the hidden states whenever anything is trained.
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        hidden_grad = torch.zeros_like(hidden) if needs_hidden else None
        weight_grad = torch.zeros_like(weight, dtype=_accumulator(weight)) if needs_weight else None
        sums = torch.zeros(3, dtype=_accumulator(hidden), device=hidden.device)
        for start in range(0, hidden.shape[0], coefficients.chunk_size):
            part = slice(start, start + coefficients.chunk_size)
            inputs = hidden[part].detach().requires_grad_(needs_hidden)
            matrix = weight.detach().requires_grad_(needs_weight)
            with torch.enable_grad():
                logits = F.linear(inputs, matrix)
                ce = cross_entropy_sum(logits, labels[part])
                kl = torch.zeros_like(ce)
                if teacher_weight is not None and teacher_hidden is not None:
                    teacher_logits = F.linear(teacher_hidden[part], teacher_weight)
                    kl = kl_divergence_sum(logits, teacher_logits, coefficients.temperature)
                loss = coefficients.ce * ce + coefficients.kl * kl
                wanted = [tensor for tensor in (inputs, matrix) if tensor.requires_grad]
                grads = list(torch.autograd.grad(loss, wanted)) if wanted else []
            if hidden_grad is not None:
                hidden_grad[part] = grads.pop(0)
            if weight_grad is not None:
                weight_grad += grads.pop(0)
            sums += torch.stack([loss, ce, kl]).detach()
        ctx.save_for_backward(hidden_grad, None if weight_grad is None else weight_grad.to(weight.dtype))
        ce, kl = sums[1].float(), sums[2].float()
        ctx.mark_non_differentiable(ce, kl)
        return sums[0].clone(), ce, kl

    @staticmethod
    def backward(ctx: Any, *output_grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The gradients that the forward pass has formed, times the gradient of the loss."""
        hidden_grad, weight_grad = ctx.saved_tensors
        scale = output_grads[0]
        return (
            None if hidden_grad is None else hidden_grad * scale.to(hidden_grad.dtype),
            None if weight_grad is None else weight_grad * scale.to(weight_grad.dtype),
            None,
            None,
            None,
            None,
        )


def _accumulator(tensor: torch.Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
