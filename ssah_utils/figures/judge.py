"""Figures of A1_judge. Knows tables only."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from ssah_utils.figures.style import (
    CASE_COLOURS,
    CONTROL,
    GROUP_COLOURS,
    INK,
    MODEL_COLOURS,
    SAFETY,
    Tables,
    headline,
    legend_below,
)

JUDGE_LOOKS = {  # colour and marker
    "learned": (SAFETY, "D"),
    "rules": (MODEL_COLOURS["aligned"], "o"),
    "substring list": (CONTROL, "s"),
}
SETS = ("harmful", "helpful")
MAX_FLIPS = 0.05  # as experiments.answer_length has it
CONDITION_LOOKS = {  # title, colour, line
    "base": ("base", MODEL_COLOURS["base"], "-"),
    "aligned": ("aligned", MODEL_COLOURS["aligned"], "-"),
    "safety": ("without safety units", GROUP_COLOURS["safety"], "-"),
    "random, as safety": ("without as many random ones", INK, "--"),
    "utility": ("without utility units", "#E69F00", "-"),
    "redundant": ("without redundant units", GROUP_COLOURS["redundant"], "-"),
}


def judge_validation(tables: Tables) -> Figure:
    """Refusals found, against labels by people; real answers, gibberish and the line between."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.0, 2.8), width_ratios=[1, 1.4])
    refusals = tables["judge_refusals"]
    parts, judges = list(dict.fromkeys(refusals["part"])), list(dict.fromkeys(refusals["judge"]))
    for number, judge in enumerate(judges):
        colour, marker = JUDGE_LOOKS[judge]
        rows = refusals[refusals["judge"] == judge].set_index("part").loc[parts]
        height = np.arange(len(parts)) + 0.22 * (number - (len(judges) - 1) / 2)
        reach = [rows["f1"] - rows["low"], rows["high"] - rows["f1"]]
        look = {"fmt": marker, "ms": 5, "color": colour, "capsize": 2, "label": judge}
        left.errorbar(rows["f1"], height, xerr=reach, **look)
    left.set_yticks(range(len(parts)), [f"{part} (n={rows.loc[part, 'n']:.0f})" for part in parts])
    left.set(xlabel="F1 against people (95% interval)", title="Refusals")
    left.set_ylim(len(parts) - 0.5, -0.5)
    left.legend(loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=3, fontsize=7)
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


def answer_length(tables: Tables) -> Figure:
    """Coherent ASR and verdicts that flip, against how many tokens of an answer are judged."""
    verdicts, flips = tables["length_verdicts"], tables["length_flips"]
    figure, axes = plt.subplots(1, 3, figsize=(9.0, 3.1), sharex=True)
    panels = ((verdicts, "coherent_asr", "harmful"), *((flips, "flips", s) for s in SETS))
    present = [name for name in CONDITION_LOOKS if name in set(verdicts["condition"])]
    for ax, (table, column, name) in zip(axes, panels, strict=True):
        for condition in present:
            title, colour, line = CONDITION_LOOKS[condition]
            rows = table[(table["condition"] == condition) & (table["set"] == name)]
            rows = rows.sort_values("length")
            look = {"color": colour, "ls": line, "marker": "o", "ms": 3, "lw": 1.2, "label": title}
            ax.plot(rows["length"], rows[column], **look)
        ax.set(xscale="log", ylim=(-0.03, 1.03), xlabel="tokens judged")
    overall = flips[flips["condition"] == "all"].sort_values("length")
    for ax in axes[1:]:
        ax.fill_between(
            overall["length"], overall["low"], overall["high"], color=CONTROL, alpha=0.25
        )
        ax.axhline(MAX_FLIPS, color=INK, lw=0.8, ls=":")
    lengths = sorted(verdicts["length"].unique())
    default = flips.loc[flips["role"] == "default", "length"].iloc[0]
    for ax in axes:
        ax.axvline(default, color=INK, lw=0.8, alpha=0.4)
        ax.set_xticks(lengths, [f"{length}" for length in lengths], fontsize=7)
        ax.minorticks_off()
    axes[0].set(title="Harmful: coherent ASR", ylabel="share of requests")
    axes[1].set(title="Harmful: verdicts that flip")
    axes[2].set(title="Harmless: verdicts that flip")
    handles, _ = axes[0].get_legend_handles_labels()
    legend_below(figure, handles, ncols=3, fontsize=7)
    headline(figure, "How long must an answer be? (band: all conditions, 95%; line: the default)")
    return figure
