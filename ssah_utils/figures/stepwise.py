"""Figures of A2_stepwise. Knows tables only."""

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ssah_utils.figures.style import (
    CONTROL,
    INK,
    MODEL_COLOURS,
    Tables,
    dot_with_interval,
    headline,
    legend_below,
    line_with_band,
)


def direction_steps(tables: Tables) -> Figure:
    """Margin along the answer, per model; share refused against the length of the prefill."""
    steps = tables["steps"]
    models = list(dict.fromkeys(steps["model"]))
    n_queries = steps.groupby(["model", "queries", "attack"])["n"].transform("max")
    # Where few answers still go on, they would be another population.
    steps = steps[steps["n"] >= n_queries / 2]
    n_panels = len(models) + 1
    figure, axes = plt.subplots(1, n_panels, figsize=(3.3 * n_panels, 3.5))
    drawn = steps[steps["attack"].isin(["none", "prefill"])]
    height = (drawn["low"].min() - 0.5, drawn["high"].max() + 0.5)
    for ax, model in zip(axes, models, strict=False):
        draw_steps(ax, drawn[drawn["model"] == model])
        ax.set(title=f"{model}: which way it leans", ylim=height)
    axes[0].set_ylabel("log P(refuse) / P(comply), nats")
    draw_refused(axes[-1], tables["prefills"])
    handles, _ = axes[0].get_legend_handles_labels()
    legend_below(figure, handles, ncols=4, fontsize=7)
    headline(figure, "How long does the reasoning direction hold?")
    return figure


def draw_steps(ax: Axes, table: pd.DataFrame) -> None:
    """One model: no attack on both kinds of request, and a line from the end of every prefill."""
    table = table.sort_values("step")
    none = table[table["attack"] == "none"]
    look = {"colour": CONTROL, "label": "harmless, no attack", "lw": 1.4, "alpha": 0.13}
    harmless = none[none["queries"] == "harmless"]
    line_with_band(ax, harmless["step"], harmless, ":", **look)
    look = {"colour": INK, "label": "harmful, no attack", "lw": 2, "ms": 3, "alpha": 0.13}
    harmful = none[none["queries"] == "harmful"]
    line_with_band(ax, harmful["step"], harmful, "o-", **look)
    forced = table[(table["attack"] == "prefill") & (table["queries"] == "harmful")]
    lengths = sorted(forced["prefill"].unique())
    for number, k in enumerate(lengths):
        part = forced[forced["prefill"] == k]
        colour = plt.get_cmap("plasma")(0.15 + 0.7 * number / max(1, len(lengths) - 1))
        label = f"harmful, {k} token{'s' if k > 1 else ''} prefilled"
        look = {"colour": colour, "label": label, "lw": 1.3, "alpha": 0.13}
        line_with_band(ax, part["step"], part, **look)
        ax.plot(part["step"].iloc[0], part["mean"].iloc[0], "s", color=colour, ms=4.5)
    ax.axhline(0, color=INK, lw=0.6)
    ax.set_xscale("symlog", base=2, linthresh=1)
    ticks = sorted(table["step"].unique())
    ax.set_xticks(ticks, [str(step) for step in ticks], fontsize=7)
    ax.minorticks_off()
    ax.set_xlabel("tokens after the prompt")


def draw_refused(ax: Axes, table: pd.DataFrame) -> None:
    """Share refused against the length of the prefill, 0 for none.

    Off-topic openings and requests in the past tense have no length: they are single points.
    """
    refused = table[table["metric"] == "refused"]
    longest = refused["prefill"].max()
    singles = {"neutral": (longest * 2, "D"), "past tense": (longest * 4, "^")}
    for (model, queries), part in refused.groupby(["model", "queries"], sort=False):
        is_harmless = queries == "harmless"
        if is_harmless and model != "aligned":
            continue
        colour = CONTROL if is_harmless else MODEL_COLOURS[model]
        line = part[part["attack"].isin(["none", "prefill"])].sort_values("prefill")
        look = {"colour": colour, "label": f"{model}, {queries}", "marker": "s", "ms": 3.5}
        style = ":" if is_harmless else "-"
        line_with_band(ax, line["prefill"], line, style, alpha=0.15, **look)
        beside = 1.12 if is_harmless else 1.0 if model == "aligned" else 0.89  # not on each other
        for attack, (place, marker) in singles.items():
            single = part[part["attack"] == attack]
            x = [place * beside] * len(single)
            ax.vlines(x, single["low"], single["high"], color=colour, lw=1)
            fill = "none" if is_harmless else colour
            ax.plot(x, single["mean"], marker, ms=4.5, color=colour, mfc=fill)
    ax.set_xscale("symlog", base=2, linthresh=1)
    lengths = sorted(refused[refused["attack"].isin(["none", "prefill"])]["prefill"].unique())
    ticks = [*lengths, longest * 2, longest * 4]
    ax.set_xticks(ticks, [*map(str, lengths), "off-\ntopic", "past\ntense"], fontsize=7)
    ax.minorticks_off()
    ax.set(ylim=(-0.03, 1.03), ylabel="share refused", xlabel="prefilled tokens")
    ax.set_title("What it then does")
    ax.legend(fontsize=6.5, loc="upper right", bbox_to_anchor=(0.82, 1.0))


