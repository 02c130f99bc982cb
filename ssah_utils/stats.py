"""Intervals and tests for what the notebooks report. numpy, pandas, scipy and scikit-learn only."""

import numpy as np
import pandas as pd
from scipy import stats
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

RESAMPLES = 2000


def mean_interval(values: np.ndarray, seed: int = 0, confidence: float = 0.95) -> tuple[float, float, float]:
    """Mean and percentile-bootstrap interval over independent values; the interval is the point when all are equal."""
    values = np.asarray(values, dtype=float)
    if len(values) == 0:
        raise ValueError("no values to average")
    mean = float(values.mean())
    if np.ptp(values) == 0:
        return mean, mean, mean
    interval = stats.bootstrap(
        (values,), np.mean, n_resamples=RESAMPLES, confidence_level=confidence, method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval  # fmt: skip
    return mean, float(interval.low), float(interval.high)


def proportion_interval(outcomes: np.ndarray, confidence: float = 0.95) -> tuple[float, float, float]:
    """Share of True and its Wilson interval, which stays honest at 0 and 1 where a bootstrap has no width."""
    outcomes = np.asarray(outcomes, dtype=bool)
    if len(outcomes) == 0:
        raise ValueError("no outcomes to count")
    result = stats.binomtest(int(outcomes.sum()), len(outcomes)).proportion_ci(confidence, method="wilson")
    return float(outcomes.mean()), float(result.low), float(result.high)


def paired_difference(a: np.ndarray, b: np.ndarray, seed: int = 0) -> dict[str, float]:
    """Mean of a - b over the same prompts, its bootstrap interval, and a sign-flip permutation p-value."""
    difference = np.asarray(a, dtype=float) - np.asarray(b, dtype=float)
    mean, low, high = mean_interval(difference, seed)
    test = stats.permutation_test(
        (difference,), np.mean, permutation_type="samples", n_resamples=RESAMPLES, vectorized=True,
        rng=np.random.default_rng(seed),
    )  # fmt: skip
    return {"difference": mean, "low": low, "high": high, "p": float(test.pvalue)}


def auc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Probability that a True has a higher score than a False (ties count one half); NaN when one of them is missing."""
    scores, labels = np.asarray(scores, dtype=float), np.asarray(labels, dtype=bool)
    if labels.all() or not labels.any():
        return float("nan")
    return float(stats.mannwhitneyu(scores[labels], scores[~labels]).statistic / (labels.sum() * (~labels).sum()))


def auc_interval(scores: np.ndarray, labels: np.ndarray, seed: int = 0) -> tuple[float, float, float]:
    """AUC and its percentile-bootstrap interval over cases."""
    scores, labels = np.asarray(scores, dtype=float), np.asarray(labels, dtype=bool)
    rng = np.random.default_rng(seed)
    draws = (rng.integers(0, len(labels), len(labels)) for _ in range(RESAMPLES // 4))
    values = [auc(scores[rows], labels[rows]) for rows in draws]
    low, high = np.nanquantile(values, [0.025, 0.975])
    return auc(scores, labels), float(low), float(high)


def out_of_fold(features: np.ndarray, labels: np.ndarray, seed: int = 0) -> np.ndarray:
    """Logistic-regression scores of every case from a fit on the other folds; constant where only one label occurs."""
    counts = np.bincount(labels.astype(int), minlength=2)
    if counts.min() < 2:
        return np.zeros(len(labels))
    folds = StratifiedKFold(min(5, counts.min()), shuffle=True, random_state=seed)
    return cross_val_predict(make_pipeline(StandardScaler(), LogisticRegression()), features, labels, cv=folds,
                             method="decision_function")  # fmt: skip


def holm(p_values: list[float]) -> list[float]:
    """Holm-adjusted p-values, in the order given."""
    p = np.asarray(p_values, dtype=float)
    order = np.argsort(p)
    stepped = np.maximum.accumulate((len(p) - np.arange(len(p))) * p[order])
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(stepped, 1)
    return adjusted.tolist()


def rate_table(rows: pd.DataFrame, by: list[str] | str, columns: list[str]) -> pd.DataFrame:
    """Mean, low, high of each column per group of rows: Wilson for True/False columns, bootstrap for numbers."""

    def interval(values: pd.Series) -> tuple[float, float, float]:
        values = values.infer_objects()
        return proportion_interval(values) if values.dtype == bool else mean_interval(values)

    records = []
    for key, group in rows.groupby(by, sort=False, observed=True):
        for column in columns:
            values = group[column].dropna()
            mean, low, high = interval(values)
            keys = dict(zip([by] if isinstance(by, str) else by, key if isinstance(key, tuple) else (key,), strict=True))
            records.append(keys | {"metric": column, "mean": mean, "low": low, "high": high, "n": len(values)})
    return pd.DataFrame(records)
