"""Parameters of which only some entries are trained, and modules that hold such parameters.

A parameter is cut in two: the trained entries become one parameter, the *block*, all others a
frozen one, the *rest*. Nothing is stored twice, and whatever follows parameters (wrappers that
share them out or sum gradients, optimizers, counts) follows these. Wherever the whole is needed, it
is put together; checkpoints hold it under its ordinary name. Does not know units, or what a module
computes with its parameters.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ssah_utils import guards, shards

PADDING = 64  # sizes of blocks are rounded up to a multiple of it
PREFIX = "partial_"  # names of the modules that hold the two parts of a parameter


class PartialParameter(nn.Module):
    """The two parts of a parameter; calling it gives the whole, as large as the parameter.

    A *row* is what one index of ``dimension`` selects. ``chosen`` says which rows are trained: (n,)
    bool, or, of a stack of matrices, (n_matrices, n) bool. ``block`` and ``rest`` hold rows,
    whatever their dimension: (n_trained, row size) and (n_frozen, row size), or (n,) of a bias. The
    block is kept in float32 at least.
    """

    block: nn.Parameter
    rest: nn.Parameter | None

    def __init__(self, original: nn.Parameter, dimension: int, chosen: Tensor) -> None:
        super().__init__()
        self.original = [original]  # in a list, so that it is no parameter of this module
        self.dimension, self.n_leading = dimension, chosen.ndim
        self.shape, self.dtype = original.shape, original.dtype
        chosen = chosen.flatten()
        self.trained = chosen.nonzero().squeeze(1).to(original.device)
        self.frozen = (~chosen).nonzero().squeeze(1).to(original.device)
        # One size for all blocks of about the same size: matrix kernels are made once per shape,
        # and are fastest for even sizes.
        self.gathered = nn.functional.pad(self.trained, (0, -len(self.trained) % PADDING))
        rows = self.rows_of(original.detach())
        block = rows.index_select(0, self.trained)
        self.block = nn.Parameter(block.to(torch.promote_types(self.dtype, torch.float32)))
        self.register_parameter("rest", None)
        if len(self.frozen):
            self.rest = nn.Parameter(rows.index_select(0, self.frozen), requires_grad=False)
        self.placement = None  # along which dimension the whole was shared out
        original.data = original.new_empty(0)

    def __len__(self) -> int:
        return len(self.trained) + len(self.frozen)

    @property
    def is_minor(self) -> bool:
        """Whether less than half is trained."""
        return len(self.trained) < len(self) / 2

    def rows_of(self, whole: Tensor) -> Tensor:
        """A whole parameter as (rows, row size); in most cases a view."""
        return whole.movedim(self.dimension, self.n_leading - 1).flatten(0, self.n_leading - 1)

    def whole_of(self, rows: Tensor) -> Tensor:
        """The inverse of ``rows_of``; a view."""
        order = list(self.shape)
        order.insert(self.n_leading - 1, order.pop(self.dimension))
        return rows.view(order).movedim(self.n_leading - 1, self.dimension)

    def forward(self) -> Tensor:
        return _Whole.apply(*self.here(), self)

    def here(self) -> tuple[Tensor, Tensor | None]:
        """Block and rest, with indices on their device.

        ``ValueError`` where this process does not hold all of them.
        """
        guards.refuse_parts(self.block)
        if self.trained.device != self.block.device:
            self._move_indices()
        return self.block, self.rest

    def _move_indices(self) -> None:
        for name in ("trained", "frozen", "gathered"):
            setattr(self, name, getattr(self, name).to(self.block.device))

    def rows(self, block: Tensor, rest: Tensor | None, dtype: torch.dtype) -> Tensor:
        """All rows in a precision, put together from block and rest: a copy."""
        if rest is None:
            return block.detach().to(dtype, copy=True)
        rows = block.new_empty((len(self), *block.shape[1:]), dtype=dtype)
        rows.index_copy_(0, self.trained, block.detach().to(dtype))
        return rows.index_copy_(0, self.frozen, rest.detach().to(dtype))

    # ------------------------------------------------------------------------------ all processes

    def collected(self, dtype: torch.dtype) -> Tensor:
        """The whole outside of a forward pass, wherever its parts are.

        Where processes share them out, all must ask at the same time.
        """
        self.settle()
        block, rest = shards.all_of(self.block), self.rest
        rest = None if rest is None else shards.all_of(rest)
        if block.is_meta:
            return self.whole_of(block.new_empty((len(self), *block.shape[1:]), dtype=dtype))
        if self.trained.device != block.device:
            self._move_indices()
        return self.whole_of(self.rows(block, rest, dtype))

    def settle(self) -> None:
        """Have FSDP2 put parts back that it had gathered for a forward pass."""
        for hook in self._state_dict_pre_hooks.values():
            hook(self, "", False)

    def saved(self) -> Tensor:
        """The ordinary parameter, in the block's precision, so that resuming loses nothing."""
        whole = self.collected(self.block.dtype).contiguous()
        return shards.shared_out(whole, self.block) if not whole.is_meta else self.place_holder()

    def place_holder(self) -> Tensor:
        """What a checkpoint's value for the ordinary parameter can be written into."""
        return shards.place_holder(self.shape, self.block)

    @torch.no_grad()
    def load(self, value: Tensor) -> None:
        """Take over the values of an ordinary parameter."""
        self.settle()
        rows = self.rows_of(shards.all_of(value))
        for name, where in (("block", self.trained), ("rest", self.frozen)):
            part = self._parameters[name]
            if part is None:
                continue
            values = rows.index_select(0, where.to(rows.device)).to(part.dtype)
            if part.is_meta:  # there is no memory to copy into
                values = shards.shared_out(values, part)
                self._parameters[name] = nn.Parameter(values, requires_grad=part.requires_grad)
            else:
                part.copy_(shards.shared_out(values.to(part.device), part))

    def merged(self, lists: shards.Lists) -> tuple[nn.Parameter, shards.Seat | None]:
        """The ordinary parameter again, and where FSDP2 is to put it."""
        seat = lists.take(self, "block")
        if self.rest is not None:
            lists.take(self, "rest")
        (original,) = self.original
        original.data = self.whole_of(self.rows(self.block, self.rest, self.dtype)).contiguous()
        return original, seat

    def _apply(self, fn, recurse: bool = True) -> nn.Module:
        """``to``, ``half`` and the like change frozen entries; the block stays float32 at least."""
        before = self.block.data
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        super()._apply(fn, recurse)
        dtype = torch.promote_types(self.dtype, torch.float32)
        self.block.data = before.to(self.block.device, dtype)
        if not self.block.is_meta:
            self._move_indices()
        return self

    def _save_to_state_dict(self, *args) -> None:
        """Done by the module whose parameter this is, as the name is that of no module."""

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors
    ) -> None:
        """As above; parts that ``torch.distributed.checkpoint`` adds are those that are here."""
        for name in ("block", "rest"):
            value = state_dict.get(prefix + name)
            if value is not None and value is not self._parameters[name]:
                unexpected.append(prefix + name)

    # FSDP 1 marks modules before it lays their parameters into one, FSDP2 after it has shared them
    # out. So FSDP 1 can be refused while nothing is lost.

    @property
    def _is_fsdp_managed_module(self) -> bool:
        return self.__dict__.get("is_managed", False)

    @_is_fsdp_managed_module.setter
    def _is_fsdp_managed_module(self, is_managed: bool) -> None:
        if is_managed and not shards.is_shared_out(self.block):
            raise ValueError(guards.SHARDED)
        self.__dict__["is_managed"] = is_managed

    def extra_repr(self) -> str:
        return f"{len(self.trained)} of {len(self)} rows trained"


