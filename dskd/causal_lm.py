"""Causal language models of transformers from a folder's safetensors: sharded by ZeRO-3, or whole.

Sharded ones are built the same way at every size: the architecture is constructed under `zero.Init`, so that each rank
only ever holds its share of a parameter, and the weights are copied from the safetensors one tensor at a time. No rank
holds a whole model at any moment.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import nn

from dskd.cut_config import compare_layers, cut_config
from dskd.distributed import World
from dskd.errors import UserError, listed
from dskd.model_folder import LAYER_NAME, ModelFolder, TensorReader, renumber_layer
from dskd.probes import check_head


def engine_settings(dtype: torch.dtype, world: World, hidden_size: int, *, micro_batch_size: int) -> dict[str, Any]:
    """DeepSpeed's settings that teacher and student have in common."""
    return {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "bf16": {"enabled": dtype == torch.bfloat16},
        # By default gradients of micro-batches are added up in bf16, of which many together keep little.
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {
            "stage": 3,
            # Norms and biases stay gathered, everything larger is sharded: the rule transformers uses for "auto".
            "stage3_param_persistence_threshold": 10 * hidden_size,
            "overlap_comm": world.device.type == "cuda",
        },
        "steps_per_print": 2**31 - 1,
        "wall_clock_breakdown": False,
    }


def build_sharded(folder: ModelFolder, settings: dict[str, Any], dtype: torch.dtype, *, first_layer: int = 0) -> Any:
    """A causal LM whose parameters are sharded from birth, with the folder's weights.

    With `first_layer` it has no lower layers, and its input embeddings are not filled in.
    """
    import deepspeed  # here: commands that load no model do not wait for it

    with deepspeed.zero.Init(config_dict_or_path=settings), _no_init_weights():
        causal_lm = _architecture(folder, dtype, first_layer=first_layer)
    causal_lm.tie_weights()  # part of the initialisation that was skipped
    embeddings = causal_lm.get_input_embeddings().weight
    tied = embeddings is causal_lm.get_output_embeddings().weight
    leave_out = embeddings if first_layer and not tied else None
    copy_weights(causal_lm, TensorReader(folder.path), folder, first_layer=first_layer, leave_out=leave_out)
    check_head(causal_lm, folder)
    return causal_lm


