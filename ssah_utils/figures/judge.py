"""Figures of A1_judge. Knows tables only."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from ssah_utils.figures.style import CASE_COLOURS, CONTROL, INK, MODEL_COLOURS, Tables


def judge_validation(tables: Tables) -> Figure:
    """Left: refusals found, against labels by people. Right: real answers and gibberish, and the
    line the judge draws.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.0, 2.8), width_ratios=[1, 1.4])
    refusals = tables["judge_refusals"]
    parts, judges = list(dict.fromkeys(refusals["part"])), list(dict.fromkeys(refusals["judge"]))
    for number, (judge, colour) in enumerate(
        zip(judges, (MODEL_COLOURS["aligned"], CONTROL), strict=True)
    ):
        rows = refusals[refusals["judge"] == judge].set_index("part").loc[parts]
        height = np.arange(len(parts)) + 0.24 * (number - 0.5)
        left.errorbar(
            rows["f1"],
            height,
            xerr=[rows["f1"] - rows["low"], rows["high"] - rows["f1"]],
            fmt="os"[number],
            ms=5,
            color=colour,
            capsize=2,
            label=judge,
        )
    left.set_yticks(range(len(parts)), [f"{part} (n={rows.loc[part, 'n']:.0f})" for part in parts])
    left.set(
        xlabel="F1 against people (95% interval)", title="Refusals", ylim=(len(parts) - 0.5, -0.5)
    )
    left.legend(loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=2)
    cases = tables["judge_cases"]
    for kind, colour in CASE_COLOURS.items():
        of_kind = cases[cases["kind"].str.startswith(kind)]
        right.scatter(
            of_kind["base_nll"],
            of_kind["repetition"],
            s=12,
            color=colour,
            alpha=0.7,
            lw=0,
            label=kind,
            marker="^" if of_kind["gibberish"].any() else "o",
        )
    weight, threshold = tables["judge_constants"].set_index("constant")["stored"][
        ["REPETITION_WEIGHT", "MAX_DEGENERACY"]
    ]
    right.plot([threshold, threshold - weight], [0, 1], color=INK, lw=1, label="the judge's line")
    right.set(
        xlabel="NLL under the base model (nats per token)",
        ylabel="repetition",
        title="Gibberish lies beyond the line",
        ylim=(-0.03, 1),
        xlim=(0, None),
    )
    right.legend(fontsize=6.5, loc="upper left", bbox_to_anchor=(1, 1))
    return figure
