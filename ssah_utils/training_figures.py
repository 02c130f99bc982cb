"""Figures of the training notebooks (05 to 07), as functions from stored tables to a ``Figure``.

Knows tables only. Loads no model.
"""

import re

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path

from ssah_utils.results import CONTROL, GROUP_COLOURS, INK
from ssah_utils.units import GROUPS

Tables = dict[str, pd.DataFrame]
DATA_COLOURS = {"adaptation": "#D55E00", "with refusals": "#0072B2", "floor": CONTROL}
# one colour per frozen set; its random control has the same colour, dashed
FROZEN_COLOURS = {"before": INK, "nothing": "#000000", "SCU": "#E69F00", "SCU + some CU": "#D55E00", "SCU + all CU": "#0072B2",
                  "lora": "#CC79A7", "llama-adapter": "#009E73", "prefix": "#56B4E9"}  # fmt: skip
FACTOR_COLOURS = ("#0072B2", "#D55E00", "#009E73")
BUDGET_COLOURS = {
    "before": INK,
    "all": "#000000",
    "redundant": "#009E73",
    "random": CONTROL,
    "top": "#0072B2",
    "safety": "#D55E00",
}


def colour_of(condition: str) -> str:
    """Of a frozen set or its random control, whatever share of the complex units it holds."""
    return FROZEN_COLOURS[re.sub(r"\+ [\d.e-]+% CU", "+ some CU", condition.removeprefix("random, as "))]


def style_of(condition: str) -> str:
    return "--" if condition.startswith("random") else "-"


# ------------------------------------------------------------------------------------------------------- 05_transfer


def _ribbon(ax: Axes, left: tuple[float, float], right: tuple[float, float], colour: str) -> None:
    """A band from (low, high) at x = 0 to (low, high) at x = 1."""
    curve = [(0, left[0]), (0.5, left[0]), (0.5, right[0]), (1, right[0]), (1, right[1]), (0.5, right[1]), (0.5, left[1]),
             (0, left[1]), (0, left[0])]  # fmt: skip
    codes = [Path.MOVETO, *[Path.CURVE4] * 3, Path.LINETO, *[Path.CURVE4] * 3, Path.CLOSEPOLY]
    ax.add_patch(PathPatch(Path(curve, codes), facecolor=colour, alpha=0.55, lw=0))


def final_moves(moves: pd.DataFrame) -> pd.DataFrame:
    """Transfer at the last checkpoint of every fine-tuning, mean over seeds, and the floor."""
    last = moves[(moves["step"] == moves["step"].max()) | (moves["data"] == "floor")]
    return last.groupby(["data", "before", "after"], sort=False)[["units", "share"]].mean().reset_index()


def transfer_flow(tables: Tables) -> Figure:
    """Alluvial picture of every group before (left) and after (right); heights are square roots of counts."""
    table = final_moves(tables["moves"])
    names = list(dict.fromkeys(table["data"]))
    figure, axes = plt.subplots(1, len(names), figsize=(3.0 * len(names), 3.2), sharey=True, squeeze=False)
    for ax, name in zip(axes[0], names, strict=True):
        counts = table[table["data"] == name].pivot_table(index="before", columns="after", values="units", observed=True)
        heights = np.sqrt(counts.loc[list(GROUPS), list(GROUPS)].to_numpy())
        gap = 0.06 * heights.sum()
        starts = [np.cumsum([0, *(side[:-1] + gap)]) for side in (heights.sum(1), heights.sum(0))]
        used = [starts[0].copy(), starts[1].copy()]
        for i, before in enumerate(GROUPS):
            for j in range(len(GROUPS)):
                band = heights[i, j]
                _ribbon(ax, (used[0][i], used[0][i] + band), (used[1][j], used[1][j] + band), GROUP_COLOURS[before])
                used[0][i] += band
                used[1][j] += band
        for side, x, align in ((0, 0.0, "right"), (1, 1.0, "left")):
            for i, group in enumerate(GROUPS):
                size = heights.sum(1 - side)[i]
                ax.bar(x, size, bottom=starts[side][i], width=0.05, color=GROUP_COLOURS[group])
                offset = -0.05 if side == 0 else 0.05
                ax.text(x + offset, starts[side][i] + size / 2, group, ha=align, va="center", fontsize=7)
        ax.set(xlim=(-0.55, 1.55), title={"floor": "floor: other calibration sample"}.get(name, name))
        ax.invert_yaxis() if ax is axes[0][0] else None
        ax.axis("off")
    figure.suptitle("Where the units of each group went (before, left; after, right)", x=0.01, ha="left", fontweight="bold")
    figure.supxlabel("heights: square root of the number of units", fontsize=7)
    return figure


