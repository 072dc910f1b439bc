"""Comparing a loaded model to transformers' own, before hours are spent on it.

Rank 0 loads a small model a second time, with transformers, and runs it on the tokens of every rank. Of a large model
it only loads some layers, one after the other: the first, the last, and one of each other kind. Each gets the same
input states as the same layer of the loaded model.
"""

import json
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from dskd.console import say
from dskd.distributed.collectives import on_main
from dskd.distributed.world import World
from dskd.errors import UserError, listed
from dskd.models.checks.probes import takes_positions
from dskd.models.files.folder import ModelFolder
from dskd.models.files.weights import TensorReader
from dskd.models.structure.base_model import base_model, base_model_name
from dskd.models.structure.causal_lm import config_without_dropout, empty_model
from dskd.models.structure.layers import kind_of, recorded
from dskd.models.structure.stored_names import StoredNames, persistent_buffers

# The largest accepted difference, relative to the norm of the states. In the same type on the same device, healthy
# architectures differ hardly at all.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.04}
SMALL_BYTES = 2 * 2**30
_TOKENS = 16
_RANKS = 8  # the states of at most this many ranks are compared; every rank runs the model
_KINDS = 6  # layers of at most this many further kinds are compared


@torch.no_grad()
def compare_with_transformers(
    engine: Any, decoder: Any, folder: ModelFolder, world: World, dtype: torch.dtype, *, small: int = SMALL_BYTES
) -> None:
    """Refuses a model whose states or buffers differ from those that transformers computes for it.

    Tokens differ between ranks. They are run at the first positions, and at the last ones that config.json allows,
    because errors in scaled rotations are largest there.

    Args:
        engine: the callable that runs the model, from token ids and position ids [B, T].
        decoder: the :class:`dskd.models.running.frozen.Decoder` in it.
        folder: the model's folder.
        world: the ranks; all of them must call this.
        dtype: the type of the model's parameters.
        small: the largest size in bytes at which rank 0 loads the whole model a second time.

    Raises:
        UserError: on every rank when the model is refused, with the layer and the difference, or the buffers.
    """
    _check_buffers(decoder, folder, dtype)
    # Choose a few tokens, different on each rank, and the positions to run them at.
    config = decoder.base.config
    longest = getattr(config, "max_position_embeddings", None) or _TOKENS
    tokens = min(_TOKENS, longest)
    numbers = torch.arange(tokens, device=world.device)[None]
    input_ids = (7 * numbers + 3 + 11 * world.rank) % config.vocab_size
    starts = [longest - tokens, 0] if takes_positions(decoder.base) and longest > tokens else [0]
    # Compare a small model whole, and of a large one a layer of each kind, which need little memory.
    size = TensorReader(folder.path).numel * dtype.itemsize
    chosen = None if size <= small else _one_of_each_kind(decoder.layers)
    compared = [] if chosen is None else [decoder.layers[layer] for layer in chosen]
    # Run the loaded model on all ranks, and record the inputs and outputs of the compared layers and the last states.
    states_by_start = []
    for start in starts:
        with recorded([*compared, decoder]) as runs:
            engine(input_ids, *([numbers + start] if start else []))
        of_layers = [states for run in runs[:-1] for states in (run.input, run.output)]
        states_by_start.append(torch.stack([*of_layers, runs[-1].output]))
    everyone = _gather(torch.stack(states_by_start), world)  # [ranks][starts, 2 * compared layers + 1, 1, T, D]

    def compare() -> list[Any]:
        worst, worst_at, is_finite = 0.0, "the last hidden states", True
        for layer in [None] if chosen is None else chosen:
            if layer is None:
                reference = load_whole(folder, dtype)
            else:
                reference = _one_layer(decoder, folder, dtype, layer, returns_tuple=runs[0].returns_tuple)
            reference = type(decoder)(reference.to(world.device).eval())
            for rank in range(min(world.world_size, _RANKS)):
                ids = (7 * numbers + 3 + 11 * rank) % config.vocab_size
                for number, start in enumerate(starts):
                    positions = {"position_ids": numbers + start} if start else {}
                    states = everyone[rank][number]
                    if chosen is None or layer is None:
                        results = _run_whole(reference, ids, positions, states)
                    else:
                        results = _run_layer(reference, ids, positions, states, layer, chosen)
                    for name, ours, expected in results:
                        error = relative_difference(ours, expected)
                        if not error <= worst:
                            worst, worst_at = error, f"{name} on rank {rank}, at positions from {start}"
                            is_finite = bool(ours.isfinite().all() and expected.isfinite().all())
        return [worst, worst_at, is_finite]

    worst, worst_at, is_finite = on_main(compare)
    _require_agreement(decoder, folder, world, dtype, worst, worst_at, is_finite=is_finite)
    what = "last hidden states" if chosen is None else f"what layers {', '.join(map(str, chosen))} compute"
    where = " and ".join(f"{start} to {start + tokens - 1}" for start in sorted(starts))
    say(
        f"  {folder.path}: compared with transformers' own: computed buffers, and {what} of {tokens} tokens at "
        f"positions {where} (difference {worst:.0e})"
    )


