"""Train some units of fused experts: the trained entries of a parameter become a small one.

Whatever function of transformers runs the experts goes on doing so: it finds whole parameters, put
together for one pass. Knows fused experts. Does not know architectures.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ssah_utils import partial_parameters, shards
from ssah_utils.experts import chosen_entries, layout
from ssah_utils.partial_parameters import Partial


class PartialExperts(Partial):
    """What fused experts are as well while some of their units are trained.

    Their parameters are put together once for each pass, not once for each expert. What autograd
    keeps of them for the way back would be a second copy of all experts of the model, so their
    memory is given back between the two passes and filled again on the way back.
    """

    def whole(self, name: str) -> Tensor:
        of_this_pass = self.__dict__.get("wholes", {})
        return of_this_pass[name] if name in of_this_pass else super().whole(name)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        parts = self.parts()
        wholes = {name: part() for name, part in parts.items()}
        self.__dict__["wholes"] = wholes
        try:
            output = super().forward(*args, **kwargs)
        finally:
            del self.__dict__["wholes"]
        if output.requires_grad and not _is_kept_by_others():
            for name, part in parts.items():
                _put_off(wholes[name], part, output)
        return output


def _is_kept_by_others() -> bool:
    """Whether a compiler, a checkpoint or an offloader decides what is kept for the way back.

    A checkpoint computes anew what it did not keep, and nobody then waits for the output's
    gradient.
    """
    if torch.compiler.is_compiling():
        return True
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def _put_off(whole: Tensor, part: partial_parameters.PartialParameter, output: Tensor) -> None:
    """Give back the memory of a whole parameter until ``output``'s gradient is there."""
    storage, dtype = whole.untyped_storage(), whole.dtype
    n_bytes, values = storage.nbytes(), whole.detach().data  # of which autograd counts no version

    def fill(gradient: Tensor) -> None:
        storage.resize_(n_bytes)
        values.copy_(part.whole_of(part.rows(*part.here(), dtype)))

    def free(gradient: Tensor | None = None) -> None:
        storage.resize_(0)

    output.register_hook(fill)
    whole.register_hook(free)  # all that use it are through
    free()


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


def cut_experts(experts: nn.Module, units: Tensor, lists: shards.Lists) -> None:
    """Make the entries of some units, (n_experts * d_expert,) bool, all that is trained of theirs.

    What belongs to no unit, the biases of the down projections, is left as it is.
    """
    cuts = {}
    for name, (dimension, chosen) in chosen_entries(experts, units).items():
        parameter = getattr(experts, name)
        # All of a float32 parameter needs no block. In a lower precision, only a block keeps small
        # updates.
        if not units.any() or (units.all() and parameter.dtype == torch.float32):
            parameter.requires_grad_(bool(units.any()))
        else:
            cuts[name] = (dimension, chosen)
    if cuts:
        partial_parameters.cut(experts, PartialExperts, cuts, lists)
