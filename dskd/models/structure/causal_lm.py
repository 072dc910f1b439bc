"""Building causal language models of transformers from a folder's safetensors, sharded by ZeRO-3 or whole.

Models of every size are built the same way: transformers constructs the architecture with empty parameters, and the
weights are then read from the safetensors one tensor at a time. Under ZeRO-3 each rank reduces a tensor to its share
before the next one is read, so no rank ever holds a whole model.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from dskd.distributed.world import World
from dskd.errors import UserError, reason_of
from dskd.models.files.folder import BAD_CONFIG, ModelFolder
from dskd.models.files.weights import LAYER_NAME, TensorReader
from dskd.models.structure.cut_config import cut_config
from dskd.models.structure.layers import compare_layers
from dskd.models.structure.stored_names import StoredNames, check_stored_tensors, parameter_names, persistent_buffers

# What ZeRO-3 gathers, in numbers of elements. Norms and biases, up to this multiple of the hidden size, stay gathered,
# and anything larger is sharded; transformers uses this rule for "auto". The rest are DeepSpeed's own defaults, set
# explicitly because :mod:`dskd.plan` computes with them.
PERSISTENT_WIDTHS = 10
PREFETCHED, MAX_LIVE, MAX_REUSE_DISTANCE = 50_000_000, 1_000_000_000, 1_000_000_000
SUB_GROUP = 1_000_000_000  # elements that the optimizer's step processes at once


def engine_settings(dtype: torch.dtype, world: World, hidden_size: int, *, micro_batch_size: int) -> dict[str, Any]:
    """Returns the DeepSpeed settings that teacher and student have in common."""
    return {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "bf16": {"enabled": dtype == torch.bfloat16},
        # By default DeepSpeed sums the gradients of micro-batches in bf16, and long sums lose most of their precision.
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {
            "stage": 3,
            "stage3_param_persistence_threshold": PERSISTENT_WIDTHS * hidden_size,
            "stage3_prefetch_bucket_size": PREFETCHED,
            "stage3_max_live_parameters": MAX_LIVE,
            "stage3_max_reuse_distance": MAX_REUSE_DISTANCE,
            "sub_group_size": SUB_GROUP,
            "overlap_comm": world.device.type == "cuda",
        },
        "steps_per_print": 2**31 - 1,
        "wall_clock_breakdown": False,
    }


def build_sharded(
    folder: ModelFolder,
    settings: dict[str, Any],
    dtype: torch.dtype,
    world: World,
    *,
    first_layer: int = 0,
    num_layers: int | None = None,
) -> Any:
    """Builds a causal LM with the folder's weights whose parameters are sharded as they are created.

    Rank 0 reads each tensor, and every rank keeps its share. With `first_layer` above 0 the model lacks the layers
    below it, and its input embeddings stay on the meta device, unless they are tied to the output matrix. With
    `num_layers` it has only this number of layers from there.
    """
    import deepspeed  # imported here so that commands that load no model do not wait for it

    swapper = None

    def shard(parameter: nn.Parameter, tensor: torch.Tensor | None) -> nn.Parameter:
        nonlocal swapper
        value = torch.empty(parameter.shape, dtype=parameter.dtype, device=world.device)
        if tensor is not None:
            value.copy_(tensor)
        holder = nn.ParameterList([nn.Parameter(value, requires_grad=value.is_floating_point())])
        # Init sends rank 0's values to the other ranks. Each keeps its share on the device that `settings` names.
        init = deepspeed.zero.Init(module=holder, config_dict_or_path=settings, param_swapper=swapper)
        swapper = init.param_swapper
        return holder[0]

    causal_lm = empty_model(folder, dtype, first_layer=first_layer, num_layers=num_layers)
    _fill(causal_lm, folder, world, shard, first_layer=first_layer, reads=world.is_main)
    mark_experts(causal_lm)
    return causal_lm


def destroy_engine(engine: Any) -> None:
    """Destroys a ZeRO-3 engine, and frees the memory of its model and optimizer.

    DeepSpeed's own lists and caches refer to a destroyed engine as long as the process lives.
    """
    optimizer = engine.optimizer
    engine.destroy()
    empty_tensors((*engine.module.parameters(), *engine.module.buffers()))
    torch_optimizer = getattr(optimizer, "optimizer", None)  # a model that is not trained has none
    if torch_optimizer is not None:
        empty_tensors(_tensors_in([*torch_optimizer.state.values(), *vars(optimizer).values()]))


def _tensors_in(held: Iterable[Any]) -> Iterator[Any]:
    for value in held:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | dict):
            yield from _tensors_in(value.values() if isinstance(value, dict) else value)


def empty_tensors(tensors: Iterable[Any]) -> None:
    """Frees the memory of tensors to which something may still refer; of a sharded one, the rank's share."""
    for tensor in tensors:
        tensor.data = tensor.new_empty(0)
        if getattr(tensor, "ds_tensor", None) is not None:
            tensor.ds_tensor.data = tensor.new_empty(0)


