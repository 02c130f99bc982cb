"""Stored measurements of speed as the Markdown tables of docs/speed.md.

bench.json, growth.json and times.json have a column for each kind of machine. Knows these files;
writes none.
"""

import json
from pathlib import Path

import pandas as pd

from ssah_utils.figures.speed import exponent
from ssah_utils.files import REFERENCE
from ssah_utils.pipeline.result_tables import markdown

KINDS = {"bf16": "two cores with bfloat16", "float32": "two cores without, float32"}
NOTHING = "Not measured yet."
FIGURE = "![Seconds and memory of each kind of work against parameters](../figures/cost_growth.png)"
WAITS = {  # what people wait for, with the unit of its number
    "brief_minutes": "`make reproduce`, minutes",
    "laptop_minutes": "`make reproduce PROFILE=laptop`, minutes",
    "quickstart_seconds": "`make quickstart`, seconds, without downloads",
    "noop_seconds": "`make reproduce` again, nothing to do, seconds",
    "figures_seconds": "`make figures`, seconds",
    "help_seconds": "`ssah --help`, seconds",
    "test_minutes": "the tests, minutes",
}


def stored(name: str, folder: Path) -> dict[str, dict]:
    """A file of measurements by kind of machine; empty where nothing was measured."""
    path = folder / name
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def growth(folder: Path) -> pd.DataFrame:
    """What ``tests/bench_growth.py`` found, on the first of ``KINDS``; empty where it never ran."""
    columns = stored("growth.json", folder)
    rows = [columns[kind]["rows"] for kind in KINDS if kind in columns]
    return pd.DataFrame(rows[0] if rows else [])


def _cells(columns: dict[str, dict], name: str, form: str) -> list[str]:
    found = [columns.get(kind, {}).get(name) for kind in KINDS]
    return ["" if value is None else f"{value:{form}}" for value in found]


def waits_table(results: dict[str, dict]) -> str:
    """What people wait for, then every notebook of ``make reproduce``, by kind of machine."""
    columns = stored("times.json", REFERENCE)
    if not columns:
        return NOTHING
    rows = [[title, *_cells(columns, name, ".1f")] for name, title in WAITS.items()]
    of_notebooks = {kind: column.get("brief_notebooks", {}) for kind, column in columns.items()}
    names = sorted(set().union(*of_notebooks.values()))
    rows += [[f"{name}, minutes", *_cells(of_notebooks, name, ".1f")] for name in names]
    return markdown(rows, ["what", *KINDS.values()])


def bench_table(results: dict[str, dict]) -> str:
    """Every ratio beside its goal, by kind of machine."""
    columns = stored("bench.json", REFERENCE)
    if not columns:
        return NOTHING
    goals = columns["goals"]
    measured = [name for kind in KINDS for name in columns.get(kind, {})]
    rows = []
    for name in dict.fromkeys([*goals, *measured]):
        cells = [columns.get(kind, {}).get(name) for kind in KINDS]
        if any(isinstance(value, float) for value in cells):
            goal = " ".join(map(str, goals.get(name, ())))
            rows.append([f"`{name}`", goal, *_cells(columns, name, ".3f")])
    return markdown(rows, ["ratio", "goal", *KINDS.values()])


def step_table(results: dict[str, dict]) -> str:
    """Which share of a training step each kind of operation takes, by kind of machine."""
    columns = stored("bench.json", REFERENCE)
    found = [
        {"machine": title, "step": condition} | shares
        for kind, title in KINDS.items()
        for condition, shares in columns.get(kind, {}).get("step_shares", {}).items()
    ]
    if not found:
        return NOTHING
    rows = [
        [f"{one:.0%}" if isinstance(one, float) else one for one in row.values()] for row in found
    ]
    return markdown(rows, list(found[0]))


def growth_table(results: dict[str, dict]) -> str:
    """Seconds and memory of every size, and the exponent of each kind of work."""
    table = growth(REFERENCE)
    if table.empty:
        return NOTHING
    works = list(dict.fromkeys(table["work"]))
    rows = []
    for name, part in table.groupby("size", sort=False):
        found = part.set_index("work")
        n_parameters = found["n_parameters"].iloc[0]
        cells = [
            f"{found.loc[work, 'seconds']:.3g} s, {found.loc[work, 'gib']:.3g}" for work in works
        ]
        rows.append([name, f"{n_parameters / 1e6:,.0f}", *cells])
    powers = []
    for work in works:
        part = table[table["work"] == work]
        both = (exponent(part["n_parameters"], part[column]) for column in ("seconds", "gib"))
        powers.append(", ".join(f"{power:.2f}" for power in both))
    rows.append(["exponent", "", *powers])
    header = ["size", "millions in blocks", *(f"{one}, s and GiB" for one in works)]
    return f"{markdown(rows, header)}\n\n{FIGURE}"


SPEED_TABLES = {
    "waits": waits_table,
    "bench": bench_table,
    "step": step_table,
    "growth": growth_table,
}
