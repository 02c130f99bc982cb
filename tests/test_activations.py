"""Streaming moments and last-token states, against everything collected at once and every sequence
on its own.
"""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ssah_utils.activations import (
    ChannelMoments,
    StreamingMoments,
    channel_moments,
    gradient_activation,
    last_token_states,
    marked_states,
    mean_squared_changes,
    merged,
    pooled,
    unit_values,
)
from ssah_utils.models import blocks_of
from ssah_utils.per_unit import KINDS, PerUnit
from tests import mixtures
from tests.conftest import COMPILED, VOCABULARY, n_hooks, writers_by_name

LENGTHS = [5, 2, 9, 7, 1, 6, 9]


@pytest.fixture
def sequences() -> list[tuple[Tensor, Tensor]]:
    """Token ids and random marks of every sequence, each (length,)."""
    generator = torch.Generator().manual_seed(3)
    return [
        (
            torch.randint(3, VOCABULARY, (n,), generator=generator),
            torch.rand(n, generator=generator) < 0.6,
        )
        for n in LENGTHS
    ]


def batch_of(
    sequences: list[tuple[Tensor, Tensor]], side: str = "right", extra: int = 0
) -> dict[str, Tensor]:
    width = max(len(ids) for ids, _ in sequences) + extra
    batch = {
        # padding that would show, were it looked at
        "input_ids": torch.full((len(sequences), width), 5),
        "attention_mask": torch.zeros(len(sequences), width, dtype=torch.int64),
        "positions": torch.zeros(len(sequences), width, dtype=torch.bool),
    }
    for row, (ids, marked) in enumerate(sequences):
        where = slice(0, len(ids)) if side == "right" else slice(width - len(ids), width)
        batch["input_ids"][row, where] = ids
        batch["attention_mask"][row, where] = 1
        batch["positions"][row, where] = marked
    return batch


def batches_of(sequences, sizes: list[int], **how) -> list[dict[str, Tensor]]:
    assert sum(sizes) == len(sequences)
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    return [
        batch_of(sequences[start : start + n], **how)
        for start, n in zip(starts, sizes, strict=True)
    ]


def writer_inputs(model: nn.Module, batches: list[dict[str, Tensor]]) -> dict[str, list[Tensor]]:
    """Everything the writers read at marked positions: {kind: one (n_positions, n_channels) float64
    per layer}.
    """
    model = mixtures.plain(model)
    modules = [
        (kind, layer, module)
        for kind in KINDS
        for layer, module in enumerate(writers_by_name(model, kind))
    ]
    seen: dict[tuple[str, int], list[Tensor]] = {(kind, layer): [] for kind, layer, _ in modules}
    handles = [
        module.register_forward_hook(
            lambda module, args, output, key=(kind, layer): seen[key].append(args[0].double())
        )
        for kind, layer, module in modules
    ]
    with torch.no_grad():
        for batch in batches:
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    for handle in handles:
        handle.remove()
    marks = [batch["positions"] for batch in batches]
    return {
        kind: [
            torch.cat([values[mark] for values, mark in zip(seen[kind, layer], marks, strict=True)])
            for layer in range(len(writers_by_name(model, kind)))
        ]
        for kind in KINDS
    }


EPS = torch.finfo(torch.float32).eps
# Two float32 forward passes that cut a batch otherwise, or sum in another order, differ by their
# roundings: of three blocks, each of a few sums of up to 70 products. Found: 4 roundings of a
# layer's largest activation in a moment, 6 of a state.
ROUNDINGS = 32


def assert_moments(
    found: ChannelMoments, inputs: dict[str, list[Tensor]], roundings: float = ROUNDINGS
) -> None:
    """Equal up to an error of every activation of ``roundings`` float32 roundings of the largest
    one of its layer.
    """
    assert found.count == len(inputs["mlp"][0])
    for kind in KINDS:
        assert found.mean[kind].dtype == found.variance[kind].dtype == torch.float64
        assert len(found.mean[kind]) == len(found.variance[kind]) == len(inputs[kind])
        for mean, variance, values in zip(
            found.mean[kind], found.variance[kind], inputs[kind], strict=True
        ):
            expected = torch.var(values, dim=0)
            assert expected.min() > 0
            error = roundings * EPS * values.abs().max()
            assert ((mean - values.mean(0)).abs() <= error).all()
            assert ((variance.sqrt() - expected.sqrt()).abs() <= error).all()


