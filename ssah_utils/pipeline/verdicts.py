"""Decide claims on stored results: which verdict follows from the numbers that selectors find.

Knows claims and tables. Loads no model and measures nothing.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from pandas.io.formats.style import Styler

from ssah_utils.figures.claims import shown_interval, two_digits
from ssah_utils.files import sha256_of_file
from ssah_utils.pipeline import significance
from ssah_utils.pipeline.claims import FILE as CLAIMS_FILE
from ssah_utils.pipeline.claims import (
    STORED_FIELDS,
    Claim,
    Selector,
    Tables,
    holds,
    load_claims,
    toward,
)
from ssah_utils.pipeline.selecting import Number, mean_of_draws
from ssah_utils.pipeline.stored import (
    Stored,
    differing_parameters,
    judged_by,
    load_result,
    made_from_another,
    stamp_of,
)

# ----------------------------------------------------------------------------------------- deciding


def decide(claim: Claim, tables: Tables) -> dict:
    """One claim on one run: a row of ``STORED_FIELDS``."""
    return over_runs(claim, [tables])


def verdict_table(claims: list[Claim], runs: list[Tables]) -> pd.DataFrame:
    """One row a claim over runs with different seeds, with p-values corrected over the table."""
    rows = [over_runs(claim, runs) for claim in claims]
    table = pd.DataFrame(rows, columns=list(STORED_FIELDS))
    return significance.adjusted(table)


def over_runs(claim: Claim, runs: list[Tables]) -> dict:
    """One claim over runs with different seeds: a row of ``STORED_FIELDS``.

    Every number that the rules name is the mean over the runs that measured it, with the interval
    of that mean over seeds and requests (``CrossedMean``). The rules decide on these. Beside the
    verdict: how many of the runs alone give it (``runs_agree`` of ``runs``), and where they
    disagree, the note lists theirs. ``n_seeds`` is the sum over runs, ``ours_seeds`` their values.
    """
    stated = ("id", "claim", "source", "paper", "experiment", "unit")
    row: dict[str, object] = {name: getattr(claim, name) for name in stated}
    row |= dict.fromkeys(("ours", "ci_low", "ci_high", "control", "n_seeds"), np.nan)
    row |= dict.fromkeys(("p", "p_holm", "p_bh"), np.nan)
    row |= {"verdict": "not measured", "note": "", "ours_seeds": [], "runs": 0, "runs_agree": 0}
    row |= {"toward": toward(claim), "tested": "", "changed": list(claim.changed)}
    found, missing = significance.measured(claim, runs)
    if not found:
        return row | {"note": missing[0]}
    numbers = over_seeds(claim, [one.numbers for one in found])
    if failed := not_met(claim, numbers):
        return row | {"note": failed}
    verdict = verdict_of(claim, numbers)
    alone = [verdict_of(claim, one.numbers) for one in found]
    ours, tested = [one.numbers["ours"][0] for one in found], significance.tested(claim, found)
    said = [] if set(alone) == {verdict} else [f"by run: {', '.join(alone)}"]
    if n_infinite := int(np.isinf(ours).sum()):
        said.append(f"not reached in {n_infinite} of {len(found)} runs")
    if len(found) < len(runs):
        said.append(f"measured in {len(found)} of {len(runs)} runs")
    value, low, high = numbers["ours"]
    return row | {
        "ours": value,
        "ci_low": low,
        "ci_high": high,
        "control": numbers.get("control", (np.nan,))[0],
        "n_seeds": sum(int(one.n_seeds) for one in found),
        "ours_seeds": ours,
        "verdict": verdict,
        "runs": len(found),
        "runs_agree": alone.count(verdict),
        "tested": tested.comparison.what if tested else "",
        "p": tested.p if tested else np.nan,
        "note": "; ".join(said),
    }


def over_seeds(claim: Claim, runs: list[dict[str, Number]]) -> dict[str, Number]:
    """Every number of a claim over runs, by name."""
    numbers = {}
    for name, selector in claim.selectors.items():
        bounds = selector.bounds if isinstance(selector, Selector) else (-np.inf, np.inf)
        numbers[name] = mean_of_draws([run[name] for run in runs], bounds)
    return numbers


def verdict_of(claim: Claim, numbers: dict[str, Number]) -> str:
    """By the claim's rules, the first that is true."""
    if not_met(claim, numbers):
        return "not measured"
    names = named_values(numbers)
    if holds(claim.replicated, names):
        return "replicated"
    return "partly" if holds(claim.partly, names) else "not replicated"


