"""The memory of one micro-batch beyond the weights, measured by running training's own forward and backward on shapes.

Teacher, student and head are built and called as in training, but under torch's FakeTensorMode: nothing is computed or
allocated, and :class:`dskd.plan.live_bytes.LiveBytes` counts what would be allocated. Attention is replaced by a
function that keeps the same tensors as a fused kernel, so the scores of all pairs of positions never exist. All fake
tensors are on the CPU, whose operations create the same tensors as a GPU's: torch cannot run the backward pass of fake
GPU tensors without a GPU.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dskd.config import LossConfig, StudentConfig
from dskd.losses.head import DistillationHead, HeadSizes, Normalizers
from dskd.models.checks.head_probe import declared_transform
from dskd.models.structure.base_model import base_model
from dskd.models.structure.output_head import LogitTransform
from dskd.models.structure.trained import choose_trained
from dskd.plan.architecture import Architecture
from dskd.plan.live_bytes import LiveBytes
from dskd.plan.running import Way, find_way, materialize, without_values
from dskd.shards import TEACHER_STATES, TRUNK_STATES
from dskd.training.models.width_map import build_width_map, has_width_map

_ATTENTION = "dskd_plan"
_TEACHER_LAYERS = 2  # without gradients a layer keeps nothing, so more layers take no more memory


@dataclass(frozen=True)
class Batch:
    """The sizes of one micro-batch."""

    size: int  # B
    length: int  # T
    is_packed: bool  # sequences contain several documents, and attention has a mask
    sense_positions: int  # number of relation positions, and also of own positions; with `candidates`, of both together
    sense_rows: int  # R, number of distinct rows
    kappa: int
    teacher_top_n: int  # tokens per position of a cached teacher, otherwise 0
    state_columns: tuple[str, ...] = ()  # columns of states that the loader reads from the shards
    draws_targets: bool = False  # CE, KL and hidden-state distance are computed at a share of the positions
    candidates: tuple[int, int] | None = None  # C rows of each sense position and S of all, with that form of the loss


@dataclass(frozen=True)
class Activations:
    """The bytes of one micro-batch at the peaks of its phases, in addition to what is held all the time."""

    kept: int  # held between forward and backward, for the gradients
    forward: int
    loss: int  # in the head: chunks of logits, and gradients of the states
    backward: int


@functools.lru_cache(maxsize=256)
def teacher_activations(architecture: Architecture, batch: Batch, dtype: torch.dtype) -> int:
    """Returns the peak bytes of the teacher's forward pass, including the states that it returns."""
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
    sizes: HeadSizes,
    checkpointing: bool,
    with_teacher: bool,
    teacher_matrix: tuple[int, int],
    has_copy: bool,
    teacher_transform: LogitTransform,
) -> Activations:
    """Measures the bytes of the student's forward, loss and backward, including the teacher's states if it runs.

    `layers` are the layers of `architecture` that the student consists of, and `trunk` is the number of lowest ones
    that it need not compute. `sizes` are the numbers of positions that the head computes at once. `with_teacher`
    says whether the loss reads the teacher's states, computed or stored. `teacher_matrix` is the shape of the teacher's
    output matrix, `has_copy` says whether the head holds it in addition to the student's, and `teacher_transform` is
    what the teacher does with its products.
    """
    way, model = _build(architecture, layers, trunk)
    with without_values(architecture):
        # The models, built as training builds them, but without values.
        causal_lm = materialize(model, dtype)
        choose_trained(causal_lm, student, first_layer=trunk)
        _set_checkpointing(causal_lm, checkpointing)
        base, output = base_model(causal_lm), causal_lm.get_output_embeddings().weight
        hidden_size = teacher_matrix[1]  # of all that comes with a batch, and of a trunk
        copy = torch.empty(teacher_matrix, dtype=dtype) if has_copy else None
        head = _HeadOfOneChunk(
            output,
            copy,
            loss,
            chunk_size=sizes.chunk,
            block_size=sizes.block,
            transform=declared_transform(architecture.load_config()),
            teacher_transform=teacher_transform,
        )
        width_map, own = None, base.config.hidden_size
        if has_width_map(loss, own, hidden_size):
            width_map = build_width_map(own, hidden_size, dtype, torch.device("cpu"))
        # Run the phases of a micro-batch one after the other, and read the peak after each.
        with LiveBytes() as live:
            shape = batch.size, batch.length
            with live.uncounted():  # dskd.plan.memory counts the loader's batches
                loaded = _loaded_for_one_chunk(batch, hidden_size, dtype)
            loaded.pop("input_ids"), loaded.pop("position_ids", None)
            # The forward pass. The teacher's states and the student's inputs are held until the backward pass is over.
            teacher_hidden, states = (loaded.pop(column, None) for column in (TEACHER_STATES, TRUNK_STATES))
            if with_teacher and teacher_hidden is None:
                teacher_hidden = torch.empty(*shape, hidden_size, dtype=dtype)
            if trunk:
                inputs = {"inputs_embeds": torch.empty(*shape, hidden_size, dtype=dtype) if states is None else states}
            else:
                inputs = {"input_ids": torch.empty(*shape, dtype=torch.int64)}
            hidden = base(**inputs, use_cache=False, **_mask(batch, way)).last_hidden_state
            kept, forward = live.now, live.restart_peak()
            # The loss.
            mapped = None if width_map is None else width_map(hidden)
            loaded |= {"teacher_hidden": teacher_hidden, "mapped": mapped}
            total, sums = head(hidden, normalizers=Normalizers(1.0, 1.0), **loaded)
            of_loss = live.restart_peak()
            # The backward pass.
            del hidden, mapped, inputs, states
            for module in (causal_lm, width_map):
                _drop_gradients(module)
            total.backward()
            backward = live.restart_peak()
            del total, sums, teacher_hidden, loaded
    return Activations(kept, forward, max(0, of_loss - kept), backward)


