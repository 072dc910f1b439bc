"""Teacher and student as DeepSpeed ZeRO-3 engines.

Both are built the same way, at every size: the architecture is constructed under `zero.Init`, so that each rank only
ever holds its share of a parameter, and the weights are copied from the safetensors one tensor at a time. No rank holds
a whole model at any moment. A model that is only read can also be resident (`teacher.mode`): then every rank holds all
of it, as an ordinary model of transformers.

The teacher's forward returns last hidden states, after the final norm; so does the decoder of the student. Logits exist
only chunk by chunk, where the output matrix is. Shapes: B batch, T tokens, D hidden, V vocabulary.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import nn

from dskd.config import Config
from dskd.distributed import World
from dskd.errors import UserError, listed
from dskd.model_folder import LAYER_NAME, ModelFolder, TensorReader, renumber_layer
from dskd.nvme import nvme_settings, open_nvme_folder
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

    def forward(self, inputs: torch.Tensor, position_ids: torch.Tensor | None = None, **options: Any) -> torch.Tensor:
        """Last hidden states [B, T, D] after the final norm, of token ids [B, T] or of the states that go into the
        lowest layer [B, T, D].

        Where `position_ids` [B, T] start again from 0, attention starts again too. `options` go to the base model.
        """
        given = {"inputs_embeds": inputs} if inputs.is_floating_point() else {"input_ids": inputs}
        positions = {} if position_ids is None else {"position_ids": position_ids}
        return self.base(**given, **({"use_cache": False} | positions | options)).last_hidden_state


Readout = Callable[[torch.Tensor, torch.Tensor], Any]


class OutputMatrix(nn.Module):
    """Owns an output matrix that is only read: ZeRO-3 gathers it for this module's forward, and no longer."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, hidden: torch.Tensor, readout: Readout) -> Any:
        """What `readout` makes of the states [B, T, D] and the output matrix [V, D]."""
        return readout(hidden, self.weight)


class FrozenDecoder(nn.Module):
    """A decoder that is only read, with its output matrix where that is needed."""

    def __init__(self, decoder: Decoder, head: OutputMatrix | None) -> None:
        super().__init__()
        self.decoder = decoder
        self.head = head

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        *,
        readout: Readout | None = None,
        **options: Any,
    ) -> Any:
        """The last hidden states [B, T, D], or what `readout` makes of them; `options` go to the decoder."""
        hidden = self.decoder(input_ids, position_ids, **options)
        if readout is None:
            return hidden
        assert self.head is not None, "loaded without its output matrix"
        return self.head(hidden, readout)


@dataclass(frozen=True)
class FrozenModel:
    """A decoder that is only read. Its parameters, those of the output matrix too, lie where `teacher.mode` says.

    `engine` is called like :meth:`FrozenDecoder.forward`; it is a ZeRO-3 engine, or the module itself.
    """

    engine: Any
    folder: ModelFolder
    device: torch.device
    vocab_size: int  # V
    hidden_size: int  # D
    nvme_folder: "TemporaryDirectory[str] | None" = None

    @property
    def decoder(self) -> Decoder:
        """The decoder, whose modules :mod:`dskd.trunk` watches; to run it, call :meth:`hidden_states`."""
        module = self.engine if isinstance(self.engine, FrozenDecoder) else self.engine.module
        return module.decoder

    def hidden_states(self, input_ids: torch.Tensor, position_ids: torch.Tensor | None = None) -> torch.Tensor:
        """Last hidden states [B, T, D] of `input_ids` [B, T], on the model's device. All ranks must call it equally
        often, and in the same order as :meth:`read`.

        Where `position_ids` [B, T] start again from 0, attention starts again too.
        """
        return self._run(input_ids, position_ids)

    def read(self, input_ids: torch.Tensor, position_ids: torch.Tensor | None, readout: Readout, **options: Any) -> Any:
        """What `readout` makes of the last hidden states [B, T, D] and the output matrix [V, D].

        Outside of `readout` no rank has the matrix: whatever needs logits is computed there, chunk by chunk. All ranks
        must call it equally often, and in the same order as :meth:`hidden_states`.

        Args:
            input_ids: [B, T].
            position_ids: [B, T], or None where they only count up.
            readout: a function of states and matrix; its result is returned.
            options: more arguments of the base model: a cache of keys and values, an attention mask.
        """
        return self._run(input_ids, position_ids, readout=readout, **options)

    def states_of(self, batch: TokenBatch, first: int) -> torch.Tensor:
        """:meth:`hidden_states` of a batch whose first sequence has the number `first`.

        Raises:
            UserError: when the state of a position with a target is not finite: it would spoil every mean it is in.
        """
        hidden = self.hidden_states(batch.input_ids, batch.position_ids)
        self._require_finite(hidden, batch, first)
        return hidden

    def read_states_of(self, batch: TokenBatch, first: int, readout: Readout) -> tuple[torch.Tensor, Any]:
        """:meth:`states_of`, and what `readout` makes of them and the output matrix.

        Raises:
            UserError: as :meth:`states_of`.
        """
        hidden, result = self.read(
            batch.input_ids, batch.position_ids, lambda hidden, weight: (hidden, readout(hidden, weight))
        )
        self._require_finite(hidden, batch, first)
        return hidden, result

    def close(self) -> None:
        """Gives the model's memory back, and removes what it put on disk."""
        if hasattr(self.engine, "destroy"):
            self.engine.destroy()
        else:
            for tensor in (*self.engine.parameters(), *self.engine.buffers()):
                tensor.data = tensor.new_empty(0)
        if self.nvme_folder is not None:
            self.nvme_folder.cleanup()

    @torch.no_grad()
    def _run(self, input_ids: torch.Tensor, position_ids: torch.Tensor | None, **options: Any) -> Any:
        positions = () if position_ids is None else (position_ids.to(self.device),)
        return self.engine(input_ids.to(self.device), *positions, **options)

    def _require_finite(self, hidden: torch.Tensor, batch: TokenBatch, first: int) -> None:
        spoiled = batch.has_target & ~hidden.isfinite().all(-1).cpu()
        if spoiled.any():
            sequence, position = spoiled.nonzero()[0].tolist()
            raise UserError(
                f"{self.folder.path}: this model's state at position {position} of sequence {first + sequence} is "
                f"not finite, nor are those of {int(spoiled.sum()) - 1} more positions of this batch; check its "
                "weights, or use precision: fp32"
            )


