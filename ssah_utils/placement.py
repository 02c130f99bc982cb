"""Where the parts of a loaded model are: on one device, on several, or fetched when they compute.

A model that is loaded by a device map is *dispatched*: accelerate gives its modules hooks that move
inputs to the module's device and, where the weights are kept in the computer's memory or on disk,
fetch these for as long as the module computes. So neither ``model.device`` nor a parameter's own
device says where anything is computed. Knows modules of torch and those hooks. Does not know
architectures or device maps.
"""

from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor, nn

TRAINING = "the model is trained"


def _hooks(module: nn.Module) -> tuple:
    """accelerate's hooks of one module, also where several are in a row."""
    hook = getattr(module, "_hf_hook", None)
    return () if hook is None else tuple(getattr(hook, "hooks", (hook,)))


def is_dispatched(model: nn.Module) -> bool:
    """Whether a device map has spread a model over several places."""
    return any(map(_hooks, model.modules()))


def refuse_dispatched(model: nn.Module, what: str) -> None:
    """``ValueError`` in one line for a dispatched model, to which ``what`` cannot be done."""
    if is_dispatched(model):
        raise ValueError(
            f"{what}, but a device map keeps this model on several devices, in memory or on disk:"
            " load it without device_map, on one device that holds it all"
        )


def device_of(module: nn.Module) -> torch.device:
    """Where a module computes, which need not be where its weights are kept."""
    for hook in _hooks(module):
        if getattr(hook, "execution_device", None) is not None:
            return torch.device(hook.execution_device)
    return next(iter((*module.parameters(), *module.buffers()))).device


def input_device(model: nn.Module) -> torch.device:
    """Where a language model takes token ids: at its embedding."""
    return device_of(model.get_input_embeddings())


def kinds_of_devices(model: nn.Module) -> str:
    """On what a model computes: ``cpu``, ``cuda``, or several, joined by ``+``."""
    if not is_dispatched(model):
        return model.device.type
    holding = [one for one in model.modules() if [*one.parameters(recurse=False)]]
    return "+".join(sorted({device_of(module).type for module in holding}))


def summary(model: nn.Module) -> str:
    """What a device map made of a model, in words: ``12 parts on cuda:0, 4 on cpu, 18 on disk``.

    Empty for a model on one device.
    """
    if not is_dispatched(model):
        return ""
    counts = Counter(map(str, model.hf_device_map.values()))
    shown = {place: f"cuda:{place}" if place.isdigit() else place for place in counts}
    first, *others = [f"{n} parts on {shown[place]}" for place, n in counts.items()]
    return ", ".join([first, *(text.replace(" parts", "") for text in others)])


# ---------------------------------------------------------------------------------------- offloaded


def kept_weights(module: nn.Module) -> Mapping[str, Tensor] | None:
    """Where the hook of a module fetches its weights, by name; None where they are in place."""
    for hook in _hooks(module):
        if getattr(hook, "offload", False):
            return hook.weights_map
    return None


def value_of(module: nn.Module, name: str) -> Tensor:
    """A parameter or buffer with its values, fetched where they are kept; only to be read.

    As it is where nothing knows more of it (``lacks_values``).
    """
    tensor = getattr(module, name)
    kept = kept_weights(module) if tensor.is_meta else None
    return tensor if kept is None else kept[name].to(tensor.dtype)


def stores(model: nn.Module) -> list[Mapping[str, Tensor]]:
    """What holds the weights of a model that are fetched: in memory, or by the names of files."""
    maps = [kept for module in model.modules() if (kept := kept_weights(module)) is not None]
    found = [getattr(kept, "dataset", kept) for kept in maps]  # of which each module sees a part
    return list({id(store): store for store in found}.values())


def lacks_values(model: nn.Module) -> str:
    """Name of a parameter whose values nothing here knows; empty where all can be had."""
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta and kept_weights(module) is None:
                return f"{prefix}.{name}".lstrip(".")
    return ""
