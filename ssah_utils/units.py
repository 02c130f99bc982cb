"""The partition of units into safety, utility, complex and redundant; chosen and random sets.

Also how sets overlap. Does not know models: a partition carries the fingerprint of its model, and
whoever applies it compares. ``unit_files`` writes and reads what is made here.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor

from ssah_utils.per_unit import PerUnit

GROUPS = ("safety", "utility", "complex", "redundant")  # SCU, UCU, CU, RU in the paper


@dataclass(frozen=True)
class UnitPartition:
    """Every unit's group, as an index (int8) into ``GROUPS``."""

    group_index: PerUnit
    fingerprint: str = ""

    def units(self, group: str) -> PerUnit:
        """The set of one group; ``ValueError`` for a name not in ``GROUPS``."""
        number = GROUPS.index(group)
        return self.group_index.map(lambda index: index == number)

    def counts(self) -> pd.DataFrame:
        """Units and share of all units per group, in total and by kind: one row per group."""
        by_kind = {
            kind: [int(self.units(group)[kind].sum()) for group in GROUPS]
            for kind in self.group_index
        }
        table = pd.DataFrame(by_kind, index=pd.Index(GROUPS, name="group"))
        table.insert(0, "units", table.sum(axis=1))
        table.insert(1, "share", table["units"] / table["units"].sum())
        return table


def check_fractions(**fractions: float) -> None:
    """Raise ``ValueError`` unless every fraction is in [0, 1] and they add up to at most 1."""
    for name, value in fractions.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name} is {value}, but a fraction lies in [0, 1]")
    total = sum(fractions.values())
    if total > 1 + 1e-9:
        raise ValueError(f"{' + '.join(fractions)} is {total:.3g}, more than all units (1)")


def partition(
    z_safety: PerUnit,
    z_utility: PerUnit,
    safety_fraction: float = 0.013,
    utility_fraction: float = 0.133,
    redundant_fraction: float = 0.148,
    fingerprint: str = "",
) -> UnitPartition:
    """Assign every unit to one group by its standardised scores on safety and on utility data.

    As in SSAH, section 4.1. Safety: the largest z_S - z_U of all units of the model; utility: the
    smallest. Of the rest, redundant: the smallest z_S + z_U; complex: what remains. The default
    fractions are those of the paper's Llama-2-7B-Chat. Where rounding would hand out one unit more
    than there are, the later group gives way. Raises ``ValueError`` for fractions that are none,
    and for a score that is nan or infinite: every unit needs both.

    >>> z_safety = PerUnit({"mlp": torch.tensor([[3.0, 0.0, 1.0, -1.0]])})
    >>> z_utility = PerUnit({"mlp": torch.tensor([[0.0, 3.0, 1.0, -1.0]])})
    >>> parted = partition(z_safety, z_utility, 0.25, 0.25, 0.25)
    >>> parted.units("safety").names(), parted.units("redundant").names()
    (['mlp/0/0'], ['mlp/0/3'])
    """
    check_fractions(
        safety_fraction=safety_fraction,
        utility_fraction=utility_fraction,
        redundant_fraction=redundant_fraction,
    )
    _require_scores(z_safety, z_utility)
    n_units = z_safety.n_units
    n_safety = round(safety_fraction * n_units)
    n_utility = min(round(utility_fraction * n_units), n_units - n_safety)
    n_redundant = round(redundant_fraction * n_units)
    index = torch.full((n_units,), GROUPS.index("complex"), dtype=torch.int8)
    by_contrast = torch.argsort((z_safety - z_utility).flatten(), descending=True, stable=True)
    index[by_contrast[:n_safety]] = GROUPS.index("safety")
    index[by_contrast[n_units - n_utility :]] = GROUPS.index("utility")
    by_sum = torch.argsort((z_safety + z_utility).flatten(), stable=True)
    free = by_sum[index[by_sum] == GROUPS.index("complex")]
    index[free[:n_redundant]] = GROUPS.index("redundant")
    return UnitPartition(z_safety.unflatten(index), fingerprint)


def _require_scores(*scores: PerUnit) -> None:
    """``ValueError`` unless every unit has each of these scores."""
    for score in scores:
        score.require_finite("scores")


def top_units(score: PerUnit, fraction: float) -> PerUnit:
    """The given fraction of all units with the highest score; never those at -inf or nan.

    Both say that a unit has no score. Raises ``ValueError`` where fewer units are left to choose
    from.
    """
    check_fractions(fraction=fraction)
    values = score.flatten()
    # nan would come before all numbers
    values = values.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    n_ranked, n_wanted = int((values > -torch.inf).sum()), round(fraction * score.n_units)
    if n_wanted > n_ranked:
        raise ValueError(
            f"{fraction:g} of all units are {n_wanted},"
            f" but only {n_ranked} units are there to choose from"
        )
    return from_flat_indices(torch.argsort(values, descending=True, stable=True)[:n_wanted], score)


