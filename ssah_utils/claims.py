"""The paper's claims against stored results: what the claims file says, which numbers it points at, which verdict follows.

Knows tables and claims only. Loads no model and measures nothing.

A claim of ``data/claims.yaml`` names its numbers by selectors into stored tables and decides by two expressions over them.
They are arithmetic and comparisons of named numbers, nothing else: what else is written there is refused when it is read.
"""

import ast
import difflib
from collections.abc import Iterable, Iterator
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

from ssah_utils.results import ROOT, Stored, differing_parameters, load_result

FILE = ROOT / "data" / "claims.yaml"
VERDICTS = ("replicated", "partly", "not replicated", "not measured")
AGGREGATES = ("mean", "median", "min", "max", "sum")
STORED_FIELDS = ("id", "claim", "source", "paper", "ours", "ci_low", "ci_high", "control", "n_seeds", "verdict",
                 "experiment", "unit", "ours_seeds", "note")  # fmt: skip


Tables = dict[str, Stored]
ARITHMETIC = (ast.Expression, ast.BoolOp, ast.And, ast.Or, ast.UnaryOp, ast.USub, ast.BinOp, ast.Add, ast.Sub,
              ast.Mult, ast.Div, ast.Compare, ast.Lt, ast.LtE, ast.Gt, ast.GtE, ast.Name, ast.Load, ast.Constant)  # fmt: skip


@dataclass(frozen=True)
class Selector:
    """One number of a stored table: the column ``value`` of the row where ``where`` holds. Several rows need an ``aggregate``.

    ``min`` and ``max`` take one row with its interval. For the others it goes from the smallest ``low`` to the largest
    ``high``; without such columns it is the range of the values, and one value has none. ``last``: only rows with the
    largest value of that column. ``scale`` multiplies. ``otherwise``: the value where the rows hold none.
    """

    stage: str
    table: str
    value: str
    low: str = ""
    high: str = ""
    where: dict = field(default_factory=dict)
    last: str = ""
    aggregate: str = ""
    scale: float = 1.0
    otherwise: float | None = None

    @property
    def has_interval(self) -> bool:
        return bool(self.low and self.high) or self.aggregate not in ("", "min", "max")


@dataclass(frozen=True)
class Claim:
    """A claim of the paper, where its numbers are and the rule that was written before they were measured."""

    id: str
    experiment: str
    claim: str
    source: str
    paper: str
    ours: Selector
    replicated: str
    partly: str = ""
    unit: str = ""
    control: Selector | float | None = None
    numbers: dict[str, Selector] = field(default_factory=dict)
    n_seeds: Selector | int = 1
    given: dict[str, dict] = field(default_factory=dict)  # parameters that the claim speaks of, by stage

    @property
    def selectors(self) -> dict[str, Selector | float]:
        """Everything a rule may name, by name."""
        return {"ours": self.ours, **({} if self.control is None else {"control": self.control}), **self.numbers}


# ----------------------------------------------------------------------------------------------------------- reading


def load_claims(path: Path = FILE) -> list[Claim]:
    """The claims of a file; ``ValueError`` has one line per claim that is not valid: file, claim, field, what to write."""
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, list) or not content:
        raise ValueError(f"{path} must be a list of claims, each with {', '.join(required(Claim))}")
    claims, problems = [], []
    for position, entry in enumerate(content, 1):
        name = entry.get("id", f"number {position}") if isinstance(entry, dict) else f"number {position}"
        try:
            if any(claim.id == name for claim in claims):
                raise ValueError("field 'id': used twice")
            claims.append(read_claim(entry))
        except ValueError as error:
            problems.append(f"{Path(path).name}, claim '{name}', {error}")
    if problems:
        raise ValueError("\n".join(problems))
    return claims


