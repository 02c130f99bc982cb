"""Figures of the direction from small tables: what is drawn, for a pair of models and for one
alone.
"""

import itertools

import numpy as np
import pandas as pd
import pytest

from ssah_utils.figures import stepwise as stepwise_figures

pytestmark = pytest.mark.usefixtures("drawn_in_our_style")

ATTACKS = [("none", 0), ("prefill", 1), ("prefill", 4), ("neutral", 6), ("past tense", 0)]


def direction_tables(models: tuple[str, ...]) -> dict[str, pd.DataFrame]:
    conditions = [
        {"model": model, "queries": kind, "attack": attack, "prefill": k}
        for model, kind, (attack, k) in itertools.product(models, ("harmful", "harmless"), ATTACKS)
    ]
    interval = lambda mean: {"mean": mean, "low": mean - 0.2, "high": mean + 0.2}  # noqa: E731
    steps = [
        keys | interval(5.0 - step) | {"step": step, "n": 8 if step < 8 else 3}
        for keys in conditions
        for step in sorted({keys["prefill"], 4, 8})
        if step >= keys["prefill"]
    ]
    prefills = [
        keys | interval(0.5) | {"metric": metric, "n": 8}
        for keys in conditions
        for metric in ("refused", "coherent_asr", "degenerate")
    ]
    blocks = [
        {"model": model, "attack": attack, "prefill": k, "layer": layer, "step": step}
        | interval(float(layer - step))
        for model, (attack, k), layer, step in itertools.product(
            models, ATTACKS[:2], range(3), (0, 1, 4)
        )
    ]
    conditions = [
        {"condition": name, "prefill": k} | interval(0.4)
        for name in stepwise_figures.CONDITIONS
        for k in (0, 1, 4)
    ]
    shares = [
        keys | {"queries": kind, "metric": "refused", "n": 8}
        for keys in conditions
        for kind in ("harmful", "harmless", "safe twin")
        if kind != "safe twin" or keys["prefill"] == 0
    ]
    named = {"mean": "margin", "low": "margin_low", "high": "margin_high"}
    steps = pd.DataFrame(steps)
    return {
        "recovery": pd.DataFrame(shares),
        "recovery_direction": pd.DataFrame(conditions).rename(columns=named),
        "steps": steps,
        "refusal_steps": steps,
        "prefills": pd.DataFrame(prefills),
        "blocks": pd.DataFrame(blocks),
    }


@pytest.mark.parametrize("models", [("aligned", "unaligned"), ("aligned",)])
def test_every_prefill_is_a_line_that_begins_at_its_end(models):
    figure = stepwise_figures.direction_steps(direction_tables(models))
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    assert lines["harmful, 4 tokens prefilled"].get_xdata()[0] == 4
    assert lines["harmful, 1 token prefilled"].get_xdata()[0] == 1
    assert lines["harmful, no attack"].get_xdata().max() == 4, "few answers were left at step 8"


def test_blocks_are_one_panel_per_model_and_attack():
    figure = stepwise_figures.direction_blocks(direction_tables(("aligned", "unaligned")))
    images = [ax.images[0] for ax in figure.axes if ax.images]
    assert len(images) == 4
    np.testing.assert_array_equal(images[0].get_array(), [[0, -1, -4], [1, 0, -3], [2, 1, -2]])
    low, high = images[0].get_clim()
    assert -low == high > 3.5, "0 is the middle of the colours"


def test_blocks_without_values_are_drawn_empty():
    tables = direction_tables(("aligned",))
    tables["blocks"]["mean"] = np.nan
    stepwise_figures.direction_blocks(tables).canvas.draw()


def test_models_trained_once_more_are_lines_and_units_switched_off_are_rows():
    figure = stepwise_figures.recovered(direction_tables(("aligned",)))
    margin, said, price, carriers = figure.axes
    assert len(margin.lines) == 5 + 1 and len(said.lines) == 5, "and the line at 0"
    assert [label.get_text() for label in price.get_yticklabels()] == [
        "harmless",
        "harmless,\n4 prefilled",
        "safe twins",
    ]
    rows = [label.get_text() for label in carriers.get_yticklabels()]
    assert rows[0] == "nothing off" and len(rows) == 4


def test_a_model_that_was_not_trained_once_more_is_drawn_alone():
    tables = direction_tables(("aligned",))
    for name in ("recovery", "recovery_direction"):
        tables[name] = tables[name][tables[name]["condition"] == "aligned"]
    figure = stepwise_figures.recovered(tables)
    assert len(figure.axes[1].lines) == 1
    figure.canvas.draw()