def set_difference(score: PerUnit, other: PerUnit, fraction: float) -> PerUnit:
    """Units in the top q of ``score`` but not in the top q of ``other``.

    Wei et al. (ICML 2024) do so with single weights and set the two shares by hand. Here both are
    q, the smallest at which exactly the given fraction of all units is left. Raises ``ValueError``
    where no q leaves so many, as with two equal rankings, and for scores that are nan or infinite.
    """
    check_fractions(fraction=fraction)
    _require_scores(score, other)
    ranks = [
        torch.argsort(torch.argsort(values.flatten(), descending=True, stable=True))
        for values in (score, other)
    ]
    n_units = score.n_units
    n_wanted = round(fraction * n_units)
    # for q = 0, 1, 2, ...: how many units are in both tops, and how many in the first alone
    n_both = torch.bincount(torch.maximum(*ranks) + 1, minlength=n_units + 1).cumsum(0)
    n_left = torch.arange(n_units + 1) - n_both
    # one more unit on each side changes the difference by at most one, so no size is skipped
    enough = (n_left >= n_wanted).nonzero()
    if not len(enough):
        raise ValueError(
            f"no share leaves {n_wanted} units:"
            f" the two rankings differ by at most {int(n_left.max())}"
        )
    q = int(enough[0])
    return score.unflatten((ranks[0] < q) & (ranks[1] >= q))


def random_units(like: PerUnit, generator: torch.Generator) -> PerUnit:
    """A random set with exactly as many units in every module as ``like``.

    The control for every claim about *which* units a set holds.
    """

    def draw(chosen: Tensor) -> Tensor:
        order = torch.rand(chosen.shape, generator=generator).argsort(1)
        return order.argsort(1) < chosen.sum(1, keepdim=True)

    return like.map(draw)


def training_budgets(
    z_safety: PerUnit,
    z_utility: PerUnit,
    trained_fraction: float,
    safety_fraction: float,
    seed: int = 0,
) -> dict[str, PerUnit | None]:
    """Sets of units to train, by name; ``all`` is None: every parameter, not units alone.

    ``redundant``: the lowest z_S + z_U of all units (SSAH section 4.3). Its controls: ``top``, the
    highest, and ``random``, as many in every module. ``safety``: the highest z_S - z_U. Raises
    ``ValueError`` for scores that are nan or infinite.
    """
    _require_scores(z_safety, z_utility)
    total = z_safety + z_utility
    redundant = top_units(-total, trained_fraction)
    return {
        "all": None,
        "redundant": redundant,
        "top": top_units(total, trained_fraction),
        "random": random_units(redundant, torch.Generator().manual_seed(seed)),
        "safety": top_units(z_safety - z_utility, safety_fraction),
    }


def from_flat_indices(indices: Sequence[int] | Tensor, like: PerUnit) -> PerUnit:
    """The set of units at the given places of ``PerUnit.flatten``."""
    chosen = torch.zeros(like.n_units, dtype=torch.bool)
    chosen[indices] = True
    return like.unflatten(chosen)


def jaccard(a: PerUnit, b: PerUnit) -> float:
    """|a & b| / |a | b|; 1 for two empty sets."""
    either = (a | b).count()
    return (a & b).count() / either if either else 1.0


def chance_jaccard(a: PerUnit, b: PerUnit) -> float:
    """Jaccard of two random sets with as many units in every module as ``a`` and ``b``.

    At their expected overlap, the mean of a hypergeometric distribution.
    """
    both = sum(float((a[kind].sum(1) * b[kind].sum(1) / a[kind].shape[1]).sum()) for kind in a)
    either = a.count() + b.count() - both
    return both / either if either else 1.0


def overlap_table(sets: dict[str, PerUnit]) -> pd.DataFrame:
    """Jaccard of every set with every set: first, second, jaccard, chance, corrected.

    Corrected is (J - chance) / (1 - chance): 0 for sets that share what random ones do, 1 for equal
    ones.
    """
    rows = []
    for first, a in sets.items():
        for second, b in sets.items():
            found, chance = jaccard(a, b), chance_jaccard(a, b)
            corrected = (found - chance) / (1 - chance) if chance < 1 else 1.0
            rows.append((first, second, found, chance, corrected))
    return pd.DataFrame(rows, columns=["first", "second", "jaccard", "chance", "corrected"])


def to_table(z_safety: PerUnit, z_utility: PerUnit, parted: UnitPartition) -> pd.DataFrame:
    """One row per unit: kind, layer, channel, z_safety, z_utility, group."""
    frames = []
    for kind, index in parted.group_index.items():
        layer, channel = torch.meshgrid(*(torch.arange(n) for n in index.shape), indexing="ij")
        numbers = {
            "layer": layer,
            "channel": channel,
            "z_safety": z_safety[kind],
            "z_utility": z_utility[kind],
        }
        table = pd.DataFrame({name: values.flatten().numpy() for name, values in numbers.items()})
        table.insert(0, "kind", kind)
        table["group"] = pd.Categorical.from_codes(index.flatten().numpy(), categories=list(GROUPS))
        frames.append(table)
    return pd.concat(frames, ignore_index=True)


def transition_table(before: UnitPartition, after: UnitPartition) -> pd.DataFrame:
    """Where the units of every group went: before, after, units, share (of the group before)."""
    rows = []
    for source in GROUPS:
        left = before.units(source)
        for target in GROUPS:
            moved = (left & after.units(target)).count()
            rows.append((source, target, moved, moved / max(1, left.count())))
    return pd.DataFrame(rows, columns=["before", "after", "units", "share"])
