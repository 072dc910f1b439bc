"""Configuration files of tests."""

from pathlib import Path

import yaml

MINIMAL = {"workdir": "w", "teacher": {"path": "a/b"}}  # what every configuration needs


def write_yaml(folder: Path, content: str | dict) -> Path:
    """Writes a text, or data as YAML, to `folder/config.yaml`."""
    path = folder / "config.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8")
    return path
