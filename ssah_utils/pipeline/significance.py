"""Tests of claims on stored results: a p-value for each, corrected over the table, and its power.

Knows claims and tables. Loads no model and measures nothing.

What a claim's rule asks for is its alternative, so the null follows from the rule: that one of its
comparisons fails. Written as an excess (``low > control_high`` as ours minus control), a comparison
is tested against 0, in the direction of the rule. A rule that joins several by ``and`` takes the
largest of their p-values (intersection-union test, Berger 1982, Technometrics 24, 295). Where some
comparisons name an end of an interval, those of mere values set no level and are left out; where
none does, the values are tested. The excess is taken run by run, so that a number and its control
stay paired over seeds. Half-widths of the numbers in it add in squares, as if independent.
"""

import ast
import copy
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pandas as pd

from ssah_utils.crossed import CrossedMean, combined
from ssah_utils.figures.claims import two_digits
from ssah_utils.pipeline.claims import Claim, Selector, Tables, evaluated
from ssah_utils.pipeline.selecting import Number, matches, select
from ssah_utils.stats import benjamini_hochberg, holm

LEVEL = 0.05
POWER = 0.8
SIZES = {  # by set of requests or items, the parameter that says how many
    "harmful": "n_harmful",
    "other_harmful": "n_harmful",
    "helpful": "n_helpful",
    "cloze": "n_cloze",
}


@dataclass(frozen=True)
class Measured:
    """One run's numbers of a claim, by name, over how many seeds they go, and its tables."""

    numbers: dict[str, Number]
    n_seeds: float
    tables: Tables


@dataclass(frozen=True)
class Comparison:
    """One comparison of a rule as an excess that it wants above 0."""

    what: str
    more: ast.AST
    less: ast.AST
    with_ends: bool  # whether it names an end of an interval
    names: tuple[str, ...]  # numbers in it, without the ends of their intervals


@dataclass(frozen=True)
class Tested:
    """The comparison that decides a claim, the excess found and its p-value."""

    comparison: Comparison
    excess: CrossedMean
    p: float


def measured(claim: Claim, runs: list[Tables]) -> tuple[list[Measured], list[str]]:
    """The numbers of the runs that hold all of them, and one line for each that does not."""
    found, missing = [], []
    for tables in runs:
        try:
            check_given(claim, tables)
            numbers = {name: number_of(one, tables) for name, one in claim.selectors.items()}
            n_seeds = number_of(claim.n_seeds, tables)[0]
            found.append(Measured(numbers, n_seeds, tables))
        except LookupError as error:
            missing.append(error.args[0])
    return found, missing


def number_of(one: Selector | float, tables: Tables) -> Number:
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


# ---------------------------------------------------------------------------------------- one claim


def tested(claim: Claim, runs: list[Measured]) -> Tested | None:
    """The claim's test over the runs that measured it; ``None`` where nothing has an interval."""
    found = []
    for comparison in deciding(claim):
        numbers = [excess(comparison, run.numbers) for run in runs]
        mean = CrossedMean.of(*np.array(numbers).T)
        if mean.has_interval:
            found.append(Tested(comparison, mean, mean.p_above()))
    return max(found, key=lambda one: one.p, default=None)


def deciding(claim: Claim) -> list[Comparison]:
    """The comparisons of ``replicated`` whose nulls are tested; none of a rule with an ``or``."""
    tree = ast.parse(claim.replicated, mode="eval").body
    if any(isinstance(node, ast.Or) for node in ast.walk(tree)):
        return []
    parts = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            for (left, right), sign in zip(pairwise(sides), node.ops, strict=True):
                parts.append(comparison_of(claim, left, right, sign))
    with_ends = [part for part in parts if part.with_ends]
    return with_ends or [part for part in parts if "ours" in part.names]


