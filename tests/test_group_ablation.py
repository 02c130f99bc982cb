"""Groups switched off are measured as models without these units, and told against the intact."""

import numpy as np
import pandas as pd
import pytest
import torch

from ssah_utils import embedded, interventions, loading, paper, per_unit, units, weights
from ssah_utils.experiments import group_ablation
from ssah_utils.experiments.fewest_units import COLUMNS, fewest_units
from ssah_utils.experiments.group_ablation import GroupAblation
from ssah_utils.experiments.panel import Panel
from ssah_utils.per_unit import PerUnit


@pytest.fixture(scope="module")
def partition():
    generator = torch.Generator().manual_seed(0)
    model, _ = loading.load(embedded.TINY_RANDOM)
    norms = weights.squared_column_norms(model)
    drawn = [norms.map(lambda t: torch.rand(t.shape, generator=generator)) for _ in range(2)]
    return units.partition(*drawn, 0.1, 0.2, 0.2)


def test_every_group_but_complex_has_random_sets_with_as_many_units_in_every_module(partition):
    found = group_ablation.group_conditions(partition, 3, torch.Generator().manual_seed(1))
    groups = ["safety", "utility", "redundant"]
    assert set(found) == {"nothing", "complex", *groups, *(f"random, as {g}" for g in groups)}
    assert found["nothing"][0].count() == 0
    for group in groups:
        (chosen,), draws = found[group], found[f"random, as {group}"]
        assert len(draws) == 3 and chosen.equals(partition.units(group))
        for drawn in draws:
            assert not drawn.equals(chosen)
            for kind in per_unit.KINDS:
                assert torch.equal(drawn[kind].sum(1), chosen[kind].sum(1))


def test_a_measurement_is_that_of_a_model_without_the_units(partition):
    model, tokenizer = loading.load(embedded.TINY_RANDOM)
    base, _ = loading.load(embedded.TINY_RANDOM)
    table = pd.DataFrame({"id": ["a", "b"], "category": "x", "prompt": ["Why?", "How is it?"]})
    asked = Panel(base, tokenizer, {"harmful": table}, new_tokens=4)
    chosen = partition.units("utility")
    rows = GroupAblation(asked, model).measure(chosen)
    expected = asked.measure(interventions.without_units(model, chosen))
    assert rows["response"].tolist() == expected["response"].tolist()
    np.testing.assert_allclose(rows["base_nll"], expected["base_nll"], rtol=1e-4)
    measured = GroupAblation(asked, model).measure_all({"utility": [chosen]})
    pd.testing.assert_frame_equal(measured["utility"][0], rows)
    curve = GroupAblation(asked, model).curve(
        partition.group_index.map(torch.Tensor.float), [0.1, 0.3], torch.Generator()
    )
    sizes = curve.drop_duplicates(["condition", "fraction"])
    n_units = chosen.n_units
    assert sizes["units"].tolist() == [round(f * n_units) for f in (0.1, 0.1, 0.3, 0.3)]


def test_a_base_that_would_be_ablated_along_is_refused():
    model, tokenizer = loading.load(embedded.TINY_RANDOM)
    with pytest.raises(ValueError, match="load it a second time"):
        GroupAblation(Panel(model, tokenizer, {}), model)


# ------------------------------------------------------------------------ tables, from rows by hand


def rows(asr: list[bool], accuracy: list[bool]) -> pd.DataFrame:
    """A measurement of four harmful requests, two harmless ones and four tasks."""
    harmful = pd.DataFrame({"set": "harmful", "id": range(4), "asr": asr, "coherent_asr": asr})
    helpful = pd.DataFrame({"set": "helpful", "id": range(2), "refused": False, "answer_nll": 1.0})
    cloze = pd.DataFrame({"set": "cloze", "id": range(4), "accuracy": accuracy})
    return pd.concat([harmful, helpful, cloze], ignore_index=True)


NO, YES, HALF = [False] * 4, [True] * 4, [True, True, False, False]


