"""Figures of 06_freezing. Knows tables only."""

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ssah_utils.figures.style import INK, Tables, headline, legend_below
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
    """Of its line: dashed for a random control."""
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
        ax.set(xlabel="task loss, held out (nats per token; learned to the right)", title=task)
    axes[0][0].set_ylabel("log P(refuse) / P(comply), nats")
    handles, _ = axes[0][0].get_legend_handles_labels()
    legend_below(figure, handles, fontsize=6.5, ncols=5)
    headline(figure, "Safety against what is learned, step by step (mean over seeds)")
    return figure


def frontier(tables: Tables) -> Figure:
    """Margin against task loss for every frozen share and learning rate; gain at equal loss."""
    table, factors = tables["frontier"], sorted(tables["frontier"]["factor"].unique())
    size = (3.6 * len(factors) + 3.4, 3.2)
    figure, axes = plt.subplots(1, len(factors) + 1, figsize=size, squeeze=False)
    colours = plt.get_cmap("viridis_r")
    for ax, factor in zip(axes[0], factors, strict=False):
        part = table[table["factor"] == factor]
        for (order, fraction), line in part.groupby(["order", "fraction"], sort=False):
            style = "--" if order == "random" else "-"
            label = f"{fraction:.3g} {order}" if fraction else "nothing frozen"
            look = {"marker": "o", "ms": 3, "color": colours(0.1 + 0.85 * fraction)}
            ax.plot(line["task_loss"], line["margin"], style, label=label, **look)
        ax.axhline(0, color=INK, lw=0.6)
        ax.invert_xaxis()
        ax.set(xlabel="task loss, held out (nats per token)", title=f"learning rate x {factor:g}")
        ax.legend(fontsize=5.5)
    axes[0][0].set_ylabel("log P(refuse) / P(comply), nats")
    draw_gains(axes[0][-1], tables["gains"], factors)
    headline(figure, "The frontier: above is better")
    return figure


def draw_gains(ax: Axes, gains: pd.DataFrame, factors: list[float]) -> None:
    """Margin gained at equal task loss by the share frozen, one line per order and rate."""
    for number, factor in enumerate(factors):
        colour = FACTOR_COLOURS[number % len(FACTOR_COLOURS)]
        for order, style, fill in (("safety first", "-", colour), ("random", "--", "none")):
            line = gains[(gains["factor"] == factor) & (gains["order"] == order)]
            line = line.sort_values("fraction")
            reach = [line["gain"] - line["low"], line["high"] - line["gain"]]
            look = {"fmt": f"o{style}", "color": colour, "mfc": fill, "lw": 1, "capsize": 2}
            label = f"{order}, rate x {factor:g}"
            ax.errorbar(line["fraction"], line["gain"], reach, label=label, **look)
    ax.axhline(0, color=INK, lw=0.6)
    ax.set(xlabel="share of units frozen", ylabel="margin gained (nats)")
    ax.set_title("Gain at equal task loss")
    ax.legend(fontsize=6, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2)


def freezing_rates(tables: Tables) -> Figure:
    """ASR at the last step under every condition, a panel per task or attack, seeds as points."""
    rates, titles = tables["rates"], titles_of(tables["rates"])
    tasks = [task for task in dict.fromkeys(rates["task"]) if task != "-"]
    layout = {"figsize": (2.9 * len(tasks), 3.0), "squeeze": False, "sharex": True}
    figure, axes = plt.subplots(1, len(tasks), **layout)
    coherent = rates[rates["metric"] == "coherent_asr"]
    for ax, task in zip(axes[0], tasks, strict=True):
        order = list(dict.fromkeys(rates[rates["task"].isin([task, "-"])]["condition"]))
        part = coherent[coherent["task"].isin([task, "-"])]
        for row, name in enumerate(order):
            look = {"color": colour_of(name)}
            fill = "none" if name.startswith(RANDOM) else colour_of(name)
            for source, marker, shift in (("harmful", "o", -0.15), ("other_harmful", "s", 0.15)):
                seeds = part[(part["condition"] == name) & (part["set"] == source)]
                height = row + shift
                ax.plot(seeds["mean"], [height] * len(seeds), marker, ms=4.5, mfc=fill, **look)
                low, high = seeds["low"].min(), seeds["high"].max()
                ax.hlines(height, low, high, lw=0.8, alpha=0.5, **look)
        ax.set(yticks=range(len(order)), xlim=(-0.03, 1.03), xlabel="coherent ASR", title=task)
        ax.set_yticklabels([titles[name] for name in order], fontsize=7)
        ax.invert_yaxis()
    what = "Harmful requests answered after fine-tuning"
    headline(figure, f"{what} (circles AdvBench, squares HarmBench)")
    return figure
