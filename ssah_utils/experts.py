"""Fused experts: the units of a mixture of experts, which no module computes on its own.

In transformers 5 the experts of a block are three-dimensional parameters of one module, and one
function, which the configuration chooses, runs them all. So hooks on modules see no unit. While a
hook is on an ``ExpertsWriter``, a function of our own runs that block's experts in two steps: first
the activations of all units, then their products with the columns. Between the two stands a module
through which the activations pass; there hooks see and change them.

Does not know architectures, beyond the names that transformers gives to the parameters of all fused
experts.
"""

import copy
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import sigmoid
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from ssah_utils import placement

HERE = "unit_values"  # name of the module through which activations pass
Hook = Callable[[nn.Module, tuple[Tensor]], tuple[Tensor, ...] | None]


class HookedWriter:
    """A writer of which no module's input holds what is written.

    Hooks can be put on it as on a linear map. While there is one, the activations pass through a
    module named ``HERE`` of ``owner``; with the last one that module goes, and all is as before.
    """

    owner: nn.Module
    out_features: int  # d_model
    in_features: int  # n_channels
    weight: Tensor  # (d_model, n_channels)

    def register_forward_pre_hook(self, hook: Hook) -> "HookHandle":
        """``hook(module, (values,))`` sees (..., n_channels) and may give others, as a tuple."""
        if not hasattr(self.owner, HERE):
            self.owner.add_module(HERE, nn.Identity())
            self._open(self.owner.get_submodule(HERE))
        return HookHandle(self, self.owner.get_submodule(HERE), hook)

    def _open(self, here: nn.Module) -> None:
        """Let the activations pass through ``here``."""
        raise NotImplementedError

    def _close(self, here: nn.Module) -> None:
        """Undo ``_open``."""
        raise NotImplementedError


class HookHandle:
    """What takes a hook off a ``HookedWriter`` again."""

    def __init__(self, writer: HookedWriter, here: nn.Module, hook: Hook) -> None:
        self.writer, self.here = writer, here
        self.handle = here.register_forward_pre_hook(hook)

    def remove(self) -> None:
        """Take the hook off; a second time does nothing."""
        self.handle.remove()
        is_open = getattr(self.writer.owner, HERE, None) is self.here
        if is_open and not self.here._forward_pre_hooks:
            delattr(self.writer.owner, HERE)
            self.writer._close(self.here)


class ExpertsWriter(HookedWriter):
    """The down projections of all experts of a block, as one linear map without bias.

    Its input is (tokens, n_experts * d_expert), expert by expert: routing weight times activation,
    and zero where the router did not choose the expert. So a unit's input times its column is what
    it adds to the residual stream. The experts' biases belong to no unit. Raises ``ValueError`` for
    a module that is no fused experts, and for one that normalises what each expert gives.
    """

    def __init__(self, experts: nn.Module, name: str = "") -> None:
        what = f"'{name}', a {type(experts).__name__},"
        if not is_fused(experts):
            raise ValueError(
                f"{what} is not fused experts in floating point, as transformers runs them by"
                " a function of ALL_EXPERTS_FUNCTIONS: its units cannot be seen"
            )
        if experts.has_post_expert_norm:
            raise ValueError(
                f"{what} normalises what each expert gives, so what one unit adds depends on the"
                " others: not supported"
            )
        self.owner = self.experts = experts

    @property
    def n_experts(self) -> int:
        return self.experts.num_experts

    @property
    def d_expert(self) -> int:
        """Units of one expert."""
        return self.experts.down_proj.shape[1 if self.experts.is_transposed else 2]

    @property
    def out_features(self) -> int:
        return self.experts.down_proj.shape[2 if self.experts.is_transposed else 1]

    @property
    def in_features(self) -> int:
        return self.n_experts * self.d_expert

    @property
    def weight(self) -> Tensor:
        """All columns side by side: (d_model, n_experts * d_expert), a copy."""
        whole = placement.value_of(self.experts, "down_proj")
        return whole.flatten(0, 1).T if self.experts.is_transposed else _side_by_side(whole)

    def _open(self, here: nn.Module) -> None:
        here.config = self.experts.config
        _run_by(self.experts, _through_units)

    def _close(self, here: nn.Module) -> None:
        self.experts.config = here.config


