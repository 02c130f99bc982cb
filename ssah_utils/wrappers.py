"""A model as its users hold it: in wrappers, which are taken off, and in one of two modes.

Knows torch's wrappers and modes only. Does not know architectures.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from ssah_utils import placement

if TYPE_CHECKING:  # seconds to import
    from transformers import PreTrainedModel

# As they appear in the names of parameters.
WRAPPERS = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def without_wrappers(model: nn.Module) -> "PreTrainedModel":
    """The model inside ``torch.compile`` and data-parallel wrappers, however nested.

    An adapter of PEFT stays on, as it is part of what the model says. Raises ``ValueError`` for
    what is no Hugging Face model.
    """
    parts = getattr(model, "_modules", {})
    while "_orig_mod" in parts or not hasattr(model, "get_input_embeddings"):
        inner = next((parts[name] for name in WRAPPERS if name in parts), None)
        if inner is None:
            raise ValueError(
                f"a {type(model).__name__} is no Hugging Face language model,"
                " nor a wrapper around one"
            )
        model = inner
        parts = getattr(model, "_modules", {})  # compiled twice, it is no module any more
    return cast("PreTrainedModel", model)


def unwrapped(model: nn.Module) -> "PreTrainedModel":
    """``without_wrappers``, and ``ValueError`` for a model to whose matrices an adapter adds."""
    plain = without_wrappers(model)
    if any(type(module).__module__.startswith("peft.") for module in plain.modules()):
        raise ValueError(
            "the model carries a PEFT adapter, so its matrices are not all that it computes:"
            " merge it first, by model.merge_and_unload();"
            " an adapter that cannot be merged has no units to look at"
        )
    return plain


def over_same_weights(model: nn.Module) -> nn.Module:
    """Another module over the same weights, with hooks and a mode of its own.

    So one can be changed by hooks and judged by the other, at no memory. Training either trains
    both. Not for quantised models: some keep scales outside of their weights, where a copy loses
    them. Of a model that is dispatched by a device map, what is kept elsewhere is shared, too.
    """
    shared = (*model.parameters(), *model.buffers(), *placement.stores(model))
    return copy.deepcopy(model, memo={id(one): one for one in shared})


def plain_name(name: str) -> str:
    """Name of a parameter or a module as it would be without wrappers on the way to it."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside the block nothing is dropped out, whatever mode the model or its parts are in.

    Afterwards every part is in the mode in which it was.
    """
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def without_parameter_gradients(model: nn.Module) -> Iterator[None]:
    """Inside the block no parameter asks for a gradient, which saves half of a backward pass."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


class _Uncompiled:
    """Compiled code rests while at least one such block is open.

    ``torch.compiler.set_stance`` as a context restores what it found when it was opened. Where the
    outer of two blocks ends first, that would leave the compiler off for good.
    """

    def __init__(self):
        self.n_open = 0

    def __enter__(self) -> None:
        if not self.n_open:
            self.stance = torch.compiler.set_stance("force_eager")
        self.n_open += 1

    def __exit__(self, *_) -> None:
        self.n_open -= 1
        if not self.n_open:
            self.stance.__exit__(None, None, None)


uncompiled = _Uncompiled()
