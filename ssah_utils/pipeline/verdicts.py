"""Decide claims on stored results: which numbers their selectors find, and which verdict follows.

Knows claims and tables. Loads no model and measures nothing.
"""

import ast
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from pandas.io.formats.style import Styler

from ssah_utils.figures.claims import shown_interval, two_digits
from ssah_utils.files import sha256_of_file
from ssah_utils.pipeline.claims import FILE as CLAIMS_FILE
from ssah_utils.pipeline.claims import (
    STORED_FIELDS,
    Claim,
    Selector,
    Tables,
    load_claims,
    nearest,
    toward,
)
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
        near = nearest(selector.table, stored)
        raise LookupError(f"{selector.stage} has no table '{selector.table}'{near}{again}")
    rows = stored[selector.table]
    wanted = [*selector.where, selector.value, selector.low, selector.high, selector.last]
    for column in filter(None, wanted):
        if column not in rows:
            near = nearest(column, rows.columns)
            raise LookupError(f"{place}: no column '{column}'{near}{again}")
    for column, value in selector.where.items():
        kept = rows[matches(rows[column], value)]
        if kept.empty:
            near = nearest(value, rows[column].unique())
            raise LookupError(f"{place}: no row with {column} {value!r}{near}{again}")
        rows = kept
    if selector.last:
        rows = rows[rows[selector.last] == rows[selector.last].max()]
    if len(rows) > 1 and not selector.aggregate:
        varying = [column for column in rows if rows[column].nunique() > 1]
        choices = ", ".join(column for column in varying if column not in wanted)
        raise LookupError(
            f"{place}: {len(rows)} rows match; choose by {choices} or give an aggregate"
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
    place = f"{selector.stage}, table '{selector.table}'"

    def numbers(column: str) -> pd.Series:
        try:
            return pd.to_numeric(rows[column]).astype(float) * selector.scale
        except (ValueError, TypeError) as error:
            what = f"{place}, column '{column}' holds no numbers"
            raise LookupError(f"{what}: re-run {selector.stage}") from error

    values = numbers(selector.value).dropna()
    if values.empty and selector.otherwise is not None:
        return selector.otherwise, np.nan, np.nan
    if values.empty:
        raise LookupError(f"{place}: '{selector.value}' is empty: re-run {selector.stage}")
    if selector.aggregate == "min":
        values = values.loc[[values.idxmin()]]
    elif selector.aggregate == "max":
        values = values.loc[[values.idxmax()]]
    value = float(values.agg(selector.aggregate or "mean"))
    if selector.low:
        lows, highs = numbers(selector.low)[values.index], numbers(selector.high)[values.index]
        return value, float(lows.min()), float(highs.max())
    if len(values) > 1:
        return value, float(values.min()), float(values.max())
    return value, np.nan, np.nan


# ----------------------------------------------------------------------------------------- deciding


def decide(claim: Claim, tables: Tables) -> dict:
    """One claim on one run: a row of ``STORED_FIELDS``."""
    stated = ("id", "claim", "source", "paper", "experiment", "unit")
    row: dict[str, object] = {name: getattr(claim, name) for name in stated}
    row |= dict.fromkeys(("ours", "ci_low", "ci_high", "control", "n_seeds"), np.nan)
    row |= {"verdict": "not measured", "note": ""}
    row["toward"] = toward(claim)
    try:
        check_given(claim, tables)
        found = {name: number_of(one, tables) for name, one in claim.selectors.items()}
        n_seeds = number_of(claim.n_seeds, tables)[0]
    except LookupError as error:
        return row | {"note": error.args[0]}
    names = {}
    for name, (value, low, high) in found.items():
        prefix = "" if name == "ours" else f"{name}_"
        names |= {name: value, f"{prefix}low": low, f"{prefix}high": high}
    if claim.only_if and not holds(claim.only_if, names):
        return row | {"note": f"its positive control fails: {shown_rule(claim.only_if, names)}"}
    row |= {
        "ours": names["ours"],
        "ci_low": names["low"],
        "ci_high": names["high"],
        "n_seeds": int(n_seeds),
        "control": names.get("control", np.nan),
    }
    if holds(claim.replicated, names):
        return row | {"verdict": "replicated"}
    return row | {"verdict": "partly" if holds(claim.partly, names) else "not replicated"}


def shown_rule(rule: str, names: dict[str, float]) -> str:
    """A rule, and the numbers it speaks of."""
    spoken = sorted({node.id for node in ast.walk(ast.parse(rule)) if isinstance(node, ast.Name)})
    return f"{rule} ({', '.join(f'{name} is {names[name]:.3g}' for name in spoken)})"


def number_of(one: Selector | float, tables: Tables) -> tuple[float, float, float]:
    """What a selector points at, or a number that the claim states itself, without interval."""
    return select(one, tables) if isinstance(one, Selector) else (float(one), np.nan, np.nan)


def check_given(claim: Claim, tables: Tables) -> None:
    """``LookupError`` where a run had other parameters than the claim speaks of; results stored
    without them are taken.
    """
    for stage, given in claim.given.items():
        stored = tables[stage].parameters if stage in tables else {}
        for name, value in given.items():
            if stored.get(name, value) != value:
                ran = f"{stage} was run with {name} {stored[name]}"
                raise LookupError(f"{ran}, the claim speaks of {value}")


def holds(rule: str, names: dict[str, float]) -> bool:
    """Whether a checked rule is true; a comparison with a missing number (NaN) is false."""
    if not rule:
        return False
    return bool(pd.eval(rule, engine="python", parser="pandas", local_dict=names, global_dict={}))


def verdict_table(claims: list[Claim], runs: list[Tables]) -> pd.DataFrame:
    """One row a claim over runs with different seeds: the mean of the runs, the envelope of their
    intervals, one verdict.

    "Replicated" has to hold in every run that measured the claim, "not replicated" in most of them;
    anything between is "partly". ``n_seeds`` is the sum over these runs, ``ours_seeds`` their
    values. Where runs disagree, the note says so.
    """
    rows = [over_runs([decide(claim, tables) for tables in runs]) for claim in claims]
    return pd.DataFrame(rows, columns=list(STORED_FIELDS))


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
    mixed = "not replicated" if most_fail else "partly"
    return measured[0] | {
        "ours": table["ours"].mean(),
        "ci_low": table["ci_low"].min(),
        "ci_high": table["ci_high"].max(),
        "control": table["control"].mean(),
        "n_seeds": int(table["n_seeds"].sum()),
        "ours_seeds": table["ours"].tolist(),
        "verdict": verdicts[0] if agreed else mixed,
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
            "control": rows["control"].map(two_digits),
            "unit": rows["unit"],
            "verdict": rows["verdict"],
            "note": rows["note"],
        }
    )
    rules = f"Rules: data/{CLAIMS_FILE.name}, sha256 {sha256_of_file(CLAIMS_FILE)[:12]}"
    styler = Styler(shown, uuid=f"verdicts-{stage}", cell_ids=False).hide(axis="index")
    caption = rules if stated else "No claim rests on this notebook's result."
    return styler.set_caption(caption).set_properties(**{"text-align": "left"})


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
    for path in sorted(around.glob("seed-*")):
        if path.is_dir() and path != Path(folder):
            yield path


