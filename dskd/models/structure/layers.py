"""The layers of a model: finding them, comparing their kinds, and recording the states that enter and leave them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from dskd.errors import UserError, listed
from dskd.models.files.weights import LAYER_NAME
from dskd.models.structure.cut_config import RULES

# Attributes of modules that may differ between two layers of one kind; a student's config.json replaces the rules.
_NOT_OF_A_KIND = ("training", *RULES)


class ModulePass(NamedTuple):
    """A forward pass of a module: the states that went into it and came out of it."""

    input: torch.Tensor
    output: torch.Tensor
    returns_tuple: bool  # whether the module returned a tuple, of which `output` is the first item


@contextmanager
def recorded(modules: Sequence[nn.Module]) -> Iterator[list[ModulePass]]:
    """Yields a list that receives the runs of these modules, in the order in which they end."""
    runs: list[ModulePass] = []

    def keep(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        returns_tuple = isinstance(output, tuple)
        states = output[0] if returns_tuple else output
        runs.append(ModulePass(input_states(args, kwargs).detach(), states.detach(), returns_tuple))

    hooks = [module.register_forward_hook(keep, with_kwargs=True) for module in modules]
    try:
        yield runs
    finally:
        for hook in hooks:
            hook.remove()


def input_states(args: Any, kwargs: Any) -> torch.Tensor:
    """Returns the states among the arguments of a layer's forward."""
    states: torch.Tensor = args[0] if args else kwargs["hidden_states"]
    return states


def check_kinds(teacher: nn.Module, student: Any, layers: Sequence[int]) -> None:
    """Refuses a student whose layers differ in kind from the teacher's layers they are made from.

    Args:
        teacher: the teacher, which may be on the meta device.
        student: the model built from the cut config.json, which may be on the meta device too.
        layers: the teacher's layers that the student keeps.

    Raises:
        UserError: when layers differ, with up to ten differences.
    """
    differences = compare_layers(teacher, student, layers)
    scales = getattr(student.config, "scale_attn_by_inverse_layer_idx", False)
    if scales and list(layers) != list(range(len(layers))):
        differences.append("config.json scales attention by a layer's number (scale_attn_by_inverse_layer_idx)")
    if differences:
        raise UserError(
            listed(
                f"student.layers: {type(student).__name__} with the teacher's layers {', '.join(map(str, layers))} "
                "would compute something different from what these layers compute in the teacher; keep others, for "
                "example the lowest ones (student.spacing: first)",
                differences[:10],
            )
        )


def compare_layers(whole: nn.Module, part: nn.Module, layers: Sequence[int]) -> list[str]:
    """Lists the differences of two models' layers in modules, settings and shapes; none if they compute the same.

    Args:
        whole: a model.
        part: a model whose layer i should be the same as layer `layers[i]` of `whole`.
        layers: layer numbers in `whole`.
    """
    theirs, ours = layers_of(whole), layers_of(part)
    if len(ours) != len(layers):
        return [f"it has {len(ours)} layers, {len(layers)} were kept"]
    differences = []
    for new, old in enumerate(layers):
        expected, actual = kind_of(theirs[old], old), kind_of(ours[new], new)
        for name in sorted(expected.keys() | actual.keys()):
            if expected.get(name) != actual.get(name):
                differences.append(
                    f"layer {new}, the teacher's {old}: {name} is {actual.get(name)}, there {expected.get(name)}"
                )
    return differences


def layers_of(model: nn.Module) -> list[nn.Module]:
    """Returns the model's layers in order, found by the names of their parameters."""
    layers: dict[int, nn.Module] = {}
    for name, _ in model.named_parameters():
        if layer := LAYER_NAME.search(name):
            layers.setdefault(int(layer.group(1)), model.get_submodule(name[: layer.end() - 1]))
    return [layers[number] for number in sorted(layers)]


def kind_of(layer: nn.Module, number: int) -> dict[str, Any]:
    """Returns {name of a setting or tensor in a layer: its value or shape}, leaving out the layer's own number.

    Layers of the same kind have the same settings and shapes, also after DeepSpeed has sharded them.
    """
    kind: dict[str, Any] = {}
    for path, module in layer.named_modules():
        prefix = f"{path}." if path else ""
        kind[f"{prefix}class"] = type(module).__name__
        for name, value in vars(module).items():
            is_number = ("layer" in name or "idx" in name) and type(value) is int and value in (number, number + 1)
            is_setting = isinstance(value, bool | int | float | str | None) and not name.startswith("ds_")
            if is_setting and name not in _NOT_OF_A_KIND and not is_number:
                kind[prefix + name] = value
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            kind[prefix + name] = list(getattr(tensor, "ds_shape", tensor.shape))
    return kind
