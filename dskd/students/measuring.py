"""Measures the teacher's layers on training text, for `student.spacing: importance` and `dskd student --explain`."""

from collections.abc import Iterator

import numpy as np
import psutil
import torch

from dskd.config import Config
from dskd.console import gigabytes, progress, say
from dskd.corpus.sequences import Sequences, load_sequences
from dskd.distributed.world import World, uses_gpu
from dskd.errors import UserError
from dskd.models.files.folder import ModelFolder
from dskd.models.files.weights import TensorReader
from dskd.models.running.frozen import Decoder
from dskd.models.running.precision import compute_dtype, resolve_precision
from dskd.models.structure.base_model import base_model
from dskd.models.structure.causal_lm import load_resident
from dskd.random_numbers import derived_seed, random_bits
from dskd.students.importance import Text, measure_blocks
from dskd.students.spacing import Importance

_TOKENS = 4096  # in a batch: the states of all layers are in memory at once
_ROOM = 1.25  # memory for weights and states together, relative to the weights


def measure_importance(config: Config, teacher: ModelFolder, block_size: int) -> Importance:
    """Measures each layer of the teacher, and each block of `block_size` layers, on `student.importance_samples`
    training sequences; held-out text is not read.

    The whole teacher runs in this process, on the GPU if there is one and it has room, otherwise on the CPU.

    Raises:
        UserError: when there are no sequences, they have another tokenizer, or the memory is too small.
    """
    try:
        sequences, _ = load_sequences(config, "train", teacher.tokenizer_digest)
    except UserError as problem:
        raise UserError(f"the teacher's layers are measured on training sequences, but {problem}") from None
    # The recipe names the type, so it is the GPU's even if the model does not fit there and runs on the CPU.
    precision = resolve_precision(config.precision)
    device = _device(teacher, precision)
    dtype = compute_dtype(precision, device)
    rows = sample_rows(len(sequences), config.student.importance_samples, config.seed)
    say(
        f"  measuring the teacher's layers on {len(rows):,} training sequences, in "
        f"{str(dtype).removeprefix('torch.')} on the {'GPU' if device.type == 'cuda' else 'CPU'}"
    )
    decoder = Decoder(base_model(load_resident(teacher, dtype, World(0, 1, 0, device)).eval()))
    return measure_blocks(decoder, _texts(sequences, rows), block_size, device)


def sample_rows(count: int, samples: int, seed: int) -> np.ndarray:
    """Returns the numbers of the drawn sequences among `count`, ascending; all if there are not more than `samples`."""
    order = random_bits(derived_seed(seed, "student", "importance"), torch.arange(count)).argsort(stable=True)
    return np.sort(order[:samples].numpy())


def _texts(sequences: Sequences, rows: np.ndarray) -> Iterator[Text]:
    size = max(1, _TOKENS // sequences.sequence_length)
    batches = [rows[start : start + size] for start in range(0, len(rows), size)]
    for numbers in progress(batches, total=len(batches), label="measuring layers", unit="batches"):
        batch = sequences.select(numbers)
        lengths = torch.from_numpy(sequences.lengths[numbers].astype(np.int64))
        is_token = torch.arange(sequences.sequence_length) < lengths[:, None]
        yield Text(batch.input_ids, batch.position_ids, is_token)


def _device(teacher: ModelFolder, precision: str) -> torch.device:
    """Returns the device that the teacher runs on.

    Raises:
        UserError: when it fits neither on the GPU nor in memory.
    """
    cpu = torch.device("cpu")
    parameters = TensorReader(teacher.path).numel
    needed = round(_ROOM * parameters * compute_dtype(precision, cpu).itemsize)
    if uses_gpu() and needed <= torch.cuda.mem_get_info()[0]:
        return torch.device("cuda")
    if needed > (available := psutil.virtual_memory().available):
        raise UserError(
            f"{teacher.path}: to measure its layers, this process runs the whole teacher, which needs "
            f"{gigabytes(needed)}, but only {gigabytes(available)} are available; run the command on a machine "
            "with more memory, or set student.spacing to ends"
        )
    return cpu
