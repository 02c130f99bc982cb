"""What each group of units does: the panel under every ablation, beside random sets of its size.

Knows a panel of measurements, a model and sets of units. Where a set comes from is not known here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from torch import Generator, nn

from ssah_utils import evaluation, interventions, paper, units
from ssah_utils.experiments import panel
from ssah_utils.experiments.panel import Panel
from ssah_utils.judge.answers import AnswerLog
from ssah_utils.per_unit import PerUnit

INTACT = "nothing"
COMPARED = (
    ("harmful", "asr"),
    ("harmful", "coherent_asr"),
    ("helpful", "refused"),
    ("helpful", "answer_nll"),
    ("cloze", "accuracy"),
)
Conditions = Mapping[str, Sequence[PerUnit]]  # by name, the draws of a condition: one, or several


def group_conditions(
    partition: units.UnitPartition, n_random: int, generator: Generator
) -> dict[str, list[PerUnit]]:
    """Nothing, every group, and behind it ``n_random`` random sets with as many units in every
    module, as ``random, as GROUP``.

    Complex units have no such control: they are most of the model, so that a random set of their
    size leaves nothing to compare with.
    """
    found = {INTACT: [partition.units("safety").empty_set()]}
    for group in units.GROUPS:
        chosen = partition.units(group)
        found[group] = [chosen]
        if group != "complex":
            draws = [units.random_units(chosen, generator) for _ in range(n_random)]
            found[f"random, as {group}"] = draws
    return found


@dataclass(frozen=True)
class GroupAblation:
    """A panel that is taken while units of ``model`` are switched off.

    * ``means``: what ablated units are held at; None for zero.
    * ``log``: where all judged answers are kept, under the name of the condition.

    ``ValueError`` where the panel's base is the very model that is ablated: it would judge without
    these units, too.
    """

    panel: Panel
    model: nn.Module
    means: PerUnit | None = None
    log: AnswerLog = field(default_factory=AnswerLog, compare=False)

    def __post_init__(self) -> None:
        if self.panel.base is self.model:
            raise ValueError("the panel's base is the model that is ablated: load it a second time")

    def measure(
        self, chosen: PerUnit, with_tasks: bool = True, condition: str = "", draw: int = 0
    ) -> pd.DataFrame:
        """``Panel.measure`` under one ablation; ``condition`` and ``draw`` name it in the log."""
        with interventions.ablated(self.model, chosen, self.means):
            rows = self.panel.measure(self.model, with_tasks)
        return self.log.add(rows, condition=condition, units=chosen.count(), draw=draw)

    def measure_all(
        self, conditions: Conditions, progress: evaluation.Progress = evaluation._silent
    ) -> dict[str, list[pd.DataFrame]]:
        """``measure`` of every draw of every condition."""
        return {
            name: [
                self.measure(chosen, condition=name, draw=draw)
                for draw, chosen in enumerate(conditions[name])
            ]
            for name in progress(list(conditions), "ablating")
        }

    def curve(
        self,
        contrast: PerUnit,
        fractions: Sequence[float],
        generator: Generator,
        progress: evaluation.Progress = evaluation._silent,
    ) -> pd.DataFrame:
        """Rates for growing shares of all units: ``safety``, the units with the highest contrast,
        and ``random``, as many in every module. Tasks are left out. ``fraction`` is as asked for.
        """
        found = []
        for fraction in progress(list(fractions), "ablation curve"):
            chosen = units.top_units(contrast, fraction)
            drawn = units.random_units(chosen, generator)
            for name, one in (("safety", chosen), ("random", drawn)):
                rows = panel.rates(self.measure(one, False, f"curve, {name}"))
                keys = {"part": "curve", "condition": name, "draw": 0, "units": one.count()}
                found.append(rows.assign(**keys, fraction=fraction))
        return pd.concat(found, ignore_index=True)


# ---------------------------------------------------------------------------- from rows to tables


def rates(
    measured: Mapping[str, Sequence[pd.DataFrame]], conditions: Conditions, part: str
) -> pd.DataFrame:
    """``panel.rates`` of every measurement, with part, condition, draw, units and fraction (of all
    units).
    """
    found = []
    for name, draws in measured.items():
        for draw, (rows, chosen) in enumerate(zip(draws, conditions[name], strict=True)):
            keys = {"part": part, "condition": name, "draw": draw, "units": chosen.count()}
            found.append(panel.rates(rows).assign(**keys, fraction=chosen.share))
    return pd.concat(found, ignore_index=True)


def against_intact(measured: Mapping[str, Sequence[pd.DataFrame]], seed: int = 0) -> pd.DataFrame:
    """``panel.compare`` of every condition against ``INTACT``, on the same requests:
    condition, set, metric (those of ``COMPARED``), difference, low, high, p, effect, p_holm.
    """
    pairs = [({"condition": name}, name, INTACT) for name in measured if name != INTACT]
    return panel.compare(measured, pairs, COMPARED, seed)


def beside_paper(differences: pd.DataFrame, model: str) -> pd.DataFrame:
    """Changes in points, ours and those of one of the paper's models (table 1).

    Columns: ablated, utility, utility_paper, asr, asr_paper, coherent_asr, low, high (of the
    coherent ASR), random_coherent_asr (its change under the group's random control).
    """
    change = differences.set_index(["condition", "set", "metric"])[["difference", "low", "high"]]
    change = 100 * change
    rows = []
    for group in ("safety", "utility", "redundant"):
        coherent = change.loc[(group, "harmful", "coherent_asr")]
        control = change.loc[(f"random, as {group}", "harmful", "coherent_asr")]
        rows.append(
            {
                "ablated": group,
                "utility": change.loc[(group, "cloze", "accuracy"), "difference"],
                "utility_paper": paper.number("table1", model, group, "utility"),
                "asr": change.loc[(group, "harmful", "asr"), "difference"],
                "asr_paper": paper.number("table1", model, group, "asr"),
                "coherent_asr": coherent["difference"],
                "low": coherent["low"],
                "high": coherent["high"],
                "random_coherent_asr": control["difference"],
            }
        )
    return pd.DataFrame(rows)


def points(differences: pd.DataFrame, condition: str, set_name: str, metric: str) -> str:
    """A change in points with its interval, as text: ``+65 [50, 77]``."""
    rows = differences.set_index(["condition", "set", "metric"])
    value, low, high = np.rint(100 * rows.loc[(condition, set_name, metric)].astype(float))[
        ["difference", "low", "high"]
    ]
    return f"{value:+.0f} [{low:.0f}, {high:.0f}]"