def load_resident(folder: ModelFolder, dtype: torch.dtype, world: World) -> Any:
    """A causal LM of transformers, all of it on this rank's device."""
    from transformers import AutoModelForCausalLM

    reader = TensorReader(folder.path)
    try:
        causal_lm, found = AutoModelForCausalLM.from_pretrained(
            folder.path,
            config=_config_without_dropout(folder),
            dtype=dtype,
            trust_remote_code=folder.trust_remote_code,
            # Both kinds of misfit are to be named, all at once.
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except (ValueError, ImportError, OSError, SafetensorError) as error:
        raise UserError(f"{folder.path}: transformers cannot build this model ({error})") from None
    shapes = {name: list(parameter.shape) for name, parameter in causal_lm.named_parameters(remove_duplicate=False)}
    problems = [f"there is no tensor {name}" for name in sorted(found["missing_keys"])]
    for entry in sorted(found["mismatched_keys"]):
        name = entry if isinstance(entry, str) else entry[0]  # transformers 5 has the shapes beside the name
        stored_name = _stored_name(name, reader, causal_lm) or name
        stored = list(reader.shape(stored_name))
        problems.append(f"{stored_name} has shape {stored}, config.json asks for {shapes[name]}")
    if problems:
        raise UserError(listed(f"{folder.path}: the weights do not fit the architecture", problems))
    causal_lm = causal_lm.to(world.device).eval()
    check_head(causal_lm, folder)
    return causal_lm


def empty_model(folder: ModelFolder, *, first_layer: int = 0) -> Any:
    """The architecture, of the layers from `first_layer` on; its parameters have shapes and no memory."""
    with torch.device("meta"):
        return _architecture(folder, first_layer=first_layer)


def fits_without_lower_layers(folder: ModelFolder, first_layer: int) -> bool:
    """False if the layers from `first_layer` on are built in another way when they are the lowest ones."""
    upper = list(range(first_layer, folder.load_config().num_hidden_layers))
    return not compare_layers(empty_model(folder), empty_model(folder, first_layer=first_layer), upper)


def copy_weights(
    model: nn.Module,
    reader: TensorReader,
    folder: ModelFolder,
    *,
    first_layer: int = 0,
    leave_out: nn.Parameter | None = None,
) -> None:
    """Copies weights into a model whose parameters are sharded by ZeRO-3, one tensor at a time.

    Args:
        model: what to copy into.
        reader: the stored tensors.
        folder: where they are, for messages.
        first_layer: the stored layer that the model's first one is.
        leave_out: a parameter that is not copied.

    Raises:
        UserError: with every weight that is missing or of another shape.
    """
    import deepspeed  # here: commands that load no model do not wait for it

    problems = []
    writes = not dist.is_initialized() or dist.get_rank() == 0
    for name, parameter in model.named_parameters():
        if parameter is leave_out:
            continue
        stored_name = _stored_name(shift_layer(name, first_layer), reader, model)
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
        if stored_name is None:
            problems.append(f"there is no tensor {shift_layer(name, first_layer)}")
            continue
        stored_shape = reader.shape(stored_name)
        if stored_shape != shape:
            problems.append(f"{stored_name} has shape {list(stored_shape)}, config.json asks for {list(shape)}")
            continue
        tensor = reader.read(stored_name) if writes else None
        with deepspeed.zero.GatheredParameters(parameter, modifier_rank=0):
            if tensor is not None:
                parameter.data.copy_(tensor)
    if problems:
        raise UserError(listed(f"{folder.path}: the weights do not fit the architecture", problems))


def shift_layer(name: str, by: int) -> str:
    """The name of the same parameter, so many layers further up."""
    layer = LAYER_NAME.search(name)
    return name if layer is None else renumber_layer(name, int(layer.group(1)) + by)


def output_name(causal_lm: Any, reader: TensorReader) -> str:
    """The name under which the folder stores the output matrix; that of the embeddings where the two are tied."""
    weight = causal_lm.get_output_embeddings().weight
    names = [name for name, parameter in causal_lm.named_parameters(remove_duplicate=False) if parameter is weight]
    return next(stored for name in names if (stored := _stored_name(name, reader, causal_lm)) is not None)


def sharded_numel(parameters: Iterable[nn.Parameter]) -> int:
    """Elements of ZeRO-3 parameters that this rank holds."""
    return sum(parameter.ds_tensor.numel() for parameter in parameters)  # type: ignore[attr-defined]


def _architecture(folder: ModelFolder, dtype: torch.dtype | None = None, *, first_layer: int = 0) -> Any:
    from transformers import AutoModelForCausalLM

    model_config = _config_without_dropout(folder)
    if first_layer:
        layers = list(range(first_layer, model_config.num_hidden_layers))
        model_config = type(model_config).from_dict(cut_config(model_config.to_dict(), layers))
    try:
        return AutoModelForCausalLM.from_config(model_config, dtype=dtype, trust_remote_code=folder.trust_remote_code)
    except (ValueError, ImportError) as error:
        raise UserError(f"{folder.path}: transformers cannot build this model ({error})") from None


def _config_without_dropout(folder: ModelFolder) -> Any:
    # A run is to be a function of its config, seed and data alone, and the teacher is only read.
    model_config = folder.load_config()
    for name, value in model_config.to_dict().items():
        if isinstance(value, float) and ("dropout" in name or name.endswith("pdrop")):
            setattr(model_config, name, 0.0)
    return model_config


def _stored_name(name: str, reader: TensorReader, model: Any) -> str | None:
    """The folder's name for the parameter `name`, or None; some folders leave out the base model's prefix."""
    bare = name.removeprefix(f"{model.base_model_prefix}.")
    return next((alias for alias in (name, bare) if alias in reader), None)


def _no_init_weights() -> Any:
    """The random initialisation would be overwritten, and indexes parameters of which a rank holds only a share."""
    try:
        from transformers.initialization import no_init_weights  # transformers 5
    except ImportError:
        from transformers.modeling_utils import no_init_weights
    return no_init_weights()
