"""Figures of A5_recipes. Knows tables only."""

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from ssah_utils.figures.style import CONTROL, INK, SAFETY, UTILITY, Tables, headline

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
    """Every recipe and repetition: refusals reached, harmless refused, effect of the units."""
    goals, effects = tables["goals"], tables["effects"]
    recipes = list(dict.fromkeys(goals["recipe"]))
    size = (7.2, 0.8 + 0.35 * len(recipes))
    figure, axes = plt.subplots(1, 3, figsize=size, sharey=True)
    place = {name: row for row, name in enumerate(reversed(recipes))}
    for ax, sets in zip(
        axes, (("harmful", "other_harmful"), ("safe_twin", "helpful")), strict=False
    ):
        for name in sets:
            colour, _, label = RATES[name]
            part = goals[goals["set"] == name]
            ax.plot(
                100 * part["mean"], part["recipe"].map(place), "o", ms=4, color=colour, label=label
            )
        ax.set(xlabel="requests (%)", xlim=(-3, 103))
        ax.legend(fontsize=6, loc="upper center", bbox_to_anchor=(0.5, -0.25))
    axes[0].set(yticks=list(place.values()), yticklabels=list(place))
    largest = effects[effects["fraction"] == effects["fraction"].max()]
    for name, colour in (("safety", SAFETY), ("random", CONTROL)):
        rows = largest["recipe"].map(place)
        axes[2].plot(largest[name], rows, "o", ms=4, color=colour, label=f"{name} units off")
    axes[2].axvline(0, color=INK, lw=0.6)
    axes[2].set(xlabel="points of coherent ASR added")
    axes[2].legend(fontsize=6, loc="upper center", bbox_to_anchor=(0.5, -0.25))
    headline(figure, "Recipes on development requests, one dot a training")
    return figure