def read_claim(entry: object) -> Claim:
    """A claim from its YAML mapping; ``ValueError`` begins with the field that is wrong."""
    values = dict(checked(entry, Claim, ""))
    values["ours"] = read_selector(values["ours"], "ours")
    numbers = values.get("numbers", {})
    if not isinstance(numbers, dict):
        raise ValueError("field 'numbers': a mapping of names to selectors is needed")
    given = values.get("given", {})
    if not isinstance(given, dict) or not all(isinstance(one, dict) for one in given.values()):
        raise ValueError(f"field 'given': a mapping of stages to their parameters is needed, not {given!r}")
    values["numbers"] = {name: read_selector(number, f"numbers.{name}") for name, number in numbers.items()}
    for name in ("control", "n_seeds"):
        if isinstance(values.get(name), dict):
            values[name] = read_selector(values[name], name)
        elif values.get(name) is None:  # left out or empty
            values.pop(name, None)
        elif not isinstance(values[name], (int, float)):
            raise ValueError(f"field '{name}': a selector or a number is needed, not {values[name]!r}")
    claim = Claim(**values)
    for name in ("replicated", "partly"):
        check_rule(getattr(claim, name), known_numbers(claim), name)
    return claim


def required(kind: type) -> list[str]:
    return [one.name for one in fields(kind) if one.default is MISSING and one.default_factory is MISSING]


def checked(entry: object, kind: type, inside: str) -> dict:
    """``entry`` if it is a mapping with the fields of a dataclass, texts where texts belong."""
    prefix = f"{inside}." if inside else ""
    if not isinstance(entry, dict):
        raise ValueError(f"field '{inside or 'id'}': a mapping with {', '.join(required(kind))} is needed, not {entry!r}")
    names = [one.name for one in fields(kind)]
    for name in entry:
        if name not in names:
            raise ValueError(f"field '{prefix}{name}': unknown{nearest(name, names)}")
    for one in fields(kind):
        if one.name not in entry and one.name in required(kind):
            raise ValueError(f"field '{prefix}{one.name}': missing")
        if one.type is str and not isinstance(entry.get(one.name, ""), str):
            raise ValueError(f"field '{prefix}{one.name}': text is needed, not {entry[one.name]!r} (put it in quotes)")
    return entry


def read_selector(entry: object, name: str) -> Selector:
    selector = Selector(**checked(entry, Selector, name))
    if not isinstance(selector.where, dict):
        raise ValueError(f"field '{name}.where': a mapping of columns to values is needed, not {selector.where!r}")
    if selector.aggregate not in ("", *AGGREGATES):
        raise ValueError(f"field '{name}.aggregate': one of {', '.join(AGGREGATES)} is needed, not '{selector.aggregate}'")
    if bool(selector.low) != bool(selector.high):
        raise ValueError(f"field '{name}': low and high belong together")
    if not isinstance(selector.scale, (int, float)):
        raise ValueError(f"field '{name}.scale': a number is needed, not {selector.scale!r}")
    return selector


def known_numbers(claim: Claim) -> list[str]:
    """Names a claim's rules may use: ours, control and further numbers, ends of their intervals where they have one."""
    names = []
    for name, selector in claim.selectors.items():
        names.append(name)
        if isinstance(selector, Selector) and selector.has_interval:
            names += ["low", "high"] if name == "ours" else [f"{name}_low", f"{name}_high"]
    return names


def check_rule(rule: str, known: list[str], name: str) -> None:
    """Refuse an expression that is not arithmetic over known numbers."""
    if not rule:
        return
    try:
        tree = ast.parse(rule, mode="eval")
    except SyntaxError as error:
        raise ValueError(f"field '{name}': '{rule}' is not an expression ({error.msg})") from error
    for node in ast.walk(tree):
        if not isinstance(node, ARITHMETIC) or (isinstance(node, ast.Constant) and not isinstance(node.value, (int, float))):
            raise ValueError(f"field '{name}': '{ast.unparse(node)}' is neither a number nor arithmetic nor a comparison")
        if isinstance(node, ast.Name) and node.id not in known:
            raise ValueError(f"field '{name}': unknown number '{node.id}'{nearest(node.id, known)}")
    if not isinstance(tree.body, (ast.Compare, ast.BoolOp)):
        raise ValueError(f"field '{name}': '{rule}' compares nothing")


