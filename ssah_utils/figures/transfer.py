"""Figures of 05_transfer. Knows tables only."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path

from ssah_utils.figures.style import DATA_COLOURS, GROUP_COLOURS, INK, Tables
from ssah_utils.units import GROUPS

# -------------------------------------------------------------------------------------- 05_transfer


def _ribbon(ax: Axes, left: tuple[float, float], right: tuple[float, float], colour: str) -> None:
    """A band from (low, high) at x = 0 to (low, high) at x = 1."""
    curve = [
        (0, left[0]),
        (0.5, left[0]),
        (0.5, right[0]),
        (1, right[0]),
        (1, right[1]),
        (0.5, right[1]),
        (0.5, left[1]),
        (0, left[1]),
        (0, left[0]),
    ]
    codes = [Path.MOVETO, *[Path.CURVE4] * 3, Path.LINETO, *[Path.CURVE4] * 3, Path.CLOSEPOLY]
    ax.add_patch(PathPatch(Path(curve, codes), facecolor=colour, alpha=0.55, lw=0))


def final_moves(moves: pd.DataFrame) -> pd.DataFrame:
    """Transfer at the last checkpoint of every fine-tuning, mean over seeds, and the floor."""
    last = moves[(moves["step"] == moves["step"].max()) | (moves["data"] == "floor")]
    return (
        last.groupby(["data", "before", "after"], sort=False)[["units", "share"]]
        .mean()
        .reset_index()
    )


def transfer_flow(tables: Tables) -> Figure:
    """Alluvial picture of every group before (left) and after (right); heights are square roots of
    counts.
    """
    table = final_moves(tables["moves"])
    names = list(dict.fromkeys(table["data"]))
    figure, axes = plt.subplots(
        1, len(names), figsize=(3.0 * len(names), 3.2), sharey=True, squeeze=False
    )
    for ax, name in zip(axes[0], names, strict=True):
        counts = table[table["data"] == name].pivot_table(
            index="before", columns="after", values="units", observed=True
        )
        heights = np.sqrt(counts.loc[list(GROUPS), list(GROUPS)].to_numpy())
        gap = 0.06 * heights.sum()
        starts = [np.cumsum([0, *(side[:-1] + gap)]) for side in (heights.sum(1), heights.sum(0))]
        used = [starts[0].copy(), starts[1].copy()]
        for i, before in enumerate(GROUPS):
            for j in range(len(GROUPS)):
                band = heights[i, j]
                _ribbon(
                    ax,
                    (used[0][i], used[0][i] + band),
                    (used[1][j], used[1][j] + band),
                    GROUP_COLOURS[before],
                )
                used[0][i] += band
                used[1][j] += band
        for side, x, align in ((0, 0.0, "right"), (1, 1.0, "left")):
            for i, group in enumerate(GROUPS):
                size = heights.sum(1 - side)[i]
                ax.bar(x, size, bottom=starts[side][i], width=0.05, color=GROUP_COLOURS[group])
                offset = -0.05 if side == 0 else 0.05
                ax.text(
                    x + offset, starts[side][i] + size / 2, group, ha=align, va="center", fontsize=7
                )
        ax.set(
            xlim=(-0.55, 1.55), title={"floor": "floor: other calibration sample"}.get(name, name)
        )
        ax.invert_yaxis() if ax is axes[0][0] else None
        ax.axis("off")
    figure.suptitle(
        "Where the units of each group went (before, left; after, right)",
        x=0.01,
        ha="left",
        fontweight="bold",
    )
    figure.supxlabel("heights: square root of the number of units", fontsize=7)
    return figure


def transfer_heat(tables: Tables) -> Figure:
    """Share of each group before (rows) in each group after (columns), in percent."""
    table = final_moves(tables["moves"])
    names = list(dict.fromkeys(table["data"]))
    figure, axes = plt.subplots(
        1, len(names), figsize=(2.6 * len(names), 2.5), sharey=True, squeeze=False
    )
    for ax, name in zip(axes[0], names, strict=True):
        shares = table[table["data"] == name].pivot_table(
            index="before", columns="after", values="share", observed=True
        )
        values = shares.loc[list(GROUPS), list(GROUPS)].to_numpy() * 100
        ax.imshow(values, cmap="Blues", vmin=0, vmax=100)
        for (row, column), value in np.ndenumerate(values):
            ax.text(
                column,
                row,
                f"{value:.0f}",
                ha="center",
                va="center",
                fontsize=8,
                color="white" if value > 55 else INK,
            )
        ax.set(xticks=range(4), yticks=range(4), xlabel="group after", title=name)
        ax.set_xticklabels(GROUPS, rotation=35, ha="right", fontsize=7)
        ax.set_yticklabels(GROUPS, fontsize=7)
    axes[0][0].set_ylabel("group before")
    figure.suptitle(
        "Share of each group that is in another group after (%)",
        x=0.01,
        ha="left",
        fontweight="bold",
    )
    return figure


def transfer_path(tables: Tables) -> Figure:
    """Share of safety units that left their group, and the margin, against the steps of
    fine-tuning.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(7.2, 2.6))
    for name, part in tables["path"].groupby("data", sort=False):
        for k, line in part.groupby("seed"):
            label = name if k == part["seed"].min() else None
            left.plot(
                line["step"],
                line["left"] * 100,
                "o-",
                ms=3,
                color=DATA_COLOURS[name],
                label=label,
                alpha=0.8,
            )
            right.plot(
                line["step"], line["margin"], "o-", ms=3, color=DATA_COLOURS[name], alpha=0.8
            )
    moves = tables["moves"]
    stayed = moves[
        (moves["data"] == "floor") & (moves["before"] == "safety") & (moves["after"] == "safety")
    ]["share"].iloc[0]
    left.axhline(
        100 * (1 - stayed),
        color=DATA_COLOURS["floor"],
        ls="--",
        label="floor: other calibration sample",
    )
    left.set(
        xlabel="optimizer step",
        ylabel="safety units that left (%)",
        title="Safety units change group",
        ylim=(0, None),
    )
    right.axhline(0, color=INK, lw=0.6)
    right.set(
        xlabel="optimizer step",
        ylabel="log P(refuse) / P(comply), nats",
        title="The refusal margin falls",
    )
    left.legend(fontsize=7)
    return figure


# -------------------------------------------------------------------------------------- 06_freezing


# ------------------------------------------------------------------------------- 07_redundant_units
