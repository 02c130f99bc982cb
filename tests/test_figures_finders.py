"""Figures of A3_finders: what stands in the tables is what is drawn."""

import itertools

import numpy as np
import pandas as pd
import pytest

from ssah_utils.figures import finders

pytestmark = pytest.mark.usefixtures("drawn_in_our_style")
VARIANTS = {
    "reference": "reference",
    "seed: 0": "seed",
    "category: Physical": "category",
    "score: WIFN": "score",
}
FINDERS = ["variance x norm", "learned mask", "refusal direction"]


def finder_tables() -> dict[str, pd.DataFrame]:
    """As A3_finders stores them."""
    pairs = itertools.product(VARIANTS, VARIANTS)
    overlaps = [
        {"first": a, "second": b, "jaccard": 1.0 if a == b else 0.3, "chance": 0.01}
        for a, b in pairs
    ]
    rates = [
        {
            "variant": variant,
            "family": family,
            "metric": metric,
            "mean": mean,
            "low": mean - 0.1,
            "high": mean + 0.1,
            "n": 4,
        }
        for variant, family in (VARIANTS | {"control: nothing": "control"}).items()
        for metric, mean in (
            ("margin_drop", 4.0),
            ("asr", 0.5),
            ("coherent_asr", 0.4),
            ("answer_nll", 0.7),
        )
    ]
    categories = [
        {
            "found_on": found,
            "measured_on": measured,
            "margin_drop": 2.0,
            "low": 1.0,
            "high": 3.0,
            "coherent_asr": coherent,
            "n": 6,
        }
        for found, (measured, coherent) in itertools.product(
            ("reference", "Physical", "random"), (("Autonomy", 0.5), ("Physical", np.nan))
        )
    ]
    smallest = [
        {
            "order": order,
            "units": n,
            "margin_drop": drop * n,
            "low": drop * n - 0.1,
            "high": drop * n + 0.1,
            "share_of_effect": drop * n / 8,
            "asr": 0.5,
            "coherent_asr": 0.4,
        }
        for (order, drop), n in itertools.product(
            {"greedy": 1.0, "score": 0.6, "random": 0.01}.items(), (1, 4, 8)
        )
    ]
    found = {
        "finder": [*FINDERS, "random"],
        "units": 8,
        "margin_drop": [4.0, 6.0, 2.0, 0.1],
        "low": [3.5, 5.0, 1.0, -0.1],
        "high": [4.5, 7.0, 3.0, 0.3],
        "coherent_asr": [0.5, 0.75, np.nan, 0.0],
        "coherent_low": [0.3, 0.5, np.nan, 0.0],
        "coherent_high": [0.7, 0.9, np.nan, 0.2],
        "answer_nll": [0.1, 0.2, 0.3, 0.0],
        "nll_low": [0.0, 0.1, 0.2, 0.0],
        "nll_high": [0.2, 0.3, 0.4, 0.1],
    }
    curve = [
        {"finder": name, "fraction": n / 1000, "units": n, "margin_drop": size * n}
        | {"low": size * n - 0.1, "high": size * n + 0.1}
        for n, (name, size) in itertools.product(
            (1, 4), zip([*FINDERS, "random"], (0.5, 0.7, 0.2, 0.01), strict=True)
        )
    ]
    return {
        "finders": pd.DataFrame(found),
        "finder_curve": pd.DataFrame(curve),
        "jaccard": pd.DataFrame(overlaps),
        "rates": pd.DataFrame(rates),
        "categories": pd.DataFrame(categories),
        "smallest": pd.DataFrame(smallest),
    }


def test_matrix_shows_every_pair_in_the_stored_order():
    figure = finders.stability_matrix(finder_tables())
    ax = figure.axes[0]
    assert [label.get_text() for label in ax.get_yticklabels()] == list(VARIANTS)
    assert [label.get_text() for label in ax.get_xticklabels()] == list(VARIANTS)
    assert [text.get_text() for text in ax.texts] == [
        "100" if n % 5 == 0 else "30" for n in range(16)
    ]


def test_variants_are_drawn_with_half_of_the_reference():
    figure = finders.variant_ablation(finder_tables())
    drops, *_ = figure.axes
    assert [label.get_text() for label in drops.get_yticklabels()] == [
        *VARIANTS,
        "control: nothing",
    ]
    assert [2.0, 2.0] in [list(line.get_xdata()) for line in drops.lines]
    assert drops.yaxis_inverted()


def test_a_variant_without_a_metric_leaves_a_gap():
    tables = finder_tables()
    rates = tables["rates"]
    missing = (rates["variant"] == "seed: 0") & (rates["metric"] == "answer_nll")
    n_lines = [len(ax.lines) for ax in finders.variant_ablation(tables).axes]
    found = [
        len(ax.lines) for ax in finders.variant_ablation(tables | {"rates": rates[~missing]}).axes
    ]
    assert found == [n_lines[0], n_lines[1], n_lines[2] - 2]


def test_categories_fill_two_panels():
    margin, coherent = finders.category_matrix(finder_tables()).axes[:2]
    assert [label.get_text() for label in margin.get_yticklabels()] == [
        "reference",
        "Physical",
        "random",
    ]
    assert len(margin.texts) == 6 and {text.get_text() for text in margin.texts} == {"2.0"}
    assert {text.get_text() for text in coherent.texts} == {"0.50"}, (
        "a cell without judged answers is empty"
    )


def test_smallest_sets_have_one_line_per_order_and_the_targets():
    left, right = finders.smallest_sets(finder_tables()).axes
    lines = {line.get_label(): list(line.get_ydata()) for line in left.lines}
    assert lines["greedy"] == [1, 4, 8] and lines["random"] == [0.01, 0.04, 0.08]
    assert [4.0, 4.0] in [list(line.get_ydata()) for line in left.lines], "half of the whole set, 8"
    assert [line.get_label() for line in right.lines] == ["greedy", "score", "random"]
    assert [label.get_text() for label in left.get_xticklabels()] == ["1", "4", "8"]


def test_every_finder_is_a_line_up_to_the_full_size_and_random_sets_are_a_band():
    left, answers, price = finders.finders_compared(finder_tables()).axes
    lines = {line.get_label(): line for line in left.lines}
    assert set(lines) == {*FINDERS, "random"}
    assert list(lines["learned mask"].get_xdata()) == [1, 4, 8]
    assert list(lines["learned mask"].get_ydata()) == pytest.approx([0.7, 2.8, 6.0])
    assert len({(line.get_color(), line.get_marker()) for line in lines.values()}) == 4
    assert len(left.collections) == 1, "one band"
    assert [label.get_text() for label in answers.get_yticklabels()] == [
        *("variance x norm", "refusal direction", "learned mask", "random")
    ]
    dots = [line for line in answers.lines if line.get_marker() != "None"]
    found = [float(line.get_xdata()[0]) for line in dots]
    assert found == [0.5, 0.75, 0.0], "a finder without answers leaves a gap"
    mask = (lines["learned mask"].get_color(), lines["learned mask"].get_marker())
    assert (dots[1].get_color(), dots[1].get_marker()) == mask
    assert len([line for line in price.lines if line.get_marker() != "None"]) == 4


def test_every_finder_has_a_look_of_its_own():
    assert len(set(finders.FINDER_LOOKS.values())) == len(finders.FINDER_LOOKS)
