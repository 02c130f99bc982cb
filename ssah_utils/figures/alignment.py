"""Figures of 01_alignment. Knows tables only."""

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from ssah_utils.figures.style import (
    MODEL_COLOURS,
    SET_NAMES,
    Tables,
    headline,
    legend_below,
    stacked_verdicts,
    verdict_shares,
)


def alignment_verdicts(tables: Tables) -> Figure:
    """Verdicts of every model on every set of held-out requests."""
    shares = verdict_shares(tables["rates"], ["set", "model"])
    sets = [name for name in SET_NAMES if name in shares.index.get_level_values(0)]
    size = (2.1 * len(sets), 1.9)
    figure, axes = plt.subplots(1, len(sets), figsize=size, sharey=True, squeeze=False)
    for ax, name in zip(axes[0], sets, strict=True):
        part = shares.loc[name]
        stacked_verdicts(ax, list(part.index), part)
        ax.set_title(SET_NAMES[name])
    handles, _ = axes[0][0].get_legend_handles_labels()
    legend_below(figure, handles, ncols=3)
    headline(figure, "Alignment turns compliance with harm into refusal")
    return figure


def training_loss(tables: Tables) -> Figure:
    """Loss per step, raw and smoothed."""
    figure, ax = plt.subplots(figsize=(4.2, 2.2))
    for model, part in tables["training"].groupby("model", sort=False):
        colour, smoothed = MODEL_COLOURS[model], part["loss"].rolling(10, min_periods=1).mean()
        ax.plot(part["step"], part["loss"], color=colour, alpha=0.25, lw=0.8)
        ax.plot(part["step"], smoothed, color=colour, label=model)
    ax.set(xlabel="optimizer step", ylabel="loss per response token (nats)")
    ax.set_title("Both models train the same number of steps")
    ax.legend()
    return figure