def comparison_of(claim: Claim, left: ast.AST, right: ast.AST, sign: ast.cmpop) -> Comparison:
    """As an excess; ends of intervals stand for their numbers in it."""
    what = ast.unparse(ast.Compare(left, [sign], [right]))
    greater = isinstance(sign, ast.Gt | ast.GtE)
    left, right = copy.deepcopy((left, right))  # a middle one belongs to two comparisons
    names, ends = set(), False
    known = claim.selectors.keys()
    for node in [*ast.walk(left), *ast.walk(right)]:
        if isinstance(node, ast.Name) and node.id not in known:
            node.id, ends = node.id.rpartition("_")[0] or "ours", True
        if isinstance(node, ast.Name):
            names.add(node.id)
    more, less = (left, right) if greater else (right, left)
    return Comparison(what, more, less, ends, tuple(sorted(names)))


def excess(comparison: Comparison, numbers: dict[str, Number]) -> Number:
    """What a comparison wants above 0, with its interval, of one run's numbers."""
    values = {name: numbers[name][0] for name in comparison.names}

    def at(**moved: float) -> float:
        given = values | moved
        return evaluated(comparison.more, given) - evaluated(comparison.less, given)

    value = at()
    ends = [[at(**{name: end}) - value for end in numbers[name][1:]] for name in comparison.names]
    moves = np.array([(min(pair), max(pair)) for pair in ends])
    return value, value - combined(-moves[:, 0]), value + combined(moves[:, 1])


def adjusted(table: pd.DataFrame) -> pd.DataFrame:
    """The claims table with p-values corrected over all claims that have one: Holm, which bounds
    the chance of any false one, and Benjamini-Hochberg, which bounds their share.
    """
    has_one = table["p"].notna()
    for column, correct in (("p_holm", holm), ("p_bh", benjamini_hochberg)):
        table[column] = np.nan
        table.loc[has_one, column] = correct(table.loc[has_one, "p"].tolist())
    return table


def shown_p(value: float) -> str:
    """A p-value as text: two digits, or that it is below a thousandth."""
    if pd.isna(value):
        return ""
    return "< 0.001" if value < 0.001 else f"{value:.2g}"


def said_of_correction(table: pd.DataFrame) -> str:
    """One sentence: which of the replicated claims do not survive the corrections."""
    family = table[table["p"].notna()]
    shown = family[family["verdict"] == "replicated"]
    lost = shown.loc[shown["p_holm"] >= LEVEL, "id"].tolist()
    less_strict = shown.loc[shown["p_bh"] >= LEVEL, "id"].tolist()
    untested = table[(table["verdict"] == "replicated") & table["p"].isna()]["id"].tolist()
    return (
        f"Of {len(table)} claims, {len(family)} have a p-value. Of the {len(shown)} replicated "
        f"among them, {len(shown) - len(lost)} keep p below {LEVEL} when it is corrected over the "
        f"table by Holm; lost: {', '.join(lost) or 'none'}. By Benjamini-Hochberg, lost: "
        f"{', '.join(less_strict) or 'none'}. Replicated without a p-value: "
        f"{', '.join(untested) or 'none'}."
    )


# -------------------------------------------------------------------------------------------- power


def power_table(claims: list[Claim], runs: list[Tables]) -> pd.DataFrame:
    """Whether the present sizes could see what was found, and which sizes would: a row a claim that
    has a test.

    * ``effect``: the excess of the comparison ``tested``, toward the claim.
    * ``parameter``, ``requests``, ``seeds``: present sizes, and which parameter of the stage sets
      that of requests; a run is a seed. NaN where the requests are not told.
    * ``power``: chance that a new run of these sizes leaves out 0, were the effect the true one.
    * ``smallest_effect``: seen with 80% power with these sizes.
    * ``times_requests``, ``seeds_needed``: how many times the requests with these seeds, and how
      many seeds with these requests, make 80%. Infinite where no number is enough, NaN where it
      cannot be told or the effect is not toward the claim.
    * ``requests_needed``: the same in requests.
    """
    rows = []
    for claim in claims:
        found, _ = measured(claim, runs)
        test = tested(claim, found) if found else None
        if test is None:
            continue
        mean = test.excess
        parameter, n = requests_of(claim, test.comparison, found[0].tables)
        toward = mean.mean > 0
        times = mean.requests_needed() if toward else np.nan
        row = {"id": claim.id, "tested": test.comparison.what, "effect": mean.mean}
        row |= {"unit": claim.unit if "ours" in test.comparison.names else ""}
        row |= {
            "stage": claim.stage,
            "parameter": parameter,
            "requests": n,
            "seeds": mean.n_seeds,
            "power": mean.power(),
        }
        row |= {"smallest_effect": mean.smallest_effect(), "times_requests": times}
        row |= {"requests_needed": float(np.ceil(n * times))}
        row["seeds_needed"] = mean.seeds_needed() if toward else np.nan
        rows.append(row)
    return pd.DataFrame(rows)


