"""Switching units off, three ways that must agree: hooks, zeroed weight columns, and a smaller
model.
"""

import copy

import pytest
import torch
from torch import Tensor, nn

from ssah_utils.fingerprints import fingerprint
from ssah_utils.interventions import ablated, gated, multiplied, without_units
from ssah_utils.per_unit import KINDS, PerUnit
from tests import mixtures
from tests.conftest import (
    COMPILED,
    VOCABULARY,
    n_hooks,
    parameters_of,
    same_parameters,
    writers_by_name,
)

EPS = torch.finfo(torch.float32).eps
ROUNDINGS = 64  # of the largest logit, by which ways of computing the same may differ; found: 9


def sizes_of(model: nn.Module) -> dict[str, tuple[int, int]]:
    """{kind: (n_layers, n_channels)}, from the weights."""
    plain = mixtures.plain(model)
    found = {kind: writers_by_name(plain, kind) for kind in KINDS}
    return {kind: (len(found[kind]), columns(found[kind][0]).shape[1]) for kind in KINDS}


def columns(writer: nn.Module) -> Tensor:
    return writer.weight.T if type(writer).__name__ == "Conv1D" else writer.weight


def nothing(model: nn.Module) -> PerUnit:
    return PerUnit(
        {kind: torch.zeros(size, dtype=torch.bool) for kind, size in sizes_of(model).items()}
    )


def scattered(model: nn.Module, share: float = 0.3, seed: int = 0) -> PerUnit:
    generator = torch.Generator().manual_seed(seed)
    return (
        PerUnit(
            {kind: torch.rand(size, generator=generator) for kind, size in sizes_of(model).items()}
        )
        < share
    )


def with_a_whole_kv_group(model: nn.Module) -> PerUnit:
    """Scattered units, and in the first block all channels that read the last key/value head, in
    the last all of them.
    """
    chosen = scattered(model)
    n_kv_heads = (
        getattr(model.config, "num_key_value_heads", None) or model.config.num_attention_heads
    )
    n_channels = chosen["attention"].shape[1]
    chosen["attention"][0, n_channels - n_channels // n_kv_heads :] = True
    chosen["attention"][2] = True
    chosen["mlp"][1] = True
    return chosen


def of_one_kind(model: nn.Module) -> PerUnit:
    return scattered(model).only("mlp")


SETS = [scattered, with_a_whole_kv_group, of_one_kind, nothing]


def random_means(model: nn.Module) -> PerUnit:
    generator = torch.Generator().manual_seed(2)
    return PerUnit(
        {
            kind: torch.randn(size, generator=generator, dtype=torch.float64)
            for kind, size in sizes_of(model).items()
        }
    )


@torch.no_grad()
def edited(model: nn.Module, chosen: PerUnit, means: PerUnit | None = None) -> nn.Module:
    """A copy with the chosen columns at zero, and what they would write at their mean added to the
    writer's output.
    """
    clone = mixtures.plain(copy.deepcopy(model))
    for kind in KINDS:
        for layer, writer in enumerate(writers_by_name(clone, kind)):
            dropped = chosen[kind][layer]
            if means:
                constant = (
                    columns(writer).double()[:, dropped] @ means[kind][layer][dropped]
                ).float()
                writer.register_forward_hook(
                    lambda module, args, output, constant=constant: output + constant
                )
            columns(writer)[:, dropped] = 0
    return clone


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids).logits


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(
        found, expected, rtol=0, atol=ROUNDINGS * EPS * expected.abs().max().item()
    )


# ---------------------------------------------------------------------------- three ways that agree


@pytest.mark.parametrize("choose", SETS)
def test_hooks_equal_zeroed_columns_equal_a_smaller_model(any_model, token_ids, choose):
    chosen = choose(any_model)
    expected = logits(edited(any_model, chosen), token_ids)
    with ablated(any_model, chosen):
        found = logits(any_model, token_ids)
    assert_close(found, expected)
    assert_close(logits(without_units(any_model, chosen), token_ids), expected)
    changed = (found - logits(any_model, token_ids)).abs().max()
    assert changed == 0 if choose is nothing else changed > 0.1


