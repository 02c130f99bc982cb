"""Figures of 06_freezing. Knows tables only."""

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from ssah_utils.figures.style import INK, Tables
from ssah_utils.frozen_sets import RANDOM

# one colour per frozen set; its random control has the same colour, dashed
FACTOR_COLOURS = ("#0072B2", "#D55E00", "#009E73")
FROZEN_COLOURS = {
    "before": INK,
    "nothing": "#000000",
    "safety": "#E69F00",
    "safety_some_complex": "#D55E00",
    "safety_all_complex": "#0072B2",
    "lora": "#CC79A7",
    "llama-adapter": "#009E73",
    "prefix": "#56B4E9",
}


def colour_of(condition: str) -> str:
    """Of a frozen set, its random control, or a method of PEFT, by its id."""
    return FROZEN_COLOURS[condition.removeprefix(RANDOM)]


def style_of(condition: str) -> str:
    return "--" if condition.startswith(RANDOM) else "-"


def titles_of(table: pd.DataFrame) -> dict[str, str]:
    """What is drawn for every condition of a table, by its id, in order of appearance."""
    return dict(zip(table["condition"], table["title"], strict=True))


def freezing_paths(tables: Tables) -> Figure:
    """Margin against task loss along every fine-tuning: learned to the right, safe upwards."""
    paths, titles = tables["paths"], titles_of(tables["paths"])
    tasks = list(dict.fromkeys(paths["task"]))
    figure, axes = plt.subplots(1, len(tasks), figsize=(4.3 * len(tasks), 3.5), squeeze=False)
    for ax, task in zip(axes[0], tasks, strict=True):
        for name, part in paths[paths["task"] == task].groupby("condition", sort=False):
            line = part.groupby("step")[["task_loss", "margin"]].mean()
            look = {"marker": "o", "ms": 3, "color": colour_of(name), "label": titles[name]}
            ax.plot(line["task_loss"], line["margin"], style_of(name), **look)
        ax.axhline(0, color=INK, lw=0.6)
        ax.invert_xaxis()
        ax.set(xlabel="task loss, held out (nats per token; learned to the right)", title=f"{task}")
    axes[0][0].set_ylabel("log P(refuse) / P(comply), nats")
    handles = axes[0][0].get_legend_handles_labels()
    figure.legend(*handles, fontsize=6.5, loc="outside lower center", ncols=5)
    title = "Safety against what is learned, step by step (mean over seeds)"
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    return figure


def frontier(tables: Tables) -> Figure:
    """Margin against task loss for every frozen share, one panel per learning rate; right: the gain
    at equal task loss.
    """
    table, gains = tables["frontier"], tables["gains"]
    factors = sorted(table["factor"].unique())
    figure, axes = plt.subplots(
        1, len(factors) + 1, figsize=(3.6 * len(factors) + 3.4, 3.2), squeeze=False
    )
    colours = plt.get_cmap("viridis_r")
    for ax, factor in zip(axes[0], factors, strict=False):
        for (order, fraction), line in table[table["factor"] == factor].groupby(
            ["order", "fraction"], sort=False
        ):
            style = "--" if order == "random" else "-"
            ax.plot(
                line["task_loss"],
                line["margin"],
                style,
                marker="o",
                ms=3,
                color=colours(0.1 + 0.85 * fraction),
                label=f"{fraction:.3g} {order}" if fraction else "nothing frozen",
            )
        ax.axhline(0, color=INK, lw=0.6)
        ax.invert_xaxis()
        ax.set(xlabel="task loss, held out (nats per token)", title=f"learning rate x {factor:g}")
        ax.legend(fontsize=5.5)
    axes[0][0].set_ylabel("log P(refuse) / P(comply), nats")
    right = axes[0][-1]
    for number, factor in enumerate(factors):
        for order, style in (("safety first", "-"), ("random", "--")):
            line = gains[(gains["factor"] == factor) & (gains["order"] == order)].sort_values(
                "fraction"
            )
            colour = FACTOR_COLOURS[number % len(FACTOR_COLOURS)]
            reach = [line["gain"] - line["low"], line["high"] - line["gain"]]
            right.errorbar(
                line["fraction"],
                line["gain"],
                reach,
                fmt="o" + style,
                color=colour,
                lw=1,
                capsize=2,
                mfc="none" if order == "random" else colour,
                label=f"{order}, rate x {factor:g}",
            )
    right.axhline(0, color=INK, lw=0.6)
    right.set(
        xlabel="share of units frozen",
        ylabel="margin gained (nats)",
        title="Gain at equal task loss",
    )
    right.legend(fontsize=6, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2)
    figure.suptitle("The frontier: above is better", x=0.01, ha="left", fontweight="bold")
    return figure


def freezing_rates(tables: Tables) -> Figure:
    """ASR at the last step under every condition, one panel per task or attack; seeds as single
    points.
    """
    rates, titles = tables["rates"], titles_of(tables["rates"])
    tasks = [task for task in dict.fromkeys(rates["task"]) if task != "-"]
    figure, axes = plt.subplots(
        1, len(tasks), figsize=(2.9 * len(tasks), 3.0), squeeze=False, sharex=True
    )
    for ax, task in zip(axes[0], tasks, strict=True):
        part = rates[rates["task"].isin([task, "-"])]
        order = list(dict.fromkeys(part["condition"]))
        for row, name in enumerate(order):
            for shift, (source, marker) in zip(
                (-0.15, 0.15), (("harmful", "o"), ("other_harmful", "s")), strict=True
            ):
                chosen = part[(part["condition"] == name) & (part["set"] == source)]
                shown = chosen[chosen["metric"] == "coherent_asr"]
                ax.plot(
                    shown["mean"],
                    [row + shift] * len(shown),
                    marker,
                    color=colour_of(name),
                    ms=4.5,
                    mfc="none" if name.startswith(RANDOM) else None,
                    label=source if row == 0 else None,
                )
                ax.hlines(
                    row + shift,
                    shown["low"].min(),
                    shown["high"].max(),
                    color=colour_of(name),
                    lw=0.8,
                    alpha=0.5,
                )
        ax.set(yticks=range(len(order)), xlim=(-0.03, 1.03), xlabel="coherent ASR", title=task)
        ax.set_yticklabels([titles[name] for name in order], fontsize=7)
        ax.invert_yaxis()
    figure.suptitle(
        "Harmful requests answered after fine-tuning (circles AdvBench, squares HarmBench)",
        x=0.01,
        ha="left",
        fontweight="bold",
    )
    return figure
