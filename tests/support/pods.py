"""Pods of manifests on the hosts of a lab: the manifest's own command, arguments, environment, user and volumes.

Instead of the image, a pod gets this checkout, at the image's path, and the interpreter that runs the tests. The root
has nothing else, and only the manifest's volumes can be written to.
"""

import os
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster_lab.hosts import HostProcess, Lab
from manifests import Pod, one, quantity
from repository import REPOSITORY

PATH = f"{Path(sys.executable).parent}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class Kubelet:
    """A kubelet that starts pods on the hosts of a lab.

    Claims are folders that all hosts share; each pod has its own copy of all other volumes.
    """

    def __init__(self, lab: Lab, folder: Path, changed_configs: Mapping[str, str] | None = None) -> None:
        """Sets the hosts and the volumes' folder.

        Args:
            lab: the hosts.
            folder: the folder of all volumes.
            changed_configs: {file of the ConfigMap: other content}, for configs that are too large for a test.
        """
        self._lab = lab
        self._folder = folder
        self._changed_configs = changed_configs or {}

    def claim(self, name: str) -> Path:
        """Returns the folder of a claim."""
        return self._folder / name

    def with_config(self, name: str, text: str) -> "Kubelet":
        """Returns a kubelet with the same volumes and another content of one file of the ConfigMap."""
        return Kubelet(self._lab, self._folder, {**self._changed_configs, name: text})

    def start(self, pod: Pod, host: str, *arguments: str, **env: str) -> HostProcess:
        """Starts a pod's container and returns at once; it gets process ID 1.

        `arguments` follow those of the manifest, and `env` overrides its environment.
        """
        return self.start_command(pod, host, *pod.argv, *arguments, **env)

    def start_command(self, pod: Pod, host: str, *argv: str, **env: str) -> HostProcess:
        """Starts another command in the container of a pod."""
        own = Path(tempfile.mkdtemp(dir=self._folder, prefix="pod-"))
        root = own / "root"
        root.mkdir()
        user = pod.spec["securityContext"]["runAsUser"]
        # Mount a folder before its subfolders: this checkout may be in /tmp, and pods have their own /tmp.
        mounts = sorted([*self._image(), *self._volumes(pod, own, user)], key=lambda line: line.split()[-1])
        (own / "mounts").write_text("".join(f"{line}\n" for line in mounts))
        environment = {
            "PATH": PATH,  # as in the image
            "PYTHONUNBUFFERED": "1",
            "PYTHONPATH": "/opt/dskd",
            "WORKING_DIRECTORY": pod.container["workingDir"],
            **pod.env,
            **env,
        }
        script = str(REPOSITORY / "tests" / "support" / "container.sh")
        command = ["sh", script, str(root), str(user), str(own / "mounts"), *argv]
        return self._lab.start(host, command, environment, first_in_namespace=True)

    def _image(self) -> list[str]:
        places = {"/usr": "/usr", str(REPOSITORY): "/opt/dskd"}
        places |= {path: path for path in (sys.prefix, sys.base_prefix) if not path.startswith("/usr")}
        return [f"ro {here} {there}" for here, there in places.items()]

    def _volumes(self, pod: Pod, own: Path, user: int) -> list[str]:
        sources = {volume["name"]: self._source(volume, pod, own, user) for volume in pod.spec["volumes"]}
        lines = []
        for mount in pod.container["volumeMounts"]:
            source = sources[mount["name"]]
            if isinstance(source, int):
                lines.append(f"memory {source} {mount['mountPath']}")
                continue
            if "subPath" in mount:
                source = source / mount["subPath"]
                self._make(source, user)
            lines.append(f"{'ro' if mount.get('readOnly') else 'rw'} {source} {mount['mountPath']}")
        return lines

    def _source(self, volume: Mapping[str, Any], pod: Pod, own: Path, user: int) -> Path | int:
        if "configMap" in volume:
            folder = own / volume["name"]
            folder.mkdir()
            for name, text in one(pod.objects, "ConfigMap")["data"].items():
                (folder / name).write_text(self._changed_configs.get(name, text), encoding="utf-8")
            return folder
        if "persistentVolumeClaim" in volume:
            folder = self.claim(volume["persistentVolumeClaim"]["claimName"])
        elif volume.get("emptyDir", {}).get("medium") == "Memory":
            return int(quantity(volume["emptyDir"]["sizeLimit"]))
        else:
            assert "emptyDir" in volume or "ephemeral" in volume, volume
            folder = own / volume["name"]
        self._make(folder, user)
        return folder

    def _make(self, folder: Path, user: int) -> None:
        folder.mkdir(exist_ok=True)
        if folder.stat().st_uid != user:  # as fsGroup does
            shutil.chown(folder, user, user)


def give_to(user: int, folder: Path) -> None:
    """Gives a folder, with everything in it, to a pod's user."""
    for place, folders, files in os.walk(folder):
        for name in (".", *folders, *files):
            os.chown(Path(place) / name, user, user)