@pytest.mark.parametrize("choose", SETS)
def test_means_too(any_model, token_ids, choose):
    chosen, means = choose(any_model), random_means(any_model)
    expected = logits(edited(any_model, chosen, means), token_ids)
    with ablated(any_model, chosen, means):
        assert_close(logits(any_model, token_ids), expected)
    assert_close(logits(without_units(any_model, chosen, means), token_ids), expected)
    if choose is not nothing:
        assert (expected - logits(edited(any_model, chosen), token_ids)).abs().max() > 0.1


@pytest.mark.parametrize("means", [False, True])
def test_with_padding(llama, token_ids, means):
    chosen = with_a_whole_kv_group(llama)
    means = random_means(llama) if means else None
    mask = torch.ones_like(token_ids)
    mask[0, 5:] = 0
    small, reference = without_units(llama, chosen, means), edited(llama, chosen, means)
    with torch.no_grad(), ablated(llama, chosen, means):
        found, smaller, expected = (
            m(token_ids, attention_mask=mask).logits for m in (llama, small, reference)
        )
    assert_close(found[mask.bool()], expected[mask.bool()])
    assert_close(smaller[mask.bool()], expected[mask.bool()])


def test_nested_ablations_add_up(llama, token_ids):
    first, second = scattered(llama, seed=0), scattered(llama, seed=1)
    with ablated(llama, first), ablated(llama, second):
        found = logits(llama, token_ids)
    assert_close(found, logits(edited(llama, first | second), token_ids))


def test_bfloat16_model_with_float64_means(llama, token_ids):
    chosen, means = scattered(llama), random_means(llama)
    llama.bfloat16()
    with ablated(llama, chosen, means):
        found = logits(llama, token_ids)
    smaller = logits(without_units(llama, chosen, means), token_ids)
    assert found.dtype == smaller.dtype == torch.bfloat16
    exact = logits(edited(llama.float(), chosen, means), token_ids)
    spread = exact.std()
    for rounded in (found, smaller):
        # found: 1.5
        assert (rounded.float() - exact).std() < 8 * torch.finfo(torch.bfloat16).eps * spread


# ----------------------------------------------------------------------------------- wrapped models


@pytest.mark.parametrize("compile_it", COMPILED.values(), ids=COMPILED)
def test_a_compiled_model_that_ran_before_is_ablated_and_restored_too(
    shallow_llama, token_ids, compile_it
):
    """Compiled code does not look for hooks that were not there when it was made."""
    llama = shallow_llama
    before, chosen, means = logits(llama, token_ids), scattered(llama), random_means(llama)
    off, held = (logits(edited(llama, chosen, m), token_ids) for m in (None, means))
    torch._dynamo.reset()
    model = compile_it(llama)
    assert torch.equal(logits(model, token_ids), before)
    with ablated(model, chosen) as inside:
        assert inside is model
        assert_close(logits(inside, token_ids), off)
    assert torch.equal(logits(model, token_ids), before)
    with ablated(model, chosen, means), ablated(model, nothing(llama)):
        assert_close(logits(model, token_ids), held)
    assert torch.equal(logits(model, token_ids), before)


def test_a_model_is_compiled_after_the_block_and_not_inside(shallow_llama, token_ids):
    made = []

    def backend(graph, inputs):
        made.append(graph)
        return graph.forward

    torch._dynamo.reset()
    model = torch.compile(shallow_llama, backend=backend)
    with ablated(model, scattered(shallow_llama)):
        logits(model, token_ids)
    assert not made
    logits(model, token_ids)
    assert made


