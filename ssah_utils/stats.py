"""Intervals and tests for what the notebooks report. numpy, pandas, scipy and scikit-learn only."""

import warnings
from collections.abc import Callable, Iterable

import numpy as np
import pandas as pd
from scipy import stats
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

RESAMPLES = 2000


def mean_interval(
    values: np.ndarray, seed: int = 0, confidence: float = 0.95
) -> tuple[float, float, float]:
    """Mean and percentile-bootstrap interval over independent values; the interval is the point
    when all are equal.
    """
    values = np.asarray(values, dtype=float)
    if len(values) == 0:
        raise ValueError("no values to average")
    mean = float(values.mean())
    if np.ptp(values) == 0:
        return mean, mean, mean
    interval = stats.bootstrap(
        (values,),
        np.mean,
        n_resamples=RESAMPLES,
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return mean, float(interval.low), float(interval.high)


def proportion_interval(
    outcomes: np.ndarray, confidence: float = 0.95
) -> tuple[float, float, float]:
    """Share of True and its Wilson interval, which stays honest at 0 and 1 where a bootstrap has no
    width.
    """
    outcomes = np.asarray(outcomes, dtype=bool)
    if len(outcomes) == 0:
        raise ValueError("no outcomes to count")
    result = stats.binomtest(int(outcomes.sum()), len(outcomes)).proportion_ci(
        confidence, method="wilson"
    )
    return float(outcomes.mean()), float(result.low), float(result.high)


def difference_interval(
    a: np.ndarray, b: np.ndarray, seed: int = 0, confidence: float = 0.95
) -> tuple[float, float, float]:
    """Mean of ``a`` minus mean of ``b``, two independent groups, and its percentile-bootstrap
    interval; NaN if one is empty.
    """
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if not len(a) or not len(b):
        return (float("nan"),) * 3
    rng = np.random.default_rng(seed)
    draws = [
        values[rng.integers(0, len(values), (RESAMPLES, len(values)))].mean(1) for values in (a, b)
    ]
    low, high = np.quantile(draws[0] - draws[1], [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(a.mean() - b.mean()), float(low), float(high)


def paired_difference(a: np.ndarray, b: np.ndarray, seed: int = 0) -> dict[str, float]:
    """Mean of a - b over the same prompts, its interval, a permutation p-value, the effect size.

    ``a`` and ``b``: (n_prompts,), or (n_draws, n_prompts) where there are several seeds or random
    draws. The interval is then over both (``hierarchical_interval``); p is of sign flips of every
    prompt's mean over draws. ``effect`` is Cohen's d_z of these means: the mean difference over
    their standard deviation; 0 when both are 0, infinite when only the deviation is.
    """
    difference = np.asarray(a, dtype=float) - np.asarray(b, dtype=float)
    if difference.ndim == 1:
        mean, low, high = mean_interval(difference, seed)
    else:
        mean, low, high = hierarchical_interval(difference, seed)
        difference = difference.mean(0)
    test = stats.permutation_test(
        (difference,),
        np.mean,
        permutation_type="samples",
        n_resamples=RESAMPLES,
        vectorized=True,
        rng=np.random.default_rng(seed),
    )
    return {
        "difference": mean,
        "low": low,
        "high": high,
        "p": float(test.pvalue),
        "effect": _effect(difference),
    }


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
    if (
        np.ptp(difference) == 0
    ):  # also of a single difference; the computed deviation of equal values need not be 0
        return float(np.sign(mean) * np.inf) if mean else 0.0
    return float(mean / difference.std(ddof=1))


def hierarchical_interval(
    values: np.ndarray, seed: int = 0, confidence: float = 0.95
) -> tuple[float, float, float]:
    """Mean and percentile-bootstrap interval of a (n_seeds, n_prompts) matrix: seeds and prompts
    are both drawn anew.

    Every seed answered the same prompts (crossed, not nested), so a resample takes rows and columns
    of the matrix. With one seed, or one prompt, that side contributes no uncertainty.
    """
    values = np.asarray(values, dtype=float)
    if values.ndim != 2 or values.size == 0:
        raise ValueError(
            f"a matrix of seeds and prompts is needed, not an array of shape {values.shape}"
        )
    rng = np.random.default_rng(seed)
    n_seeds, n_prompts = values.shape
    row_weights = rng.multinomial(n_seeds, np.full(n_seeds, 1 / n_seeds), RESAMPLES) / n_seeds
    column_weights = (
        rng.multinomial(n_prompts, np.full(n_prompts, 1 / n_prompts), RESAMPLES) / n_prompts
    )
    means = ((row_weights @ values) * column_weights).sum(1)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(values.mean()), float(low), float(high)


def auc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Probability that a True has a higher score than a False (ties count one half); NaN when one
    of them is missing.
    """
    scores, labels = np.asarray(scores, dtype=float), np.asarray(labels, dtype=bool)
    if labels.all() or not labels.any():
        return float("nan")
    return float(
        stats.mannwhitneyu(scores[labels], scores[~labels]).statistic
        / (labels.sum() * (~labels).sum())
    )


def auc_interval(
    scores: np.ndarray, labels: np.ndarray, seed: int = 0
) -> tuple[float, float, float]:
    """AUC and its percentile-bootstrap interval over cases."""
    return case_interval(
        auc, np.asarray(scores, dtype=float), np.asarray(labels, dtype=bool), seed=seed
    )


def case_interval(
    statistic: Callable[..., float], *columns: np.ndarray, seed: int = 0
) -> tuple[float, float, float]:
    """A statistic of whole cases (rows of the columns) and its percentile-bootstrap interval, over
    the draws that define it.
    """
    rng = np.random.default_rng(seed)
    n = len(columns[0])
    draws = (rng.integers(0, n, n) for _ in range(RESAMPLES // 4))
    values = [statistic(*(column[rows] for column in columns)) for rows in draws]
    with warnings.catch_warnings(action="ignore"):  # no draw defined: NaN, as it should be
        low, high = np.nanquantile(values, [0.025, 0.975])
    return float(statistic(*columns)), float(low), float(high)


def out_of_fold(features: np.ndarray, labels: np.ndarray, seed: int = 0) -> np.ndarray:
    """Logistic-regression scores of every case from a fit on the other folds; constant where only
    one label occurs.
    """
    counts = np.bincount(labels.astype(int), minlength=2)
    if counts.min() < 2:
        return np.zeros(len(labels))
    folds = StratifiedKFold(min(5, counts.min()), shuffle=True, random_state=seed)
    return cross_val_predict(
        make_pipeline(StandardScaler(), LogisticRegression()),
        features,
        labels,
        cv=folds,
        method="decision_function",
    )


def holm(p_values: list[float]) -> list[float]:
    """Holm-adjusted p-values, in the order given."""
    p = np.asarray(p_values, dtype=float)
    order = np.argsort(p)
    stepped = np.maximum.accumulate((len(p) - np.arange(len(p))) * p[order])
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(stepped, 1)
    return adjusted.tolist()


def rate_table(rows: pd.DataFrame, by: list[str] | str, columns: list[str]) -> pd.DataFrame:
    """Mean, low, high of each column per group of rows: Wilson for True/False columns, bootstrap
    for numbers.

    Missing values do not count; where all are missing, the mean is NaN and n is 0.
    """

    def interval(values: pd.Series) -> tuple[float, float, float]:
        if values.empty:
            return float("nan"), float("nan"), float("nan")
        values = values.infer_objects()
        return proportion_interval(values) if values.dtype == bool else mean_interval(values)

    records = []
    for key, group in rows.groupby(by, sort=False, observed=True):
        for column in columns:
            values = group[column].dropna()
            mean, low, high = interval(values)
            keys = dict(
                zip(
                    [by] if isinstance(by, str) else by,
                    key if isinstance(key, tuple) else (key,),
                    strict=True,
                )
            )
            records.append(
                keys | {"metric": column, "mean": mean, "low": low, "high": high, "n": len(values)}
            )
    return pd.DataFrame(records)
