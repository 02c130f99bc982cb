"""Figures of 00_quickstart, and the live one of its explorer. Knows tables only."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ssah_utils.figures.style import (
    CONTROL,
    INK,
    SAFETY,
    VERDICT_COLOURS,
    Tables,
    headline,
    legend_below,
    stacked_verdicts,
)

OFF_COLOURS = {"nothing": INK, "safety units": SAFETY, "random units": CONTROL}
VERDICT_MARKERS = {"refused": "o", "complied": "^", "degenerate": "x"}


def safety_switch(tables: Tables) -> Figure:
    """Margin of every request, and verdicts, with nothing, safety units and random units off."""
    looks = tables["looks"]
    names = [name for name in OFF_COLOURS if name in set(looks["switched_off"])]
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(7.2, 0.5 * len(names) + 1.6), width_ratios=(3, 2), sharey=True
    )
    verdicts = pd.crosstab(looks["switched_off"], looks["verdict"], normalize="index")
    verdicts = verdicts.reindex(index=names, columns=list(VERDICT_COLOURS), fill_value=0.0)
    stacked_verdicts(right, names, verdicts)
    for row, name in enumerate(names):
        margins, colour = looks.loc[looks["switched_off"] == name, "margin"], OFF_COLOURS[name]
        apart = np.linspace(-0.2, 0.2, len(margins)) if len(margins) > 1 else np.zeros(1)
        left.plot(margins, row + apart, "o", ms=4, color=colour, alpha=0.8)
        left.plot([margins.mean()] * 2, [row - 0.33, row + 0.33], color=colour, lw=2)
    _zero_line(left, "x")
    left.set_xlabel("refusal margin, nats (a dot each request, a bar their mean)")
    left.set_title("which way it leans")
    right.set_title("what it answers")
    handles, _ = right.get_legend_handles_labels()
    legend_below(figure, handles, side="right", ncols=3, fontsize=7)
    headline(figure, "Harmful requests, with units switched off")
    return figure


def explored(looks: pd.DataFrame, share: float) -> Figure:
    """One request: its margin at every share looked at so far, the chosen one marked."""
    figure, ax = plt.subplots(figsize=(5.6, 2.6))
    shares = sorted(set(looks["share"]))
    intact = looks[looks["switched_off"] == "nothing"]
    for name, colour in OFF_COLOURS.items():
        part = looks[looks["switched_off"] == name]
        if name != "nothing":
            part = pd.concat([intact, part]).sort_values("share")
            ax.plot([shares.index(at) for at in part["share"]], part["margin"], color=colour, lw=1)
    for row in looks.itertuples():
        here = row.share == share
        ax.plot(
            shares.index(row.share),
            row.margin,
            VERDICT_MARKERS[row.verdict],
            color=OFF_COLOURS[row.switched_off],
            ms=9 if here else 5,
            mew=2 if row.verdict == "degenerate" else 1,
        )
    _zero_line(ax, "y")
    for name, colour in OFF_COLOURS.items():
        ax.plot([], [], color=colour, label=name)
    for verdict, marker in VERDICT_MARKERS.items():
        ax.plot([], [], marker, color=CONTROL, label=verdict)
    ax.set(xticks=range(len(shares)), xticklabels=[f"{at:.1%}" for at in shares])
    ax.set(xlabel="share of all units switched off", ylabel="refusal margin, nats")
    ax.set_xlim(-0.4, max(len(shares) - 1, 1) + 0.4)
    ax.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _zero_line(ax: Axes, axis: str) -> None:
    """Where refusing and complying are as likely, and which side is which."""
    draw = ax.axvline if axis == "x" else ax.axhline
    draw(0, color=INK, lw=0.6)
    low, high = ax.get_xlim() if axis == "x" else ax.get_ylim()
    bound = 1.15 * max(abs(low), abs(high))
    if axis == "x":
        ax.set_xlim(-bound, bound)
        look = {"fontsize": 7, "va": "bottom", "transform": ax.get_xaxis_transform()}
        ax.text(-bound, 0.01, "← complies", ha="left", **look)
        ax.text(bound, 0.01, "refuses →", ha="right", **look)
    else:
        ax.set_ylim(-bound, bound)
        look = {"fontsize": 7, "ha": "left", "transform": ax.get_yaxis_transform()}
        ax.text(0.01, 0.9 * bound, "refuses ↑", va="center", **look)
        ax.text(0.01, -0.9 * bound, "complies ↓", va="center", **look)
