"""Refuse in one line what would train some units wrongly or not at all.

That is sharding, weights in codes, and optimizers that lost their parameters.

Data-parallel wrappers follow the parameters. Knows parameters, modules, optimizers and wrappers of
torch. Does not know units.
"""

import functools
import weakref
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.weak import WeakTensorKeyDictionary

from ssah_utils import placement, quantised, shards

SHARDED = (
    "the model is sharded by FSDP 1, DeepSpeed ZeRO-3 or tensor parallelism, or offloaded: some"
    " units are trained in one process, or in several with DistributedDataParallel, DataParallel"
    " or FSDP2 (fully_shard, for accelerate fsdp_version: 2)"
)
NOT_GATHERED = (
    "FSDP2 has not gathered the parameters of this module: call the model to which fully_shard was"
    " applied, not a part of it"
)
OUT_OF_REACH = (
    "the model was sharded inside the block in a way that cannot be undone here (DeepSpeed ZeRO-3,"
    " tensor parallelism, or fully_shard of a module around the model): it is left as it is inside;"
    " wrap it before the block, and hand over the outermost module"
)
CODES = (
    "the model is quantised: codes cannot be moved by a small step, so its matrices cannot be"
    f" trained; {quantised.DEQUANTISE}"
)
MAKE_IT_INSIDE = "make it inside the block, from the model's parameters that require gradients"
MADE_BEFORE = (
    f"an optimizer made before some units were chosen trains none of them: {MAKE_IT_INSIDE}"
)
USED_AFTER = (
    "an optimizer of some units is used after their block was left, where it trains nothing:"
    " make one anew"
)
REPLACED = (
    "an optimizer is older than a block in which units of a model in shards were trained, and holds"
    " parameters that the model has no more: make one anew"
)
IDLE = f"an optimizer holds only parameters that are not trained here: {MAKE_IT_INSIDE}"

# ----------------------------------------------------------------------------------------- sharding


def refuse_sharded(model: nn.Module) -> None:
    """``ValueError`` for a model of which this process does not hold all, FSDP2's apart."""
    placement.refuse_dispatched(model, placement.TRAINING)
    n_ranks = getattr(model, "tp_size", None) or 1  # of tensor parallelism
    modules, lists = list(model.modules()), shards.Lists(model)
    is_of_fsdp_1 = any(type(module).__name__ == "FullyShardedDataParallel" for module in modules)
    is_marked = any(getattr(module, "_is_fsdp_managed_module", False) for module in modules)
    if n_ranks > 1 or is_of_fsdp_1 or (is_marked and not lists.states):
        raise ValueError(SHARDED)
    for module in modules:
        for name, one in module.named_parameters(recurse=False):
            if _is_elsewhere(one) or (shards.is_shared_out(one) and not lists.has(module, name)):
                raise ValueError(SHARDED)


def _is_elsewhere(parameter: Tensor) -> bool:
    """Whether a parameter is offloaded, or in parts that DeepSpeed keeps."""
    return parameter.is_meta or hasattr(parameter, "ds_id")


def refuse_parts(parameter: Tensor) -> None:
    """``ValueError`` where a forward pass finds a part of a parameter instead of all of it."""
    if shards.is_shared_out(parameter):
        raise ValueError(NOT_GATHERED)
    if _is_elsewhere(parameter):
        raise ValueError(SHARDED)


def refuse_out_of_reach(owners: Iterable[tuple[nn.Module, str]], lists: shards.Lists) -> None:
    """``ValueError`` where parameters, by module and name, cannot be read by this process."""
    for module, name in owners:
        one = getattr(module, name)
        if _is_elsewhere(one) or (shards.is_shared_out(one) and not lists.has(module, name)):
            raise ValueError(OUT_OF_REACH)


def refuse_quantised(model: nn.Module) -> None:
    """``ValueError`` for a model of which some matrix is kept as codes."""
    for name, module in quantised.quantised_modules(model):
        raise ValueError(f"{CODES} ('{name}' is a {type(module).__name__})")


