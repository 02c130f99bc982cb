"""The central experiment on every model, side by side. Knows tables only."""

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from ssah_utils.figures.style import CONTROL, INK, SAFETY, headline, legend_below

CONDITIONS = {  # what is switched off: how it is called, colour, marker
    "nothing": ("nothing", INK, "o"),
    "safety": ("1.3%, the safety units", SAFETY, "D"),
    "random, as safety": ("1.3%, random", CONTROL, "s"),
}


COUNTED = {  # by metric: the title of its panel
    "keywords": "No word of refusal",
    "learned": "Request fulfilled",
    "degenerate": "Gibberish",
}


def ablation_by_model(rates: pd.DataFrame) -> Figure:
    """Answers to harmful requests per model: without a word of refusal, as the paper counts; those
    that fulfil the request; gibberish.

    ``rates``: model, seed, condition, metric, mean, low, high; every seed is a mark.
    """
    models = list(dict.fromkeys(rates["model"]))
    size = (7.2, 1.3 + 0.6 * len(models))
    figure, axes = plt.subplots(1, len(COUNTED), figsize=size, sharey=True)
    for ax, (metric, title) in zip(axes, COUNTED.items(), strict=True):
        for row, model in enumerate(reversed(models)):
            for offset, (condition, (label, colour, marker)) in zip(
                (0.24, 0.0, -0.24), CONDITIONS.items(), strict=True
            ):
                part = rates[
                    (rates["model"] == model)
                    & (rates["condition"] == condition)
                    & (rates["metric"] == metric)
                ]
                look = {"color": colour, "label": label if row == 0 else None}
                ends = 100 * part[["low", "high"]].to_numpy().T
                heights = [row + offset] * len(part)
                ax.hlines(heights, *ends, color=colour, lw=1, alpha=0.5)
                ax.plot(100 * part["mean"], heights, marker, ms=5, ls="", **look)
        ax.set(xlim=(-4, 104), xlabel="% of harmful requests", title=title)
    labels = list(reversed(models))
    axes[0].set(yticks=range(len(models)), yticklabels=labels, ylim=(-0.5, len(models) - 0.5))
    legend_below(figure, axes[0].get_legend_handles_labels()[0], ncols=3)
    headline(figure, "With 1.3% of the units switched off; a mark for every seed")
    return figure
