"""The context recorded with a run: its parameters, environment, commit, and the manifests of its inputs."""

import contextlib
import functools
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml

from dskd.config import Config
from dskd.tracking.client import without_secrets

_PROJECT = Path(__file__).parents[2]


def flatten(section: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Converts nested settings to {dotted key: text}, the form in which MLflow compares parameters."""
    flat: dict[str, str] = {}
    for key, value in section.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{name}.")
        else:
            flat[name] = value if isinstance(value, str) else json.dumps(value)
    return flat


def environment() -> dict[str, Any]:
    """Describes the environment of the run: interpreter, machine, and the version of every installed package."""
    return {
        "python": sys.version,
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "packages": _installed(),
    }


@functools.cache  # reading all of them takes a while, and what this process has imported stays as it is
def _installed() -> dict[str, str]:
    versions = {}
    for distribution in metadata.distributions():
        about = distribution.metadata  # accessed once: each access reads and parses a file
        if about["Name"]:
            versions[about["Name"]] = about["Version"]
    return dict(sorted(versions.items(), key=lambda package: package[0].lower()))


def git_commit() -> str | None:
    """Returns the commit of this code, or None if it is unknown.

    It is the commit from which a container image was built, if its builder recorded one, otherwise that of the checkout
    that contains this package, marked if it has changes.
    """
    built_from = _PROJECT / "COMMIT"
    if built_from.is_file():
        return built_from.read_text(encoding="utf-8").strip()
    command = ["git", "-C", str(_PROJECT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


def write_context(config: Config, folder: Path) -> list[Path]:
    """Writes the resolved config, the environment and the manifests of all inputs to `folder`; returns the files."""
    files = [folder / "config.yaml", folder / "environment.json"]
    files[0].write_text(without_secrets(yaml.safe_dump(config.as_dict(), sort_keys=False)), encoding="utf-8")
    files[1].write_text(json.dumps(environment(), indent=2), encoding="utf-8")
    for manifest in [*config.path().glob("*/manifest.json"), *config.path().glob("shards/*/manifest.json")]:
        parts = manifest.parent.relative_to(config.path()).parts
        if parts[-1].startswith("."):  # being built or removed
            continue
        copy = folder / f"manifest-{'-'.join(parts)}.json"
        with contextlib.suppress(FileNotFoundError):  # another job is replacing it
            copy.write_bytes(manifest.read_bytes())
            files.append(copy)
    return sorted(files)
