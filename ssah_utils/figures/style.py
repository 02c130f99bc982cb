"""The style of all figures: colours that colour-blind readers can tell apart, shared parts, equal
files for equal figures.

Knows tables. Does not know runs.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ssah_utils.files import complete_only

Tables = dict[str, pd.DataFrame]  # stored tables of a stage, by name

VERDICT_COLOURS = {"refused": "#0072B2", "complied": "#D55E00", "degenerate": "#BBBBBB"}


MODEL_COLOURS = {"base": "#999999", "unaligned": "#E69F00", "aligned": "#0072B2"}


SET_NAMES = {
    "harmful": "harmful requests",
    "other_harmful": "harmful, other source",
    "harmful_twin": "harmful twins",
    "safe_twin": "safe twins",
    "over_refusal": "safe but scary",
    "helpful": "harmless requests",
}


CASE_COLOURS = {
    "real": "#0072B2",
    "words shuffled": "#E69F00",
    "words looped": "#CC79A7",
    "characters replaced": "#999999",
    "ablated": "#D55E00",
    "telegram style": "#56B4E9",
}


def stacked_verdicts(ax: Axes, labels: list[str], shares: pd.DataFrame) -> None:
    """Horizontal bars of the three verdicts, one per label, first label on top."""
    left = np.zeros(len(labels))
    for verdict, colour in VERDICT_COLOURS.items():
        width = shares[verdict].to_numpy(dtype=float)
        ax.barh(labels, width, left=left, color=colour, label=verdict, height=0.72)
        for row, (start, size) in enumerate(zip(left, width, strict=True)):
            if size >= 0.07:
                ax.text(
                    start + size / 2,
                    row,
                    f"{size:.0%}",
                    ha="center",
                    va="center",
                    fontsize=7,
                    color=INK if verdict == "degenerate" else "white",
                )
        left = left + width
    ax.set(xlim=(0, 1), xlabel="share of requests", xticks=[0, 0.5, 1])
    ax.invert_yaxis()


def verdict_shares(rates: pd.DataFrame, index: list[str]) -> pd.DataFrame:
    """refused, complied, degenerate per row of ``index``, in order of first appearance."""
    wide = rates[rates["metric"].isin(["refused", "coherent_asr", "degenerate"])]
    wide = wide.pivot_table(index=index, columns="metric", values="mean", sort=False, observed=True)
    return wide.rename(columns={"coherent_asr": "complied"}).reindex(
        columns=list(VERDICT_COLOURS), fill_value=0.0
    )


def band(ax: Axes, part: pd.DataFrame, colour: str, label: str, style: str = "-") -> None:
    ax.plot(part["layer"], part["mean"], style, color=colour, label=label)
    ax.fill_between(part["layer"], part["low"], part["high"], color=colour, alpha=0.2, lw=0)


GROUP_COLOURS = {
    "safety": "#D55E00",
    "utility": "#0072B2",
    "complex": "#999999",
    "redundant": "#009E73",
}


SAFETY, CONTROL, UTILITY, INK = (
    "#D55E00",
    "#777777",
    "#0072B2",
    "#222222",
)  # Okabe-Ito, told apart by the colour-blind


DATA_COLOURS = {"adaptation": "#D55E00", "with refusals": "#0072B2", "floor": CONTROL}


def set_style() -> None:
    sns.set_theme(
        context="paper",
        style="ticks",
        palette="colorblind",
        rc={
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
        },
    )


def save_figure(figure: Figure, folder: Path, name: str) -> None:
    """Write NAME.png and NAME.pdf, without dates, so that equal figures are equal files."""
    for suffix, metadata in (("png", {"Software": None}), ("pdf", {"CreationDate": None})):
        with complete_only(Path(folder) / f"{name}.{suffix}") as partial:
            figure.savefig(partial, format=suffix, metadata=metadata)
    plt.close(figure)
