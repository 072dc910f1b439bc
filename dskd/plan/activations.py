"""Memory of one micro-batch beyond the weights: training's own forward and backward, run on shapes.

Teacher, student and head are built and called as training does, under torch's FakeTensorMode: nothing is computed and
nothing is allocated, and :class:`dskd.plan.live_bytes.LiveBytes` counts what would be. Only attention is replaced, by
something that keeps what a fused kernel keeps: the scores of all pairs of positions never exist. All of it is of the
CPU, whose operations give the same tensors: the backward pass of a GPU wants a GPU, if nothing else.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dskd.config import LossConfig, StudentConfig
from dskd.losses.head import DistillationHead, Normalizers
from dskd.models.stored_names import base_model
from dskd.plan.live_bytes import LiveBytes
from dskd.plan.running import Way, find_way, materialize, without_values
from dskd.plan.shapes import Architecture
from dskd.training.student import choose_trained

_ATTENTION = "dskd_plan"
_TEACHER_LAYERS = 2  # without gradients a layer leaves nothing behind: more of them take no more


@dataclass(frozen=True)
class Batch:
    """One micro-batch."""

    size: int  # B
    length: int  # T
    is_packed: bool  # documents stand in one sequence, and attention has a mask
    sense_positions: int  # of relations; as many get the own term
    sense_rows: int  # R, different rows
    kappa: int
    teacher_top_n: int  # with a cached teacher


@dataclass(frozen=True)
class Activations:
    """Bytes of one micro-batch at its largest moments, beyond what is held all the time."""

    kept: int  # between forward and backward, for the gradients
    forward: int
    loss: int  # the head's: chunks of logits, and gradients of the states
    backward: int

    @property
    def peak(self) -> int:
        """The largest of them."""
        return max(self.forward, self.loss, self.backward)


@functools.lru_cache(maxsize=256)
def teacher_activations(architecture: Architecture, batch: Batch, dtype: torch.dtype) -> int:
    """Bytes of the teacher's forward pass, with the states that it gives."""
    layers = list(range(min(_TEACHER_LAYERS, architecture.values()["num_hidden_layers"])))
    way, model = _build(architecture, layers)
    with without_values(architecture):
        base = base_model(materialize(model, dtype)).eval()
        with torch.no_grad(), LiveBytes() as live:
            ids = torch.empty(batch.size, batch.length, dtype=torch.int64)
            trunk = torch.empty(batch.size, batch.length, base.config.hidden_size, dtype=dtype)
            states = base(input_ids=ids, use_cache=False, **_mask(batch, way)).last_hidden_state
            del trunk, states
    return live.peak


@functools.lru_cache(maxsize=256)
def student_activations(
    architecture: Architecture,
    layers: tuple[int, ...],
    trunk: int,
    student: StudentConfig,
    loss: LossConfig,
    batch: Batch,
    dtype: torch.dtype,
    *,
    chunk_size: int,
    checkpointing: bool,
    with_teacher: bool,
) -> Activations:
    """Bytes of the student's forward, loss and backward, with what teacher and batch bring to them."""
    way, model = _build(architecture, layers, trunk)
    with without_values(architecture):
        causal_lm = materialize(model, dtype)
        choose_trained(causal_lm, student, first_layer=trunk)
        if checkpointing:
            causal_lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        causal_lm.train(checkpointing)  # there is no dropout, and some models draw numbers in training
        base, output = base_model(causal_lm), causal_lm.get_output_embeddings().weight
        hidden_size, vocab_size = base.config.hidden_size, output.shape[0]
        copy = output.detach() if output.requires_grad and with_teacher and loss.kd_weight else None
        head = DistillationHead(output, copy, loss, chunk_size=chunk_size)
        with LiveBytes() as live:
            shape = batch.size, batch.length
            # The teacher's states, and what the student begins with, stay until the backward pass is over.
            teacher_hidden = torch.empty(*shape, hidden_size, dtype=dtype) if with_teacher else None
            if trunk:
                inputs = {"inputs_embeds": torch.empty(*shape, hidden_size, dtype=dtype)}
            else:
                inputs = {"input_ids": torch.empty(*shape, dtype=torch.int64)}
            with live.uncounted():  # what the loader brings is counted where it brings it
                brought = _brought(batch, vocab_size, hidden_size)
            hidden = base(**inputs, use_cache=False, **_mask(batch, way)).last_hidden_state
            kept, forward = live.now, live.restart_peak()
            total, sums = head(hidden, teacher_hidden=teacher_hidden, normalizers=Normalizers(1.0, 1.0), **brought)
            of_loss = live.restart_peak()
            del hidden, inputs
            for parameter in causal_lm.parameters():
                if parameter.requires_grad:  # DeepSpeed moves each gradient into its bucket when it is there
                    parameter.register_post_accumulate_grad_hook(_drop_gradient)
            total.backward()
            backward = live.restart_peak()
            del total, sums, teacher_hidden, brought
    return Activations(kept, forward, max(0, of_loss - kept), backward)


