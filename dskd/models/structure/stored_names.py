"""The names under which a folder stores a model's tensors, and a check that model and folder have the same tensors.

A folder may leave out the base model's prefix, store a tied output matrix in addition to the embeddings, and contain
tensors of layers that are not built. Everything else must match: a stored tensor without a place in the model would be
a missing part of the function.
"""

import re
from typing import Any

from torch import nn

from dskd.errors import UserError, listed
from dskd.models.files.folder import ModelFolder
from dskd.models.files.weights import LAYER_NAME, TensorReader, renumber_layer
from dskd.models.structure.base_model import base_model_name

_FLOATS = ("F64", "F32", "F16", "BF16")


class StoredNames:
    """The names under which a folder stores the parameters and buffers of a causal LM.

    Args:
        causal_lm: the model, which may lack its lowest layers.
        reader: the stored tensors.
        first_layer: the number, in the folder, of the model's first layer.
    """

    def __init__(self, causal_lm: Any, reader: TensorReader, *, first_layer: int = 0) -> None:
        self._reader = reader
        self._first_layer = first_layer
        self._prefix = f"{base_model_name(causal_lm)}."

    def find(self, name: str) -> str | None:
        """Returns the folder's name for the parameter or buffer that the model calls `name`, or None if not stored."""
        whole = shift_layer(name, self._first_layer)
        aliases = (whole, whole.removeprefix(self._prefix))
        return next((alias for alias in aliases if alias in self._reader), None)

    def find_any(self, names: list[str]) -> str | None:
        """Returns the folder's name for a tensor to which the model gives several names, such as a tied matrix."""
        return next((stored for name in names if (stored := self.find(name)) is not None), None)

    def expected(self, name: str) -> str:
        """Returns the name to report when :meth:`find` returns None."""
        return shift_layer(name, self._first_layer)


def parameter_names(causal_lm: nn.Module) -> list[tuple[nn.Parameter, list[str]]]:
    """Returns every parameter once, with all its names, the name whose stored values are used first.

    Transformers ties an output matrix to the embeddings after loading both, so the stored values of the embeddings win.
    """
    names: dict[int, list[str]] = {}
    parameters: dict[int, nn.Parameter] = {}
    for name, parameter in causal_lm.named_parameters(remove_duplicate=False):
        parameters[id(parameter)] = parameter
        names.setdefault(id(parameter), []).append(name)
    source = _embeddings_name(causal_lm)
    return [(parameters[key], sorted(names[key], key=lambda name: name != source)) for key in parameters]


def _embeddings_name(causal_lm: Any) -> str:
    modules = causal_lm.named_modules()
    source = next((name for name, module in modules if module is causal_lm.get_input_embeddings()), "")
    return f"{source}.weight"


def persistent_buffers(model: nn.Module) -> dict[str, Any]:
    """Returns the buffers that are stored with a model, by name."""
    stored = set(model.state_dict(keep_vars=True))
    return {name: buffer for name, buffer in model.named_buffers() if name in stored}


def check_stored_tensors(
    causal_lm: Any,
    reader: TensorReader,
    folder: ModelFolder,
    *,
    first_layer: int = 0,
    leave_out: nn.Parameter | None = None,
) -> None:
    """Checks that a model and its folder have matching tensors, before any is read.

    Args:
        causal_lm: the model; only its shapes are used.
        reader: the stored tensors.
        folder: the folder of the tensors, for messages.
        first_layer: the number, in the folder, of the model's first layer.
        leave_out: a parameter that will not be read.

    Raises:
        UserError: with every tensor that is missing, has another shape, is not floating-point although the model's is,
            or has no place in the model.
    """
    names = StoredNames(causal_lm, reader, first_layer=first_layer)
    problems, taken, embeddings = [], set(), _embeddings_name(causal_lm)
    tensors = [(aliases, parameter) for parameter, aliases in parameter_names(causal_lm)]
    tensors += [([name], buffer) for name, buffer in persistent_buffers(causal_lm).items()]
    for aliases, tensor in tensors:
        taken |= {stored for alias in aliases if (stored := names.find(alias)) is not None}
        stored = names.find_any(aliases)
        if tensor is leave_out:
            continue
        if stored is None:
            problems.append(f"there is no tensor {names.expected(aliases[0])}")
        elif len(aliases) > 1 and aliases[0] == embeddings and names.find(embeddings) is None:
            problems.append(
                f"there is no tensor {embeddings}, to which config.json ties the output matrix, only {stored}, which "
                f"transformers does not read then; store it as {embeddings}"
            )
        elif reader.shape(stored) != tuple(tensor.shape):
            shapes = f"{list(reader.shape(stored))}, config.json asks for {list(tensor.shape)}"
            problems.append(f"{stored} has shape {shapes}")
        elif tensor.is_floating_point() and reader.stored_type(stored) not in _FLOATS:
            problems.append(
                f"{stored} is stored as {reader.stored_type(stored)}: a quantised model that config.json does not "
                "declare; use the one it was made from"
            )
    problems += [
        f"{name}: the architecture has no such tensor, so its effect would be missing"
        for name in _left_over(causal_lm, reader, taken, first_layer, folder.load_config().num_hidden_layers)
    ]
    if problems:
        raise UserError(listed(f"{folder.path}: the weights do not fit the architecture", problems))


def shift_layer(name: str, by: int) -> str:
    """Returns the name of the same parameter `by` layers further up."""
    layer = LAYER_NAME.search(name)
    return name if layer is None else renumber_layer(name, int(layer.group(1)) + by)


def output_name(causal_lm: Any, reader: TensorReader) -> str:
    """Returns the name under which the folder stores the output matrix, which may be that of tied embeddings."""
    weight = causal_lm.get_output_embeddings().weight
    aliases = next(aliases for parameter, aliases in parameter_names(causal_lm) if parameter is weight)
    stored = StoredNames(causal_lm, reader).find_any(aliases)
    assert stored is not None, "loaded without it"
    return stored


def _left_over(causal_lm: Any, reader: TensorReader, taken: set[str], first_layer: int, num_stored: int) -> list[str]:
    """Lists the stored tensors that have no place in the model, except those known to change nothing.

    Of the folder's `num_stored` layers the model may lack the lowest, below `first_layer`, and the highest.
    """
    prefix = f"{base_model_name(causal_lm)}."
    buffers = {shift_layer(name, first_layer) for name, _ in causal_lm.named_buffers()}
    ignored = list(getattr(causal_lm, "_keys_to_ignore_on_load_unexpected", None) or [])
    if any(name.endswith("rotary_emb.inv_freq") for name in buffers):
        # Older models store it for every layer; it is computed from config.json.
        ignored.append(r"rotary_emb\.inv_freq")
    count = first_layer + causal_lm.config.num_hidden_layers
    # Layers that are left out, and those above the last that predict tokens further ahead; no architecture of
    # transformers runs the latter.
    further = range(count, num_stored + int(getattr(causal_lm.config, "num_nextn_predict_layers", None) or 0))

    def changes_nothing(name: str) -> bool:
        layer = LAYER_NAME.search(name)
        if layer is not None and (int(layer.group(1)) < first_layer or int(layer.group(1)) in further):
            return True
        if {name, prefix + name} & buffers:
            return True  # a buffer that is computed when the model is built
        return any(re.search(pattern, name) for pattern in ignored)

    return [name for name in reader.names if name not in taken and not changes_nothing(name)]
