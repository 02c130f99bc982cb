"""Figures of 05_transfer. Knows tables only."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path

from ssah_utils.figures.style import DATA_COLOURS, GROUP_COLOURS, INK, Tables, headline
from ssah_utils.units import GROUPS

FLOOR = "floor: other calibration sample"


def final_moves(moves: pd.DataFrame) -> pd.DataFrame:
    """Transfer at the last checkpoint of every fine-tuning, mean over seeds, and the floor."""
    last = moves[(moves["step"] == moves["step"].max()) | (moves["data"] == "floor")]
    by_groups = last.groupby(["data", "before", "after"], sort=False)
    return by_groups[["units", "share"]].mean().reset_index()


def group_by_group(moves: pd.DataFrame, values: str) -> np.ndarray:
    """(before, after): a column of the moves as a square, groups in the order of ``GROUPS``."""
    keys = {"index": "before", "columns": "after", "values": values}
    return moves.pivot_table(**keys, observed=True).loc[list(GROUPS), list(GROUPS)].to_numpy()


def transfer_flow(tables: Tables) -> Figure:
    """Where the units of every group went; heights are square roots of counts."""
    moves = final_moves(tables["moves"])
    names = list(dict.fromkeys(moves["data"]))
    layout = {"figsize": (3.0 * len(names), 3.2), "sharey": True, "squeeze": False}
    figure, axes = plt.subplots(1, len(names), **layout)
    for ax, name in zip(axes[0], names, strict=True):
        draw_flow(ax, np.sqrt(group_by_group(moves[moves["data"] == name], "units")))
        ax.set(xlim=(-0.55, 1.55), title=FLOOR if name == "floor" else name)
        ax.axis("off")
    axes[0][0].invert_yaxis()
    headline(figure, "Where the units of each group went (before, left; after, right)")
    figure.supxlabel("heights: square root of the number of units", fontsize=7)
    return figure


def draw_flow(ax: Axes, heights: np.ndarray) -> None:
    """Alluvial picture of one square of heights: rows at the left, columns at the right."""
    gap = 0.06 * heights.sum()
    sizes = [heights.sum(1), heights.sum(0)]
    starts = [np.cumsum([0, *(side[:-1] + gap)]) for side in sizes]
    used = [starts[0].copy(), starts[1].copy()]
    for i, before in enumerate(GROUPS):
        for j in range(len(GROUPS)):
            low = (used[0][i], used[1][j])
            used[0][i] += heights[i, j]
            used[1][j] += heights[i, j]
            draw_ribbon(ax, low, (used[0][i], used[1][j]), GROUP_COLOURS[before])
    for side, x, offset, align in ((0, 0.0, -0.05, "right"), (1, 1.0, 0.05, "left")):
        for group, start, size in zip(GROUPS, starts[side], sizes[side], strict=True):
            ax.bar(x, size, bottom=start, width=0.05, color=GROUP_COLOURS[group])
            ax.text(x + offset, start + size / 2, group, ha=align, va="center", fontsize=7)


def draw_ribbon(ax: Axes, low: tuple[float, float], high: tuple[float, float], colour: str) -> None:
    """A band from x = 0 to x = 1; ``low`` and ``high``: its edges at the left and at the right."""
    there = [(0, low[0]), (0.5, low[0]), (0.5, low[1]), (1, low[1])]
    back = [(1, high[1]), (0.5, high[1]), (0.5, high[0]), (0, high[0])]
    codes = [Path.MOVETO, *[Path.CURVE4] * 3, Path.LINETO, *[Path.CURVE4] * 3, Path.CLOSEPOLY]
    outline = Path([*there, *back, there[0]], codes)
    ax.add_patch(PathPatch(outline, facecolor=colour, alpha=0.55, lw=0))


def transfer_heat(tables: Tables) -> Figure:
    """Share of each group before (rows) in each group after (columns), in percent."""
    moves = final_moves(tables["moves"])
    names = list(dict.fromkeys(moves["data"]))
    layout = {"figsize": (2.6 * len(names), 2.5), "sharey": True, "squeeze": False}
    figure, axes = plt.subplots(1, len(names), **layout)
    for ax, name in zip(axes[0], names, strict=True):
        values = group_by_group(moves[moves["data"] == name], "share") * 100
        ax.imshow(values, cmap="Blues", vmin=0, vmax=100)
        for (row, column), value in np.ndenumerate(values):
            look = {"ha": "center", "va": "center", "color": "white" if value > 55 else INK}
            ax.text(column, row, f"{value:.0f}", fontsize=8, **look)
        ax.set(xticks=range(4), yticks=range(4), xlabel="group after", title=name)
        ax.set_xticklabels(GROUPS, rotation=35, ha="right", fontsize=7)
        ax.set_yticklabels(GROUPS, fontsize=7)
    axes[0][0].set_ylabel("group before")
    headline(figure, "Share of each group that is in another group after (%)")
    return figure


def transfer_path(tables: Tables) -> Figure:
    """Share of safety units that left their group, and the margin, along the fine-tunings."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(7.2, 2.6))
    for name, part in tables["path"].groupby("data", sort=False):
        look = {"ms": 3, "color": DATA_COLOURS[name], "alpha": 0.8}
        for seed, line in part.groupby("seed"):
            label = name if seed == part["seed"].min() else None
            left.plot(line["step"], line["left"] * 100, "o-", label=label, **look)
            right.plot(line["step"], line["margin"], "o-", **look)
    moves = tables["moves"]
    safety = moves[(moves["before"] == "safety") & (moves["after"] == "safety")]
    stayed = safety[safety["data"] == "floor"]["share"].iloc[0]
    left.axhline(100 * (1 - stayed), color=DATA_COLOURS["floor"], ls="--", label=FLOOR)
    left.set(xlabel="optimizer step", ylabel="safety units that left (%)", ylim=(0, None))
    left.set_title("Safety units change group")
    right.axhline(0, color=INK, lw=0.6)
    right.set(xlabel="optimizer step", ylabel="log P(refuse) / P(comply), nats")
    right.set_title("The refusal margin falls")
    left.legend(fontsize=7)
    return figure
