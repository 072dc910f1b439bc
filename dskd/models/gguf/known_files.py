"""GGUF files whose models are known by their content, because the files themselves do not name them rightly."""

from collections.abc import Mapping

from dskd.models.files import smollm2

# {sha256 of the file: the model's name on the Hub}.
HUB_NAMES: Mapping[str, str] = {smollm2.SHA256: smollm2.HUB_NAME}
