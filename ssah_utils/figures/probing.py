"""The figure of 02_probing. Knows tables only."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from ssah_utils.figures.style import INK, MODEL_COLOURS, Tables, line_with_band


def distances_and_margins(tables: Tables) -> Figure:
    """The paper's quantity; the same for harmful minus harmless queries; the behavioural margin."""
    layout = {"figsize": (9.6, 2.9), "width_ratios": [1.15, 1, 0.9]}
    figure, (left, middle, right) = plt.subplots(1, 3, **layout)
    for (model, queries), part in tables["distances"].groupby(["model", "queries"], sort=False):
        look = {"colour": MODEL_COLOURS[model], "label": f"{model}, {queries}"}
        line_with_band(left, part["layer"], part, "-" if queries == "harmful" else ":", **look)
    for model, part in tables["residual"].groupby("model", sort=False):
        look = {"colour": MODEL_COLOURS[model], "label": model}
        line_with_band(middle, part["layer"], part, **look)
    left.set_title("As in the paper: refusal - compliance")
    middle.set_title("Harmful minus harmless")
    for ax in (left, middle):
        ax.axhline(0, color=INK, lw=0.6)
        ax.set(ylabel="difference in cosine distance", xlabel="block")
        ax.legend(fontsize=6.5)
    margins, kinds = tables["margins"], ("harmless", "harmful")
    columns = [(model, kind) for model in dict.fromkeys(margins["model"]) for kind in kinds]
    for position, (model, kind) in enumerate(columns):
        rows = margins[(margins["model"] == model) & (margins["queries"] == kind)]
        values = rows["margin"].to_numpy()
        jitter = np.random.default_rng(0).uniform(-0.16, 0.16, len(values))
        right.scatter(position + jitter, values, s=5, color=MODEL_COLOURS[model], alpha=0.5, lw=0)
        right.hlines(values.mean(), position - 0.3, position + 0.3, color=INK, lw=1.6)
    right.axhline(0, color=INK, lw=0.6)
    names = [f"{model}\n{kind}" for model, kind in columns]
    right.set_xticks(range(len(columns)), names, fontsize=6.5)
    right.set(title="Behavioural margin", ylabel="log P(refuse) / P(comply), nats")
    return figure
