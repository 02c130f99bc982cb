"""What a unit does to the next token, by gradients, against switching it off by brute force."""

import pytest
import torch
from torch import Tensor

from ssah_utils import attribution, models
from ssah_utils.experts import ExpertsWriter
from ssah_utils.interventions import gated
from ssah_utils.per_unit import KINDS, PerUnit
from ssah_utils.prompts import tokens
from tests.conftest import parameters_of, same_parameters, tiny_model

LIKELIER, OTHER = [5, 11], [7, 23, 40]


def batches(n: int = 5, batch_size: int = 3) -> list[dict[str, Tensor]]:
    """Prompts of different lengths with their last position marked, right-padded."""
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randint(3, 97, (4 + row % 3,), generator=generator).tolist() for row in range(n)]
    examples = [{"input_ids": ids, "labels": [-100] * (len(ids) - 1) + ids[-1:]} for ids in rows]
    return tokens.token_batches(examples, batch_size=batch_size)


def prompts(all_batches) -> list[Tensor]:
    found = []
    for batch in all_batches:
        for ids, marked in zip(batch["input_ids"], batch["positions"], strict=True):
            found.append(ids[: int(marked.nonzero()) + 1])
    return found


def one_gate(model, kind: str, layer: int, channel: int, value: float) -> PerUnit:
    shape = models.shape_of(model)
    ones = PerUnit({k: torch.ones(shape.n_layers, shape.n_channels(k)).double() for k in KINDS})
    ones[kind][layer, channel] = value
    return ones


@torch.no_grad()
def next_log_p(model, ids: Tensor) -> Tensor:
    """Of the token after the prompt alone, in float64: (vocabulary,)."""
    return model(ids[None]).logits[0, -1].double().log_softmax(-1)


def changed(model, ids, unit, value: float) -> Tensor:
    with gated(model, one_gate(model, *unit, value)):
        return next_log_p(model, ids)


UNITS = [("mlp", 0, 3), ("mlp", 2, 41), ("attention", 1, 17)]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "opt", "phi3"])
def test_log_odds_are_the_slope_of_small_steps_of_a_gate(name):
    model = tiny_model(name).double()
    found = attribution.next_token_effect(model, batches(), LIKELIER, OTHER)
    for unit in UNITS:
        slopes, step = [], 1e-4
        for ids in prompts(batches()):
            odds = []
            for value in (1 + step, 1 - step):
                log_p = changed(model, ids, unit, value)
                odds.append(log_p[LIKELIER].logsumexp(0) - log_p[OTHER].logsumexp(0))
            slopes.append((odds[0] - odds[1]) / (2 * step))
        kind, layer, channel = unit
        expected = torch.stack(slopes).mean()
        # the model computes in float64, its logits are read in float32
        torch.testing.assert_close(found[kind][layer, channel], expected, rtol=0.02, atol=2e-3)


@pytest.mark.parametrize("name", ["llama", "qwen2_moe"])
def test_the_first_order_is_what_switching_off_does_to_a_unit_that_does_little(name):
    model = tiny_model(name)
    found = attribution.next_token_effect(model, batches(), LIKELIER, OTHER)
    sizes = found["mlp"].abs()
    typical = (sizes - sizes.median()).abs().argmin()
    unit = ("mlp", *(int(place) for place in divmod(int(typical), found["mlp"].shape[1])))
    with torch.no_grad():  # it does little then, and the others what they did
        for writer in models.writers(model):
            if writer.kind == "mlp" and writer.layer == unit[1]:
                _scale(writer, unit[2], 0.01)
    found = attribution.next_token_effect(model, batches(), LIKELIER, OTHER)
    lost = []
    for ids in prompts(batches()):
        both = [changed(model, ids, unit, value) for value in (1.0, 0.0)]
        odds = [one[LIKELIER].logsumexp(0) - one[OTHER].logsumexp(0) for one in both]
        lost.append(odds[0] - odds[1])
    assert found["mlp"][unit[1:]] == pytest.approx(float(torch.stack(lost).mean()), rel=0.1)


