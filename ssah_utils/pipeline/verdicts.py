"""Decide claims on stored results: which numbers their selectors find, and which verdict follows.

Knows claims and tables. Loads no model and measures nothing.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from pandas.io.formats.style import Styler

from ssah_utils.figures.claims import number, shown_interval
from ssah_utils.files import sha256_of_file
from ssah_utils.pipeline.claims import FILE as CLAIMS_FILE
from ssah_utils.pipeline.claims import STORED_FIELDS, Claim, Selector, Tables, load_claims, nearest
from ssah_utils.pipeline.runs import Stored, differing_parameters, load_result

# ---------------------------------------------------------------------------------------- selecting


def select(selector: Selector, tables: Tables) -> tuple[float, float, float]:
    """Value, low and high that a selector points at, NaN for an interval it has not.

    Raises ``LookupError`` in one line: what was not found, what is nearest, which stage to run
    again.
    """
    place, again = f"{selector.stage}, table '{selector.table}'", f": re-run {selector.stage}"
    if selector.stage not in tables:
        raise LookupError(f"no readable result of {selector.stage}{again}")
    stored = tables[selector.stage]
    if selector.table not in stored:
        raise LookupError(
            f"{selector.stage} has no table"
            f" '{selector.table}'{nearest(selector.table, stored)}{again}"
        )
    rows = stored[selector.table]
    wanted = [*selector.where, selector.value, selector.low, selector.high, selector.last]
    for column in filter(None, wanted):
        if column not in rows:
            raise LookupError(
                f"{place}: no column '{column}'{nearest(column, rows.columns)}{again}"
            )
    for column, value in selector.where.items():
        kept = rows[matches(rows[column], value)]
        if kept.empty:
            raise LookupError(
                f"{place}: no row with {column}"
                f" {value!r}{nearest(value, rows[column].unique())}{again}"
            )
        rows = kept
    if selector.last:
        rows = rows[rows[selector.last] == rows[selector.last].max()]
    if len(rows) > 1 and not selector.aggregate:
        open_columns = [
            column for column in rows if column not in wanted and rows[column].nunique() > 1
        ]
        raise LookupError(
            f"{place}: {len(rows)} rows match; choose by {', '.join(open_columns)} or give an"
            " aggregate"
        )
    return estimate(rows, selector)


def matches(column: pd.Series, value: object) -> pd.Series:
    """Rows equal to ``value``, or to one of a list; floats by closeness."""
    if isinstance(value, list):
        return column.isin(value)
    if isinstance(value, float) and pd.api.types.is_numeric_dtype(column):
        return pd.Series(np.isclose(column.astype(float), value), column.index)
    return column == value


def estimate(rows: pd.DataFrame, selector: Selector) -> tuple[float, float, float]:
    """Value, low and high of the rows found; ``LookupError`` where they hold no numbers."""

    def numbers(column: str) -> pd.Series:
        try:
            return pd.to_numeric(rows[column]).astype(float) * selector.scale
        except (ValueError, TypeError) as error:
            place = f"{selector.stage}, table '{selector.table}', column '{column}'"
            raise LookupError(f"{place} holds no numbers: re-run {selector.stage}") from error

    values = numbers(selector.value).dropna()
    if values.empty and selector.otherwise is not None:
        return selector.otherwise, np.nan, np.nan
    if values.empty:
        raise LookupError(
            f"{selector.stage}, table '{selector.table}': '{selector.value}' is empty: re-run"
            f" {selector.stage}"
        )
    if selector.aggregate in ("min", "max"):
        values = values[[values.idxmin() if selector.aggregate == "min" else values.idxmax()]]
    value = float(values.agg(selector.aggregate or "mean"))
    if selector.low:
        return (
            value,
            float(numbers(selector.low)[values.index].min()),
            float(numbers(selector.high)[values.index].max()),
        )
    return (
        (value, float(values.min()), float(values.max()))
        if len(values) > 1
        else (value, np.nan, np.nan)
    )


# ----------------------------------------------------------------------------------------- deciding


def decide(claim: Claim, tables: Tables) -> dict:
    """One claim on one run: a row of ``STORED_FIELDS``."""
    row = {
        name: getattr(claim, name)
        for name in ("id", "claim", "source", "paper", "experiment", "unit")
    }
    row |= dict.fromkeys(("ours", "ci_low", "ci_high", "control", "n_seeds"), np.nan) | {
        "verdict": "not measured",
        "note": "",
    }
    try:
        check_given(claim, tables)
        found = {
            name: select(one, tables) if isinstance(one, Selector) else (float(one), np.nan, np.nan)
            for name, one in claim.selectors.items()
        }
        n_seeds = (
            select(claim.n_seeds, tables)[0]
            if isinstance(claim.n_seeds, Selector)
            else claim.n_seeds
        )
    except LookupError as error:
        return row | {"note": error.args[0]}
    names = {}
    for name, (value, low, high) in found.items():
        prefix = "" if name == "ours" else f"{name}_"
        names |= {name: value, f"{prefix}low": low, f"{prefix}high": high}
    row |= {
        "ours": names["ours"],
        "ci_low": names["low"],
        "ci_high": names["high"],
        "n_seeds": int(n_seeds),
        "control": names.get("control", np.nan),
    }
    verdict = next(
        (name for name in ("replicated", "partly") if holds(getattr(claim, name), names)),
        "not replicated",
    )
    return row | {"verdict": verdict}


def check_given(claim: Claim, tables: Tables) -> None:
    """``LookupError`` where a run had other parameters than the claim speaks of; results stored
    without them are taken.
    """
    for stage, given in claim.given.items():
        stored = tables[stage].parameters if stage in tables else {}
        for name, value in given.items():
            if stored.get(name, value) != value:
                raise LookupError(
                    f"{stage} was run with {name} {stored[name]}, the claim speaks of {value}"
                )


def holds(rule: str, names: dict[str, float]) -> bool:
    """Whether a checked rule is true of the numbers; a comparison with a number that is missing
    (NaN) is false.
    """
    return bool(rule) and bool(
        pd.eval(rule, engine="python", parser="pandas", local_dict=names, global_dict={})
    )


def verdict_table(claims: list[Claim], runs: list[Tables]) -> pd.DataFrame:
    """The claims table over runs with different seeds: mean over the runs, the envelope of their
    intervals, one verdict.

    Replicated has to be so in every run that measured it, not replicated in most; anything between
    is partly. ``n_seeds`` sums the seeds of all runs that measured the claim, ``ours_seeds`` holds
    their values. Runs that disagree are noted.
    """
    return pd.DataFrame(
        [over_runs([decide(claim, tables) for tables in runs]) for claim in claims],
        columns=list(STORED_FIELDS),
    )


def over_runs(rows: list[dict]) -> dict:
    """One row from those of several runs on the same claim."""
    measured = [row for row in rows if row["verdict"] != "not measured"]
    if not measured:
        return rows[0] | {"ours_seeds": []}
    table, verdicts = pd.DataFrame(measured), [row["verdict"] for row in measured]
    agreed, said = set(verdicts) == {verdicts[0]}, []
    if not agreed:
        said.append(f"by run: {', '.join(verdicts)}")
    if n_infinite := int(np.isinf(table["ours"]).sum()):
        said.append(f"not reached in {n_infinite} of {len(measured)} runs")
    if len(measured) < len(rows):
        said.append(f"measured in {len(measured)} of {len(rows)} runs")
    most_fail = 2 * verdicts.count("not replicated") > len(verdicts)
    return measured[0] | {
        "ours": table["ours"].mean(),
        "ci_low": table["ci_low"].min(),
        "ci_high": table["ci_high"].max(),
        "control": table["control"].mean(),
        "n_seeds": int(table["n_seeds"].sum()),
        "ours_seeds": table["ours"].tolist(),
        "verdict": verdicts[0] if agreed else "not replicated" if most_fail else "partly",
        "note": "; ".join(said),
    }


# ------------------------------------------------------------------------------------- in notebooks


def of_stage(folder: Path, stage: str) -> Styler:
    """Verdicts of the claims that rest on one notebook's result, as the notebook ends with them.

    ``folder``: of the run (one profile, model and seed). A claim that needs a notebook that has not
    run yet is "not measured", and its note says which to run.
    """
    stated = [claim for claim in load_claims() if claim.stage == stage]
    tables, _ = read_tables(folder, stages_of(stated))
    rows = pd.DataFrame([decide(claim, tables) for claim in stated], columns=list(STORED_FIELDS))
    shown = pd.DataFrame(
        {
            "claim": rows["claim"],
            "ours [95% interval]": [shown_interval(row) for _, row in rows.iterrows()],
            "control": rows["control"].map(number),
            "unit": rows["unit"],
            "verdict": rows["verdict"],
            "note": rows["note"],
        }
    )
    rules = f"Rules: data/{CLAIMS_FILE.name}, sha256 {sha256_of_file(CLAIMS_FILE)[:12]}"
    styler = Styler(shown, uuid=f"verdicts-{stage}", cell_ids=False).hide(axis="index")
    return styler.set_caption(rules).set_properties(**{"text-align": "left"})


# ----------------------------------------------------------------------------------- stored results


def read_tables(folder: Path, stages: Iterable[str]) -> tuple[Tables, list[str]]:
    """Tables of a run's readable results, and one line per stage whose result is missing, truncated
    or of another version.
    """
    tables, problems = {}, []
    for stage in stages:
        try:
            stored = load_result(Path(folder) / stage / "result.json")
            tables[stage] = Stored(stored["tables"], stored["parameters"])
        except (OSError, ValueError) as error:
            problems.append(f"{stage}: {error}")
    return tables, problems


def runs_of_other_seeds(folder: Path) -> Iterator[Path]:
    """Runs with other seeds: beside a run's folder, or inside that of the stored results."""
    around = Path(folder).parent if Path(folder).name.startswith("seed-") else Path(folder)
    yield from (
        path for path in sorted(around.glob("seed-*")) if path.is_dir() and path != Path(folder)
    )