class GatedWriter(HookedWriter):
    """The down projection of a shared expert whose output is multiplied by the sigmoid of a gate.

    Its input is gate times activation, as that is what enters the write to the residual stream.
    While there is a hook, the gate acts before the product instead of after it. ``shared``: the
    shared expert; ``linear``: its down projection; ``gate``: d_model -> 1, called by others with
    what ``shared`` is called with.
    """

    def __init__(self, linear: nn.Module, shared: nn.Module, gate: nn.Module) -> None:
        self.linear, self.owner, self.gate = linear, shared, gate

    @property
    def out_features(self) -> int:
        return self.linear.out_features

    @property
    def in_features(self) -> int:
        return self.linear.in_features

    @property
    def weight(self) -> Tensor:
        return placement.value_of(self.linear, "weight")

    # Methods and not closures, as a copy of the model then has hooks that refer to the copy.

    def _ask_gate(self, module: nn.Module, args: tuple) -> None:
        self.gates = sigmoid(self.gate.forward(args[0]))

    def _act_before(self, module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        return (self.owner.get_submodule(HERE)(args[0] * self.gates),)

    def _open_wide(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return torch.full_like(output, torch.inf)  # of which the sigmoid is one

    def _open(self, here: nn.Module) -> None:
        here.handles = [
            self.owner.register_forward_pre_hook(self._ask_gate),
            self.linear.register_forward_pre_hook(self._act_before),
            self.gate.register_forward_hook(self._open_wide),
        ]

    def _close(self, here: nn.Module) -> None:
        for handle in here.handles:
            handle.remove()


# ------------------------------------------------------------------------------------------- layout


def is_fused(module: nn.Module) -> bool:
    """Whether a module is experts that transformers runs by one function of its interface."""
    weight = getattr(module, "down_proj", None)
    is_matrices = isinstance(weight, Tensor) and weight.ndim == 3 and weight.is_floating_point()
    return is_matrices and weight.element_size() > 1 and hasattr(module, "has_post_expert_norm")


def layout(experts: nn.Module) -> list[tuple[str, int, Tensor]]:
    """What the units of fused experts own, parameter by parameter.

    The parameter's name; its dimension of rows or columns, after that of experts; and which of
    these each channel owns: (n, d_expert) int64.
    """
    is_transposed, width = experts.is_transposed, ExpertsWriter(experts).d_expert
    channel = torch.arange(width)
    if not experts.has_gate:
        name, rows = "up_proj", channel[None]
    elif experts.is_concatenated:
        name, rows = "gate_up_proj", torch.stack([channel, width + channel])
    else:
        name, rows = "gate_up_proj", torch.stack([2 * channel, 2 * channel + 1])
    found = [
        ("down_proj", 1 if is_transposed else 2, channel[None]),
        (name, 2 if is_transposed else 1, rows),
    ]
    return [*found, (f"{name}_bias", 1, rows)] if experts.has_bias else found


def chosen_entries(experts: nn.Module, units: Tensor) -> dict[str, tuple[int, Tensor]]:
    """The entries of each parameter that belong to a set of units, (n_experts * d_expert,) bool.

    ``{name: (dimension, chosen)}``, where ``chosen`` is (n_experts, size of that dimension) bool.
    """
    found, units = {}, units.cpu().view(experts.num_experts, -1)
    for name, dimension, rows in layout(experts):
        n_rows = getattr(experts, name).shape[dimension]
        chosen = torch.zeros(len(units), n_rows, dtype=torch.bool)
        chosen[:, rows] = units[:, None].expand(-1, len(rows), -1)
        found[name] = (dimension, chosen)
    return found


def _side_by_side(matrices: Tensor) -> Tensor:
    """(n_experts, d_model, d_expert) -> (d_model, n_experts * d_expert)."""
    return matrices.permute(1, 0, 2).flatten(1)


# ------------------------------------------------------------------------------------------ running


def _run_by(experts: nn.Module, function: Callable[..., Tensor]) -> None:
    """Let a function run these experts, whatever runs the others of the model."""
    config = copy.copy(experts.config)
    # the public setter would reach into configurations that are not copied
    config._experts_implementation_internal = function.__name__
    experts.config = config


def _routed(
    experts: nn.Module, hidden: Tensor, chosen: Tensor, weights: Tensor
) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """Every expert that some token goes to: its number, these tokens, weights, activations.

    ``hidden``: (tokens, d_model); ``chosen``, ``weights``: (tokens, n_chosen). Of n tokens, weights
    are (n, 1), activations (n, d_expert).
    """
    for expert in chosen.unique().tolist():
        if expert >= experts.num_experts:  # tokens of which another process takes care
            continue
        tokens, choice = torch.where(chosen == expert)
        if experts.has_gate:
            rows = _product(experts, "gate_up_proj", expert, hidden[tokens])
            activations = experts._apply_gate(rows)
        else:
            activations = experts.act_fn(_product(experts, "up_proj", expert, hidden[tokens]))
        yield expert, tokens, weights[tokens, choice, None], activations


def _product(experts: nn.Module, name: str, expert: int, values: Tensor) -> Tensor:
    """One expert's linear map, with its bias: (n, in) -> (n, out)."""
    weight = getattr(experts, name)[expert]
    result = values @ (weight if experts.is_transposed else weight.T)
    return result + getattr(experts, f"{name}_bias")[expert] if experts.has_bias else result


def _through_units(experts: nn.Module, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """What all experts write, (tokens, d_model), by way of the activations of all their units."""
    sizes = (experts.num_experts, ExpertsWriter(experts).d_expert)
    values = hidden.new_zeros(len(hidden), *sizes)
    shares = hidden.new_zeros(len(hidden), experts.num_experts)
    places, parts, own_weights = [], [], []
    for expert, tokens, weight, activations in _routed(experts, hidden, chosen, weights):
        places.append(torch.stack([tokens, torch.full_like(tokens, expert)]))
        parts.append((weight * activations).to(values.dtype))
        own_weights.append(weight[:, 0].to(shares.dtype))
    if places:
        where = tuple(torch.cat(places, 1))
        values = values.index_put(where, torch.cat(parts))
        shares = shares.index_put(where, torch.cat(own_weights))
    values = getattr(experts, HERE)(values.flatten(1)).unflatten(1, sizes)
    if experts.has_bias:
        output = (shares @ experts.down_proj_bias).to(hidden.dtype)
    else:
        output = torch.zeros_like(hidden)
    for matrix, own in zip(experts.down_proj, values.unbind(1), strict=True):
        # a token that does not go to an expert has a value there only where a hook put one
        tokens = own.any(1).nonzero().squeeze(1)
        columns = matrix if experts.is_transposed else matrix.T
        output.index_add_(0, tokens, (own[tokens] @ columns).to(output.dtype))
    return output


# ------------------------------------------------------------------------------------------ removal


def remove_units(experts: nn.Module, dropped: Tensor, mean: Tensor) -> None:
    """Take units out of fused experts, in place.

    ``dropped``: (n_experts * d_expert,) bool; ``mean``: the value at which each is held. Each
    parameter becomes a list of one matrix an expert, as these may differ in size from now on; what
    the means add becomes one vector, ``constant``.
    """
    weight = ExpertsWriter(experts).weight.detach()
    constant = weight @ (mean * dropped).to(weight)
    for name, (dimension, chosen) in chosen_entries(experts, ~dropped).items():
        whole = getattr(experts, name).detach()
        matrices = [
            nn.Parameter(own.index_select(dimension - 1, rows.nonzero().squeeze(1).to(own.device)))
            for own, rows in zip(whole, chosen, strict=True)
        ]
        delattr(experts, name)
        setattr(experts, name, nn.ParameterList(matrices))
    experts.constant = nn.Parameter(constant)
    _run_by(experts, _one_by_one)


def add_constant(experts: nn.Module, constant: Tensor) -> None:
    """Let fused experts write a constant, (d_model,), for every token as well."""
    if not hasattr(experts, "constant"):
        nothing = torch.zeros(ExpertsWriter(experts).in_features)
        remove_units(experts, nothing.bool(), nothing)
    experts.constant.data += constant


def _one_by_one(experts: nn.Module, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """What all experts write, expert by expert, after ``remove_units``: (tokens, d_model)."""
    output = experts.constant.to(hidden.dtype).expand_as(hidden).clone()
    for expert, tokens, weight, activations in _routed(experts, hidden, chosen, weights):
        written = weight * _product(experts, "down_proj", expert, activations)
        output.index_add_(0, tokens, written.to(output.dtype))
    return output


for _function in (_through_units, _one_by_one):
    ALL_EXPERTS_FUNCTIONS.register(f"{_function.__name__}", _function)
