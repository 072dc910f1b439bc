"""The number format that models run in."""

import torch


def supports_bf16(device: torch.device) -> bool:
    """True where bfloat16 matrix products are done by the hardware, not emulated."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    try:
        features = torch.cpu.get_capabilities()
    except (AttributeError, RuntimeError):  # older torch, or a processor it knows nothing of
        return False
    return bool(features.get("avx512_bf16") or features.get("amx_bf16") or features.get("bf16"))


def compute_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of weights and states for `precision` (`auto`, `bf16` or `fp32`)."""
    if precision == "auto":
        return torch.bfloat16 if supports_bf16(device) else torch.float32
    return torch.bfloat16 if precision == "bf16" else torch.float32
