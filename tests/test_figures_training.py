"""Figures of 05 to 07 from small tables: every condition is drawn, in its colour, and nothing else
is needed.
"""

import itertools

import numpy as np
import pandas as pd
import pytest

from ssah_utils import frozen_sets
from ssah_utils.figures import freezing, redundant_units, transfer
from ssah_utils.units import GROUPS

pytestmark = pytest.mark.usefixtures("drawn_in_our_style")

RNG = np.random.default_rng(0)
TASKS = ("adaptation", "arithmetic")


def moves() -> pd.DataFrame:
    rows = []
    for data, seed, step in [
        ("floor", 0, 0),
        *itertools.product(("adaptation", "with refusals"), (0, 1), (5, 10)),
    ]:
        for before in GROUPS:
            shares = RNG.dirichlet(np.ones(4))
            keys = {"before": before, "data": data, "seed": seed, "step": step}
            pairs = zip(GROUPS, shares, strict=True)
            rows += [
                keys | {"after": after, "units": 100 * share, "share": share}
                for after, share in pairs
            ]
    return pd.DataFrame(rows)


def rates(**keys) -> list[dict]:
    return [
        {"set": name, "metric": metric, "mean": 0.5, "low": 0.4, "high": 0.6} | keys
        for name, metric in [*redundant_units.BUDGET_PANELS, ("harmful", "asr")]
    ]


def test_final_moves_are_means_over_seeds_of_the_last_step():
    table = moves()
    final = transfer.final_moves(table)
    assert len(final) == 3 * 16
    one = final.query("data == 'adaptation' and before == 'safety' and after == 'complex'")[
        "share"
    ].item()
    expected = table.query(
        "data == 'adaptation' and before == 'safety' and after == 'complex' and step == 10"
    )["share"].mean()
    assert one == pytest.approx(expected)


@pytest.mark.parametrize("draw", [transfer.transfer_flow, transfer.transfer_heat])
def test_transfer_has_one_panel_per_fine_tuning(draw):
    figure = draw({"moves": moves()})
    assert (figure.axes[0].get_title(loc="left") or figure.axes[0].get_title()).startswith("floor")
    assert len(figure.axes) == 3


def test_heat_map_shows_percent():
    table = moves()
    figure = transfer.transfer_heat({"moves": table})
    shown = [int(text.get_text()) for text in figure.axes[0].texts]
    assert shown == pytest.approx(
        (table[table["data"] == "floor"]["share"] * 100).tolist(), abs=0.51
    )


def test_transfer_path_draws_every_seed_and_the_floor():
    path = pd.DataFrame(
        [
            {"data": d, "seed": k, "step": s, "left": 0.1 * s, "margin": -s}
            for d, k, s in itertools.product(("adaptation", "with refusals"), (0, 1), (0, 5, 10))
        ]
    )
    figure = transfer.transfer_path({"path": path, "moves": moves()})
    assert len(figure.axes[0].lines) == 4 + 1


def test_freezing_paths_and_rates():
    titles = frozen_sets.titles(0.06)
    titles = {name: titles[name] for name in titles if name not in ("before", "random_as_safety")}
    titles |= {"lora": "lora", "prefix": "prefix"}
    paths = pd.DataFrame(
        [
            {
                "condition": c,
                "title": title,
                "task": t,
                "seed": 0,
                "step": s,
                "task_loss": 4 - 0.1 * s,
                "margin": 5 - s,
            }
            for (c, title), t, s in itertools.product(
                titles.items(), ("adaptation", "arithmetic"), (0, 5)
            )
        ]
    )
    figure = freezing.freezing_paths({"paths": paths})
    assert [line.get_label() for line in figure.axes[0].lines[: len(titles)]] == [*titles.values()]
    styles = {line.get_label(): line.get_linestyle() for line in figure.axes[0].lines}
    assert styles["random, as safety + 6% complex"] == "--"
    assert styles["safety + 6% complex"] == styles["lora"] == "-"

    rows = rates(task="-", condition="before", title="before", seed=0)
    for name, title in titles.items():
        rows += rates(task="adaptation", condition=name, title=title, seed=0)
    table = pd.DataFrame(rows)
    figure = freezing.freezing_rates({"rates": table})
    labels = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert labels == ["before", *titles.values()]


def test_frontier_has_a_panel_per_learning_rate():
    cases = itertools.product(("safety first", "random"), (0.3, 0.7), (1.0, 3.0), (0, 1))
    columns = ["order", "fraction", "factor", "step"]
    table = pd.DataFrame(cases, columns=columns).assign(
        task_loss=lambda t: 4 - t["step"], margin=lambda t: t["step"]
    )
    gains = table[table["step"] == 1].assign(gain=0.5, low=0.4, high=0.7)
    figure = freezing.frontier({"frontier": table, "gains": gains})
    assert [ax.get_title(loc="left") for ax in figure.axes] == [
        "learning rate x 1",
        "learning rate x 3",
        "Gain at equal task loss",
    ]
    drawn = [
        tuple(line.get_xdata())
        for line in figure.axes[-1].get_lines()
        if len(line.get_xdata()) == 2
    ]
    assert (0.3, 0.7) in drawn


def test_alignment_budget_names_every_budget():
    rows = rates(method="-", trained="before", seed=0)
    for method, name in [
        ("sft", "all"),
        ("sft", "redundant"),
        ("sft", "random"),
        ("dpo", "redundant"),
    ]:
        rows += rates(method=method, trained=name, seed=0)
    figure = redundant_units.alignment_budget({"rates": pd.DataFrame(rows)})
    labels = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert labels == ["before", "SFT all", "SFT redundant", "SFT random", "DPO redundant"]