def load_frozen(folder: ModelFolder, config: Config, world: World, *, with_head: bool = True) -> FrozenModel:
    """Loads a model for reading, as `teacher.mode` and `teacher.offload` say.

    It is sharded over the ranks by ZeRO-3, its shares kept on the device, in the computer's memory or on disk; or
    resident: every rank has all of it on its device.

    Args:
        folder: the model.
        config: the experiment.
        world: the ranks; all of them must call this.
        with_head: keep the output matrix. Without it there is no :meth:`FrozenModel.read`, and no memory for it.

    Raises:
        UserError: when weights are missing, the model does more than a matrix product behind its last hidden state,
            it does not keep documents apart where they are packed, or there is no disk to offload it to.
    """
    dtype = compute_dtype(config.precision, world.device)
    model_config = folder.load_config()
    nvme_folder: TemporaryDirectory[str] | None = None
    if config.teacher.mode == "resident":
        causal_lm = _load_resident(folder, dtype, world)
    else:
        settings = engine_settings(dtype, world, model_config.hidden_size, micro_batch_size=1)
        pin = world.device.type == "cuda"
        if config.teacher.offload == "cpu":
            settings["zero_optimization"]["offload_param"] = {"device": "cpu", "pin_memory": pin}
        elif config.teacher.offload == "nvme":
            assert config.teacher.nvme_path is not None
            nvme_folder = open_nvme_folder(config.teacher.nvme_path)
            largest = max(parameter.numel() for parameter in _empty_model(folder).parameters())
            offload, aio = nvme_settings(nvme_folder.name, largest, world, pin_memory=pin)
            settings["zero_optimization"]["offload_param"], settings["aio"] = offload, aio
        causal_lm = build_sharded(folder, settings, dtype)
    head = OutputMatrix(causal_lm.get_output_embeddings().weight) if with_head else None
    module = FrozenDecoder(Decoder(causal_lm.base_model), head).requires_grad_(False).eval()
    engine: Any = module
    if config.teacher.mode != "resident":
        engine, *_ = deepspeed.initialize(model=module, config=settings)
        engine.eval()
    if config.corpus.packing == "documents":
        check_documents(engine, module.decoder, folder, world, dtype)
    return FrozenModel(engine, folder, world.device, model_config.vocab_size, model_config.hidden_size, nvme_folder)


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
    with deepspeed.zero.Init(config_dict_or_path=settings), _no_init_weights():
        causal_lm = _architecture(folder, dtype, first_layer=first_layer)
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
    return name if layer is None else renumber_layer(name, int(layer.group(1)) + by)


def _load_resident(folder: ModelFolder, dtype: torch.dtype, world: World) -> Any:
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
        stored = list(reader.read(stored_name).shape)
        problems.append(f"{stored_name} has shape {stored}, config.json asks for {shapes[name]}")
    if problems:
        raise UserError(listed(f"{folder.path}: the weights do not fit the architecture", problems))
    causal_lm = causal_lm.to(world.device).eval()
    check_head(causal_lm, folder)
    return causal_lm


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


def _empty_model(folder: ModelFolder) -> Any:
    """The architecture, whose parameters have shapes and no memory."""
    with torch.device("meta"):
        return _architecture(folder)


def _config_without_dropout(folder: ModelFolder) -> Any:
    # A run is to be a function of its config, seed and data alone, and the teacher is only read.
    model_config = folder.load_config()
    for name, value in model_config.to_dict().items():
        if isinstance(value, float) and ("dropout" in name or name.endswith("pdrop")):
            setattr(model_config, name, 0.0)
    return model_config


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