def _require_agreement(
    decoder: Any, folder: ModelFolder, world: World, dtype: torch.dtype, worst: float, worst_at: str, *, is_finite: bool
) -> None:
    """Refuses a model whose largest relative difference, `worst` at `worst_at`, is more than rounding explains.

    Raises:
        UserError: with the place and the difference, or that values there are not finite.
    """
    if worst > _TOLERANCE[dtype] and not is_finite:
        raise UserError(
            f"{folder.path}: weights or states are not finite: {worst_at} have infinities or NaN. Are the weights "
            f"damaged, or states too large for {str(dtype).removeprefix('torch.')}?",
            known_to_all_ranks=True,
        )
    if not worst <= _TOLERANCE[dtype]:
        sharded = world.world_size > 1 and hasattr(next(decoder.parameters()), "ds_id")
        remedy = "; try teacher.mode: resident" if sharded else ""
        raise UserError(
            f"{folder.path}: {type(decoder.base).__name__}, as it is loaded here, computes something different from "
            f"transformers: {worst_at} differ by {worst:.1e} of their norm, more than {_TOLERANCE[dtype]:.0e}; this "
            f"architecture is not supported{remedy}",
            known_to_all_ranks=True,
        )


def relative_difference(ours: torch.Tensor, expected: torch.Tensor) -> float:
    """Returns the norm of the difference, relative to the norm of `expected`.

    Elements that are finite in neither model are left out: they come from damaged weights, not from the architecture,
    and :func:`dskd.senses.states.states_of` refuses them later, with their place. Returns infinity if an element is
    finite in only one of the models, or if none is finite.
    """
    finite = expected.isfinite()
    if not torch.equal(finite, ours.isfinite()) or not finite.any():
        return float("inf")
    ours, expected = ours[finite].double(), expected[finite].double()
    return float((ours - expected).norm() / expected.norm().clamp_min(1e-12))


def _check_buffers(decoder: Any, folder: ModelFolder, dtype: torch.dtype) -> None:
    """Refuses a model whose computed buffers are not bit for bit those that transformers computes without ZeRO."""
    causal_lm = empty_model(folder, dtype)
    base, stored = base_model(causal_lm), persistent_buffers(base_model(causal_lm))
    own = dict(decoder.base.named_buffers())
    wrong = [
        name
        for name, buffer in base.named_buffers()
        if name not in stored
        and (own[name].dtype != buffer.dtype or not torch.equal(own[name].to(buffer.device), buffer))
    ]
    if wrong:
        raise UserError(
            listed(f"{folder.path}: buffers were changed after the model was built; report this", wrong),
            known_to_all_ranks=True,
        )


def _one_of_each_kind(layers: nn.ModuleList) -> list[int]:
    """Returns the numbers of the first layer, the last, and the first of each other kind, up to _KINDS of these."""
    first_of: dict[str, int] = {}
    for number, layer in enumerate(layers):
        first_of.setdefault(json.dumps(kind_of(layer, number), sort_keys=True), number)
    others = sorted(set(first_of.values()) - {0, len(layers) - 1})[:_KINDS]
    return sorted({0, *others, len(layers) - 1})


