"""A learned mask: its gates, its gradient, and the units that it finds."""

import pytest
import torch
from torch import Tensor

from ssah_utils import models, unit_masks
from ssah_utils.interventions import ablated, gated
from ssah_utils.per_unit import KINDS, PerUnit
from ssah_utils.prompts import tokens
from ssah_utils.units import from_flat_indices
from tests.conftest import parameters_of, same_parameters, tiny_model


def batch(seed: int, n: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(3, 97, (5 + row,), generator=generator).tolist() for row in range(n)]
    examples = [{"input_ids": ids, "labels": [-100] * 3 + ids[3:]} for ids in rows]
    return tokens.token_batches(examples)[0]


def step(seed: int = 0) -> unit_masks.MaskStep:
    return unit_masks.MaskStep(batch(3 * seed), batch(3 * seed + 1), batch(3 * seed + 2))


def ones(model) -> PerUnit:
    shape = models.shape_of(model)
    return PerUnit({k: torch.ones(shape.n_layers, shape.n_channels(k)) for k in KINDS})


@torch.no_grad()
def loss_by_hand(model, one: unit_masks.MaskStep, price: float) -> float:
    """Token by token, from whole logits."""
    sums, counts = {}, {}
    for name in ("refusing", "complying", "helpful"):
        own = getattr(one, name)
        log_p = model(own["input_ids"], attention_mask=own["attention_mask"]).logits
        log_p = log_p.double().log_softmax(-1)
        found = [
            log_p[row, place, own["input_ids"][row, place + 1]]
            for row, place in own["positions"].nonzero().tolist()
        ]
        sums[name], counts[name] = float(sum(found)), len(found)
    margin = (sums["refusing"] - sums["complying"]) / len(one.refusing["input_ids"])
    return margin - price * sums["helpful"] / counts["helpful"]


def test_gates_are_zero_for_the_highest_logits_and_one_elsewhere():
    logits = torch.tensor([0.3, -1.0, 2.0, 0.5], requires_grad=True)
    assert unit_masks.straight_through(logits, 2).tolist() == [1, 1, 0, 0]
    assert unit_masks.straight_through(logits, 0).tolist() == [1, 1, 1, 1]
    assert unit_masks.straight_through(logits, 4).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("n_off", [0, 2])
def test_the_gradient_goes_straight_through_the_rounding(n_off):
    """d gate / d logit is -1 everywhere, whether the gate is open or shut."""
    logits = torch.tensor([0.3, -1.0, 2.0, 0.5], requires_grad=True)
    weights = torch.tensor([1.0, 10.0, 100.0, 1000.0])
    (unit_masks.straight_through(logits, n_off) * weights).sum().backward()
    assert torch.equal(logits.grad, -weights)


@pytest.mark.parametrize("price", [0.0, 10.0])
def test_the_loss_is_the_margin_and_the_priced_harmless_answers(llama, price):
    found = unit_masks.masked_loss(llama, step(), price)
    assert float(found) == pytest.approx(loss_by_hand(llama, step(), price), rel=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_after_one_step_logits_are_the_slopes_of_the_loss_by_each_gate(name):
    model = tiny_model(name).double()
    found = unit_masks.learn_mask(model, [step()], n_off=5, price=3.0)
    for kind, layer, channel in (("mlp", 1, 4), ("attention", 2, 9)):
        values = []
        for size in (1e-3, -1e-3):
            gates = ones(model)
            gates[kind][layer, channel] += size
            with gated(model, gates):
                values.append(loss_by_hand(model, step(), 3.0))
        slope = (values[0] - values[1]) / 2e-3
        assert float(found[kind][layer, channel]) == pytest.approx(slope, rel=0.03, abs=3e-3)


def test_the_second_step_asks_with_the_first_ones_units_off(llama):
    """So its gradient is that of a model without them."""
    n_off, steps = 7, [step(0), step(1)]
    first = unit_masks.learn_mask(llama, steps[:1], n_off)
    off = from_flat_indices(first.flatten().topk(n_off).indices, first)
    both = unit_masks.learn_mask(llama, steps, n_off)
    with ablated(llama, off):
        second = unit_masks.learn_mask(llama, steps[1:], n_off)
    for kind in KINDS:
        on = ~off[kind]
        expected = (first + second)[kind][on]
        torch.testing.assert_close(both[kind][on], expected, rtol=1e-4, atol=1e-4)
    # a unit that is off is still asked what it would do
    assert (both - first).flatten()[off.flatten()].any()


def test_learning_leaves_the_model_as_it_was(llama):
    parameters = parameters_of(llama)
    unit_masks.learn_mask(llama, [step(0), step(1)], 3)
    assert same_parameters(llama, parameters)
    assert all(parameter.requires_grad for parameter in llama.parameters())
    assert all(parameter.grad is None for parameter in llama.parameters())


def test_a_gradient_that_is_not_finite_is_refused(llama):
    models.blocks_of(llama)[1].mlp.up_proj.weight.data[3] = torch.nan
    with pytest.raises(ValueError, match=r"^gradients of .* are nan or infinite"):
        unit_masks.learn_mask(llama, [step(0)], 3)


def test_no_step_is_refused(llama):
    with pytest.raises(ValueError, match="at least one step"):
        unit_masks.learn_mask(llama, [], 3)
