"""The student in training: its layers in a ZeRO-3 engine, with the head that computes the losses.

If its lowest layers are frozen copies of the teacher's, it starts from the teacher's hidden states at that depth
(:mod:`dskd.models.structure.trunk`), and those layers are not loaded.

Shapes: B batch, T tokens, D hidden, V vocabulary.
"""

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from dskd.config import Config
from dskd.distributed.world import World
from dskd.errors import UserError
from dskd.losses.head import DistillationHead, HeadSizes
from dskd.models.checks.head_probe import find_logit_transform
from dskd.models.checks.probes import check_documents
from dskd.models.checks.reference import compare_with_transformers
from dskd.models.files.folder import ModelFolder
from dskd.models.files.weights import TensorReader
from dskd.models.running.frozen import Decoder
from dskd.models.running.precision import compute_dtype
from dskd.models.structure.base_model import base_model, base_model_name
from dskd.models.structure.causal_lm import MAX_LIVE, build_sharded, empty_model, engine_settings
from dskd.models.structure.output_head import LogitTransform
from dskd.models.structure.stored_names import StoredNames, output_name
from dskd.models.structure.trained import choose_trained
from dskd.training.models.width_map import build_width_map

# Bytes that DeepSpeed holds for each trained element, all in float32: the weight, AdamW's two moments, and the sum of
# gradients over micro-batches.
MASTER_BYTES, MOMENT_BYTES, GRADIENT_BYTES = 4, 8, 4
REDUCE_BUCKET = 50_000_000  # gradient elements that DeepSpeed reduces over the ranks in one operation
# The only rank holds everything anyway. Weights that stay gathered take no more memory and need no gathering and
# releasing in each module; and to scatter gradients, DeepSpeed would copy all of them twice.
_ONE_CPU_RANK = {"stage3_param_persistence_threshold": MAX_LIVE, "reduce_scatter": False}


