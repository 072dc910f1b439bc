"""The frozen model, which is run but never trained, as the teacher is; and the decoder without a head.

A frozen model is either a ZeRO-3 engine without an optimizer or, with `teacher.mode: resident`, an ordinary model of
transformers that every rank holds whole. The student is in :mod:`dskd.training.models.student`.

Decoders return last hidden states, after the final norm. Logits are computed chunk by chunk, inside the module that
owns the output matrix. Shapes: B batch, T tokens, D hidden, V vocabulary.
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
from dskd.models.checks.architecture import check_architecture
from dskd.models.checks.head_probe import find_logit_transform
from dskd.models.checks.probes import check_documents
from dskd.models.checks.reference import compare_with_transformers
from dskd.models.files.folder import ModelFolder
from dskd.models.running.nvme import nvme_settings, open_nvme_folder
from dskd.models.running.packed_mask import build_masks_by_broadcasting
from dskd.models.running.precision import compute_dtype
from dskd.models.structure.base_model import base_model
from dskd.models.structure.causal_lm import (
    build_sharded,
    destroy_engine,
    empty_model,
    empty_tensors,
    engine_settings,
    load_resident,
)
from dskd.models.structure.output_head import LogitTransform, OutputHead


class Decoder(nn.Module):
    """A decoder without its head, from token ids to last hidden states."""

    def __init__(self, base_model: nn.Module) -> None:
        super().__init__()
        self.base = base_model
        build_masks_by_broadcasting()

    @property
    def layers(self) -> nn.ModuleList:
        """Returns its layers, lowest first."""
        count = self.base.config.num_hidden_layers  # type: ignore[union-attr]
        return next(m for m in self.base.modules() if isinstance(m, nn.ModuleList) and len(m) == count)

    def forward(self, inputs: torch.Tensor, position_ids: torch.Tensor | None = None, **options: Any) -> torch.Tensor:
        """Returns the last hidden states [B, T, D], after the final norm.

        `inputs` are token ids [B, T], or the states [B, T, D] that enter the lowest layer. Where `position_ids` [B, T]
        restart from 0, attention restarts too. `options` are passed to the base model.
        """
        named_inputs = {"inputs_embeds": inputs} if inputs.is_floating_point() else {"input_ids": inputs}
        # A copy, because XGLM adds to its positions in place, and teacher and student get the same tensor.
        positions = {} if position_ids is None else {"position_ids": position_ids.clone()}
        return self.base(**named_inputs, **({"use_cache": False} | positions | options)).last_hidden_state


Readout = Callable[[torch.Tensor, OutputHead], Any]


class OutputMatrix(nn.Module):
    """The owner of an output matrix that is not trained: ZeRO-3 gathers it only while this module's forward runs."""

    def __init__(self, weight: nn.Parameter, transform: LogitTransform) -> None:
        super().__init__()
        self.weight = weight
        self.transform = transform

    def forward(self, hidden: torch.Tensor, readout: Readout) -> Any:
        """Returns the result of `readout` for the states [B, T, D] and the output head."""
        return readout(hidden, OutputHead(self.weight, self.transform))


class FrozenDecoder(nn.Module):
    """A decoder that is not trained, with its output matrix if it was loaded."""

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
        """Returns the last hidden states [B, T, D], or the result of `readout` for them if it is given.

        `options` are passed to the decoder.
        """
        hidden = self.decoder(input_ids, position_ids, **options)
        if readout is None:
            return hidden
        assert self.head is not None, "loaded without its output matrix"
        return self.head(hidden, readout)


