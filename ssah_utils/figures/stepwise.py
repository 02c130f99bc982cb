"""Figures of A2_stepwise, as functions from its stored tables to a ``Figure``."""

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ssah_utils.figures.style import CONTROL, INK, MODEL_COLOURS, Tables


def _line(ax: Axes, part: pd.DataFrame, colour, label: str | None, **style) -> None:
    part = part.sort_values("step")
    ax.plot(part["step"], part["mean"], color=colour, label=label, **style)
    ax.fill_between(part["step"], part["low"], part["high"], color=colour, alpha=0.13, lw=0)


def _steps(ax: Axes, table: pd.DataFrame) -> None:
    """One model: no attack on both kinds of request, and one line from the end of every
    prefill on.
    """
    none = table[table["attack"] == "none"]
    _line(ax, none[none["queries"] == "harmless"], CONTROL, "harmless, no attack", ls=":", lw=1.4)
    _line(ax, none[none["queries"] == "harmful"], INK, "harmful, no attack", lw=2, marker="o", ms=3)
    forced = table[(table["attack"] == "prefill") & (table["queries"] == "harmful")]
    lengths = sorted(forced["prefill"].unique())
    for number, k in enumerate(lengths):
        part = forced[forced["prefill"] == k].sort_values("step")
        colour = plt.get_cmap("plasma")(0.15 + 0.7 * number / max(1, len(lengths) - 1))
        _line(ax, part, colour, f"harmful, {k} token{'s' if k > 1 else ''} prefilled", lw=1.3)
        ax.plot(part["step"].iloc[0], part["mean"].iloc[0], "s", color=colour, ms=4.5)
    ax.axhline(0, color=INK, lw=0.6)
    ax.set_xscale("symlog", base=2, linthresh=1)
    ticks = sorted(table["step"].unique())
    ax.set_xticks(ticks, [str(step) for step in ticks], fontsize=7)
    ax.minorticks_off()
    ax.set_xlabel("tokens after the prompt")


def _refused(ax: Axes, table: pd.DataFrame) -> None:
    """Share refused against the length of the prefill, 0 for none; off-topic openings and past
    tense as single points.
    """
    refused = table[table["metric"] == "refused"]
    longest = refused["prefill"].max()
    for (model, queries), part in refused.groupby(["model", "queries"], sort=False):
        if queries == "harmless" and model != "aligned":
            continue
        colour = CONTROL if queries == "harmless" else MODEL_COLOURS[model]
        line = part[part["attack"].isin(["none", "prefill"])].sort_values("prefill")
        ax.plot(
            line["prefill"],
            line["mean"],
            ":" if queries == "harmless" else "-",
            marker="s",
            ms=3.5,
            color=colour,
            label=f"{model}, {queries}",
        )
        ax.fill_between(line["prefill"], line["low"], line["high"], color=colour, alpha=0.15, lw=0)
        for place, (attack, marker) in enumerate((("neutral", "D"), ("past tense", "^")), 1):
            single = part[part["attack"] == attack]
            x = [longest * 2**place] * len(single)
            x = [
                value * {"harmless": 1.12}.get(queries, 1.0 if model == "aligned" else 0.89)
                for value in x
            ]
            ax.vlines(x, single["low"], single["high"], color=colour, lw=1)
            ax.plot(
                x,
                single["mean"],
                marker,
                ms=4.5,
                color=colour,
                mfc="none" if queries == "harmless" else colour,
            )
    ax.set_xscale("symlog", base=2, linthresh=1)
    lengths = sorted(refused[refused["attack"].isin(["none", "prefill"])]["prefill"].unique())
    ax.set_xticks(
        [*lengths, longest * 2, longest * 4],
        [*map(str, lengths), "off-\ntopic", "past\ntense"],
        fontsize=7,
    )
    ax.minorticks_off()
    ax.set(
        ylim=(-0.03, 1.03),
        ylabel="share refused",
        xlabel="prefilled tokens",
        title="What it then does",
    )
    ax.legend(fontsize=6.5, loc="upper right", bbox_to_anchor=(0.82, 1.0))


def direction_steps(tables: Tables) -> Figure:
    """How long the direction holds: margin along the answer per model, and the share refused
    against the prefill.
    """
    steps = tables["steps"]
    models = list(dict.fromkeys(steps["model"]))
    n_queries = steps.groupby(["model", "queries", "attack"])["n"].transform("max")
    # Where few answers still go on, they would be another population.
    steps = steps[steps["n"] >= n_queries / 2]
    widths = [*[3.3] * len(models), 3.3]
    figure, axes = plt.subplots(1, len(widths), figsize=(sum(widths), 3.5), width_ratios=widths)
    drawn = steps[steps["attack"].isin(["none", "prefill"])]
    for ax, model in zip(axes, models, strict=False):
        _steps(ax, drawn[drawn["model"] == model])
        ax.set(
            title=f"{model}: which way it leans",
            ylim=(drawn["low"].min() - 0.5, drawn["high"].max() + 0.5),
        )
    axes[0].set_ylabel("log P(refuse) / P(comply), nats")
    _refused(axes[-1], tables["prefills"])
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=7
    )
    figure.suptitle(
        "How long does the reasoning direction hold?", x=0.01, ha="left", fontweight="bold"
    )
    return figure


def direction_blocks(tables: Tables) -> Figure:
    """Separation of harmful from harmless requests along the direction fitted before the answer:
    block by step.
    """
    blocks = tables["blocks"]
    panels = list(
        dict.fromkeys(zip(blocks["model"], blocks["attack"], blocks["prefill"], strict=True))
    )
    spread = blocks["mean"].abs().quantile(0.98)  # the first block has outliers
    limit = spread if spread > 0 else 1.0
    figure, axes = plt.subplots(
        1, len(panels), figsize=(2.3 * len(panels) + 0.8, 3.0), sharey=True, squeeze=False
    )
    for ax, (model, attack, prefill) in zip(axes[0], panels, strict=True):
        part = blocks[
            (blocks["model"] == model)
            & (blocks["attack"] == attack)
            & (blocks["prefill"] == prefill)
        ]
        grid = part.pivot_table(index="layer", columns="step", values="mean", dropna=False)
        image = ax.imshow(
            grid,
            aspect="auto",
            origin="lower",
            cmap="PuOr_r",
            vmin=-limit,
            vmax=limit,
            interpolation="nearest",
        )
        ax.set_xticks(range(grid.shape[1]), grid.columns, fontsize=7)
        ax.set(
            xlabel="tokens after the prompt",
            title=f"{model}, " + ("no attack" if attack == "none" else f"{prefill} prefilled"),
        )
        ax.title.set_fontsize(8)
    axes[0][0].set_ylabel("block")
    figure.colorbar(
        image, ax=axes[0].tolist(), label="harmful - harmless (s.d.)", shrink=0.9, extend="both"
    )
    figure.suptitle(
        "Where, and for how long, harmful is told from harmless",
        x=0.01,
        ha="left",
        fontweight="bold",
    )
    return figure
