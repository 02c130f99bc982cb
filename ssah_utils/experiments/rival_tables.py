"""What finders' units do when they are switched off: by size, in several ways, and one alone.

Measured by a probe on requests that no finder has seen. Knows probes and sets of units.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from torch import Generator

from ssah_utils import evaluation, stats, units
from ssah_utils.experiments import ablation_probe
from ssah_utils.experiments.ablation_probe import INTACT, AblationProbe
from ssah_utils.experiments.rivals import PAPER, Found
from ssah_utils.per_unit import PerUnit

RANDOM = "random"  # in the place of a finder: sets with as many units in every module as PAPER's
ZERO = "zero"


# ------------------------------------------------------------------------------------ at equal size


def finders_table(
    rows: pd.DataFrame, found: Mapping[str, Found], random: Sequence[str]
) -> pd.DataFrame:
    """One row a finder, and one for all random sets together.

    * ``rows``: of ``AblationProbe.compare``, of every finder's set and of random ones.
    * ``random``: the variants that are random sets.

    Columns: finder, units, margin_drop, low, high; coherent_asr, coherent_low, coherent_high;
    answer_nll (more than the intact model's, nats per token), nll_low, nll_high; gain, gain_low,
    gain_high (margin lost beyond the paper's finder, request by request); coherent_gain and its
    interval likewise; seconds, agreement_of_halves (both missing for random sets).
    """
    variants = {name: [name] for name in found} | {RANDOM: list(random)}
    kept = rows[rows["set"] == "helpful"].rename(columns={"answer_nll": "value"})
    table = []
    for name, members in variants.items():
        row: dict[str, object] = {"finder": name}
        row["units"] = (found[name] if name in found else found[PAPER]).chosen.count()
        drop, paper = (
            ablation_probe.mean_over(rows, these, "margin_drop") for these in (members, [PAPER])
        )
        row |= _interval(("margin_drop", "low", "high"), drop)
        answered, of_paper = (
            ablation_probe.mean_over(rows, these, "coherent_asr") for these in (members, [PAPER])
        )
        names = ("coherent_asr", "coherent_low", "coherent_high")
        row |= _share(names, answered, len(members) == 1)
        nll = kept[kept["variant"].isin(members)].groupby("id", sort=False)["value"].mean()
        before = kept[kept["variant"] == INTACT].set_index("id")["value"]
        row |= _interval(("answer_nll", "nll_low", "nll_high"), nll - before[nll.index])
        row |= _interval(("gain", "gain_low", "gain_high"), drop - paper)
        names = ("coherent_gain", "coherent_gain_low", "coherent_gain_high")
        row |= _interval(names, answered - of_paper)
        row["seconds"] = found[name].seconds if name in found else np.nan
        row["agreement_of_halves"] = found[name].agreement_of_halves if name in found else np.nan
        table.append(row)
    return pd.DataFrame(table)


def _interval(names: tuple[str, str, str], values: pd.Series) -> dict[str, float]:
    """Mean of values per request and its interval, under these names; NaN where there is none."""
    values = values.astype(float).dropna().to_numpy()
    found = stats.mean_interval(values) if len(values) else (np.nan,) * 3
    return dict(zip(names, found, strict=True))


def _share(names: tuple[str, str, str], values: pd.Series, is_one: bool) -> dict[str, float]:
    """Share of requests that are answered; Wilson's interval of one set, a bootstrap of several."""
    if not is_one or not len(values):
        return _interval(names, values)
    return dict(zip(names, stats.proportion_interval(values == 1), strict=True))


def curve_table(
    probe: AblationProbe,
    found: Mapping[str, Found],
    fractions: Sequence[float],
    n_random: int,
    generator: Generator,
    progress: evaluation.Progress = evaluation._silent,
) -> pd.DataFrame:
    """Margin lost by the number of units: finder, fraction, units, margin_drop, low, high.

    ``random`` is the mean over ``n_random`` sets of that size; its interval is over requests.
    """
    intact = probe.margins(next(iter(found.values())).chosen.empty_set())
    rows = []
    for fraction in progress(list(fractions), "effect by size"):
        sets = {name: [one.choose(fraction)] for name, one in found.items()}
        like = sets[PAPER][0]
        sets[RANDOM] = [units.random_units(like, generator) for _ in range(n_random)]
        for name, draws in sets.items():
            drop = intact - np.mean([probe.margins(chosen) for chosen in draws], axis=0)
            row = {"finder": name, "fraction": fraction, "units": draws[0].count()}
            names = ("margin_drop", "low", "high")
            rows.append(row | dict(zip(names, stats.mean_interval(drop), strict=True)))
    return pd.DataFrame(rows)


# --------------------------------------------------------------------------------- in several ways


def interventions_table(
    probe: AblationProbe,
    sets: Mapping[str, PerUnit],
    means: Mapping[str, PerUnit],
    factors: Sequence[float],
    n_judged: int,
    progress: evaluation.Progress = evaluation._silent,
) -> pd.DataFrame:
    """What it does to hold units at zero, at means, or to multiply them by factors.

    * ``sets``: by name; each under every intervention.
    * ``means``: what units are held at, by the intervention's name.
    * ``n_judged``: requests that are also answered, from the first on.

    Columns: intervention, set, units, margin_drop, low, high, coherent_asr, coherent_low,
    coherent_high, answer_nll (more than the intact model's), nll_low, nll_high, share_of_zero (of
    the margin that the set takes at zero).
    """
    plain = dataclasses.replace(probe, means=None, factor=0.0, n_judged=n_judged)
    ways = {ZERO: plain}
    ways |= {name: dataclasses.replace(plain, means=mean) for name, mean in means.items()}
    ways |= {f"times {factor:g}": dataclasses.replace(plain, factor=factor) for factor in factors}
    nothing = next(iter(sets.values())).empty_set()
    intact = dataclasses.replace(plain, n_judged=0).measure(nothing)
    rows = []
    for way in progress(list(ways), "interventions"):
        for name, chosen in sets.items():
            row = {"intervention": way, "set": name, "units": chosen.count()}
            measured = ways[way].measure(chosen, f"{name}, {way}")
            rows.append(row | _measured(measured, intact))
    table = pd.DataFrame(rows)
    at_zero = table[table["intervention"] == ZERO].set_index("set")["margin_drop"]
    table["share_of_zero"] = table["margin_drop"] / table["set"].map(at_zero)
    return table


def _measured(rows: pd.DataFrame, intact: pd.DataFrame) -> dict[str, float]:
    """Margin lost, answers and price of one measurement against that of the intact model."""
    asked, kept = rows[rows["set"] == "harmful"], rows[rows["set"] == "helpful"]
    before = intact.set_index(["set", "id"])
    drop = before.loc["harmful"]["margin"] - asked.set_index("id")["margin"]
    found = _interval(("margin_drop", "low", "high"), drop)
    if "coherent_asr" in rows:
        answered = asked["coherent_asr"].dropna().astype(float)
        found |= _share(("coherent_asr", "coherent_low", "coherent_high"), answered, True)
    if len(kept):
        more = kept.set_index("id")["answer_nll"] - before.loc["helpful"]["answer_nll"]
        found |= _interval(("answer_nll", "nll_low", "nll_high"), more)
    return found


# ----------------------------------------------------------------------------------------- one unit


def single_units(
    probe: AblationProbe,
    selection: AblationProbe,
    best: Mapping[str, PerUnit],
    factors: Sequence[float],
    n_judged: int,
    generator: Generator,
    progress: evaluation.Progress = evaluation._silent,
) -> pd.DataFrame:
    """Each finder's best unit alone, at zero and multiplied by factors, beside a random unit.

    * ``probe``: held-out requests. ``selection``: calibration requests, on which the strongest
      factor of every unit is chosen; so answers, asked for under it alone, chose nothing.
    * ``best``: by finder, a set of one unit.
    * ``n_judged``: requests that are also answered under the strongest factor.

    Columns: finder, unit, factor, is_strongest, margin_drop, low, high; and where strongest:
    coherent_asr, coherent_low, coherent_high, answer_nll (more than intact), nll_low, nll_high, and
    of a random unit of the same module under the same factor random_drop, random_low, random_high,
    random_coherent_asr, random_coherent_low, random_coherent_high. A unit that two finders share
    is measured once.
    """
    nothing = next(iter(best.values())).empty_set()
    intact = dataclasses.replace(probe, n_judged=0).measure(nothing)
    before = selection.margins(nothing).mean()
    ways = (0.0, *factors)
    of_unit: dict[str, list[dict]] = {}
    for finder in progress(list(best), "single units"):
        unit = best[finder]
        (name,) = unit.names()
        if name in of_unit:
            continue
        control = units.random_units(unit, generator)
        lost = {way: before - _with(selection, way).margins(unit).mean() for way in ways}
        strongest = max(ways, key=lambda way: lost[way])
        of_unit[name] = []
        for way in ways:
            is_strongest = way == strongest
            how = _with(probe, way, n_judged if is_strongest else 0)
            row = {"unit": name, "factor": way, "is_strongest": is_strongest}
            row |= _measured(how.measure(unit, name), intact)
            if is_strongest:
                other = _measured(how.measure(control, f"random, as {name}"), intact)
                ends = ("low", "high", "coherent_asr", "coherent_low", "coherent_high")
                row |= {"random_drop": other["margin_drop"]}
                row |= {f"random_{end}": other[end] for end in ends if end in other}
            of_unit[name].append(row)
    found = []
    for finder, unit in best.items():
        found += [{"finder": finder} | row for row in of_unit[unit.names()[0]]]
    table = pd.DataFrame(found)
    first = ["finder", "unit", "factor", "is_strongest"]
    return table[[*first, *(name for name in table if name not in first)]]


def _with(probe: AblationProbe, factor: float, n_judged: int = 0) -> AblationProbe:
    """The probe under ``factor`` that judges so many answers; with none, it asks for margins."""
    kept = probe.kept if n_judged else None
    return dataclasses.replace(probe, means=None, factor=factor, n_judged=n_judged, kept=kept)
