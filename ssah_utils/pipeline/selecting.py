"""What a claim's selector finds in stored tables: a value with its 95% interval.

Knows claims and tables. Loads no model and measures nothing.
"""

import numpy as np
import pandas as pd

from ssah_utils.crossed import CrossedMean, combined
from ssah_utils.pipeline.claims import DRAWS, Selector, Tables, nearest

Number = tuple[float, float, float]  # value, low, high; NaN for an interval that it has not


def select(selector: Selector, tables: Tables) -> Number:
    """Value, low and high that a selector points at, NaN for an interval it has not.

    Raises ``LookupError`` in one line: what was not found, what is nearest, which stage to run
    again.
    """
    place, again = f"{selector.stage}, table '{selector.table}'", f": re-run {selector.stage}"
    if selector.stage not in tables:
        raise LookupError(f"no readable result of {selector.stage}{again}")
    stored = tables[selector.stage]
    if selector.table not in stored:
        near = nearest(selector.table, stored)
        raise LookupError(f"{selector.stage} has no table '{selector.table}'{near}{again}")
    rows = stored[selector.table]
    wanted = [*selector.where, selector.value, selector.low, selector.high, selector.last]
    for column in filter(None, wanted):
        if column not in rows:
            near = nearest(column, rows.columns)
            raise LookupError(f"{place}: no column '{column}'{near}{again}")
    kept = np.ones(len(rows), dtype=bool)
    for column, value in selector.where.items():
        also = kept & matches(rows[column], value)
        if not also.any():
            near = nearest(value, rows[column][kept].unique())
            raise LookupError(f"{place}: no row with {column} {value!r}{near}{again}")
        kept = also
    if selector.last:
        last = rows[selector.last].to_numpy()
        kept &= last == last[kept].max()
    rows = rows[kept]
    if len(rows) > 1 and not selector.aggregate:
        varying = [column for column in rows if rows[column].nunique() > 1]
        choices = ", ".join(column for column in varying if column not in wanted)
        raise LookupError(
            f"{place}: {len(rows)} rows match; choose by {choices} or give an aggregate"
        )
    return estimate(rows, selector)


def matches(column: pd.Series, value: object) -> np.ndarray:
    """Which rows equal ``value``, or one of a list; floats by closeness: (n_rows,) of bool."""
    if isinstance(value, list):
        return column.isin(value).to_numpy(dtype=bool)
    if isinstance(value, float) and pd.api.types.is_numeric_dtype(column):
        return np.isclose(column.to_numpy(dtype=float), value)
    return (column.to_numpy(dtype=object) == value).astype(bool)


def estimate(rows: pd.DataFrame, selector: Selector) -> Number:
    """Value, low and high of the rows found; ``LookupError`` where they hold no numbers.

    The interval of a mean: rows that differ in ``DRAWS`` are draws of the same thing, which answer
    the same requests, and make a ``CrossedMean``. Other rows are different things with requests of
    their own: half-widths of their mean add in squares.
    """
    place = f"{selector.stage}, table '{selector.table}'"

    def numbers(column: str) -> np.ndarray:
        try:
            return pd.to_numeric(rows[column]).to_numpy(dtype=float) * selector.scale
        except (ValueError, TypeError) as error:
            what = f"{place}, column '{column}' holds no numbers"
            raise LookupError(f"{what}: re-run {selector.stage}") from error

    values = numbers(selector.value)
    there = np.flatnonzero(~np.isnan(values))
    if not len(there) and selector.otherwise is not None:
        return selector.otherwise, np.nan, np.nan
    if not len(there):
        raise LookupError(f"{place}: '{selector.value}' is empty: re-run {selector.stage}")
    if selector.aggregate == "min":
        there = there[[values[there].argmin()]]
    elif selector.aggregate == "max":
        there = there[[values[there].argmax()]]
    ends = np.full((2, len(rows)), np.nan)
    if selector.low:
        ends = np.array([numbers(selector.low), numbers(selector.high)])
    found = np.array([values, *ends])[:, there]
    if len(there) == 1:
        return mean_of_things(*found)
    keys = rows.iloc[there][[name for name in DRAWS if name in rows]]
    of_draws = [mean_of_things(*found[:, at]) for at in draws_of(keys)]
    return mean_of_draws(of_draws, selector.bounds)


def draws_of(keys: pd.DataFrame) -> list[np.ndarray]:
    """Positions of the rows of each draw; all of them in one where no column counts draws."""
    if not len(keys.columns):
        return [np.arange(len(keys))]
    return list(keys.groupby(list(keys.columns), sort=False, dropna=False).indices.values())


def mean_of_things(values: np.ndarray, lows: np.ndarray, highs: np.ndarray) -> Number:
    """Mean of different things, whose uncertainties are independent; each (n,)."""
    value, n = float(np.mean(values)), len(values)
    if n == 1:
        return value, float(lows[0]), float(highs[0])
    return value, value - combined(values - lows) / n, value + combined(highs - values) / n


def mean_of_draws(numbers: list[Number], bounds: tuple[float, float]) -> Number:
    """Mean of the same thing over seeds or draws, with the interval of ``CrossedMean``."""
    if len(numbers) == 1:
        return numbers[0]
    mean = CrossedMean.of(*np.array(numbers).T)
    return mean.mean, *mean.interval(bounds=bounds)
