"""The paper's tables as figures, ours beside its numbers.

Filled markers are ours, open ones the paper's. Knows stored tables and
``data/paper_tables.yaml``. Loads no model.
"""

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ssah_utils import paper as paper_numbers
from ssah_utils.figures.freezing import FROZEN_COLOURS, titles_of
from ssah_utils.figures.style import CONTROL, INK, SAFETY, UTILITY, Tables, legend_below
from ssah_utils.frozen_sets import RANDOM

WIDTH = 7.0  # inches: both columns of a two-column page
PAPER_MARKERS = ("D", "^")
PEFT_METHODS = ("lora", "llama-adapter", "prefix")


# ---------------------------------------------------------------------------------------- dot plots


def panels(
    rows: list[str], titles: list[str], ratios: list[float] | None = None
) -> tuple[Figure, list[Axes]]:
    """One row of axes that share the named rows, first on top, with room for a legend below."""
    layout = {"figsize": (WIDTH, 0.2 * len(rows) + 1.15), "width_ratios": ratios}
    figure, axes = plt.subplots(1, len(titles), sharey=True, squeeze=False, **layout)
    for ax, title in zip(axes[0], titles, strict=True):
        ax.set_title(title, fontsize=8.5)
        ax.set(yticks=range(len(rows)), yticklabels=rows, ylim=(len(rows) - 0.4, -0.6))
        ax.grid(axis="y", lw=0.3, color="#DDDDDD")
        ax.tick_params(axis="y", length=0, labelsize=8)
    return figure, list(axes[0])


def ours(
    ax: Axes,
    row: float,
    part: pd.DataFrame,
    value: str = "mean",
    scale: float = 1,
    colour: str = SAFETY,
) -> None:
    """Mean of the rows of ``part`` (seeds or draws) and the envelope of their intervals.

    Nothing is drawn where there are no rows.
    """
    values = part[value].astype(float).dropna() * scale
    if values.empty:
        return
    if {"low", "high"} <= set(part.columns):
        low, high = part["low"].min() * scale, part["high"].max() * scale
    else:
        low, high = values.min(), values.max()
    ax.plot([low, high], [row, row], color=colour, lw=1.4)
    ax.plot(values.mean(), row, "o", color=colour, ms=4.5)


def paper(ax: Axes, row: float, value: float, which: int = 0) -> None:
    """A number of the paper; ``which``: of its models or data sets."""
    ax.plot(value, row, PAPER_MARKERS[which], mfc="none", mec=INK, ms=5, mew=0.9)


def legend(figure: Figure, names: dict[str, str], theirs: list[str]) -> None:
    """Filled markers by colour, then the paper's open ones."""
    filled = {"marker": "o", "ms": 4.5, "lw": 1.4}
    handles = [Line2D([], [], color=names[name], label=name, **filled) for name in names]
    open_ones = {"color": INK, "mfc": "none", "ms": 5, "ls": ""}
    for marker, name in zip(PAPER_MARKERS, theirs, strict=False):
        handles.append(Line2D([], [], marker=marker, label=f"paper, {name}", **open_ones))
    legend_below(figure, handles, ncols=len(handles), fontsize=7.5, columnspacing=1.2)


# ------------------------------------------------------------------------------- the paper's tables


def table1_ablation(tables: Tables) -> Figure:
    """Table 1: change of ASR and utility when a group is off; random control, paper's models."""
    found, theirs = tables["differences"], paper_numbers.table("table1")
    measured = set(found["condition"])
    groups = [one for one in ("safety", "utility", "complex", "redundant") if one in measured]
    models = list(dict.fromkeys(theirs["model"]))
    titles = ["change in ASR, points", "in coherent ASR, points", "in utility, points"]
    figure, axes = panels(groups, titles)
    columns = [
        ("harmful", "asr", "asr"),
        ("harmful", "coherent_asr", "asr"),
        ("cloze", "accuracy", "utility"),
    ]
    for ax, (name, metric, column) in zip(axes, columns, strict=True):
        part = found[(found["set"] == name) & (found["metric"] == metric)]
        for row, group in enumerate(groups):
            ablated = part[part["condition"] == group]
            control = part[part["condition"] == f"random, as {group}"]
            ours(ax, row - 0.12, ablated, "difference", 100)
            ours(ax, row + 0.12, control, "difference", 100, CONTROL)
            for _, one in theirs[theirs["ablated"] == group].iterrows():
                paper(ax, row, one[column], models.index(one["model"]))
        ax.axvline(0, color=INK, lw=0.6)
    legend(figure, {"ours": SAFETY, "random units": CONTROL}, models)
    return figure


def frozen_conditions(table: pd.DataFrame) -> dict[str, str]:
    """Titles of the frozen sets of a table by their ids, in the order they were measured in.

    A random control follows its original; methods of PEFT are left out.
    """
    titles = titles_of(table)
    originals = [name for name in titles if name in FROZEN_COLOURS and name not in PEFT_METHODS]
    ordered = [name for one in originals for name in (one, f"{RANDOM}{one}")]
    return {name: titles[name] for name in ordered if name in titles}


def frozen_colour(condition: str, colour: str = SAFETY) -> str:
    """``colour``, or that of a control where random units were frozen."""
    return CONTROL if condition.startswith(RANDOM) else colour