class StudentModule(nn.Module):
    """The trained decoder with the head that holds its output matrix and computes the losses.

    `hub_names` maps each parameter's name to its name in the Hugging Face folder, which has no `width_map`.
    """

    def __init__(
        self,
        decoder: Decoder,
        head: DistillationHead,
        hub_names: dict[str, str],
        width_map: nn.Linear | None = None,
    ) -> None:
        super().__init__()
        self.decoder = decoder
        self.head = head
        self.hub_names = hub_names
        self.width_map = width_map

    def forward(
        self,
        inputs: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        *,
        decoder_options: Mapping[str, Any] | None = None,
        only_states: bool = False,
        **loss_inputs: Any,
    ) -> Any:
        """Returns the output of :meth:`dskd.losses.head.DistillationHead.forward` for the last hidden states.

        With `only_states` it returns these, [B, T, D].

        Args:
            inputs: token ids [B, T] or, with a shared trunk, the trunk's output states [B, T, D].
            position_ids: positions within documents, or None.
            decoder_options: passed to the base model.
            only_states: compute neither losses nor logits.
            loss_inputs: passed to the head.
        """
        hidden = self.decoder(inputs, position_ids, **(decoder_options or {}))
        if only_states:
            return hidden
        return self.head(hidden, mapped=None if self.width_map is None else self.width_map(hidden), **loss_inputs)

    def exported_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yields each trained parameter that an export has, with its name in the Hugging Face folder."""
        for name, parameter in self.named_parameters():
            if parameter.requires_grad and not name.startswith("width_map."):
                yield self.hub_names[name], parameter


def load_student(
    folder: ModelFolder,
    config: Config,
    world: World,
    *,
    teacher: ModelFolder | None,
    margin: float,
    accumulation_steps: int,
    trunk_depth: int = 0,
    load_universal: bool = False,
    mapped_width: int | None = None,
) -> Any:
    """Builds the student's ZeRO-3 engine, with AdamW over the parameters that `student.train_*` selects.

    Args:
        folder: the model to start from.
        config: the experiment.
        world: the ranks.
        teacher: the model whose output matrix the head needs, or None if no term of the loss reads its logits.
        margin: of the sense loss, in units of |h - s|² / D.
        accumulation_steps: micro-batches per rank and optimizer step.
        trunk_depth: number of lowest layers whose result the inputs are; if not 0, neither these layers nor the
            embeddings are loaded.
        load_universal: the engine will resume from a checkpoint in DeepSpeed's universal form
            (:mod:`dskd.training.checkpoints.universal`).
        mapped_width: the width to which :mod:`dskd.training.models.width_map` maps the states; None: it maps none.

    Raises:
        UserError: if weights are missing, nothing would be trained, or sequences hold several documents and the model
            does not keep them apart.
    """
    import deepspeed  # imported here so that commands without a model do not wait for it

    dtype = compute_dtype(config.precision, world.device)
    train = config.train
    if train.compile_losses and world.device.type == "cpu":
        _require_compiler()
    settings = engine_settings(
        dtype, world, folder.load_config().hidden_size, micro_batch_size=train.micro_batch_size
    ) | {
        "gradient_accumulation_steps": accumulation_steps,
        "gradient_clipping": train.gradient_clipping,
        "zero_allow_untested_optimizer": True,
        "checkpoint": {"load_universal": load_universal},
    }
    settings["zero_optimization"]["reduce_bucket_size"] = REDUCE_BUCKET
    if world.world_size == 1 and world.device.type == "cpu":  # not yet tried on a GPU
        settings["zero_optimization"] |= _ONE_CPU_RANK
    causal_lm = build_sharded(folder, settings, dtype, world, first_layer=trunk_depth)
    student, trained = assemble(
        causal_lm,
        folder,
        config,
        world,
        teacher=teacher,
        margin=margin,
        trunk_depth=trunk_depth,
        mapped_width=mapped_width,
    )
    engine, *_ = deepspeed.initialize(model=student, optimizer=build_optimizer(trained, config), config=settings)
    if not trunk_depth:
        compare_with_transformers(engine, student.decoder, folder, world, dtype)
    if config.corpus.packing == "documents" and not trunk_depth:
        check_documents(engine, student.decoder, folder, world, dtype)
    return engine


def assemble(
    causal_lm: Any,
    folder: ModelFolder,
    config: Config,
    world: World,
    *,
    teacher: ModelFolder | None,
    margin: float,
    trunk_depth: int = 0,
    mapped_width: int | None = None,
) -> tuple[StudentModule, list[nn.Parameter]]:
    """Makes the module that is trained, in training mode, of a causal LM, whose parameters may be sharded.

    The arguments are those of :func:`load_student`; `causal_lm` lacks the lowest `trunk_depth` layers of `folder`.

    Returns:
        The module, and its trained parameters, each once.

    Raises:
        UserError: if nothing would be trained.
    """
    train, dtype = config.train, compute_dtype(config.precision, world.device)
    transform = find_logit_transform(causal_lm, folder)
    if train.activation_checkpointing:
        causal_lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    # First choose the trained parameters: `requires_grad` decides whether the teacher's output matrix must be stored.
    trained = choose_trained(causal_lm, config.student, first_layer=trunk_depth)
    names = _hub_names(causal_lm, folder, trunk_depth)
    teacher_matrix, teacher_transform = None, LogitTransform()
    if teacher is not None:
        teacher_lm = empty_model(teacher)
        teacher_matrix = _teacher_matrix(causal_lm, folder, teacher_lm, teacher, dtype)
        teacher_transform = find_logit_transform(teacher_lm, teacher)
    if trunk_depth:
        _drop_embeddings(causal_lm)
    output_weight = causal_lm.get_output_embeddings().weight
    sizes = HeadSizes.of(
        train.loss_chunk_size, getattr(output_weight, "ds_shape", output_weight.shape)[0], world.device
    )
    head = DistillationHead(
        output_weight,
        teacher_matrix,
        config.loss,
        chunk_size=sizes.chunk,
        block_size=sizes.block,
        margin=margin,
        compile_losses=train.compile_losses,
        transform=transform,
        teacher_transform=teacher_transform,
    )
    width_map = None
    if mapped_width is not None:
        width_map = build_width_map(folder.load_config().hidden_size, mapped_width, dtype, world.device)
        trained.extend(width_map.parameters())
    student = StudentModule(Decoder(base_model(causal_lm)), head, names, width_map)
    # Activation checkpointing works in training mode only. `build_sharded` has removed dropout.
    student.train()
    return student, trained


def build_optimizer(trained: Sequence[nn.Parameter], config: Config) -> torch.optim.Optimizer:
    """Builds AdamW over the parameters."""
    # Fused, a CPU passes once through weights, gradients and moments instead of ten times. On a GPU torch chooses.
    fused = True if trained[0].device.type == "cpu" else None
    train = config.train
    return torch.optim.AdamW(trained, lr=train.peak_learning_rate, weight_decay=train.weight_decay, fused=fused)


def _require_compiler() -> None:
    """Checks that there is a C++ compiler: on a CPU, unlike on a GPU, torch.compile needs one."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise UserError(
            f"train.compile_losses: torch.compile needs a C++ compiler, but there is no {compiler}; install one "
            "(g++ on Debian), set the variable CXX to one, or set train.compile_losses to false",
            known_to_all_ranks=True,
        )


def _teacher_matrix(
    causal_lm: Any, student: ModelFolder, teacher_lm: Any, teacher: ModelFolder, dtype: torch.dtype
) -> torch.Tensor | None:
    """Returns the teacher's output matrix [V, D], or None if the student's is equal and not trained.

    `teacher_lm` has the teacher's architecture, which may be another, and needs no weights.
    """
    reader, own = TensorReader(teacher.path), TensorReader(student.path)
    matrix = reader.read(output_name(teacher_lm, reader))
    if not causal_lm.get_output_embeddings().weight.requires_grad:
        stored = own.read(output_name(causal_lm, own))
        if stored.shape == matrix.shape and stored.dtype == matrix.dtype and torch.equal(stored, matrix):
            return None
    return matrix.to(dtype)


def _drop_embeddings(causal_lm: Any) -> None:
    embeddings = causal_lm.get_input_embeddings()
    for module in base_model(causal_lm).modules():
        for name, child in module.named_children():
            if child is embeddings:
                setattr(module, name, nn.Identity())


def _hub_names(causal_lm: Any, folder: ModelFolder, first_layer: int) -> dict[str, str]:
    """Returns {name of a parameter in :class:`StudentModule`: its name in the Hugging Face folder}."""
    stored = StoredNames(causal_lm, TensorReader(folder.path), first_layer=first_layer)
    prefix = base_model_name(causal_lm)
    names = {}
    for name, _ in base_model(causal_lm).named_parameters():
        hub_name = stored.find(f"{prefix}.{name}")
        if hub_name is not None:
            names[f"decoder.base.{name}"] = hub_name
    return names | {"head.weight": output_name(causal_lm, TensorReader(folder.path))}
