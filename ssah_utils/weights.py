"""Look at a model's weights unit by unit: norms of columns, squared gradients.

Does not know prompts, scores or sets of units.
"""

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ssah_utils import guards
from ssah_utils.models import (
    architecture_of,
    blocks_of,
    column_weight,
    is_transposed,
    shape_of,
    writers,
)
from ssah_utils.per_unit import KINDS, PerUnit
from ssah_utils.wrappers import unwrapped


def gathered(model: nn.Module) -> PreTrainedModel:
    """``unwrapped``, for looking at values.

    ``ValueError`` when not all of them are in the memory of this process.
    """
    plain = unwrapped(model)
    marks = ("device_mesh", "ds_status")  # of FSDP 2, of DeepSpeed ZeRO 3
    for name, parameter in plain.named_parameters():
        is_part = any(hasattr(parameter, mark) for mark in marks)
        if is_part or "_fsdp_wrapped_module." in name or parameter.is_meta:
            raise ValueError(
                f"the values of {name} are sharded or offloaded, so they are not all here:"
                " load the whole model to look at it"
            )
    return plain


def squared_column_norms(model: nn.Module) -> PerUnit:
    """||W_:j||^2 of every writer column, in float64; where codes are stored, of what they mean."""
    return _of_columns(model, lambda weight: weight.square().sum(0))


def mean_absolute_columns(model: nn.Module) -> PerUnit:
    """Mean of |W_ij| over every writer column, in float64."""
    return _of_columns(model, lambda weight: weight.abs().mean(0))


def _of_columns(model: nn.Module, function: Callable[[Tensor], Tensor]) -> PerUnit:
    """``function`` of every writer's weight: (d_model, n_channels) float64 -> (n_channels,)."""
    model = gathered(model)
    dtype = cast("torch.dtype", model.dtype)

    def of_module(module: nn.Module) -> Tensor:
        return function(column_weight(module, dtype).detach().double())

    return PerUnit.of_layers({kind: list(map(of_module, writers(model, kind))) for kind in KINDS})


def squared_gradients(model: nn.Module) -> PerUnit:
    """Sum of squared gradients over the entries each unit owns, after a backward pass; float64.

    A value row that several channels share counts for each of them.
    """
    model = gathered(model)
    guards.refuse_quantised(model)
    shape, architecture = shape_of(model), architecture_of(model)
    squared: dict[str, list[Tensor]] = {kind: [] for kind in KINDS}
    for kind in KINDS:
        for block in blocks_of(model):
            total = _gradient(block.get_submodule(architecture.writers[kind])).square().sum(0)
            for reader in architecture.readers[kind]:
                module = block.get_submodule(reader.path)
                of_rows = _gradient(module).square().sum(1)
                if (bias := getattr(module, "bias", None)) is not None:
                    of_rows = of_rows + bias.grad.double().square()
                total = total + of_rows[reader.rows(shape).to(of_rows.device)]
            squared[kind].append(total)
    return PerUnit.of_layers(squared)


def _gradient(module: nn.Module) -> Tensor:
    """Gradient of a linear map's weight as (out, in) float64."""
    gradient = getattr(module.weight, "grad", None)
    if gradient is None:
        raise ValueError("a matrix has no gradient: call this after a backward pass")
    return (gradient.T if is_transposed(module) else gradient).double()
