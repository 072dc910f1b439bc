"""Plans of toy jobs, for the tests of `dskd plan` and of architectures."""

import json
from pathlib import Path

from architectures import ARCHITECTURES
from tiny_models import SHAPE
from transformers import AutoModelForCausalLM

from dskd.config import Config
from dskd.config.reading import load_config
from dskd.errors import UserError
from dskd.plan import GB
from dskd.plan.architecture import find_architecture
from dskd.plan.cluster import Cluster
from dskd.plan.plan import make_plan
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


def check_plan(folder: Path, name: str, *, is_refused: bool) -> str | None:
    """Returns what is wrong with the plan for an architecture, or None.

    A plan must refuse what training refuses, and otherwise only what cannot be planned without weights.
    """
    ARCHITECTURES[name].config().save_pretrained(folder)
    config = Config(
        workdir=str(folder / "work"),
        teacher={"path": str(folder)},
        student={"layers": (0, 1), "train_layers": 1},
        corpus={"packing": "stream", "sequence_length": 16},
    )
    try:
        plan = make_plan(config, cluster_of(), find_architecture(config, None))
    except UserError as error:
        return (
            None
            if is_refused or "cannot be planned" in str(error)
            else f"refused by the plan, but not by training: {error}"
        )
    if is_refused:
        return "planned, but refused by training"
    whole = AutoModelForCausalLM.from_config(ARCHITECTURES[name].config())
    head = whole.get_output_embeddings().weight
    is_tied = head is whole.get_input_embeddings().weight
    expected = sum(parameter.numel() for parameter in whole.parameters()) - head.numel() * (not is_tied)
    return None if plan.teacher.numel == expected else f"{plan.teacher.numel} parameters planned, not {expected}"
