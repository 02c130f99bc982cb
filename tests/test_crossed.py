"""The mean over seeds and requests: its interval covers, its p-value and its power are what
simulation finds.
"""

import math

import numpy as np
import pytest

from ssah_utils import stats
from ssah_utils.crossed import CrossedMean, combined

DRAWS = 1000  # a share of 0.95 is then found within 0.02


def simulated(
    n_seeds: int, between_seeds: float, between_requests: float, rest: float, n_requests: int = 40
) -> np.ndarray:
    """Values of a crossed design with mean 0: (DRAWS, n_seeds, n_requests)."""
    draw = np.random.default_rng(0).normal
    seeds = between_seeds * draw(size=(DRAWS, n_seeds, 1))
    requests = between_requests * draw(size=(DRAWS, 1, n_requests))
    return seeds + requests + rest * draw(size=(DRAWS, n_seeds, n_requests))


def means_of(values: np.ndarray) -> list[CrossedMean]:
    """As a claims table has them: of each seed its mean and its own interval alone."""
    means = values.mean(2)
    half = 1.96 * values.std(2, ddof=1) / math.sqrt(values.shape[2])
    return [
        CrossedMean.of(mean, mean - width, mean + width)
        for mean, width in zip(means, half, strict=True)
    ]


def coverage(means: list[CrossedMean], true: float = 0.0) -> float:
    ends = np.array([mean.interval() for mean in means])
    return float(((ends[:, 0] <= true) & (true <= ends[:, 1])).mean())


# --------------------------------------------------------------------------------------- intervals


@pytest.mark.parametrize("n_seeds", [2, 3, 5])
@pytest.mark.parametrize(
    "deviations",
    [(0.0, 1.0, 0.2), (0.05, 1.0, 0.3), (0.5, 1.0, 0.5), (1.0, 0.5, 0.5), (2.0, 0.1, 0.1)],
)
def test_the_interval_of_a_crossed_design_covers_its_mean_at_least_as_often_as_it_says(
    n_seeds, deviations
):
    assert coverage(means_of(simulated(n_seeds, *deviations))) >= 0.925


@pytest.mark.parametrize("deviations", [(0.0, 1.0, 0.0), (2.0, 0.1, 0.1)])
def test_the_interval_is_exact_where_requests_alone_or_seeds_alone_vary(deviations):
    for n_seeds in (3, 5):
        assert 0.92 <= coverage(means_of(simulated(n_seeds, *deviations))) <= 0.98


def test_the_interval_of_one_seed_covers_the_mean_of_that_seed():
    assert 0.925 <= coverage(means_of(simulated(1, 0.0, 1.0, 0.5))) <= 0.97


def test_shares_near_0_and_1_are_covered_with_wilson_intervals_of_the_seeds():
    rng = np.random.default_rng(0)
    for centre in (0.0, 4.5, -4.5):
        logits = centre + 0.4 * rng.normal(size=(200, 3, 1)) + 2 * rng.normal(size=(200, 1, 48))
        answers = rng.random(logits.shape) < 1 / (1 + np.exp(-logits))
        many = centre + math.hypot(0.4, 2) * rng.normal(size=400_000)
        true = float((1 / (1 + np.exp(-many))).mean())
        means = []
        for draw in answers:
            found = np.array([stats.proportion_interval(seed) for seed in draw])
            means.append(CrossedMean.of(*found.T))
        assert coverage(means, true) >= 0.93


@pytest.mark.parametrize(("low", "high"), [(0.2, 0.9), (0.3, 0.3), (math.nan, math.nan)])
def test_one_seed_has_its_own_interval(low, high):
    ends = CrossedMean.of([0.3], [low], [high]).interval()
    assert ends == pytest.approx((low, high), nan_ok=True)


def test_requests_that_are_shared_do_not_count_again_with_every_seed():
    one = CrossedMean.of([1.0], [0.5], [1.5])
    many = CrossedMean.of([1.0] * 9, [0.5] * 9, [1.5] * 9)
    assert many.interval() == pytest.approx(one.interval())


def test_the_interval_by_hand():
    mean = CrossedMean.of([1.0, 2.0, 6.0], [0.0, 1.0, 5.0], [3.0, 4.0, 8.0])
    deviation = math.sqrt(7)  # of 1, 2, 6
    seeds = 4.302652729911275 * deviation / math.sqrt(3)  # t, two degrees of freedom
    assert mean.interval() == pytest.approx((3 - math.hypot(seeds, 1), 3 + math.hypot(seeds, 2)))


def test_seeds_without_intervals_have_that_of_their_spread_and_equal_ones_are_a_point():
    empty = [math.nan, math.nan]
    spread = CrossedMean.of([1.0, 3.0], empty, empty)
    half = 12.706204736174694 * math.sqrt(2) / math.sqrt(2)
    assert spread.interval() == pytest.approx((2 - half, 2 + half))
    assert CrossedMean.of([2.0, 2.0], empty, empty).interval() == (2.0, 2.0)
    assert not CrossedMean.of([2.0], empty[:1], empty[:1]).has_interval


