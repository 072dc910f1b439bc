"""Configuration files of tests."""

from pathlib import Path

import yaml

MINIMAL = {"workdir": "w", "teacher": {"path": "a/b"}}  # what every configuration needs


def write_config(path: Path, content: str | dict, **changes: object) -> Path:
    """Writes a configuration file, which in a folder is `config.yaml`, and returns its path.

    `content` is its text, or data to write as YAML with whole sections or top-level keys replaced by `changes`.
    """
    if path.is_dir():
        path = path / "config.yaml"
    text = content if isinstance(content, str) else yaml.safe_dump({**content, **changes})
    path.write_text(text, encoding="utf-8")
    return path