def not_met(claim: Claim, numbers: dict[str, Number]) -> str:
    """Why the claim's positive control forbids to measure it; ``""`` where it does not."""
    names = named_values(numbers)
    if not claim.only_if or holds(claim.only_if, names):
        return ""
    used = dict.fromkeys(name for name in names if re.search(rf"\b{name}\b", claim.only_if))
    values = ", ".join(f"{name} {two_digits(names[name])}" for name in used)
    return f"measured only if {claim.only_if}, but {values}"


def named_values(numbers: dict[str, Number]) -> dict[str, float]:
    """What a rule may name, with its value: numbers and the ends of their intervals."""
    names = {}
    for name, (value, low, high) in numbers.items():
        prefix = "" if name == "ours" else f"{name}_"
        names |= {name: value, f"{prefix}low": low, f"{prefix}high": high}
    return names


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
    """Tables of a run's readable results, and one line per stage whose result is not one of them.

    It is missing, truncated, of another version, or made from other results than are there.
    """
    tables, problems = {}, []
    for stage in stages:
        try:
            stored = load_result(Path(folder) / stage / "result.json")
            if replaced := made_from_another(Path(folder) / stage, stored):
                raise ValueError(f"{replaced}: re-run {stage}")
            made_with = stored["parameters"] | {"judge": judged_by(stored)}
            tables[stage] = Stored(stored["tables"], made_with)
        except (OSError, ValueError) as error:
            problems.append(f"{stage}: {error}")
    return tables, problems


def runs_of_other_seeds(folder: Path) -> Iterator[Path]:
    """Runs with other seeds: beside a run's folder, or inside that of the stored results."""
    around = Path(folder).parent if Path(folder).name.startswith("seed-") else Path(folder)
    for path in sorted(around.glob("seed-*")):
        if path.is_dir() and path != Path(folder):
            yield path


def runs_by_seed(folder: Path) -> dict[int, Path]:
    """The stored results of a model, which are of seed 0, and those of its other seeds."""
    others = runs_of_other_seeds(folder)
    return {0: folder} | {int(path.name.removeprefix("seed-")): path for path in others}


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
    """
    runs, problems = stored_runs(folder, claims)
    return verdict_table(claims, runs), problems


def stored_runs(folder: Path, claims: list[Claim]) -> tuple[list[Tables], list[str]]:
    """Tables of a run and of its other seeds, and one line per result that could not be read.

    Another seed may lack stages: it then says nothing on their claims. Nor does it where it was run
    with other parameters, judged by another judge, made by other code, or has not finished.
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
                what = f"was run with another {', '.join(differing)}, so it is left out"
            else:
                what = _out_of_date(other / stage, Path(folder) / stage)
            if what:
                del tables[stage]
                unreadable.append(f"{stage} {what}")
        runs.append(tables)
        problems += [f"{other.name}/{line}" for line in unreadable]
    return runs, problems


def _out_of_date(there: Path, here: Path) -> str:
    """Why a stage of another seed does not count beside that of a run; '' where it does.

    Stored results have no stamps, and stamps may be older than what is compared.
    """
    if not (here / "stamp.json").exists():
        return ""
    if not (there / "stamp.json").exists():
        return "has not finished, so it is left out"
    first, second = (stamp_of(folder).get("without_seed") for folder in (here, there))
    if first and second and first != second:
        return "was made by other code, data or libraries, so it is left out: re-run it"
    return ""


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
            # eight digits first, as result.json has them: both files then round the same way
            return None if not np.isfinite(value) else round(round(float(value), 8), 6)
        return int(value) if isinstance(value, np.integer) else value

    records = []
    for row in table.to_dict("records"):
        record = {name: plain(value) for name, value in row.items()}
        if record.get("n_seeds") is not None:
            record["n_seeds"] = int(record["n_seeds"])
        records.append(record)
    return records
