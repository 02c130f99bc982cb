"""Other ways to find the safety units: other requests, other positions, other scores.

A finder gives every unit a contrast, its standardised score on safety data minus that on utility
data; its safety set is the top of that ranking (``units.top_units``). Knows moments, weights and
batches; where requests come from is not known here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from ssah_utils import activations, scores, scoring, units
from ssah_utils.activations import ChannelMoments
from ssah_utils.per_unit import PerUnit

REFERENCE = "reference"  # the name of the set that others are compared with

# ------------------------------------------------------------------------------------------- scores


def contrast(scored: Mapping[str, PerUnit]) -> PerUnit:
    """z_S - z_U of scores that are already standardised: {``harmful``, ``helpful``}."""
    return scored["harmful"] - scored["helpful"]


def by_variance(moments: Mapping[str, ChannelMoments], squared_norms: PerUnit) -> PerUnit:
    """Contrast of variance times squared norm, the score of the paper (section 4.1)."""
    sides = ("harmful", "helpful")
    return contrast({side: scoring.standardised(moments[side], squared_norms) for side in sides})


def by_weighted_norm(moments: Mapping[str, ChannelMoments], mean_absolute: PerUnit) -> PerUnit:
    """Contrast of WIFN: the size of what a unit writes, whether it varies or not."""
    found = {}
    for side in ("harmful", "helpful"):
        score = scores.weighted_norm(moments[side].mean_square, mean_absolute)
        found[side] = scores.zscore_per_module(score)
    return contrast(found)


def by_gradient(products: Mapping[str, PerUnit]) -> PerUnit:
    """Contrast of gradient times activation: what zeroing a unit does to the loss, to first order.

    ``products``: ``activations.gradient_activation`` of both sides.
    """
    return contrast({side: scores.zscore_per_module(product) for side, product in products.items()})


def by_change(squared_changes: PerUnit) -> PerUnit:
    """How far alignment has moved a unit's activation on harmful requests: the change score.

    Root-mean-square difference between the aligned and the unaligned model on the same texts, the
    aligned model's answers: the safety neurons of Chen et al. (arXiv 2406.14144). As published, it
    is no contrast and is not standardised: what moved as far on harmless requests counts, too.
    ``squared_changes``: ``activations.mean_squared_changes`` on harmful requests.
    """
    return squared_changes.map(torch.sqrt)


def by_direction(columns_along: PerUnit, means: Mapping[str, PerUnit]) -> PerUnit:
    """What a unit adds, at the last prompt position, to the distance between harmful and harmless
    requests along the refusal direction.

    Its column's product with the direction times the difference of its mean activations. Summed
    over all units of the blocks below, and with the embedding, this is the distance itself, where
    nothing else writes. The direction is the difference of means of Arditi et al. (arXiv
    2406.11717); they take it out of the residual stream, and do not look at units. Not
    standardised: all units write to one stream, in one measure.
    """
    return columns_along * (means["harmful"] - means["helpful"])


def by_first_token(log_odds: PerUnit, kl: PerUnit) -> PerUnit:
    """What a unit does for a refusing first token, less what it does to harmless first tokens.

    Safety is the refusal log-odds on harmful requests, to first order; utility is the KL of the
    next token from the intact model's on harmless ones, to second order (``attribution``). Both
    are standardised within their module.
    """
    return scores.zscore_per_module(log_odds) - scores.zscore_per_module(kl)


# ----------------------------------------------------------------------------------------- requests


@dataclass(frozen=True)
class Subset:
    """Rows of the harmful and of the helpful calibration requests that a finder may look at."""

    harmful: Sequence[int]
    helpful: Sequence[int]

    def moments(self, of_request: Mapping[str, list[ChannelMoments]]) -> dict[str, ChannelMoments]:
        """Moments over these requests alone, from those of every single request."""
        rows = {"harmful": self.harmful, "helpful": self.helpful}
        return {
            side: activations.pooled(of_request[side][row] for row in rows[side]) for side in rows
        }


def random_halves(n_harmful: int, n_helpful: int, n_draws: int, seed: int) -> dict[str, Subset]:
    """Random halves of both kinds of requests, as ``seed: 0`` and so on; two may share requests."""
    rng = np.random.default_rng(seed)
    found = {}
    for draw in range(n_draws):
        harmful = rng.choice(n_harmful, n_harmful // 2, replace=False)
        helpful = rng.choice(n_helpful, n_helpful // 2, replace=False)
        found[f"seed: {draw}"] = Subset(harmful.tolist(), helpful.tolist())
    return found


def first_requests(n_harmful: int, n_helpful: int, sizes: Sequence[int]) -> dict[str, Subset]:
    """The first requests of both kinds, as ``size: 16``; sizes that one kind has not are left
    out.
    """
    there = [size for size in sizes if size <= min(n_harmful, n_helpful)]
    return {f"size: {size}": Subset(range(size), range(size)) for size in there}


def disjoint_halves(n_harmful: int, n_helpful: int) -> dict[str, Subset]:
    """Every other request, and the rest: ``half: 0`` and ``half: 1`` share none."""
    return {
        f"half: {half}": Subset(range(half, n_harmful, 2), range(half, n_helpful, 2))
        for half in (0, 1)
    }


def per_category(
    categories: Sequence[str], n_helpful: int, n_categories: int, n_per_category: int
) -> dict[str, Subset]:
    """Harmful requests of one category each, as ``category: NAME``, beside all helpful ones.

    The ``n_categories`` biggest categories, of those with at least ``n_per_category`` requests.
    ``categories``: of every harmful request, in order.
    """
    counts = pd.Series(list(categories), dtype=object).value_counts()
    found = {}
    for name in counts[counts >= n_per_category].head(n_categories).index:
        rows = [row for row, category in enumerate(categories) if category == name]
        found[f"category: {name}"] = Subset(rows, range(n_helpful))
    return found


# ------------------------------------------------------------------------------------------ overlap


def family(variant: str) -> str:
    """The part of a variant's name before the colon: ``category`` of ``category: Physical``."""
    return variant.partition(":")[0]


def with_reference(overlaps: pd.DataFrame, n_requests: Mapping[str, int]) -> pd.DataFrame:
    """Overlap of every variant with the reference set, from ``units.overlap_table``: variant,
    family, n_requests, jaccard, chance, corrected.
    """
    rows = overlaps[overlaps["first"] == REFERENCE].drop(columns="first")
    rows = rows.rename(columns={"second": "variant"}).reset_index(drop=True)
    rows.insert(1, "family", rows["variant"].map(family))
    rows.insert(2, "n_requests", rows["variant"].map(n_requests))
    return rows


def partition_overlap(one: units.UnitPartition, other: units.UnitPartition) -> pd.DataFrame:
    """How much two partitions agree, group by group: group, jaccard, chance, corrected."""
    rows = []
    for group in units.GROUPS:
        pair = units.overlap_table({"one": one.units(group), "other": other.units(group)})
        rows.append(pair[(pair["first"] == "one") & (pair["second"] == "other")])
    table = pd.concat(rows).drop(columns=["first", "second"]).reset_index(drop=True)
    table.insert(0, "group", units.GROUPS)
    return table