@pytest.fixture
def measured() -> dict[str, list[pd.DataFrame]]:
    found = {"nothing": [rows(NO, YES)]}
    for group, asr, accuracy in (
        ("safety", YES, YES),
        ("utility", HALF, NO),
        ("redundant", NO, HALF),
    ):
        found[group] = [rows(asr, accuracy)]
        found[f"random, as {group}"] = [rows(NO, YES), rows(HALF, YES)]
    return found


def test_conditions_are_told_against_the_intact_model(measured):
    table = group_ablation.against_intact(measured)
    assert len(table) == 6 * 5 and "nothing" not in set(table["condition"])
    change = table.set_index(["condition", "set", "metric"])["difference"]
    assert change["safety", "harmful", "asr"] == 1 and change["utility", "cloze", "accuracy"] == -1
    assert change["random, as safety", "harmful", "asr"] == 0.25, "mean over draws and requests"
    assert (table["p_holm"] >= table["p"]).all()


def test_ours_stand_beside_the_papers_numbers(measured):
    table = group_ablation.beside_paper(group_ablation.against_intact(measured), "Llama2-7B-Chat")
    safety = table.set_index("ablated").loc["safety"]
    assert safety["asr_paper"] == paper.number("table1", "Llama2-7B-Chat", "safety", "asr")
    assert (safety["asr"], safety["coherent_asr"], safety["utility"]) == (100, 100, 0)
    assert safety["random_coherent_asr"] == 25
    assert table["utility"].tolist() == [0, -100, -50]


def test_points_are_written_with_their_interval(measured):
    differences = group_ablation.against_intact(measured)
    said = group_ablation.points(differences, "safety", "harmful", "asr")
    assert said == "+100 [100, 100]"


def test_rates_say_what_was_switched_off():
    mask = torch.tensor([[True, False, False, False]])
    chosen = PerUnit({"attention": mask, "mlp": ~mask})
    table = group_ablation.rates({"safety": [rows(YES, HALF)]}, {"safety": [chosen]}, "groups")
    found = table.set_index(["set", "metric"])
    assert found.loc[("harmful", "asr"), "mean"] == 1
    assert found.loc[("cloze", "accuracy"), "mean"] == 0.5
    assert set(table["units"]) == {4} and set(table["fraction"]) == {0.5}
    assert set(table["part"]) == {"groups"} and set(table["draw"]) == {0}


def rates_and_differences(intact: float, whole: float, low: float):
    """Coherent ASR of the intact model, without the safety group and along a curve; the paired
    difference of the first two, with the lower end of its interval.
    """
    rates = pd.DataFrame(
        {
            "part": ["groups"] * 2 + ["curve"] * 4,
            "condition": ["nothing", "safety"] + ["safety"] * 3 + ["random"],
            "set": "harmful",
            "metric": "coherent_asr",
            "fraction": [0.0, 0.05, 0.03, 0.01, 0.02, 0.01],
            "units": [0, 50, 30, 10, 20, 10],
            "mean": [intact, whole, 0.5, 0.2, 0.4, 1.0],
            "low": 0.0,
            "high": 1.0,
        }
    )
    keys = {"condition": ["safety"], "set": "harmful", "metric": "coherent_asr"}
    return rates, pd.DataFrame(keys | {"low": low})


@pytest.mark.parametrize(
    ("intact", "low", "targets", "found"),
    [
        (0.0, 0.3, (0.5, 0.9), {0.5: 20}),  # of 0.8
        (0.2, 0.1, (0.25, 0.5), {0.25: 20, 0.5: 30}),  # of 0.6: the intact model has 0.2 already
        (0.2, -0.1, (0.5,), {}),  # nothing clear is added, so no share of it can be reached
    ],
)
def test_the_smallest_share_that_adds_a_target_is_found(intact, low, targets, found):
    table = fewest_units(*rates_and_differences(intact, 0.8, low), targets)
    assert dict(zip(table["target"], table["units"], strict=True)) == found
    assert list(table) == COLUMNS
