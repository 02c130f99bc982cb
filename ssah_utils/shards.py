"""Parameters that FSDP2 shares out over several processes: gather one, or exchange one for others.

``fully_shard`` writes down which parameters it found, and torch has no public way to take one off
that list or to put one on it. So this is the only module that reads and writes it. Knows FSDP2 and
its tensors (DTensor). Does not know units.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

TWO_PRECISIONS = (
    "FSDP2 cannot train these units: what units own is trained in float32, the rest of the model in"
    " another precision, and it takes only one: load the model in float32, or launch with"
    " --mixed_precision bf16"
)


def is_shared_out(tensor: Tensor) -> bool:
    """Whether this process holds a part of a tensor (a DTensor), and other processes the rest."""
    return hasattr(tensor, "device_mesh")


@torch.no_grad()
def all_of(tensor: Tensor) -> Tensor:
    """All of a tensor. Every process that holds a part of it must ask at the same time."""
    if not is_shared_out(tensor):
        return tensor.detach()
    if tensor.is_meta:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    # where parts are offloaded to the CPU, they meet on the device of the mesh
    part = tensor.detach().to(tensor.device_mesh.device_type)
    return part.full_tensor().to(tensor.device)


def shared_out(values: Tensor, like: Tensor) -> Tensor:
    """``values`` shared out as ``like`` is. All processes have all of them, so nothing is sent."""
    if not is_shared_out(like):
        return values
    values = values.detach().contiguous()
    return _of_part(values[_place_in(values, like)].clone(), values, like)


def _place_in(whole: Tensor, like: Tensor) -> tuple[slice, ...]:
    """Which entries of a tensor are this process's part, if it is shared out as ``like`` is."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset as place_of

    sizes, starts = place_of(whole.shape, like.device_mesh, like.placements)
    return tuple(slice(start, start + n) for n, start in zip(sizes, starts, strict=True))


