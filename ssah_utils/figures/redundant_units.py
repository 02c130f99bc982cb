"""Figures of 07_redundant_units. Knows tables only."""

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from ssah_utils.figures.style import CONTROL, INK, Tables, dot_with_interval, headline

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
    size = (1.75 * len(BUDGET_PANELS), 0.24 * len(rows) + 1.3)
    figure, axes = plt.subplots(1, len(BUDGET_PANELS), figsize=size, sharey=True)
    for ax, ((name, metric), title) in zip(axes, BUDGET_PANELS.items(), strict=True):
        part = rates[(rates["set"] == name) & (rates["metric"] == metric)]
        for row, (method, trained) in enumerate(rows):
            values = part[(part["method"] == method) & (part["trained"] == trained)]
            for _, value in values.iterrows():
                colour, hollow = BUDGET_COLOURS[trained], trained == "random"
                dot_with_interval(ax, row, value, colour, hollow)
        ax.set_title(title, fontsize=7.5)
        ax.set_xlim((-0.03, 1.03) if metric != "answer_nll" else (0, None))
        ax.tick_params(labelsize=7)
    names = [name if method == "-" else f"{method.upper()} {name}" for method, name in rows]
    axes[0].set_yticks(range(len(rows)), names, fontsize=7)
    axes[0].invert_yaxis()
    headline(figure, "What was trained, the alignment it reached and its price (95% intervals)")
    return figure
