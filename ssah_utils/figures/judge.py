"""Figures of A1_judge. Knows tables only."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from ssah_utils.figures.style import CASE_COLOURS, CONTROL, INK, MODEL_COLOURS, Tables


def judge_validation(tables: Tables) -> Figure:
    """Refusals found, against labels by people; real answers, gibberish and the line between."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.0, 2.8), width_ratios=[1, 1.4])
    refusals = tables["judge_refusals"]
    parts, judges = list(dict.fromkeys(refusals["part"])), list(dict.fromkeys(refusals["judge"]))
    colours = (MODEL_COLOURS["aligned"], CONTROL)
    for number, (judge, colour) in enumerate(zip(judges, colours, strict=True)):
        rows = refusals[refusals["judge"] == judge].set_index("part").loc[parts]
        height = np.arange(len(parts)) + 0.24 * (number - 0.5)
        reach = [rows["f1"] - rows["low"], rows["high"] - rows["f1"]]
        look = {"fmt": "os"[number], "ms": 5, "color": colour, "capsize": 2, "label": judge}
        left.errorbar(rows["f1"], height, xerr=reach, **look)
    left.set_yticks(range(len(parts)), [f"{part} (n={rows.loc[part, 'n']:.0f})" for part in parts])
    left.set(xlabel="F1 against people (95% interval)", title="Refusals")
    left.set_ylim(len(parts) - 0.5, -0.5)
    left.legend(loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=2)
    cases = tables["judge_cases"]
    for kind, colour in CASE_COLOURS.items():
        of_kind = cases[cases["kind"].str.startswith(kind)]
        marker = "^" if of_kind["gibberish"].any() else "o"
        look = {"s": 12, "color": colour, "alpha": 0.7, "lw": 0, "marker": marker, "label": kind}
        right.scatter(of_kind["base_nll"], of_kind["repetition"], **look)
    constants = tables["judge_constants"].set_index("constant")["stored"]
    weight, threshold = constants[["REPETITION_WEIGHT", "MAX_DEGENERACY"]]
    right.plot([threshold, threshold - weight], [0, 1], color=INK, lw=1, label="the judge's line")
    right.set(xlabel="NLL under the base model (nats per token)", ylabel="repetition")
    right.set(title="Gibberish lies beyond the line", ylim=(-0.03, 1), xlim=(0, None))
    right.legend(fontsize=6.5, loc="upper left", bbox_to_anchor=(1, 1))
    return figure