def transfer_heat(tables: Tables) -> Figure:
    """Share of each group before (rows) in each group after (columns), in percent."""
    table = final_moves(tables["moves"])
    names = list(dict.fromkeys(table["data"]))
    figure, axes = plt.subplots(1, len(names), figsize=(2.6 * len(names), 2.5), sharey=True, squeeze=False)
    for ax, name in zip(axes[0], names, strict=True):
        shares = table[table["data"] == name].pivot_table(index="before", columns="after", values="share", observed=True)
        values = shares.loc[list(GROUPS), list(GROUPS)].to_numpy() * 100
        ax.imshow(values, cmap="Blues", vmin=0, vmax=100)
        for (row, column), value in np.ndenumerate(values):
            ax.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=8, color="white" if value > 55 else INK)
        ax.set(xticks=range(4), yticks=range(4), xlabel="group after", title=name)
        ax.set_xticklabels(GROUPS, rotation=35, ha="right", fontsize=7)
        ax.set_yticklabels(GROUPS, fontsize=7)
    axes[0][0].set_ylabel("group before")
    figure.suptitle("Share of each group that is in another group after (%)", x=0.01, ha="left", fontweight="bold")
    return figure


def transfer_path(tables: Tables) -> Figure:
    """Share of safety units that left their group, and the margin, against the steps of fine-tuning."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(7.2, 2.6))
    for name, part in tables["path"].groupby("data", sort=False):
        for k, line in part.groupby("seed"):
            label = name if k == part["seed"].min() else None
            left.plot(line["step"], line["left"] * 100, "o-", ms=3, color=DATA_COLOURS[name], label=label, alpha=0.8)
            right.plot(line["step"], line["margin"], "o-", ms=3, color=DATA_COLOURS[name], alpha=0.8)
    moves = tables["moves"]
    stayed = moves[(moves["data"] == "floor") & (moves["before"] == "safety") & (moves["after"] == "safety")]["share"].iloc[0]
    left.axhline(100 * (1 - stayed), color=DATA_COLOURS["floor"], ls="--", label="floor: other calibration sample")
    left.set(xlabel="optimizer step", ylabel="safety units that left (%)", title="Safety units change group", ylim=(0, None))
    right.axhline(0, color=INK, lw=0.6)
    right.set(xlabel="optimizer step", ylabel="log P(refuse) / P(comply), nats", title="The refusal margin falls")
    left.legend(fontsize=7)
    return figure


# ------------------------------------------------------------------------------------------------------- 06_freezing


def freezing_paths(tables: Tables) -> Figure:
    """Margin against task loss along every fine-tuning: to the left is learned, upwards is safe."""
    paths = tables["paths"]
    tasks = list(dict.fromkeys(paths["task"]))
    figure, axes = plt.subplots(1, len(tasks), figsize=(4.3 * len(tasks), 3.1), squeeze=False)
    for ax, task in zip(axes[0], tasks, strict=True):
        for name, part in paths[paths["task"] == task].groupby("condition", sort=False):
            line = part.groupby("step")[["task_loss", "margin"]].mean()
            ax.plot(line["task_loss"], line["margin"], style_of(name), marker="o", ms=3, color=colour_of(name), label=name)
        ax.axhline(0, color=INK, lw=0.6)
        ax.invert_xaxis()
        ax.set(xlabel="task loss, held out (nats per token; learned to the right)", title=f"{task}")
    axes[0][0].set_ylabel("log P(refuse) / P(comply), nats")
    axes[0][0].legend(fontsize=6.5)
    figure.suptitle("Safety against what is learned, step by step (mean over seeds)", x=0.01, ha="left", fontweight="bold")
    return figure


def frontier(tables: Tables) -> Figure:
    """Margin against task loss for every frozen share, one panel per learning rate; right: the gain at equal task loss."""
    table, gains = tables["frontier"], tables["gains"]
    factors = sorted(table["factor"].unique())
    figure, axes = plt.subplots(1, len(factors) + 1, figsize=(3.6 * len(factors) + 3.4, 3.2), squeeze=False)
    colours = plt.get_cmap("viridis_r")
    for ax, factor in zip(axes[0], factors, strict=False):
        for (order, fraction), line in table[table["factor"] == factor].groupby(["order", "fraction"], sort=False):
            style = "--" if order == "random" else "-"
            ax.plot(line["task_loss"], line["margin"], style, marker="o", ms=3, color=colours(0.1 + 0.85 * fraction),
                    label=f"{fraction:.3g} {order}" if fraction else "nothing frozen")  # fmt: skip
        ax.axhline(0, color=INK, lw=0.6)
        ax.invert_xaxis()
        ax.set(xlabel="task loss, held out (nats per token)", title=f"learning rate x {factor:g}")
        ax.legend(fontsize=5.5)
    axes[0][0].set_ylabel("log P(refuse) / P(comply), nats")
    right = axes[0][-1]
    for number, factor in enumerate(factors):
        for order, style in (("safety first", "-"), ("random", "--")):
            line = gains[(gains["factor"] == factor) & (gains["order"] == order)].sort_values("fraction")
            colour = FACTOR_COLOURS[number % len(FACTOR_COLOURS)]
            reach = [line["gain"] - line["low"], line["high"] - line["gain"]]
            right.errorbar(
                line["fraction"], line["gain"], reach, fmt="o" + style, color=colour, lw=1, capsize=2,
                mfc="none" if order == "random" else colour, label=f"{order}, rate x {factor:g}",
            )  # fmt: skip
    right.axhline(0, color=INK, lw=0.6)
    right.set(xlabel="share of units frozen", ylabel="margin gained (nats)", title="Gain at equal task loss")
    right.legend(fontsize=6, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2)
    figure.suptitle("The frontier: above is better", x=0.01, ha="left", fontweight="bold")
    return figure


def freezing_rates(tables: Tables) -> Figure:
    """ASR at the last step under every condition, one panel per task or attack; seeds as single points."""
    rates = tables["rates"]
    tasks = [task for task in dict.fromkeys(rates["task"]) if task != "-"]
    figure, axes = plt.subplots(1, len(tasks), figsize=(2.9 * len(tasks), 3.0), squeeze=False, sharex=True)
    for ax, task in zip(axes[0], tasks, strict=True):
        part = rates[rates["task"].isin([task, "-"])]
        order = list(dict.fromkeys(part["condition"]))
        for row, name in enumerate(order):
            for shift, (source, marker) in zip((-0.15, 0.15), (("harmful", "o"), ("other_harmful", "s")), strict=True):
                chosen = part[(part["condition"] == name) & (part["set"] == source)]
                shown = chosen[chosen["metric"] == "coherent_asr"]
                ax.plot(shown["mean"], [row + shift] * len(shown), marker, color=colour_of(name), ms=4.5,
                        mfc="none" if name.startswith("random") else None, label=source if row == 0 else None)  # fmt: skip
                ax.hlines(row + shift, shown["low"].min(), shown["high"].max(), color=colour_of(name), lw=0.8, alpha=0.5)
        ax.set(yticks=range(len(order)), xlim=(-0.03, 1.03), xlabel="coherent ASR", title=task)
        ax.set_yticklabels(order, fontsize=7)
        ax.invert_yaxis()
    figure.suptitle("Harmful requests answered after fine-tuning (circles AdvBench, squares HarmBench)", x=0.01, ha="left",
                    fontweight="bold")  # fmt: skip
    return figure


# ------------------------------------------------------------------------------------------------ 07_redundant_units

BUDGET_PANELS = {
    ("harmful", "coherent_asr"): "harmful:\ncoherent ASR",
    ("other_harmful", "coherent_asr"): "other source:\ncoherent ASR",
    ("helpful", "refused"): "harmless\nrefused",
    ("safe_twin", "refused"): "safe twins\nrefused",
    ("cloze", "accuracy"): "cloze\naccuracy",
    ("arithmetic", "accuracy"): "arithmetic\nexact match",
    ("helpful", "answer_nll"): "NLL of the\nbase's answers",
}


def alignment_budget(tables: Tables) -> Figure:
    """Alignment reached and tax paid by what was trained, supervised and by preference."""
    rates = tables["rates"]
    rows = list(dict.fromkeys(zip(rates["method"], rates["trained"], strict=True)))
    figure, axes = plt.subplots(1, len(BUDGET_PANELS), figsize=(1.75 * len(BUDGET_PANELS), 0.24 * len(rows) + 1.3), sharey=True)
    for ax, ((name, metric), title) in zip(axes, BUDGET_PANELS.items(), strict=True):
        part = rates[(rates["set"] == name) & (rates["metric"] == metric)]
        for row, (method, trained) in enumerate(rows):
            for _, value in part[(part["method"] == method) & (part["trained"] == trained)].iterrows():
                ax.plot([value["low"], value["high"]], [row, row], color=BUDGET_COLOURS[trained], lw=1)
                ax.plot(
                    value["mean"], row, "o", ms=4, color=BUDGET_COLOURS[trained], mfc="none" if trained == "random" else None
                )
        ax.set_title(title, fontsize=7.5)
        ax.set_xlim((-0.03, 1.03) if metric != "answer_nll" else (0, None))
        ax.tick_params(labelsize=7)
    axes[0].set_yticks(
        range(len(rows)), [name if method == "-" else f"{method.upper()} {name}" for method, name in rows], fontsize=7
    )
    axes[0].invert_yaxis()
    figure.suptitle("What was trained, the alignment it reached and its price (95% intervals)", x=0.01, ha="left",
                    fontweight="bold")  # fmt: skip
    return figure