def assert_states(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == torch.float32
    torch.testing.assert_close(
        found, expected, rtol=0, atol=ROUNDINGS * EPS * expected.abs().max().item()
    )


# ---------------------------------------------------------------------------------- channel_moments


@pytest.mark.parametrize("sizes", [[7], [1] * 7, [3, 4], [2, 1, 4]])
def test_moments_equal_those_of_all_activations_at_once(llama, sequences, sizes):
    batches = batches_of(sequences, sizes)
    assert_moments(channel_moments(llama, batches), writer_inputs(llama, batches))


def test_moments_of_every_architecture(any_model, sequences):
    batches = batches_of(sequences, [3, 4])
    assert_moments(channel_moments(any_model, batches), writer_inputs(any_model, batches))
    assert n_hooks(any_model) == 0


# In float64 the forward pass itself does not depend on batching, so every batching has the same
# answer up to the moments' own float32: each value is rounded once, and once more when the batch's
# mean is taken off.
@pytest.mark.parametrize(
    "how", [{}, {"extra": 6}, {"side": "left"}, {"side": "left", "extra": 3}], ids=str
)
@pytest.mark.parametrize(
    ("order", "sizes"),
    [(range(7), [7]), ([6, 2, 0, 5, 3, 1, 4], [2, 2, 3]), ([4, 3, 2, 1, 0, 6, 5], [1] * 7)],
    ids=str,
)
def test_moments_depend_neither_on_batching_nor_on_order_nor_on_padding(
    llama, sequences, order, sizes, how
):
    llama.double()
    alone = writer_inputs(llama, batches_of(sequences, [1] * 7))
    assert_moments(
        channel_moments(llama, batches_of([sequences[i] for i in order], sizes, **how)), alone, 2
    )


def test_batches_without_marks_add_nothing(llama, sequences):
    unmarked = [(ids, torch.zeros_like(marked)) for ids, marked in sequences]
    batches = [batch_of(unmarked), batch_of(sequences), batch_of(unmarked[:2])]
    assert_moments(channel_moments(llama, batches), writer_inputs(llama, [batch_of(sequences)]))


def test_left_padding_changes_no_moments(any_model, sequences):
    """Also where positions are learned (GPT-2): they are counted over attended tokens."""
    roundings = ROUNDINGS
    # its attention has no float64: rows of padding become NaN
    if any_model.config.model_type != "gemma2":
        roundings = 2
        any_model.double()
    left = channel_moments(any_model, batches_of(sequences, [3, 4], side="left", extra=3))
    assert_moments(left, writer_inputs(any_model, batches_of(sequences, [1] * 7)), roundings)


def test_tokens_after_the_last_marked_one_are_not_run(llama, sequences):
    seen = []
    llama.model.embed_tokens.register_forward_pre_hook(
        lambda module, args: seen.append(args[0].shape[1])
    )
    ids, marked = torch.arange(3, 12), torch.arange(9) < 4
    found = channel_moments(llama, [batch_of([(ids, marked)])])
    assert seen == [4]
    assert_moments(found, writer_inputs(llama, [batch_of([(ids, marked)])]))


@pytest.mark.parametrize("n_marked", [0, 1])
def test_fewer_than_two_positions_raise(llama, n_marked):
    ids = torch.tensor([4, 5, 6])
    batches = [
        batch_of([(ids, torch.arange(3) < n_marked)]),
        batch_of([(ids, torch.zeros(3, dtype=torch.bool))]),
    ]
    with pytest.raises(ValueError, match=f"at least 2 positions; the batches mark {n_marked}"):
        channel_moments(llama, batches)
    assert n_hooks(llama) == 0


def spoiled(llama: nn.Module, bad: float) -> nn.Module:
    """A model that overflows in the feed-forward layer of its second block, and from there on."""
    blocks_of(llama)[1].mlp.up_proj.weight.data[3] = bad
    return llama


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_the_module_where_activations_overflow_is_named(llama, sequences, bad):
    with pytest.raises(ValueError, match="activations of 1 mlp units of block 1 are nan or infin"):
        channel_moments(spoiled(llama, bad), batches_of(sequences, [7]))
    assert n_hooks(llama) == 0


def test_variances_overflow_too(llama, sequences):
    blocks_of(llama)[2].mlp.up_proj.weight.data[3] = 1e30
    with pytest.raises(ValueError, match="variances of 1 mlp units of block 2 are nan or infin"):
        channel_moments(llama, batches_of(sequences, [7]))


def test_no_batches_raise(llama):
    with pytest.raises(ValueError, match="mark 0"):
        channel_moments(llama, [])


def test_two_positions_are_enough(llama):
    batches = [batch_of([(torch.tensor([4, 5, 6]), torch.tensor([True, False, True]))])]
    assert_moments(channel_moments(llama, batches), writer_inputs(llama, batches))


@pytest.mark.parametrize("measure", [channel_moments, last_token_states])
def test_hooks_are_gone_when_the_model_raises(llama, sequences, measure, monkeypatch):
    def fail(values: Tensor) -> Tensor:
        raise RuntimeError("no more memory")

    monkeypatch.setattr(llama.model.layers[2].mlp.down_proj, "forward", fail)
    with pytest.raises(RuntimeError, match="no more memory"):
        measure(llama, [batch_of(sequences)])
    assert n_hooks(llama) == 0


@pytest.mark.parametrize("measure", [channel_moments, last_token_states])
def test_hooks_are_gone_when_a_batch_cannot_be_made(llama, sequences, measure):
    def batches():
        yield batch_of(sequences)
        raise OSError("disk gone")

    with pytest.raises(OSError, match="disk gone"):
        measure(llama, batches())
    assert n_hooks(llama) == 0


# --------------------------------------------------------------------------------- StreamingMoments


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    sizes=st.lists(st.integers(0, 25), min_size=1, max_size=6).filter(
        lambda sizes: sum(sizes) >= 2
    ),
    exponent=st.integers(-4, 4),
    seed=st.integers(0, 2**31),
)
def test_variance_survives_a_mean_of_a_thousand_spreads(sizes, exponent, seed):
    noise = torch.randn(
        sum(sizes), 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    values = ((1e3 + noise) * 10.0**exponent).float()
    stream = StreamingMoments()
    for part in values.split(sizes):
        stream.update(part)
    assert stream.count == len(values)
    torch.testing.assert_close(stream.variance, values.double().var(0), rtol=32 * EPS, atol=0)
    torch.testing.assert_close(stream.mean, values.double().mean(0), rtol=1e-9, atol=0)


@pytest.mark.parametrize("first", [1, 3])
def test_variance_survives_a_first_batch_that_is_far_away(first):
    generator = torch.Generator().manual_seed(0)
    far = 1e4 + torch.randn(first, 3, generator=generator)
    values = torch.cat([far, torch.randn(30_000, 3, generator=generator)])
    stream = StreamingMoments()
    for part in values.split([first, 10_000, 20_000]):
        stream.update(part)
    torch.testing.assert_close(stream.variance, values.double().var(0), rtol=16 * EPS, atol=0)
    near = StreamingMoments()  # what the later batches add on their own must be as good
    near.update(far)
    m2 = near.m2.clone(), near.mean.clone()
    near.update(values[first:])
    within = (
        near.m2
        - m2[0]
        - (values[first:].double().mean(0) - m2[1]) ** 2 * (first * 30_000 / (first + 30_000))
    )
    torch.testing.assert_close(within / 29_999, values[first:].double().var(0), rtol=1e-4, atol=0)


def test_bfloat16_values_are_summed_exactly():
    values = (3 + torch.randn(4000, 3, generator=torch.Generator().manual_seed(0))).bfloat16()
    stream = StreamingMoments()
    for part in values.split(500):
        stream.update(part)
    torch.testing.assert_close(stream.variance, values.double().var(0), rtol=16 * EPS, atol=0)


def test_update_leaves_the_values_alone():
    values = torch.randn(6, 3)
    before = values.clone()
    stream = StreamingMoments()
    stream.update(values)
    stream.update(values)
    assert torch.equal(values, before)


# ------------------------------------------------------------------------------------------- merged


def moments_at_once(values: Tensor) -> ChannelMoments:
    """``values``: (n, 2, 3) float64, two layers of three channels."""
    return ChannelMoments(
        len(values), PerUnit({"mlp": values.mean(0)}), PerUnit({"mlp": values.var(0)})
    )


@pytest.mark.parametrize("n_first", [1, 2, 10, 18, 19])
def test_merged_equals_the_whole(n_first):
    values = 50 + torch.randn(
        20, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    first, second = values[:n_first] + 4, values[n_first:]
    a, b = moments_at_once(first), moments_at_once(second)
    for part in (a, b):  # a single value has no variance; its weight is zero
        part.variance["mlp"].nan_to_num_(nan=0.0)
    found, whole = merged(a, b), moments_at_once(torch.cat([first, second]))
    assert found.count == 20
    torch.testing.assert_close(found.mean["mlp"], whole.mean["mlp"], rtol=1e-13, atol=0)
    torch.testing.assert_close(found.variance["mlp"], whole.variance["mlp"], rtol=1e-11, atol=0)


def test_merged_passes_equal_one_pass(llama, sequences):
    a, b = batch_of(sequences[:3]), batch_of(sequences[3:])
    assert_moments(
        merged(channel_moments(llama, [a]), channel_moments(llama, [b])),
        writer_inputs(llama, [a, b]),
    )


@pytest.mark.parametrize("sizes", [[20], [1, 19], [4, 6, 10], [5] * 4])
def test_pooled_parts_equal_the_whole_and_its_mean_square(sizes):
    values = 3 + torch.randn(
        20, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    parts = [moments_at_once(part) for part in values.split(sizes)]
    for part in parts:
        part.variance["mlp"].nan_to_num_(nan=0.0)
    found = pooled(parts)
    torch.testing.assert_close(found.variance["mlp"], values.var(0), rtol=1e-11, atol=0)
    torch.testing.assert_close(
        found.mean_square["mlp"], values.square().mean(0), rtol=1e-11, atol=0
    )


# ----------------------------------------------------------------------------------- wrapped models


MEASURES = (channel_moments, gradient_activation, last_token_states)


@pytest.mark.parametrize("compile_it", COMPILED.values(), ids=COMPILED)
def test_a_compiled_model_that_ran_before_is_measured_too(
    shallow_llama, marked_before_the_end, compile_it
):
    """Compiled code does not look for hooks that were not there when it was made."""
    batches = batches_of(marked_before_the_end, [7])
    expected = [as_tensors(measure(shallow_llama, batches)) for measure in MEASURES]
    torch._dynamo.reset()
    model = compile_it(shallow_llama)
    model(
        input_ids=batches[0]["input_ids"],
        attention_mask=batches[0]["attention_mask"],
        use_cache=False,
    )
    found = [as_tensors(measure(model, batches)) for measure in MEASURES]
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_compiled_backbone_still_counts_positions_over_attended_tokens(tiny_models, sequences):
    gpt2 = tiny_models("gpt2")
    expected = channel_moments(gpt2, batches_of(sequences, [3, 4], side="left", extra=3))
    gpt2.transformer = torch.compile(gpt2.transformer, backend="eager")
    found = channel_moments(gpt2, batches_of(sequences, [3, 4], side="left", extra=3))
    torch.testing.assert_close(as_tensors(found), as_tensors(expected), rtol=0, atol=0)


def as_tensors(found: ChannelMoments | dict | Tensor) -> list[Tensor]:
    if isinstance(found, ChannelMoments):
        return [*found.mean.values(), *found.variance.values()]
    return list(found.values()) if isinstance(found, dict) else [found]


def test_a_model_in_parallel_is_measured_as_the_model(llama, marked_before_the_end):
    batches = batches_of(marked_before_the_end, [3, 4])
    for measure in MEASURES:
        found, expected = (
            as_tensors(measure(model, batches)) for model in (nn.DataParallel(llama), llama)
        )
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


# ------------------------------------------------------------------------------ gradient_activation


def gradients_alone(
    model: nn.Module, ids: Tensor, rows: list[int]
) -> dict[tuple[str, int], Tensor]:
    """Input times gradient at ``rows`` of one sequence, the gradient with respect to an addition to
    every writer's input.
    """
    inputs, additions, handles = {}, {}, []
    for kind in KINDS:
        for layer, module in enumerate(writers_by_name(model, kind)):

            def add(module, args, key=(kind, layer)):
                inputs[key], additions[key] = (
                    args[0].detach()[0],
                    torch.zeros_like(args[0]).requires_grad_(),
                )
                return (args[0] + additions[key],)

            handles.append(module.register_forward_pre_hook(add))
    logits = model(ids[None]).logits[0]
    for handle in handles:
        handle.remove()
    loss = -sum(logits[row].log_softmax(0)[ids[row + 1]] for row in rows)
    gradients = torch.autograd.grad(loss, list(additions.values()))
    return {
        key: inputs[key][rows] * gradient[0, rows]
        for key, gradient in zip(additions, gradients, strict=True)
    }


def gradient_activation_by_hand(
    model: nn.Module, sequences: list[tuple[Tensor, Tensor]]
) -> dict[str, Tensor]:
    model = mixtures.plain(model)
    products = [
        gradients_alone(model, ids, rows)
        for ids, marked in sequences
        if (rows := marked.nonzero()[:, 0].tolist())
    ]
    mean = lambda key: torch.cat([product[key] for product in products]).abs().mean(0)  # noqa: E731
    return {kind: torch.stack([mean((kind, layer)) for layer in range(3)]) for kind in KINDS}


@pytest.fixture
def marked_before_the_end(sequences):
    """As ``prompts.token_batches`` has it, a sequence's last token predicts nothing and is never
    marked.
    """
    return [(ids, marked & (torch.arange(len(ids)) < len(ids) - 1)) for ids, marked in sequences]


def test_gradient_activation_equals_the_gradient_by_hand(any_model, marked_before_the_end):
    any_model.double()
    expected = gradient_activation_by_hand(any_model, marked_before_the_end)
    sides = ["right"] if any_model.config.model_type == "gemma2" else ["right", "left"]  # see above
    for how in ({"side": side, "extra": 2} for side in sides):
        found = gradient_activation(any_model, batches_of(marked_before_the_end, [3, 4], **how))
        for kind in KINDS:
            assert found[kind].dtype == torch.float64
            assert expected[kind].max() > 0
            torch.testing.assert_close(found[kind], expected[kind], rtol=1e-4, atol=1e-9)


def test_changes_and_gradients_that_are_not_finite_are_refused(llama, marked_before_the_end):
    batches = batches_of(marked_before_the_end, [7])
    other = spoiled(copy.deepcopy(llama), torch.inf)
    with pytest.raises(ValueError, match="changes of 1 mlp units of block 1 are nan or infinite"):
        mean_squared_changes(llama, other, batches)
    with pytest.raises(ValueError, match=r"gradients of \d+ \w+ units of block \d are nan or inf"):
        gradient_activation(other, batches)


def test_gradient_activation_leaves_the_model_alone(llama, marked_before_the_end):
    llama.model.norm.weight.requires_grad_(False)
    trained = [parameter.requires_grad for parameter in llama.parameters()]
    found = gradient_activation(llama, batches_of(marked_before_the_end, [7]))
    unmarked = [(ids, torch.zeros_like(marked)) for ids, marked in marked_before_the_end]
    again = gradient_activation(llama, [batch_of(unmarked), batch_of(marked_before_the_end)])
    assert all(torch.allclose(found[kind], again[kind]) for kind in KINDS)
    assert [parameter.requires_grad for parameter in llama.parameters()] == trained
    assert all(parameter.grad is None for parameter in llama.parameters())
    with pytest.raises(ValueError, match="mark no position"):
        gradient_activation(llama, [batch_of(unmarked)])
    assert n_hooks(llama) == 0


# -------------------------------------------------------------------------------- last_token_states


def states_alone(model: nn.Module, sequences: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Each sequence without padding: (n_sequences, n_layers, d_model)."""
    after_block: list[Tensor] = []

    def keep(module, args, output):
        after_block.append((output[0] if isinstance(output, tuple) else output)[0, -1])

    handles = [block.register_forward_hook(keep) for block in blocks_of(model)]
    states = []
    with torch.no_grad():
        for ids, _ in sequences:
            after_block.clear()
            hidden = model(input_ids=ids[None], output_hidden_states=True).hidden_states
            # the last of hidden_states is normalised
            for block, state in enumerate(after_block[:-1]):
                assert torch.equal(state, hidden[block + 1][0, -1])
            states.append(torch.stack(after_block))
    for handle in handles:
        handle.remove()
    return torch.stack(states)


def test_last_token_states_equal_those_of_each_sequence_alone(any_model, sequences):
    expected = states_alone(any_model, sequences)
    n_before = n_hooks(any_model)  # transformers leaves some of its own behind output_hidden_states
    for sizes in ([7], [3, 4], [1] * 7):
        found = last_token_states(any_model, batches_of(sequences, sizes, extra=2))
        assert found.dtype == torch.float32
        assert_states(found, expected)
    assert n_hooks(any_model) == n_before


def test_last_token_states_with_left_padding(any_model, sequences):
    found = last_token_states(any_model, batches_of(sequences, [3, 4], side="left"))
    assert_states(found, states_alone(any_model, sequences))


def test_last_token_states_keep_the_order_and_tell_sequences_apart(llama, sequences):
    states = last_token_states(llama, batches_of(sequences, [2, 5]))
    assert states.shape == (7, 3, 42)
    assert (torch.cdist(states[:, 0], states[:, 0]) + torch.eye(7) > 1e-2).all()


# ------------------------------------------------------------------------------------ marked_states


def test_marked_states_are_the_last_states_of_what_was_read_so_far(any_model, sequences):
    prefixes = [
        (ids[: n + 1], marked) for ids, marked in sequences for n in range(len(ids)) if marked[n]
    ]
    expected = states_alone(any_model, prefixes)
    n_before = n_hooks(any_model)
    for sizes in ([7], [3, 4], [1] * 7):
        found = marked_states(any_model, batches_of(sequences, sizes, extra=2))
        assert_states(found, expected)
    assert n_hooks(any_model) == n_before


def test_marked_states_are_reduced_block_by_block(llama, sequences):
    batches = batches_of(sequences, [2, 5])
    whole = marked_states(llama, batches)
    weights = torch.randn(whole.shape[1:], generator=torch.Generator().manual_seed(0))
    reduced = marked_states(llama, batches, lambda layer, states: states @ weights[layer])
    assert_states(reduced, (whole * weights).sum(-1))


def test_marked_states_leave_no_hook_after_an_error(llama, sequences):
    n_before = n_hooks(llama)
    with pytest.raises(ZeroDivisionError):
        marked_states(llama, batches_of(sequences, [7]), lambda layer, states: states / (1 // 0))
    assert n_hooks(llama) == n_before


def test_values_of_one_unit_have_the_moments_of_that_unit(llama, sequences):
    """Held against the moments, which are tested above against everything collected at once."""
    (batch,) = batches_of(sequences, [len(sequences)])
    moments = channel_moments(llama, [batch])
    for kind, layer, channel in (("attention", 0, 3), ("mlp", 2, 41)):
        values = unit_values(llama, batch, kind, layer, channel)
        assert values.shape == batch["input_ids"].shape
        marked = values[batch["positions"]].double()
        close = {"rtol": 1e-6, "atol": 1e-7}  # values are float32, in another order there
        torch.testing.assert_close(marked.mean(), moments.mean[kind][layer, channel], **close)
        torch.testing.assert_close(marked.var(), moments.variance[kind][layer, channel], **close)
    assert n_hooks(llama) == 0
