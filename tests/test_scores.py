"""Scores and distances against brute force in float64."""

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cosine
from torch import Tensor

from ssah_utils import interventions, per_unit, weights
from ssah_utils.activations import channel_moments
from ssah_utils.per_unit import PerUnit
from ssah_utils.scores import (
    cosine_distance,
    mean_difference_direction,
    projection,
    variance_norm,
    weighted_norm,
    zscore_per_module,
)
from tests.conftest import writers_by_name

N_SAMPLES, SHAPES = 30, {"attention": (2, 6), "mlp": (2, 9)}  # (n_layers, n_channels)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_variance_norm_is_the_expected_change_of_the_output_when_a_channel_is_held_at_its_mean():
    inputs = {kind: 3 + random(N_SAMPLES, *shape) for kind, shape in SHAPES.items()}
    # (n_layers, d_model, n_channels)
    weights = {kind: random(shape[0], 4, shape[1], seed=1) for kind, shape in SHAPES.items()}
    found = variance_norm(
        PerUnit({kind: values.var(0) for kind, values in inputs.items()}),
        PerUnit({kind: weight.square().sum(1) for kind, weight in weights.items()}),
    )
    for kind, (n_layers, n_channels) in SHAPES.items():
        assert found[kind].shape == (n_layers, n_channels)
        for layer in range(n_layers):
            x, weight = inputs[kind][:, layer], weights[kind][layer]
            for channel in range(n_channels):
                held = x.clone()
                held[:, channel] = x[:, channel].mean()
                change = (x @ weight.T - held @ weight.T).square().sum(1)
                assert found[kind][layer, channel].item() == pytest.approx(
                    change.sum().item() / (N_SAMPLES - 1), rel=1e-10
                )


@pytest.mark.parametrize("kind", per_unit.KINDS)
def test_score_of_a_real_channel_is_what_holding_it_does_to_the_writer(any_model, token_ids, kind):
    layer, channel = 1, 4
    batch = {
        "input_ids": token_ids,
        "attention_mask": torch.ones_like(token_ids),
        "positions": torch.ones(2, 9).bool(),
    }
    moments = channel_moments(any_model, [batch])
    score = variance_norm(moments.variance, weights.squared_column_norms(any_model))[kind][
        layer, channel
    ].item()
    chosen = moments.mean.empty_set()
    chosen[kind][layer, channel] = True

    outputs: list[Tensor] = []
    writer = writers_by_name(any_model, kind)[layer]
    handle = writer.register_forward_hook(
        lambda module, args, output: outputs.append(output.double())
    )
    with torch.no_grad():
        any_model(token_ids)
        with interventions.ablated(any_model, chosen, moments.mean):
            any_model(token_ids)
    handle.remove()
    change = (outputs[1] - outputs[0]).flatten(0, 1).square().sum(1)
    assert score == pytest.approx(change.sum().item() / (token_ids.numel() - 1), rel=1e-3)


