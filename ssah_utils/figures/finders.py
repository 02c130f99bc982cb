"""Figures of A3_finders: how stable the safety set is, and how few units are enough.

Knows tables only.
"""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from ssah_utils.figures.style import (
    CONTROL,
    INK,
    SAFETY,
    UTILITY,
    Tables,
    dot_with_interval,
    headline,
    line_with_band,
)

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
VARIANT_PANELS = {
    "margin_drop": "loss of refusal margin (nats)",
    "coherent_asr": "harmful: coherent ASR",
    "answer_nll": "harmless: NLL of own answers",
}


def stability_matrix(tables: Tables) -> Figure:
    """Overlap of every variant of the safety set with every other."""
    rows = tables["jaccard"]
    order = list(dict.fromkeys(rows["first"]))
    wide = rows.pivot(index="first", columns="second", values="jaccard").loc[order, order]
    side = 0.3 * len(order) + 2.0
    figure, ax = plt.subplots(figsize=(side + 0.6, side))
    numbers = {"annot": 100 * wide, "fmt": ".0f", "annot_kws": {"size": 6}}
    scale = {"vmin": 0, "vmax": 1, "cmap": "cividis"}
    bar = {"label": "Jaccard", "shrink": 0.7}
    sns.heatmap(wide, ax=ax, square=True, cbar_kws=bar, **scale, **numbers)
    ax.set(xlabel="", ylabel="")
    ax.tick_params(labelsize=7, length=0)
    by_chance = 100 * rows["chance"].median()
    ax.set_title(f"Overlap of safety sets, Jaccard in % (by chance {by_chance:.0f})")
    return figure


def variant_ablation(tables: Tables) -> Figure:
    """What switching off each variant of the safety set does; random sets of its size below."""
    rows = tables["rates"]
    order = list(dict.fromkeys(rows["variant"]))
    figure, axes = plt.subplots(1, 3, figsize=(8.6, 0.2 * len(order) + 1.0), sharey=True)
    for ax, (metric, title) in zip(axes, VARIANT_PANELS.items(), strict=True):
        part = rows[rows["metric"] == metric].set_index("variant").reindex(order)
        for row, (_, value) in enumerate(part.iterrows()):
            if pd.notna(value["mean"]):
                family = value["family"]
                dot_with_interval(ax, row, value, FAMILY_COLOURS[family], family == "control")
        ax.set_title(title, fontsize=8.5)
        ax.grid(axis="y", lw=0.3)
        if metric == "coherent_asr":
            ax.set_xlim(-0.03, 1.03)
    reference = rows[(rows["variant"] == "reference") & (rows["metric"] == "margin_drop")]["mean"]
    axes[0].axvline(reference.iloc[0] / 2, color=INK, lw=0.6, ls=":")
    axes[0].set_yticks(range(len(order)), order, fontsize=7)
    axes[0].invert_yaxis()
    what = "Which variants of the safety set carry safety"
    headline(figure, f"{what} (95% intervals; dotted: half of the reference)")
    return figure


def category_matrix(tables: Tables) -> Figure:
    """Margin lost on each harm category when the set found on each one is switched off."""
    rows = tables["categories"]
    found_on = list(dict.fromkeys(rows["found_on"]))
    measured_on = list(dict.fromkeys(rows["measured_on"]))
    figure, axes = plt.subplots(1, 2, figsize=(9.4, 0.32 * len(found_on) + 2.1), sharey=True)
    panels = (
        ("margin_drop", "loss of refusal margin (nats)", ".1f", None),
        ("coherent_asr", "coherent ASR", ".2f", 1),
    )
    for ax, (value, title, digits, highest) in zip(axes, panels, strict=True):
        wide = rows.pivot(index="found_on", columns="measured_on", values=value)
        wide = wide.loc[found_on, measured_on]
        numbers = {"annot": True, "fmt": digits, "annot_kws": {"size": 7}}
        sns.heatmap(wide, ax=ax, vmin=0, vmax=highest, cmap="cividis", **numbers)
        ax.set(title=title, xlabel="measured on", ylabel="found on" if ax is axes[0] else "")
        ax.set_xticks(ax.get_xticks(), ax.get_xticklabels(), rotation=30, ha="right")
        ax.tick_params(labelsize=7, length=0)
    return figure


