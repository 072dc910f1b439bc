"""The base model of a causal LM: what computes hidden states from token ids, without the output head."""

from typing import Any

from dskd.errors import UserError


def base_model_name(causal_lm: Any) -> str:
    """Returns the name of a causal LM's child that is its base model: the one that has the input embeddings.

    `base_model_prefix` is unreliable: Gemma 3's and Llama 4's name an attribute that their text models lack.

    Raises:
        UserError: when no child has them.
    """
    embeddings = causal_lm.get_input_embeddings()
    for name, child in causal_lm.named_children():
        if any(module is embeddings for module in child.modules()) and child is not embeddings:
            return name
    raise UserError(
        f"{type(causal_lm).__name__} has no base model of its own, from token ids to last hidden states; such a model "
        "is not supported"
    )


def base_model(causal_lm: Any) -> Any:
    """Returns the base model of a causal LM, from token ids to last hidden states."""
    return getattr(causal_lm, base_model_name(causal_lm))