def stages_of(claims: list[Claim]) -> list[str]:
    """Stages whose stored results the claims need, in order."""
    selected = {
        one.stage
        for claim in claims
        for one in claim.selectors.values()
        if isinstance(one, Selector)
    }
    return sorted(selected.union(*(claim.given for claim in claims)))


def stored_verdicts(folder: Path, claims: list[Claim]) -> tuple[pd.DataFrame, list[str]]:
    """The claims table of a run and of its other seeds, and one line per result that could not be
    read.

    Another seed may lack stages: it then says nothing on their claims.
    """
    stages = stages_of(claims)
    tables, problems = read_tables(folder, stages)
    runs = [tables]
    for other in runs_of_other_seeds(folder):
        there = [stage for stage in stages if (other / stage / "result.json").exists()]
        tables, unreadable = read_tables(other, there)
        for stage, result in list(tables.items()):
            if differing := differing_parameters(
                runs[0].get(stage, result).parameters, result.parameters
            ):
                del tables[stage]
                unreadable.append(
                    f"{stage} was run with another {', '.join(differing)}, so it is left out"
                )
        runs.append(tables)
        problems += [f"{other.name}/{line}" for line in unreadable]
    return verdict_table(claims, runs), problems


def swapped(claims: list[Claim]) -> list[Claim]:
    """The claims with a measured control in the place of ours: a rule that still calls them
    replicated asks for no effect.
    """
    return [
        replace(claim, ours=claim.control)
        for claim in claims
        if isinstance(claim.control, Selector)
    ]


def to_records(table: pd.DataFrame) -> list[dict]:
    """The table as it is stored: numbers to six decimals, None where there is none."""

    def plain(value: object) -> object:
        if isinstance(value, list):
            return [plain(one) for one in value]
        if isinstance(value, (float, np.floating)):
            return None if not np.isfinite(value) else round(float(value), 6)
        return int(value) if isinstance(value, np.integer) else value

    records = [
        {name: plain(value) for name, value in row.items()} for row in table.to_dict("records")
    ]
    return [
        row | {"n_seeds": None if row["n_seeds"] is None else int(row["n_seeds"])}
        for row in records
    ]
