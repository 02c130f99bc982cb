"""The style of all figures: colours for colour-blind readers, shared parts, how files are written.

Knows tables. Does not know runs.
"""

from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ssah_utils.files import complete_only

Tables = dict[str, pd.DataFrame]  # stored tables of a stage, by name

# Okabe and Ito's colours, which the colour-blind tell apart.
SAFETY, UTILITY, CONTROL, INK = "#D55E00", "#0072B2", "#777777", "#222222"
VERDICT_COLOURS = {"refused": "#0072B2", "complied": "#D55E00", "degenerate": "#BBBBBB"}
MODEL_COLOURS = {"base": "#999999", "unaligned": "#E69F00", "aligned": "#0072B2"}
GROUP_COLOURS = {
    "safety": SAFETY,
    "utility": UTILITY,
    "complex": "#999999",
    "redundant": "#009E73",
}
DATA_COLOURS = {"adaptation": "#D55E00", "with refusals": "#0072B2", "floor": CONTROL}
CASE_COLOURS = {
    "real": "#0072B2",
    "words shuffled": "#E69F00",
    "words looped": "#CC79A7",
    "characters replaced": "#999999",
    "ablated": "#D55E00",
    "telegram style": "#56B4E9",
}
SET_NAMES = {
    "harmful": "harmful requests",
    "other_harmful": "harmful, other source",
    "harmful_twin": "harmful twins",
    "safe_twin": "safe twins",
    "over_refusal": "safe but scary",
    "helpful": "harmless requests",
}

# ------------------------------------------------------------------------------------- shared parts


def headline(figure: Figure, text: str) -> None:
    """What a figure of several panels shows, above them."""
    figure.suptitle(text, x=0.01, ha="left", fontweight="bold")


def legend_below(
    figure: Figure, handles: Sequence[Artist], side: str = "center", **look: object
) -> None:
    """One legend for all panels; ``handles`` bring their labels."""
    figure.legend(handles=handles, loc=f"outside lower {side}", **look)


def line_with_band(
    ax: Axes,
    x: pd.Series,
    part: pd.DataFrame,
    style: str = "-",
    *,
    colour: object,
    y: str = "mean",
    alpha: float = 0.2,
    **look: object,
) -> None:
    """A line through column ``y``, and the band between the columns ``low`` and ``high``."""
    ax.plot(x, part[y], style, color=colour, **look)
    ax.fill_between(x, part["low"], part["high"], color=colour, alpha=alpha, lw=0)


def dot_with_interval(
    ax: Axes, row: float, value: pd.Series, colour: str, hollow: bool = False, alpha: float = 1
) -> None:
    """``mean`` as a dot, on the line from ``low`` to ``high``; ``alpha`` is that of the line."""
    ax.plot([value["low"], value["high"]], [row, row], color=colour, lw=1, alpha=alpha)
    ax.plot(value["mean"], row, "o", ms=4, color=colour, mfc="none" if hollow else colour)


def stacked_verdicts(ax: Axes, labels: list[str], shares: pd.DataFrame) -> None:
    """Horizontal bars of the three verdicts, one per label, first label on top."""
    left = np.zeros(len(labels))
    for verdict, colour in VERDICT_COLOURS.items():
        width = shares[verdict].to_numpy(dtype=float)
        ax.barh(labels, width, left=left, color=colour, label=verdict, height=0.72)
        look = {"ha": "center", "va": "center", "fontsize": 7}
        look["color"] = INK if verdict == "degenerate" else "white"
        for row, (start, size) in enumerate(zip(left, width, strict=True)):
            if size >= 0.07:  # a narrower bar has no room for its number
                ax.text(start + size / 2, row, f"{size:.0%}", **look)
        left = left + width
    ax.set(xlim=(0, 1), xlabel="share of requests", xticks=[0, 0.5, 1])
    ax.invert_yaxis()


def verdict_shares(rates: pd.DataFrame, index: list[str]) -> pd.DataFrame:
    """refused, complied, degenerate per row of ``index``, in order of first appearance."""
    rates = rates[rates["metric"].isin(["refused", "coherent_asr", "degenerate"])]
    keys = {"index": index, "columns": "metric", "values": "mean"}
    wide = rates.pivot_table(**keys, sort=False, observed=True)
    wide = wide.rename(columns={"coherent_asr": "complied"})
    return wide.reindex(columns=list(VERDICT_COLOURS), fill_value=0.0)


# ----------------------------------------------------------------------------------- look and files


def set_style() -> None:
    """The look of every figure from now on, on the screen and in files."""
    look = {
        "figure.dpi": 110,
        "savefig.dpi": 200,
        "font.size": 9,
        "axes.titlesize": 9.5,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
        "figure.constrained_layout.use": True,
        "svg.hashsalt": "ssah",
    }
    sns.set_theme(context="paper", style="ticks", palette="colorblind", rc=look)


def save_figure(figure: Figure, folder: Path, name: str) -> None:
    """Write NAME.png and NAME.pdf, without dates, so that equal figures are equal files."""
    for suffix, metadata in (("png", {"Software": None}), ("pdf", {"CreationDate": None})):
        with complete_only(Path(folder) / f"{name}.{suffix}") as partial:
            figure.savefig(partial, format=suffix, metadata=metadata)
        figure.set_layout_engine("none")  # both have one layout, which takes a third of the time
    plt.close(figure)