def stages_of(claims: list[Claim]) -> list[str]:
    """Stages whose stored results the claims need, in order."""
    stages: set[str] = set()
    for claim in claims:
        stages |= {one.stage for one in claim.selectors.values() if isinstance(one, Selector)}
        stages |= claim.given.keys()
    return sorted(stages)


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
            of_this_run = runs[0].get(stage, result).parameters
            if differing := differing_parameters(of_this_run, result.parameters):
                del tables[stage]
                what = ", ".join(differing)
                unreadable.append(f"{stage} was run with another {what}, so it is left out")
        runs.append(tables)
        problems += [f"{other.name}/{line}" for line in unreadable]
    return verdict_table(claims, runs), problems


def swapped(claims: list[Claim]) -> list[Claim]:
    """The claims with their measured control in the place of our number.

    A rule that still calls such a claim replicated asks for no effect.
    """
    controlled = [claim for claim in claims if isinstance(claim.control, Selector)]
    return [replace(claim, ours=claim.control) for claim in controlled]


def to_records(table: pd.DataFrame) -> list[dict]:
    """The table as it is stored: numbers to six decimals, None where there is none."""

    def plain(value: object) -> object:
        if isinstance(value, list):
            return [plain(one) for one in value]
        if isinstance(value, (float, np.floating)):
            return None if not np.isfinite(value) else round(float(value), 6)
        return int(value) if isinstance(value, np.integer) else value

    records = []
    for row in table.to_dict("records"):
        record = {name: plain(value) for name, value in row.items()}
        if record["n_seeds"] is not None:
            record["n_seeds"] = int(record["n_seeds"])
        records.append(record)
    return records
