"""Change what units do: switch them off or multiply them for a while, or take them out for good.

Knows models and sets of units; a plain ``{kind: tensor}`` will do for one. Does not know where a
set comes from or what is measured under it.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from ssah_utils import experts, models, placement, quantised, wrappers


@contextmanager
def ablated(
    model: nn.Module, units: Mapping[str, Tensor], means: Mapping[str, Tensor] | None = None
) -> Iterator[nn.Module]:
    """Hold the given units at zero, or at ``means`` where given, inside the ``with`` block.

    Works on the input of o_proj / down_proj, so no weight is touched and leaving the block restores
    the model exactly. Yields the model that was given, in its wrappers; compiled parts run
    uncompiled meanwhile. ``units``, ``means``: (n_layers, n_channels) of every kind. Raises
    ``ValueError`` when their shape is not the model's, and at the end when the model ran past some
    of them, ``TypeError`` when ``units`` is no set.

        with ablated(model, partition.units("safety")):
            answers = evaluation.generate(model, tokenizer, prompts, max_new_tokens=24)
    """
    units = models.check_per_unit(model, units).as_set()
    if means is not None:
        means = models.check_per_unit(model, means)

    def held(writer: models.Writer) -> "Held | None":
        kind, where = writer.kind, (writer.layer, writer.channels)
        channels = units[kind][where].nonzero().squeeze(1).cpu()
        if not len(channels):
            return None
        return Held(channels, means[kind][where].cpu()[channels] if means else None)

    with _changed(model, held, "switched off") as placed:
        n_held = sum(len(hook.channels) for hook in placed)
        assert n_held == units.count(), f"{n_held} units held, {units.count()} expected"
        yield model


@contextmanager
def multiplied(model: nn.Module, units: Mapping[str, Tensor], factor: float) -> Iterator[nn.Module]:
    """Multiply the activations of the given units by ``factor`` inside the ``with`` block.

    0 switches them off, as ``ablated`` does; a negative factor turns around what they write, as
    those do who suppress single neurons (Kazemi et al., arXiv 2605.08513). Places, errors and what
    is restored are those of ``ablated``.
    """
    units = models.check_per_unit(model, units).as_set()
    ones = units.map(lambda chosen: torch.ones(chosen.shape))
    with gated(model, ones.where(~units, float(factor))):
        yield model


@contextmanager
def gated(model: nn.Module, gates: Mapping[str, Tensor]) -> Iterator[nn.Module]:
    """Multiply every unit's activation by its gate inside the ``with`` block.

    ``gates``: (n_layers, n_channels) of every kind; 1 leaves a unit as it is, 0 switches it off.
    They may require gradients, which then flow into them: the derivative of a loss by a gate at 1
    is what the unit does to it, to first order. Modules whose gates are all 1 are left alone,
    unless a gradient is asked for. Raises what ``ablated`` raises.
    """
    gates = models.check_per_unit(model, gates)

    def gate(writer: models.Writer) -> "Gate | None":
        own = gates[writer.kind][writer.layer, writer.channels]
        return Gate(own) if own.requires_grad or bool((own != 1).any()) else None

    with _changed(model, gate, "multiplied"):
        yield model


@contextmanager
def _changed(
    model: nn.Module, hook_of: Callable[[models.Writer], "Held | Gate | None"], done: str
) -> Iterator[list]:
    """Inside the block the inputs of writers go through ``hook_of`` them; yields these hooks.

    ``ValueError`` at the end where the model ran past some of them, but not past all.
    """
    placed = []
    with models.hooking() as handles:
        for writer in models.writers(model):
            if (hook := hook_of(writer)) is not None:
                handles.append(writer.module.register_forward_pre_hook(hook))
                placed.append((writer, hook))
        yield [hook for _, hook in placed]
    unseen = [writer for writer, hook in placed if not hook.is_passed]
    if unseen and len(unseen) < len(placed):
        raise ValueError(
            f"the {unseen[0].kind} units of block {unseen[0].layer} were not {done}: they are"
            " computed by another way, such as a kernel from the hub; load the model without it"
        )


class Held:
    """A hook that holds channels of a writer's input at given values, or at zero.

    ``channels``: (n,) int64; ``fill``: (n,). ``values``: by these, ``fingerprint`` tells the model
    from the intact one.
    """

    def __init__(self, channels: Tensor, fill: Tensor | None = None) -> None:
        self.channels = channels
        self.fill = torch.zeros(len(channels)) if fill is None else fill
        self.is_passed = False  # whether anything has gone through it
        self.placed: dict[torch.device, tuple[Tensor, Tensor]] = {}  # one copy for every device

    @property
    def values(self) -> tuple[Tensor, ...]:
        return self.channels, self.fill

    def __call__(self, module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        self.is_passed = True
        values, device = args[0].clone(), args[0].device
        if device not in self.placed:
            self.placed[device] = (self.channels.to(device), self.fill.to(device))
        channels, fill = self.placed[device]
        values[..., channels] = fill.to(values.dtype)
        return (values, *args[1:])


class Gate:
    """A hook that multiplies the channels of a writer's input, each by its own factor.

    ``factors``: (n_channels,). ``values``: as those of ``Held``.
    """

    def __init__(self, factors: Tensor) -> None:
        self.factors = factors
        self.is_passed = False

    @property
    def values(self) -> tuple[Tensor, ...]:
        return (self.factors.detach(),)

    def __call__(self, module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        self.is_passed = True
        return (args[0] * self.factors.to(args[0].device, args[0].dtype), *args[1:])


def without_units(
    model: nn.Module, units: Mapping[str, Tensor], means: Mapping[str, Tensor] | None = None
) -> nn.Module:
    """A smaller copy of the model, without the units' weights, that computes what ``ablated`` does.

    Writer columns are dropped, and reader rows whose channels are all dropped. A mean becomes a
    bias of the writer, or of the experts. ``ValueError`` for a quantised model, whose columns share
    codes and scales, and for one that a device map keeps in several places.
    """
    model = wrappers.unwrapped(model)
    placement.refuse_dispatched(model, "units are taken out of matrices")
    for name, module in quantised.quantised_modules(model):
        raise ValueError(
            f"'{name}' is a {type(module).__name__}: units cannot be taken out of quantised"
            f" matrices; switch them off by ablated(), or {quantised.DEQUANTISE}"
        )
    shape, units = models.shape_of(model), models.check_per_unit(model, units).as_set()
    if means is None:
        means = units.map(torch.Tensor.double) * 0
    means = models.check_per_unit(model, means)
    small = copy.deepcopy(model)
    architecture = models.architecture_of(model)
    # all of them first: a smaller model has no shape that its configuration explains
    writers = models.writers(small)
    for number, writer in enumerate(writers):
        where = (writer.layer, writer.channels)
        dropped, mean = (values[writer.kind][where].cpu() for values in (units, means))
        if not dropped.any():
            continue
        if isinstance(writer.module, experts.ExpertsWriter):
            experts.remove_units(writer.module.experts, dropped, mean)
            continue
        if isinstance(writer.module, experts.GatedWriter):
            # a bias would be gated, too
            columns = writer.module.weight.detach()[:, dropped]
            others = cast("experts.ExpertsWriter", writers[number - 1].module)
            experts.add_constant(others.experts, columns @ mean[dropped].to(columns))
            mean = torch.zeros_like(mean)
        block, path = writer.block, architecture.writers[writer.kind]
        _replace(block, path, SmallWriter(block.get_submodule(path), ~dropped, mean))
        rows_of: dict[str, Tensor] = {}  # that are not needed any more, by the matrix
        for reader in architecture.readers[writer.kind]:
            n_rows = len(models.column_weight(block.get_submodule(reader.path)))
            unneeded = models.owned_rows(reader.rows(shape), dropped, n_rows)
            rows_of[reader.path] = rows_of.get(reader.path, False) | unneeded
        for path, unneeded in rows_of.items():
            _replace(block, path, SmallReader(block.get_submodule(path), ~unneeded))
    return small


class SmallWriter(nn.Module):
    """A linear map of the kept channels alone.

    y = W[:, kept] x[kept] + W[:, dropped] mean[dropped] + b.
    """

    kept: Tensor

    def __init__(self, old: nn.Module, kept: Tensor, mean: Tensor) -> None:
        super().__init__()
        weight = models.column_weight(old).detach()
        bias = (mean * ~kept).to(weight) @ weight.T
        if (old_bias := getattr(old, "bias", None)) is not None:
            bias = bias + old_bias.detach()
        self.weight = nn.Parameter(weight[:, kept].clone())
        self.bias = nn.Parameter(bias)
        self.register_buffer("kept", kept.nonzero().squeeze(1).to(weight.device), persistent=False)

    def forward(self, values: Tensor) -> Tensor:
        return nn.functional.linear(values.index_select(-1, self.kept), self.weight, self.bias)


class SmallReader(nn.Module):
    """A linear map without its unneeded output rows.

    They read as zero, so the block's shapes stay as they are.
    """

    kept: Tensor

    def __init__(self, old: nn.Module, kept: Tensor) -> None:
        super().__init__()
        weight = models.column_weight(old).detach()
        self.n_rows = len(weight)
        self.weight = nn.Parameter(weight[kept].clone())
        bias = getattr(old, "bias", None)
        self.bias = None if bias is None else nn.Parameter(bias.detach()[kept].clone())
        self.register_buffer("kept", kept.nonzero().squeeze(1).to(weight.device), persistent=False)

    def forward(self, values: Tensor) -> Tensor:
        rows = nn.functional.linear(values, self.weight, self.bias)
        return rows.new_zeros(*rows.shape[:-1], self.n_rows).index_copy_(-1, self.kept, rows)


def _replace(block: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(block.get_submodule(parent), name, module)