def load_resident(
    folder: ModelFolder,
    dtype: torch.dtype,
    world: World,
    *,
    first_layer: int = 0,
    num_layers: int | None = None,
) -> Any:
    """Loads a causal LM of transformers whole onto this rank's device, in evaluation mode.

    With `first_layer` and `num_layers` it has only some layers, as :func:`build_sharded` says.
    """

    def to_device(parameter: nn.Parameter, tensor: torch.Tensor | None) -> nn.Parameter:
        assert tensor is not None, "every rank reads"
        value = torch.empty(parameter.shape, dtype=parameter.dtype, device=world.device)
        return nn.Parameter(value.copy_(tensor), requires_grad=value.is_floating_point())

    causal_lm = empty_model(folder, dtype, first_layer=first_layer, num_layers=num_layers)
    _fill(causal_lm, folder, world, to_device, first_layer=first_layer)
    return causal_lm.eval()


def empty_model(
    folder: ModelFolder, dtype: torch.dtype | None = None, *, first_layer: int = 0, num_layers: int | None = None
) -> Any:
    """Builds the architecture with `num_layers` layers from `first_layer` up; its parameters have shapes, no memory.

    Without `num_layers` it has all layers from `first_layer` up.

    Buffers get the same values as when transformers loads a model. Under `zero.Init` they would be computed in the
    parameters' type, and a table of rotations in bf16 is useless at late positions.

    Raises:
        UserError: when transformers cannot build the model.
    """
    from transformers import AutoModelForCausalLM
    from transformers.integrations.accelerate import init_empty_weights

    model_config = config_without_dropout(folder)
    if first_layer or num_layers is not None:
        end = model_config.num_hidden_layers if num_layers is None else first_layer + num_layers
        layers = list(range(first_layer, end))
        attention = model_config._attn_implementation  # not among the values
        model_config = type(model_config).from_dict(cut_config(model_config.to_dict(), layers))
        model_config._attn_implementation = attention
    try:
        with init_empty_weights(), _no_init_weights():
            causal_lm = AutoModelForCausalLM.from_config(
                model_config, dtype=dtype, trust_remote_code=folder.trust_remote_code
            )
    except BAD_CONFIG as error:
        reason = reason_of(error)
        raise UserError(
            f"{folder.path / 'config.json'}: transformers cannot build this architecture ({reason})"
        ) from None
    _remove_dropout(causal_lm)
    causal_lm.tie_weights()  # part of the initialisation that was skipped
    if dtype == torch.bfloat16:
        _keep_in_fp32(causal_lm)
    return causal_lm


def _keep_in_fp32(causal_lm: Any) -> None:
    """Converts back to float32 the parameters that transformers always loads in float32, whatever the model's type."""
    kept = getattr(causal_lm, "_keep_in_fp32_modules_strict", None)
    if not kept:
        return
    pattern = re.compile("|".join(rf"((^|\.){name}($|\.))" for name in kept))
    for name, parameter in list(causal_lm.named_parameters()):
        if pattern.search(name):
            owner, _, attribute = name.rpartition(".")
            setattr(causal_lm.get_submodule(owner), attribute, nn.Parameter(parameter.float()))


def fits_without_lower_layers(folder: ModelFolder, first_layer: int) -> bool:
    """Returns True if the layers from `first_layer` up are built the same when the layers below them are left out."""
    upper = list(range(first_layer, folder.load_config().num_hidden_layers))
    return not compare_layers(empty_model(folder), empty_model(folder, first_layer=first_layer), upper)


def fits_without_upper_layers(folder: ModelFolder, num_layers: int) -> bool:
    """Returns True if the lowest `num_layers` layers are built the same when the layers above them are left out."""
    return not compare_layers(empty_model(folder), empty_model(folder, num_layers=num_layers), range(num_layers))


