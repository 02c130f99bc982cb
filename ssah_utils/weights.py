"""Look at a model's weights unit by unit: norms of columns, squared gradients.

Does not know prompts, scores or sets of units.
"""

from collections.abc import Callable, Iterator
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ssah_utils import guards, partial_parameters, placement
from ssah_utils.architectures import ModelShape
from ssah_utils.models import (
    Hookable,
    Writer,
    check_per_unit,
    column_weight,
    owned_entries,
    per_unit_of,
    shape_of,
    writers,
)
from ssah_utils.per_unit import PerUnit
from ssah_utils.wrappers import unwrapped


def gathered(model: nn.Module) -> PreTrainedModel:
    """``unwrapped``, for looking at values, also at those that a device map keeps elsewhere.

    ``ValueError`` when not all of them can be had in this process.
    """
    plain = unwrapped(model)
    marks = ("device_mesh", "ds_status")  # of FSDP 2, of DeepSpeed ZeRO 3
    missing = placement.lacks_values(plain)
    for name, parameter in plain.named_parameters():
        is_part = any(hasattr(parameter, mark) for mark in marks)
        if is_part or "_fsdp_wrapped_module." in name or name == missing:
            raise ValueError(
                f"the values of {name} are sharded or offloaded, so they are not all here:"
                " load the whole model to look at it, or by a device_map"
            )
    return plain


def squared_column_norms(model: nn.Module) -> PerUnit:
    """||W_:j||^2 of every writer column, in float64; where codes are stored, of what they mean."""
    return _of_columns(model, lambda weight: weight.square().sum(0))


def mean_absolute_columns(model: nn.Module) -> PerUnit:
    """Mean of |W_ij| over every writer column, in float64."""
    return _of_columns(model, lambda weight: weight.abs().mean(0))


def columns_along(model: nn.Module, direction: Tensor) -> PerUnit:
    """Scalar product of every writer column with a direction (d_model,), in float64.

    What a unit of activation 1 adds to the residual stream along it, before any norm of the block.
    """
    direction = direction.double()
    return _of_columns(model, lambda weight: direction.to(weight.device) @ weight)


def _of_columns(model: nn.Module, function: Callable[[Tensor], Tensor]) -> PerUnit:
    """``function`` of every writer's weight: (d_model, n_channels) float64 -> (n_channels,)."""
    model = gathered(model)
    dtype = cast("torch.dtype", model.dtype)

    def of_module(module: Hookable) -> Tensor:
        return function(column_weight(module, dtype).detach().double())

    return per_unit_of((writer, of_module(writer.module)) for writer in writers(model))


def squared_gradients(model: nn.Module) -> PerUnit:
    """Sum of squared gradients over the entries each unit owns, after a backward pass; float64.

    A value row that several channels share counts for each of them.
    """
    model = gathered(model)
    guards.refuse_quantised(model)
    placement.refuse_dispatched(model, "gradients of weights are looked at")
    shape = shape_of(model)
    return per_unit_of((writer, _squared_gradients(writer, shape)) for writer in writers(model))


def _squared_gradients(writer: Writer, shape: ModelShape) -> Tensor:
    """Of one writer's channels: (n_channels,) float64."""
    total = torch.zeros(writer.channels.stop - writer.channels.start, dtype=torch.float64)
    for module, name, dimensions, places in owned_entries(writer, shape):
        parameter = getattr(module, name)
        if parameter.grad is None:
            raise ValueError("a matrix has no gradient: call this after a backward pass")
        squared = parameter.grad.double().square()
        others = [one for one in range(squared.ndim) if one not in dimensions]
        squared = squared.sum(others) if others else squared
        total += squared.flatten().cpu()[places]
    return total


def unit_entries(
    model: nn.Module, units: PerUnit
) -> Iterator[tuple[nn.Parameter, Callable[[Tensor], Tensor], tuple[Tensor, ...]]]:
    """What the units of a set own, parameter by parameter: ``view(parameter)[indices]``.

    Parameter, view and indices; of the gradient, the same is theirs. A value row that several units
    share is there where any of them is in the set. Raises what ``check_per_unit`` raises, and
    ``ValueError`` where some of such a parameter is frozen.
    """
    units, shape = check_per_unit(model, units).as_set(), shape_of(model)
    owned: dict[int, list] = {}
    for writer in writers(model):
        chosen = units[writer.kind][writer.layer, writer.channels].cpu()
        for module, name, dimensions, places in owned_entries(writer, shape):
            parameter, as_ordinary = partial_parameters.trained_whole(module, name)
            known = owned.setdefault(id(parameter), [parameter, as_ordinary, dimensions, []])
            known[3].append(places[chosen])
    for parameter, as_ordinary, dimensions, parts in owned.values():
        view = _rows_first(as_ordinary, dimensions)
        places = torch.cat(parts).unique().to(parameter.device)
        if len(places):
            sizes = view(parameter).shape[: len(dimensions)]
            yield parameter, view, torch.unravel_index(places, sizes)


def _rows_first(
    as_ordinary: Callable[[Tensor], Tensor], dimensions: tuple[int, ...]
) -> Callable[[Tensor], Tensor]:
    """What views a parameter with the dimensions that count rows before all others."""

    def view(values: Tensor) -> Tensor:
        return as_ordinary(values).movedim(dimensions, tuple(range(len(dimensions))))

    return view
