"""How cost grows with a model's size. Knows tables only."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from ssah_utils.figures.style import CONTROL, INK, SAFETY, UTILITY, headline, legend_below

LOOKS = {  # of a kind of work: colour, marker
    "forward": (CONTROL, "o"),
    "scoring": (UTILITY, "s"),
    "ablation": ("#E69F00", "^"),
    "training": (SAFETY, "D"),
}


def exponent(n_parameters: pd.Series, cost: pd.Series) -> float:
    """The power of the number of parameters with which a cost grows: the slope of its logarithm."""
    return float(np.polyfit(np.log(n_parameters), np.log(cost), 1)[0])


def cost_growth(growth: pd.DataFrame) -> Figure:
    """Seconds and memory of each kind of work against the parameters of the blocks.

    ``growth``: size, n_parameters, work, seconds, gib.
    """
    figure, axes = plt.subplots(1, 2, figsize=(7.2, 3.2))
    panels = {"seconds": "seconds for a batch", "gib": "memory, GiB"}
    handles = []
    for ax, (column, label) in zip(axes, panels.items(), strict=True):
        for work, (colour, marker) in LOOKS.items():
            part = growth[growth["work"] == work].sort_values("n_parameters")
            look = {"color": colour, "marker": marker, "ms": 4, "lw": 1}
            (line,) = ax.plot(part["n_parameters"], part[column], **look, label=work)
            power = exponent(part["n_parameters"], part[column])
            place = 0.95 - 0.08 * list(LOOKS).index(work)  # a list: the lines end close together
            ink = colour if work != "ablation" else INK
            words = f"{work}: exponent {power:.2f}"
            ax.text(0.03, place, words, transform=ax.transAxes, va="top", fontsize=7, color=ink)
            handles += [line] if column == "seconds" else []
        ax.set(xscale="log", yscale="log", xlabel="parameters of the blocks", ylabel=label)
        ax.margins(x=0.12)
    axes[0].set_title("Time")
    axes[1].set_title("Memory, weights included")
    legend_below(figure, handles, ncols=4)
    headline(figure, "How cost grows with size")
    return figure