def smallest_sets(tables: Tables) -> Figure:
    """Margin lost and requests answered by the number of single units switched off, held out."""
    rows = tables["smallest"]
    counts = sorted(set(rows["units"]))
    figure, (left, right) = plt.subplots(1, 2, figsize=(7.4, 2.7))
    for order, (colour, style) in ORDER_STYLES.items():
        line = rows[rows["order"] == order].sort_values("units")
        look = {"label": order, "ms": 3.5}
        band = {"colour": colour, "y": "margin_drop", "alpha": 0.18}
        line_with_band(left, line["units"], line, style, **band, **look)
        judged = line.dropna(subset="coherent_asr")
        right.plot(judged["units"], judged["coherent_asr"], style, color=colour, **look)
    whole_set = rows[rows["order"] == "greedy"].eval("margin_drop / share_of_effect")
    whole_set = whole_set[np.isfinite(whole_set)]
    for share in (0.5, 0.9) if len(whole_set) else ():
        height = share * whole_set.iloc[-1]
        left.axhline(height, color=INK, lw=0.6, ls=":")
        look = {"fontsize": 6.5, "va": "bottom", "ha": "right"}
        at = left.get_yaxis_transform()
        left.text(0.99, height, f"{share:.0%} of the whole set", transform=at, **look)
    left.set(ylabel="loss of refusal margin (nats)", title="Margin on held-out requests")
    right.set(ylim=(-0.03, 1.03), ylabel="coherent ASR", title="Answers to held-out requests")
    for ax in (left, right):
        ax.set(xscale="log", xlabel="single units switched off")
        ax.set_xticks(counts, [f"{count}" for count in counts])
        ax.xaxis.set_minor_locator(plt.NullLocator())
    right.legend(fontsize=7, loc="upper left")
    return figure


FINDER_LOOKS = {  # colour and marker of a finder, so that no two are told apart by colour alone
    "variance x norm": (INK, "o"),
    "WIFN": ("#0072B2", "s"),
    "set difference": ("#56B4E9", "D"),
    "gradient x activation": ("#009E73", "^"),
    "activation change": ("#E69F00", "v"),
    "refusal direction": ("#CC79A7", "P"),
    "first-token KL": ("#D55E00", "X"),
    "learned mask": ("#B8A500", "*"),
}
FINDER_PANELS = {
    "harmful: coherent ASR": ("coherent_asr", "coherent_low", "coherent_high"),
    "harmless: rise of NLL": ("answer_nll", "nll_low", "nll_high"),
}


def finders_compared(tables: Tables) -> Figure:
    """Margin lost by the number of units for every finder, random sets as a band; and at the full
    size, which answers come and what it costs. Marks mean the same in all panels.
    """
    whole = tables["finders"].set_index("finder")
    columns = ["finder", "units", "margin_drop", "low", "high"]
    points = pd.concat([tables["finder_curve"][columns], tables["finders"][columns]])
    points = points.sort_values("units")
    ratios = {"width_ratios": [2.2, 1, 1]}
    figure, (left, *others) = plt.subplots(1, 3, figsize=(9.6, 3.2), gridspec_kw=ratios)
    random = points[points["finder"] == "random"]
    look = {"colour": CONTROL, "y": "margin_drop", "alpha": 0.3}
    line_with_band(left, random["units"], random, "--", **look, lw=1, label="random")
    for name, (colour, marker) in FINDER_LOOKS.items():
        line = points[points["finder"] == name]
        if len(line):
            look = {"marker": marker, "color": colour, "ms": 5, "label": name}
            left.plot(line["units"], line["margin_drop"], lw=1.2, **look)
    counts = sorted(set(points["units"]))
    left.set(xscale="log", xlabel="units switched off", ylabel="loss of refusal margin (nats)")
    left.set_xticks(counts, [f"{count}" for count in counts])
    left.xaxis.set_minor_locator(plt.NullLocator())
    shown = [*(name for name in FINDER_LOOKS if name in whole.index), "random"]
    for ax, (title, names) in zip(others, FINDER_PANELS.items(), strict=True):
        for row, name in enumerate(shown):
            values = whole.loc[name, list(names)].set_axis(["mean", "low", "high"])
            if pd.notna(values["mean"]):
                colour, marker = FINDER_LOOKS.get(name, (CONTROL, "_"))
                ax.plot([values["low"], values["high"]], [row, row], color=colour, lw=1)
                ax.plot(values["mean"], row, marker, ms=5, color=colour)
        ax.set_title(title, fontsize=8.5)
        ax.set_yticks(range(len(shown)), shown if ax is others[0] else [""] * len(shown))
        ax.tick_params(axis="y", labelsize=7, length=0)
        ax.grid(axis="y", lw=0.3)
        ax.invert_yaxis()
    others[0].set_xlim(-0.03, 1.03)
    headline(figure, "Whose units carry safety, at equal size (95% intervals; random: band)")
    return figure
