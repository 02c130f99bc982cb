"""One pass over a model: streaming moments of every channel, or the residual stream at positions.

Activations are reduced where they appear and never kept. Does not know prompts or scores.
"""

import functools
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ssah_utils import models, placement, weights, wrappers
from ssah_utils.per_unit import PerUnit

Batch = dict[str, Tensor]  # input_ids, attention_mask: (B, T) int64; positions: (B, T) bool


@dataclass(frozen=True)
class ChannelMoments:
    """Mean and unbiased variance of every writer-input channel over ``count`` positions.

    Both in float64.
    """

    count: int
    mean: PerUnit
    variance: PerUnit

    @property
    def mean_square(self) -> PerUnit:
        """Mean of the squared activation, not centred."""
        return self.variance * ((self.count - 1) / self.count) + self.mean.map(torch.square)


def merged(a: ChannelMoments, b: ChannelMoments) -> ChannelMoments:
    """Moments of two disjoint data sets together, exactly as if they had been one."""
    count = a.count + b.count
    delta = b.mean - a.mean
    between = delta.map(torch.square) * (a.count * b.count / count)
    m2 = a.variance * (a.count - 1) + b.variance * (b.count - 1) + between
    return ChannelMoments(count, a.mean + delta * (b.count / count), m2 / (count - 1))


def pooled(parts: Iterable[ChannelMoments]) -> ChannelMoments:
    """``merged`` over any number of disjoint data sets."""
    return functools.reduce(merged, parts)


class StreamingMoments:
    """Moments of one module's channels, merged batch by batch in float64.

    After Chan, Golub & LeVeque (1979). Within a batch, values are centred on the batch's own
    float32 mean before they are squared. The difference of two float32 numbers is exact to one
    rounding, so no precision is lost even where the mean is far larger than the spread, or where
    batches lie far apart.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = self.m2 = torch.zeros((), dtype=torch.float64)

    def update(self, values: Tensor) -> None:
        """``values``: (n, n_channels), any floating dtype."""
        n = values.shape[0]
        if n == 0:
            return
        values = values.float()
        shift = values.mean(0)
        if self.count == 0:
            self.mean = self.m2 = torch.zeros_like(shift, dtype=torch.float64)
        centred = values - shift
        shifted_mean = centred.sum(0).double() / n
        m2 = centred.square_().sum(0).double() - n * shifted_mean**2
        delta = shift.double() + shifted_mean - self.mean
        total = self.count + n
        self.m2 = self.m2 + m2 + delta**2 * (self.count * n / total)
        self.mean = self.mean + delta * (n / total)
        self.count = total

    @property
    def variance(self) -> Tensor:
        return self.m2 / (self.count - 1)


def inputs_of(backbone: nn.Module, batch: Batch, device: torch.device) -> dict:
    """Arguments of a backbone for one batch.

    Positions count attended tokens only: by default, models with learned positions would count left
    padding, too.
    """
    mask = batch["attention_mask"].to(device)
    ids = batch["input_ids"].to(device)
    inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    if "position_ids" in inspect.signature(backbone.forward).parameters:
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)
    return inputs


def _marked(batch: Batch, device: torch.device) -> Tensor:
    """Flat indices of a batch's marked positions: (n_marked,)."""
    return batch["positions"].flatten().nonzero().squeeze(1).to(device)


@torch.inference_mode()
def channel_moments(model: nn.Module, batches: Iterable[Batch]) -> ChannelMoments:
    """Moments of every unit's activation over the positions marked in ``batches``.

    Runs the backbone only: the language-model head would cost a quarter more and is not looked at.
    A batch is cut after its last marked position: in a causal model, earlier activations do not
    depend on later tokens. Raises ``ValueError`` when fewer than two positions are marked, or where
    an activation is nan or infinite: it names the first module.
    """
    model = weights.gathered(model)
    backbone = models.backbone_of(model)
    device = placement.input_device(model)
    writers = models.writers(model)
    streams = [StreamingMoments() for _ in writers]
    selected: Tensor  # flat indices of the marked positions of the batch at hand

    def observe(stream: StreamingMoments):
        def hook(module: nn.Module, args: tuple[Tensor]) -> None:
            stream.update(args[0].flatten(0, -2).index_select(0, selected.to(args[0].device)))

        return hook

    with wrappers.evaluating(model), models.hooking() as handles:
        for writer, stream in zip(writers, streams, strict=True):
            handles.append(writer.module.register_forward_pre_hook(observe(stream)))
        for batch in batches:
            columns = batch["positions"].any(0).nonzero()
            if not len(columns):
                continue
            width = int(columns.max()) + 1
            names = ("input_ids", "attention_mask", "positions")
            batch = {name: batch[name][:, :width] for name in names}
            selected = _marked(batch, device)
            backbone(**inputs_of(backbone, batch, device))
    count = streams[0].count
    if count < 2:
        raise ValueError(f"a variance needs at least 2 positions; the batches mark {count}")
    for writer, stream in zip(writers, streams, strict=True):
        if stream.count != count:
            raise ValueError(
                f"of {count} positions, {stream.count} were seen at the {writer.kind} units of"
                f" block {writer.layer}: something computes them by another way, such as a kernel"
                " from the hub; load the model without it"
            )
    means = [stream.mean for stream in streams]
    variances = [stream.variance for stream in streams]
    of_units = lambda rows: models.per_unit_of(zip(writers, rows, strict=True))  # noqa: E731
    mean = of_units(means).require_finite("activations")
    return ChannelMoments(count, mean, of_units(variances).require_finite("variances"))