def test_the_compiler_works_again_in_whatever_order_blocks_end(shallow_llama, token_ids):
    torch._dynamo.reset()
    made = []
    model = torch.compile(shallow_llama, backend=lambda graph, _: made.append(graph) or graph)
    outer, inner = (ablated(model, scattered(shallow_llama, seed=seed)) for seed in (0, 1))
    outer.__enter__(), inner.__enter__()
    outer.__exit__(None, None, None)
    logits(model, token_ids)
    assert not made, "one block is open still"
    inner.__exit__(None, None, None)
    logits(model, token_ids)
    assert made


@pytest.mark.parametrize(
    "wrap", [nn.DataParallel, lambda model: nn.DataParallel(torch.compile(model, backend="eager"))]
)
def test_a_wrapped_model_is_ablated_as_it_is(llama, token_ids, wrap):
    chosen = scattered(llama)
    expected = logits(edited(llama, chosen), token_ids)
    small = without_units(wrap(llama), chosen)
    with ablated(wrap(llama), chosen) as inside:
        assert isinstance(inside, nn.DataParallel)
        assert_close(logits(inside, token_ids), expected)
    assert_close(logits(small, token_ids), expected)


def test_values_are_held_on_the_device_where_they_are(llama):
    """As the replicas of DataParallel, or of a model over several devices, need it."""
    with ablated(llama, scattered(llama)):
        (hook,) = writers_by_name(llama, "mlp")[0]._forward_pre_hooks.values()
    values = torch.ones(2, 5, 70)
    (found,) = hook(None, (values,))
    assert torch.equal(found == 0, scattered(llama)["mlp"][0].expand(2, 5, 70))
    (elsewhere,) = hook(None, (values.to("meta"),))
    assert elsewhere.device.type == "meta"
    assert torch.equal(hook(None, (values,))[0], found)


# ----------------------------------------------------------------------------- nothing is left over


@pytest.mark.parametrize("means", [False, True])
def test_leaving_the_block_restores_the_model_bit_for_bit(any_model, token_ids, means):
    parameters, before = parameters_of(any_model), logits(any_model, token_ids)
    with ablated(
        any_model, scattered(any_model), random_means(any_model) if means else None
    ) as inside:
        assert inside is any_model
        assert same_parameters(any_model, parameters)
        assert n_hooks(any_model) >= 6  # a writer that cannot be hooked alone needs several
        assert not torch.equal(logits(any_model, token_ids), before)
    assert n_hooks(any_model) == 0
    assert same_parameters(any_model, parameters)
    assert torch.equal(logits(any_model, token_ids), before)


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_an_exception_inside_restores_the_model_too(any_model, token_ids, error):
    parameters, before = parameters_of(any_model), logits(any_model, token_ids)
    with pytest.raises(error), ablated(any_model, scattered(any_model)):
        logits(any_model, token_ids)
        raise error
    assert n_hooks(any_model) == 0
    assert same_parameters(any_model, parameters)
    assert torch.equal(logits(any_model, token_ids), before)


def test_a_smaller_copy_leaves_the_original_alone(any_model, token_ids):
    parameters, before = parameters_of(any_model), logits(any_model, token_ids)
    small = without_units(any_model, with_a_whole_kv_group(any_model), random_means(any_model))
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.zero_()
    assert same_parameters(any_model, parameters)
    assert torch.equal(logits(any_model, token_ids), before)


WRONG_SHAPES = {
    "one channel more": lambda size: (size[0], size[1] + 1),
    "one block less": lambda size: (size[0] - 1, size[1]),
    "transposed": lambda size: (size[1], size[0]),
    "one block's": lambda size: (size[1],),
}


