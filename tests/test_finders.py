"""Other ways to find safety units, against the formulas written out on everything collected."""

import numpy as np
import pandas as pd
import pytest
import torch

from ssah_utils import activations, per_unit, scoring, units, weights
from ssah_utils.experiments import finders
from ssah_utils.per_unit import PerUnit
from ssah_utils.prompts import tokens
from tests.conftest import writers_by_name

SIDES = ("harmful", "helpful")


def example(seed: int, length: int) -> dict[str, list[int]]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 40, (length,), generator=generator).tolist()
    return {"input_ids": ids, "labels": [-100] * 2 + ids[2:]}


@pytest.fixture(scope="module")
def examples():
    return {
        "harmful": [example(row, 6 + row % 3) for row in range(5)],
        "helpful": [example(20 + row, 5 + row % 4) for row in range(4)],
    }


@pytest.fixture
def of_request(llama, examples):
    return {side: scoring.moments_per_request(llama, examples[side]) for side in SIDES}


def collected(model, rows, kind: str, layer: int) -> torch.Tensor:
    """Every activation of one module where a response token is predicted: (n, n_channels)."""
    found = []
    handle = writers_by_name(model, kind)[layer].register_forward_pre_hook(
        lambda module, args: found.append(args[0][0, 1:-1].double())
    )
    with torch.no_grad():
        for row in rows:
            model(input_ids=torch.tensor([row["input_ids"]]))
    handle.remove()
    return torch.cat(found)


def z(values: torch.Tensor) -> torch.Tensor:
    return (values - values.mean()) / values.std()


def weight_of(model, kind: str, layer: int) -> torch.Tensor:
    return writers_by_name(model, kind)[layer].weight.detach().double()


@pytest.mark.parametrize("name", ["variance", "weighted norm"])
def test_contrasts_are_those_computed_by_hand_from_a_subset(llama, examples, of_request, name):
    chosen = finders.Subset(harmful=[0, 3, 4], helpful=[1, 2])
    moments = chosen.moments(of_request)
    if name == "variance":
        found = finders.by_variance(moments, weights.squared_column_norms(llama))
    else:
        found = finders.by_weighted_norm(moments, weights.mean_absolute_columns(llama))
    for kind in per_unit.KINDS:
        for layer in (0, 2):
            weight, scored = weight_of(llama, kind, layer), {}
            for side, rows in (("harmful", [0, 3, 4]), ("helpful", [1, 2])):
                values = collected(llama, [examples[side][row] for row in rows], kind, layer)
                if name == "variance":
                    scored[side] = z(values.var(0) * weight.square().sum(0))
                else:
                    scored[side] = z(values.square().mean(0).sqrt() * weight.abs().mean(0))
            expected = scored["harmful"] - scored["helpful"]
            torch.testing.assert_close(found[kind][layer], expected, rtol=1e-3, atol=1e-4)


def test_the_gradient_contrast_is_of_standardised_products(llama, examples):
    batches = {side: tokens.token_batches(examples[side]) for side in SIDES}
    products = {side: activations.gradient_activation(llama, batches[side]) for side in SIDES}
    found = finders.by_gradient(products)
    for kind in per_unit.KINDS:
        for layer in range(3):
            expected = z(products["harmful"][kind][layer]) - z(products["helpful"][kind][layer])
            torch.testing.assert_close(found[kind][layer], expected)


def test_random_halves_are_halves_and_follow_the_seed():
    drawn = finders.random_halves(9, 6, n_draws=3, seed=4)
    assert list(drawn) == ["seed: 0", "seed: 1", "seed: 2"]
    for half in drawn.values():
        assert len(set(half.harmful)) == 4 and set(half.harmful) <= set(range(9))
        assert len(set(half.helpful)) == 3 and set(half.helpful) <= set(range(6))
    assert finders.random_halves(9, 6, 3, 4) == drawn
    assert finders.random_halves(9, 6, 3, 5) != drawn


def test_sizes_that_are_not_there_are_left_out():
    found = finders.first_requests(9, 6, [2, 6, 7])
    assert list(found) == ["size: 2", "size: 6"]
    assert list(found["size: 2"].harmful) == list(found["size: 2"].helpful) == [0, 1]


def test_disjoint_halves_share_no_request_and_leave_none_out():
    one, other = finders.disjoint_halves(5, 4).values()
    for side, n in (("harmful", 5), ("helpful", 4)):
        rows = [*getattr(one, side), *getattr(other, side)]
        assert sorted(rows) == list(range(n))


def test_categories_are_the_biggest_that_are_big_enough():
    categories = ["c", "a", "b", "a", "b", "a", "d", "d"]
    found = finders.per_category(categories, 3, n_categories=2, n_per_category=2)
    assert list(found) == ["category: a", "category: b"]
    assert list(found["category: a"].harmful) == [1, 3, 5]
    assert list(found["category: b"].helpful) == [0, 1, 2]
    assert list(finders.per_category(categories, 3, 9, 3)) == ["category: a"]
    assert finders.per_category(categories, 3, 9, 4) == {}


def sets_of(**chosen: list[int]) -> dict[str, PerUnit]:
    found = {}
    for name, channels in chosen.items():
        mask = torch.zeros(1, 10, dtype=torch.bool)
        mask[0, channels] = True
        found[name] = PerUnit({"mlp": mask})
    return found


def test_variants_stand_beside_the_reference_with_what_they_were_found_on():
    sets = sets_of(reference=[0, 1, 2, 3], other=[2, 3, 4, 5])
    sets = {"reference": sets["reference"], "seed: 0": sets["other"]}
    table = finders.with_reference(units.overlap_table(sets), {"reference": 8, "seed: 0": 4})
    assert table["variant"].tolist() == ["reference", "seed: 0"]
    assert table["family"].tolist() == ["reference", "seed"]
    assert table["n_requests"].tolist() == [8, 4]
    assert table["jaccard"].tolist() == pytest.approx([1, 2 / 6])
    chance = 1.6 / 6.4  # two random sets of 4 of 10 share 1.6
    assert table["corrected"].tolist() == pytest.approx([1, (2 / 6 - chance) / (1 - chance)])


def test_partitions_are_compared_group_by_group():
    generator = torch.Generator().manual_seed(0)
    parted = []
    for _ in range(2):
        scores = [PerUnit({"mlp": torch.randn(2, 40, generator=generator)}) for _ in range(2)]
        parted.append(units.partition(*scores, 0.1, 0.2, 0.2))
    table = finders.partition_overlap(*parted)
    assert table["group"].tolist() == list(units.GROUPS)
    for _, row in table.iterrows():
        a, b = (set(np.flatnonzero(one.units(row["group"]).flatten())) for one in parted)
        assert row["jaccard"] == pytest.approx(len(a & b) / len(a | b))
        assert row["corrected"] == pytest.approx(
            (row["jaccard"] - row["chance"]) / (1 - row["chance"])
        )
    same = finders.partition_overlap(parted[0], parted[0])
    assert (same["corrected"] == 1).all()
    assert isinstance(table, pd.DataFrame) and list(table) == [
        "group",
        "jaccard",
        "chance",
        "corrected",
    ]
