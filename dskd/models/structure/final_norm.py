"""Finding which of a decoder's parameters belong to its final norm.

Architectures have other parameters outside their layers: learned positions (GPT-2), a norm of the embeddings (BLOOM),
projections (OPT). Neither names nor the order of construction tell them apart: LFM2 calls its final norm
`embedding_norm`, and OPT constructs its final norm before the layers. The final norm is the one that runs after the
last layer, so this module runs the decoder without weights and records what runs then.
"""

import copy
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dskd.errors import UserError
from dskd.models.files.weights import LAYER_NAME
from dskd.models.structure.base_model import base_model


def final_norm_names(causal_lm: Any) -> set[str]:
    """Returns the names of the final norm's parameters in `causal_lm`.

    Raises:
        UserError: when not exactly one module can be the final norm.
    """
    inside = set(base_model(causal_lm).modules()) - {causal_lm.get_input_embeddings()}
    norms = {
        name: module
        for name, module in causal_lm.named_modules()
        if module in inside and not LAYER_NAME.search(f"{name}.") and _has_only_vectors(module)
    }
    after = _names_after_last_layer(causal_lm)
    candidates = [name for name in norms if after is None or name in after]
    if len(candidates) != 1:
        reason = f"{', '.join(candidates)} could be" if candidates else "no module of vectors runs after its layers"
        raise UserError(
            f"student.train_final_norm: cannot tell which module of {type(causal_lm).__name__} is its final norm: "
            f"{reason}; set it to false",
            known_to_all_ranks=True,
        )
    return {f"{candidates[0]}.{name}" for name, _ in norms[candidates[0]].named_parameters(recurse=False)}


def _has_only_vectors(module: nn.Module) -> bool:
    shapes = [getattr(p, "ds_shape", p.shape) for p in module.parameters(recurse=False)]  # ds_shape: under ZeRO-3
    return bool(shapes) and all(len(shape) == 1 for shape in shapes)


def _names_after_last_layer(causal_lm: Any) -> set[str] | None:
    """Returns the names of the modules that run after the last layer, or None if the model cannot run without weights.

    Also returns None when no layer ran.
    """
    ran: list[str] = []
    model_config = copy.deepcopy(causal_lm.config)
    model_config._attn_implementation = "eager"  # other implementations read the values of masks
    try:
        with FakeTensorMode(), torch.no_grad():  # tensors with shapes and without memory
            twin = type(causal_lm)(model_config).eval()
            for name, module in twin.named_modules():
                module.register_forward_hook(lambda *_, name=name: ran.append(name))
            ids = torch.zeros(1, 2, dtype=torch.long)
            base_model(twin)(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    except Exception:  # a model that reads a value may raise anything
        return None
    last = max((index for index, name in enumerate(ran) if LAYER_NAME.search(f"{name}.")), default=None)
    return None if last is None else set(ran[last + 1 :])