def requests_of(claim: Claim, comparison: Comparison, tables: Tables) -> tuple[str, float]:
    """The parameter that says over how many requests a comparison goes, and how many these were.

    What the claim says of our number, else ``n`` of the rates of its set; ``""`` and NaN where
    neither says.
    """
    name = "ours" if "ours" in comparison.names else comparison.names[0]
    selector = claim.selectors[name]
    if not isinstance(selector, Selector):
        return "", np.nan
    stored, where = tables[selector.stage], selector.where
    if claim.requests and selector.stage == claim.stage:
        return claim.requests, float(stored.parameters.get(claim.requests, np.nan))
    rates = stored.get("rates", pd.DataFrame())
    if not {"set", "metric", "n"} <= set(rates) or not {"set", "metric"} <= where.keys():
        return "", np.nan
    for column in ("set", "metric"):
        rates = rates[matches(rates[column], where[column])]
    names = where["set"] if isinstance(where["set"], list) else [where["set"]]
    return SIZES.get(names[0], ""), float(rates["n"].max())


def shown_power(power: pd.DataFrame) -> pd.DataFrame:
    """The power table as a reader needs it."""

    def number(value: float) -> str:
        return "\N{INFINITY}" if value == np.inf else two_digits(value)

    sizes = [
        f"{'' if pd.isna(row.requests) else f'{row.requests:.0f} x '}{row.seeds}"
        for row in power.itertuples()
    ]
    units = [f"{two_digits(row.effect)} {row.unit}".strip() for row in power.itertuples()]
    return pd.DataFrame(
        {
            "claim": power["id"],
            "tested": power["tested"],
            "effect": units,
            "requests x seeds": sizes,
            "power": power["power"].map("{:.0%}".format),
            "smallest effect seen": power["smallest_effect"].map(two_digits),
            "requests needed": power["requests_needed"].map(number),
            "seeds needed": power["seeds_needed"].map(number),
        }
    )


def said_of_power(power: pd.DataFrame) -> str:
    """One sentence: how many effects toward the claim these sizes could see, and what is needed."""
    toward = power[power["effect"] > 0]
    weak = toward[toward["power"] < POWER]
    several = weak[weak["seeds_needed"].notna()]  # of one run, nobody knows how much seeds differ
    by_seeds = several[np.isfinite(several["seeds_needed"])]
    by_requests = weak[np.isfinite(weak["times_requests"])]
    neither = several[~several.index.isin(by_seeds.index.union(by_requests.index))]
    enough = by_seeds["seeds_needed"].median()
    seeds = f" (half of them with {enough:.0f})" if len(by_seeds) else ""
    of_seeds = (
        f"{len(several)} of them were measured by more than one run: more seeds would do for "
        f"{len(by_seeds)} of these{seeds}, neither alone for {len(neither)}."
        if len(several)
        else "Whether more seeds would do cannot be told: one run alone has measured each."
    )
    return (
        f"Of {len(toward)} effects toward their claim, {len(toward) - len(weak)} are seen with a "
        f"power of {POWER:.0%} by the present sizes. Of the {len(weak)} others, more requests "
        f"would do for {len(by_requests)}. {of_seeds}"
    )