def _drop_gradient(parameter: torch.Tensor) -> None:
    parameter.grad = None


def _build(architecture: Architecture, layers: Sequence[int], first_layer: int = 0) -> tuple[Way, Any]:
    _register_attention()
    way = find_way(architecture, _ATTENTION)
    return way, way.prepare(architecture.build(layers=list(layers), first_layer=first_layer))


def _mask(batch: Batch, way: Way) -> dict[str, torch.Tensor]:
    if not way.takes_mask or (not batch.is_packed and not _always_makes_masks()):
        return {}
    return {"attention_mask": torch.empty(batch.size, 1, batch.length, batch.length, dtype=torch.bool)}


def _brought(batch: Batch, vocab_size: int, hidden_size: int) -> dict[str, Any]:
    """What the head gets beside states."""
    shape, positions, kappa = (batch.size, batch.length), batch.sense_positions, batch.kappa
    brought: dict[str, Any] = {
        "labels": torch.zeros(shape, dtype=torch.int64),
        "loss_mask": torch.ones(shape, dtype=torch.bool),
    }
    if positions:
        index = torch.zeros(positions, kappa, dtype=torch.int64)
        place = torch.zeros(positions, dtype=torch.int64)
        brought["senses"] = {
            "sense_rows": torch.empty(max(1, batch.sense_rows), hidden_size, dtype=torch.bfloat16),
            **{"relation_positions": place, "synonym_index": index, "antonym_index": index},
            **{"own_positions": place, "own_index": index},
        }
    if batch.teacher_top_n:
        brought["teacher_cache"] = {
            "token_ids": torch.zeros(*shape, batch.teacher_top_n, dtype=torch.int64),
            "logprobs": torch.empty(*shape, batch.teacher_top_n, dtype=torch.float16),
            "rest_logprob": torch.empty(shape, dtype=torch.float32),
        }
    return brought


class _FusedAttention(torch.autograd.Function):
    """The memory of a fused attention kernel, without what it computes."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """[B, H, T, d] each, keys and values of fewer heads; the result is [B, T, H, d]."""
        batch, heads, length, _ = query.shape
        result = query.new_empty(batch, length, heads, value.shape[-1])
        normalizers = query.new_empty(batch, heads, length, dtype=torch.float32)
        # A mask of truth values is made one of numbers, in every layer.
        bias = None if mask is None else query.new_empty(mask.shape)
        ctx.save_for_backward(query, key, value, result, normalizers, bias)
        return result

    @staticmethod
    def backward(ctx: Any, *output_grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of the three."""
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None


def _attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **_: Any
) -> tuple[torch.Tensor, None]:
    if attention_mask is not None and key.shape[1] != query.shape[1]:
        # With a mask no kernel shares keys among heads: they are repeated before.
        key, value = (part.repeat_interleave(query.shape[1] // part.shape[1], dim=1) for part in (key, value))
    return _FusedAttention.apply(query, key, value, attention_mask), None


@functools.cache
def _register_attention() -> None:
    from transformers import AttentionInterface

    AttentionInterface.register(_ATTENTION, _attention)


@functools.cache
def _always_makes_masks() -> bool:
    """True where the installed transformers gives attention a mask also when sequences are whole, as 4.57 does in
    training: found out by running a model of the smallest size with what it is trained with (`sdpa`).
    """
    from transformers import AttentionInterface, AttentionMaskInterface, LlamaConfig, LlamaModel
    from transformers.masking_utils import sdpa_mask

    seen: list[bool] = []

    def note(module: Any, query: torch.Tensor, key: Any, value: Any, attention_mask: Any, **_: Any) -> Any:
        seen.append(attention_mask is not None)
        return torch.zeros_like(query).transpose(1, 2), None

    name = f"{_ATTENTION}_probe"
    AttentionInterface.register(name, note)
    AttentionMaskInterface.register(name, sdpa_mask)
    sizes = {"vocab_size": 2, "hidden_size": 4, "intermediate_size": 4, "num_attention_heads": 1}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        model = LlamaModel(LlamaConfig(**sizes, num_hidden_layers=1, attn_implementation=name))
        model(input_ids=torch.zeros(1, 4, dtype=torch.int64), use_cache=False)
    return seen[0]
