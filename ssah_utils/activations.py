"""One pass over a model: streaming moments of every channel, or the residual stream at one position.

Activations are reduced where they appear and never kept. Knows models and token batches. Does not know prompts or scores.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ssah_utils import models

Batch = dict[str, Tensor]  # input_ids, attention_mask: (B, T) int64; positions: (B, T) bool


@dataclass(frozen=True)
class ChannelMoments:
    """Mean and unbiased variance of every writer-input channel: ``{kind: (n_layers, n_channels) float64}``."""

    count: int
    mean: dict[str, Tensor]
    variance: dict[str, Tensor]


def merged(a: ChannelMoments, b: ChannelMoments) -> ChannelMoments:
    """Moments of two disjoint data sets together, exactly as if they had been one."""
    count = a.count + b.count
    mean, variance = {}, {}
    for kind in a.mean:
        delta = b.mean[kind] - a.mean[kind]
        mean[kind] = a.mean[kind] + delta * (b.count / count)
        m2 = a.variance[kind] * (a.count - 1) + b.variance[kind] * (b.count - 1) + delta**2 * (a.count * b.count / count)
        variance[kind] = m2 / (count - 1)
    return ChannelMoments(count, mean, variance)


class StreamingMoments:
    """Moments of one module's channels, merged batch by batch (Chan, Golub & LeVeque 1979) in float64.

    Within a batch, values are centred on a float32 shift before they are squared: the subtraction of two float32 numbers
    is exact to one rounding, so no precision is lost even where the mean is far larger than the spread.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = self.m2 = self.shift = torch.zeros(())

    def update(self, values: Tensor) -> None:
        """``values``: (n, n_channels), any floating dtype."""
        n = values.shape[0]
        if n == 0:
            return
        values = values.float()
        if self.count == 0:
            self.shift = values.mean(0)
            self.mean = self.m2 = torch.zeros_like(self.shift, dtype=torch.float64)
        centred = values - self.shift
        shifted_mean = centred.sum(0).double() / n
        m2 = centred.square_().sum(0).double() - n * shifted_mean**2
        delta = self.shift.double() + shifted_mean - self.mean
        total = self.count + n
        self.m2 = self.m2 + m2 + delta**2 * (self.count * n / total)
        self.mean = self.mean + delta * (n / total)
        self.count = total

    @property
    def variance(self) -> Tensor:
        return self.m2 / (self.count - 1)


@torch.inference_mode()
def channel_moments(model: nn.Module, batches: Iterable[Batch]) -> ChannelMoments:
    """Moments of every unit's activation over the positions marked in ``batches``.

    Runs the backbone only: the language-model head would cost a quarter more and is not looked at.
    Raises ``ValueError`` when fewer than two positions are marked.
    """
    backbone = models.backbone_of(model)
    device = next(model.parameters()).device
    streams = {kind: [StreamingMoments() for _ in models.blocks_of(model)] for kind in models.KINDS}
    selected: Tensor  # flat indices of the marked positions of the batch at hand

    def observe(stream: StreamingMoments):
        def hook(module: nn.Module, args: tuple[Tensor]) -> None:
            stream.update(args[0].flatten(0, 1).index_select(0, selected))

        return hook

    handles = [
        module.register_forward_pre_hook(observe(stream))
        for kind in models.KINDS
        for module, stream in zip(models.writers(model, kind), streams[kind], strict=True)
    ]
    try:
        for batch in batches:
            selected = batch["positions"].flatten().nonzero().squeeze(1).to(device)
            backbone(
                input_ids=batch["input_ids"].to(device), attention_mask=batch["attention_mask"].to(device), use_cache=False
            )
    finally:
        for handle in handles:
            handle.remove()
    count = streams["mlp"][0].count
    if count < 2:
        raise ValueError(f"a variance needs at least 2 positions; the batches mark {count}")
    return ChannelMoments(
        count=count,
        mean={kind: torch.stack([s.mean for s in streams[kind]]).cpu() for kind in streams},
        variance={kind: torch.stack([s.variance for s in streams[kind]]).cpu() for kind in streams},
    )


@torch.inference_mode()
def last_token_states(model: nn.Module, batches: Iterable[Batch]) -> Tensor:
    """Residual stream after every block at each sequence's last token: (n_sequences, n_layers, d_model) float32."""
    backbone = models.backbone_of(model)
    device = next(model.parameters()).device
    states: list[Tensor] = []
    last: Tensor

    def keep_last(module: nn.Module, args: tuple, output: Tensor | tuple) -> None:
        hidden = output[0] if isinstance(output, tuple) else output  # (B, T, d_model)
        per_block.append(hidden[torch.arange(len(hidden), device=device), last].float().cpu())

    handles = [block.register_forward_hook(keep_last) for block in models.blocks_of(model)]
    try:
        for batch in batches:
            per_block: list[Tensor] = []
            mask = batch["attention_mask"].to(device)
            last = mask.cumsum(1).argmax(1)  # (B,) index of the last attended token, whatever the padding side
            backbone(input_ids=batch["input_ids"].to(device), attention_mask=mask, use_cache=False)
            states.append(torch.stack(per_block, 1))
    finally:
        for handle in handles:
            handle.remove()
    return torch.cat(states)
