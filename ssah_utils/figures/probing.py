"""The figure of 02_probing, as a function from its stored tables to a ``Figure``."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from ssah_utils.figures.style import INK, MODEL_COLOURS, Tables, band


def distances_and_margins(tables: Tables) -> Figure:
    """Left: the paper's quantity. Middle: the same for harmful minus harmless queries. Right: the
    behavioural margin.
    """
    figure, (left, middle, right) = plt.subplots(
        1, 3, figsize=(9.6, 2.9), width_ratios=[1.15, 1, 0.9]
    )
    for (model, queries), part in tables["distances"].groupby(["model", "queries"], sort=False):
        band(
            left,
            part,
            MODEL_COLOURS[model],
            f"{model}, {queries}",
            "-" if queries == "harmful" else ":",
        )
    left.set(
        title="As in the paper: refusal - compliance",
        ylabel="difference in cosine distance",
        xlabel="block",
    )
    left.legend(fontsize=6.5)
    for model, part in tables["residual"].groupby("model", sort=False):
        band(middle, part, MODEL_COLOURS[model], model)
    middle.set(
        title="Harmful minus harmless", ylabel="difference in cosine distance", xlabel="block"
    )
    middle.legend(fontsize=6.5)
    for ax in (left, middle):
        ax.axhline(0, color=INK, lw=0.6)
    margins = tables["margins"]
    models, kinds = list(dict.fromkeys(margins["model"])), ["harmless", "harmful"]
    for position, (model, kind) in enumerate((m, k) for m in models for k in kinds):
        values = margins[(margins["model"] == model) & (margins["queries"] == kind)][
            "margin"
        ].to_numpy()
        jitter = np.random.default_rng(0).uniform(-0.16, 0.16, len(values))
        right.scatter(position + jitter, values, s=5, color=MODEL_COLOURS[model], alpha=0.5, lw=0)
        right.hlines(values.mean(), position - 0.3, position + 0.3, color=INK, lw=1.6)
    right.axhline(0, color=INK, lw=0.6)
    right.set_xticks(
        range(len(models) * 2),
        [f"{model}\n{kind}" for model in models for kind in kinds],
        fontsize=6.5,
    )
    right.set(title="Behavioural margin", ylabel="log P(refuse) / P(comply), nats")
    return figure
