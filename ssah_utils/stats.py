"""Intervals and tests for what the notebooks report."""

import warnings
from collections.abc import Callable, Iterable

import numpy as np
import pandas as pd

from ssah_utils import extras
from ssah_utils.crossed import CrossedMean, Z

with extras.needed("eval"):
    from scipy import stats

RESAMPLES = 2000


def mean_interval(
    values: np.ndarray, seed: int = 0, confidence: float = 0.95
) -> tuple[float, float, float]:
    """Mean of independent values and its percentile-bootstrap interval: (mean, low, high).

    The interval is the point when all values are equal. Raises ``ValueError`` for no value.
    """
    values = np.asarray(values, dtype=float)
    if len(values) == 0:
        raise ValueError("no values to average")
    mean = float(values.mean())
    if np.ptp(values) == 0:
        return mean, mean, mean
    result = stats.bootstrap(
        (values,),
        np.mean,
        n_resamples=RESAMPLES,
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return mean, float(result.confidence_interval.low), float(result.confidence_interval.high)


def proportion_interval(
    outcomes: np.ndarray, confidence: float = 0.95
) -> tuple[float, float, float]:
    """Share of True and its Wilson interval: (share, low, high).

    At 0 and 1 this interval keeps a width, where a bootstrap has none. Raises ``ValueError`` for no
    outcome.

    >>> [round(value, 3) for value in proportion_interval([False] * 10)]
    [0.0, 0.0, 0.278]
    """
    outcomes = np.asarray(outcomes, dtype=bool)
    if len(outcomes) == 0:
        raise ValueError("no outcomes to count")
    test = stats.binomtest(int(outcomes.sum()), len(outcomes))
    interval = test.proportion_ci(confidence, method="wilson")
    return float(outcomes.mean()), float(interval.low), float(interval.high)


def difference_interval(
    a: np.ndarray, b: np.ndarray, seed: int = 0, confidence: float = 0.95
) -> tuple[float, float, float]:
    """Mean of ``a`` minus mean of ``b``, two independent groups: (difference, low, high).

    The interval is a percentile bootstrap; all three are NaN where a group is empty.
    """
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if not len(a) or not len(b):
        return (float("nan"),) * 3
    rng = np.random.default_rng(seed)
    resampled_means = [
        values[rng.integers(0, len(values), (RESAMPLES, len(values)))].mean(1) for values in (a, b)
    ]
    tails = [(1 - confidence) / 2, (1 + confidence) / 2]
    low, high = np.quantile(resampled_means[0] - resampled_means[1], tails)
    return float(a.mean() - b.mean()), float(low), float(high)


def paired_difference(a: np.ndarray, b: np.ndarray, seed: int = 0) -> dict[str, float]:
    """Mean of a - b over the same prompts: ``difference``, ``low``, ``high``, ``p``, ``effect``.

    ``a`` and ``b``: (n_prompts,), or (n_draws, n_prompts) where there are several seeds or random
    draws. The interval is then over both (``hierarchical_interval``). ``p`` is of sign flips of
    every prompt's mean over draws; with several draws, that of the interval where it is larger, as
    no flip of prompts knows how draws differ. ``effect`` is Cohen's d_z of these means: the mean
    difference over their standard deviation; 0 when both are 0, infinite when only the deviation
    is.
    """
    difference = np.atleast_2d(np.asarray(a, dtype=float) - np.asarray(b, dtype=float))
    over_both = _crossed_mean(difference, seed)
    low, high = over_both.interval()
    of_prompts = difference.mean(0)
    test = stats.permutation_test(
        (of_prompts,),
        np.mean,
        permutation_type="samples",
        n_resamples=RESAMPLES,
        vectorized=True,
        rng=np.random.default_rng(seed),
    )
    p = float(test.pvalue)
    if len(difference) > 1:
        p = max(p, over_both.p_other())
    mean, effect = over_both.mean, _effect(of_prompts)
    return {"difference": mean, "low": low, "high": high, "p": p, "effect": effect}


def paired_table(
    pairs: Iterable[tuple[dict[str, object], np.ndarray, np.ndarray]], seed: int = 0
) -> pd.DataFrame:
    """``paired_difference`` of many pairs, with p-values corrected over the table (Holm): p_holm.

    ``pairs``: (columns that name the row, a, b), as ``paired_difference`` takes them.
    """
    rows = [names | paired_difference(a, b, seed) for names, a, b in pairs]
    table = pd.DataFrame(rows)
    if rows:
        table["p_holm"] = holm(table["p"].tolist())
    return table


def _effect(difference: np.ndarray) -> float:
    mean = difference.mean()
    # also of a single one; by its formula, the deviation of equal values need not be exactly 0
    if np.ptp(difference) == 0:
        return float(np.sign(mean) * np.inf) if mean else 0.0
    return float(mean / difference.std(ddof=1))


def hierarchical_interval(
    values: np.ndarray, seed: int = 0, confidence: float = 0.95
) -> tuple[float, float, float]:
    """Mean of a (n_seeds, n_prompts) matrix and its interval over both: (mean, low, high).

    Every seed answered the same prompts (crossed, not nested). By ``crossed``: Student's t over the
    seeds' means, as a bootstrap of three of them finds a third less variance than there is and
    takes it for certain; over prompts the percentile bootstrap of their means over seeds. One seed
    alone, or one prompt, contributes no uncertainty.
    """
    mean = _crossed_mean(np.asarray(values, dtype=float), seed)
    return mean.mean, *mean.interval(confidence)


def _crossed_mean(values: np.ndarray, seed: int) -> CrossedMean:
    if values.ndim != 2 or values.size == 0:
        raise ValueError(
            f"a matrix of seeds and prompts is needed, not an array of shape {values.shape}"
        )
    mean, low, high = mean_interval(values.mean(0), seed)
    by_seed = values.mean(1)
    sd = by_seed.std(ddof=1) if np.ptp(by_seed) else 0.0  # 0 for one seed
    return CrossedMean(mean, (mean - low) / Z, (high - mean) / Z, float(sd), len(values))


def auc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Probability that a True has a higher score than a False; a tie counts one half.

    NaN when one of the labels is missing.

    >>> auc([0.1, 0.4, 0.4, 0.9], [False, False, True, True])
    0.875
    """
    scores, labels = np.asarray(scores, dtype=float), np.asarray(labels, dtype=bool)
    if labels.all() or not labels.any():
        return float("nan")
    wins = stats.mannwhitneyu(scores[labels], scores[~labels]).statistic
    return float(wins / (labels.sum() * (~labels).sum()))


def auc_interval(
    scores: np.ndarray, labels: np.ndarray, seed: int = 0
) -> tuple[float, float, float]:
    """AUC and its percentile-bootstrap interval over cases: (auc, low, high)."""
    scores, labels = np.asarray(scores, dtype=float), np.asarray(labels, dtype=bool)
    return case_interval(auc, scores, labels, seed=seed)


def case_interval(
    statistic: Callable[..., float], *columns: np.ndarray, seed: int = 0
) -> tuple[float, float, float]:
    """A statistic of whole cases (rows of the columns) and its percentile-bootstrap interval.

    Draws of which the statistic is undefined (NaN), such as those without one label, are left out.
    """
    rng = np.random.default_rng(seed)
    n = len(columns[0])
    draws = (rng.integers(0, n, n) for _ in range(RESAMPLES // 4))
    values = [statistic(*(column[rows] for column in columns)) for rows in draws]
    with warnings.catch_warnings(action="ignore"):  # no draw defined: NaN, as it should be
        low, high = np.nanquantile(values, [0.025, 0.975])
    return float(statistic(*columns)), float(low), float(high)


def out_of_fold(features: np.ndarray, labels: np.ndarray, seed: int = 0) -> np.ndarray:
    """Logistic-regression score of every case from a fit on the other folds: (n,).

    ``features``: (n, n_features). Zero everywhere where a label occurs less than twice.
    """
    counts = np.bincount(labels.astype(int), minlength=2)
    if counts.min() < 2:
        return np.zeros(len(labels))
    with extras.needed("eval"):  # seconds to import
        from sklearn.linear_model import LogisticRegression
        from sklearn.model_selection import StratifiedKFold, cross_val_predict
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    folds = StratifiedKFold(min(5, counts.min()), shuffle=True, random_state=seed)
    return cross_val_predict(
        make_pipeline(StandardScaler(), LogisticRegression()),
        features,
        labels,
        cv=folds,
        method="decision_function",
    )


def holm(p_values: list[float]) -> list[float]:
    """Holm-adjusted p-values (Holm 1979), in the order given.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    p = np.asarray(p_values, dtype=float)
    order = np.argsort(p)
    stepped = np.maximum.accumulate((len(p) - np.arange(len(p))) * p[order])
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(stepped, 1)
    return adjusted.tolist()


def benjamini_hochberg(p_values: list[float]) -> list[float]:
    """Adjusted p-values that bound the false discovery rate (Benjamini and Hochberg 1995), in the
    order given.

    >>> benjamini_hochberg([0.01, 0.04, 0.03])
    [0.03, 0.04, 0.04]
    """
    p = np.asarray(p_values, dtype=float)
    order = np.argsort(p)[::-1]
    stepped = np.minimum.accumulate(len(p) / (len(p) - np.arange(len(p))) * p[order])
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(stepped, 1)
    return adjusted.tolist()


def rate_table(rows: pd.DataFrame, by: list[str] | str, columns: list[str]) -> pd.DataFrame:
    """Mean of each column per group of rows, with its interval, in long form.

    Columns: those of ``by``, metric, mean, low, high, n. The interval is Wilson's for True/False
    columns and a bootstrap for numbers. Missing values do not count; where all are missing, the
    mean is NaN and n is 0.
    """

    def interval(values: pd.Series) -> tuple[float, float, float]:
        if values.empty:
            return float("nan"), float("nan"), float("nan")
        values = values.infer_objects()
        return proportion_interval(values) if values.dtype == bool else mean_interval(values)

    names = [by] if isinstance(by, str) else by
    records = []
    for key, group in rows.groupby(by, sort=False, observed=True):
        keys = dict(zip(names, key if isinstance(key, tuple) else (key,), strict=True))
        for column in columns:
            values = group[column].dropna()
            mean, low, high = interval(values)
            found = {"metric": column, "mean": mean, "low": low, "high": high, "n": len(values)}
            records.append(keys | found)
    return pd.DataFrame(records)