def direction_blocks(tables: Tables) -> Figure:
    """How far harmful and harmless requests lie apart along the direction: block by step.

    The direction is the one fitted before the answer.
    """
    blocks = tables["blocks"]
    by_panel = blocks.groupby(["model", "attack", "prefill"], sort=False, dropna=False)
    spread = blocks["mean"].abs().quantile(0.98)  # the first block has outliers
    limit = spread if spread > 0 else 1.0
    layout = {"figsize": (2.3 * len(by_panel) + 0.8, 3.0), "sharey": True, "squeeze": False}
    figure, axes = plt.subplots(1, len(by_panel), **layout)
    look = {"cmap": "PuOr_r", "vmin": -limit, "vmax": limit, "interpolation": "nearest"}
    for ax, ((model, attack, prefill), part) in zip(axes[0], by_panel, strict=True):
        grid = part.pivot_table(index="layer", columns="step", values="mean", dropna=False)
        image = ax.imshow(grid, aspect="auto", origin="lower", **look)
        ax.set_xticks(range(grid.shape[1]), grid.columns, fontsize=7)
        ax.set_xlabel("tokens after the prompt")
        what = "no attack" if attack == "none" else f"{prefill} prefilled"
        ax.set_title(f"{model}, {what}")
    axes[0][0].set_ylabel("block")
    bar = {"label": "harmful - harmless (s.d.)", "shrink": 0.9, "extend": "both"}
    figure.colorbar(image, ax=axes[0].tolist(), **bar)
    headline(figure, "Where, and for how long, harmful is told from harmless")
    return figure


# Trained once more, and with units switched off: name, colour, line style.
CONDITIONS = {
    "aligned": ("aligned, as before", INK, "-"),
    "recovery": ("once more, all parameters", "#0072B2", "-"),
    "without": ("once more, without recovery", CONTROL, "--"),
    "redundant": ("once more, redundant units", "#009E73", "-"),
    "random": ("once more, random units", CONTROL, ":"),
    "safety units off": ("safety units of 03 off", "#D55E00", "-"),
    "safety units found anew off": ("safety units found anew off", "#E69F00", "-"),
    "random units off": ("random units off", CONTROL, "-"),
}
TRAINED = ("aligned", "recovery", "without", "redundant", "random")


def recovered(tables: Tables) -> Figure:
    """Models that were trained once more: their margin and their refusals after a prefill, what it
    costs, and which units carry it.
    """
    refused = tables["recovery"]
    refused = refused[refused["metric"] == "refused"]
    directions = tables["recovery_direction"]
    figure, axes = plt.subplots(1, 4, figsize=(13.5, 3.6))
    present = [name for name in TRAINED if name in set(refused["condition"])]
    harmful = refused[refused["queries"] == "harmful"]
    margins = directions[["condition", "prefill"]].assign(
        mean=directions["margin"], low=directions["margin_low"], high=directions["margin_high"]
    )
    for ax, table in zip(axes, (margins, harmful), strict=False):
        for name in present:
            part = table[table["condition"] == name].sort_values("prefill")
            title, colour, style = CONDITIONS[name]
            look = {"colour": colour, "label": title, "lw": 1.6, "alpha": 0.1}
            line_with_band(ax, part["prefill"], part, style, marker="s", ms=3.5, **look)
        ax.set_xscale("symlog", base=2, linthresh=1)
        ticks = sorted(table["prefill"].unique())
        ax.set_xticks(ticks, [str(k) for k in ticks], fontsize=7)
        ax.minorticks_off()
        ax.set_xlabel("prefilled tokens")
    axes[0].axhline(0, color=INK, lw=0.6)
    axes[0].set(title="Harmful: which way it leans", ylabel="log P(refuse) / P(comply), nats")
    axes[1].set(title="Harmful: what it does", ylabel="share refused", ylim=(-0.03, 1.03))
    longest = refused["prefill"].max()
    price = [("harmless", 0), ("harmless", longest), ("safe twin", 0)]
    named = {("harmless", 0): "harmless", ("harmless", longest): f"harmless,\n{longest} prefilled"}
    named["safe twin", 0] = "safe twins"
    for place, (queries, k) in enumerate(price):
        part = refused[(refused["queries"] == queries) & (refused["prefill"] == k)]
        draw_rows(axes[2], part, present, place * (len(present) + 1))
    middle = (len(present) - 1) / 2
    places = [number * (len(present) + 1) + middle for number in range(len(price))]
    axes[2].set_yticks(places, [named[one] for one in price], fontsize=7.5)
    axes[2].set(title="What it costs", xlabel="share refused")
    off = [name for name in CONDITIONS if name not in TRAINED and name in set(refused["condition"])]
    shown = ["recovery", *off] if off else present[:1]
    part = harmful[harmful["prefill"] == longest]
    draw_rows(axes[3], part, shown, 0)
    labels = ["nothing off" if name == "recovery" else CONDITIONS[name][0] for name in shown]
    axes[3].set_yticks(range(len(shown)), labels, fontsize=7.5)
    axes[3].set(title=f"Who carries it ({longest} prefilled)", xlabel="share refused")
    for ax in axes[2:]:
        ax.invert_yaxis()
        ax.set_xlim(-0.03, 1.03)
    handles, _ = axes[0].get_legend_handles_labels()
    legend_below(figure, handles, ncols=5, fontsize=7)
    headline(figure, "Can the direction be kept? The aligned model, trained once more")
    return figure


def draw_rows(ax: Axes, table: pd.DataFrame, names: list[str], first: int) -> None:
    """A dot with its interval for each condition, down from row ``first``; controls hollow."""
    for row, name in enumerate(names, first):
        _, colour, _ = CONDITIONS[name]
        for _, value in table[table["condition"] == name].iterrows():
            dot_with_interval(ax, row, value, colour, hollow=colour == CONTROL)
