"""Stored measurements of speed as tables and as a figure."""

import json

import pandas as pd
import pytest

from ssah_utils.figures import speed
from ssah_utils.pipeline import redraw, speed_tables

pytestmark = pytest.mark.usefixtures("drawn_in_our_style")


def growth(power: float = 1.0) -> pd.DataFrame:
    """Costs that grow with a power of the size, another constant for every kind of work."""
    rows = []
    for n in (1e6, 1e8, 7e9):
        for place, work in enumerate(speed.LOOKS, 1):
            cost = place * (n / 1e6) ** power
            row = {"size": f"{n:.0e}", "n_parameters": n, "work": work}
            rows.append(row | {"seconds": cost, "gib": 2 * cost})
    return pd.DataFrame(rows)


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setattr(speed_tables, "REFERENCE", tmp_path)
    return tmp_path


def write(folder, name: str, content: dict) -> None:
    (folder / name).write_text(json.dumps(content))


@pytest.mark.parametrize("power", [0.8, 1.0, 2.0])
def test_the_exponent_is_that_of_the_costs(power):
    for _, part in growth(power).groupby("work"):
        assert speed.exponent(part["n_parameters"], part["gib"]) == pytest.approx(power)


def test_every_kind_of_work_is_drawn_in_time_and_memory():
    figure = speed.cost_growth(growth())
    for ax in figure.axes:
        assert len(ax.lines) == len(speed.LOOKS)
        assert [text.get_text() for text in ax.texts] == [
            f"{work}: exponent 1.00" for work in speed.LOOKS
        ]
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == list(speed.LOOKS)


def test_growth_is_drawn_again_from_what_is_stored(tmp_path):
    assert redraw.redraw_growth(tmp_path, tmp_path) == [] and not list(tmp_path.glob("*.png"))
    write(tmp_path, "growth.json", {"float32": {"rows": growth().to_dict("records")}})
    assert redraw.redraw_growth(tmp_path, tmp_path) == []
    assert (tmp_path / "cost_growth.png").exists()
    write(tmp_path, "growth.json", {"float32": {"rows": [{"size": "a"}]}})
    (problem,) = redraw.redraw_growth(tmp_path, tmp_path)
    assert "cost_growth" in problem and "bench_growth" in problem


def test_each_kind_of_machine_is_a_column_empty_where_nothing_was_measured(place):
    of_bf16 = {"brief_minutes": 50.04, "brief_notebooks": {"01_alignment": 9.44}}
    of_float32 = {"brief_notebooks": {"03_units": 2.0}, "noop_seconds": 7.0}
    write(place, "times.json", {"bf16": of_bf16, "float32": of_float32})
    lines = speed_tables.waits_table({}).splitlines()
    assert lines[2] == "| `make reproduce`, minutes | 50.0 |  |"
    assert "| 01_alignment, minutes | 9.4 |  |" in lines
    assert "| 03_units, minutes |  | 2.0 |" in lines


def test_ratios_stand_beside_their_goals(place):
    columns = {"goals": {"a_over_b": ["at most", 0.65]}, "float32": {"a_over_b": 0.7, "threads": 2}}
    write(place, "bench.json", columns | {"bf16": {"a_over_b": 0.6, "other": 0.25}})
    lines = speed_tables.bench_table({}).splitlines()
    assert lines[2:] == [
        "| `a_over_b` | at most 0.65 | 0.600 | 0.700 |",
        "| `other` |  | 0.250 |  |",
    ]


def test_shares_of_a_step_stand_by_machine_and_kind_of_step(place):
    shares = {"full": {"products": 0.25, "everything else": 0.75}}
    write(place, "bench.json", {"goals": {}, "float32": {"step_shares": shares, "a": 0.5}})
    assert speed_tables.step_table({}).splitlines() == [
        "| machine | step | products | everything else |",
        "|---|---|---|---|",
        f"| {speed_tables.KINDS['float32']} | full | 25% | 75% |",
    ]


def test_the_table_of_growth_ends_with_its_exponents(place):
    write(place, "growth.json", {"bf16": {"rows": growth(2.0).to_dict("records")}})
    lines = speed_tables.growth_table({}).splitlines()
    assert lines[2].startswith("| 1e+06 | 1 | 1 s, 2 |")
    assert lines[-1] == speed_tables.FIGURE
    assert lines[-3] == "| exponent |  | " + " | ".join(["2.00, 2.00"] * 4) + " |"


@pytest.mark.parametrize("make", speed_tables.SPEED_TABLES.values())
def test_what_was_never_measured_is_said(place, make):
    assert make({}) == speed_tables.NOTHING
