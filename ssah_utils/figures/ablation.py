"""Figures of 04_ablation. Knows tables only."""

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from ssah_utils.figures.style import (
    CONTROL,
    GROUP_COLOURS,
    INK,
    SAFETY,
    Tables,
    dot_with_interval,
    headline,
    legend_below,
    line_with_band,
    stacked_verdicts,
    verdict_shares,
)


def ablation_groups(tables: Tables) -> Figure:
    """Verdicts and utility when a group is ablated, its size-matched random control below it."""
    rates = tables["rates"][tables["rates"]["part"] == "groups"]
    order = list(dict.fromkeys(rates["condition"]))
    harmful = rates[rates["set"] == "harmful"].groupby(["condition", "metric"], sort=False)
    shares = verdict_shares(harmful["mean"].mean().reset_index(), ["condition"]).loc[order]
    layout = {"figsize": (9.6, 0.34 * len(order) + 1.1), "width_ratios": [1.5, 1, 1]}
    figure, (left, middle, right) = plt.subplots(1, 3, sharey=True, **layout)
    stacked_verdicts(left, order, shares)
    left.set_title("harmful requests")
    handles, _ = left.get_legend_handles_labels()
    legend_below(figure, handles, "left", ncols=3)
    for ax, name, metric, title in (
        (middle, "helpful", "refused", "harmless requests refused"),
        (right, "cloze", "accuracy", "utility: cloze accuracy"),
    ):
        part = rates[(rates["set"] == name) & (rates["metric"] == metric)]
        for row, condition in enumerate(order):
            values = part[part["condition"] == condition]
            colour, hollow = GROUP_COLOURS.get(condition, CONTROL), "random" in condition
            for _, value in values.iterrows():  # several where random units were drawn again
                dot_with_interval(ax, row, value, colour, hollow, 0.5 if len(values) > 1 else 1)
        ax.set(xlim=(-0.02, 1.02), title=title, xlabel="share (95% interval)")
    right.axvline(0.25, color=INK, lw=0.6, ls=":")
    right.text(0.26, -0.55, "chance", fontsize=7)
    headline(figure, "What breaks when a group is switched off")
    return figure


CURVE_METRICS = {
    ("harmful", "coherent_asr"): "harmful: coherent ASR",
    ("helpful", "refused"): "harmless: refused",
    ("helpful", "answer_nll"): "harmless: NLL of own answers",
}


def ablation_curve(tables: Tables) -> Figure:
    """Safety and its price by the share of units switched off: safety units and random ones."""
    rates = tables["rates"][tables["rates"]["part"] == "curve"]
    figure, axes = plt.subplots(1, 3, figsize=(9.2, 2.6))
    for ax, ((name, metric), title) in zip(axes, CURVE_METRICS.items(), strict=True):
        part = rates[(rates["set"] == name) & (rates["metric"] == metric)]
        for condition, colour, style in (("safety", SAFETY, "o-"), ("random", CONTROL, "s--")):
            line = part[part["condition"] == condition].sort_values("fraction")
            look = {"colour": colour, "label": condition, "ms": 3.5, "alpha": 0.18}
            line_with_band(ax, line["fraction"] * 100, line, style, **look)
        ax.set(xscale="log", xlabel="units ablated (% of all)", title=title)
        ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        ax.xaxis.set_minor_formatter("")
        if metric == "answer_nll":
            ax.set_ylabel("nats per token")
        else:
            ax.set(ylim=(-0.03, 1.03), ylabel="share of requests")
    axes[0].legend()
    return figure