@torch.inference_mode()
def mean_squared_changes(model: nn.Module, other: nn.Module, batches: Iterable[Batch]) -> PerUnit:
    """Mean over the marked positions of (x_j - x'_j)^2, of every unit in two models; float64.

    Its root is the change score of Chen et al. (arXiv 2406.14144): how far alignment has moved a
    neuron's activation on the same texts. ``other`` has the shape of ``model``; ``ValueError``
    where it has not, where no position is marked, or where a change is not finite.
    """
    both = [weights.gathered(one) for one in (model, other)]
    shapes = [models.shape_of(one) for one in both]
    if shapes[0] != shapes[1]:
        raise ValueError(f"models of different shapes cannot be compared: {shapes[0]}, {shapes[1]}")
    of_model = [models.writers(one) for one in both]
    totals = [torch.zeros((), dtype=torch.float64)] * len(of_model[0])
    seen: dict[int, Tensor] = {}  # activations of the first model at the marked positions
    selected: Tensor  # flat indices of the marked positions of the batch at hand
    count = 0

    def observe(number: int, is_first: bool):
        def hook(module: nn.Module, args: tuple[Tensor]) -> None:
            values = args[0].flatten(0, -2)
            values = values.index_select(0, selected.to(values.device)).float()
            if is_first:
                seen[number] = values
                return
            squared = (seen.pop(number).to(values.device) - values).square_().sum(0).double()
            totals[number] = totals[number].to(values.device) + squared

        return hook

    with wrappers.evaluating(both[0]), wrappers.evaluating(both[1]), models.hooking() as handles:
        for is_first, writers in zip((True, False), of_model, strict=True):
            for number, writer in enumerate(writers):
                handles.append(writer.module.register_forward_pre_hook(observe(number, is_first)))
        for batch in batches:
            for one in both:
                backbone, device = models.backbone_of(one), placement.input_device(one)
                selected = _marked(batch, device)
                backbone(**inputs_of(backbone, batch, device))
            count += len(selected)
    if not count:
        raise ValueError("the batches mark no position, so nothing can have changed there")
    total = models.per_unit_of(zip(of_model[0], totals, strict=True))
    return total.require_finite("changes") / count


@torch.inference_mode()
def unit_values(model: nn.Module, batch: Batch, kind: str, layer: int, channel: int) -> Tensor:
    """Activation of one unit at every position of a batch: (B, T) float32.

    One unit on one request is what a reader can look at, before moments over all of them.
    """
    model = weights.gathered(model)
    backbone, device = models.backbone_of(model), placement.input_device(model)
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Tensor]) -> None:
        own = args[0][..., channel - writer.channels.start]
        seen.append(own.reshape(batch["input_ids"].shape).float().cpu())  # OPT's has no (B, T)

    with wrappers.evaluating(model), models.hooking() as handles:
        writer = models.writer_of(model, kind, layer, channel)
        handles.append(writer.module.register_forward_pre_hook(keep))
        backbone(**inputs_of(backbone, batch, device))
    return seen[0]


def next_token_nll(plain: nn.Module, batch: Batch, marked: Tensor, tokens: Tensor) -> Tensor:
    """Sum of the negative log-likelihoods of tokens after the marked positions, with its graph.

    ``marked``: (B, T - 1) of bool; ``tokens``: (B, T - 1), what comes next. In nats. The head runs
    at marked positions only. ``plain`` has no wrapper.
    """
    backbone, device = models.backbone_of(plain), placement.input_device(plain)
    hidden = backbone(**inputs_of(backbone, batch, device)).last_hidden_state
    logits = models.logits_of(plain, hidden[:, :-1][marked.to(hidden.device)]).float()
    expected = tokens[marked].to(logits.device)
    return nn.functional.cross_entropy(logits, expected, reduction="sum")