def _gather(states: torch.Tensor, world: World) -> list[torch.Tensor]:
    if world.world_size == 1:
        return [states]
    parts = [torch.empty_like(states) for _ in range(world.world_size)]
    dist.all_gather(parts, states.contiguous())
    return parts


def load_whole(folder: ModelFolder, dtype: torch.dtype) -> Any:
    """Returns the base model as transformers loads it from the folder's tensors."""
    from transformers.utils import logging

    reader = TensorReader(folder.path)
    architecture = type(empty_model(folder, dtype))
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # check_stored_tensors has already reported unused tensors
    try:
        causal_lm = architecture.from_pretrained(
            None,
            config=config_without_dropout(folder),
            state_dict={name: reader.read(name) for name in reader.names},
            dtype=dtype,
        )
    finally:
        logging.set_verbosity(verbosity)
    return base_model(causal_lm)


def _one_layer(decoder: Any, folder: ModelFolder, dtype: torch.dtype, chosen: int, *, returns_tuple: bool) -> Any:
    """Returns the base model with weights in one layer only; the other layers pass states through."""
    causal_lm = empty_model(folder, dtype)
    base = base_model(causal_lm)
    reader = TensorReader(folder.path)
    names, prefix = StoredNames(causal_lm, reader), base_model_name(causal_lm)
    layers = type(decoder)(base).layers
    # The other layers return their input, so that a hook on the chosen one can replace it.
    passed = {id(module) for number, layer in enumerate(layers) if number != chosen for module in layer.modules()}
    for number, layer in enumerate(layers):
        if number != chosen:
            layer.forward = _pass_through_in_tuple if returns_tuple else _pass_through
    # Fill every parameter and stored buffer outside of the other layers, and drop theirs; computed buffers stay.
    for path, module in base.named_modules():
        for name in [*module._parameters, *module._buffers]:
            stored = names.find(f"{prefix}.{path}.{name}" if path else f"{prefix}.{name}")
            old = getattr(module, name)
            if old is None or (stored is None and not old.is_meta):
                continue
            if id(module) in passed:
                setattr(module, name, None)
            else:
                assert stored is not None, "every tensor was accounted for"
                value = reader.read(stored).to(old.dtype)
                is_parameter = isinstance(old, nn.Parameter)
                setattr(module, name, nn.Parameter(value, requires_grad=False) if is_parameter else value)
    return base


def _pass_through(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    return hidden_states


def _pass_through_in_tuple(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    return (hidden_states,)


_Compared = list[tuple[str, torch.Tensor, torch.Tensor]]  # name, ours, expected


def _run_whole(decoder: Any, input_ids: torch.Tensor, positions: dict[str, Any], states: torch.Tensor) -> _Compared:
    """Runs the whole reference on the same tokens, and returns what to compare.

    `states` [1, 1, T, D] has the last states as the loaded model computed them.
    """
    with torch.no_grad():
        return [("the last hidden states", states[-1], decoder(input_ids, **positions))]


def _run_layer(
    decoder: Any,
    input_ids: torch.Tensor,
    positions: dict[str, Any],
    states: torch.Tensor,
    layer: int,
    chosen: list[int],
) -> _Compared:
    """Runs a reference with one layer on the same tokens and layer input, and returns what to compare.

    `states` has the inputs and outputs of the chosen layers, and the last states, as the loaded model computed them.
    """
    index = 2 * chosen.index(layer)
    module = decoder.layers[layer]

    def replace(module: nn.Module, args: Any, kwargs: Any) -> Any:
        return ((states[index], *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": states[index]})

    hook = module.register_forward_pre_hook(replace, with_kwargs=True)
    try:
        with torch.no_grad(), recorded([module, decoder]) as expected:
            decoder(input_ids, **positions)
    finally:
        hook.remove()
    results = [(f"what layer {layer} computes", states[index + 1], expected[0].output)]
    if layer == chosen[-1]:  # the last of all layers
        results.append(("the last hidden states", states[-1], expected[-1].output))
    return results
