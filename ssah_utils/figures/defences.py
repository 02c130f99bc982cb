"""Figures of A4_defences. Knows tables only."""

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ssah_utils.figures.style import CONTROL, INK, Tables, headline, legend_below

# one colour per mechanism; Okabe and Ito's, which the colour-blind tell apart
MECHANISM_COLOURS = {
    "none": "#000000",
    "units": "#D55E00",
    "start": "#E69F00",
    "loss": "#CC79A7",
    "gradient": "#8C564B",
    "kept": "#0072B2",
    "rate": "#999999",
    "data": "#009E73",
    "adapter": "#56B4E9",
    "both": "#000000",
}
MECHANISM_NAMES = {
    "none": "full fine-tuning",
    "units": "units frozen or pulled",
    "start": "all pulled to the start",
    "loss": "loss of tokens",
    "gradient": "gradient",
    "kept": "weights afterwards",
    "rate": "learning rate",
    "data": "data",
    "adapter": "adapter",
    "both": "two together",
}
ANSWERS = {"yes": ("o", "#0072B2"), "no": ("x", "#D55E00"), "not measured": ("_", CONTROL)}


def defence_frontier(tables: Tables) -> Figure:
    """Margin against task loss along every fine-tuning: learned to the right, safe upwards."""
    paths = tables["paths"]
    tasks = list(dict.fromkeys(paths["task"]))
    figure, axes = plt.subplots(1, len(tasks), figsize=(4.6 * len(tasks), 3.8), squeeze=False)
    for ax, task in zip(axes[0], tasks, strict=True):
        of_task = paths[paths["task"] == task]
        for name, part in of_task.groupby("method", sort=False):
            line = part.groupby("step")[["task_loss", "margin"]].mean()
            mechanism, is_control = part["mechanism"].iloc[0], part["is_control"].iloc[0]
            is_marked = name in ("nothing", "combination")
            look = {"color": MECHANISM_COLOURS[mechanism], "marker": "o", "ms": 3}
            look |= {"lw": 2 if is_marked else 1, "alpha": 0.45 if is_control else 1}
            style = "--" if is_control or name == "combination" else "-"
            ax.plot(line["task_loss"], line["margin"], style, **look)
        ax.axhline(0, color=INK, lw=0.6)
        ax.invert_xaxis()
        ax.set(xlabel="task loss, held out (nats per token; learned to the right)", title=task)
    axes[0][0].set_ylabel("log P(refuse) / P(comply), nats")
    there = [name for name in MECHANISM_COLOURS if name in set(paths["mechanism"])]
    legend_below(figure, [_line_of(name) for name in there], fontsize=7, ncols=5)
    headline(figure, "Safety against what is learned, under every defence (controls dashed, pale)")
    return figure


def _line_of(mechanism: str) -> Line2D:
    is_thick = mechanism in ("none", "both")
    look = {"color": MECHANISM_COLOURS[mechanism], "lw": 2 if is_thick else 1}
    style = "--" if mechanism == "both" else "-"
    return Line2D([], [], ls=style, label=MECHANISM_NAMES[mechanism], **look)


def defence_gains(tables: Tables) -> Figure:
    """Margin kept over full fine-tuning at equal task loss, per method, with its interval; on the
    requests of the study and on fresh ones.
    """
    gains = tables["gains"]
    tasks = list(dict.fromkeys(gains["task"]))
    first = gains[gains["task"] == tasks[0]]
    order = first.sort_values("gain", ascending=False)["method"].tolist()
    order += [name for name in dict.fromkeys(gains["method"]) if name not in order]
    titles = dict(zip(gains["method"], gains["title"], strict=True))
    height = 0.26 * len(order) + 1.5
    layout = {"figsize": (2.2 + 2.9 * len(tasks), height), "squeeze": False, "sharey": True}
    figure, axes = plt.subplots(1, len(tasks), **layout)
    for ax, task in zip(axes[0], tasks, strict=True):
        part = gains[gains["task"] == task].set_index("method")
        for row, name in enumerate(order):
            if name in part.index:
                _draw_gain(ax, row, part.loc[name])
        ax.axvline(0, color=INK, lw=0.6)
        ax.set(title=task, xlabel="margin kept at equal task loss (nats)", yticks=range(len(order)))
        ax.set_yticklabels([titles[name] for name in order], fontsize=7)
    axes[0][0].invert_yaxis()
    marks = [
        Line2D([], [], marker=marker, ls="", color=INK, mfc=fill, label=label)
        for marker, fill, label in (
            ("o", INK, "AdvBench"),
            ("s", INK, "fresh requests"),
            ("o", "none", "control"),
        )
    ]
    legend_below(figure, marks, fontsize=7, ncols=3)
    headline(figure, "What every defence keeps over full fine-tuning (95% intervals)")
    return figure


def _draw_gain(ax: Axes, row: int, found: pd.Series) -> None:
    colour = MECHANISM_COLOURS[found["mechanism"]]
    fill = "none" if found["is_control"] else colour
    for prefix, marker, shift in (("", "o", -0.16), ("fresh_", "s", 0.16)):
        place, ends = row + shift, (found[f"{prefix}low"], found[f"{prefix}high"])
        ax.hlines(place, *ends, color=colour, lw=0.9, alpha=0.6)
        ax.plot(found[f"{prefix}gain"], place, marker, ms=4, color=colour, mfc=fill)


def defence_cards(tables: Tables) -> Figure:
    """The acceptance card of every method: a dot where a criterion is met, a cross where not."""
    cards = tables["cards"].sort_values("met", ascending=False, kind="stable")
    asked = [name for name in cards.columns if name not in ("method", "title", "met", "verdict")]
    size = (2.6 + 0.85 * len(asked), 0.27 * len(cards) + 1.1)
    figure, ax = plt.subplots(figsize=size)
    for row, card in enumerate(cards.itertuples()):
        for column, name in enumerate(asked):
            marker, colour = ANSWERS[getattr(card, name)]
            ax.plot(column, row, marker, color=colour, ms=6, mew=1.6)
        weight = "bold" if card.verdict == "pass" else "normal"
        ax.text(len(asked) - 0.4, row, card.verdict, va="center", fontsize=7, fontweight=weight)
    ax.set(xticks=range(len(asked)), yticks=range(len(cards)), xlim=(-0.5, len(asked) + 0.6))
    ax.set_xticklabels(asked, fontsize=7)
    ax.set_yticklabels(cards["title"], fontsize=7)
    ax.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
    ax.invert_yaxis()
    for side in ax.spines.values():
        side.set_visible(False)
    marks = [
        Line2D([], [], marker=marker, ls="", color=colour, mew=1.6, label=label)
        for label, (marker, colour) in ANSWERS.items()
    ]
    legend_below(figure, marks, fontsize=7, ncols=3)
    headline(figure, "Acceptance cards: what is to be believed of each defence")
    return figure
