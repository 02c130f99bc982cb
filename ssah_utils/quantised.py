"""Linear maps whose weights are codes and scales: which they are, and which numbers they stand for.

Two ways lead from codes to numbers, and neither knows how a method packs them: a weight that is a
tensor of its own kind dequantises itself (torchao, quanto); every other module is asked, by the
identity matrix as its input (bitsandbytes, GPTQ, AWQ). Knows modules of torch only.
"""

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ssah_utils.display import first_line

REPACKS = "support_avx512bf16_for_cpu"  # of bitsandbytes' 4-bit linear map
DEQUANTISE = "give the model as it was before it was quantised, or dequantise and save it"
CODES = {torch.int8, torch.uint8, torch.int16, torch.int32}
AT_ONCE = 1024  # columns that are asked for in one pass
# A weight read at three quarters of an input may differ by rounding to bfloat16, and no more.
TOLERANCE = 2**-6


def is_codes(tensor: Tensor) -> bool:
    """Whether a tensor holds a matrix as codes, not as numbers to multiply with."""
    if is_traceable_wrapper_subclass(tensor):
        inner, _ = tensor.__tensor_flatten__()
        parts = (getattr(tensor, part) for part in inner)  # a shared-out tensor's mesh is one, too
        return any(is_codes(part) for part in parts if isinstance(part, Tensor))
    is_float8 = tensor.is_floating_point() and tensor.element_size() < 2
    return tensor.ndim > 1 and (tensor.dtype in CODES or is_float8)


def is_quantised(module: nn.Module) -> bool:
    """Whether a module itself, not one inside it, holds a matrix as codes."""
    own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
    return any(map(is_codes, own))


def quantised_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Name and module of everything in a model that holds a matrix as codes."""
    return (pair for pair in model.named_modules() if is_quantised(pair[1]))


def check_codes(model: nn.Module, name: str, is_kept: bool) -> None:
    """``ValueError`` unless a model that was stored quantised holds what it is to hold.

    ``is_kept``: codes, as they were stored; else numbers made of them.
    """
    if not is_kept:
        for path, _ in quantised_modules(model):
            raise ValueError(f"'{name}' lacks the scales of '{path}': download or save it again")
    for path, module in model.named_modules():
        is_linear = is_of_bitsandbytes(module) and hasattr(module, "weight")
        if is_linear and not is_quantised(module):
            raise ValueError(
                f"'{name}' is quantised by its config.json, but '{path}' is stored as numbers:"
                " take quantization_config out of it"
            )


def keep_codes(model: nn.Module) -> None:
    """Have bitsandbytes compute with its 4-bit codes as they were stored.

    On a processor with bfloat16 it would repack them at the first pass, with rounded scales. That
    is another model by its fingerprint, and multiplies in bfloat16 whatever it is asked for.
    """
    for module in model.modules():
        if is_of_bitsandbytes(module) and hasattr(module, REPACKS):
            setattr(module, REPACKS, False)


def outputs_and_inputs(module: nn.Module) -> tuple[int, int]:
    """Outputs and inputs of a quantised linear map; ``ValueError`` for what is none."""
    n_outputs, n_inputs = (getattr(module, f"{side}_features", 0) for side in ("out", "in"))
    if not n_outputs or not n_inputs:
        raise ValueError(
            f"a {type(module).__name__} holds quantised weights and is no linear map,"
            f" so no column can be read: {DEQUANTISE}"
        )
    return n_outputs, n_inputs


def weight_of(module: nn.Module, dtype: torch.dtype) -> Tensor:
    """The weight with which a quantised linear map multiplies: (out, in), floating-point.

    ``dtype`` is that in which the model computes, and some kernels take no other. What is read is
    as exact as that precision. A kernel may rewrite the codes at its first pass, so a copy is
    asked. ``ValueError`` for a module of which no weight can be read: one that is no linear map,
    or that rounds its inputs to a scale that was fixed before.
    """
    if (weight := _own_kind(module)) is not None:
        return weight.detach().dequantize()
    n_outputs, n_inputs = outputs_and_inputs(module)
    asked = copy.deepcopy(module).eval()
    setattr(asked, "bias", None)  # noqa: B010  (a parameter in some, a buffer in others)
    device = next(iter((*asked.parameters(), *asked.buffers()))).device
    columns = []
    for start in range(0, n_inputs, AT_ONCE):
        rows = torch.zeros(min(AT_ONCE, n_inputs - start), n_inputs, dtype=dtype, device=device)
        rows[:, start:].fill_diagonal_(1)
        columns.append(_outputs(asked, rows))
        if not start:
            _check_proportional(asked, rows, columns[0])
    found = torch.cat(columns).T
    if found.shape != (n_outputs, n_inputs):
        raise ValueError(f"a {type(module).__name__} is no linear map of {n_inputs} inputs")
    return found


@torch.no_grad()
def _outputs(module: nn.Module, rows: Tensor) -> Tensor:
    """What a module makes of rows, past its hooks, which change inputs."""
    try:
        return module.forward(rows)
    except (RuntimeError, TypeError, NotImplementedError) as error:
        raise ValueError(
            f"a {type(module).__name__} holds quantised weights that cannot be read here"
            f" ({first_line(error)}): {DEQUANTISE}"
        ) from error


def _check_proportional(module: nn.Module, rows: Tensor, found: Tensor) -> None:
    """``ValueError`` unless three quarters of the inputs give three quarters of the outputs."""
    error = (_outputs(module, 0.75 * rows) / 0.75 - found).abs().max()
    if not error <= TOLERANCE * found.abs().max():
        raise ValueError(
            f"a {type(module).__name__} rounds its inputs to a fixed scale,"
            f" so its weight cannot be read: {DEQUANTISE}"
        )


def codes_stay(module: nn.Module) -> bool:
    """Whether a quantised module's ``state_dict`` stays as it is when the module computes.

    Not so in GPTQ and AWQ, of which some kernels repack codes and scales at their first pass.
    """
    return is_of_bitsandbytes(module) or _own_kind(module) is not None


def is_of_bitsandbytes(module: nn.Module) -> bool:
    return type(module).__module__.startswith("bitsandbytes.")


def _own_kind(module: nn.Module) -> Tensor | None:
    """A module's weight where it is a tensor of its own kind, made of codes and scales."""
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and is_traceable_wrapper_subclass(weight) and is_codes(weight):
        return weight
    return None


def plain_tensors(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A tensor by its name; of one that is made of others, codes and scales, each of these."""
    if not is_traceable_wrapper_subclass(tensor):
        yield name, tensor
        return
    inner, _ = tensor.__tensor_flatten__()
    for part in inner:
        yield from plain_tensors(f"{name}.{part}", getattr(tensor, part))
