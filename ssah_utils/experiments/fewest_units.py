"""How few of the highest-ranked units bring what the whole safety group brings, in answers.

Knows tables of 04_ablation. Imports no model, so that documents can be written without one.
"""

from collections.abc import Sequence

import pandas as pd

TARGETS = (0.5, 0.9)
ROUNDING = 1e-9  # rates are counts over a number of requests: equal ones may differ by this
COLUMNS = ["target", "fraction", "units", "mean", "low", "high"]


def fewest_units(
    rates: pd.DataFrame, differences: pd.DataFrame, targets: Sequence[float] = TARGETS
) -> pd.DataFrame:
    """The smallest share on the curve that adds each target share of what the safety group adds.

    What is added is coherent ASR beyond the intact model's. ``rates``: of the groups and of the
    curve, a row per part, condition, set and metric; ``differences``: every group against the
    intact model. Found are ``COLUMNS``, the rate with its interval. No row for a target that is not
    reached, and none at all where what the whole group adds is not clear: its interval, over the
    same requests, is not above 0.
    """
    answered = rates[(rates["set"] == "harmful") & (rates["metric"] == "coherent_asr")]
    groups = answered[answered["part"] == "groups"].set_index("condition")["mean"]
    curve = answered[(answered["part"] == "curve") & (answered["condition"] == "safety")]
    curve = curve.sort_values("fraction")
    added = differences.set_index(["condition", "set", "metric"])["low"]
    is_clear = added[("safety", "harmful", "coherent_asr")] > 0
    whole = groups["safety"] - groups["nothing"]
    reached = []
    for target in targets:
        is_enough = curve["mean"] - groups["nothing"] >= target * whole - ROUNDING
        reached.append(curve[is_enough & is_clear].head(1).assign(target=target))
    return pd.concat(reached, ignore_index=True)[COLUMNS]
