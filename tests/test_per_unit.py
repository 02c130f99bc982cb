"""One value per unit: arithmetic and sets, entry by entry, against plain tensors."""

import operator

import pytest
import torch

from ssah_utils.per_unit import PerUnit

SHAPES = {"attention": (3, 6), "mlp": (3, 10)}


def values(seed: int) -> PerUnit:
    generator = torch.Generator().manual_seed(seed)
    return PerUnit(
        {kind: torch.randn(shape, generator=generator) for kind, shape in SHAPES.items()}
    )


def chosen(seed: int) -> PerUnit:
    return values(seed) > 0


def whole(per_unit: PerUnit) -> torch.Tensor:
    """What the tests hold against ``flatten``."""
    return torch.cat([per_unit["attention"].reshape(-1), per_unit["mlp"].reshape(-1)])


@pytest.mark.parametrize("operation", ["add", "sub", "mul", "truediv", "lt", "le", "gt", "ge"])
@pytest.mark.parametrize("other", [values(1), 2, 0.5])
def test_arithmetic_is_entry_by_entry(operation, other):
    apply = getattr(operator, operation)
    found = apply(values(0), other)
    assert torch.equal(
        found.flatten(),
        apply(whole(values(0)), whole(other) if isinstance(other, PerUnit) else other),
    )
    assert torch.equal((-values(0)).flatten(), -whole(values(0)))


def test_a_number_may_come_first():
    for found in (2 + values(0), 2 * values(0), sum([values(0), values(1)])):
        assert isinstance(found, PerUnit)
    assert (2 + values(0)).equals(values(0) + 2) and (2 * values(0)).equals(values(0) + values(0))


@pytest.mark.parametrize("operation", ["and_", "or_", "xor"])
def test_set_operators_are_those_of_python_sets(operation):
    a, b = chosen(0), chosen(1)
    found = getattr(operator, operation)(a, b)
    assert set(found.names()) == getattr(operator, operation)(set(a.names()), set(b.names()))
    assert set((~a).names()) == set((a | ~a).names()) - set(a.names())
    assert found.count() == len(found.names()) and found.share == found.count() / 48


def test_a_set_operator_on_numbers_is_refused():
    for wrong in (
        lambda: values(0) | chosen(1),
        lambda: ~values(0),
        lambda: values(0).count(),
        lambda: values(0).only("mlp"),
    ):
        with pytest.raises(TypeError, match="a set of units is of bool"):
            wrong()
    with pytest.raises(TypeError, match="unsupported operand"):
        chosen(0) | True


def test_two_of_different_models_are_refused():
    other = PerUnit({"attention": torch.zeros(3, 6), "mlp": torch.zeros(3, 9)})
    for wrong in (
        lambda: values(0) + other,
        lambda: chosen(0) & (other > 0),
        lambda: values(0).where(other > 0, 0.0),
    ):
        with pytest.raises(ValueError, match="values of different models"):
            wrong()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "not none"),
        ({"MLP": torch.zeros(2, 2)}, "not MLP"),
        ({"mlp": torch.zeros(4)}, r"shape \(4,\), not"),
    ],
)
def test_what_is_no_value_per_unit_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        PerUnit(given)


def test_flat_and_back():
    a = values(0)
    assert torch.equal(a.flatten(), whole(a)) and a.unflatten(a.flatten()).equals(a)
    with pytest.raises(ValueError, match="47"):
        a.unflatten(torch.zeros(47))


def test_order_of_kinds_does_not_depend_on_how_it_was_made():
    a = values(0)
    assert torch.equal(
        PerUnit({"mlp": a["mlp"], "attention": a["attention"]}).flatten(), a.flatten()
    )


def test_where_only_empty_any_all():
    a, mask = values(0), chosen(1)
    assert torch.equal(
        a.where(mask, -torch.inf).flatten(), torch.where(whole(mask), whole(a), -torch.inf)
    )
    assert torch.equal(a.where(mask, -a).flatten(), torch.where(whole(mask), whole(a), -whole(a)))
    assert mask.only("mlp").names() == [name for name in mask.names() if name.startswith("mlp/")]
    with pytest.raises(ValueError, match=r"no units of kind 'MLP' \(there: attention, mlp\)"):
        mask.only("MLP")
    assert not a.empty_set().any() and (~a.empty_set()).all() and a.empty_set().n_units == 48
    assert mask.any() and not mask.all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_the_first_module_that_is_not_finite_is_named_in_the_order_of_the_model(bad):
    a = values(0)
    assert a.require_finite("scores") is a
    a["attention"][2, 1] = a["mlp"][1, 3] = a["mlp"][1, 4] = bad
    with pytest.raises(ValueError, match=r"^scores of 2 mlp units of block 1 are nan or infinite"):
        a.require_finite("scores")
    a["attention"][1, 5] = bad
    with pytest.raises(ValueError, match=r"^scores of 1 attention units of block 1 are nan"):
        a.require_finite("scores")


def test_rows_of_layers_are_stacked():
    rows = {kind: list(tensor) for kind, tensor in values(0).items()}
    assert PerUnit.of_layers(rows).equals(values(0))


def test_equality_is_of_all_values_and_comparison_is_not_python_equality():
    a = values(0)
    assert (
        a.equals(values(0)) and not a.equals(values(1)) and not a.equals(a.map(torch.Tensor.double))
    )
    assert a != values(0) and a == a


def test_it_is_a_mapping_and_says_what_it_is():
    assert (
        list(values(0)) == ["attention", "mlp"] and dict(values(0).items()).keys() == SHAPES.keys()
    )
    assert repr(values(0)) == "PerUnit(attention (3, 6), mlp (3, 10), float32)"
    assert f"{chosen(0).count()} chosen" in repr(chosen(0))
