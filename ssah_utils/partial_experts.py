"""Train some units of fused experts: the trained entries of a parameter become a small one.

As ``unit_training`` does with linear maps. Here the module stays what and where it is, and whatever
function runs its experts goes on doing so: only, in place of a parameter it finds a tensor into
which the trained entries have just been written. Knows fused experts. Does not know architectures.
"""

import functools
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ssah_utils import guards
from ssah_utils.experts import chosen_entries, layout


class PartialParameter(nn.Module):
    """A parameter of fused experts of which only some entries are trained: ``block``.

    ``whole`` is the parameter's own memory, and calling the module gives it, with the block written
    into it. ``chosen``: (n_experts, size of ``dimension``) bool, the rows (or columns) that are
    trained; the block is (n_trained, size of the remaining dimension), or (n_trained,) of a bias.
    """

    whole: Tensor
    experts: Tensor  # of every trained row, the number of its expert
    rows: Tensor

    def __init__(self, original: nn.Parameter, dimension: int, chosen: Tensor) -> None:
        super().__init__()
        self.original = [original]  # in a list, so that it is no parameter of this module
        self.dimension = dimension
        experts, rows = chosen.nonzero(as_tuple=True)
        self.register_buffer("whole", original.detach(), persistent=False)
        self.register_buffer("experts", experts.to(original.device), persistent=False)
        self.register_buffer("rows", rows.to(original.device), persistent=False)
        block = self.whole[self.where].to(torch.promote_types(original.dtype, torch.float32))
        self.block = nn.Parameter(block)

    @property
    def where(self) -> tuple:
        """The trained entries, as an index."""
        between = (slice(None),) * (self.dimension - 1)
        return (self.experts, *between, self.rows)

    def forward(self) -> Tensor:
        if guards.is_sharded(self):
            raise ValueError(guards.SHARDED)
        return _Whole.apply(self.block, self)

    @torch.no_grad()
    def written(self) -> Tensor:
        """The whole, after the block has been written into it.

        By ``data``, of which autograd counts no version: another forward pass writes the same block
        again, which autograd would take for a change.
        """
        self.whole.data[self.where] = self.block.detach().to(self.whole.dtype)
        return self.whole.data

    @torch.no_grad()
    def merged(self) -> nn.Parameter:
        """The ordinary parameter again: the block's entries in their places, all others untouched.

        Where the model was sharded meanwhile, nobody can read the block here.
        """
        (original,) = self.original
        original.data = self.whole.data if guards.is_sharded(self) else self.written()
        return original

    def _apply(self, fn, recurse: bool = True) -> nn.Module:
        """``to``, ``half`` and the like change frozen entries; the block stays float32 at least."""
        before = self.block.data
        super()._apply(fn, recurse)
        dtype = torch.promote_types(self.whole.dtype, torch.float32)
        self.block.data = before.to(self.block.device, dtype)
        return self

    def saved(self) -> Tensor:
        """The ordinary parameter, in the block's precision, so that resuming loses nothing."""
        if guards.is_sharded(self):
            raise ValueError(guards.SHARDED)
        whole = self.whole.to(self.block.dtype, copy=True)
        whole[self.where] = self.block.detach()
        return whole

    @torch.no_grad()
    def load(self, value: Tensor) -> None:
        """Take over the values of an ordinary parameter."""
        self.whole.copy_(value)
        self.block.copy_(value.to(self.block.device)[self.where])

    def _save_to_state_dict(self, *args) -> None:
        """Done by the module whose parameter this is, as the name is that of no module."""

    _load_from_state_dict = _save_to_state_dict

    def extra_repr(self) -> str:
        return f"{len(self.rows)} of {self.whole.shape[0] * self.whole.shape[self.dimension]} rows"


class PartialExperts(nn.Module):
    """What fused experts are as well while some of their units are trained (``train_part``)."""

    def parts(self) -> Iterator[tuple[str, PartialParameter]]:
        """The partial parameters, by the names of the ordinary ones."""
        for name, module in self._modules.items():
            if isinstance(module, PartialParameter):
                yield name, module

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        others: dict[str, Tensor] = {}
        super()._save_to_state_dict(others, prefix, keep_vars)
        own = {prefix + name: part.saved() for name, part in self.parts()}
        for name in self._parameters:  # in their order
            key = prefix + name
            destination[key] = own[key] if key in own else others.pop(key)
        destination.update(others)

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors
    ) -> None:
        rest = dict(state_dict)
        for name, part in self.parts():
            value = rest.pop(prefix + name, None)
            if value is None:
                missing.append(prefix + name)
            elif value.shape != part.whole.shape:
                shapes = f"{tuple(value.shape)} against {tuple(part.whole.shape)}"
                errors.append(f"size mismatch for {prefix + name}: {shapes}")
            else:
                part.load(value)
        super()._load_from_state_dict(
            rest, prefix, local_metadata, strict, missing, unexpected, errors
        )


@functools.cache
def _partial_class(experts: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """The class of fused experts, with the named parameters computed by modules of that name."""
    computed = {name: property(lambda self, name=name: self._modules[name]()) for name in names}
    return type(f"Partial{experts.__name__}", (PartialExperts, experts), computed)


def check_parameters(experts: nn.Module, uses: Mapping[int, int]) -> None:
    """``ValueError`` unless units own parameters, which are those of no other module.

    ``uses``: how many modules hold each parameter, by its id.
    """
    for name, _, _ in layout(experts):
        parameter = getattr(experts, name)
        if not isinstance(parameter, nn.Parameter):
            raise ValueError(
                f"'{name}' of a {type(experts).__name__} is computed: take off what does that (an"
                " adapter, a quantiser, a parametrization) first"
            )
        if uses[id(parameter)] > 1:
            raise ValueError(
                f"'{name}' of a {type(experts).__name__} is shared with another module, which would"
                " be trained along: untie them"
            )


def train_part(experts: nn.Module, units: Tensor) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """Make the entries of some units, (n_experts * d_expert,) bool, all that is trained of theirs.

    Returns every parameter that is replaced, with what stands in for it. What belongs to no unit,
    the biases of the down projections, is left as it is.
    """
    parts = {}
    for name, (dimension, chosen) in chosen_entries(experts, units).items():
        parameter = getattr(experts, name)
        # All of a float32 parameter needs no block. In a lower precision, only a block keeps small
        # updates.
        if not units.any() or (units.all() and parameter.dtype == torch.float32):
            parameter.requires_grad_(bool(units.any()))
        else:
            parts[name] = PartialParameter(parameter, dimension, chosen)
    if parts:
        experts.__class__ = _partial_class(type(experts), tuple(parts))
        for name, part in parts.items():
            experts._parameters[name] = None  # its place among the others is kept
            experts._modules[name] = part
    return [(part.original[0], part.block) for part in parts.values()]


def merge(experts: nn.Module) -> None:
    """Undo ``train_part``: ordinary parameters, the trained entries in their places."""
    if not isinstance(experts, PartialExperts):
        return
    for name, part in list(experts.parts()):
        del experts._modules[name]
        experts._parameters[name] = part.merged()
    experts.__class__ = type(experts).__bases__[1]


class _Whole(torch.autograd.Function):
    """A whole parameter, of whose gradient only that of the block goes on."""

    @staticmethod
    def forward(ctx, block: Tensor, part: PartialParameter) -> Tensor:
        ctx.where, ctx.dtype = part.where, block.dtype
        return part.written()

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient[ctx.where].to(ctx.dtype), None
