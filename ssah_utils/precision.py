"""Which device and which precision to compute in, and how a model gets there.

Knows torch. Does not know architectures or units.
"""

import os

import torch
from torch import nn

DTYPES = ("auto", "float32", "bfloat16")


def preferred_device() -> str:
    """ "cuda" where there is a GPU, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def preferred_dtype(device: str) -> torch.dtype:
    """What ``SSAH_DTYPE`` asks for; by default bfloat16 where matrix products are native in it.

    Else float32.
    """
    asked = os.environ.get("SSAH_DTYPE") or "auto"
    if asked not in DTYPES:
        raise ValueError(f"SSAH_DTYPE is '{asked}', but one of {', '.join(DTYPES)} is needed")
    if asked != "auto":
        return getattr(torch, asked)
    if device.startswith("cuda"):
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32


def dtype_named(asked: str, device: str) -> torch.dtype:
    """The precision that a parameter asks for; ``auto`` is the preferred one on this device."""
    return preferred_dtype(device) if asked == "auto" else getattr(torch, asked)


def training_dtype(model: nn.Module) -> torch.dtype:
    """Precision in which to fine-tune all parameters of a model.

    float32 where that and AdamW's state fit into the device's memory, else bfloat16.
    """
    device = next(model.parameters()).device
    if device.type != "cuda":
        return torch.float32
    n_bytes = 16 * sum(parameter.numel() for parameter in model.parameters())
    fits = 1.3 * n_bytes < torch.cuda.get_device_properties(device).total_memory
    return torch.float32 if fits else torch.bfloat16


def to_dtype(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model in another precision, in place, as ``load`` would have it.

    Unlike after ``model.to(dtype)``, rotary frequencies stay float32: rounded to bfloat16, they
    turn positions by up to half a per cent.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_floating_point() and "inv_freq" not in name:
                setattr(module, name, buffer.to(dtype))
    return model