def _of_part(part: Tensor, whole: Tensor, like: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor

    where = (like.device_mesh, like.placements)
    sizes = {"shape": whole.shape, "stride": whole.stride()}
    part = part if like.is_meta else part.to(like.device)
    return DTensor.from_local(part, *where, run_check=False, **sizes)


def place_holder(shape: torch.Size, like: Tensor) -> Tensor:
    """A tensor of some shape, shared out as ``like`` is, into which nobody has written yet."""
    if is_shared_out(like):
        whole = torch.empty(shape, dtype=like.dtype, device="meta")
        part = torch.empty_like(whole[_place_in(whole, like)], device=like.device)
        result = _of_part(part.contiguous(), whole, like)
    else:
        result = like.detach().new_empty(1).expand(shape)  # one number: no memory
    result.waits_for_values = True
    return result


def is_place_holder(value: Tensor) -> bool:
    """Whether a tensor is a ``place_holder`` that nobody has written into."""
    own = value._local_tensor if is_shared_out(value) else value
    return getattr(value, "waits_for_values", False) and own._version == 0


# ------------------------------------------------------------------------------------ FSDP2's lists


@dataclass
class Seat:
    """Where on FSDP2's lists a parameter was: what replaces it is treated alike."""

    group: Any  # FSDPParamGroup, what is gathered together
    index: int
    was: Any  # FSDPParam


class Lists:
    """What ``fully_shard`` wrote down about the parameters of a model, open for changes.

    ``take`` and ``put`` change it, ``close`` makes FSDP2 look at what has changed. Between them the
    model cannot run. Every process must make the same changes in the same order.
    """

    def __init__(self, model: nn.Module) -> None:
        from torch.distributed.fsdp import FSDPModule

        self.states = []
        for module in model.modules():
            if isinstance(module, FSDPModule):
                state = module._get_fsdp_state()
                if state._is_root:
                    module.reset_iter_state()  # a step may have failed half way
                module.reshard()
                if state not in self.states:
                    self.states.append(state)
        groups = [group for state in self.states for group in state._fsdp_param_groups]
        self.places = {}
        for group in groups:
            for one in group.fsdp_params:
                info = one._module_info
                shared = zip(info.shared_modules, info.shared_param_names, strict=True)
                for place in ((info.module, info.param_name), *shared):
                    self.places[place] = (group, one)
        # of every parameter that was made ordinary, the part of it that FSDP2 had made a parameter
        self.parts = WeakTensorKeyDictionary()

    def _trained(self) -> Iterator[list[Any]]:
        """The trained parameters (FSDPParam) of every group: FSDP2 takes one precision of them."""
        for state in self.states:
            for group in state._fsdp_param_groups:
                yield [one for one in group.fsdp_params if one.sharded_param.requires_grad]

    @property
    def has_two_precisions(self) -> bool:
        """Whether FSDP2 would refuse what is trained."""
        return any(len({one.sharded_param.dtype for one in own}) > 1 for own in self._trained())

    def widen(self) -> None:
        """Let what is trained together be in the widest of its precisions.

        Whoever shards a model out may turn what is trained to float32, as accelerate does under
        mixed precision; what was frozen then follows when it is to be trained again.
        """
        for own in list(self._trained()):
            dtypes = [one.sharded_param.dtype for one in own]
            widest = functools.reduce(torch.promote_types, dtypes, torch.bool)
            for one in own:
                if one.sharded_param.dtype == widest:
                    continue
                module, name = one._module_info.module, one._module_info.param_name
                seat = self.take(module, name)
                module._parameters[name].data = module._parameters[name].data.to(widest)
                self.put(seat, module, name, placement=one.fsdp_placement)

    def has(self, module: nn.Module, name: str) -> bool:
        """Whether FSDP2 shares out a parameter, and nobody else does as well."""
        found = self.places.get((module, name))
        return found is not None and not found[1].is_dtensor

    def take(self, module: nn.Module, name: str) -> Seat | None:
        """Make a parameter an ordinary one again, whole on every process.

        None for one that is ordinary already.
        """
        if (module, name) not in self.places:
            return None
        group, was = self.places.pop((module, name))
        seat = Seat(group, group.fsdp_params.index(was), was)
        group.fsdp_params.remove(was)
        was._post_load_hook_handle.remove()
        values = all_of(was.sharded_param).to(was.device)
        required = was.sharded_param.requires_grad
        ordinary = module._parameters[name] = nn.Parameter(values, requires_grad=required)
        self.parts[ordinary] = TensorWeakRef(was.sharded_param)  # its memory is to be given back
        return seat

    def as_held(self, parameter: Tensor) -> Tensor | None:
        """A parameter as an optimizer holds it that was made before; None where nobody does."""
        return self.parts[parameter]() if parameter in self.parts else parameter

    def put(self, seat: Seat | None, module: nn.Module, *names: str, placement=None) -> None:
        """Let FSDP2 share out ordinary parameters of a module; with no seat, do nothing."""
        from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam, ParamModuleInfo

        for name in names if seat is not None else ():
            was, group = seat.was, seat.group
            new = FSDPParam(
                module._parameters[name],
                ParamModuleInfo(module, name),
                was.mesh_info,
                was.post_forward_mesh_info,
                was.device,
                (lambda _: placement) if placement is not None else None,
                was.mp_policy,
                group.offload_policy,
            )
            group.fsdp_params.insert(seat.index, new)
            seat.index += 1
            self.places[module, name] = (group, new)

    def close(self) -> None:
        """``ValueError`` where FSDP2 cannot gather what is on its lists now."""
        if self.has_two_precisions:
            raise ValueError(TWO_PRECISIONS)
        for state in self.states:
            if state._is_root is None:
                continue  # FSDP2 looks at its lists at the first forward pass
            for group in state._fsdp_param_groups:
                for hooks in (
                    group._module_to_pre_save_state_dict_hook_handle,
                    group._module_to_pre_load_state_dict_hook_handle,
                ):
                    for handle in hooks.values():
                        handle.remove()
                    hooks.clear()
                group._reset_sharded_params = False
                try:
                    group.lazy_init()
                except AssertionError as error:
                    raise ValueError(f"FSDP2 cannot train these units: {error}") from error


def as_fsdp_module(module: nn.Module, plain: type[nn.Module]) -> None:
    """Give a module to which ``fully_shard`` was applied another class underneath."""
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.fsdp._fully_shard import _fsdp_init, _fully_shard

    module.__class__ = plain
    _fsdp_init._apply_to_module(
        (module,),
        _fully_shard.cls_to_fsdp_cls,
        FSDPModule,
        "FSDP",
        _fully_shard._unimplemented_deepcopy,
    )


def is_fsdp_module(module: nn.Module) -> bool:
    """Whether ``fully_shard`` was applied to this very module."""
    return hasattr(module, "_get_fsdp_state")