def nearest(name: object, known: Iterable) -> str:
    known = [str(one) for one in known]
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0)
    return f"; nearest is '{near[0]}' (there are: {', '.join(known[:12])})" if near else "; there is none"


# --------------------------------------------------------------------------------------------------------- selecting


def select(selector: Selector, tables: Tables) -> tuple[float, float, float]:
    """Value, low and high that a selector points at, NaN for an interval it has not.

    Raises ``LookupError`` in one line: what was not found, what is nearest, which stage to run again.
    """
    place, again = f"{selector.stage}, table '{selector.table}'", f": re-run {selector.stage}"
    if selector.stage not in tables:
        raise LookupError(f"no readable result of {selector.stage}{again}")
    stored = tables[selector.stage]
    if selector.table not in stored:
        raise LookupError(f"{selector.stage} has no table '{selector.table}'{nearest(selector.table, stored)}{again}")
    rows = stored[selector.table]
    wanted = [*selector.where, selector.value, selector.low, selector.high, selector.last]
    for column in filter(None, wanted):
        if column not in rows:
            raise LookupError(f"{place}: no column '{column}'{nearest(column, rows.columns)}{again}")
    for column, value in selector.where.items():
        kept = rows[matches(rows[column], value)]
        if kept.empty:
            raise LookupError(f"{place}: no row with {column} {value!r}{nearest(value, rows[column].unique())}{again}")
        rows = kept
    if selector.last:
        rows = rows[rows[selector.last] == rows[selector.last].max()]
    if len(rows) > 1 and not selector.aggregate:
        open_columns = [column for column in rows if column not in wanted and rows[column].nunique() > 1]
        raise LookupError(f"{place}: {len(rows)} rows match; choose by {', '.join(open_columns)} or give an aggregate")
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
        raise LookupError(f"{selector.stage}, table '{selector.table}': '{selector.value}' is empty: re-run {selector.stage}")
    if selector.aggregate in ("min", "max"):
        values = values[[values.idxmin() if selector.aggregate == "min" else values.idxmax()]]
    value = float(values.agg(selector.aggregate or "mean"))
    if selector.low:
        return value, float(numbers(selector.low)[values.index].min()), float(numbers(selector.high)[values.index].max())
    return (value, float(values.min()), float(values.max())) if len(values) > 1 else (value, np.nan, np.nan)


# ---------------------------------------------------------------------------------------------------------- deciding


def decide(claim: Claim, tables: Tables) -> dict:
    """One claim on one run: a row of ``STORED_FIELDS``."""
    row = {name: getattr(claim, name) for name in ("id", "claim", "source", "paper", "experiment", "unit")}
    row |= dict.fromkeys(("ours", "ci_low", "ci_high", "control", "n_seeds"), np.nan) | {"verdict": "not measured", "note": ""}
    try:
        check_given(claim, tables)
        found = {name: select(one, tables) if isinstance(one, Selector) else (float(one), np.nan, np.nan)
                 for name, one in claim.selectors.items()}  # fmt: skip
        n_seeds = select(claim.n_seeds, tables)[0] if isinstance(claim.n_seeds, Selector) else claim.n_seeds
    except LookupError as error:
        return row | {"note": error.args[0]}
    names = {}
    for name, (value, low, high) in found.items():
        prefix = "" if name == "ours" else f"{name}_"
        names |= {name: value, f"{prefix}low": low, f"{prefix}high": high}
    row |= {"ours": names["ours"], "ci_low": names["low"], "ci_high": names["high"], "n_seeds": int(n_seeds),
            "control": names.get("control", np.nan)}  # fmt: skip
    verdict = next((name for name in ("replicated", "partly") if holds(getattr(claim, name), names)), "not replicated")
    return row | {"verdict": verdict}


def check_given(claim: Claim, tables: Tables) -> None:
    """``LookupError`` where a run had other parameters than the claim speaks of; results stored without them are taken."""
    for stage, given in claim.given.items():
        stored = tables[stage].parameters if stage in tables else {}
        for name, value in given.items():
            if stored.get(name, value) != value:
                raise LookupError(f"{stage} was run with {name} {stored[name]}, the claim speaks of {value}")


