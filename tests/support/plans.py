"""Plans of toy jobs, for the tests of `dskd plan`."""

import json
from pathlib import Path

from tiny_models import SHAPE

from dskd.config import Config
from dskd.config.reading import load_config
from dskd.plan import GB
from dskd.plan.cluster import Cluster
from dskd.shards import TEACHER_STATES, TRUNK_STATES

MACHINES = ["--nodes", "1", "--gpus-per-node", "2", "--gpu-memory", "80", "--host-memory", "500"]
SMALL = ["student.layers=3", "student.train_layers=2", "corpus.sequence_length=16"]
LLAMA = {"model_type": "llama", **SHAPE}
STORED = ("precision=bf16", f"annotation.store=[{TEACHER_STATES},{TRUNK_STATES}]")
WITHOUT_TRUNK = ("student.shared_trunk=off", f"annotation.store=[{TEACHER_STATES}]")


def cluster_of(ranks: int = 1, device: str = "cpu", memory_gb: float = 80) -> Cluster:
    """Returns one node with these ranks, and so much memory for each."""
    return Cluster(1, ranks, round(memory_gb * GB), 500 * GB, device, 40 * GB, 25 * GB, 5 * GB, 1e14)


def config_of(folder: Path, *overrides: str, **teacher: object) -> Config:
    """Writes `config.yaml` with these keys of the section teacher, and returns it with the overrides of a toy job."""
    path = folder / "config.yaml"
    sections = {"workdir": str(folder / "work"), "teacher": {"path": "nobody/nothing", **teacher}}
    path.write_text(json.dumps(sections), encoding="utf-8")
    return load_config(path, [*SMALL, *overrides])


def shapes_file(folder: Path, **values: object) -> Path:
    """Writes a teacher's config.json: that of a toy, with other values."""
    path = folder / "shapes.json"
    path.write_text(json.dumps({**LLAMA, **values}), encoding="utf-8")
    return path