def follow_parameters(model: nn.Module) -> None:
    """Let every ``DistributedDataParallel`` around a model sum gradients of its present parameters.

    A wrapper looks at them when it is made, so it is made anew in place, with the settings and
    hooks that it had. No process waits for another, as nothing is sent: the parameters are made
    from what every process holds already.
    """
    for wrapper in list(model.modules()):
        if not isinstance(wrapper, DistributedDataParallel):
            continue
        if wrapper.mixed_precision is not None or wrapper._delay_all_reduce_params:
            raise ValueError(
                "DistributedDataParallel with mixed_precision or delayed parameters:"
                " wrap inside the block"
            )
        kept = {
            name: value
            for name, value in vars(wrapper).items()
            if name.endswith(("_hooks", "_with_kwargs", "_called"))
            or name in ("training", "require_backward_grad_sync")
        }
        communication = kept.pop("_comm_hooks")
        kept.pop("_accum_grad_hooks")  # of the parameters that it looked at before
        bucket_size = None if wrapper.bucket_bytes_cap_default else wrapper.bucket_bytes_cap / 2**20
        wrapper.__init__(
            wrapper.module,
            device_ids=wrapper.device_ids,
            output_device=wrapper.output_device,
            dim=wrapper.dim,
            init_sync=False,
            process_group=wrapper.process_group,
            bucket_cap_mb=bucket_size,
            find_unused_parameters=wrapper.find_unused_parameters,
            gradient_as_bucket_view=wrapper.gradient_as_bucket_view,
            static_graph=wrapper.static_graph,
            skip_all_reduce_unused_params=wrapper.skip_all_reduce_unused_params,
            batched_grad_copy=wrapper.batched_grad_copy,
            forward_sync_buffers=wrapper.forward_sync_buffers,
        )
        vars(wrapper).update(kept)
        for hook, state in communication:
            wrapper.register_comm_hook(state, hook)


# --------------------------------------------------------------------------------------- optimizers

# Of every parameter with which no model computes any more: module and name of what stands in for
# it, and what to say to an optimizer that does not hold that.
STAND_INS = WeakTensorKeyDictionary()
OPEN: weakref.WeakSet["Watch"] = weakref.WeakSet()


class Watch:
    """What the optimizers that step inside a block, and after it, are held against.

    ``replaced``: every parameter with which the model does not compute while the block is open, as
    optimizers hold it, and the module whose ``block`` stands in for it: wrappers may exchange that
    parameter, too.
    """

    def __init__(self, model: nn.Module, replaced: Iterable[tuple[Tensor, nn.Module]]) -> None:
        self.model = weakref.ref(model)
        self.is_trained = False  # whether any optimizer has stepped on a trained parameter
        self.idle: weakref.WeakSet = weakref.WeakSet()  # optimizers that stepped, but on none
        for whole, part in replaced:
            STAND_INS[whole] = (part, "block", MADE_BEFORE)
        OPEN.add(self)
        _look_at_every_step()

    def close(self, owners: Mapping[nn.Module, tuple[nn.Module, str]]) -> None:
        """The block is left: the parameters that stood in are replaced from now on.

        ``owners``: by the module whose ``block`` stood in, the module that holds the whole again,
        and its name there. It is the parameter of before, unless the model is in shards by now.
        """
        OPEN.discard(self)
        for whole, (part, _, _) in list(STAND_INS.items()):
            if part in owners and shards.is_shared_out(part.block):
                STAND_INS[whole] = (*owners[part], REPLACED)
            elif part in owners:
                del STAND_INS[whole]
        for part, owner in owners.items():
            STAND_INS[part.block] = (*owner, USED_AFTER)


@functools.cache
def _look_at_every_step() -> None:
    register_optimizer_step_pre_hook(lambda optimizer, args, kwargs: check_optimizer(optimizer))


def check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """``ValueError`` for an optimizer whose step would train nothing.

    That is one that holds parameters with which nothing is computed any more, or frozen ones only.
    The latter is refused at its second step, unless another optimizer has trained by then: some
    loops sort parameters into several. Learning rates, gradients and movement are not looked at: a
    step that moves nothing may be meant.
    """
    if not STAND_INS and not OPEN:
        return
    held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    for parameter in held:
        if parameter in STAND_INS:
            module, name, complaint = STAND_INS[parameter]
            if module._parameters.get(name) not in held:
                raise ValueError(complaint)
    for watch in list(OPEN):
        model = watch.model()
        if watch.is_trained or model is None:
            continue
        own = held.intersection(model.parameters())
        if any(parameter.requires_grad for parameter in own):
            watch.is_trained = True
        elif own:
            if optimizer in watch.idle:
                raise ValueError(IDLE)
            watch.idle.add(optimizer)