@pytest.mark.parametrize("wrong", KINDS)
@pytest.mark.parametrize("shape", WRONG_SHAPES.values(), ids=WRONG_SHAPES)
def test_a_set_of_the_wrong_shape_is_refused_before_anything_is_hooked(llama, wrong, shape):
    chosen = dict(~nothing(llama))
    found = shape(sizes_of(llama)[wrong])
    chosen[wrong] = torch.ones(found, dtype=torch.bool)
    entered = False
    with pytest.raises(ValueError, match="unit set has") as raised, ablated(llama, chosen):
        entered = True
    assert not entered
    assert f"{found} {wrong} units, the model has {sizes_of(llama)[wrong]}" in str(raised.value)
    assert n_hooks(llama) == 0
    with pytest.raises(ValueError, match="unit set has"):
        without_units(llama, chosen)


@pytest.mark.parametrize(
    "spoil", [lambda means: means.pop("mlp"), lambda means: means.update(mlp=means["mlp"][:2])]
)
def test_means_of_the_wrong_shape_leave_no_hooks(llama, spoil):
    means = dict(random_means(llama))
    spoil(means)
    with (
        pytest.raises(ValueError, match="mlp units, the model has"),
        ablated(llama, scattered(llama), means),
    ):
        pass
    assert n_hooks(llama) == 0


def test_a_plain_dict_will_do_for_a_set_and_for_means(llama, token_ids):
    chosen, means = scattered(llama), random_means(llama)
    with ablated(llama, chosen, means):
        expected = logits(llama, token_ids)
    with ablated(llama, dict(chosen), dict(means)):
        assert torch.equal(logits(llama, token_ids), expected)
    small = logits(without_units(llama, chosen, means), token_ids)
    assert torch.equal(logits(without_units(llama, dict(chosen), dict(means)), token_ids), small)


def test_units_that_the_model_runs_past_are_said_at_the_end(llama, token_ids, monkeypatch):
    """As a fused kernel would do, which reads the weight and does not call the module."""
    mlp, everything = llama.model.layers[1].mlp, ~nothing(llama)

    def fused(values):
        gated = mlp.act_fn(mlp.gate_proj(values)) * mlp.up_proj(values)
        return gated @ mlp.down_proj.weight.T

    monkeypatch.setattr(mlp, "forward", fused)
    with (
        pytest.raises(ValueError, match=r"the mlp units of block 1 were not switched off") as said,
        ablated(llama, everything),
    ):
        llama(token_ids)
    assert "\n" not in str(said.value) and n_hooks(llama) == 0
    with ablated(llama, everything):
        pass  # nothing ran, so nothing ran past them


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.float32])
def test_a_set_of_numbers_is_refused(llama, dtype):
    """~ of an integer is never zero."""
    chosen = scattered(llama).map(lambda values: values.to(dtype))
    with (
        pytest.raises(TypeError, match="a set of units is of bool, not of"),
        ablated(llama, chosen),
    ):
        raise AssertionError("entered")
    with pytest.raises(TypeError, match="a set of units is of bool, not of"):
        without_units(llama, chosen)
    assert n_hooks(llama) == 0


# ----------------------------------------------------------------------------------- smaller models


def n_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("choose", SETS)
def test_parameters_saved_in_a_llama(llama, choose):
    chosen = choose(llama)
    d_model, head_dim, heads_per_group = 42, 10, 3
    saved = 0
    for layer in range(3):
        gone = set(chosen["attention"][layer].nonzero().flatten().tolist())
        saved += len(gone) * d_model
        for kv_head in range(2):
            for within in range(head_dim):
                readers = {
                    head * head_dim + within
                    for head in range(6)
                    if head // heads_per_group == kv_head
                }
                saved += d_model * (readers <= gone)
        saved -= d_model * bool(gone)  # the writer has a bias now
        n_gone = int(chosen["mlp"][layer].sum())
        saved += 3 * n_gone * d_model - d_model * bool(n_gone)  # gate, up, down
    assert n_parameters(llama) - n_parameters(without_units(llama, chosen)) == saved
    assert saved > 0 or choose is nothing


