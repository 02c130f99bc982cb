"""Figures of A3_finders: how stable the safety set is, and how few units are enough. Knows tables
only.
"""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from ssah_utils.figures.style import CONTROL, INK, SAFETY, UTILITY, Tables

FAMILY_COLOURS = {
    "reference": INK,
    "seed": "#0072B2",
    "size": "#56B4E9",
    "half": "#009E73",
    "category": "#E69F00",
    "positions": "#CC79A7",
    "score": "#D55E00",
    "control": CONTROL,
}
ORDER_STYLES = {"greedy": (SAFETY, "o-"), "score": (UTILITY, "s-"), "random": (CONTROL, "^--")}


def stability_matrix(tables: Tables) -> Figure:
    """Overlap of every variant of the safety set with every other."""
    rows = tables["jaccard"]
    order = list(dict.fromkeys(rows["first"]))
    wide = rows.pivot(index="first", columns="second", values="jaccard").loc[order, order]
    side = 0.3 * len(order) + 2.0
    figure, ax = plt.subplots(figsize=(side + 0.6, side))
    sns.heatmap(
        wide,
        ax=ax,
        vmin=0,
        vmax=1,
        cmap="cividis",
        annot=100 * wide,
        fmt=".0f",
        annot_kws={"size": 6},
        square=True,
        cbar_kws={"label": "Jaccard", "shrink": 0.7},
    )
    ax.set(xlabel="", ylabel="")
    ax.tick_params(labelsize=7, length=0)
    ax.set_title(
        f"Overlap of safety sets, Jaccard in % (by chance {100 * rows['chance'].median():.0f})"
    )
    return figure


VARIANT_PANELS = {
    "margin_drop": "loss of refusal margin (nats)",
    "coherent_asr": "harmful: coherent ASR",
    "answer_nll": "harmless: NLL of own answers",
}


def variant_ablation(tables: Tables) -> Figure:
    """What switching off each variant of the safety set does; random sets of the same size
    below.
    """
    rows = tables["rates"]
    order = list(dict.fromkeys(rows["variant"]))
    figure, axes = plt.subplots(1, 3, figsize=(8.6, 0.2 * len(order) + 1.0), sharey=True)
    for ax, (metric, title) in zip(axes, VARIANT_PANELS.items(), strict=True):
        part = rows[rows["metric"] == metric].set_index("variant").reindex(order)
        for row, (_, value) in enumerate(part.iterrows()):
            if pd.isna(value["mean"]):
                continue
            colour = FAMILY_COLOURS[value["family"]]
            ax.plot([value["low"], value["high"]], [row, row], color=colour, lw=1)
            ax.plot(
                value["mean"],
                row,
                "o",
                ms=4,
                color=colour,
                mfc="none" if value["family"] == "control" else colour,
            )
        ax.set_title(title, fontsize=8.5)
        ax.grid(axis="y", lw=0.3)
        if metric == "coherent_asr":
            ax.set_xlim(-0.03, 1.03)
    reference = rows[(rows["variant"] == "reference") & (rows["metric"] == "margin_drop")]["mean"]
    axes[0].axvline(reference.iloc[0] / 2, color=INK, lw=0.6, ls=":")
    axes[0].set_yticks(range(len(order)), order, fontsize=7)
    axes[0].invert_yaxis()
    figure.suptitle(
        "Which variants of the safety set carry safety (95% intervals; dotted: half of the"
        " reference)",
        x=0.01,
        ha="left",
        fontweight="bold",
    )
    return figure


def category_matrix(tables: Tables) -> Figure:
    """Margin lost on each harm category when the set found on each one is switched off."""
    rows = tables["categories"]
    found_on, measured_on = (
        list(dict.fromkeys(rows[column])) for column in ("found_on", "measured_on")
    )
    figure, axes = plt.subplots(1, 2, figsize=(9.4, 0.32 * len(found_on) + 2.1), sharey=True)
    panels = (
        ("margin_drop", "loss of refusal margin (nats)", ".1f"),
        ("coherent_asr", "coherent ASR", ".2f"),
    )
    for ax, (value, title, digits) in zip(axes, panels, strict=True):
        wide = rows.pivot(index="found_on", columns="measured_on", values=value).loc[
            found_on, measured_on
        ]
        sns.heatmap(
            wide,
            ax=ax,
            vmin=0,
            vmax=1 if value == "coherent_asr" else None,
            cmap="cividis",
            annot=True,
            fmt=digits,
            annot_kws={"size": 7},
        )
        ax.set(title=title, xlabel="measured on", ylabel="found on" if ax is axes[0] else "")
        ax.set_xticks(ax.get_xticks(), ax.get_xticklabels(), rotation=30, ha="right")
        ax.tick_params(labelsize=7, length=0)
    return figure


def smallest_sets(tables: Tables) -> Figure:
    """Margin lost and requests answered against the number of single units switched off, on
    held-out requests.
    """
    rows = tables["smallest"]
    counts = sorted(set(rows["units"]))
    figure, (left, right) = plt.subplots(1, 2, figsize=(7.4, 2.7))
    for order, (colour, style) in ORDER_STYLES.items():
        line = rows[rows["order"] == order].sort_values("units")
        left.plot(line["units"], line["margin_drop"], style, color=colour, label=order, ms=3.5)
        left.fill_between(line["units"], line["low"], line["high"], color=colour, alpha=0.18, lw=0)
        judged = line.dropna(subset="coherent_asr")
        right.plot(
            judged["units"], judged["coherent_asr"], style, color=colour, label=order, ms=3.5
        )
    full = rows[rows["order"] == "greedy"].eval("margin_drop / share_of_effect")
    full = full[np.isfinite(full)]
    for share in (0.5, 0.9):
        if len(full):
            left.axhline(share * full.iloc[-1], color=INK, lw=0.6, ls=":")
            left.text(
                0.99,
                share * full.iloc[-1],
                f"{share:.0%} of the whole set",
                fontsize=6.5,
                va="bottom",
                ha="right",
                transform=left.get_yaxis_transform(),
            )
    left.set(ylabel="loss of refusal margin (nats)", title="Margin on held-out requests")
    right.set(ylim=(-0.03, 1.03), ylabel="coherent ASR", title="Answers to held-out requests")
    for ax in (left, right):
        ax.set(xscale="log", xlabel="single units switched off")
        ax.set_xticks(counts, [f"{count}" for count in counts])
        ax.xaxis.set_minor_locator(plt.NullLocator())
    right.legend(fontsize=7, loc="upper left")
    return figure
