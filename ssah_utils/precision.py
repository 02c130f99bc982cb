"""Which device and which precision to compute in, and how a model gets there.

Knows torch. Does not know architectures or units.
"""

import os
from dataclasses import dataclass

import torch
from torch import nn

from ssah_utils import quantised

FLOATS = ("float32", "bfloat16")
CODES = ("int8", "nf4")  # of bitsandbytes: LLM.int8(), and the 4-bit codes of QLoRA
DTYPES = ("auto", *FLOATS, *CODES)


@dataclass(frozen=True)
class Quantised:
    """Matrices kept as ``codes``; ``dtype`` is that of all others, and of what is computed."""

    codes: str
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.codes} in {self.dtype}"

    @property
    def itemsize(self) -> float:
        """Bytes of one number of a matrix; ``torch.dtype`` has it by the same name."""
        return {"int8": 1.0, "nf4": 0.5}[self.codes]


Precision = torch.dtype | Quantised


def preferred_device() -> str:
    """ "cuda" where there is a GPU, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def preferred_dtype(device: str) -> Precision:
    """What ``SSAH_DTYPE`` asks for; by default ``native_dtype``."""
    asked = os.environ.get("SSAH_DTYPE") or "auto"
    if asked not in DTYPES:
        raise ValueError(f"SSAH_DTYPE is '{asked}', but one of {', '.join(DTYPES)} is needed")
    return native_dtype(device) if asked == "auto" else dtype_named(asked, device)


def native_dtype(device: str) -> torch.dtype:
    """bfloat16 where matrix products are native in it, else float32."""
    if device.startswith("cuda"):
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32


def dtype_named(asked: str, device: str) -> Precision:
    """The precision that a parameter asks for; ``auto`` is the preferred one on this device."""
    if asked in CODES:
        return Quantised(asked, native_dtype(device))
    return preferred_dtype(device) if asked == "auto" else getattr(torch, asked)


def computed_in(dtype: Precision) -> torch.dtype:
    """The precision of activations, also where matrices are codes."""
    return dtype.dtype if isinstance(dtype, Quantised) else dtype


def training_dtype(model: nn.Module) -> torch.dtype:
    """Precision in which to fine-tune all parameters of a model.

    float32 where that and AdamW's state fit into the device's memory, else bfloat16, of which
    ``unit_training`` keeps what units own in float32.
    """
    device = next(model.parameters()).device
    if device.type != "cuda":
        return torch.float32
    n = sum(parameter.numel() for parameter in model.parameters())
    n_bytes = torch.cuda.get_device_properties(device).total_memory
    return torch.float32 if trains_in_float32(n, n_bytes) else torch.bfloat16


def trains_in_float32(n_parameters: int, n_bytes: int) -> bool:
    """Whether weights, gradients and AdamW's state in float32 leave some of a GPU's memory free."""
    return 1.3 * 16 * n_parameters < n_bytes


def to_dtype(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model in another precision, in place, as ``load`` would have it.

    Unlike after ``model.to(dtype)``, rotary frequencies stay float32: rounded to bfloat16, they
    turn positions by up to half a per cent. ``ValueError`` for a quantised model.
    """
    for name, _ in quantised.quantised_modules(model):
        raise ValueError(f"'{name}' is quantised: load the model anew in the precision you want")
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_floating_point() and "inv_freq" not in name:
                setattr(module, name, buffer.to(dtype))
    return model
