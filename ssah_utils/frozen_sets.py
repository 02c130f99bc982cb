"""Which units are kept as they are while the others learn: the sets that are compared, by id.

Knows partitions and scores, no model. Sets come with a random control of as many units in every
module.
"""

import torch

from ssah_utils.per_unit import PerUnit
from ssah_utils.units import UnitPartition, random_units, top_units

RANDOM = "random_as_"  # before the id of the set that it is the control of


def frozen_sets(
    parted: UnitPartition,
    z_safety: PerUnit,
    z_utility: PerUnit,
    complex_fraction: float,
    generator: torch.Generator,
) -> dict[str, PerUnit | None]:
    """The sets by id: nothing (None), safety, safety with some or all complex units, random ones.

    ``complex_fraction``: complex units that are frozen with the safety units, those with the
    highest z_safety + z_utility first, as a share of all units. ``ValueError`` where there are not
    so many.
    """
    safety, every_complex = parted.units("safety"), parted.units("complex")
    score = (z_safety + z_utility).where(every_complex, -torch.inf)
    some = safety | top_units(score, complex_fraction)
    most = safety | every_complex
    return {
        "nothing": None,
        "safety": safety,
        "safety_some_complex": some,
        f"{RANDOM}safety_some_complex": random_units(some, generator),
        "safety_all_complex": most,
        f"{RANDOM}safety_all_complex": random_units(most, generator),
    }


def titles(complex_fraction: float) -> dict[str, str]:
    """What a reader sees, by the id of a set; and ``before``: before any training."""
    sets = {
        "safety": "safety",
        "safety_some_complex": f"safety + {100 * complex_fraction:g}% complex",
        "safety_all_complex": "safety + all complex",
    }
    controls = {f"{RANDOM}{name}": f"random, as {title}" for name, title in sets.items()}
    return {"before": "before", "nothing": "nothing"} | sets | controls


def safety_first(parted: UnitPartition, z_safety: PerUnit, z_utility: PerUnit) -> PerUnit:
    """The order of freezing, as a score whose ``top_units`` of any share are nested sets.

    Safety units by z_safety - z_utility, then complex units by z_safety + z_utility, then all
    others by z_safety; each from the highest down. The score is 0 for the first unit of all, -1
    for the second, and so on. ``ValueError`` where a score is nan or infinite.
    """
    for scores in (z_safety, z_utility):
        scores.require_finite("scores")
    safety, every_complex = parted.units("safety"), parted.units("complex")
    levels = [
        (safety, z_safety - z_utility),
        (every_complex, z_safety + z_utility),
        (~(safety | every_complex), z_safety),
    ]
    ordered = []
    for chosen, score in levels:
        places = chosen.flatten().nonzero()[:, 0]
        falling = torch.argsort(score.flatten()[places], descending=True, stable=True)
        ordered.append(places[falling])
    place = torch.empty(z_safety.n_units, dtype=torch.float64)  # whole numbers are exact
    place[torch.cat(ordered)] = -torch.arange(z_safety.n_units, dtype=place.dtype)
    return z_safety.unflatten(place)


def middle_units(like: PerUnit) -> PerUnit:
    """As many units of each kind as in a set, in the blocks around the middle of the model.

    After Safety layers (Li et al., 2408.17003), which are contiguous blocks in the middle,
    frozen whole. Here whole blocks are taken from the middle outwards, and of the last one as many
    units as are left.
    """

    def taken(chosen: torch.Tensor) -> torch.Tensor:
        n_layers, n_channels = chosen.shape
        found, n_left = torch.zeros_like(chosen), int(chosen.sum())
        for layer in sorted(range(n_layers), key=lambda layer: abs(2 * layer - n_layers + 1)):
            n_here = min(n_left, n_channels)
            found[layer, :n_here] = True
            n_left -= n_here
        return found

    return like.map(taken)