def test_every_architecture_gets_smaller(any_model):
    small = without_units(any_model, with_a_whole_kv_group(any_model))
    saved_by_writers = sum(
        int(with_a_whole_kv_group(any_model)[kind].sum()) * any_model.config.hidden_size
        for kind in KINDS
    )
    # so some reader rows are gone too
    assert n_parameters(small) < n_parameters(any_model) - saved_by_writers


def test_a_smaller_copy_is_on_the_device_of_the_model(llama):
    # sets come from files and are on the CPU
    small = without_units(llama.to("meta"), scattered(llama))
    elsewhere = [
        name
        for name, tensor in [*small.named_parameters(), *small.named_buffers()]
        if tensor.device.type != "meta"
    ]
    assert not elsewhere


# --------------------------------------------------------------------------------------- generation


def greedy(model: nn.Module, ids: Tensor, n_tokens: int) -> Tensor:
    for _ in range(n_tokens):
        ids = torch.cat([ids, logits(model, ids)[:, -1].argmax(-1, keepdim=True)], 1)
    return ids


def test_generate_under_ablation(any_model, token_ids):
    chosen, means = with_a_whole_kv_group(any_model), random_means(any_model)
    how = {
        "max_new_tokens": 6,
        "do_sample": False,
        "eos_token_id": VOCABULARY,
        "attention_mask": torch.ones_like(token_ids),
    }
    expected = greedy(edited(any_model, chosen, means), token_ids, 6)
    with ablated(any_model, chosen, means):
        assert torch.equal(any_model.generate(token_ids, **how), expected)
    assert torch.equal(without_units(any_model, chosen, means).generate(token_ids, **how), expected)
    assert torch.equal(any_model.generate(token_ids, **how), greedy(any_model, token_ids, 6))
    assert not torch.equal(expected, greedy(any_model, token_ids, 6))


def test_gradients_flow_through_an_ablation_but_not_to_what_is_off(llama, token_ids):
    chosen = scattered(llama)
    with ablated(llama, chosen):
        llama(token_ids, labels=token_ids).loss.backward()
    for kind in KINDS:
        for layer, writer in enumerate(writers_by_name(llama, kind)):
            assert not writer.weight.grad[:, chosen[kind][layer]].any()
            assert writer.weight.grad[:, ~chosen[kind][layer]].any()


# ------------------------------------------------------------------------------------------ scaling


def with_columns_times(model: nn.Module, gates: PerUnit) -> nn.Module:
    """A copy whose columns are multiplied, each by its gate."""
    clone = mixtures.plain(copy.deepcopy(model))
    with torch.no_grad():
        for kind in KINDS:
            for layer, writer in enumerate(writers_by_name(clone, kind)):
                columns(writer).mul_(gates[kind][layer])
    return clone


@pytest.mark.parametrize("factor", [-3.0, -1.0, 0.5, 2.0])
def test_scaled_units_are_multiplied_columns(any_model, token_ids, factor):
    chosen, before = scattered(any_model), logits(any_model, token_ids)
    gates = chosen.map(lambda mask: torch.where(mask, factor, 1.0))
    expected = logits(with_columns_times(any_model, gates), token_ids)
    with multiplied(any_model, chosen, factor) as inside:
        assert inside is any_model
        assert_close(logits(any_model, token_ids), expected)
    assert torch.equal(logits(any_model, token_ids), before) and n_hooks(any_model) == 0
    assert (expected - before).abs().max() > 0.1


@pytest.mark.parametrize("name", mixtures.LAYOUTS)
def test_scaled_units_of_experts_are_multiplied_columns_too(tiny_models, token_ids, name):
    model = tiny_models(name)
    chosen = scattered(model)
    gates = chosen.map(lambda mask: torch.where(mask, -2.0, 1.0))
    expected = logits(with_columns_times(model, gates), token_ids)
    with multiplied(model, chosen, -2):
        assert_close(logits(model, token_ids), expected)
    assert n_hooks(model) == 0


