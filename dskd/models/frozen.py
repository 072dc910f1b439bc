"""Decoders without their heads, and the frozen model: one that is only read, as the teacher is.

A frozen model is a ZeRO-3 engine without an optimizer, or resident (`teacher.mode`): then every rank holds all of it,
as an ordinary model of transformers. :mod:`dskd.training.student` has the student.

The teacher's forward returns last hidden states, after the final norm; so does the decoder of the student. Logits exist
only chunk by chunk, where the output matrix is. Shapes: B batch, T tokens, D hidden, V vocabulary.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dskd.config import Config
from dskd.distributed.world import World
from dskd.models.architecture import check_architecture
from dskd.models.causal_lm import build_sharded, empty_model, engine_settings, load_resident
from dskd.models.folder import ModelFolder
from dskd.models.nvme import nvme_settings, open_nvme_folder
from dskd.models.precision import compute_dtype
from dskd.models.probes import check_documents
from dskd.models.reference import compare_with_transformers
from dskd.models.stored_names import base_model


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
    nvme_folder: Path | None = None

    @property
    def decoder(self) -> Decoder:
        """The decoder, whose modules :mod:`dskd.training.trunk` watches; to run it, call :meth:`hidden_states`."""
        module = self.engine if isinstance(self.engine, FrozenDecoder) else self.engine.module
        return module.decoder

    def hidden_states(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor | None = None, **options: Any
    ) -> torch.Tensor:
        """Last hidden states [B, T, D] of `input_ids` [B, T], on the model's device. All ranks must call it equally
        often, and in the same order as :meth:`read`.

        Where `position_ids` [B, T] start again from 0, attention starts again too. `options` go to the base model.
        """
        return self._run(input_ids, position_ids, **options)

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

    def close(self) -> None:
        """Gives the model's memory back, and removes what it put on disk."""
        if hasattr(self.engine, "destroy"):
            self.engine.destroy()
        else:
            for tensor in (*self.engine.parameters(), *self.engine.buffers()):
                tensor.data = tensor.new_empty(0)
        if self.nvme_folder is not None:
            shutil.rmtree(self.nvme_folder, ignore_errors=True)

    @torch.no_grad()
    def _run(self, input_ids: torch.Tensor, position_ids: torch.Tensor | None, **options: Any) -> Any:
        positions = () if position_ids is None else (position_ids.to(self.device),)
        return self.engine(input_ids.to(self.device), *positions, **options)


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
    check_architecture(folder, config)
    model_config = folder.load_config()
    nvme_folder: Path | None = None
    if config.teacher.mode == "resident":
        causal_lm = load_resident(folder, dtype, world)
    else:
        settings = engine_settings(dtype, world, model_config.hidden_size, micro_batch_size=1)
        pin = world.device.type == "cuda"
        if config.teacher.offload == "cpu":
            settings["zero_optimization"]["offload_param"] = {"device": "cpu", "pin_memory": pin}
        elif config.teacher.offload == "nvme":
            assert config.teacher.nvme_path is not None
            nvme_folder = open_nvme_folder(config.teacher.nvme_path)
            largest = max(parameter.numel() for parameter in empty_model(folder).parameters())
            offload, aio = nvme_settings(nvme_folder, largest, world, pin_memory=pin)
            settings["zero_optimization"]["offload_param"], settings["aio"] = offload, aio
        causal_lm = build_sharded(folder, settings, dtype, world)
    head = OutputMatrix(causal_lm.get_output_embeddings().weight) if with_head else None
    module = FrozenDecoder(Decoder(base_model(causal_lm)), head).requires_grad_(False).eval()
    engine: Any = module
    if config.teacher.mode != "resident":
        import deepspeed  # here: commands that load no model do not wait for it

        engine, *_ = deepspeed.initialize(model=module, config=settings)
        engine.eval()
    compare_with_transformers(engine, module.decoder, folder, world, dtype)
    packed = config.corpus.packing == "documents"
    check_documents(engine, module.decoder, folder, world, dtype, packed=packed)
    return FrozenModel(engine, folder, world.device, model_config.vocab_size, model_config.hidden_size, nvme_folder)