def holds(rule: str, names: dict[str, float]) -> bool:
    """Whether a checked rule is true of the numbers; a comparison with a number that is missing (NaN) is false."""
    return bool(rule) and bool(pd.eval(rule, engine="python", parser="pandas", local_dict=names, global_dict={}))


def judge(claims: list[Claim], runs: list[Tables]) -> pd.DataFrame:
    """The claims table over runs with different seeds: mean over the runs, the envelope of their intervals, one verdict.

    Replicated has to be so in every run that measured it, not replicated in most; anything between is partly. ``n_seeds``
    sums the seeds of all runs that measured the claim, ``ours_seeds`` holds their values. Runs that disagree are noted.
    """
    return pd.DataFrame(
        [over_runs([decide(claim, tables) for tables in runs]) for claim in claims], columns=list(STORED_FIELDS)
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
        "ours": table["ours"].mean(), "ci_low": table["ci_low"].min(), "ci_high": table["ci_high"].max(),
        "control": table["control"].mean(), "n_seeds": int(table["n_seeds"].sum()), "ours_seeds": table["ours"].tolist(),
        "verdict": verdicts[0] if agreed else "not replicated" if most_fail else "partly",
        "note": "; ".join(said),
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ stored


def read_tables(folder: Path, stages: Iterable[str]) -> tuple[Tables, list[str]]:
    """Tables of a run's readable results, and one line per stage whose result is missing, truncated or of another version."""
    tables, problems = {}, []
    for stage in stages:
        try:
            stored = load_result(Path(folder) / stage / "result.json")
            tables[stage] = Stored(stored["tables"], stored["parameters"])
        except (OSError, ValueError) as error:
            problems.append(f"{stage}: {error}")
    return tables, problems


def other_seeds(folder: Path) -> Iterator[Path]:
    """Runs with other seeds: beside a run's folder, or inside that of the stored results."""
    around = Path(folder).parent if Path(folder).name.startswith("seed-") else Path(folder)
    yield from (path for path in sorted(around.glob("seed-*")) if path.is_dir() and path != Path(folder))


def stages_of(claims: list[Claim]) -> list[str]:
    """Stages whose stored results the claims need, in order."""
    selected = {one.stage for claim in claims for one in claim.selectors.values() if isinstance(one, Selector)}
    return sorted(selected.union(*(claim.given for claim in claims)))


def judge_stored(folder: Path, claims: list[Claim]) -> tuple[pd.DataFrame, list[str]]:
    """The claims table of a run and of its other seeds, and one line per result that could not be read.

    Another seed may lack stages: it then says nothing on their claims.
    """
    stages = stages_of(claims)
    tables, problems = read_tables(folder, stages)
    runs = [tables]
    for other in other_seeds(folder):
        there = [stage for stage in stages if (other / stage / "result.json").exists()]
        tables, unreadable = read_tables(other, there)
        for stage, result in list(tables.items()):
            if differing := differing_parameters(runs[0].get(stage, result).parameters, result.parameters):
                del tables[stage]
                unreadable.append(f"{stage} was run with another {', '.join(differing)}, so it is left out")
        runs.append(tables)
        problems += [f"{other.name}/{line}" for line in unreadable]
    return judge(claims, runs), problems


def swapped(claims: list[Claim]) -> list[Claim]:
    """The claims with a measured control in the place of ours: a rule that still calls them replicated asks for no effect."""
    return [replace(claim, ours=claim.control) for claim in claims if isinstance(claim.control, Selector)]


def to_records(table: pd.DataFrame) -> list[dict]:
    """The table as it is stored: numbers to six decimals, None where there is none."""

    def plain(value: object) -> object:
        if isinstance(value, list):
            return [plain(one) for one in value]
        if isinstance(value, (float, np.floating)):
            return None if not np.isfinite(value) else round(float(value), 6)
        return int(value) if isinstance(value, np.integer) else value

    records = [{name: plain(value) for name, value in row.items()} for row in table.to_dict("records")]
    return [row | {"n_seeds": None if row["n_seeds"] is None else int(row["n_seeds"])} for row in records]
