"""Figures of the paper's tables: ours and the paper's numbers stand where they belong; the summary
shows every claim.
"""

import matplotlib
import numpy as np
import pandas as pd
import pytest

from ssah_utils import files
from ssah_utils.figures import claims as claim_figures
from ssah_utils.figures import paper
from ssah_utils.pipeline import redraw
from ssah_utils.pipeline.stored import load_result

PAPER_FIGURES = [
    (stage, name)
    for stage, drawings in redraw.FIGURES.items()
    for name in drawings
    if name.startswith("table") or name == "claims"
]

pytestmark = pytest.mark.usefixtures("drawn_in_our_style")


def stored(stage: str) -> dict[str, pd.DataFrame]:
    return load_result(files.REFERENCE / stage / "result.json")["tables"]


def points(ax, marker: str) -> set[tuple[float, float]]:
    """(x, y) of the single markers in an axes."""
    found = [
        line for line in ax.lines if line.get_marker() == marker and len(line.get_xdata()) == 1
    ]
    return {
        (round(float(line.get_xdata()[0]), 3), round(float(line.get_ydata()[0]), 1))
        for line in found
    }


def test_table_1_shows_the_papers_numbers_and_ours():
    figure = paper.table1_ablation(stored("04_ablation"))
    attack, _, utility = figure.axes
    rows = [label.get_text() for label in attack.get_yticklabels()]
    assert (56.0, rows.index("safety")) in points(attack, "D") and (
        71.0,
        rows.index("safety"),
    ) in points(attack, "^")
    assert (-15.6, rows.index("utility")) in points(utility, "D")
    found = stored("04_ablation")["differences"]
    ours = found[
        (found["condition"] == "safety") & (found["set"] == "harmful") & (found["metric"] == "asr")
    ]["difference"].item()
    assert round(100 * ours, 3) in {x for x, _ in points(attack, "o")}


def test_table_2_has_a_row_per_frozen_set_and_the_papers_values():
    figure = paper.table2_freezing(stored("06_freezing"))
    rows = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert {(5.3, rows.index("nothing")), (2.1, rows.index("safety + all complex"))} <= points(
        figure.axes[0], "D"
    )
    assert (11.92, rows.index("nothing")) in points(figure.axes[0], "^")


def test_tables_4_and_5_show_the_papers_values():
    budget = paper.table4_budget(stored("07_redundant_units"))
    assert {x for x, _ in points(budget.axes[0], "D")} == {9.24, 8.8, 13.4}
    adapters = paper.table5_adapters(stored("06_freezing"))
    assert {x for x, _ in points(adapters.axes[1], "D")} == {1.26, 1.79, 2.18, 2.38, 2.2}


def claim_rows() -> pd.DataFrame:
    rows = [
        {
            "id": "all-is-well",
            "experiment": "1",
            "ours": 3.0,
            "ci_low": 2.0,
            "ci_high": 5.0,
            "control": 1.0,
        },
        {
            "id": "no-control",
            "experiment": "1",
            "ours": -2.0,
            "ci_low": -4.0,
            "ci_high": -1.0,
            "control": np.nan,
        },
        {
            "id": "no-interval",
            "experiment": "2",
            "ours": 1.0,
            "ci_low": np.nan,
            "ci_high": np.nan,
            "control": 1.0,
        },
        {
            "id": "nothing",
            "experiment": "2",
            "ours": None,
            "ci_low": None,
            "ci_high": None,
            "control": None,
        },
    ]
    styles = list(claim_figures.VERDICT_STYLES)
    return pd.DataFrame(rows).assign(verdict=styles, toward="more")


def test_the_summary_names_every_claim_and_counts_verdicts():
    figure = claim_figures.claims({"claims": claim_rows()})
    texts = {text.get_text() for text in figure.axes[0].texts}
    assert {
        "all is well",
        "no control",
        "no interval",
        "nothing",
        "3 [2, 5]",
        "-2 [-4, -1]",
    } <= texts
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        f"{v}: 1" for v in claim_figures.VERDICT_STYLES
    ]


def test_rows_are_scaled_by_their_distance_from_the_control():
    rows = claim_rows().astype({"ours": float, "ci_low": float, "ci_high": float, "control": float})
    assert claim_figures.scaled(rows.iloc[0]) == pytest.approx((0.5, 0.25, 1.0))
    assert claim_figures.scaled(rows.iloc[1]) == pytest.approx((-0.5, -1.0, -0.25))
    assert claim_figures.scaled(rows.iloc[2])[0] == 0


def test_right_is_toward_the_claim_also_where_it_says_less():
    rows = claim_rows().astype({"ours": float, "ci_low": float, "ci_high": float, "control": float})
    less = rows.assign(toward="less")
    assert claim_figures.scaled(less.iloc[0]) == pytest.approx((-0.5, -1.0, -0.25))
    assert claim_figures.scaled(less.iloc[1]) == pytest.approx((0.5, 0.25, 1.0))


def test_single_runs_are_ticks_on_the_scale_of_their_row():
    rows = claim_rows().assign(ours_seeds=[[2.0, 4.0], [-2.0], [1.0], []])
    ticks = [
        line
        for line in claim_figures.claims({"claims": rows}).axes[0].lines
        if line.get_marker() == "|"
    ]
    (line,) = ticks  # one run alone is the dot
    assert line.get_xdata() == pytest.approx([0.25, 0.75])


def test_symbols_differ_not_only_in_colour():
    styles = claim_figures.VERDICT_STYLES.values()
    assert len({(marker, fill) for _, marker, fill in styles}) == len(styles)


@pytest.mark.parametrize(("stage", "name"), PAPER_FIGURES)
def test_figures_fit_two_columns_with_legible_text(stage, name):
    figure = redraw.FIGURES[stage][name](stored(stage))
    figure.canvas.draw()
    sizes = [
        text.get_fontsize()
        for text in figure.findobj(matplotlib.text.Text)
        if text.get_text() and text.get_visible()
    ]
    assert figure.get_size_inches()[0] == paper.WIDTH and min(sizes) >= 7
