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


def ablation_by_model(rates: pd.DataFrame) -> Figure:
    """Coherent answers to harmful requests, and gibberish, per model.

    ``rates``: model, condition, metric, mean, low, high, one row a draw; random draws are dots.
    """
    models = list(dict.fromkeys(rates["model"]))
    size = (6.4, 1.3 + 0.55 * len(models))
    figure, axes = plt.subplots(1, 2, figsize=size, sharey=True, width_ratios=(3, 1))
    titles = {"coherent_asr": "Harmful requests answered", "degenerate": "Gibberish"}
    for ax, (metric, title) in zip(axes, titles.items(), strict=True):
        for row, model in enumerate(reversed(models)):
            for offset, (condition, (label, colour, marker)) in zip(
                (0.22, 0.0, -0.22), CONDITIONS.items(), strict=True
            ):
                part = rates[
                    (rates["model"] == model)
                    & (rates["condition"] == condition)
                    & (rates["metric"] == metric)
                ]
                look = {"color": colour, "label": label if row == 0 else None}
                ends = 100 * part[["low", "high"]].to_numpy().T
                ax.hlines([row + offset] * len(part), *ends, color=colour, lw=1, alpha=0.5)
                heights = [row + offset] * len(part)
                ax.plot(100 * part["mean"], heights, marker, ms=5, ls="", **look)
        ax.set(xlim=(-3, 103), xlabel="%", title=title)
    axes[0].set(yticks=range(len(models)), yticklabels=list(reversed(models)))
    legend_below(figure, axes[0].get_legend_handles_labels()[0], ncols=3)
    headline(figure, "With 1.3% of the units switched off")
    return figure