class Partial(nn.Module):
    """What a module is as well while it holds partial parameters (``cut``).

    It stays what and where it is. Its parameters go on being there under their names: they are put
    together when they are asked for.
    """

    plain_class: ClassVar[type[nn.Module]]

    def parts(self) -> dict[str, PartialParameter]:
        """The partial parameters, by the names of the ordinary ones."""
        return {
            name.removeprefix(PREFIX): module
            for name, module in self._modules.items()
            if isinstance(module, PartialParameter)
        }

    def whole(self, name: str) -> Tensor:
        """One of the ordinary parameters, as it stands."""
        part = self._modules[PREFIX + name]
        is_here = not (shards.is_shared_out(part.block) or part.block.is_meta)
        return part() if is_here else part.collected(part.dtype)

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        others: dict[str, Tensor] = {}
        super()._save_to_state_dict(others, prefix, keep_vars)
        own = {prefix + name: part.saved() for name, part in self.parts().items()}
        for name in self._parameters:  # in their order
            key = prefix + name
            if key in own or key in others:
                destination[key] = own[key] if key in own else others.pop(key)
        destination.update(others)

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors
    ) -> None:
        rest = dict(state_dict)
        for name, part in self.parts().items():
            value = rest.pop(prefix + name, None)
            if value is None or shards.is_place_holder(value):
                missing.append(prefix + name)
            elif value.shape != part.shape:
                shapes = f"{tuple(value.shape)} against {tuple(part.shape)}"
                errors.append(f"size mismatch for {prefix + name}: {shapes}")
            else:
                part.load(value)
        super()._load_from_state_dict(
            rest, prefix, local_metadata, strict, missing, unexpected, errors
        )

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        """Without ``recurse``, the ordinary parameters as well.

        So does ``torch.distributed.checkpoint`` ask each module what to load into it.
        """
        yield from super().named_buffers(prefix, recurse, remove_duplicate)
        if not recurse:
            between = "." if prefix else ""
            for name, part in self.parts().items():
                yield f"{prefix}{between}{name}", part.place_holder()

    def buffers(self, recurse: bool = True) -> Iterator[Tensor]:
        for _, buffer in super().named_buffers(recurse=recurse):
            yield buffer


