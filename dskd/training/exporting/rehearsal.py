"""The rehearsal of an export: before the first step, the untrained student is exported, reloaded and compared.

Failures that would otherwise appear after hours of training appear here in seconds: a name that transformers does not
read, a file that is not copied, a table that training has but the reloaded model lacks.
"""

from pathlib import Path
from typing import Any

import psutil
import torch

from dskd.artifacts import kinds
from dskd.artifacts.disk_space import report_full_disk
from dskd.artifacts.files import make_folder, remove_tree
from dskd.config import Config
from dskd.console import gigabytes, say
from dskd.distributed.collectives import on_main
from dskd.distributed.world import World
from dskd.models.checks.agreement import check_agreement
from dskd.models.files.folder import ModelFolder
from dskd.models.files.weights import TensorReader
from dskd.models.running.precision import compute_dtype
from dskd.training.checkpoints import checkpoint
from dskd.training.exporting.export import write_export
from dskd.training.exporting.files import copy_files
from dskd.training.models.pair import ModelPair

# Largest student, in bytes, whose weights are written to the rehearsal; larger ones are linked.
_WRITTEN = 2**30
# Largest student, in bytes of float32, that is reloaded; larger ones would take minutes.
_RELOADED = 40 * 10**9
_REMEDY = "an export of this student would not be the student that was trained, so training does not start"


def rehearse_export(pair: ModelPair, student: ModelFolder, config: Config, world: World) -> None:
    """Exports the engine's student and compares it with the engine. All ranks call it, before any step.

    Raises:
        UserError: on every rank, if the export fails or is a different model.
    """
    dtype = compute_dtype(config.precision, world.device)
    probe = pair.probe(config, world)
    names = [name for name, _ in pair.engine.module.exported_parameters()]

    def rehearse() -> None:
        on_cpu = {name: tensor.cpu() for name, tensor in probe.items()}
        scratch = kinds.checkpoint_folder(config) / checkpoint.REHEARSAL
        remove_tree(scratch)
        make_folder(scratch)
        try:
            with report_full_disk(scratch):
                _rehearse(student, scratch, on_cpu, names, dtype)
        finally:
            remove_tree(scratch)

    on_main(rehearse)


def _rehearse(student: ModelFolder, scratch: Path, probe: dict[str, Any], names: list[str], dtype: torch.dtype) -> None:
    reader = TensorReader(student.path)
    files = [*student.path.glob("*.safetensors")]
    if sum(file.stat().st_size for file in files) <= _WRITTEN:
        write_export(student, {name: reader.read(name) for name in names}, scratch)
    else:
        copy_files(student, scratch)
        for file in (*files, *student.path.glob("*.safetensors.index.json")):
            (scratch / file.name).symlink_to(file.resolve())
    # Size in float32: the comparison loads the model in bf16 and, to test whether rounding explains any differences,
    # again in float32.
    size = reader.numel * 4
    if size > min(_RELOADED, psutil.virtual_memory().available // 2):
        say(f"  the export is not rehearsed: reloading the student would need {gigabytes(size)} of memory")
        return
    agreement = check_agreement(scratch, probe, names, dtype, student.trust_remote_code, remedy=_REMEDY)
    say(
        f"  export rehearsed: the logits of the untrained student, reloaded, differ by {agreement.error:.1e} (relative)"
    )
