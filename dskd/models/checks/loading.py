"""Loading a model folder as its users do: with transformers' AutoModelForCausalLM."""

from pathlib import Path
from typing import Any

import torch

from dskd.errors import UserError, first_line, listed

_CANNOT_LOAD = (OSError, ValueError, ImportError, RuntimeError, KeyError, AttributeError, TypeError)


def load_with_transformers(
    folder: Path, dtype: torch.dtype | str, *, trust_remote_code: bool, remedy: str | None = None
) -> Any:
    """Returns the causal LM of a folder, all of whose weights are stored there.

    Raises:
        UserError: when transformers cannot load it, or would fill in weights at random, with all of these and the
            remedy.
    """
    from transformers import AutoModelForCausalLM

    advice = f"; {remedy}" if remedy else ""
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except _CANNOT_LOAD as error:
        raise UserError(f"{folder}: transformers cannot load this model ({first_line(error)}){advice}") from error
    # An entry of the latter is a name, or begins with one.
    mismatched = [entry if isinstance(entry, str) else entry[0] for entry in loading["mismatched_keys"]]
    filled_in = [*sorted(loading["missing_keys"]), *(f"{name} (stored with another shape)" for name in mismatched)]
    if filled_in:
        raise UserError(
            listed(f"{folder}: transformers fills these in at random, since they are not stored{advice}", filled_in)
        )
    return model
