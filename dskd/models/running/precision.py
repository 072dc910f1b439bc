"""The number format that models run in."""

import functools
import subprocess
import sys

import torch

from dskd.distributed.world import uses_gpu

_ASK = "import torch; print(torch.cuda.is_bf16_supported(including_emulation=False))"


def supports_bf16(device: torch.device) -> bool:
    """Returns True if the hardware computes bfloat16 matrix products natively, without emulation."""
    if device.type == "cuda":
        return _gpu_supports_bf16()
    try:
        features = torch.cpu.get_capabilities()
    except (AttributeError, RuntimeError):  # an older torch, or a processor that torch does not know
        return False
    return bool(features.get("avx512_bf16") or features.get("amx_bf16") or features.get("bf16"))


def compute_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Returns the dtype of weights and states for `precision` (`auto`, `bf16` or `fp32`)."""
    if precision == "auto":
        return torch.bfloat16 if supports_bf16(device) else torch.float32
    return torch.bfloat16 if precision == "bf16" else torch.float32


def resolve_precision(precision: str) -> str:
    """Returns `bf16` or `fp32`, whichever models run in on this machine.

    Recipes contain this instead of `auto`, so that an artifact begun in bf16 is not continued in fp32 elsewhere.
    """
    if precision != "auto":
        return precision
    device = torch.device("cuda" if uses_gpu() else "cpu")
    return "bf16" if compute_dtype(precision, device) == torch.bfloat16 else "fp32"


@functools.cache
def _gpu_supports_bf16() -> bool:
    if torch.cuda.is_initialized():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # The query initialises CUDA, which takes hundreds of megabytes of GPU memory until the process ends. The pipeline
    # only needs the answer to compare recipes, and its ranks need that memory, so a short-lived process runs the query.
    answer = subprocess.run([sys.executable, "-c", _ASK], capture_output=True, text=True, check=True)
    return answer.stdout.split()[-1] == "True"
