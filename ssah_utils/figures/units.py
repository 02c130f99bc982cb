"""Figures of 03_units. Knows tables only."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from ssah_utils.figures.style import GROUP_COLOURS, INK, SAFETY, UTILITY, legend_below
from ssah_utils.units import GROUPS


def one_unit(values: pd.DataFrame, unit: str) -> Figure:
    """Activation of one unit along the answers to a few requests.

    ``values``: request (its name in the legend), set (``harmful``, ``helpful``), position (in the
    order of what is scored), value.
    """
    figure, ax = plt.subplots(figsize=(6.4, 2.4))
    colours = {"harmful": SAFETY, "helpful": UTILITY}
    for (request, name), part in values.groupby(["request", "set"], sort=False):
        label = f"{request} (variance {part['value'].var():.2g})"
        ax.plot(part["position"], part["value"], "o-", ms=2.5, color=colours[name], label=label)
    ax.axhline(0, color=INK, lw=0.6, ls=":")
    ax.set(xlabel="scored position", ylabel="activation", title=f"One unit: {unit}")
    ax.legend(fontsize=7)
    return figure


def score_histograms(units: pd.DataFrame) -> Figure:
    """Standardised scores on both kinds of data, by kind of unit."""
    figure, axes = plt.subplots(1, 2, figsize=(7.0, 2.3), sharey=True)
    for ax, kind in zip(axes, ("attention", "mlp"), strict=True):
        part = units[units["kind"] == kind]
        bins = np.linspace(-1, np.quantile(part[["z_safety", "z_utility"]], 0.999), 60)
        for name, colour in (("safety", SAFETY), ("utility", UTILITY)):
            scores = part[f"z_{name}"].clip(upper=bins[-1])
            ax.hist(scores, bins, histtype="step", color=colour, label=f"on {name} data")
        ax.set(yscale="log", xlabel="score, standardised within module (z)")
        ax.set_title(f"{kind}: few units stand out")
    axes[0].set_ylabel("units")
    axes[0].legend()
    return figure


def score_scatter(units: pd.DataFrame) -> Figure:
    """Score on safety data against score on utility data, coloured by group."""
    figure, ax = plt.subplots(figsize=(4.4, 3.6))
    for group in ("redundant", "complex", "utility", "safety"):  # the rarest on top
        part = units[units["group"] == group]
        label = f"{group} ({len(part) / len(units):.1%})"
        look = {"s": 3, "lw": 0, "alpha": 0.6, "color": GROUP_COLOURS[group], "rasterized": True}
        ax.scatter(part["z_utility"], part["z_safety"], label=label, **look)
    limit = float(np.quantile(units[["z_safety", "z_utility"]].abs(), 0.9999))
    ax.plot([-1, limit], [-1, limit], color=INK, lw=0.6, ls="--")
    ax.set(xscale="symlog", xlabel="z on utility data")
    ax.set(yscale="symlog", ylabel="z on safety data")
    ax.set_title("Safety units lie above the diagonal")
    ax.legend(markerscale=4, loc="upper left", fontsize=7)
    return figure


def group_map(units: pd.DataFrame) -> Figure:
    """Share of each block's units in a group, for both kinds: where the groups sit."""
    figure, axes = plt.subplots(1, 4, figsize=(9.0, 2.4), sharex=True)
    by_block = units.groupby(["kind", "layer"], observed=True)["group"]
    shares = by_block.value_counts(normalize=True).rename("share").reset_index()
    for ax, group in zip(axes, GROUPS, strict=True):
        of_group = shares[shares["group"] == group]
        for kind, style in (("attention", "--"), ("mlp", "-")):
            line = of_group[of_group["kind"] == kind].sort_values("layer")
            look = {"color": GROUP_COLOURS[group], "label": kind}
            ax.plot(line["layer"], line["share"] * 100, style, **look)
        ax.set(title=group, xlabel="block", ylim=(0, None))
    axes[0].set_ylabel("share of the block's units (%)")
    axes[0].legend(fontsize=7)
    return figure


def unit_grid(units: pd.DataFrame) -> Figure:
    """Every unit as one pixel, channels of a module sorted by group."""
    figure, axes = plt.subplots(1, 2, figsize=(7.4, 2.6), width_ratios=[1, 1.8])
    colours = [GROUP_COLOURS[group] for group in GROUPS]
    look = {"cmap": ListedColormap(colours), "vmin": 0, "vmax": 3, "interpolation": "nearest"}
    n_layers = units["layer"].max() + 1
    for ax, kind in zip(axes, ("attention", "mlp"), strict=True):
        codes = units[units["kind"] == kind]["group"].cat.codes.to_numpy()
        ax.imshow(np.sort(codes.reshape(n_layers, -1), 1), aspect="auto", **look)
        ax.set(title=kind, xlabel="channels, sorted by group")
    axes[0].set_ylabel("block")
    squares = [
        plt.Rectangle((0, 0), 1, 1, color=colour, label=group)
        for group, colour in zip(GROUPS, colours, strict=True)
    ]
    legend_below(figure, squares, ncols=4)
    return figure
