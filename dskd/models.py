"""Teacher and student as DeepSpeed ZeRO-3 engines.

Both are built the same way, at every size: the architecture is constructed under `zero.Init`, so that each rank only
ever holds its share of a parameter, and the weights are copied from the safetensors one tensor at a time. No rank holds
a whole model at any moment.

The teacher's forward returns last hidden states, after the final norm; so does the decoder of the student. Logits exist
only chunk by chunk, in :mod:`dskd.head`. Shapes: B batch, T tokens, D hidden, V vocabulary.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import nn

from dskd.config import Config
from dskd.distributed import World
from dskd.errors import UserError, listed
from dskd.model_folder import LAYER_NAME, ModelFolder, TensorReader
from dskd.precision import compute_dtype
from dskd.probes import check_documents, check_head
from dskd.sequences import TokenBatch
from dskd.student import cut_config


class Decoder(nn.Module):
    """A decoder without its head: token ids to last hidden states."""

    def __init__(self, base_model: nn.Module) -> None:
        super().__init__()
        self.base = base_model

    @property
    def layers(self) -> nn.ModuleList:
        """Its layers, lowest first."""
        count = self.base.config.num_hidden_layers  # type: ignore[union-attr]
        return next(m for m in self.base.modules() if isinstance(m, nn.ModuleList) and len(m) == count)

    def forward(self, inputs: torch.Tensor, position_ids: torch.Tensor | None = None) -> torch.Tensor:
        """Last hidden states [B, T, D] after the final norm, of token ids [B, T] or of the states that go into the
        lowest layer [B, T, D].

        Where `position_ids` [B, T] start again from 0, attention starts again too.
        """
        given = {"inputs_embeds": inputs} if inputs.is_floating_point() else {"input_ids": inputs}
        positions = {} if position_ids is None else {"position_ids": position_ids}
        return self.base(**given, use_cache=False, **positions).last_hidden_state


@dataclass(frozen=True)
class FrozenModel:
    """A decoder that is only read: its ZeRO-3 engine, and its output matrix, held whole by every rank.

    The output matrix `head_weight` [V, D] is resident because it is read for every chunk of positions; it is 1 GB for
    Llama-3-8B and 4 GB for a 405B model.
    """

    engine: Any
    head_weight: torch.Tensor
    folder: ModelFolder

    @property
    def decoder(self) -> Decoder:
        """The decoder."""
        return self.engine.module

    @property
    def hidden_size(self) -> int:
        """D."""
        return self.head_weight.shape[1]

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.head_weight.shape[0]

    @torch.no_grad()
    def hidden_states(self, input_ids: torch.Tensor, position_ids: torch.Tensor | None = None) -> torch.Tensor:
        """Last hidden states [B, T, D] of `input_ids` [B, T], on the engine's device. All ranks must call it equally
        often.

        Where `position_ids` [B, T] start again from 0, attention starts again too.
        """
        device = self.head_weight.device
        positions = () if position_ids is None else (position_ids.to(device),)
        return self.engine(input_ids.to(device), *positions)

    def states_of(self, batch: TokenBatch, first: int) -> torch.Tensor:
        """:meth:`hidden_states` of a batch whose first sequence has the number `first`.

        Raises:
            UserError: when the state of a position with a target is not finite: it would spoil every mean it is in.
        """
        hidden = self.hidden_states(batch.input_ids, batch.position_ids)
        spoiled = batch.has_target & ~hidden.isfinite().all(-1).cpu()
        if spoiled.any():
            sequence, position = spoiled.nonzero()[0].tolist()
            raise UserError(
                f"{self.folder.path}: this model's state at position {position} of sequence {first + sequence} is "
                f"not finite, nor are those of {int(spoiled.sum()) - 1} more positions of this batch; check its "
                "weights, or use precision: fp32"
            )
        return hidden

    def close(self) -> None:
        """Gives the engine's memory back."""
        self.engine.destroy()


