"""Figures of 04_ablation. Knows tables only."""

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from ssah_utils.figures.style import (
    CONTROL,
    GROUP_COLOURS,
    INK,
    Tables,
    stacked_verdicts,
    verdict_shares,
)


def ablation_groups(tables: Tables) -> Figure:
    """Verdicts on harmful requests and utility when a group is ablated, with its size-matched
    random control below it.
    """
    rates = tables["rates"][tables["rates"]["part"] == "groups"]
    order = list(dict.fromkeys(rates["condition"]))
    harmful = (
        rates[rates["set"] == "harmful"]
        .groupby(["condition", "metric"], sort=False)["mean"]
        .mean()
        .reset_index()
    )
    shares = verdict_shares(harmful, ["condition"]).loc[order]
    figure, (left, middle, right) = plt.subplots(
        1, 3, figsize=(9.6, 0.34 * len(order) + 1.1), sharey=True, width_ratios=[1.5, 1, 1]
    )
    stacked_verdicts(left, order, shares)
    left.set_title("harmful requests")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower left", ncols=3)
    for ax, metric, title in (
        (middle, "refused", "harmless requests refused"),
        (right, "accuracy", "utility: cloze accuracy"),
    ):
        part = rates[
            (rates["metric"] == metric)
            & (rates["set"] == ("helpful" if metric == "refused" else "cloze"))
        ]
        for row, condition in enumerate(order):
            values = part[part["condition"] == condition]
            colour = GROUP_COLOURS.get(condition, CONTROL)
            for _, value in values.iterrows():
                ax.plot(
                    [value["low"], value["high"]],
                    [row, row],
                    color=colour,
                    lw=1,
                    alpha=0.5 if len(values) > 1 else 1,
                )
                ax.plot(
                    value["mean"],
                    row,
                    "o",
                    color=colour,
                    ms=4,
                    mfc="none" if "random" in condition else colour,
                )
        ax.set(xlim=(-0.02, 1.02), title=title, xlabel="share (95% interval)")
    right.axvline(0.25, color=INK, lw=0.6, ls=":")
    right.text(0.26, -0.55, "chance", fontsize=7)
    figure.suptitle(
        "What breaks when a group is switched off", x=0.01, ha="left", fontweight="bold"
    )
    return figure


CURVE_METRICS = {
    ("harmful", "coherent_asr"): "harmful: coherent ASR",
    ("helpful", "refused"): "harmless: refused",
    ("helpful", "answer_nll"): "harmless: NLL of own answers",
}


def ablation_curve(tables: Tables) -> Figure:
    """Safety and its price against the share of units switched off, for safety units and random
    ones.
    """
    rates = tables["rates"][tables["rates"]["part"] == "curve"]
    figure, axes = plt.subplots(1, 3, figsize=(9.2, 2.6))
    for ax, ((name, metric), title) in zip(axes, CURVE_METRICS.items(), strict=True):
        part = rates[(rates["set"] == name) & (rates["metric"] == metric)]
        for condition, colour, style in (
            ("safety", GROUP_COLOURS["safety"], "o-"),
            ("random", CONTROL, "s--"),
        ):
            line = part[part["condition"] == condition].sort_values("fraction")
            ax.plot(
                line["fraction"] * 100, line["mean"], style, color=colour, label=condition, ms=3.5
            )
            ax.fill_between(
                line["fraction"] * 100, line["low"], line["high"], color=colour, alpha=0.18, lw=0
            )
        ax.set(xscale="log", xlabel="units ablated (% of all)", title=title)
        ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        ax.xaxis.set_minor_formatter("")
        if metric == "answer_nll":
            ax.set_ylabel("nats per token")
        else:
            ax.set(ylim=(-0.03, 1.03), ylabel="share of requests")
    axes[0].legend()
    return figure