class _HeadOfOneChunk(DistillationHead):
    """A head that computes its first chunk, at whose end all is freed that it allocated.

    The others need as much memory, or less if they are smaller, so they change no peak. As many positions count as can
    at most: all of the mask's, or the most that can be drawn of these.
    """

    def positions(self, loss_mask: torch.Tensor) -> torch.Tensor:
        """Returns indices of as many positions."""
        return super().positions(loss_mask[:, : math.ceil(self.loss.position_share * loss_mask.shape[1])])

    def chunks(self, count: int) -> list[slice]:
        """Returns the first chunk."""
        return super().chunks(count)[:1]


def _set_checkpointing(causal_lm: Any, checkpointing: bool) -> None:
    if checkpointing:
        causal_lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    causal_lm.train(checkpointing)  # only if needed: there is no dropout, but some models draw random numbers


def _loaded_for_one_chunk(batch: Batch, hidden_size: int, dtype: torch.dtype) -> dict[str, Any]:
    """Returns what the loader brings, as :class:`_HeadOfOneChunk` takes it."""
    loaded = loaded_tensors(batch, hidden_size, dtype)
    loaded.pop("drawn_targets", None)  # that head knows how many can be drawn
    # If the device holds all rows of the dictionary, one of them represents all.
    if "senses" in loaded:
        loaded["senses"].setdefault("sense_rows", torch.empty(1, hidden_size, dtype=torch.bfloat16))
    return loaded


def _drop_gradients(module: nn.Module | None) -> None:
    """Drops each gradient as soon as it exists, when DeepSpeed moves it into its bucket."""
    for parameter in () if module is None else module.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(_drop_gradient)


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


def loaded_tensors(batch: Batch, hidden_size: int, dtype: torch.dtype) -> dict[str, Any]:
    """Returns tensors like those that the loader brings for a micro-batch.

    :class:`dskd.training.data.collator.Collator` makes those. `sense_rows` is not among them if the device holds the
    whole dictionary. Stored states have type `dtype`.
    """
    shape, positions, kappa = (batch.size, batch.length), batch.sense_positions, batch.kappa
    loaded: dict[str, Any] = {
        "input_ids": torch.zeros(shape, dtype=torch.int64),
        "labels": torch.zeros(shape, dtype=torch.int64),
        "loss_mask": torch.ones(shape, dtype=torch.bool),
    }
    if batch.draws_targets:
        loaded["drawn_targets"] = torch.ones(shape, dtype=torch.bool)
    if batch.is_packed:
        loaded["position_ids"] = torch.zeros(shape, dtype=torch.int64)
    if positions and batch.candidates is not None:
        of_each, of_all = batch.candidates
        loaded["senses"] = {
            "positions": torch.zeros(positions, dtype=torch.int64),
            "candidate_rows": torch.zeros(positions, of_each, dtype=torch.int64),
            "random_rows": torch.zeros(of_all, dtype=torch.int64),
        }
    elif positions:
        loaded["senses"] = {
            **{name: torch.zeros(positions, dtype=torch.int64) for name in ("relation_positions", "own_positions")},
            **{
                name: torch.zeros(positions, kappa, dtype=torch.int64)
                for name in ("synonym_rows", "antonym_rows", "own_rows")
            },
        }
    if "senses" in loaded and batch.sense_rows:
        loaded["senses"]["sense_rows"] = torch.empty(batch.sense_rows, hidden_size, dtype=torch.bfloat16)
    if batch.teacher_top_n:
        loaded["teacher_cache"] = {
            "token_ids": torch.zeros(*shape, batch.teacher_top_n, dtype=torch.int32),
            "logprobs": torch.empty(*shape, batch.teacher_top_n, dtype=torch.float16),
            "rest_logprob": torch.empty(shape, dtype=torch.float32),
        }
    return loaded | {column: torch.empty(*shape, hidden_size, dtype=dtype) for column in batch.state_columns}


class _FusedAttention(torch.autograd.Function):
    """An attention function that allocates and keeps the same memory as a fused kernel, and computes nothing."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Returns the result [B, T, H, d] for inputs [B, H, T, d] each, where keys and values may have fewer heads."""
        batch, heads, length, _ = query.shape
        result = query.new_empty(batch, length, heads, value.shape[-1])
        normalizers = query.new_empty(batch, heads, length, dtype=torch.float32)
        # Every layer converts the boolean mask to numbers.
        bias = None if mask is None else query.new_empty(mask.shape)
        ctx.save_for_backward(query, key, value, result, normalizers, bias)
        return result

    @staticmethod
    def backward(ctx: Any, *output_grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Returns gradients with respect to query, key and value."""
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None


def _attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **_: Any
) -> tuple[torch.Tensor, None]:
    if attention_mask is not None and key.shape[1] != query.shape[1]:
        # With a mask, no kernel shares keys among heads, so they are repeated first.
        key, value = (part.repeat_interleave(query.shape[1] // part.shape[1], dim=1) for part in (key, value))
    return _FusedAttention.apply(query, key, value, attention_mask), None


@functools.cache
def _register_attention() -> None:
    from transformers import AttentionInterface

    AttentionInterface.register(_ATTENTION, _attention)


@functools.cache
def _always_makes_masks() -> bool:
    """Returns True if the installed transformers gives attention a mask even for sequences of one document.

    Version 4.57 does so in training. This function runs a tiny model with the masks of `sdpa`, the attention used in
    training, to see.
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
