"""Figures of 01_alignment. Knows tables only."""

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from ssah_utils.figures.style import (
    MODEL_COLOURS,
    SET_NAMES,
    Tables,
    stacked_verdicts,
    verdict_shares,
)


def alignment_verdicts(tables: Tables) -> Figure:
    """Verdicts of every model on every set of held-out requests."""
    shares = verdict_shares(tables["rates"], ["set", "model"])
    sets = [name for name in SET_NAMES if name in shares.index.get_level_values(0)]
    figure, axes = plt.subplots(
        1, len(sets), figsize=(2.1 * len(sets), 1.9), sharey=True, squeeze=False
    )
    for ax, name in zip(axes[0], sets, strict=True):
        part = shares.loc[name]
        stacked_verdicts(ax, list(part.index), part)
        ax.set_title(SET_NAMES[name])
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.suptitle(
        "Alignment turns compliance with harm into refusal", x=0.01, ha="left", fontweight="bold"
    )
    return figure


def training_loss(tables: Tables) -> Figure:
    """Loss per step, raw and smoothed."""
    figure, ax = plt.subplots(figsize=(4.2, 2.2))
    for model, part in tables["training"].groupby("model", sort=False):
        ax.plot(part["step"], part["loss"], color=MODEL_COLOURS[model], alpha=0.25, lw=0.8)
        ax.plot(
            part["step"],
            part["loss"].rolling(10, min_periods=1).mean(),
            color=MODEL_COLOURS[model],
            label=model,
        )
    ax.set(
        xlabel="optimizer step",
        ylabel="loss per response token (nats)",
        title="Both models train the same number of steps",
    )
    ax.legend()
    return figure
