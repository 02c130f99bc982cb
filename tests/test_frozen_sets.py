"""The frozen sets hold what their ids say, and the order of freezing is safety first."""

import itertools

import pytest
import torch

from ssah_utils import frozen_sets, units
from ssah_utils.per_unit import PerUnit

SIZES = {"attention": (3, 20), "mlp": (3, 30)}


@pytest.fixture
def scored():
    generator = torch.Generator().manual_seed(0)
    z_safety, z_utility = (
        PerUnit({kind: torch.randn(size, generator=generator) for kind, size in SIZES.items()})
        for _ in range(2)
    )
    parted = units.partition(z_safety, z_utility, 0.1, 0.2, 0.2)
    return parted, z_safety, z_utility


@pytest.fixture
def sets(scored):
    return frozen_sets.frozen_sets(*scored, 0.2, torch.Generator().manual_seed(1))


def test_sets_grow_from_safety_to_all_complex_units(scored, sets):
    parted, *_ = scored
    safety, some, most = (
        sets[name] for name in ("safety", "safety_some_complex", "safety_all_complex")
    )
    assert sets["nothing"] is None
    assert safety.equals(parted.units("safety"))
    assert some.count() == 15 + 30, "a tenth and a fifth of 150 units"
    assert not (safety & ~some).any() and not (some & ~most).any()
    assert (~most).equals(parted.units("utility") | parted.units("redundant"))


def test_some_complex_units_are_those_with_the_largest_sum_of_scores(scored, sets):
    parted, z_safety, z_utility = scored
    rows = units.to_table(z_safety, z_utility, parted)
    rows = rows[rows["group"] == "complex"].assign(sum=lambda t: t["z_safety"] + t["z_utility"])
    best = rows.nlargest(30, "sum")
    expected = {f"{row.kind}/{row.layer}/{row.channel}" for row in best.itertuples()}
    assert set((sets["safety_some_complex"] & ~sets["safety"]).names()) == expected


def test_controls_have_as_many_units_in_every_module(sets):
    for name in ("safety_some_complex", "safety_all_complex"):
        control = sets[frozen_sets.RANDOM + name]
        assert not control.equals(sets[name])
        for kind in SIZES:
            assert control[kind].sum(1).tolist() == sets[name][kind].sum(1).tolist()


def test_every_set_has_a_title_and_no_two_the_same(sets):
    titles = frozen_sets.titles(0.06)
    assert sets.keys() <= titles.keys() and len(set(titles.values())) == len(titles)
    assert titles["random_as_safety_some_complex"] == "random, as safety + 6% complex"
    assert frozen_sets.titles(0.125)["safety_some_complex"] == "safety + 12.5% complex"


def test_more_complex_units_than_there_are_are_refused(scored):
    with pytest.raises(ValueError, match="only 75 units are there"):
        frozen_sets.frozen_sets(*scored, 0.9, torch.Generator())


def test_the_order_is_safety_then_complex_then_the_others_each_by_its_score(scored):
    """As sorting a table does it, row by row."""
    parted, z_safety, z_utility = scored
    rows = units.to_table(z_safety, z_utility, parted)
    keys = {
        "safety": (0, lambda row: row.z_safety - row.z_utility),
        "complex": (1, lambda row: row.z_safety + row.z_utility),
        "utility": (2, lambda row: row.z_safety),
        "redundant": (2, lambda row: row.z_safety),
    }
    ordered = sorted(
        rows.itertuples(), key=lambda row: (keys[row.group][0], -keys[row.group][1](row))
    )
    order = frozen_sets.safety_first(*scored)
    found = [float(order[row.kind][row.layer, row.channel]) for row in ordered]
    assert found == [-float(place) for place in range(150)]


def test_the_order_needs_a_score_of_every_unit(scored):
    parted, z_safety, z_utility = scored
    z_utility["mlp"][1, 2] = torch.nan
    with pytest.raises(ValueError, match="scores of 1 mlp units of block 1 are nan or infinite"):
        frozen_sets.safety_first(parted, z_safety, z_utility)


def test_shares_of_the_order_are_nested_and_begin_with_the_compared_sets(scored, sets):
    order = frozen_sets.safety_first(*scored)
    shares = [units.top_units(order, fraction) for fraction in (0.1, 0.3, 0.6, 1.0)]
    for smaller, larger in itertools.pairwise(shares):
        assert not (smaller & ~larger).any()
    assert shares[0].equals(sets["safety"])
    assert shares[1].equals(sets["safety_some_complex"])
    assert shares[2].equals(sets["safety_all_complex"])
    assert shares[3].all()


def test_scores_far_from_zero_change_no_order(scored):
    """The order once came from scores with 1e6 added, which float32 cannot tell apart."""
    parted, z_safety, z_utility = scored
    moved = frozen_sets.safety_first(parted, z_safety * 1e4, z_utility * 1e4)
    assert moved.equals(frozen_sets.safety_first(*scored))