def load_frozen(folder: ModelFolder, config: Config, world: World, *, with_head: bool = True) -> FrozenModel:
    """Loads a model for reading: sharded over the ranks by ZeRO-3, its shares offloaded as `teacher.offload` says.

    Raises:
        UserError: when weights are missing, the model does more than a matrix product behind its last hidden state, or
            it does not keep documents apart where they are packed.
    """
    dtype = compute_dtype(config.precision, world.device)
    settings = engine_settings(dtype, world, folder.load_config().hidden_size, micro_batch_size=1)
    if config.teacher.offload == "cpu":
        pin = world.device.type == "cuda"
        settings["zero_optimization"]["offload_param"] = {"device": "cpu", "pin_memory": pin}
    causal_lm = build_sharded(folder, settings, dtype)
    reader = TensorReader(folder.path)
    head_weight = reader.read(output_name(causal_lm, reader)).to(world.device, dtype)
    decoder = Decoder(causal_lm.base_model).requires_grad_(False).eval()
    engine, *_ = deepspeed.initialize(model=decoder, config=settings)
    engine.eval()
    if config.corpus.packing == "documents":
        check_documents(engine, decoder, folder, world, dtype)
    return FrozenModel(engine, head_weight, folder)


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
    problems = []
    writes = not dist.is_initialized() or dist.get_rank() == 0
    for name, parameter in model.named_parameters():
        if parameter is leave_out:
            continue
        stored_name = _stored_name(shift_layer(name, first_layer), reader, model)
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
        if stored_name is None:
            problems.append(f"there is no tensor {name}")
            continue
        tensor = reader.read(stored_name) if writes else None
        if tensor is not None and tuple(tensor.shape) != shape:
            problems.append(f"{stored_name} has shape {list(tensor.shape)}, config.json asks for {list(shape)}")
            tensor = None
        with deepspeed.zero.GatheredParameters(parameter, modifier_rank=0):
            if tensor is not None:
                parameter.data.copy_(tensor)
    if problems:
        raise UserError(listed(f"{folder.path}: the weights do not fit the architecture", problems))


def sharded_numel(parameters: Iterable[nn.Parameter]) -> int:
    """Elements of ZeRO-3 parameters that this rank holds."""
    return sum(parameter.ds_tensor.numel() for parameter in parameters)  # type: ignore[attr-defined]


def engine_settings(dtype: torch.dtype, world: World, hidden_size: int, *, micro_batch_size: int) -> dict[str, Any]:
    """DeepSpeed's settings that teacher and student have in common."""
    return {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "bf16": {"enabled": dtype == torch.bfloat16},
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
    from transformers import AutoModelForCausalLM

    model_config = folder.load_config()
    if first_layer:
        layers = list(range(first_layer, model_config.num_hidden_layers))
        model_config = type(model_config).from_dict(cut_config(model_config.to_dict(), layers))
    # No dropout: a run is to be a function of its config, seed and data alone, and the teacher is only read.
    for name, value in model_config.to_dict().items():
        if isinstance(value, float) and ("dropout" in name or name.endswith("pdrop")):
            setattr(model_config, name, 0.0)
    with deepspeed.zero.Init(config_dict_or_path=settings), _no_init_weights():
        try:
            causal_lm = AutoModelForCausalLM.from_config(
                model_config, dtype=dtype, trust_remote_code=folder.trust_remote_code
            )
        except (ValueError, ImportError) as error:
            raise UserError(f"{folder.path}: transformers cannot build this model ({error})") from None
    causal_lm.tie_weights()  # part of the initialisation that was skipped
    embeddings = causal_lm.get_input_embeddings().weight
    tied = embeddings is causal_lm.get_output_embeddings().weight
    leave_out = embeddings if first_layer and not tied else None
    copy_weights(causal_lm, TensorReader(folder.path), folder, first_layer=first_layer, leave_out=leave_out)
    check_head(causal_lm, folder)
    return causal_lm


def shift_layer(name: str, by: int) -> str:
    """The name of the same parameter, so many layers further up."""
    layer = LAYER_NAME.search(name)
    return name if layer is None else f"{name[: layer.start(1)]}{int(layer.group(1)) + by}{name[layer.end(1) :]}"


def output_name(causal_lm: Any, reader: TensorReader) -> str:
    """The name under which the folder stores the output matrix; that of the embeddings where the two are tied."""
    weight = causal_lm.get_output_embeddings().weight
    names = [name for name, parameter in causal_lm.named_parameters(remove_duplicate=False) if parameter is weight]
    return next(stored for name in names if (stored := _stored_name(name, reader, causal_lm)) is not None)


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
