"""The student in training: its layers in a ZeRO-3 engine, with the head that computes the losses.

If its lowest layers are frozen copies of the teacher's, it starts from the teacher's hidden states at that depth
(:mod:`dskd.models.trunk`), and those layers are not loaded. Shapes: B batch, T tokens, D hidden, V vocabulary.
"""

import os
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from dskd.config import Config, StudentConfig
from dskd.distributed.world import World
from dskd.errors import UserError
from dskd.losses.head import DistillationHead, HeadSizes
from dskd.models.causal_lm import build_sharded, empty_model, engine_settings
from dskd.models.final_norm import final_norm_names
from dskd.models.folder import ModelFolder
from dskd.models.frozen import Decoder
from dskd.models.precision import compute_dtype
from dskd.models.probes import check_documents
from dskd.models.reference import compare_with_transformers
from dskd.models.stored_names import StoredNames, base_model, base_model_name, output_name
from dskd.models.trained import trained_layers, trains_embeddings, trains_head
from dskd.models.weights import LAYER_NAME, TensorReader
from dskd.training.width_map import build_width_map

# Bytes that DeepSpeed holds for each trained element, all in float32: the weight, AdamW's two moments, and the sum of
# gradients over micro-batches.
MASTER_BYTES, MOMENT_BYTES, GRADIENT_BYTES = 4, 8, 4
REDUCE_BUCKET = 50_000_000  # gradient elements that DeepSpeed reduces over the ranks in one operation


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
            (:mod:`dskd.training.universal_checkpoint`).
        mapped_width: the width to which the states are mapped (:mod:`dskd.training.width_map`); None: they are not.

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
    causal_lm = build_sharded(folder, settings, dtype, world, first_layer=trunk_depth)
    if train.activation_checkpointing:
        causal_lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    # First choose the trained parameters: `requires_grad` decides whether the teacher's output matrix must be stored.
    trained = choose_trained(causal_lm, config.student, first_layer=trunk_depth)
    names = _hub_names(causal_lm, folder, trunk_depth)
    teacher_matrix = None if teacher is None else _teacher_matrix(causal_lm, folder, teacher, dtype)
    if trunk_depth:
        _drop_embeddings(causal_lm)
    output_weight = causal_lm.get_output_embeddings().weight
    sizes = HeadSizes.of(train.loss_chunk_size, output_weight.ds_shape[0], world.device)
    head = DistillationHead(
        output_weight,
        teacher_matrix,
        config.loss,
        chunk_size=sizes.chunk,
        block_size=sizes.block,
        margin=margin,
        compile_losses=train.compile_losses,
    )
    width_map = None
    if mapped_width is not None:
        width_map = build_width_map(folder.load_config().hidden_size, mapped_width, dtype, world.device)
        trained.extend(width_map.parameters())
    student = StudentModule(Decoder(base_model(causal_lm)), head, names, width_map)
    # Activation checkpointing works in training mode only. `build_sharded` has removed dropout.
    student.train()
    optimizer = torch.optim.AdamW(trained, lr=train.peak_learning_rate, weight_decay=train.weight_decay)
    engine, *_ = deepspeed.initialize(model=student, optimizer=optimizer, config=settings)
    if not trunk_depth:
        compare_with_transformers(engine, student.decoder, folder, world, dtype)
    if config.corpus.packing == "documents" and not trunk_depth:
        check_documents(engine, student.decoder, folder, world, dtype)
    return engine


def _require_compiler() -> None:
    """Checks that there is a C++ compiler: on a CPU, unlike on a GPU, torch.compile needs one."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise UserError(
            f"train.compile_losses: torch.compile needs a C++ compiler, but there is no {compiler}; install one "
            "(g++ on Debian), set the variable CXX to one, or set train.compile_losses to false",
            known_to_all_ranks=True,
        )


def choose_trained(causal_lm: Any, student: StudentConfig, *, first_layer: int = 0) -> list[nn.Parameter]:
    """Sets `requires_grad` according to `student.train_*`.

    Args:
        causal_lm: the model, with the student's layers from `first_layer` on.
        student: the settings that select trained parameters.
        first_layer: number of lowest layers that the model lacks.

    Returns:
        The trained parameters, each once; never the routers of a mixture of experts.

    Raises:
        UserError: if a layer index does not exist, nothing is trained, or the final norm cannot be identified.
    """
    layers = trained_layers(student, first_layer + causal_lm.config.num_hidden_layers)
    head = {id(p) for p in causal_lm.get_output_embeddings().parameters()}
    embeddings = {id(p) for p in causal_lm.get_input_embeddings().parameters()}
    tied = bool(head & embeddings)
    norm, trains_rest = _outside_of_layers(causal_lm, student)
    routers = _router_names(causal_lm)
    # ZeRO-3 trains parameters of one type only, and transformers always keeps two factors of Apertus's activation in
    # bf16.
    dtype = causal_lm.get_output_embeddings().weight.dtype
    trained = []
    for name, parameter in causal_lm.named_parameters():
        layer = LAYER_NAME.search(name)
        if id(parameter) in head:
            chosen = trains_head(student, tied=tied)
        elif id(parameter) in embeddings:
            chosen = not first_layer and trains_embeddings(student, tied=tied)
        elif layer:
            chosen = first_layer + int(layer.group(1)) in layers and name not in routers
        else:
            chosen = student.train_final_norm if name in norm else trains_rest
        chosen = chosen and parameter.dtype == dtype
        parameter.requires_grad_(chosen)
        if chosen:
            trained.append(parameter)
    if not trained:
        raise UserError("student: nothing would be trained; set student.train_layers to 1 or more")
    return trained


def _outside_of_layers(causal_lm: Any, student: StudentConfig) -> tuple[set[str], bool]:
    """Returns the names of the final norm's parameters, if they matter, and whether the other parameters are trained
    that belong to neither layers nor embeddings, such as a table of positions or a norm of the embeddings.

    They are trained with the embeddings of a student that is not cut from the teacher.

    Raises:
        UserError: if the final norm is to be trained and cannot be identified.
    """
    trains_rest = student.train_embeddings and student.origin != "cut"
    if not student.train_final_norm and not trains_rest:
        return set(), False
    try:
        return final_norm_names(causal_lm), trains_rest
    except UserError:
        if student.train_final_norm:
            raise
        return set(), False  # one of them may be the final norm


def _router_names(causal_lm: Any) -> set[str]:
    """Returns the names of the parameters that choose experts.

    These are never trained, because no term of the loss balances the experts' load.
    """
    return {
        f"{path}.{name}.{parameter}"
        for path, module in causal_lm.named_modules()
        for name, child in module.named_children()
        if name == "router" or (name == "gate" and hasattr(module, "experts"))
        for parameter, _ in child.named_parameters()
    }


def _teacher_matrix(
    causal_lm: Any, student: ModelFolder, teacher: ModelFolder, dtype: torch.dtype
) -> torch.Tensor | None:
    """Returns the teacher's output matrix [V, D], or None if the student's is equal and not trained."""
    reader, own = TensorReader(teacher.path), TensorReader(student.path)
    matrix = reader.read(output_name(empty_model(teacher), reader))  # whose architecture may be another
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
