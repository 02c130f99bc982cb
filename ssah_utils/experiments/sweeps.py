"""How much to freeze, how fast to learn: nested sets of units, and what each gains over freezing
nothing.

Knows values per unit and paths of losses, no model.
"""

from collections.abc import Mapping, Sequence

import pandas as pd
import torch

from ssah_utils import frozen_sets
from ssah_utils.experiments.frontier import LossPath, at_equal_loss
from ssah_utils.per_unit import PerUnit
from ssah_utils.units import random_units, top_units

SAFETY_FIRST, RANDOM = "safety first", "random"


def sweep_sets(
    order: PerUnit, fractions: Sequence[float], generator: torch.Generator
) -> dict[tuple[str, float], PerUnit | None]:
    """Sets to freeze by (order, share of all units): nothing, nested ones, and a random control.

    ``order``: a score, as ``frozen_sets.safety_first`` makes it. All units have no control.
    """
    nested = {fraction: top_units(order, fraction) for fraction in fractions}
    found: dict[tuple[str, float], PerUnit | None] = {(SAFETY_FIRST, 0.0): None}
    found |= {(SAFETY_FIRST, fraction): chosen for fraction, chosen in nested.items()}
    for fraction, chosen in nested.items():
        if fraction < 1:
            found[RANDOM, fraction] = random_units(chosen, generator)
    return found


def point_of(name: str, chosen: PerUnit | None) -> tuple[str, float]:
    """Where a set of ``frozen_sets`` lies in a sweep: (order, share of all units)."""
    order = RANDOM if name.startswith(frozen_sets.RANDOM) else SAFETY_FIRST
    return order, 0.0 if chosen is None else round(chosen.share, 6)


def sweep_gains(paths: Mapping[tuple[str, float, float], LossPath], seed: int = 0) -> pd.DataFrame:
    """Margin gained over freezing nothing, for every set and learning rate.

    ``paths``: one run by (order, fraction, factor of the learning rate). Compared are, each time,
    the sets of one share and freezing nothing at the same rate, at the loss that all of them reach.
    Columns: those of ``at_equal_loss``, without seeds, then order, fraction and factor.
    """
    found = []
    for fraction, factor in dict.fromkeys((share, rate) for _, share, rate in paths):
        compared = {
            (order, share): [path]
            for (order, share, rate), path in paths.items()
            if rate == factor and share in (0.0, fraction)
        }
        table = at_equal_loss(compared, (SAFETY_FIRST, 0.0), seed)
        for name, values in zip(("order", "fraction"), zip(*compared, strict=True), strict=True):
            table[name] = values
        found.append(table[table["fraction"] == fraction].assign(factor=factor))
    gains = pd.concat(found, ignore_index=True)
    return gains.drop(columns=["condition", "seed_low", "seed_high"])
