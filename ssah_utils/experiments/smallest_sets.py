"""How few units are enough: greedy search for single units, and what the found ones do elsewhere.

The search looks at a few requests and openings; what it finds is measured on others, beside as many
units from the top of the ranking and as many random ones. Its path shows that so few suffice, not
that no smaller set would.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from torch import Generator

from ssah_utils import evaluation, search, stats, units
from ssah_utils.experiments.ablation_probe import AblationProbe
from ssah_utils.per_unit import PerUnit


@dataclass(frozen=True)
class Search:
    """What ``find`` has found.

    * ``path``: the units taken, one after another, with the margin lost so far (nats).
    * ``effect``: the margin that the whole set takes on the same requests (nats).
    * ``whole``: that set.
    """

    path: list[search.Step]
    effect: float
    whole: PerUnit

    def size_for(self, target: float) -> int | None:
        """How many units take the share ``target`` of the effect; None where the path ends
        before.
        """
        return search.size_for(self.path, target * self.effect) if self.effect > 0 else None

    def units(self, n: int) -> PerUnit:
        """The first ``n`` units of the path, as a set."""
        return units.from_flat_indices([step.chosen for step in self.path[:n]], self.whole)


def find(
    probe: AblationProbe,
    whole: PerUnit,
    candidates: Sequence[int],
    target: float = 0.9,
    max_evaluations: int | None = None,
) -> Search:
    """Take units until they cost the share ``target`` of the margin that ``whole`` costs.

    ``candidates``: places in ``PerUnit.flatten`` that may be taken. Where ``whole`` costs no
    margin, there is no target, and the search goes on while it gains anything.
    """
    intact = probe.margins(whole.empty_set()).mean()
    effect = float(intact - probe.margins(whole).mean())

    def lost(indices: list[int]) -> float:
        return float(intact - probe.margins(units.from_flat_indices(indices, whole)).mean())

    goal = target * effect if effect > 0 else math.inf
    return Search(search.lazy_greedy(lost, candidates, goal, max_evaluations), effect, whole)


def held_out(
    probe: AblationProbe,
    found: Search,
    ranked: Sequence[int],
    sizes: Sequence[int],
    n_random: int,
    generator: Generator,
    progress: evaluation.Progress = evaluation._silent,
) -> pd.DataFrame:
    """What ``n`` units cost on the probe's requests, for every n of ``sizes``.

    Rows by ``order``: ``greedy`` (the path), ``score`` (the first of ``ranked``), ``random`` (of
    the same modules as the path; the margin is the mean over ``n_random`` draws, answers are those
    of the first). Columns: order, units, margin_drop, low, high, share_of_effect (of the whole
    set), asr, coherent_asr.
    """
    intact = probe.margins(found.whole.empty_set())
    whole_effect = (intact - probe.margins(found.whole)).mean()
    rows = []
    for n in progress(list(sizes), "smallest sets"):
        greedy = found.units(n)
        sets = {
            "greedy": [greedy],
            "score": [units.from_flat_indices(ranked[:n], found.whole)],
            "random": [units.random_units(greedy, generator) for _ in range(n_random)],
        }
        for order, draws in sets.items():
            measured = probe.measure(draws[0], f"{order} {n}")
            asked = measured[measured["set"] == "harmful"]
            margins = [asked["margin"].to_numpy(), *(probe.margins(one) for one in draws[1:])]
            mean, low, high = stats.mean_interval(intact - np.mean(margins, axis=0))
            row = {"order": order, "units": n, "margin_drop": mean, "low": low, "high": high}
            row["share_of_effect"] = mean / whole_effect
            row |= {name: asked[name].astype(float).mean() for name in ("asr", "coherent_asr")}
            rows.append(row)
    columns = ["order", "units", "margin_drop", "low", "high", "share_of_effect"]
    return pd.DataFrame(rows, columns=[*columns, "asr", "coherent_asr"])


def targets_table(
    found: Search, smallest: pd.DataFrame, targets: Sequence[float], whole_coherent_asr: float
) -> pd.DataFrame:
    """The smallest set for every target, and what it keeps of its promise on held-out requests.

    ``smallest``: as ``held_out`` made it. ``whole_coherent_asr``: of the whole set, on the same
    requests. Columns: target, units, members, share_held_out, margin_low and random_high (ends of
    the intervals of the margin lost to these and to as many random units), coherent_asr,
    whole_coherent_asr. Where the search ended before its target, all but the last are missing.
    """
    by_order = smallest.set_index(["order", "units"])
    rows = []
    for target in targets:
        n = found.size_for(target)
        row = {"target": target, "units": n, "members": ""}
        row |= dict.fromkeys(("share_held_out", "margin_low", "random_high", "coherent_asr"))
        if n:
            greedy, random = by_order.loc[("greedy", n)], by_order.loc[("random", n)]
            row["members"] = ", ".join(found.units(n).names())
            row |= {"share_held_out": greedy["share_of_effect"], "margin_low": greedy["low"]}
            row |= {"random_high": random["high"], "coherent_asr": greedy["coherent_asr"]}
        rows.append(row | {"whole_coherent_asr": whole_coherent_asr})
    return pd.DataFrame(rows)
