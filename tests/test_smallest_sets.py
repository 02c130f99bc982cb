"""Few units that are enough, on a probe whose margin is a known sum over units."""

import math

import numpy as np
import pandas as pd
import pytest
import torch

from ssah_utils import units
from ssah_utils.experiments import smallest_sets
from ssah_utils.per_unit import PerUnit

COSTS = [0.5, 3.0, 0.0, 2.0, -1.0, 1.0, 0.25, 0.0, 0.25, 0.0, 0.0, 0.0]  # nats, by flat place


class SumProbe:
    """Every unit costs what ``COSTS`` says, on every request ``spread`` more or less."""

    def __init__(self, spread: float = 0.0) -> None:
        self.spread = np.array([-spread, 0.0, spread])
        self.n_measured = 0

    def margins(self, chosen: PerUnit) -> np.ndarray:
        cost = float(torch.tensor(COSTS)[chosen.flatten()].sum())
        return 10 - cost * (1 + self.spread)

    def measure(self, chosen: PerUnit, condition: str = "") -> pd.DataFrame:
        self.n_measured += 1
        margins = self.margins(chosen)
        return pd.DataFrame(
            {"set": "harmful", "margin": margins, "asr": margins < 7, "coherent_asr": margins < 6}
        )


@pytest.fixture
def whole() -> PerUnit:
    """Units that cost 0.5 + 3 + 2 + 1 + 0.25 + 0.25 = 7 nats together."""
    empty = PerUnit({"attention": torch.zeros(1, 4), "mlp": torch.zeros(1, 8)}).empty_set()
    return units.from_flat_indices([0, 1, 3, 5, 6, 8], empty)


@pytest.fixture
def found(whole) -> smallest_sets.Search:
    return smallest_sets.find(SumProbe(), whole, range(12), target=0.9)


def test_the_costliest_units_are_taken_until_the_target_is_reached(found):
    assert found.effect == pytest.approx(7)
    assert [step.chosen for step in found.path] == [1, 3, 5, 0]
    assert [step.value for step in found.path] == pytest.approx([3, 5, 6, 6.5])
    assert found.size_for(0.4) == 1 and found.size_for(0.5) == 2 and found.size_for(0.9) == 4
    assert found.size_for(0.95) is None
    assert found.units(2).names() == ["attention/0/1", "attention/0/3"]


def test_only_candidates_are_taken_and_the_search_may_end_before(whole):
    searched = smallest_sets.find(SumProbe(), whole, [0, 2, 5, 6], target=0.9)
    assert {step.chosen for step in searched.path} <= {0, 5, 6}
    assert searched.size_for(0.5) is None


def test_a_whole_set_without_effect_has_no_smallest_set(whole):
    searched = smallest_sets.find(SumProbe(), whole.empty_set(), [1, 3])
    assert searched.effect == 0 and searched.size_for(0.5) is None
    assert [step.chosen for step in searched.path] == [1, 3]


@pytest.fixture
def smallest(found) -> pd.DataFrame:
    generator = torch.Generator().manual_seed(0)
    ranked = [3, 1, 0, 5]
    return smallest_sets.held_out(SumProbe(0.1), found, ranked, [1, 2], 3, generator)


def test_what_they_cost_is_a_share_of_what_the_whole_set_costs_there(smallest):
    by = smallest.set_index(["order", "units"])
    assert by.loc[("greedy", 1), "margin_drop"] == pytest.approx(3)
    assert by.loc[("score", 1), "margin_drop"] == pytest.approx(2)
    assert by.loc[("greedy", 2), "share_of_effect"] == pytest.approx(5 / 7)
    assert 2.7 <= by.loc[("greedy", 1), "low"] < 3 < by.loc[("greedy", 1), "high"] < 3.31
    assert by.loc[("greedy", 1), "coherent_asr"] == 0 and by.loc[("greedy", 2), "coherent_asr"] == 1


def test_random_units_are_of_the_same_modules_and_averaged_over_draws(found):
    probe, generator = SumProbe(), torch.Generator().manual_seed(7)
    table = smallest_sets.held_out(probe, found, [3, 1], [2], 40, generator).set_index("order")
    again = torch.Generator().manual_seed(7)
    draws = [units.random_units(found.units(2), again) for _ in range(40)]
    costs = [10 - probe.margins(one).mean() for one in draws]
    assert all(one["attention"].sum() == 2 for one in draws)
    assert table.loc["random", "margin_drop"] == pytest.approx(np.mean(costs))
    assert probe.n_measured == 3, "only the first draw of each kind is answered"


def test_every_target_has_its_set_and_what_it_keeps_of_its_promise(found, smallest):
    table = smallest_sets.targets_table(found, smallest, (0.5, 0.95), 0.75)
    half, most = table.iloc[0], table.iloc[1]
    greedy = smallest.set_index(["order", "units"]).loc[("greedy", 2)]
    random = smallest.set_index(["order", "units"]).loc[("random", 2)]
    assert half["units"] == 2 and half["members"] == "attention/0/1, attention/0/3"
    assert half["share_held_out"] == greedy["share_of_effect"]
    assert half["margin_low"] == greedy["low"] and half["random_high"] == random["high"]
    assert half["coherent_asr"] == 1 and half["whole_coherent_asr"] == 0.75
    assert math.isnan(most["units"]) and most["members"] == "" and math.isnan(most["margin_low"])