def test_zscores_have_mean_0_and_spread_1_in_every_module():
    scale = 10.0 ** torch.tensor([[-9], [6]])
    score = PerUnit({kind: random(*shape) * scale + 5 for kind, shape in SHAPES.items()})
    for kind, z in zscore_per_module(score).items():
        torch.testing.assert_close(
            z.mean(1), torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-6
        )
        torch.testing.assert_close(z.std(1), torch.ones(2, dtype=torch.float64), rtol=1e-6, atol=0)
        assert torch.equal(z.argsort(1), score[kind].argsort(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zscores_of_a_module_without_any_score_are_zero(dtype):
    score = PerUnit({"mlp": torch.stack([torch.zeros(7), torch.arange(7.0)]).to(dtype)})
    z = zscore_per_module(score)["mlp"]
    assert torch.equal(z[0], torch.zeros(7, dtype=dtype))
    assert z[1].std() == pytest.approx(1)


@pytest.mark.parametrize("value", [0.1, 1 / 3, 7.7, 1e-300, 1e100])
def test_zscores_of_a_constant_module_are_zero(value):
    """Also where the mean is not exactly the value, so that what is left is rounding."""
    values = torch.stack(
        [
            torch.full((1536,), value, dtype=torch.float64),
            value * torch.arange(1, 1537, dtype=torch.float64),
        ]
    )
    z = zscore_per_module(PerUnit({"mlp": values}))["mlp"]
    assert torch.equal(z[0], torch.zeros(1536, dtype=torch.float64))
    if value > 1e-200:  # else its spread underflows
        assert z[1].std() == pytest.approx(1)


def test_a_module_of_one_channel_has_no_spread():
    assert zscore_per_module(PerUnit({"mlp": torch.tensor([[2.0], [3.0]])}))["mlp"].tolist() == [
        [0.0],
        [0.0],
    ]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_one_score_that_is_not_finite_takes_no_module_with_it(bad):
    score = PerUnit({kind: random(*shape) for kind, shape in SHAPES.items()})
    score["mlp"][1, 3] = bad
    with pytest.raises(ValueError, match="scores of 1 mlp units of block 1 are nan or infinite"):
        zscore_per_module(score)


def test_weighted_norm_is_flaps():
    """As FLAP's code has it: (|W| * sqrt(scaler_inp)).mean(0), scaler_inp the mean squared input of
    the channel.
    """
    inputs = {kind: 3 + random(N_SAMPLES, *shape) for kind, shape in SHAPES.items()}
    weights = {kind: random(shape[0], 4, shape[1], seed=1) for kind, shape in SHAPES.items()}
    found = weighted_norm(
        PerUnit({kind: values.square().mean(0) for kind, values in inputs.items()}),
        PerUnit({kind: weight.abs().mean(1) for kind, weight in weights.items()}),
    )
    for kind, (n_layers, n_channels) in SHAPES.items():
        for layer in range(n_layers):
            for channel in range(n_channels):
                norm = np.linalg.norm(inputs[kind][:, layer, channel]) / np.sqrt(N_SAMPLES)
                expected = np.mean(
                    [abs(w) * norm for w in weights[kind][layer, :, channel].tolist()]
                )
                assert found[kind][layer, channel].item() == pytest.approx(expected, rel=1e-12)


def test_mean_absolute_columns_of_every_architecture(any_model):
    for kind in per_unit.KINDS:
        found = weights.mean_absolute_columns(any_model)[kind]
        for layer, writer in enumerate(writers_by_name(any_model, kind)):
            weight = writer.weight.T if any_model.config.model_type == "gpt2" else writer.weight
            expected = [
                np.abs(weight[:, channel].tolist()).mean() for channel in range(weight.shape[1])
            ]
            np.testing.assert_allclose(found[layer].numpy(), expected, rtol=1e-12)


def test_cosine_distance_equals_that_of_scipy():
    a, b = random(3, 4, 8), random(3, 4, 8, seed=1)
    found = cosine_distance(a.float(), b.float())
    assert found.shape == (3, 4)
    assert found.dtype == torch.float64
    expected = [
        [cosine(a[i, j].float().double(), b[i, j].float().double()) for j in range(4)]
        for i in range(3)
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_cosine_distance_of_parallel_orthogonal_and_opposite_states():
    a = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    b = torch.tensor([[5.0, 0.0], [0.0, 2.0], [-3.0, 0.0]])
    np.testing.assert_allclose(cosine_distance(a, b), [0, 1, 2], atol=1e-12)


def test_cosine_distance_of_nearly_parallel_states_is_not_lost_in_float32():
    a = torch.tensor([1.0, 0.0])
    b = torch.tensor([1.0, 1e-5])
    assert cosine_distance(a, b).item() == pytest.approx(5e-11, rel=1e-3)


def test_direction_separates_by_the_standardised_distance_of_the_means():
    positive, negative = 2 + random(9, 3, 5), random(7, 3, 5, seed=1)
    found = mean_difference_direction(positive.float(), negative.float())
    assert found.shape == (3, 5) and found.dtype == torch.float64
    for layer in range(3):
        a, b = (group[:, layer].float().double().numpy() for group in (positive, negative))
        difference = a.mean(0) - b.mean(0)
        along = a @ difference, b @ difference
        pooled = np.sqrt((8 * along[0].var(ddof=1) + 6 * along[1].var(ddof=1)) / 14)
        np.testing.assert_allclose(found[layer], difference / pooled, rtol=1e-10)
    values = projection(positive.float(), found), projection(negative.float(), found)
    assert values[0].shape == (9, 3)
    pooled = ((values[0].var(0) * 8 + values[1].var(0) * 6) / 14).sqrt()
    np.testing.assert_allclose(pooled, 1, rtol=1e-10)


def test_direction_of_equal_or_single_states_is_finite():
    same = torch.ones(4, 2, 3)
    assert torch.equal(
        mean_difference_direction(same, same), torch.zeros(2, 3, dtype=torch.float64)
    )
    assert mean_difference_direction(torch.ones(1, 2, 3), torch.zeros(1, 2, 3)).isfinite().all()
