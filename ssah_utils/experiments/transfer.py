"""Units that change their group while a model is trained: which do, and could one have known?

Knows partitions, values per unit and statistics, no model.
"""

from collections.abc import Mapping

import numpy as np
import pandas as pd

from ssah_utils import stats
from ssah_utils.crossed import CrossedMean
from ssah_utils.per_unit import PerUnit
from ssah_utils.units import UnitPartition

# What is known of a safety unit before the training, by column of ``features``.
FEATURES = {
    "z_safety": "score on safety data",
    "z_utility": "score on utility data",
    "boundary_distance": "nearness to the boundary of the group",
    "first_gradient": "gradient of the first step, logarithm",
}
COMBINED = "combined"
# What is compared with the paper, by id.
OUTCOMES = {
    "safety_becomes_complex": "share of safety units that became complex",
    "margin_lost": "margin lost, beyond that with refusals (nats)",
    "leaving_predicted": "prediction of who leaves, other seeds (AUC)",
}


def left_group(before: UnitPartition, after: UnitPartition, group: str = "safety") -> np.ndarray:
    """Which of a group's units are in another one after: (n_units_of_the_group,) bool, in the order
    of ``PerUnit.flatten``.
    """
    stayed = after.units(group).flatten()[before.units(group).flatten()]
    return (~stayed).numpy()


def features(
    parted: UnitPartition, z_safety: PerUnit, z_utility: PerUnit, gradients: PerUnit
) -> pd.DataFrame:
    """What is known of every safety unit before training: a row per unit, ``FEATURES`` as columns.

    ``gradients``: norm of the first gradient per unit (``attribution.unit_gradients``). Each column
    is signed so that, were it the reason, units with a larger value would leave: a unit near the
    boundary, with a small z_safety - z_utility, needs the least change.
    """
    chosen = parted.units("safety").flatten()
    columns = {
        "z_safety": z_safety,
        "z_utility": z_utility,
        "boundary_distance": z_utility - z_safety,
        "first_gradient": gradients.map(lambda norms: norms.log()),
    }
    return pd.DataFrame(
        {name: values.flatten()[chosen].double().numpy() for name, values in columns.items()}
    )


def prediction_table(
    known: pd.DataFrame,
    left: Mapping[tuple[str, int], np.ndarray],
    fitted_on: tuple[str, int],
    seed: int = 0,
) -> pd.DataFrame:
    """How well each feature, and all of them combined, tell which units leave: AUC and interval.

    ``left``: by data and seed of a training, which units left (``left_group``). ``combined`` is a
    logistic regression fitted to the units that left under ``fitted_on``. Every unit is scored by a
    fit without it, so that for another seed neither the label nor the unit was seen. Columns: data,
    seed, feature, title, auc, low, high, left (the share).
    """
    combined = stats.out_of_fold(known.to_numpy(), np.asarray(left[fitted_on]), seed)
    columns = {name: known[name].to_numpy() for name in known} | {COMBINED: combined}
    rows = []
    for (data, k), labels in left.items():
        for name, values in columns.items():
            auc, low, high = stats.auc_interval(values, labels, seed)
            rows.append(
                {
                    "data": data,
                    "seed": k,
                    "feature": name,
                    "title": FEATURES.get(name, "all of them combined"),
                    "auc": auc,
                    "low": low,
                    "high": high,
                    "left": float(np.mean(labels)),
                }
            )
    return pd.DataFrame(rows)


def combined_auc(
    prediction: pd.DataFrame, data: str, fitted_seed: int = 0
) -> tuple[float, float, float]:
    """How well all features together tell who leaves, over the seeds of one data set: (auc, low,
    high), the interval over seeds and units.

    ``prediction``: ``prediction_table``. Left out is the seed that was fitted to, unless it is the
    only one.
    """
    rows = prediction[(prediction["feature"] == COMBINED) & (prediction["data"] == data)]
    others = rows[rows["seed"] != fitted_seed]
    return mean_share(others if len(others) else rows, "auc", "low", "high")


def mean_share(
    rows: pd.DataFrame, value: str, low: str = "", high: str = ""
) -> tuple[float, float, float]:
    """Mean of a share over seeds, a row each, with its 95% interval: (mean, low, high).

    ``low`` and ``high``: the columns of each seed's own interval, where it has one. The interval of
    the mean (``crossed``) is NaN where there is one seed without its own, and ends at 0 and 1.
    """
    nothing = np.full(len(rows), np.nan)
    ends = (rows[name].to_numpy() if name else nothing for name in (low, high))
    mean = CrossedMean.of(rows[value].to_numpy(), *ends)
    return mean.mean, *mean.interval(bounds=(0, 1))
