"""Who left the safety group, what was known of them before, and how well that told it."""

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import roc_auc_score

from ssah_utils import stats, units
from ssah_utils.experiments import transfer
from ssah_utils.per_unit import PerUnit

SIZES = {"attention": (2, 40), "mlp": (2, 60)}


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    """An AUC takes a millisecond, and its interval one for every draw."""
    monkeypatch.setattr(stats, "RESAMPLES", 160)


def random_values(seed: int) -> PerUnit:
    generator = torch.Generator().manual_seed(seed)
    return PerUnit({kind: torch.randn(size, generator=generator) for kind, size in SIZES.items()})


@pytest.fixture
def scored():
    z_safety, z_utility = random_values(0), random_values(1)
    return units.partition(z_safety, z_utility, 0.3, 0.2, 0.2), z_safety, z_utility


def test_those_that_left_are_the_ones_the_transition_table_counts(scored):
    before, z_safety, z_utility = scored
    after = units.partition(z_safety + random_values(2), z_utility, 0.3, 0.2, 0.2)
    left = transfer.left_group(before, after)
    table = units.transition_table(before, after).set_index(["before", "after"])["units"]
    assert left.dtype == bool and len(left) == 60
    assert (~left).sum() == table["safety", "safety"] and 0 < left.sum() < 60
    names = np.array(before.units("safety").names())
    assert set(names[~left]) == set(before.units("safety").names()) & set(
        after.units("safety").names()
    )


def test_nobody_leaves_where_nothing_changed(scored):
    assert not transfer.left_group(scored[0], scored[0]).any()


def test_features_are_those_of_each_safety_unit_in_the_order_of_the_labels(scored):
    parted, z_safety, z_utility = scored
    gradients = random_values(3).map(torch.abs)
    known = transfer.features(parted, z_safety, z_utility, gradients)
    assert list(known) == list(transfer.FEATURES)
    for row, name in zip(known.itertuples(), parted.units("safety").names(), strict=True):
        kind, layer, channel = name.split("/")
        safety, utility, norm = (
            float(values[kind][int(layer), int(channel)])
            for values in (z_safety, z_utility, gradients)
        )
        assert row.z_safety == safety and row.z_utility == utility
        assert row.boundary_distance == pytest.approx(utility - safety, abs=1e-6)
        assert row.first_gradient == pytest.approx(np.log(norm), abs=1e-6)


def test_single_features_are_judged_as_scikit_learn_does(scored):
    known = transfer.features(*scored, random_values(3).map(torch.abs))
    rng = np.random.default_rng(0)
    left = {("adaptation", 0): rng.random(60) < 0.4, ("floor", 0): rng.random(60) < 0.3}
    table = transfer.prediction_table(known, left, ("adaptation", 0))
    assert len(table) == 2 * 5
    for row in table[table["feature"] != transfer.COMBINED].itertuples():
        labels = left[row.data, row.seed]
        assert row.auc == pytest.approx(roc_auc_score(labels, known[row.feature]))
        assert row.low <= row.auc <= row.high and row.left == labels.mean()


def test_the_combination_finds_what_no_feature_shows_alone_and_nothing_in_noise():
    rng = np.random.default_rng(0)
    parted = units.partition(random_values(0), random_values(1), 1.0, 0.0, 0.0)
    known = transfer.features(
        parted, random_values(0), random_values(1), random_values(3).map(torch.exp)
    )
    hidden = known["z_safety"] + known["first_gradient"] > 0
    left = {
        ("a", 0): hidden.to_numpy(),
        ("a", 1): hidden.to_numpy(),
        ("noise", 0): rng.random(200) < 0.5,
    }
    table = transfer.prediction_table(known, left, ("a", 0)).set_index(["data", "seed", "feature"])
    combined = table["auc"].xs(transfer.COMBINED, level="feature")
    assert combined["a", 1] > 0.95 > table["auc"]["a", 1].drop(transfer.COMBINED).max()
    assert abs(combined["noise", 0] - 0.5) < 0.15


def test_a_unit_is_never_scored_by_a_fit_that_saw_it():
    """Labels at random: a fit scored on its own units would beat chance."""
    rng = np.random.default_rng(0)
    known = np.asarray(rng.normal(size=(60, 25)))
    labels = rng.random(60) < 0.5
    table = transfer.prediction_table(pd.DataFrame(known), {("a", 0): labels}, ("a", 0)).set_index(
        "feature"
    )
    assert table.loc[transfer.COMBINED, "auc"] < 0.65


def test_the_combination_is_read_on_seeds_that_it_was_not_fitted_to():
    rows = [
        ("a", 0, transfer.COMBINED, 0.99, 0.98, 1.0),
        ("a", 1, transfer.COMBINED, 0.70, 0.60, 0.80),
        ("a", 2, transfer.COMBINED, 0.71, 0.65, 0.75),
        ("a", 1, "z_safety", 0.1, 0.0, 0.95),
        ("floor", 0, transfer.COMBINED, 0.55, 0.45, 0.65),
    ]
    table = pd.DataFrame(rows, columns=["data", "seed", "feature", "auc", "low", "high"])
    t = 12.7062  # of one degree of freedom; times the standard error of two values 0.01 apart
    sides = np.hypot(0.10, 0.06) / 2**0.5, np.hypot(0.10, 0.04) / 2**0.5
    below, above = (np.hypot(t * 0.005, side) for side in sides)
    found = transfer.combined_auc(table, "a")
    assert found == pytest.approx((0.705, 0.705 - below, 0.705 + above), abs=1e-5)
    only = transfer.combined_auc(table, "floor")
    assert only == pytest.approx((0.55, 0.45, 0.65)), "the only seed is better than none"


def test_a_share_over_seeds_has_the_interval_of_its_mean_and_stays_a_share():
    three = pd.DataFrame({"share": [0.10, 0.12, 0.14]})
    half = 4.30265 * 0.02 / 3**0.5  # t of two degrees of freedom
    assert transfer.mean_share(three, "share") == pytest.approx((0.12, 0.12 - half, 0.12 + half))
    assert transfer.mean_share(pd.DataFrame({"share": [0.0, 0.1]}), "share")[1] == 0.0
    mean, *ends = transfer.mean_share(three[:1], "share")
    assert mean == 0.10 and np.isnan(ends).all()
