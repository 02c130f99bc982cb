"""Intervals and tests against known values."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats as reference

from ssah_utils import stats


def wilson(k: int, n: int, z: float) -> tuple[float, float]:
    centre = (k + z**2 / 2) / (n + z**2)
    half = z * math.sqrt(k * (n - k) / n + z**2 / 4) / (n + z**2)
    return max(0.0, centre - half), min(1.0, centre + half)


# ---------------------------------------------------------------------------------------- intervals


def test_mean_interval_is_that_of_a_large_normal_sample():
    values = np.random.default_rng(0).normal(5, 2, 400)
    mean, low, high = stats.mean_interval(values)
    expected = reference.t.interval(0.95, 399, values.mean(), reference.sem(values))
    assert mean == pytest.approx(values.mean(), rel=1e-12)
    assert (low, high) == pytest.approx(expected, abs=0.03)  # 0.39 wide
    assert stats.mean_interval(values) == (mean, low, high)
    assert stats.mean_interval(values, seed=1) != (mean, low, high)
    narrow = stats.mean_interval(values, confidence=0.5)
    assert low < narrow[1] < mean < narrow[2] < high


def test_mean_interval_covers_the_mean_about_as_often_as_it_says():
    generator = np.random.default_rng(0)
    intervals = [stats.mean_interval(generator.exponential(1, 40)) for _ in range(100)]
    assert 86 <= sum(low <= 1 <= high for _, low, high in intervals) <= 99


@pytest.mark.parametrize("values", [[3.0], [3.0] * 5])
def test_mean_interval_of_equal_values_is_a_point(values):
    assert stats.mean_interval(values) == (3, 3, 3)


def test_no_values_are_an_error():
    with pytest.raises(ValueError, match="no values"):
        stats.mean_interval([])
    with pytest.raises(ValueError, match="no outcomes"):
        stats.proportion_interval([])


@pytest.mark.parametrize(("k", "n"), [(0, 10), (1, 10), (5, 10), (10, 10), (30, 100), (0, 1)])
def test_proportion_interval_is_wilsons(k, n):
    outcomes = np.arange(n) < k
    share, low, high = stats.proportion_interval(outcomes)
    assert share == k / n
    assert (low, high) == pytest.approx(wilson(k, n, 1.959963984540054), abs=1e-9)
    assert stats.proportion_interval(outcomes, 0.9)[1:] == pytest.approx(
        wilson(k, n, 1.6448536269514722), abs=1e-9
    )


def test_proportion_interval_of_no_successes_has_a_width():
    assert stats.proportion_interval([False] * 10) == pytest.approx((0, 0, 0.2775328), abs=1e-6)


# -------------------------------------------------------------------------------- paired difference


def test_clear_shift_has_a_small_p_value():
    generator = np.random.default_rng(0)
    b = generator.normal(0, 1, 40)
    a = b + 1 + generator.normal(0, 0.5, 40)
    found = stats.paired_difference(a, b)
    assert found["difference"] == pytest.approx((a - b).mean())
    assert 0.8 < found["low"] < found["difference"] < found["high"] < 1.4
    assert found["p"] < 0.002
    turned = stats.paired_difference(b, a)
    assert turned["difference"] == pytest.approx(-found["difference"])
    assert turned["p"] < 0.002


def test_identical_outcomes_have_p_1():
    a = np.array([True, False, True, True])
    assert stats.paired_difference(a, a) == {
        "difference": 0,
        "low": 0,
        "high": 0,
        "p": 1,
        "effect": 0,
    }


def test_p_value_of_five_equal_signs_is_exact():
    assert stats.paired_difference([2, 3, 4, 5, 6], [1, 1, 1, 1, 1])["p"] == pytest.approx(2 / 2**5)


def test_p_value_pairs_the_samples():
    b = np.arange(12) * 100.0
    found = stats.paired_difference(b + 1, b)
    assert found["difference"] == pytest.approx(1)
    assert found["p"] < 0.005  # unpaired, a shift of 1 in a spread of hundreds is nothing


def test_p_value_without_a_shift_is_not_small():
    p_values = []
    for seed in range(40):
        a, b = np.random.default_rng(seed).normal(0, 1, (2, 25))
        p_values.append(stats.paired_difference(a, b)["p"])
    assert 0.3 < np.mean(p_values) < 0.7
    assert sum(p < 0.05 for p in p_values) <= 6


# --------------------------------------------------------------------------------------------- Holm


def test_holm_by_hand():
    # sorted: 0.005 * 4, 0.01 * 3, 0.03 * 2, 0.04 * 1 raised to the one before it
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


@pytest.mark.parametrize(
    ("given", "adjusted"),
    [([], []), ([0.2], [0.2]), ([0.6, 0.9], [1, 1]), ([0.01, 0.01], [0.02, 0.02])],
)
def test_holm_of_few(given, adjusted):
    assert stats.holm(given) == pytest.approx(adjusted)


# -------------------------------------------------------------------------------------- rate tables


@pytest.fixture
def rows() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "model": ["b"] * 4 + ["a"] * 3,
            "set": ["x", "x", "y", "y", "x", "x", "x"],
            "refused": [True, False, True, True, False, False, False],
            "length": [1.0, 3.0, 5.0, 5.0, 2.0, np.nan, 4.0],
        }
    )


def test_rate_table(rows):
    table = stats.rate_table(rows, ["model", "set"], ["refused", "length"])
    assert table.columns.tolist() == ["model", "set", "metric", "mean", "low", "high", "n"]
    keys = table[["model", "set", "metric"]].itertuples(index=False, name=None)
    assert list(keys) == [
        (model, name, metric)
        for model, name in [("b", "x"), ("b", "y"), ("a", "x")]
        for metric in ("refused", "length")
    ]
    refused = table[table["metric"] == "refused"].set_index(["model", "set"])
    assert refused["mean"].tolist() == [0.5, 1, 0]
    assert refused["n"].tolist() == [2, 2, 3]
    for (k, n), (_, row) in zip([(1, 2), (2, 2), (0, 3)], refused.iterrows(), strict=True):
        assert (row["low"], row["high"]) == pytest.approx(wilson(k, n, 1.959963984540054))
    length = table[table["metric"] == "length"]
    assert length["mean"].tolist() == [2, 5, 3]
    assert length["low"].tolist() == [1, 5, 2]
    assert length["high"].tolist() == [3, 5, 4]


def test_rate_table_by_one_column(rows):
    table = stats.rate_table(rows, "set", ["refused"])
    assert table["set"].tolist() == ["x", "y"]
    assert table["mean"].tolist() == [0.2, 1]


def test_outcomes_joined_with_rows_that_have_none_are_still_proportions(rows):
    joined = pd.concat(
        [
            rows.drop(columns="length"),
            pd.DataFrame({"set": ["z"] * 3, "correct": [True, True, True]}),
        ]
    )
    for set_name, metric, k, n in [("y", "refused", 2, 2), ("z", "correct", 3, 3)]:
        row = stats.rate_table(joined[joined["set"] == set_name], "set", [metric]).iloc[0]
        assert (row["low"], row["high"]) == pytest.approx(wilson(k, n, 1.959963984540054))


def test_number_of_values_leaves_out_the_missing(rows):
    table = stats.rate_table(rows, "model", ["length"]).set_index("model")
    assert table["n"].to_dict() == {"b": 4, "a": 2}


def test_difference_of_independent_groups_agrees_with_welch():
    rng = np.random.default_rng(0)
    a, b = rng.normal(1, 1, 80), rng.normal(0, 2, 60)
    mean, low, high = stats.difference_interval(a, b)
    expected = reference.ttest_ind(a, b, equal_var=False).confidence_interval()
    assert mean == pytest.approx(a.mean() - b.mean())
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=0.12)
    assert stats.difference_interval(a, b) == (mean, low, high), "the same seed draws the same"


def test_difference_of_groups_without_spread_or_members():
    assert stats.difference_interval([2.0], [0.5, 0.5]) == (1.5, 1.5, 1.5)
    assert all(math.isnan(value) for value in stats.difference_interval([], [1.0]))


# --------------------------------------------------------------------------------------- prediction


def test_auc_is_the_share_of_ordered_pairs():
    rng = np.random.default_rng(0)
    labels = rng.random(60) < 0.4
    scores = rng.integers(0, 10, 60) + 2 * labels
    higher = scores[labels][:, None] - scores[~labels]
    assert stats.auc(scores, labels) == pytest.approx(((higher > 0) + 0.5 * (higher == 0)).mean())
    assert math.isnan(stats.auc(scores, np.ones(60, bool)))


def test_auc_interval_covers_chance_for_noise_and_not_for_signal():
    rng = np.random.default_rng(1)
    labels = rng.random(300) < 0.5
    value, low, high = stats.auc_interval(rng.normal(size=300), labels)
    assert low < 0.5 < high and low < value < high
    assert stats.auc_interval(rng.normal(size=300) + 2 * labels, labels)[1] > 0.8


def test_out_of_fold_scores_find_a_signal_and_no_noise():
    rng = np.random.default_rng(2)
    labels = rng.random(400) < 0.3
    signal = np.column_stack([rng.normal(size=400) + labels, rng.normal(size=400)])
    assert stats.auc(stats.out_of_fold(signal, labels), labels) > 0.65
    assert abs(stats.auc(stats.out_of_fold(rng.normal(size=(400, 5)), labels), labels) - 0.5) < 0.12
    assert (stats.out_of_fold(signal, np.zeros(400, bool)) == 0).all()


# ------------------------------------------------------------------- effects, seeds, missing values


def test_effect_is_the_mean_difference_over_its_deviation():
    a, b = np.random.default_rng(0).normal(1, 2, (2, 50))
    t = reference.ttest_rel(a, b).statistic
    assert stats.paired_difference(a, b)["effect"] == pytest.approx(t / math.sqrt(50))
    assert stats.paired_difference(a, a)["effect"] == 0
    assert stats.paired_difference(a, a + 0.1)["effect"] < -1e9  # equal differences
    assert stats.paired_difference([1, 1, 1], [0, 0, 0])["effect"] == math.inf


def test_hierarchical_interval_adds_the_variances_of_seeds_and_prompts():
    """Additive effects of seeds and prompts: what the mean varies by is known."""
    rng = np.random.default_rng(0)
    seeds, requests = rng.normal(0, 1, 12), rng.normal(0, 3, 90)
    mean, low, high = stats.hierarchical_interval(5 + seeds[:, None] + requests)
    assert mean == pytest.approx(5 + seeds.mean() + requests.mean())
    over_seeds = reference.t(11).ppf(0.975) * math.sqrt(seeds.var(ddof=1) / 12)
    half = math.hypot(over_seeds, 1.96 * math.sqrt(requests.var(ddof=1) / 90))
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.1 * half)
    assert stats.hierarchical_interval(5 + seeds[:, None] + requests) == (mean, low, high)


@pytest.mark.parametrize("sd_of_seeds, sd_of_rest", [(1.0, 0.5), (0.1, 3.0), (0.0, 1.0)])
def test_hierarchical_interval_of_three_seeds_holds_the_true_mean_as_often_as_it_says(
    sd_of_seeds, sd_of_rest
):
    """A bootstrap of three seeds does so in 80 of 100 cases where seeds differ most."""
    rng, n_held, n_tried = np.random.default_rng(6), 0, 300
    for k in range(n_tried):
        seeds, requests = rng.normal(0, sd_of_seeds, (3, 1)), rng.normal(0, 1, 40)
        values = seeds + requests + rng.normal(0, sd_of_rest, (3, 40))
        _, low, high = stats.hierarchical_interval(values, k)
        n_held += low <= 0 <= high
    assert n_held / n_tried >= 0.92


def test_hierarchical_interval_is_wider_than_one_that_takes_seeds_for_prompts():
    values = np.repeat(np.random.default_rng(0).normal(0, 1, (5, 1)), 100, axis=1)
    _, low, high = stats.hierarchical_interval(values)
    _, naive_low, naive_high = stats.mean_interval(values.ravel())
    assert high - low > 4 * (naive_high - naive_low)


def test_hierarchical_interval_of_one_seed_is_that_of_its_prompts():
    values = np.random.default_rng(0).normal(0, 1, (1, 200))
    found, expected = stats.hierarchical_interval(values), stats.mean_interval(values[0])
    assert found == pytest.approx(expected, abs=0.02)
    assert stats.hierarchical_interval(np.full((3, 4), 2.0)) == (2, 2, 2)


@pytest.mark.parametrize("values", [[1.0, 2.0], [[]], 3.0])
def test_hierarchical_interval_needs_a_matrix(values):
    with pytest.raises(ValueError, match="a matrix of seeds and prompts"):
        stats.hierarchical_interval(values)


def test_rate_table_of_a_column_that_is_all_missing():
    rows = pd.DataFrame(
        {"model": ["a", "a", "b"], "x": [np.nan, np.nan, 1.0], "y": [True, False, True]}
    )
    table = stats.rate_table(rows, "model", ["x", "y"]).set_index(["model", "metric"])
    missing = table.loc[("a", "x")]
    assert missing["n"] == 0 and missing[["mean", "low", "high"]].isna().all()
    assert table.loc[("b", "x"), "mean"] == 1 and table.loc[("a", "y"), "mean"] == 0.5


def test_case_interval_resamples_whole_cases():
    a = np.random.default_rng(0).normal(0, 1, 300)
    value, low, high = stats.case_interval(lambda x, y: np.corrcoef(x, y)[0, 1], a, 2 * a)
    assert (value, low, high) == pytest.approx((1, 1, 1))
    mean, low, high = stats.case_interval(np.mean, a)
    assert (mean, low, high) == pytest.approx(stats.mean_interval(a), abs=0.02)
    assert all(map(math.isnan, stats.case_interval(lambda x: math.nan, a)))


def test_a_paired_difference_over_draws_has_the_interval_over_both_and_the_test_of_the_means():
    rng = np.random.default_rng(3)
    a, b = rng.normal(size=(4, 30)) + 0.4, rng.normal(size=(1, 30))
    found = stats.paired_difference(a, b, seed=2)
    expected = stats.hierarchical_interval(a - b, 2)
    assert (found["difference"], found["low"], found["high"]) == expected
    of_means = stats.paired_difference(a.mean(0), b[0], seed=2)
    assert found["p"] >= of_means["p"] and found["effect"] == pytest.approx(of_means["effect"])


@pytest.mark.parametrize("sign", [1, -1])
def test_draws_that_differ_much_make_a_difference_less_certain_than_its_prompts_do(sign):
    of_draws = sign * np.array([[0.2], [0.1], [1.2]])
    values = of_draws + np.random.default_rng(7).normal(0, 0.1, (3, 50))
    found = stats.paired_difference(values, np.zeros((1, 50)))
    by_draws = reference.ttest_1samp(values.mean(1), 0).pvalue
    assert stats.paired_difference(values.mean(0), np.zeros(50))["p"] < 0.01 < 0.2 < by_draws
    assert found["p"] == pytest.approx(by_draws, rel=0.02) and found["low"] < 0 < found["high"]


def test_one_draw_is_no_more_certain_than_its_prompts():
    rng = np.random.default_rng(4)
    a, b = rng.normal(size=(1, 40)), rng.normal(size=(1, 40))
    found, plain = stats.paired_difference(a, b), stats.paired_difference(a[0], b[0])
    assert found["difference"] == pytest.approx(plain["difference"])
    assert found["low"] == pytest.approx(plain["low"], abs=0.1)


def test_a_table_of_pairs_is_corrected_over_all_of_them():
    rng = np.random.default_rng(5)
    pairs = [({"condition": str(n)}, rng.normal(size=20) + n / 4, np.zeros(20)) for n in range(4)]
    table = stats.paired_table(pairs, seed=1)
    assert table["condition"].tolist() == ["0", "1", "2", "3"]
    assert table["p_holm"].tolist() == stats.holm(table["p"].tolist())
    assert table.loc[2, "difference"] == pairs[2][1].mean()
    assert stats.paired_table([]).empty
