"""Choosing one of the runs that a configuration describes, with one of its seeds."""

import json
import re
from typing import Any

from pydantic import ValidationError

from dskd.config import Config
from dskd.config.messages import explain

# Runs share every artifact up to the shards, so they may differ only in what comes after.
KEYS_A_RUN_MAY_CHANGE = ("loss", "train", "seed")


def merge(base: Any, changes: Any) -> Any:
    """Returns `base` with `changes` applied: mappings are merged key by key, anything else is replaced."""
    if isinstance(base, dict) and isinstance(changes, dict):
        return {
            key: merge(base[key], changes[key]) if key in base and key in changes else changes.get(key, base.get(key))
            for key in [*base, *(k for k in changes if k not in base)]
        }
    return changes


def with_run(merged: dict[str, Any]) -> dict[str, Any]:
    """Chooses the first of `runs` if the configuration chooses no run and has none called `dskd`."""
    runs, default = merged.get("runs"), Config.model_fields["run"].default
    if "run" in merged or not isinstance(runs, dict) or not runs or default in runs:
        return merged
    return {**merged, "run": next(iter(runs))}


def with_seeds(merged: dict[str, Any]) -> dict[str, Any]:
    """Replaces each run by one run for each of `seeds`: `kd-s0` is `kd` with seed 0.

    If the chosen run has been replaced, the one with the first seed is chosen. Anything but a list of different whole
    numbers is left unchanged; the later check of all keys reports it.
    """
    seeds, runs, run = merged.get("seeds"), merged.get("runs") or {}, merged.get("run", "dskd")
    if not seeds or not isinstance(seeds, list) or not all(type(seed) is int for seed in seeds):
        return merged
    if len(set(seeds)) < len(seeds):
        return merged
    if not isinstance(runs, dict) or not all(isinstance(keys, dict) for keys in runs.values()):
        return merged
    expanded = {
        f"{name}-s{seed}": {**keys, "seed": seed}
        for name, keys in (runs or {re.sub(r"-s\d+$", "", str(run)): {}}).items()
        for seed in seeds
    }
    first = f"{run}-s{seeds[0]}"
    return {**merged, "seeds": [], "runs": expanded, "run": first if first in expanded and run not in expanded else run}


def apply_run(merged: dict[str, Any], overrides: dict[str, Any]) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Applies the chosen run's keys to the file's, and the command line's overrides to those.

    Also returns (key, message) of each problem, including those in the keys of the other runs.
    """
    runs, run = merged.get("runs"), merged.get("run", "dskd")
    if not runs:
        return merged, []
    if not isinstance(runs, dict) or not all(isinstance(run_keys, dict) for run_keys in runs.values()):
        return merged, [("runs", "expected the name of each run with the keys in which it differs, such as kd: {}")]
    problems = []
    for name, keys in runs.items():
        for key in keys:
            if key not in KEYS_A_RUN_MAY_CHANGE:
                allowed = ", ".join(KEYS_A_RUN_MAY_CHANGE)
                problems.append((f"runs.{name}.{key}", f"runs may differ only in {allowed}; they share the rest"))
        if name != run and not problems:
            problems += [
                (f"runs.{name}.{key}", message)
                for key, message in _check(merge({k: v for k, v in merged.items() if k != "runs"}, keys))
                if key.split(".")[0] in keys and key not in dict(_check(merged))
            ]
    if run not in runs:
        problems.append(("run", f"there is no run {run!r} in this file; its runs: {', '.join(runs)}"))
        return merged, problems
    return merge(merge(merged, runs[run]), overrides), problems


def _check(data: dict[str, Any]) -> list[tuple[str, str]]:
    try:
        Config.model_validate_json(json.dumps(data, default=str))
    except ValidationError as error:
        return explain(error.errors(), data)
    return []
