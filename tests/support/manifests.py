"""Kubernetes manifests for tests: rendered by kustomize, with the pods that a controller would make from them."""

import functools
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from repository import REPOSITORY

KUBERNETES = REPOSITORY / "cluster" / "kubernetes"
# The folders that a user applies. Components are parts of these.
KUSTOMIZATIONS = sorted(
    str(file.parent.relative_to(KUBERNETES))
    for file in KUBERNETES.rglob("kustomization.yaml")
    if "kind: Component" not in file.read_text(encoding="utf-8")
)
JOBS = [name for name in KUSTOMIZATIONS if name == "base" or name.startswith("overlays/")]
UNITS = {"": 1, "m": 1e-3, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
# Secrets that users add to the cluster by hand.
SECRETS = {
    "dskd-object-storage": {"access-key-id": "a", "secret-access-key": "b"},
    "dskd-mlflow-database": {"url": "postgresql://u:p@database/mlflow"},
}
JOB_NAME_LABEL = "batch.kubernetes.io/job-name"


@functools.cache
def _kustomize() -> tuple[str, ...] | None:
    for command in (("kubectl", "kustomize"), ("kustomize", "build")):
        if shutil.which(command[0]):
            return command
    return None


@functools.cache
def _rendered(folder: Path) -> str:
    command = _kustomize()
    if command is None:
        pytest.skip("neither kubectl nor kustomize is on the PATH: manifests cannot be rendered")
    finished = subprocess.run([*command, str(folder)], capture_output=True, text=True, timeout=60)
    assert finished.returncode == 0, finished.stderr
    assert not finished.stderr, finished.stderr  # kustomize warns of deprecated fields
    return finished.stdout


def render(name: str) -> list[dict[str, Any]]:
    """Returns the objects of a folder in cluster/kubernetes/, as `kubectl apply -k` sends them."""
    return render_folder(KUBERNETES / name)


def render_folder(folder: Path) -> list[dict[str, Any]]:
    """Returns the objects of any kustomization."""
    return list(yaml.safe_load_all(_rendered(folder)))


def one(objects: Sequence[dict[str, Any]], kind: str) -> dict[str, Any]:
    """Returns the only object of its kind."""
    (found,) = (item for item in objects if item["kind"] == kind)
    return found


def job_of(objects: Sequence[dict[str, Any]]) -> tuple[str, dict[str, Any]]:
    """Returns (name, spec) of the Job, or of the Job that a JobSet's controller makes."""
    for item in objects:
        if item["kind"] == "Job":
            return item["metadata"]["name"], item["spec"]
        if item["kind"] == "JobSet":
            (replicated,) = item["spec"]["replicatedJobs"]
            assert replicated["replicas"] == 1
            return f"{item['metadata']['name']}-{replicated['name']}-0", replicated["template"]["spec"]
    raise AssertionError("the manifest has neither a Job nor a JobSet")


def pod_templates(objects: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yields every pod template."""
    for item in objects:
        if item["kind"] in ("Job", "JobSet"):
            yield job_of([item])[1]["template"]
        elif item["kind"] == "Deployment":
            yield item["spec"]["template"]


def quantity(text: str | int) -> float:
    """Returns a quantity of Kubernetes as a number."""
    number, unit = re.fullmatch(r"(\d+)([A-Za-z]*)", str(text)).groups()
    return int(number) * UNITS[unit]


@dataclass(frozen=True)
class Pod:
    """A pod with one container."""

    names: tuple[str, ...]  # the names by which others find it
    argv: tuple[str, ...]
    env: dict[str, str]
    spec: dict[str, Any]
    objects: tuple[dict[str, Any], ...]

    @property
    def container(self) -> dict[str, Any]:
        """The pod's only container."""
        (container,) = self.spec["containers"]
        return container


def pods_of(objects: Sequence[dict[str, Any]], secrets: Mapping[str, Mapping[str, str]] | None = None) -> list[Pod]:
    """Returns the pods of a Job, a JobSet or a Deployment, with what its controller and the kubelet add.

    Args:
        objects: the rendered objects.
        secrets: {name: {key: value}}; a missing one is an error, unless the manifest calls it optional.
    """
    (template,) = pod_templates(objects)
    spec = template["spec"]
    (container,) = spec["containers"]
    labels = dict(template["metadata"]["labels"])
    if any(item["kind"] == "Deployment" for item in objects):
        names = [(item["metadata"]["name"],) for item in objects if item["kind"] == "Service"]
        indices: list[int | None] = [None]
    else:
        job, job_spec = job_of(objects)
        labels[JOB_NAME_LABEL] = job
        indices = list(range(job_spec["completions"]))
        names = [(f"{job}-{index}", f"{job}-{index}.{spec['subdomain']}") for index in indices]
    made = []
    for index, own_names in zip(indices, names, strict=True):
        env = {} if index is None else {"JOB_COMPLETION_INDEX": str(index)}
        for entry in container.get("env", ()):
            value = _value_of(entry, labels, secrets or {})
            if value is not None:
                env[entry["name"]] = value
        argv = (*container["command"], *container["args"])
        made.append(Pod(own_names, argv, env, spec, tuple(objects)))
    return made


def _value_of(
    entry: Mapping[str, Any], labels: Mapping[str, str], secrets: Mapping[str, Mapping[str, str]]
) -> str | None:
    if "value" in entry:
        return entry["value"]
    (kind,) = entry["valueFrom"]
    source = entry["valueFrom"][kind]
    if kind == "fieldRef":
        return labels[re.fullmatch(r"metadata\.labels\['(.+)'\]", source["fieldPath"]).group(1)]
    assert kind == "secretKeyRef", kind
    if source.get("optional") and source["key"] not in secrets.get(source["name"], {}):
        return None
    return secrets[source["name"]][source["key"]]


def verdict(job_spec: Mapping[str, Any], exit_code: int, *, disrupted: bool = False) -> str:
    """Returns what the Job's podFailurePolicy does about a failed pod: FailJob, Ignore, or Count if no rule fits."""
    for rule in job_spec["podFailurePolicy"]["rules"]:
        codes = rule.get("onExitCodes")
        if codes is not None:
            assert codes["operator"] == "In"
            if exit_code in codes["values"]:
                return rule["action"]
        elif disrupted:
            assert [condition["type"] for condition in rule["onPodConditions"]] == ["DisruptionTarget"]
            return rule["action"]
    return "Count"