def _scale(writer, channel: int, factor: float) -> None:
    """Scale what a unit writes, in whatever matrix its column is."""
    own = channel - writer.channels.start
    if not 0 <= own < writer.channels.stop - writer.channels.start:
        return
    if isinstance(writer.module, ExpertsWriter):
        expert, column = divmod(own, writer.module.d_expert)
        writer.module.experts.down_proj[expert, :, column] *= factor
    else:
        getattr(writer.module, "linear", writer.module).weight[:, own] *= factor


def true_kl(model, ids, unit, value: float, n_likeliest: int | None = None) -> float:
    before, after = next_log_p(model, ids), changed(model, ids, unit, value)
    if n_likeliest is not None:
        kept = before.topk(n_likeliest).indices
        coarse = []
        for log_p in (before, after):
            rest = log_p.clone()
            rest[kept] = -torch.inf
            coarse.append(torch.cat([log_p[kept], rest.logsumexp(0)[None]]))
        before, after = coarse
    return float((before.exp() * (before - after)).sum())


@pytest.mark.parametrize("n_likeliest", [2, 96])
def test_the_kl_is_what_a_small_step_of_a_gate_does_by_brute_force(n_likeliest):
    model, step = tiny_model("llama").double(), 0.02
    found = attribution.next_token_kl(model, batches(), n_likeliest)
    for kind, layer, channel in UNITS:
        kl = [
            true_kl(model, ids, (kind, layer, channel), 1 - step, n_likeliest)
            for ids in prompts(batches())
        ]
        expected = sum(kl) / len(kl) / step**2
        assert found[kind][layer, channel] == pytest.approx(expected, rel=0.15, abs=1e-5)


def test_coarser_outcomes_never_make_the_divergence_larger():
    model = tiny_model("llama")
    few, all_of_them = (attribution.next_token_kl(model, batches(), n) for n in (2, 96))
    for kind in KINDS:
        assert (few[kind] <= all_of_them[kind] * (1 + 1e-4) + 1e-9).all()
        assert (few[kind] >= 0).all() and few[kind].any()


def test_units_are_ranked_by_kl_as_by_switching_each_of_them_off():
    model = tiny_model("llama").double()
    with torch.no_grad():
        for writer in models.writers(model):
            writer.module.weight.mul_(0.1)
    found = attribution.next_token_kl(model, batches(3), 96)["mlp"][1]
    exact = []
    for channel in range(70):
        kl = [true_kl(model, ids, ("mlp", 1, channel), 0.0) for ids in prompts(batches(3))]
        exact.append(sum(kl) / len(kl))
    ranks = torch.stack([found, torch.tensor(exact)]).argsort(1).argsort(1).double()
    assert torch.corrcoef(ranks)[0, 1] > 0.95


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "qwen2_moe"])
def test_batches_padding_and_the_model_do_not_matter(name):
    model = tiny_model(name)
    parameters = parameters_of(model)
    together = attribution.next_token_effect(model, batches(), LIKELIER, OTHER)
    alone = attribution.next_token_effect(model, batches(batch_size=1), LIKELIER, OTHER)
    for kind in KINDS:
        torch.testing.assert_close(together[kind], alone[kind], rtol=1e-3, atol=1e-5)
    assert same_parameters(model, parameters)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_derivatives_that_are_not_finite_are_refused(llama):
    models.blocks_of(llama)[1].mlp.up_proj.weight.data[3] = torch.nan
    labelled = [
        {"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None], "labels": ids[None]}
        for ids in prompts(batches())
    ]
    for derived in (
        lambda: attribution.next_token_effect(llama, batches(), LIKELIER, OTHER),
        lambda: attribution.next_token_kl(llama, batches()),
        lambda: attribution.unit_gradients(llama, labelled),
    ):
        with pytest.raises(ValueError, match=r"^gradients of .* are nan or infinite"):
            derived()


def test_a_row_with_no_or_two_marked_positions_is_refused(llama):
    batch = batches()[0]
    for positions in (batch["positions"] * 0, torch.ones_like(batch["positions"])):
        with pytest.raises(ValueError, match="one marked position"):
            attribution.next_token_kl(llama, [batch | {"positions": positions.bool()}])
    with pytest.raises(ValueError, match="no request"):
        attribution.next_token_kl(llama, [])