@dataclass(frozen=True)
class FrozenModel:
    """A decoder that is not trained, whole on every rank or sharded, as `teacher.mode` says; so is its output matrix.

    `engine` is a ZeRO-3 engine or the :class:`FrozenDecoder` itself, and takes the arguments of its forward.
    """

    engine: Any
    folder: ModelFolder
    device: torch.device
    vocab_size: int  # V
    hidden_size: int  # D
    nvme_folder: Path | None = None

    @property
    def decoder(self) -> Decoder:
        """Returns the decoder, which :meth:`hidden_states` runs; :mod:`dskd.models.structure.trunk` watches it."""
        module = self.engine if isinstance(self.engine, FrozenDecoder) else self.engine.module
        return module.decoder

    def hidden_states(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor | None = None, **options: Any
    ) -> torch.Tensor:
        """Returns the last hidden states [B, T, D] of `input_ids` [B, T], on the model's device.

        All ranks must make the same calls of this and of :meth:`read`, in the same order. Where `position_ids` [B, T]
        restart from 0, attention restarts too. `options` are passed to the base model.
        """
        return self._run(input_ids, position_ids, **options)

    def read(self, input_ids: torch.Tensor, position_ids: torch.Tensor | None, readout: Readout, **options: Any) -> Any:
        """Returns the result of `readout` for the last hidden states [B, T, D] and the output head.

        No rank has the matrix outside of `readout`, so anything that needs logits must compute them there, chunk by
        chunk. All ranks must make the same calls of this and of :meth:`hidden_states`, in the same order.

        Args:
            input_ids: [B, T].
            position_ids: [B, T], or None if the positions of each row simply count up from 0.
            readout: a function of states and head; its result is returned.
            options: more arguments for the base model, such as a cache of keys and values or an attention mask.
        """
        return self._run(input_ids, position_ids, readout=readout, **options)

    def close(self) -> None:
        """Frees the model's memory, and deletes its files on NVMe."""
        if isinstance(self.engine, FrozenDecoder):
            # torch and transformers may refer to a module.
            empty_tensors((*self.engine.parameters(), *self.engine.buffers()))
        else:
            destroy_engine(self.engine)
        if self.nvme_folder is not None:
            shutil.rmtree(self.nvme_folder, ignore_errors=True)

    @torch.no_grad()
    def _run(self, input_ids: torch.Tensor, position_ids: torch.Tensor | None, **options: Any) -> Any:
        positions = () if position_ids is None else (position_ids.to(self.device),)
        return self.engine(input_ids.to(self.device), *positions, **options)


def frozen_settings(
    folder: ModelFolder, config: Config, world: World, dtype: torch.dtype
) -> tuple[dict[str, Any], Path | None]:
    """Returns DeepSpeed's settings for a model that is sharded and not trained, as `teacher.offload` says, and the
    folder of its shares on NVMe if they are there.

    Raises:
        UserError: when there is no disk to offload it to.
    """
    settings = engine_settings(dtype, world, folder.load_config().hidden_size, micro_batch_size=1)
    pin = world.device.type == "cuda"
    nvme_folder: Path | None = None
    if config.teacher.offload == "cpu":
        settings["zero_optimization"]["offload_param"] = {"device": "cpu", "pin_memory": pin}
    elif config.teacher.offload == "nvme":
        assert config.teacher.nvme_path is not None
        nvme_folder = open_nvme_folder(config.teacher.nvme_path)
        largest = max(parameter.numel() for parameter in empty_model(folder).parameters())
        offload, aio = nvme_settings(nvme_folder, largest, world, pin_memory=pin)
        settings["zero_optimization"]["offload_param"], settings["aio"] = offload, aio
    return settings, nvme_folder


def load_frozen(
    folder: ModelFolder, config: Config, world: World, *, with_head: bool = True, num_layers: int | None = None
) -> FrozenModel:
    """Loads a model that will not be trained, in the way that `teacher.mode` and `teacher.offload` say.

    ZeRO-3 shards it over the ranks and keeps each share on the device, in the host's memory or on disk. A resident
    model is whole on the device of every rank.

    Args:
        folder: the model.
        config: the experiment.
        world: the ranks; all of them must call this.
        with_head: whether to keep the output matrix. If not, it takes no memory, and :meth:`FrozenModel.read` fails.
        num_layers: how many of the lowest layers to load; None: all. A part is not compared with transformers.

    Raises:
        UserError: when weights are missing, the model gets its logits in a way that is not supported, it does not keep
            packed documents apart, it computes something different from transformers, or there is no disk to offload
            it to.
    """
    dtype = compute_dtype(config.precision, world.device)
    check_architecture(folder, config.corpus)
    model_config = folder.load_config()
    nvme_folder: Path | None = None
    if config.teacher.mode == "resident":
        causal_lm = load_resident(folder, dtype, world, num_layers=num_layers)
    else:
        settings, nvme_folder = frozen_settings(folder, config, world, dtype)
        causal_lm = build_sharded(folder, settings, dtype, world, num_layers=num_layers)
    head = None
    if with_head:
        head = OutputMatrix(causal_lm.get_output_embeddings().weight, find_logit_transform(causal_lm, folder))
    module = FrozenDecoder(Decoder(base_model(causal_lm)), head).requires_grad_(False).eval()
    engine: Any = module
    if config.teacher.mode != "resident":
        import deepspeed  # imported here so that commands that load no model do not wait for it

        engine, *_ = deepspeed.initialize(model=module, config=settings)
        engine.eval()
        # They prepare a backward pass that never comes, in every call of every module: a small model spends a fifth of
        # its time on them.
        for hook in engine.optimizer.backward_hooks:
            hook.remove()
    if num_layers is None:
        compare_with_transformers(engine, module.decoder, folder, world, dtype)
        packed = config.corpus.packing == "documents"
        check_documents(engine, module.decoder, folder, world, dtype, packed=packed)
    return FrozenModel(engine, folder, world.device, model_config.vocab_size, model_config.hidden_size, nvme_folder)