def table2_freezing(tables: Tables) -> Figure:
    """Table 2: harmful requests answered after fine-tuning with units frozen, and margin gained.

    Ours on AdvBench and HarmBench, the paper's on AdvBench and HEx-PHI, after fine-tuning on Alpaca
    and Dolly. The margin is ours alone, gained at equal task loss.
    """
    rates, theirs = tables["rates"], paper_numbers.table("table2")
    rates = rates[rates["task"].isin(["-", "adaptation"])]
    conditions = frozen_conditions(rates)
    titles = ["ASR, AdvBench, %", "HarmBench / HEx-PHI, %", "margin gained, nats"]
    figure, axes = panels(list(conditions.values()), titles)
    columns = [("harmful", "asr", "asr"), ("other_harmful", "asr", "hexphi")]
    data = ["Alpaca", "Dolly"]
    for ax, (name, metric, column) in zip(axes, columns, strict=False):
        part = rates[(rates["set"] == name) & (rates["metric"] == metric)]
        for row, condition in enumerate(conditions):
            frozen = part[part["condition"] == condition]
            ours(ax, row, frozen, scale=100, colour=frozen_colour(condition))
            for _, one in theirs[theirs["frozen"] == condition].iterrows():
                paper(ax, row, one[column], data.index(one["data"]) if one["data"] in data else 0)
    gains = tables["equal"][tables["equal"]["task"] == "adaptation"]
    for row, condition in enumerate(conditions):
        gain = gains[gains["condition"] == condition]
        ours(axes[2], row, gain, "gain", colour=frozen_colour(condition))
    axes[2].axvline(0, color=INK, lw=0.6)
    names = {"ours": SAFETY, "random units frozen": CONTROL}
    legend(figure, names, [f"Llama2-7B-Chat, {name}" for name in data])
    return figure


def table3_task(tables: Tables) -> Figure:
    """Table 3: task loss at the last step, by what was frozen.

    The paper calls its task performance comparable.
    """
    paths = tables["paths"]
    conditions = frozen_conditions(paths)
    tasks = list(dict.fromkeys(paths["task"]))
    figure, axes = panels(list(conditions.values()), [f"{task}: task loss, nats" for task in tasks])
    for ax, task in zip(axes, tasks, strict=True):
        part = paths[paths["task"] == task]
        last = part[part["step"] == part["step"].max()]
        full = last[last["condition"] == "nothing"]["task_loss"].mean()
        ax.axvspan(0.98 * full, 1.02 * full, color=CONTROL, alpha=0.2, lw=0)
        for row, name in enumerate(conditions):
            frozen = last[last["condition"] == name]
            ours(ax, row, frozen, "task_loss", colour=frozen_colour(name, UTILITY))
    what = "ours (range over seeds; band: 2% about full fine-tuning)"
    legend(figure, {what: UTILITY, "random units frozen": CONTROL}, [])
    return figure


def table4_budget(tables: Tables) -> Figure:
    """Table 4: what training a budget of units alone gives.

    Ours are arithmetic and safety, the paper's GSM8K and MT-Bench.
    """
    rates, theirs = tables["rates"], paper_numbers.table("table4").set_index("trained")
    rates = rates[rates["method"].isin(["-", "sft"])]
    names = list(dict.fromkeys(rates["trained"]))
    titles = [
        "arithmetic (paper: GSM8K), %",
        "harmful requests answered, %",
        "MT-Bench, paper only",
    ]
    figure, axes = panels(names, titles, [1.2, 1.2, 0.9])
    columns = [("arithmetic", "accuracy"), ("harmful", "coherent_asr")]
    for row, name in enumerate(names):
        of_name = rates[rates["trained"] == name]
        colour = CONTROL if name == "random" else SAFETY
        for ax, (source, metric) in zip(axes, columns, strict=False):
            part = of_name[(of_name["set"] == source) & (of_name["metric"] == metric)]
            ours(ax, row, part, scale=100, colour=colour)
        if name in theirs.index:
            paper(axes[0], row, theirs.loc[name, "gsm8k"])
            paper(axes[2], row, theirs.loc[name, "mt_bench"])
    axes[1].set_xlim(-3, 103)
    axes[2].set_xlim(1, 5)
    legend(figure, {"ours": SAFETY, "random units": CONTROL}, ["Llama2-7B"])
    return figure


def table5_adapters(tables: Tables) -> Figure:
    """Table 5: parameter-efficient methods.

    Ours is the margin minus that of full fine-tuning at equal loss, the paper's harmfulness.
    """
    theirs = paper_numbers.table("table5").set_index("method")
    names = [name for name in theirs.index if name != "before"]
    titles = ["ours: margin minus full fine-tuning, nats", "paper: harmfulness (1 to 5)"]
    figure, axes = panels(names, titles)
    peft = tables["peft"][tables["peft"]["against"] == "nothing"]
    equal = tables["equal"]
    is_frozen = (equal["task"] == "adaptation") & (equal["condition"] == "safety_some_complex")
    frozen = equal[is_frozen]
    for row, name in enumerate(names):
        if name == "full":
            axes[0].plot(0, row, "|", color=INK, ms=8)
        ours(axes[0], row, frozen if name == "frozen" else peft[peft["method"] == name], "gain")
        for which, data in enumerate(("Alpaca", "Dolly")):
            paper(axes[1], row, theirs.loc[name, data], which)
    axes[0].axvline(0, color=INK, lw=0.6)
    axes[1].axvline(theirs.loc["before", "Alpaca"], color=INK, lw=0.6, ls=":")
    legend(figure, {"ours": SAFETY}, ["Alpaca", "Dolly"])
    return figure
