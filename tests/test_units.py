"""Partition and set arithmetic against plain Python."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ssah_utils import units
from ssah_utils.per_unit import PerUnit
from ssah_utils.units import GROUPS, UnitPartition, partition, random_units


def scores(seed: int, n_layers: int = 3, n_attention: int = 6, n_mlp: int = 10) -> PerUnit:
    generator = torch.Generator().manual_seed(seed)
    sizes = {"attention": n_attention, "mlp": n_mlp}
    return PerUnit(
        {
            kind: torch.randn(n_layers, n, generator=generator, dtype=torch.float64)
            for kind, n in sizes.items()
        }
    )


def partition_by_sorting(
    z_safety: PerUnit, z_utility: PerUnit, n_safety: int, n_utility: int, n_redundant: int
) -> dict:
    """{(kind, layer, channel): group}, from sorted lists of tuples."""
    unit_scores = [
        (
            kind,
            layer,
            channel,
            z_safety[kind][layer, channel].item(),
            z_utility[kind][layer, channel].item(),
        )
        for kind in z_safety
        for layer in range(z_safety[kind].shape[0])
        for channel in range(z_safety[kind].shape[1])
    ]
    ranked = sorted(unit_scores, key=lambda unit: unit[4] - unit[3])
    safety, rest = ranked[:n_safety], ranked[n_safety:]
    rest.sort(key=lambda unit: unit[3] - unit[4])
    utility, rest = rest[:n_utility], rest[n_utility:]
    rest.sort(key=lambda unit: unit[3] + unit[4])
    redundant, rest = rest[:n_redundant], rest[n_redundant:]
    groups = {"safety": safety, "utility": utility, "redundant": redundant, "complex": rest}
    return {unit[:3]: group for group, members in groups.items() for unit in members}


def as_dict(parted: UnitPartition) -> dict:
    return {
        (kind, layer, channel): GROUPS[index]
        for kind, table in parted.group_index.items()
        for layer, row in enumerate(table.tolist())
        for channel, index in enumerate(row)
    }


def sizes(parted: UnitPartition) -> dict[str, int]:
    return {group: parted.units(group).count() for group in GROUPS}


# ---------------------------------------------------------------------------------------- partition


@st.composite
def fractions(draw) -> tuple[float, float, float]:
    cuts = sorted(draw(st.lists(st.integers(0, 1000), min_size=3, max_size=3)))
    return cuts[0] / 1000, (cuts[1] - cuts[0]) / 1000, (cuts[2] - cuts[1]) / 1000


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    fractions=fractions(),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 9)),
    seed=st.integers(0, 2**31),
)
def test_partition_equals_sorting_lists(fractions, shape, seed):
    n_units = shape[0] * (shape[1] + shape[2])
    wanted = [round(fraction * n_units) for fraction in fractions]
    assume(sum(fractions) <= 1 and sum(wanted) <= n_units)
    z_safety, z_utility = scores(seed, *shape), scores(seed + 1, *shape)
    parted = partition(z_safety, z_utility, *fractions)
    assert as_dict(parted) == partition_by_sorting(z_safety, z_utility, *wanted)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(fractions=fractions(), seed=st.integers(0, 2**31))
def test_groups_are_disjoint_and_of_exact_size_also_with_ties(fractions, seed):
    wanted = [round(fraction * 48) for fraction in fractions]
    assume(sum(fractions) <= 1 and sum(wanted) <= 48)
    z_safety, z_utility = (scores(seed + i).map(torch.round) for i in range(2))
    parted = partition(z_safety, z_utility, *fractions)
    for kind, z in z_safety.items():
        members = torch.stack([parted.units(group)[kind] for group in GROUPS])
        assert members.dtype == torch.bool
        assert torch.equal(members.sum(0), torch.ones(z.shape, dtype=torch.int64))
    found = sizes(parted)
    assert [found["safety"], found["utility"], found["redundant"]] == wanted
    assert sum(found.values()) == 48


def test_partition_by_hand():
    z_safety = PerUnit(
        {"attention": torch.tensor([[5.0, 0.0]]), "mlp": torch.tensor([[1.0, -3.0, 4.0]])}
    )
    z_utility = PerUnit(
        {"attention": torch.tensor([[0.0, 4.0]]), "mlp": torch.tensor([[1.0, -3.0, 4.5]])}
    )
    parted = partition(z_safety, z_utility, 0.2, 0.2, 0.2, fingerprint="f")
    assert parted.group_index["attention"].tolist() == [
        [GROUPS.index("safety"), GROUPS.index("utility")]
    ]
    assert [GROUPS[i] for i in parted.group_index["mlp"][0]] == ["complex", "redundant", "complex"]
    assert parted.fingerprint == "f"


@pytest.mark.parametrize(
    ("fractions", "full"),
    [
        ((0, 0, 0), "complex"),
        ((1, 0, 0), "safety"),
        ((0, 1, 0), "utility"),
        ((0, 0, 1), "redundant"),
    ],
)
def test_one_group_can_hold_everything(fractions, full):
    assert sizes(partition(scores(0), scores(1), *fractions)) == {
        group: 48 * (group == full) for group in GROUPS
    }


@pytest.mark.parametrize("bad", [-0.01, 1.01, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["safety_fraction", "utility_fraction", "redundant_fraction"])
def test_fraction_outside_0_to_1_is_named(name, bad):
    with pytest.raises(ValueError, match=rf"{name} is {bad}, but a fraction lies in \[0, 1\]"):
        partition(scores(0), scores(1), **{name: bad})


def test_fractions_above_1_together_are_named():
    with pytest.raises(
        ValueError,
        match=r"safety_fraction .* utility_fraction .* redundant_fraction is 1\.1, more than all",
    ):
        partition(scores(0), scores(1), 0.5, 0.4, 0.2)


# the latter add to 1.0000000000000002
@pytest.mark.parametrize("fractions", [(0.5, 0.3, 0.2), (0.33, 0.56, 0.11)])
def test_fractions_that_add_to_1_are_accepted(fractions):
    assert sizes(partition(scores(0), scores(1), *fractions))["complex"] <= 1


@pytest.mark.parametrize(
    "fractions", [(0.5, 0.5, 0.0), (0.25, 0.75, 0.0), (0.5, 0.25, 0.25), (0.1, 0.3, 0.6), (1, 0, 0)]
)
@pytest.mark.parametrize("n_mlp", range(1, 12))
def test_rounding_never_gives_more_units_than_there_are(fractions, n_mlp):
    parted = partition(scores(0, 1, 2, n_mlp), scores(1, 1, 2, n_mlp), *fractions)
    found, n_units = sizes(parted), 2 + n_mlp
    assert sum(found.values()) == n_units
    assert found["safety"] == round(fractions[0] * n_units), "the first group never loses a unit"
    for group, fraction in zip(("utility", "redundant"), fractions[1:], strict=True):
        assert round(fraction * n_units) - 1 <= found[group] <= round(fraction * n_units)


def test_unknown_group_raises():
    with pytest.raises(ValueError):
        partition(scores(0), scores(1)).units("harmless")


def test_counts_add_up():
    parted = partition(scores(0), scores(1), 0.25, 0.25, 0.25)
    table = parted.counts()
    assert table.index.tolist() == list(GROUPS)
    assert table["units"].tolist() == [12, 12, 12, 12]
    assert table["share"].tolist() == [0.25] * 4
    assert (table["attention"] + table["mlp"] == table["units"]).all()
    assert table["attention"].sum() == 18
    assert table.loc["safety", "mlp"] == parted.units("safety")["mlp"].sum()


def test_table_has_one_row_per_unit():
    z_safety, z_utility = scores(0), scores(1)
    parted = partition(z_safety, z_utility, 0.25, 0.25, 0.25)
    table = units.to_table(z_safety, z_utility, parted)
    expected = as_dict(parted)
    assert len(table) == len(expected) == 48
    for row in table.itertuples():
        assert row.group == expected[row.kind, row.layer, row.channel]
        assert row.z_safety == z_safety[row.kind][row.layer, row.channel]
        assert row.z_utility == z_utility[row.kind][row.layer, row.channel]


# --------------------------------------------------------------------------------------------- sets


def a_set(seed: int = 0, share: float = 0.4) -> PerUnit:
    generator = torch.Generator().manual_seed(seed)
    return (
        PerUnit(
            {
                kind: torch.rand(3, n, generator=generator)
                for kind, n in (("attention", 20), ("mlp", 30))
            }
        )
        < share
    )


def test_top_units_are_the_highest():
    score = scores(0)
    chosen = units.top_units(score, 0.25)
    assert chosen.count() == 12
    flat = torch.cat([score["attention"].flatten(), score["mlp"].flatten()])
    threshold = flat.sort(descending=True).values[11]
    assert chosen.equals(score >= threshold.item())
    with pytest.raises(ValueError, match="fraction is 2"):
        units.top_units(score, 2)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(share=st.floats(0, 1), seed=st.integers(0, 2**31))
def test_random_units_have_the_same_count_in_every_module(share, seed):
    like = a_set(seed, share)
    drawn = random_units(like, torch.Generator().manual_seed(seed))
    for kind in like:
        assert drawn[kind].dtype == torch.bool
        assert drawn[kind].shape == like[kind].shape
        assert drawn[kind].sum(1).tolist() == like[kind].sum(1).tolist()


def test_random_units_differ_between_draws_and_repeat_with_the_seed():
    like, generator = a_set(seed=5), torch.Generator().manual_seed(0)
    first, second = random_units(like, generator), random_units(like, generator)
    assert not first.equals(second)
    assert not first.equals(like)
    assert first.equals(random_units(like, torch.Generator().manual_seed(0)))


def test_random_units_prefer_no_channel():
    like = PerUnit({"mlp": (torch.arange(10) < 3).repeat(1000, 1)})
    drawn = random_units(like, torch.Generator().manual_seed(0))["mlp"].double().mean(0)
    assert (drawn - 0.3).abs().max() < 0.06  # four standard errors


def test_jaccard_by_hand():
    a = PerUnit(
        {
            "attention": torch.tensor([[True, True, False]]),
            "mlp": torch.tensor([[True, False, False]]),
        }
    )
    b = PerUnit(
        {
            "attention": torch.tensor([[False, True, True]]),
            "mlp": torch.tensor([[True, True, False]]),
        }
    )
    assert units.jaccard(a, b) == 2 / 5
    assert units.jaccard(a, a) == 1
    assert units.jaccard(a, ~a) == 0


def test_jaccard_of_two_empty_sets_is_1():
    empty = a_set().empty_set()
    assert units.jaccard(empty, empty) == 1


@pytest.mark.parametrize("fraction", [0, 0.02, 0.1, 0.2])
def test_set_difference_equals_comparing_lists(fraction):
    z_safety, z_utility = scores(0), scores(1)
    found = (
        units.set_difference(z_safety, z_utility, fraction).flatten().nonzero().squeeze(1).tolist()
    )
    safety, utility = (
        sorted(range(48), key=(-z).flatten().tolist().__getitem__) for z in (z_safety, z_utility)
    )
    q = next(
        q for q in range(49) if len(set(safety[:q]) - set(utility[:q])) == round(fraction * 48)
    )
    assert set(found) == set(safety[:q]) - set(utility[:q])


def test_set_difference_of_equal_rankings_is_refused():
    with pytest.raises(
        ValueError, match="no share leaves 5 units: the two rankings differ by at most 0"
    ):
        units.set_difference(scores(0), scores(0), 0.1)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(shares=st.tuples(st.floats(0.05, 0.6), st.floats(0.05, 0.6)), seed=st.integers(0, 2**31))
def test_chance_is_what_random_sets_share(shares, seed):
    generator = torch.Generator().manual_seed(seed)
    a, b = (PerUnit({"mlp": torch.rand(3, 400, generator=generator)}) < share for share in shares)
    drawn = [
        units.jaccard(random_units(a, generator), random_units(b, generator)) for _ in range(200)
    ]
    mean, error = torch.tensor(drawn).mean().item(), torch.tensor(drawn).std().item() / 200**0.5
    assert abs(units.chance_jaccard(a, b) - mean) < 5 * error + 2e-3


def test_chance_by_hand():
    a = PerUnit(
        {
            "attention": torch.tensor([[True, True, False, False]]),
            "mlp": torch.tensor([[True, False]]),
        }
    )
    b = PerUnit(
        {
            "attention": torch.tensor([[True, False, False, False]]),
            "mlp": torch.tensor([[True, True]]),
        }
    )
    assert units.chance_jaccard(a, b) == pytest.approx(1.5 / (3 + 3 - 1.5))
    empty = a_set().empty_set()
    assert units.chance_jaccard(empty, empty) == 1


def test_overlap_table_has_every_pair():
    sets = {"a": a_set(0), "b": a_set(1), "all": ~a_set(0).empty_set()}
    table = units.overlap_table(sets).set_index(["first", "second"])
    assert len(table) == 9
    for first in sets:
        for second in sets:
            row = table.loc[first, second]
            assert row["jaccard"] == units.jaccard(sets[first], sets[second])
            assert row["chance"] == units.chance_jaccard(sets[first], sets[second])
            assert row["corrected"] == pytest.approx(
                (row["jaccard"] - row["chance"]) / (1 - row["chance"])
                if first != second or first != "all"
                else 1
            )
    assert (table["jaccard"].unstack().to_numpy().diagonal() == 1).all()


def test_indices_and_names_of_single_units():
    like = a_set()
    chosen = units.from_flat_indices([1, 19, 60 + 31], like)
    assert chosen["attention"].nonzero().tolist() == [[0, 1], [0, 19]]
    assert chosen.names() == ["attention/0/1", "attention/0/19", "mlp/1/1"]
    assert units.from_flat_indices([], like).count() == 0


# ----------------------------------------------------------------------------------------- transfer


def test_transfer_table_counts_every_unit_once():
    generator = torch.Generator().manual_seed(0)
    draw = lambda n: torch.randint(0, 4, (2, n), generator=generator, dtype=torch.int8)  # noqa: E731
    before, after = (
        UnitPartition(PerUnit({"attention": draw(5), "mlp": draw(9)})) for _ in range(2)
    )
    table = units.transition_table(before, after)
    assert table["units"].sum() == 28 and len(table) == 16
    for row in table.itertuples():
        pairs = zip(
            before.group_index.flatten().tolist(), after.group_index.flatten().tolist(), strict=True
        )
        assert row.units == sum((GROUPS[a], GROUPS[b]) == (row.before, row.after) for a, b in pairs)
    occupied = table.groupby("before")["share"].sum()
    assert occupied[occupied > 0].to_list() == pytest.approx([1.0] * int((occupied > 0).sum()))


def test_nothing_moves_between_a_partition_and_itself():
    parted = partition(scores(0), scores(1), 0.2, 0.2, 0.2)
    table = units.transition_table(parted, parted)
    assert table[table["before"] != table["after"]]["units"].sum() == 0


def test_more_units_than_can_be_ranked_are_refused():
    score = PerUnit(
        {"attention": torch.tensor([[1.0, -torch.inf]]), "mlp": torch.tensor([[-torch.inf, 2.0]])}
    )
    assert units.top_units(score, 0.5).count() == 2
    with pytest.raises(
        ValueError, match=r"0\.75 of all units are 3, but only 2 units are there to choose from"
    ):
        units.top_units(score, 0.75)


def test_units_without_a_score_are_chosen_by_no_ranking():
    """In plain sorting, nan comes before all numbers."""
    score = scores(0)
    score["mlp"][0, 0] = score["attention"][1, 2] = torch.nan
    score["mlp"][2, 1], score["mlp"][1, 1] = -torch.inf, torch.inf
    for fraction in (0.1, 45 / 48):
        chosen = units.top_units(score, fraction)
        assert chosen.count() == round(fraction * 48) and chosen["mlp"][1, 1]
        assert (score.where(chosen, 0.0) > -torch.inf).all()
    with pytest.raises(ValueError, match="but only 45 units are there to choose from"):
        units.top_units(score, 46 / 48)
    whole = PerUnit({"mlp": torch.arange(2**53, 2**53 + 4)[None]})
    assert units.top_units(whole, 0.25).names() == ["mlp/0/3"]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("which", [0, 1])
def test_contrasts_need_two_scores_of_every_unit(bad, which):
    both = [scores(0), scores(1)]
    both[which]["mlp"][2, 3] = bad
    for contrasted in (
        lambda: partition(*both),
        lambda: units.set_difference(*both, 0.1),
        lambda: units.training_budgets(*both, 0.2, 0.1),
    ):
        with pytest.raises(ValueError, match="scores of 1 mlp units of block 2 are nan or infin"):
            contrasted()


def test_training_budgets_are_ends_of_the_scores_and_a_random_set_of_the_same_shape():
    generator = torch.Generator().manual_seed(3)
    z_safety, z_utility = (
        PerUnit(
            {
                kind: torch.randn(2, n, generator=generator)
                for kind, n in {"attention": 20, "mlp": 40}.items()
            }
        )
        for _ in range(2)
    )
    found = units.training_budgets(z_safety, z_utility, 0.25, 0.1, seed=5)
    total, contrast = (z_safety + z_utility).flatten(), (z_safety - z_utility).flatten()
    n, n_safety = round(0.25 * len(total)), round(0.1 * len(total))
    assert found["all"] is None
    chosen = {name: found[name].flatten() for name in ("redundant", "top", "random", "safety")}
    assert total[chosen["redundant"]].sort().values.equal(total.sort().values[:n])
    assert total[chosen["top"]].sort().values.equal(total.sort().values[-n:])
    assert contrast[chosen["safety"]].sort().values.equal(contrast.sort().values[-n_safety:])
    for kind in found["random"]:
        assert found["random"][kind].sum(1).equal(found["redundant"][kind].sum(1))
    other = units.training_budgets(z_safety, z_utility, 0.25, 0.1, seed=6)
    assert other["redundant"].equals(found["redundant"])
    assert not other["random"].equals(found["random"])
