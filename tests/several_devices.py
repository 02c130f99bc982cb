"""Several devices on a machine that has one: tensors that say they are elsewhere, and compute here.

As on GPUs, tensors of different devices cannot meet in one operation, unless one has no dimension
or is copied; so whatever forgets to move something is found. The numbers are those of the CPU, bit
for bit.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

TYPE, CPU, PACKED = "cuda", torch.device("cpu"), torch.contiguous_format
aten = torch.ops.aten
MAY_MIX = {aten.copy_.default, aten.index.Tensor, aten.index_put_.default, aten.index_put.default}


class Elsewhere(torch.Tensor):
    """A tensor on another device, of which ``inner`` holds the values."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor, device: object = None, **more) -> "Elsewhere":
        device, inner = device or inner.device, taken_out(inner)
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=device,
            requires_grad=inner.requires_grad,
        )

    def __init__(self, inner: Tensor, device: object = None, **more) -> None:
        self.inner = taken_out(inner)

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def __repr__(self) -> str:
        return f"Elsewhere({self.inner!r}, {self.device})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


def run(func, args, kwargs):
    """One operation, on the device on which its tensors are."""
    tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
    devices = {one.device for one in tensors if one.ndim}
    may_mix = func in MAY_MIX or "device" in kwargs
    if len(devices) > 1 and not may_mix:
        raise RuntimeError(f"{func}: tensors on {', '.join(sorted(map(str, devices)))}")
    asked = kwargs.get("device")
    place = torch.device(asked) if asked is not None else None
    if place is None:
        own = [one.device for one in tensors]
        place = next((one for one in own if one.type == TYPE), torch.device("cpu"))
        if func in MAY_MIX:
            place = own[0]
    if place.type == "meta":  # and nothing of the values goes there
        return func(*tree_map(as_meta, args), **tree_map(as_meta, kwargs))
    inside = {} if asked is None else {"device": torch.device("cpu")}
    known = {id(one.inner): one for one in tensors if isinstance(one, Elsewhere)}
    found = func(*tree_map(taken_out, args), **tree_map(taken_out, kwargs) | inside)

    def put(value):
        if not isinstance(value, Tensor) or isinstance(value, Elsewhere):
            return value
        if id(value) in known:
            return known[id(value)]
        return Elsewhere(value, place) if place.type == TYPE else value

    return tree_map(put, found)


def here(tensor: Tensor) -> Tensor:
    """The values of a tensor, wherever it is."""
    return tensor.inner if isinstance(tensor, Elsewhere) else tensor


def taken_out(value):
    return value.inner if isinstance(value, Elsewhere) else value


def as_meta(value):
    return value.inner.to("meta") if isinstance(value, Elsewhere) else value


# what makes Python's own numbers
READ = {getattr(torch.Tensor, f"__{name}__") for name in "int float bool index".split()}
CONVERSIONS = {
    getattr(torch.Tensor, name) for name in "bool long int float double half __invert__".split()
}
READ |= {torch.Tensor.tolist, torch.Tensor.item}


class PythonSide(TorchFunctionMode):
    """What asks a device's own library before it becomes an operation: indexing, new tensors."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.tensor and torch.device(kwargs.get("device") or "cpu").type == TYPE:
            place = torch.device(kwargs.pop("device"))
            return Elsewhere(func(*args, **kwargs), place)
        if func is torch.Tensor.contiguous and isinstance(args[0], Elsewhere):
            return args[0] if args[0].is_contiguous() else args[0].clone(memory_format=PACKED)
        if func in READ and isinstance(args[0], Elsewhere):
            return func(args[0].inner)
        if func in CONVERSIONS and isinstance(args[0], Elsewhere):
            return Elsewhere(func(args[0].inner), args[0].device)
        if func is torch.Tensor.nonzero and isinstance(args[0], Elsewhere):
            return Elsewhere(args[0].inner.nonzero(), args[0].device)
        if func in (torch.Tensor.unbind, torch.Tensor.__iter__) and isinstance(args[0], Elsewhere):
            parts = args[0].inner.unbind(*args[1:], **kwargs)
            made = tuple(Elsewhere(part, args[0].device) for part in parts)
            return made if func is torch.Tensor.unbind else iter(made)
        is_indexing = func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__)
        if not is_indexing or not isinstance(args[0], Elsewhere):
            return func(*args, **kwargs)
        whole, *others = args
        for one in tree_leaves(others):
            if isinstance(one, Tensor) and one.ndim and one.device not in (whole.device, CPU):
                raise RuntimeError(f"{func}: tensors on {whole.device} and {one.device}")
        if func is torch.Tensor.__setitem__ and isinstance(others[1], Tensor) and others[1].ndim:
            assert others[1].device == whole.device, f"{others[1].device} into {whole.device}"
        found = func(whole.inner, *tree_map(taken_out, others))
        return found if found is None else Elsewhere(found, whole.device)


class Operations(TorchDispatchMode):
    """Operations on tensors that are elsewhere, or are to be made there."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        is_there = any(isinstance(one, torch.device) and one.type == TYPE for one in leaves)
        if not is_there and not any(isinstance(one, Elsewhere) for one in leaves):
            return func(*args, **kwargs)
        with self:  # in inference mode, what is made of other operations comes whole
            found = func.decompose(*args, **kwargs)
        return run(func, args, kwargs) if found is NotImplemented else found


class InTurn:
    """In place of a pool of threads, which would not know of the devices."""

    def __enter__(self) -> "InTurn":
        return self

    def __exit__(self, *why) -> None:
        pass

    map = staticmethod(map)


@contextmanager
def several_devices() -> Iterator[None]:
    """Inside the block, ``cuda:0``, ``cuda:1`` and so on are devices, also without a GPU.

    Without gradients: autograd asks the device's own library.
    """
    with (
        patch("torch.cuda._lazy_init", lambda: None),
        patch("ssah_utils.fingerprints.ThreadPoolExecutor", InTurn),
        torch.no_grad(),
        PythonSide(),
        Operations(),
    ):
        yield