def test_an_infinite_value_has_no_interval_and_no_value_is_an_error():
    mean = CrossedMean.of([math.inf, 3.0], [math.nan] * 2, [math.nan] * 2)
    assert mean.mean == math.inf and all(map(math.isnan, mean.interval()))
    assert math.isnan(mean.p_above()) and math.isnan(mean.power())
    with pytest.raises(ValueError, match="no values"):
        CrossedMean.of([], [], [])


def test_half_widths_of_independent_parts_add_in_squares():
    assert combined([3.0, 4.0, math.nan]) == 5.0
    assert math.isnan(combined([math.nan]))


# ---------------------------------------------------------------------------------------- p-values


def test_a_p_value_is_below_the_level_where_the_interval_lies_above():
    for mean in means_of(simulated(3, 0.1, 1.0, 0.3) + 0.4)[:60]:
        for confidence in (0.9, 0.95, 0.999):
            low, _ = mean.interval(confidence)
            assert (mean.p_above() < 1 - confidence) == (low > 0)


def test_without_an_effect_few_p_values_are_small():
    p = np.array([mean.p_above() for mean in means_of(simulated(3, 0.3, 1.0, 0.3))])
    assert (p < 0.05).mean() <= 0.04  # one side of two
    assert (p < 0.01).mean() <= 0.01 and (p == 1).mean() > 0.4


def test_a_null_other_than_0_and_a_mean_on_the_wrong_side():
    mean = CrossedMean.of([1.0], [1.0 - 1.959964], [1.0 + 1.959964])
    assert mean.p_above() == pytest.approx(0.3173, abs=1e-3)
    assert mean.p_above(-1.0) == pytest.approx(0.0455, abs=1e-3)
    assert mean.p_above(1.0) == mean.p_above(2.0) == 1.0
    assert mean.p_other() == mean.p_above() and mean.p_other(1.0) == 1.0


def test_a_mean_other_than_the_null_counts_on_either_side():
    below, above = CrossedMean(-1.0, 2.0, 0.5, 0.2, 3), CrossedMean(1.0, 0.5, 2.0, 0.2, 3)
    assert below.p_other() == above.p_other() == above.p_above() < 0.1
    assert below.p_other(-3.0) == CrossedMean(2.0, 2.0, 0.5, 0.2, 3).p_above()


# ------------------------------------------------------------------------------------------- power


def seen(means: list[CrossedMean]) -> float:
    """How often the interval leaves out 0."""
    ends = np.array([mean.interval() for mean in means])
    return float(((ends[:, 0] > 0) | (ends[:, 1] < 0)).mean())


@pytest.mark.parametrize("n_seeds", [1, 2, 3, 5])
def test_power_is_what_simulation_finds(n_seeds):
    between = 0.0 if n_seeds == 1 else 0.3
    design = CrossedMean(0.6, 1 / math.sqrt(40), 1 / math.sqrt(40), between, n_seeds)
    found = seen(means_of(0.6 + simulated(n_seeds, between, 1.0, 0.0)))
    assert design.power() == pytest.approx(found, abs=0.06)


def test_more_requests_and_more_seeds_do_what_the_formula_says():
    design = CrossedMean(0.3, 1 / math.sqrt(40), 1 / math.sqrt(40), 0.1, 3)
    for n_requests, n_seeds in ((80, 3), (40, 6), (80, 6)):
        found = seen(means_of(0.3 + simulated(n_seeds, 0.1, 1.0, 0.0, n_requests)))
        assert design.power(n_requests / 40, n_seeds) == pytest.approx(found, abs=0.06)


def test_the_sizes_that_are_said_to_be_needed_reach_the_power_and_smaller_ones_do_not():
    design = CrossedMean(0.5, 0.15, 0.15, 0.15, 3)
    times, seeds = design.requests_needed(), design.seeds_needed()
    assert design.power(requests=times) == pytest.approx(0.8, abs=1e-6)
    assert design.power(n_seeds=int(seeds)) >= 0.8 > design.power(n_seeds=int(seeds) - 1)
    small = design.smallest_effect()
    assert design.power(effect=small) == pytest.approx(0.8, abs=1e-6)


def test_requests_of_one_seed_follow_the_textbook():
    """n = (z(0.975) + z(0.8))^2 * variance / effect^2."""
    design = CrossedMean(0.25, 0.2, 0.2, 0.0, 1)
    assert design.requests_needed() == pytest.approx((1.96 + 0.8416) ** 2 * 0.2**2 / 0.25**2, 1e-3)
    assert math.isnan(design.seeds_needed()), "one seed says nothing of their spread"


def test_what_no_number_of_requests_or_of_seeds_can_show_is_infinite():
    assert CrossedMean(0.5, 0.1, 0.1, 2.0, 3).requests_needed() == math.inf
    assert CrossedMean(0.5, 0.4, 0.4, 0.1, 3).seeds_needed() == math.inf