def test_scaled_by_zero_is_ablated_bit_for_bit(any_model, token_ids):
    chosen = with_a_whole_kv_group(any_model)
    with ablated(any_model, chosen):
        expected = logits(any_model, token_ids)
    with multiplied(any_model, chosen, 0):
        assert torch.equal(logits(any_model, token_ids), expected)


def test_every_unit_has_a_gate_of_its_own(llama, token_ids):
    gates = random_means(llama)
    expected = logits(with_columns_times(llama, gates), token_ids)  # a copy made inside is gated
    with gated(llama, gates):
        assert_close(logits(llama, token_ids), expected)


def test_gates_of_one_put_no_hook_unless_a_gradient_is_asked_for(llama):
    ones = nothing(llama).map(lambda mask: (~mask).float())
    with gated(llama, ones):
        assert n_hooks(llama) == 0
    with gated(llama, ones.map(lambda own: own.clone().requires_grad_())):
        assert n_hooks(llama) == 6


def test_gradients_reach_the_gates(llama, token_ids):
    flat = (~nothing(llama)).flatten().float().requires_grad_()
    gates = nothing(llama).unflatten(flat)
    with gated(llama, gates):
        llama(token_ids, labels=token_ids).loss.backward()
    kind, layer, channel, step = "mlp", 1, 5, 1e-3
    place = sizes_of(llama)["attention"][0] * sizes_of(llama)["attention"][1]
    place += layer * sizes_of(llama)["mlp"][1] + channel
    losses = []
    for size in (1 + step, 1 - step):
        moved = (~nothing(llama)).map(lambda own: own.double())
        moved[kind][layer, channel] = size
        with torch.no_grad(), gated(llama.double(), moved):
            losses.append(llama(token_ids, labels=token_ids).loss)
    slope = float(losses[0] - losses[1]) / (2 * step)
    assert float(flat.grad[place]) == pytest.approx(slope, rel=0.02, abs=1e-5)


def test_scaling_composes_with_holding(llama, token_ids):
    chosen, others = scattered(llama, seed=0), scattered(llama, seed=1) & ~scattered(llama, seed=0)
    gates = others.map(lambda mask: torch.where(mask, -2.0, 1.0))
    with ablated(llama, chosen), multiplied(llama, others, -2):
        found = logits(llama, token_ids)
    assert_close(found, logits(edited(with_columns_times(llama, gates), chosen), token_ids))


def test_a_scaled_model_is_another_model(llama):
    chosen = scattered(llama)
    intact = fingerprint(llama)
    with multiplied(llama, chosen, -1):
        turned = fingerprint(llama)
    with multiplied(llama, chosen, -2):
        assert len({intact, turned, fingerprint(llama)}) == 3
    with ablated(llama, chosen):
        assert fingerprint(llama) not in (intact, turned)
    assert fingerprint(llama) == intact


@pytest.mark.parametrize("compile_it", COMPILED.values(), ids=COMPILED)
def test_a_compiled_model_is_scaled_too(shallow_llama, token_ids, compile_it):
    llama, chosen = shallow_llama, scattered(shallow_llama)
    with multiplied(llama, chosen, -2):
        expected = logits(llama, token_ids)
    torch._dynamo.reset()
    model = compile_it(llama)
    logits(model, token_ids)
    with multiplied(model, chosen, -2):
        assert_close(logits(model, token_ids), expected)


def test_scaling_refuses_what_is_no_set_of_the_model(llama):
    with (
        pytest.raises(TypeError, match="a set of units is of bool"),
        multiplied(llama, random_means(llama), -1),
    ):
        raise AssertionError("entered")
    wrong = {kind: mask[:, 1:] for kind, mask in scattered(llama).items()}
    with pytest.raises(ValueError, match="units, the model has"), multiplied(llama, wrong, -1):
        raise AssertionError("entered")
    assert n_hooks(llama) == 0