@functools.cache
def _partial_class(
    kind: type[Partial], plain: type[nn.Module], names: tuple[str, ...]
) -> type[nn.Module]:
    """The class of a module, with the named parameters put together when asked for."""
    own = {name: property(lambda self, name=name: self.whole(name)) for name in names}
    return type(f"Partial{plain.__name__}", (kind, plain), own | {"plain_class": plain})


def cut(
    module: nn.Module,
    kind: type[Partial],
    chosen: Mapping[str, tuple[int, Tensor]],
    lists: shards.Lists,
) -> None:
    """Let only some rows of some parameters of a module be trained.

    ``chosen``: by name, the dimension of the rows and which of them (``PartialParameter``).
    """
    module.__class__ = _partial_class(kind, type(module), tuple(chosen))
    for name, (dimension, rows) in chosen.items():
        seat = lists.take(module, name)
        part = PartialParameter(module._parameters[name], dimension, rows)
        module._parameters[name] = None  # its place among the others is kept
        module._modules[PREFIX + name] = part
        if seat is not None:
            part.placement = seat.was.fsdp_placement
            lists.put(seat, part, *(["block"] if part.rest is None else ["block", "rest"]))


def trained_whole(module: nn.Module, name: str) -> tuple[nn.Parameter, Callable[[Tensor], Tensor]]:
    """The parameter that stands for an ordinary one, and what views it, or its gradient, as that.

    ``ValueError`` where some of the ordinary one is frozen: then no parameter stands for it.
    """
    part = module._modules.get(PREFIX + name)
    if part is None:
        return getattr(module, name), lambda values: values
    if part.rest is not None:
        raise ValueError(
            f"some of a '{name}' is frozen: freeze some of it or pull at all of it, not both"
        )
    return part.block, part.whole_of


def merge(module: Partial, lists: shards.Lists) -> None:
    """Undo ``cut``: ordinary parameters, the trained entries in their places.

    One parameter after the other is gathered, where processes share it out.
    """
    for name, part in module.parts().items():
        parameter, seat = part.merged(lists)
        del module._modules[PREFIX + name]
        module._parameters[name] = parameter
        lists.put(seat, module, name, placement=part.placement)
    plain = type(module).plain_class
    if shards.is_fsdp_module(module) and not hasattr(plain, "_get_fsdp_state"):
        shards.as_fsdp_module(module, plain)
    else:
        module.__class__ = plain


def merge_copy(model: nn.Module, dtype: torch.dtype) -> None:
    """Ordinary parameters, in ``dtype``, for all partial ones of a copy that is only looked at.

    They would be put together anew for every forward pass. What processes share out is left.
    """
    lists = shards.Lists(model)
    for module in [one for one in model.modules() if isinstance(one, Partial)]:
        parts = module.parts().values()
        if not any(shards.is_shared_out(part.block) for part in parts):
            for part in parts:
                part.dtype = dtype
            merge(module, lists)
    lists.close()


class _Whole(torch.autograd.Function):
    """A whole parameter, of whose gradient only that of the block goes on."""

    @staticmethod
    def forward(ctx, block: Tensor, rest: Tensor | None, part: PartialParameter) -> Tensor:
        ctx.part, ctx.dtype = part, block.dtype
        return part.whole_of(part.rows(block, rest, part.dtype if rest is None else rest.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        rows = ctx.part.rows_of(gradient)
        return rows.index_select(0, ctx.part.trained).to(ctx.dtype), None, None
