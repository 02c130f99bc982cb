"""The figure of 08_claims: every claim, its interval and its control. Knows tables only."""

from collections import Counter

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ssah_utils.figures.paper import WIDTH
from ssah_utils.figures.style import INK, Tables

VERDICT_STYLES = {
    "replicated": ("#0072B2", "o", "full"),
    "partly": ("#E69F00", "o", "left"),
    "not replicated": ("#D55E00", "X", "full"),
    "not measured": ("#999999", "_", "full"),
}


def two_digits(value: float) -> str:
    """Two digits that matter, as a reader needs them."""
    if pd.isna(value):
        return ""
    return f"{value:.0f}" if abs(value) >= 10 else f"{value:.2g}"


def shown_interval(row: pd.Series) -> str:
    """Ours with its interval, as text."""
    if pd.isna(row["ci_low"]):
        return two_digits(row["ours"])
    low, high = two_digits(row["ci_low"]), two_digits(row["ci_high"])
    return f"{two_digits(row['ours'])} [{low}, {high}]"


def scaled(row: pd.Series) -> np.ndarray:
    """Ours, low, high and the single runs, as distances from the control (or from 0).

    The largest distance is 1; positive is toward the claim.
    """
    centre = 0.0 if pd.isna(row["control"]) else row["control"]
    low, high = row["ci_low"], row["ci_high"]
    if row["toward"] == "less":
        low, high = high, low
    values = np.array([row["ours"], low, high, *row.get("ours_seeds", [])], dtype=float)
    distances = (values - centre) * (-1 if row["toward"] == "less" else 1)
    distances[~np.isfinite(distances)] = np.nan
    size = np.nanmax(np.abs(distances), initial=0.0)
    return distances / size if size > 0 else distances


def claims(tables: Tables) -> Figure:
    """One row per claim: its verdict, ours as distance from the control, the numbers.

    Rows point one way: to the right is toward the claim, whether it says more or less. Ticks: the
    runs one by one, where there are several.
    """
    numbers = ("ours", "ci_low", "ci_high", "control")
    table = tables["claims"].astype(dict.fromkeys(numbers, float))
    groups = list(dict.fromkeys(table["experiment"]))
    n_lines = len(table) + len(groups)
    figure, ax = plt.subplots(figsize=(WIDTH, 0.165 * n_lines + 0.9))
    line = 0
    for group in groups:
        ax.text(-4.15, line, group, fontsize=8, fontweight="bold", va="center")
        line += 1
        for _, row in table[table["experiment"] == group].iterrows():
            claim_line(ax, line, row)
            line += 1
    ax.vlines(0, 0.5, n_lines - 0.5, color=INK, lw=0.6)
    ax.set(xlim=(-4.2, 3.4), ylim=(n_lines - 0.3, -1.6))
    heads = [
        (0, "control\n(or no effect)", "center"),
        (1, "toward the\nclaim \N{RIGHTWARDS ARROW}", "right"),
        (1.35, "ours [interval]", "left"),
        (2.75, "control", "left"),
    ]
    for x, text, side in heads:
        ax.text(x, -0.2, text, fontsize=7, va="bottom", ha=side)
    ax.axis("off")
    counts, handles = Counter(table["verdict"]), []
    for verdict, (colour, marker, fill) in VERDICT_STYLES.items():
        if counts[verdict]:
            look = {"color": colour, "marker": marker, "fillstyle": fill, "ls": "", "ms": 6}
            handles.append(Line2D([], [], label=f"{verdict}: {counts[verdict]}", **look))
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), fontsize=8.5)
    return figure


def claim_line(ax: Axes, line: int, row: pd.Series) -> None:
    """Symbol, name, dot and interval, numbers of one claim, at height ``line``."""
    colour, marker, fill = VERDICT_STYLES[row["verdict"]]
    ax.plot(-4.08, line, marker, color=colour, fillstyle=fill, ms=5.5)
    ax.text(-3.93, line, row["id"].replace("-", " "), fontsize=7.5, va="center")
    if pd.isna(row["ours"]):
        missing = "" if row["verdict"] == "not measured" else "not reached"
        ax.text(1.35, line, missing, fontsize=7, va="center")
        return
    middle, low, high, *runs = scaled(row)
    if not np.isnan(low):
        ax.plot([low, high], [line, line], color=colour, lw=1.6, alpha=0.75)
    if len(runs) > 1:
        ax.plot(runs, [line] * len(runs), "|", color=colour, ms=6, mew=1)
    ax.plot(middle, line, marker, color=colour, fillstyle=fill, ms=4.5)
    ax.text(1.35, line, shown_interval(row), fontsize=7, va="center")
    ax.text(2.75, line, two_digits(row["control"]), fontsize=7, va="center")
