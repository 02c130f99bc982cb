"""A model as its users hold it: what is wrapped around it is taken off, and what is measured is
measured without dropout.

Knows wrappers and the two modes of torch's modules only. Does not know architectures.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

WRAPPERS = (
    "_orig_mod",
    "module",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
)  # as they appear in names


def without_wrappers(model: nn.Module) -> nn.Module:
    """The model inside ``torch.compile``, ``DataParallel`` and ``DistributedDataParallel``, however
    nested.

    An adapter of PEFT stays on, as it is part of what the model says. Raises ``ValueError`` for
    what is no Hugging Face model.
    """
    while "_orig_mod" in (parts := getattr(model, "_modules", {})) or not hasattr(
        model, "get_input_embeddings"
    ):
        inner = next(
            (parts[name] for name in WRAPPERS if name in parts), None
        )  # compiled twice, it is no module any more
        if inner is None:
            raise ValueError(
                f"a {type(model).__name__} is no Hugging Face language model, nor a wrapper"
                " around one"
            )
        model = inner
    return model


def unwrapped(model: nn.Module) -> nn.Module:
    """``without_wrappers``; raises ``ValueError`` also for a model whose matrices an adapter adds
    to.
    """
    model = without_wrappers(model)
    if any(type(module).__module__.startswith("peft.") for module in model.modules()):
        raise ValueError(
            "the model carries a PEFT adapter, so its matrices are not all that it computes: merge"
            " it first, by model.merge_and_unload(); an adapter that cannot be merged has no units"
            " to look at"
        )
    return model


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside the block nothing is dropped out, whatever mode the model or a part of it is in;
    afterwards it is as it was.
    """
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
