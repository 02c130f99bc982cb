"""Train some rows or columns of a linear map: what it computes, and the gradient of the block.

Knows ``nn.Linear`` and what is used in its place. Does not know units or architectures.
"""

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ssah_utils import models, partial_parameters, ranks, shards
from ssah_utils.partial_parameters import Partial, PartialParameter


class PartialLinear(Partial):
    """y = x W^T + b where only some rows or some columns of W are trained.

    Under rows, the same entries of b are.
    """

    partial_weight: PartialParameter
    bias: Tensor | None

    @property
    def by_columns(self) -> bool:
        """Whether columns of W are trained, and not rows, as ``nn.Linear`` has them."""
        return (self.partial_weight.dimension == 1) != models.is_transposed(self)

    def forward(self, values: Tensor) -> Tensor:
        part = self.partial_weight
        block, rest = part.here()
        device = values.device.type
        dtype = part.dtype if rest is None else rest.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        result = _PartialProduct.apply(values.to(dtype), block, rest, self)
        return result if self.bias is None else result + self.bias.to(dtype)


def cut_linear(linear: nn.Module, trained: Tensor, by_columns: bool, lists: shards.Lists) -> None:
    """Make some rows, or columns, of a linear map all that is trained of it.

    ``trained``: (out,) bool for rows, (in,) for columns. The bias of a map of which columns are
    trained belongs to no unit, and stays an ordinary parameter.
    """
    dimension = int(by_columns != models.is_transposed(linear))
    chosen = {"weight": (dimension, trained)}
    if linear.bias is not None and not by_columns:
        chosen["bias"] = (0, trained)
    partial_parameters.cut(linear, PartialLinear, chosen, lists)


class _PartialProduct(torch.autograd.Function):
    """x W^T with the gradient of W for the block alone.

    Of x, only what that gradient needs is kept for the way back. There, W is put together anew: to
    keep it would take the memory of a second model. Only in bfloat16 on a CPU it is kept, as
    autocast does it: beside products so fast, to put it together twice would show.
    """

    @staticmethod
    def forward(
        ctx, values: Tensor, block: Tensor, rest: Tensor | None, module: PartialLinear
    ) -> Tensor:
        part, by_columns = module.partial_weight, module.by_columns
        ctx.part, ctx.by_columns, ctx.dtype = part, by_columns, values.dtype
        kept = None
        if ctx.needs_input_grad[1]:
            kept = values[..., part.gathered] if by_columns and part.is_minor else values
        rows = part.rows(block, rest, values.dtype)
        is_kept = values.device.type == "cpu" and values.dtype.itemsize < block.dtype.itemsize
        is_kept &= ranks.n_ranks() == 1  # whoever shares a model out lacks the memory
        ctx.save_for_backward(kept, block, rest, rows if is_kept else None)
        return values @ (rows if by_columns else rows.T)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        kept, block, rest, rows = ctx.saved_tensors
        part, by_columns = ctx.part, ctx.by_columns
        of_values = of_block = None
        if ctx.needs_input_grad[0]:
            if rows is None:
                rows = part.rows(block, rest, ctx.dtype)
            of_values = gradient @ (rows.T if by_columns else rows)
        if kept is not None:
            left = kept if by_columns else gradient  # (..., trained dimension)
            right = gradient if by_columns else kept
            if not by_columns and part.is_minor:
                left = left[..., part.gathered]
            product = left.flatten(0, -2).T @ right.flatten(0, -2)
            n_trained = len(part.trained)
            own = product[:n_trained] if part.is_minor else product.index_select(0, part.trained)
            of_block = own.to(block.dtype)
        return of_values, of_block, None, None