def gradient_activation(model: nn.Module, batches: Iterable[Batch]) -> PerUnit:
    """Mean over the marked positions of |x_j * dL/dx_j| at every writer's input, in float64.

    L is the sum of the negative log-likelihoods of the tokens that the marked positions predict, so
    the product is what holding the channel at zero would do to it, to first order (Molchanov et
    al., ICLR 2017; SNIP, Lee et al., ICLR 2019). Reduced in float32 and summed in float64, whatever
    the model's precision. Parameters get no gradient, which saves half of a backward pass. Raises
    ``ValueError`` when no position is marked, or a gradient is not finite.
    """
    plain = weights.gathered(model)
    device = placement.input_device(plain)
    writers = models.writers(plain)
    totals = [torch.zeros((), dtype=torch.float64)] * len(writers)
    count = 0
    selected: Tensor  # flat indices of the marked positions of the batch at hand

    def observe(number: int):
        def hook(module: nn.Module, args: tuple[Tensor]) -> None:
            values = args[0].detach().flatten(0, -2)

            def add(gradient: Tensor) -> None:
                rows = selected.to(values.device)
                marked_gradient = gradient.flatten(0, -2).index_select(0, rows).float()
                product = marked_gradient * values.index_select(0, rows).float()
                total = totals[number].to(values.device)
                totals[number] = total + product.abs_().sum(0).double()

            args[0].register_hook(add)

        return hook

    with (
        wrappers.evaluating(plain),
        wrappers.without_parameter_gradients(plain),
        models.hooking() as handles,
    ):
        for number, writer in enumerate(writers):
            handles.append(writer.module.register_forward_pre_hook(observe(number)))
        embedding = plain.get_input_embeddings()
        track = lambda module, args, output: output.requires_grad_()  # noqa: E731
        handles.append(embedding.register_forward_hook(track))
        for batch in batches:
            selected = _marked(batch, device)
            if not len(selected):
                continue
            count += len(selected)
            marked, following = batch["positions"][:, :-1], batch["input_ids"][:, 1:]
            with torch.enable_grad():
                next_token_nll(plain, batch, marked, following).backward()
    if not count:
        raise ValueError("the batches mark no position, so there is nothing to take a gradient of")
    total = models.per_unit_of(zip(writers, totals, strict=True))
    return total.require_finite("gradients") / count


def last_token_states(model: nn.Module, batches: Iterable[Batch]) -> Tensor:
    """Residual stream after every block at each sequence's last token, whatever its padding.

    Returns (n_sequences, n_layers, d_model) float32.
    """

    def with_last_marked(batch: Batch) -> Batch:
        mask = batch["attention_mask"]
        last = mask.cumsum(1).argmax(1)  # (B,) index of the last attended token
        return batch | {"positions": nn.functional.one_hot(last, mask.shape[1]).bool()}

    return marked_states(model, map(with_last_marked, batches))


@torch.inference_mode()
def marked_states(
    model: nn.Module,
    batches: Iterable[Batch],
    reduce: Callable[[int, Tensor], Tensor] = lambda layer, states: states,
) -> Tensor:
    """Residual stream after every block at the marked positions, in their order.

    Returns (n_marked, n_layers, d_model) float32. ``reduce(layer, states)`` turns (n, d_model) into
    (n, ...) where the states appear, so that a projection keeps one number of each.
    """
    model = weights.gathered(model)
    backbone, device = models.backbone_of(model), placement.input_device(model)
    collected: list[Tensor] = []
    selected: Tensor  # flat indices of the marked positions of the batch at hand
    per_block: list[Tensor]

    def keep(layer: int):
        def hook(module: nn.Module, args: tuple, output: Tensor | tuple) -> None:
            hidden = output[0] if isinstance(output, tuple) else output  # (B, T, d_model)
            states = hidden.flatten(0, 1).index_select(0, selected.to(hidden.device))
            per_block.append(reduce(layer, states.float().cpu()))

        return hook

    with wrappers.evaluating(model), models.hooking() as handles:
        for layer, block in enumerate(models.blocks_of(model)):
            handles.append(block.register_forward_hook(keep(layer)))
        for batch in batches:
            selected, per_block = _marked(batch, device), []
            backbone(**inputs_of(backbone, batch, device))
            collected.append(torch.stack(per_block, 1))
    return torch.cat(collected)
