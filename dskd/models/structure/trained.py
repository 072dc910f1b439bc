"""The choice of the student's parameters that are trained, by the keys `student.train_*`."""

from typing import Any

from torch import nn

from dskd.config import StudentConfig
from dskd.errors import UserError
from dskd.models.files.weights import LAYER_NAME
from dskd.models.structure.final_norm import final_norm_names


def trained_layers(student: StudentConfig, count: int) -> set[int]:
    """Returns the indices of the trained layers among the student's `count` layers.

    Raises:
        UserError: if one does not exist.
    """
    if (problem := student.why_not_trained(count, f"the student has {count} layers")) is not None:
        remedy = f"; set it to {count} or less, or to all" if isinstance(student.train_layers, int) else ""
        raise UserError(f"student.{problem}{remedy}")
    return {layer for layer in range(count) if student.trains(layer, count)}


def trains_embeddings(student: StudentConfig, *, tied: bool) -> bool:
    """Returns True if the input embeddings are trained; if they are tied to the head, training either trains both."""
    return student.train_embeddings or (tied and student.train_lm_head)


def trains_head(student: StudentConfig, *, tied: bool) -> bool:
    """Returns True if the output matrix is trained."""
    return student.train_lm_head or (tied and student.train_embeddings)


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