def mark_experts(model: nn.Module) -> None:
    """Makes ZeRO-3 gather each mixture of experts as one module.

    Ranks choose experts by their own tokens. If experts were gathered one by one, a rank would wait for the share of an
    expert that another rank does not run, or receive the share of a different expert.
    """
    from deepspeed.utils import set_z3_leaf_module

    for name, module in model.named_modules():
        has_experts = hasattr(module, "experts") or any(isinstance(m, nn.ModuleList) for m in module.children())
        if LAYER_NAME.search(f"{name}.") and has_experts:
            set_z3_leaf_module(module, True)


def _fill(
    causal_lm: Any,
    folder: ModelFolder,
    world: World,
    make: Callable[[nn.Parameter, torch.Tensor | None], nn.Parameter],
    *,
    first_layer: int = 0,
    reads: bool = True,
) -> None:
    """Gives an empty model the folder's weights, one tensor at a time, and moves its buffers to the device.

    Args:
        causal_lm: the model.
        folder: the weights.
        world: the ranks.
        make: a function from an empty parameter and the tensor read for it to the parameter that replaces it.
        first_layer: the number, in the folder, of the model's first layer. If it is above 0, the input embeddings stay
            empty, unless they are tied to the output matrix.
        reads: False on a rank that reads no parameters; `make` then gets None instead of the tensor.

    Raises:
        UserError: when stored tensors do not fit the model, with all of them.
    """
    reader = TensorReader(folder.path)
    embeddings = causal_lm.get_input_embeddings().weight
    tied = embeddings is causal_lm.get_output_embeddings().weight
    leave_out = embeddings if first_layer and not tied else None
    check_stored_tensors(causal_lm, reader, folder, first_layer=first_layer, leave_out=leave_out)
    names = StoredNames(causal_lm, reader, first_layer=first_layer)
    for parameter, aliases in parameter_names(causal_lm):
        if parameter is leave_out:
            continue
        stored = names.find_any(aliases)
        assert stored is not None, "checked before"
        filled = make(parameter, reader.read(stored) if reads else None)
        for alias in aliases:
            owner, _, attribute = alias.rpartition(".")
            setattr(causal_lm.get_submodule(owner), attribute, filled)
    for name, buffer in persistent_buffers(causal_lm).items():
        stored = names.find(name)
        assert stored is not None, "checked before"
        buffer.copy_(reader.read(stored))
    _move_buffers(causal_lm, world.device)


def _move_buffers(model: nn.Module, device: torch.device) -> None:
    """Moves buffers to the device, and tensors in plain attributes, where some architectures keep copies of buffers."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
        for name, value in vars(module).items():
            if isinstance(value, torch.Tensor):
                setattr(module, name, value.to(device))


def config_without_dropout(folder: ModelFolder) -> Any:
    """Returns the folder's `PretrainedConfig` with all dropout at 0, so that config, seed and data determine a run."""
    model_config = folder.load_config()
    _set_drop_to_zero(vars(model_config))
    return model_config


def _set_drop_to_zero(values: dict[str, Any]) -> None:
    """Sets the rates of dropout and of dropped layers in a config's values to 0, in the configs within it too."""
    for name, value in values.items():
        if isinstance(value, dict):
            _set_drop_to_zero(value)
        elif hasattr(value, "to_dict"):
            _set_drop_to_zero(vars(value))
        elif _is_drop_rate(name, value):
            values[name] = 0.0


def _remove_dropout(model: nn.Module) -> None:
    """Sets the rates that a built model has to 0, whatever they were made from."""
    for module in model.modules():
        for name, value in vars(module).items():
            if _is_drop_rate(name, value):
                setattr(module, name, 0.0)
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0


def _is_drop_rate(name: Any, value: Any) -> bool:
    return "drop" in str(name) and isinstance(value, (int, float)) and not isinstance(value, bool)


def _no_init_weights() -> Any:
    """Returns transformers' context manager that skips random initialisation.

    The values would be overwritten, and initialisation indexes parameters of which a rank holds only a share.
    """
    try:
        from transformers.initialization import no_init_weights  # transformers 5
    except ImportError:
        from transformers.modeling_utils import no_init_weights
    return no_init_weights()
