"""Figures of A5_recipes. Knows tables only."""

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from ssah_utils.figures.style import CONTROL, INK, SAFETY, UTILITY, Tables, headline, legend_below

RATES = {  # which sets are followed along a training: colour, and what counts
    "harmful": (SAFETY, "asr", "ASR, harmful"),
    "other_harmful": ("#CC79A7", "asr", "ASR, other source"),
    "safe_twin": ("#56B4E9", "refused", "safe twins refused"),
    "helpful": (UTILITY, "refused", "harmless refused"),
}


def recipe_path(tables: Tables) -> Figure:
    """Along one training: what the model does, and what switching its safety units off adds."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(7.2, 2.8))
    rows = tables["path"]
    intact = rows[rows["switched_off"] == "nothing"]
    for name, (colour, metric, label) in RATES.items():
        part = intact[(intact["set"] == name) & (intact["metric"] == metric)]
        left.plot(part["step"], 100 * part["mean"], "o-", ms=3, color=colour, label=label)
    left.set(xlabel="optimizer step", ylabel="requests (%)", ylim=(-3, 103))
    left.set_title("What the model does")
    left.legend(fontsize=7)
    styles = ("o-", "s--", "^:")
    found = tables["effects_path"]
    for style, (fraction, part) in zip(styles, found.groupby("fraction"), strict=False):
        share = f"{fraction:.1%}"
        look = {"ms": 3}
        right.plot(
            part["step"], part["safety"], style, color=SAFETY, label=f"safety {share}", **look
        )
        right.plot(
            part["step"], part["random"], style, color=CONTROL, label=f"random {share}", **look
        )
    right.axhline(0, color=INK, lw=0.6)
    right.set(xlabel="optimizer step", ylabel="points of coherent ASR added")
    right.set_title("What its units carry")
    right.legend(fontsize=7)
    headline(figure, "Where in the training the effect begins")
    return figure


def recipe_effects(tables: Tables) -> Figure:
    """Every recipe and repetition: harmful answered, harmless refused, effect of the units."""
    goals, effects = tables["goals"], tables["effects"]
    recipes = list(dict.fromkeys(goals["recipe"]))
    size = (7.2, 1.2 + 0.3 * len(recipes))
    figure, axes = plt.subplots(1, 3, figsize=size, sharey=True)
    place = {name: row for row, name in enumerate(reversed(recipes))}
    look = {"ls": "", "ms": 4, "alpha": 0.8}
    panels = {
        "answered (%)": ("harmful", "other_harmful"),
        "refused (%)": ("safe_twin", "helpful"),
    }
    for ax, (unit, sets) in zip(axes, panels.items(), strict=False):
        for name, marker in zip(sets, "o^", strict=True):
            colour, _, label = RATES[name]
            part = goals[goals["set"] == name]
            rows = part["recipe"].map(place)
            ax.plot(100 * part["mean"], rows, marker, color=colour, label=label, **look)
        ax.set(xlabel=unit, xlim=(-3, 103))
    axes[0].set(yticks=list(place.values()), yticklabels=list(place))
    largest = effects[effects["fraction"] == effects["fraction"].max()]
    rows = largest["recipe"].map(place)
    for name, marker, colour in (("safety", "o", SAFETY), ("random", "^", CONTROL)):
        label = f"{name} units off"
        axes[2].plot(largest[name], rows, marker, color=colour, label=label, **look)
    axes[2].axvline(0, color=INK, lw=0.6)
    axes[2].set(xlabel="coherent ASR added (points)", ylim=(-0.5, len(recipes) - 0.5))
    handles = [handle for ax in axes for handle in ax.get_legend_handles_labels()[0]]
    legend_below(figure, handles, ncols=3)
    headline(figure, "Recipes on development requests, one dot a training")
    return figure
