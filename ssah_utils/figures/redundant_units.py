"""Figures of 07_redundant_units. Knows tables only."""

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from ssah_utils.figures.style import CONTROL, INK, Tables

BUDGET_COLOURS = {
    "before": INK,
    "all": "#000000",
    "redundant": "#009E73",
    "random": CONTROL,
    "top": "#0072B2",
    "safety": "#D55E00",
}


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
    figure, axes = plt.subplots(
        1,
        len(BUDGET_PANELS),
        figsize=(1.75 * len(BUDGET_PANELS), 0.24 * len(rows) + 1.3),
        sharey=True,
    )
    for ax, ((name, metric), title) in zip(axes, BUDGET_PANELS.items(), strict=True):
        part = rates[(rates["set"] == name) & (rates["metric"] == metric)]
        for row, (method, trained) in enumerate(rows):
            for _, value in part[
                (part["method"] == method) & (part["trained"] == trained)
            ].iterrows():
                ax.plot(
                    [value["low"], value["high"]], [row, row], color=BUDGET_COLOURS[trained], lw=1
                )
                ax.plot(
                    value["mean"],
                    row,
                    "o",
                    ms=4,
                    color=BUDGET_COLOURS[trained],
                    mfc="none" if trained == "random" else None,
                )
        ax.set_title(title, fontsize=7.5)
        ax.set_xlim((-0.03, 1.03) if metric != "answer_nll" else (0, None))
        ax.tick_params(labelsize=7)
    axes[0].set_yticks(
        range(len(rows)),
        [name if method == "-" else f"{method.upper()} {name}" for method, name in rows],
        fontsize=7,
    )
    axes[0].invert_yaxis()
    figure.suptitle(
        "What was trained, the alignment it reached and its price (95% intervals)",
        x=0.01,
        ha="left",
        fontweight="bold",
    )
    return figure
