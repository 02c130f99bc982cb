"""Training some units: frozen entries stay bit for bit, trained ones go where full training with
masked gradients goes.
"""

import copy
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import transformers
from datasets import Dataset
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from ssah_utils import models, precision, training
from ssah_utils.activations import channel_moments
from ssah_utils.interventions import ablated, without_units
from ssah_utils.partial_parameters import Partial, PartialParameter
from ssah_utils.per_unit import KINDS, PerUnit
from ssah_utils.training import SFTConfig, train_dpo, train_sft
from ssah_utils.unit_training import count_trainable, freezing, training_all, training_only
from tests import mixtures
from tests.conftest import VOCABULARY, n_hooks, parameters_of, same_parameters, tiny_model
from tests.test_training import PAIRS, PlainTrainer, examples_of

N_LAYERS = 3
# below and above one half, the gradient of a block is computed in different ways
SHARES = {"few": 0.2, "most": 0.8}


@pytest.fixture(autouse=True)
def float32(monkeypatch):
    monkeypatch.setattr(precision, "preferred_dtype", lambda device: torch.float32)


def sizes_of(model: nn.Module) -> dict[str, tuple[int, int]]:
    model_type = model.config.model_type
    return {
        "attention": (N_LAYERS, 42 if model_type == "gpt2" else 60),
        "mlp": (N_LAYERS, mixtures.N_UNITS.get(model_type, 70)),
    }


def scattered(model: nn.Module, share: float = 0.2, seed: int = 0) -> PerUnit:
    """Random units; in the first block also a whole key/value head, in the second every mlp unit,
    in the last no attention.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = (
        PerUnit(
            {kind: torch.rand(size, generator=generator) for kind, size in sizes_of(model).items()}
        )
        < share
    )
    chosen["attention"][0, -30:] = True
    chosen["mlp"][1] = True
    chosen["attention"][2] = False
    return chosen


def every(model: nn.Module, value: bool = True) -> PerUnit:
    return PerUnit({kind: torch.full(size, value) for kind, size in sizes_of(model).items()})


def one_unit(model: nn.Module) -> PerUnit:
    chosen = every(model, False)
    chosen["mlp"][1, 5] = True
    return chosen


def trainable_entries(model: nn.Module, chosen: PerUnit, rest: bool) -> dict[str, Tensor]:
    """For every parameter of the plain model, which entries may change: written down per
    architecture, by hand.
    """
    masks, is_gpt_oss = {}, model.config.model_type == "gpt_oss"
    for name, parameter in model.named_parameters():
        mask = masks[name] = torch.full(parameter.shape, rest)
        if not (found := re.fullmatch(r"(?:model\.layers|transformer\.h)\.(\d+)\.(.+)", name)):
            continue
        attention, mlp = chosen["attention"][int(found[1])], chosen["mlp"][int(found[1])]
        n_experts = 4 if len(mlp) >= 96 else 0  # it is a mixture of experts of 24
        routed, shared = mlp[: 24 * n_experts].reshape(n_experts, 1, 24), mlp[24 * n_experts :]
        match found[2].removeprefix("block_sparse_moe.").removeprefix("mlp."):
            case "experts.down_proj":
                mask[:] = routed.mT if is_gpt_oss else routed
            case "experts.gate_up_proj" if is_gpt_oss:  # gate and up by turns, (in, out)
                mask[:, :, 0::2], mask[:, :, 1::2] = routed, routed
            case "experts.gate_up_proj_bias":
                mask[:, 0::2], mask[:, 1::2] = routed[:, 0], routed[:, 0]
            case "experts.gate_up_proj":
                mask[:, :24], mask[:, 24:] = routed.mT, routed.mT
            case "shared_expert.down_proj.weight" | "shared_mlp.output_linear.weight":
                mask[:] = shared
            case "shared_expert.gate_proj.weight" | "shared_expert.up_proj.weight":
                mask[:] = shared[:, None]
            case "shared_mlp.input_linear.weight":
                mask[:16], mask[16:] = shared[:, None], shared[:, None]
        match found[2]:
            case "self_attn.o_proj.weight":
                mask[:] = attention  # columns
            case "mlp.down_proj.weight":
                mask[:] = mlp
            case "mlp.gate_proj.weight" | "mlp.up_proj.weight":
                mask[:] = mlp[:, None]  # rows
            case "self_attn.v_proj.weight":
                mask[:] = shared_rows(attention)[:, None]
            case "self_attn.v_proj.bias":
                mask[:] = shared_rows(attention)
            case "self_attn.qkv_proj.weight":  # 60 rows of queries, 20 of keys, 20 of values
                mask[80:] = shared_rows(attention)[:, None]
            case "mlp.gate_up_proj.weight":
                mask[:70], mask[70:] = mlp[:, None], mlp[:, None]
            case "attn.c_proj.weight":  # GPT-2 stores (in, out)
                mask[:] = attention[:, None]
            case "mlp.c_proj.weight":
                mask[:] = mlp[:, None]
            case "attn.c_attn.weight":  # 42 columns of queries, 42 of keys, 42 of values
                mask[:, 84:] = attention
            case "attn.c_attn.bias":
                mask[84:] = attention
            case "mlp.c_fc.weight" | "mlp.c_fc.bias":
                mask[:] = mlp
    return masks


def shared_rows(attention: Tensor) -> Tensor:
    """Value rows of 2 heads of 10, each read by 3 of 6 query heads: trainable where all 3 are."""
    per_head = attention.reshape(6, 10)
    return torch.cat(
        [per_head[0] & per_head[1] & per_head[2], per_head[3] & per_head[4] & per_head[5]]
    )


def assert_exactly_frozen(
    model: nn.Module, before: dict[str, Tensor], masks: dict[str, Tensor]
) -> None:
    """No frozen entry has another bit, and the trained ones have moved."""
    after = dict(model.named_parameters())
    assert after.keys() == before.keys() == masks.keys()
    for name, mask in masks.items():
        assert after[name].dtype == before[name].dtype
        assert torch.equal(after[name][~mask], before[name][~mask]), (
            f"{name} has changed where it is frozen"
        )
        moved = (after[name] != before[name])[mask]
        if mask.all():  # embeddings of absent tokens have no gradient
            assert moved.any(), f"{name} is not trained"
        elif mask.any():  # biases of keys have none, either; in bfloat16, some steps are too small
            assert moved.float().mean() > (0.9 if mask.ndim > 1 else 0.5), (
                f"{name} is hardly trained"
            )


def batches(n: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(11)
    for _ in range(n):
        yield torch.randint(3, VOCABULARY, (4, 9), generator=generator)


def adamw(decay: float = 0.1, **how) -> Callable:
    return lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, weight_decay=decay, **how)


def sgd(momentum: float = 0.9) -> Callable:
    return lambda parameters: torch.optim.SGD(parameters, lr=2e-2, momentum=momentum)


DECAYING_ADAMW = adamw()


def steps(
    model: nn.Module,
    n: int = 3,
    optimizer: Callable = DECAYING_ADAMW,
    clip: float = math.inf,
    autocast: bool = False,
    micro: int = 1,
) -> list[float]:
    """A plain loop over all parameters, frozen or not; returns the loss of every step."""
    optimizer = optimizer(model.parameters())
    losses = []
    for ids in batches(n):
        optimizer.zero_grad()
        losses.append(0.0)
        for part in ids.chunk(micro):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = model(part, labels=part).loss / micro
            loss.backward()
            losses[-1] += loss.item()
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    return losses


def parts_of(model: nn.Module) -> list[PartialParameter]:
    """Of weights and biases."""
    return [module for module in model.modules() if isinstance(module, PartialParameter)]


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor) -> Tensor:
    return model(ids).logits


# ------------------------------------------------------------------------------------------- frozen

LOOPS = {
    "fused": {"optimizer": adamw(fused=True)},
    "foreach": {"optimizer": adamw(foreach=True)},
    "single": {"optimizer": adamw(foreach=False, fused=False)},
    "momentum": {"optimizer": sgd()},
    "accumulation": {"micro": 4},
    "autocast": {"autocast": True},
    "clipping": {"clip": 0.1},
}


@pytest.mark.parametrize("rest", [False, True])
@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS)
def test_frozen_entries_stay_bit_for_bit(any_model, loop, rest):
    chosen, before = scattered(any_model), parameters_of(any_model)
    with training_only(any_model, chosen, rest) as inside:
        assert inside is any_model
        steps(any_model, **loop)
    assert_exactly_frozen(any_model, before, trainable_entries(any_model, chosen, rest))


@pytest.mark.parametrize("rest", [False, True])
@pytest.mark.parametrize("share", SHARES.values(), ids=SHARES)
def test_frozen_entries_of_a_bfloat16_model(any_model, share, rest):
    any_model.bfloat16()
    chosen, before = scattered(any_model, share), parameters_of(any_model)
    with training_only(any_model, chosen, rest):
        assert {part.block.dtype for part in parts_of(any_model)} == {torch.float32}
        assert any_model.dtype == torch.bfloat16
        steps(any_model, 12)
    assert_exactly_frozen(any_model, before, trainable_entries(any_model, chosen, rest))


@pytest.mark.parametrize("choose", [one_unit, every])
def test_one_unit_and_all_units(any_model, choose):
    chosen, before = choose(any_model), parameters_of(any_model)
    with training_only(any_model, chosen):
        steps(any_model)
    assert_exactly_frozen(any_model, before, trainable_entries(any_model, chosen, rest=False))


@pytest.mark.parametrize("choose", [lambda model: every(model, False), scattered])
def test_rest_is_trained_around_frozen_units(any_model, choose):
    chosen, before = choose(any_model), parameters_of(any_model)
    with training_only(any_model, chosen, train_rest=True):
        steps(any_model)
    assert_exactly_frozen(any_model, before, trainable_entries(any_model, chosen, rest=True))


def at_a_frozen_entry_of_a_block(model: nn.Module) -> None:
    model.model.layers[0].mlp.down_proj.partial_weight.rest.data[5, 0] += 1e-3


def at_a_frozen_matrix(model: nn.Module) -> None:
    model.model.layers[2].self_attn.o_proj.weight.data[3, 3] += 1e-3


def at_the_embeddings(model: nn.Module) -> None:
    model.model.embed_tokens.weight.data[5, 5] += 1e-3


@pytest.mark.parametrize(
    "perturb", [at_a_frozen_entry_of_a_block, at_a_frozen_matrix, at_the_embeddings]
)
def test_the_check_notices_one_changed_entry(llama, perturb):
    chosen, before = scattered(llama), parameters_of(llama)
    with training_only(llama, chosen):
        steps(llama)
        perturb(llama)
    with pytest.raises(AssertionError, match="has changed where it is frozen"):
        assert_exactly_frozen(llama, before, trainable_entries(llama, chosen, rest=False))


@pytest.mark.parametrize(
    "wrong",
    [lambda owned, units: torch.ones_like(owned), lambda owned, units: torch.zeros_like(owned)],
)
def test_the_check_notices_wrong_rows(any_model, monkeypatch, wrong):
    owned_rows = models.owned_rows
    monkeypatch.setattr(
        models,
        "owned_rows",
        lambda rows, units, n_rows: wrong(owned_rows(rows, units, n_rows), units),
    )
    chosen, before = scattered(any_model), parameters_of(any_model)
    with training_only(any_model, chosen):
        steps(any_model)
    with pytest.raises(
        AssertionError, match=r"has changed where it is frozen|is hardly trained|is not trained"
    ):
        assert_exactly_frozen(any_model, before, trainable_entries(any_model, chosen, rest=False))


# ------------------------------------------------------------------------------------------- values


def masked(model: nn.Module, masks: dict[str, Tensor]) -> nn.Module:
    """The oracle: ordinary training of everything, in which the gradients of frozen entries are
    zeroed.
    """
    for name, parameter in model.named_parameters():
        parameter.register_hook(lambda gradient, mask=masks[name]: gradient * mask)
    return model


def assert_same_parameters(found: nn.Module, expected: nn.Module, atol: float) -> None:
    for (name, a), b in zip(found.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(
            a, b, rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("rest", [False, True])
@pytest.mark.parametrize("share", SHARES.values(), ids=SHARES)
@pytest.mark.parametrize(
    ("optimizer", "dtype"),
    # in float64, as Adam divides by gradients, which are rounding errors where they ought to be
    # zero
    [(adamw(decay=0.0), torch.float64), (sgd(), torch.float32)],
    ids=["adamw", "sgd"],
)
def test_training_equals_full_training_with_masked_gradients(
    any_model, optimizer, dtype, share, rest
):
    any_model.to(dtype)
    chosen = scattered(any_model, share)
    reference = masked(copy.deepcopy(any_model), trainable_entries(any_model, chosen, rest))
    before = parameters_of(any_model)
    expected = steps(reference, 12, optimizer, clip=0.5)
    with training_only(any_model, chosen, rest):
        assert (share < 0.5) in {part.is_minor for part in parts_of(any_model)}
        found = steps(any_model, 12, optimizer, clip=0.5)
    assert found == pytest.approx(expected, abs=1e-6)
    assert not same_parameters(any_model, before)
    assert_same_parameters(any_model, reference, atol=1e-6)


@pytest.mark.parametrize("share", SHARES.values(), ids=SHARES)
def test_accumulated_gradients_too(any_model, share):
    chosen = scattered(any_model, share)
    reference = masked(copy.deepcopy(any_model), trainable_entries(any_model, chosen, rest=False))
    expected = steps(reference, 6, sgd())
    with training_only(any_model, chosen):
        found = steps(any_model, 6, sgd(), micro=4)
    assert found == pytest.approx(expected, abs=1e-5)
    assert_same_parameters(any_model, reference, atol=1e-5)


@pytest.mark.parametrize("rest", [False, True])
@pytest.mark.parametrize("share", SHARES.values(), ids=SHARES)
def test_under_autocast_too(any_model, share, rest):
    chosen = scattered(any_model, share)
    exact = masked(copy.deepcopy(any_model), trainable_entries(any_model, chosen, rest))
    reference = masked(copy.deepcopy(any_model), trainable_entries(any_model, chosen, rest))
    before = parameters_of(any_model)
    expected = steps(reference, 10, sgd(0.0), clip=0.5, autocast=True)
    with training_only(any_model, chosen, rest):
        found = steps(any_model, 10, sgd(0.0), clip=0.5, autocast=True)
    assert found == pytest.approx(expected, rel=1e-2)
    # so autocast was on
    assert found != pytest.approx(steps(exact, 10, sgd(0.0), clip=0.5), rel=1e-6)
    for (name, a), b in zip(any_model.named_parameters(), reference.parameters(), strict=True):
        assert (a - b).norm() <= 0.1 * (b - before[name]).norm() + 1e-4, name


@pytest.mark.parametrize("share", SHARES.values(), ids=SHARES)
def test_gradients_equal_those_of_the_plain_model(any_model, token_ids, share):
    """Per entry, so that no optimizer hides a factor."""
    chosen, reference = scattered(any_model, share), copy.deepcopy(any_model)
    reference(token_ids, labels=token_ids).loss.backward()
    with training_only(any_model, chosen):
        any_model(token_ids, labels=token_ids).loss.backward()
        for path, module in any_model.named_modules():
            for name, part in module.parts().items() if isinstance(module, Partial) else ():
                whole = reference.get_submodule(path).get_parameter(name)
                expected = part.rows_of(whole.grad)[part.trained]
                torch.testing.assert_close(part.block.grad, expected, rtol=1e-4, atol=1e-5)


def test_steps_too_small_for_bfloat16_add_up(llama):
    model = llama.bfloat16()
    plain = tiny_model("llama").bfloat16()
    weight = "model.layers.0.mlp.up_proj.weight"
    chosen, before = scattered(model), parameters_of(model)
    mask = trainable_entries(model, chosen, rest=False)[weight]

    def share_moved(model: nn.Module) -> float:
        steps(model, 40, lambda parameters: torch.optim.SGD(parameters, lr=3e-3), clip=1.0)
        return (model.state_dict()[weight].bfloat16() != before[weight])[mask].float().mean().item()

    with training_only(model, chosen):
        moved = share_moved(model)
    assert moved > 2 * share_moved(plain)
    whole = tiny_model("llama").bfloat16()
    with training_all(whole):
        assert share_moved(whole) > 1.5 * share_moved(tiny_model("llama").bfloat16())


@pytest.mark.parametrize("choose", [scattered, every])
def test_whatever_is_trained_of_a_bfloat16_model_is_kept_in_float32(llama, choose):
    llama.bfloat16()
    with training_only(llama, choose(llama)):
        assert {parameter.dtype for parameter in llama.parameters() if parameter.requires_grad} == {
            torch.float32
        }


# -------------------------------------------------------------------------------- nothing is frozen


def test_all_of_a_float32_model_is_trained_as_it_is(any_model):
    before = list(any_model.named_parameters())
    with training_all(any_model) as inside:
        assert inside is any_model
        assert list(any_model.named_parameters()) == before
        assert not parts_of(any_model)


def test_all_of_a_bfloat16_model_is_trained_with_its_units_in_float32(any_model):
    any_model.bfloat16()
    n, before = count_trainable(any_model), parameters_of(any_model)
    with training_all(any_model):
        blocks = [part.block for part in parts_of(any_model)]
        assert blocks and {block.dtype for block in blocks} == {torch.float32}
        assert count_trainable(any_model) == n
        steps(any_model)
    assert count_trainable(any_model) == n and not parts_of(any_model)
    after = dict(any_model.named_parameters())
    assert all(one.dtype == torch.bfloat16 for one in after.values())
    moved = {name: (after[name] != one).float().mean() for name, one in before.items()}
    assert all(share > 0.5 for name, share in moved.items() if "down_proj" in name)


def test_training_all_is_freezing_a_unit_that_does_nothing(llama):
    """Weights of zero have no gradient here, so that to freeze them takes nothing away."""
    frozen, mlp = one_unit(llama), llama.model.layers[1].mlp
    with torch.no_grad():
        for rows in (mlp.down_proj.weight.T, mlp.gate_proj.weight, mlp.up_proj.weight):
            rows[5] = 0
    reference = copy.deepcopy(llama.bfloat16())
    with freezing(reference, frozen):
        expected = steps(reference, 12)
    with training_all(llama):
        assert steps(llama, 12) == expected
    assert same_parameters(llama, parameters_of(reference))


def test_training_all_inside_of_another_block_is_refused(llama):
    llama.bfloat16()
    with (
        training_only(llama, scattered(llama)),
        pytest.raises(ValueError, match="leave that block"),
    ):
        training_all(llama).__enter__()


# --------------------------------------------------------------------- neither gradients nor states


@pytest.mark.parametrize("rest", [False, True])
@pytest.mark.parametrize("choose", [scattered, one_unit])
def test_frozen_entries_have_no_gradient_and_no_state(any_model, choose, rest):
    chosen = choose(any_model)
    n_all = count_trainable(any_model)
    n_expected = sum(
        int(mask.sum()) for mask in trainable_entries(any_model, chosen, rest).values()
    )
    with training_only(any_model, chosen, rest):
        assert count_trainable(any_model) == n_expected
        assert sum(p.numel() for p in any_model.parameters() if p.requires_grad) == n_expected
        optimizer = torch.optim.AdamW(any_model.parameters())
        for ids in batches(2):
            any_model(ids, labels=ids).loss.backward()
            optimizer.step()
        for name, parameter in any_model.named_parameters():
            assert (parameter.grad is None) == (not parameter.requires_grad), name
        assert (
            sum(p.grad.numel() for p in any_model.parameters() if p.grad is not None) == n_expected
        )
        for moment in ("exp_avg", "exp_avg_sq"):
            assert sum(state[moment].numel() for state in optimizer.state.values()) == n_expected
    assert count_trainable(any_model) == n_all
    assert 0 < n_expected < n_all


def test_gradients_from_before_are_gone(llama):
    chosen, before = scattered(llama), parameters_of(llama)
    for ids in batches(1):
        llama(ids, labels=ids).loss.backward()
    with training_only(llama, chosen):
        optimizer = torch.optim.AdamW(llama.parameters(), lr=1e-2)
        for ids in batches(3):
            llama(ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert_exactly_frozen(llama, before, trainable_entries(llama, chosen, rest=False))


def test_biases_do_not_decay(tiny_models):
    model = tiny_models("gpt2")
    with training_only(model, scattered(model)):
        decaying = Trainer.get_decay_parameter_names(None, model)
        assert "transformer.h.0.mlp.c_fc.partial_weight.block" in decaying
        assert not any("bias" in name for name in decaying)
        assert any("partial_bias.block" in name for name, _ in model.named_parameters())


# ------------------------------------------------------------------------- still the ordinary model


@pytest.mark.parametrize("rest", [False, True])
def test_outputs_are_the_same_inside(any_model, token_ids, rest):
    expected = logits(any_model, token_ids)
    with training_only(any_model, scattered(any_model), rest):
        torch.testing.assert_close(logits(any_model, token_ids), expected, rtol=0, atol=1e-4)
        answers = any_model.generate(token_ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(logits(any_model, token_ids), expected)
    assert torch.equal(any_model.generate(token_ids, max_new_tokens=4, do_sample=False), answers)


def test_outputs_inside_and_after_are_the_same_once_trained(any_model, token_ids):
    before = logits(any_model, token_ids)
    with training_only(any_model, scattered(any_model), train_rest=True):
        steps(any_model)
        inside = logits(any_model, token_ids)
    torch.testing.assert_close(logits(any_model, token_ids), inside, rtol=0, atol=1e-4)
    assert (inside - before).abs().max() > 0.1


def test_state_dict_inside_is_the_plain_models(any_model):
    plain = {name: value.clone() for name, value in any_model.state_dict().items()}
    with training_only(any_model, scattered(any_model)):
        inside = any_model.state_dict()
        assert list(inside) == list(plain)
        assert all(torch.equal(inside[name], plain[name]) for name in plain)
        assert any_model.state_dict(keep_vars=True).keys() == plain.keys()
        steps(any_model)
        trained = {name: value.clone() for name, value in any_model.state_dict().items()}
    after = any_model.state_dict()
    assert list(after) == list(plain)
    assert all(torch.equal(trained[name], after[name]) for name in plain)
    assert not all(torch.equal(plain[name], after[name]) for name in plain)


def test_state_dict_inside_a_bfloat16_model_is_exact(any_model):
    any_model.bfloat16()
    plain = {name: value.clone() for name, value in any_model.state_dict().items()}
    with training_only(any_model, scattered(any_model)):
        assert all(
            torch.equal(value.bfloat16(), plain[name])
            for name, value in any_model.state_dict().items()
        )
        steps(any_model)
        inside = {name: value.clone() for name, value in any_model.state_dict().items()}
    assert all(
        torch.equal(inside[name].bfloat16(), value)
        for name, value in any_model.state_dict().items()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_inside_is_an_ordinary_folder(any_model, tmp_path, token_ids, dtype):
    any_model.to(dtype)
    with training_only(any_model, scattered(any_model), train_rest=True):
        steps(any_model)
        any_model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).eval()
    assert same_parameters(loaded, parameters_of(any_model))
    assert type(loaded) is type(any_model)
    if dtype == torch.float32:  # else the rotary frequencies of the model are rounded, too
        # kernels may round otherwise where memory begins elsewhere
        found, expected = logits(loaded, token_ids), logits(any_model, token_ids)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def perturbed(model: nn.Module) -> nn.Module:
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    return other


@pytest.mark.parametrize("autocast", [False, True])
def test_load_state_dict_inside(any_model, token_ids, autocast):
    other = perturbed(any_model)

    def cast_logits(model: nn.Module) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return logits(model, token_ids)

    with training_only(any_model, scattered(any_model)):
        before = cast_logits(any_model)  # so that there is a copy in the precision of autocast
        loaded = any_model.load_state_dict(other.state_dict())
        assert not loaded.missing_keys
        assert not loaded.unexpected_keys
        expected = cast_logits(other)
        close = {
            "rtol": 0,
            "atol": 0.2 * (expected - before).abs().max().item() if autocast else 1e-4,
        }
        torch.testing.assert_close(cast_logits(any_model), expected, **close)
    assert same_parameters(any_model, parameters_of(other))


@pytest.mark.parametrize(
    "name", ["model.layers.0.mlp.down_proj.weight", "model.layers.0.self_attn.v_proj.bias"]
)
def test_load_state_dict_inside_names_what_is_wrong(tiny_models, name):
    model = tiny_models("qwen2")
    with training_only(model, scattered(model)):
        values = model.state_dict()
        with pytest.raises(RuntimeError, match=rf"Missing key\(s\) in state_dict: \"{name}\""):
            model.load_state_dict({key: value for key, value in values.items() if key != name})
        with pytest.raises(RuntimeError, match=f"size mismatch for {name}"):
            model.load_state_dict(values | {name: values[name][1:]})


def test_load_state_dict_inside_names_what_is_too_much(llama):
    with training_only(llama, scattered(llama)):
        values = llama.state_dict() | {"model.layers.0.mlp.down_proj.bias": torch.zeros(42)}
        with pytest.raises(RuntimeError, match="Unexpected key"):
            llama.load_state_dict(values)


def fingerprints(model: nn.Module) -> tuple:
    """What must be as before: modules and parameters by identity, flags, buffers by name."""
    return (
        [(name, id(module), type(module)) for name, module in model.named_modules()],
        [
            (name, id(parameter), parameter.requires_grad, parameter.shape, parameter.is_leaf)
            for name, parameter in model.named_parameters()
        ],
        [name for name, _ in model.named_buffers()],
        n_hooks(model),
    )


@pytest.mark.parametrize("rest", [False, True])
@pytest.mark.parametrize("error", [None, ZeroDivisionError, KeyboardInterrupt])
def test_leaving_restores_everything_but_the_trained_entries(any_model, rest, error):
    any_model.get_input_embeddings().weight.requires_grad_(False)
    next(
        any_model.model.layers[0].parameters()
        if hasattr(any_model, "model")
        else any_model.transformer.h[0].parameters()
    ).requires_grad_(False)
    chosen = scattered(any_model)
    before = parameters_of(any_model)
    expected = fingerprints(any_model)

    def inside() -> None:
        with training_only(any_model, chosen, rest):
            assert fingerprints(any_model) != expected
            steps(any_model)
            if error:
                raise error

    if error:
        with pytest.raises(error):
            inside()
    else:
        inside()
    assert fingerprints(any_model) == expected
    assert_exactly_frozen(any_model, before, trainable_entries(any_model, chosen, rest))


def test_nothing_is_changed_by_entering_and_leaving(any_model, token_ids):
    before = parameters_of(any_model)
    expected = fingerprints(any_model)
    output = logits(any_model, token_ids)
    for rest in (False, True):
        with training_only(any_model, scattered(any_model), rest):
            logits(any_model, token_ids)
    assert fingerprints(any_model) == expected
    assert same_parameters(any_model, before)
    assert torch.equal(logits(any_model, token_ids), output)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_block_after_the_other(any_model, dtype):
    any_model.to(dtype)
    for seed in range(3):
        chosen, before = scattered(any_model, seed=seed), parameters_of(any_model)
        with training_only(any_model, chosen):
            steps(any_model)
        assert_exactly_frozen(any_model, before, trainable_entries(any_model, chosen, rest=False))
    before = parameters_of(any_model)
    steps(any_model)  # all of it, as ever
    assert_exactly_frozen(
        any_model,
        before,
        {name: torch.ones_like(p, dtype=torch.bool) for name, p in before.items()},
    )


def test_a_copy_made_inside_is_independent(llama, token_ids):
    chosen = scattered(llama)
    with training_only(llama, chosen):
        steps(llama)
        clone, expected = copy.deepcopy(llama), logits(llama, token_ids)
        steps(llama)
        assert torch.equal(logits(clone, token_ids), expected)
        assert not torch.equal(logits(llama, token_ids), expected)


def test_failure_while_entering_restores_the_model(llama, monkeypatch):
    before, expected = parameters_of(llama), fingerprints(llama)

    def out_of_memory(*args, **kwargs):
        raise MemoryError

    monkeypatch.setattr(nn.functional, "pad", out_of_memory)
    with pytest.raises(MemoryError), training_only(llama, scattered(llama)):
        pass
    assert fingerprints(llama) == expected
    assert same_parameters(llama, before)


# ---------------------------------------------------------------------------- other contexts inside


def means_of(model: nn.Module) -> PerUnit:
    generator = torch.Generator().manual_seed(2)
    return PerUnit(
        {
            kind: torch.randn(size, generator=generator, dtype=torch.float64)
            for kind, size in sizes_of(model).items()
        }
    )


@pytest.mark.parametrize("with_means", [False, True])
def test_ablation_inside(any_model, token_ids, with_means):
    off, means = scattered(any_model, seed=1), means_of(any_model) if with_means else None
    plain = logits(any_model, token_ids)
    with ablated(any_model, off, means):
        expected = logits(any_model, token_ids)
    with training_only(any_model, scattered(any_model)):
        with ablated(any_model, off, means):
            torch.testing.assert_close(logits(any_model, token_ids), expected, rtol=0, atol=1e-4)
        torch.testing.assert_close(logits(any_model, token_ids), plain, rtol=0, atol=1e-4)
        assert n_hooks(any_model) == 0
    assert (expected - plain).abs().max() > 0.1


def test_training_under_ablation_inside(llama):
    chosen, off, before = scattered(llama), every(llama, False), parameters_of(llama)
    off["mlp"][0, :35] = True
    with training_only(llama, chosen), ablated(llama, off):
        steps(llama, optimizer=sgd())
    name = "model.layers.0.mlp.down_proj.weight"
    moved = llama.get_parameter(name) != before[name]
    # what is off gets no gradient
    assert torch.equal(moved.any(0), chosen["mlp"][0] & ~off["mlp"][0])


def test_ablation_outside(any_model, token_ids):
    """Hooks of a matrix are also those of what stands in for it."""
    off = scattered(any_model, seed=1)
    chosen = scattered(any_model)
    before = parameters_of(any_model)
    plain = logits(any_model, token_ids)
    with ablated(any_model, off):
        expected = logits(any_model, token_ids)
        with training_only(any_model, chosen):
            torch.testing.assert_close(logits(any_model, token_ids), expected, rtol=0, atol=1e-4)
        assert torch.equal(logits(any_model, token_ids), expected)
    assert n_hooks(any_model) == 0
    assert torch.equal(logits(any_model, token_ids), plain)
    assert same_parameters(any_model, before)


def test_a_hook_added_inside_stays(llama, token_ids):
    calls = []
    with training_only(llama, scattered(llama)):
        handle = llama.model.layers[0].mlp.down_proj.register_forward_hook(
            lambda *args: calls.append(1)
        )
        logits(llama, token_ids)
    logits(llama, token_ids)
    handle.remove()
    logits(llama, token_ids)
    assert len(calls) == 2
    assert n_hooks(llama) == 0


def test_a_smaller_copy_made_inside(any_model, token_ids):
    off = scattered(any_model, seed=1)
    with ablated(any_model, off):
        expected = logits(any_model, token_ids)
    with training_only(any_model, scattered(any_model)):
        torch.testing.assert_close(
            logits(without_units(any_model, off), token_ids), expected, rtol=0, atol=1e-4
        )


def test_channel_moments_inside(any_model, token_ids):
    batch = {
        "input_ids": token_ids,
        "attention_mask": torch.ones_like(token_ids),
        "positions": token_ids > 20,
    }
    expected = channel_moments(any_model, [batch])
    chosen, before = scattered(any_model), parameters_of(any_model)
    with training_only(any_model, chosen):
        found = channel_moments(any_model, [batch])
        steps(any_model)
        trained = channel_moments(any_model, [batch])
        steps(any_model)  # still possible
    for kind in KINDS:
        torch.testing.assert_close(found.mean[kind], expected.mean[kind], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            found.variance[kind], expected.variance[kind], rtol=1e-4, atol=1e-5
        )
    assert not torch.allclose(trained.mean["mlp"], expected.mean["mlp"], atol=1e-3)
    assert_exactly_frozen(any_model, before, trainable_entries(any_model, chosen, rest=False))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_measuring_under_autocast_before_the_first_step(llama, token_ids, mode):
    with training_only(llama, scattered(llama)):
        with mode(), torch.autocast("cpu", torch.bfloat16):
            llama(token_ids)
        steps(llama, autocast=True)


@pytest.mark.parametrize("context", [training_only, freezing])
def test_nesting_is_refused(llama, context):
    chosen, before = scattered(llama), parameters_of(llama)
    with training_only(llama, chosen):
        with (
            pytest.raises(ValueError, match="being trained already"),
            context(llama, one_unit(llama)),
        ):
            raise AssertionError("entered")
        steps(llama)
    assert_exactly_frozen(llama, before, trainable_entries(llama, chosen, rest=False))


# ----------------------------------------------------------------------------------------- freezing


@pytest.mark.parametrize("rest", [None, False, True])
def test_freezing_is_the_complement(any_model, rest):
    frozen, before = scattered(any_model), parameters_of(any_model)
    others = ~frozen
    reference = copy.deepcopy(any_model)
    how = {} if rest is None else {"train_rest": rest}
    with freezing(any_model, frozen, **how) as inside:
        assert inside is any_model
        n_trainable = count_trainable(any_model)
        losses = steps(any_model)
    rest = rest is not False  # by default, the rest is trained
    with training_only(reference, others, train_rest=rest):
        assert count_trainable(reference) == n_trainable
        assert steps(reference) == losses
    assert same_parameters(any_model, parameters_of(reference))
    assert_exactly_frozen(any_model, before, trainable_entries(any_model, others, rest))


def test_a_shared_value_row_is_frozen_with_any_of_its_channels(llama):
    frozen = every(llama, False)
    frozen["attention"][0, 33] = True  # head 3, within the second group
    before = parameters_of(llama)
    with freezing(llama, frozen):
        steps(llama)
    moved = (
        llama.model.layers[0].self_attn.v_proj.weight
        != before["model.layers.0.self_attn.v_proj.weight"]
    ).any(1)
    assert (~moved).nonzero().flatten().tolist() == [13]


# ---------------------------------------------------------------------------------------- bad input

WRONG_SHAPES = {
    "one channel more": lambda size: (size[0], size[1] + 1),
    "one block less": lambda size: (size[0] - 1, size[1]),
    "transposed": lambda size: (size[1], size[0]),
    "one block's": lambda size: (size[1],),
}


@pytest.mark.parametrize("context", [training_only, freezing])
@pytest.mark.parametrize("wrong", KINDS)
@pytest.mark.parametrize("shape", WRONG_SHAPES.values(), ids=WRONG_SHAPES)
def test_a_set_of_another_shape_is_refused(llama, context, wrong, shape):
    expected, found = fingerprints(llama), shape(sizes_of(llama)[wrong])
    chosen = dict(scattered(llama)) | {wrong: torch.ones(found, dtype=torch.bool)}
    message = (
        rf"the unit set has {re.escape(str(found))} {wrong} units, the model has"
        rf" {re.escape(str(sizes_of(llama)[wrong]))}"
    )
    with pytest.raises(ValueError, match=message), context(llama, chosen):
        raise AssertionError("entered")
    assert fingerprints(llama) == expected


@pytest.mark.parametrize(
    ("context", "all_units", "rest", "message"),
    [
        (training_only, False, False, "nothing to train: the set of trainable units is empty"),
        (training_only, True, True, "nothing is frozen: train the model as it is"),
        (freezing, True, False, "nothing to train: every unit is frozen"),
        (freezing, False, True, "nothing is frozen: the set of frozen units is empty"),
        (freezing, False, False, "nothing is frozen: the set of frozen units is empty"),
    ],
)
def test_nothing_to_train_and_nothing_frozen_are_errors(llama, context, all_units, rest, message):
    expected = fingerprints(llama)
    with pytest.raises(ValueError, match=message), context(llama, every(llama, all_units), rest):
        raise AssertionError("entered")
    assert fingerprints(llama) == expected


def test_other_architectures_are_refused(llama):
    chosen = scattered(llama)
    llama.config.model_type = "mamba"
    with (
        pytest.raises(ValueError, match="'mamba' is not in ARCHITECTURES"),
        training_only(llama, chosen),
    ):
        pass


@pytest.mark.parametrize("context", [training_only, freezing])
def test_a_plain_dict_will_do_for_a_set(llama, context):
    twin, chosen = copy.deepcopy(llama), scattered(llama)
    with context(llama, chosen):
        losses = steps(llama)
    with context(twin, dict(chosen)):
        assert steps(twin) == losses
    assert same_parameters(twin, parameters_of(llama))


@pytest.mark.parametrize("context", [training_only, freezing])
@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_sets_of_numbers_are_refused(llama, context, dtype):
    """~ of an integer is never zero."""
    expected, chosen = fingerprints(llama), scattered(llama).map(lambda values: values.to(dtype))
    with (
        pytest.raises(TypeError, match="a set of units is of bool, not of"),
        context(llama, chosen),
    ):
        raise AssertionError("entered")
    assert fingerprints(llama) == expected


# ----------------------------------------------------------------------------- Hugging Face Trainer


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2"])
def test_all_units_with_the_rest_frozen_equal_the_plain_trainer(
    tiny_models, tokenizer, monkeypatch, name
):
    config = SFTConfig(learning_rate=1e-2, max_steps=20, batch_size=4, seed=3)
    examples = examples_of(24)
    model, reference = tiny_models(name), tiny_models(name)
    with training_only(model, every(model)):
        found = train_sft(model, tokenizer, examples, config)
    for parameter_name, parameter in reference.named_parameters():
        parameter.requires_grad_(
            re.search(r"\.(o|down|gate|up|v)_proj\.", parameter_name) is not None
        )
    monkeypatch.setattr(training, "ResponseTrainer", PlainTrainer)
    expected = train_sft(reference, tokenizer, examples, config)
    assert len(found) == 20
    assert found == pytest.approx(expected, abs=1e-5)
    assert found[-1] < found[0] - 0.5
    assert_same_parameters(model, reference, atol=1e-3)


@pytest.mark.parametrize("rest", [False, True])
@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2"])
def test_fine_tuning_equals_the_plain_trainer_with_masked_gradients(
    tiny_models, tokenizer, monkeypatch, name, rest
):
    config = SFTConfig(learning_rate=1e-2, max_steps=20, batch_size=4, seed=3)
    examples = examples_of(24)
    model, reference = tiny_models(name), tiny_models(name)
    chosen, before = scattered(model, 0.4), parameters_of(model)
    with training_only(model, chosen, rest):
        found = train_sft(model, tokenizer, examples, config)
    masked(reference, masks := trainable_entries(reference, chosen, rest))
    monkeypatch.setattr(training, "ResponseTrainer", PlainTrainer)
    expected = train_sft(reference, tokenizer, examples, config)
    assert found == pytest.approx(expected, abs=1e-5)
    assert found[-1] < found[0] - 0.5
    assert_exactly_frozen(model, before, masks)


def arguments_of(folder: Path, **how) -> dict:
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "dataloader_pin_memory": False,
        "max_steps": 6,
    } | how


class Stop(TrainerCallback):
    """Cut a training off after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs) -> None:
        control.should_training_stop |= state.global_step == self.step


def trained(
    model: nn.Module, folder: Path, stop: int = 0, resume: str | None = None, **how
) -> list[float]:
    ids = torch.randint(3, VOCABULARY, (24, 9), generator=torch.Generator().manual_seed(5))
    rows = [{"input_ids": row, "labels": row} for row in ids]
    arguments = TrainingArguments(**arguments_of(folder, **how))
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[Stop(stop)])
    trainer.train(resume_from_checkpoint=resume)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize(
    ("name", "rest", "dtype", "autocast"),
    [
        ("llama", False, torch.float32, False),
        ("llama", True, torch.float32, True),
        ("llama", True, torch.bfloat16, False),
        ("gpt2", False, torch.bfloat16, False),
        ("gpt2", True, torch.float32, False),
    ],
)
def test_resuming_equals_the_uninterrupted_run(tiny_models, tmp_path, name, rest, dtype, autocast):
    def fresh() -> nn.Module:
        return tiny_models(name).to(dtype)

    how = {"bf16": autocast, "save_strategy": "steps", "save_steps": 3}
    whole, cut, resumed = fresh(), fresh(), fresh()
    chosen, before = scattered(whole), parameters_of(whole)
    with training_only(whole, chosen, rest):
        expected = trained(whole, tmp_path / "whole", **how)
    with training_only(cut, chosen, rest):
        assert trained(cut, tmp_path / "cut", stop=3, **how) == expected[:3]
    with training_only(resumed, chosen, rest):
        found = trained(
            resumed, tmp_path / "cut", resume=str(tmp_path / "cut" / "checkpoint-3"), **how
        )
    assert found == expected
    assert same_parameters(resumed, parameters_of(whole))
    assert not same_parameters(cut, parameters_of(whole))
    assert_exactly_frozen(resumed, before, trainable_entries(whole, chosen, rest))


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_a_checkpoint_is_one_of_the_whole_model(tiny_models, tmp_path, name):
    model = tiny_models(name)
    with training_only(model, scattered(model)):
        trained(model, tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2")
    assert same_parameters(loaded, parameters_of(model))


@pytest.mark.parametrize("rest", [False, True])
def test_gradient_checkpointing(llama, tmp_path, rest):
    chosen, before, reference = scattered(llama), parameters_of(llama), tiny_model("llama")
    with training_only(reference, chosen, rest):
        expected = trained(reference, tmp_path)
    n_forward = 0

    def count(*args) -> None:
        nonlocal n_forward
        n_forward += 1

    with training_only(llama, chosen, rest):
        llama.model.layers[0].mlp.gate_proj.register_forward_hook(count)
        assert trained(llama, tmp_path, gradient_checkpointing=True) == pytest.approx(
            expected, abs=1e-5
        )
    assert n_forward == 2 * 6  # each step forward once more, on the way back
    assert_exactly_frozen(llama, before, trainable_entries(llama, chosen, rest))


# ---------------------------------------------------------------------------------------------- TRL


@pytest.mark.parametrize("rest", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_supervised_trainer_of_trl(tiny_models, tokenizer, tmp_path, name, rest):
    from trl import SFTConfig, SFTTrainer

    model = tiny_models(name)
    chosen, before = scattered(model), parameters_of(model)
    rows = [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in PAIRS]
    with training_only(model, chosen, rest):
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(**arguments_of(tmp_path, gradient_checkpointing=False)),
            train_dataset=Dataset.from_list(rows),
            processing_class=copy.deepcopy(tokenizer),
        )
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 6
    assert losses[-1] < losses[0]
    assert_exactly_frozen(model, before, trainable_entries(model, chosen, rest))


@pytest.mark.parametrize("rest", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_preference_training(tiny_models, tokenizer, name, rest):
    model = tiny_models(name)
    chosen, before = scattered(model), parameters_of(model)
    with training_only(model, chosen, rest):
        losses = train_dpo(
            model,
            copy.deepcopy(tokenizer),
            PAIRS,
            SFTConfig(learning_rate=1e-2, max_steps=6, warmup_steps=0),
        )
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4)  # the reference is the model itself
    assert losses[-1] < losses[0]
    assert_exactly_frozen(model, before, trainable_entries(model, chosen, rest))


# ------------------------------------------------------------------------------------------- memory

WIDTH = 512


@pytest.fixture
def wide() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
    )
    return AutoModelForCausalLM.from_config(config).eval()


def first_of_mlp(model: nn.Module, n: int) -> PerUnit:
    """Every 512/n-th mlp unit of both blocks."""
    chosen = {
        "attention": torch.zeros(2, 32, dtype=torch.bool),
        "mlp": torch.zeros(2, WIDTH, dtype=torch.bool),
    }
    chosen["mlp"][:, torch.linspace(1, WIDTH - 1, n).long()] = True
    return chosen


def kept_for_backward(function: Callable[[], object]) -> list[Tensor]:
    """What autograd saves while ``function`` runs, each tensor once, and no parameter."""
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            kept[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        function()
    return list(kept.values())


@pytest.mark.parametrize(
    ("n_trained", "n_kept"), [(1, 64), (5, 64), (64, 64), (65, 128), (200, 256), (300, WIDTH)]
)
def test_a_writer_keeps_the_trained_columns_of_its_input_alone(wide, n_trained, n_kept):
    """In steps of 64 (``PADDING``), and all of them from one half on."""
    chosen = first_of_mlp(wide, n_trained)
    values = torch.randn(2, 9, WIDTH, requires_grad=True)
    with training_only(wide, chosen):
        writer = wide.model.layers[0].mlp.down_proj
        (kept,) = kept_for_backward(lambda: writer(values))
        assert kept.shape == (2, 9, n_kept)
        if n_kept < WIDTH:
            assert torch.equal(kept[..., :n_trained], values[..., chosen["mlp"][0]])


def test_the_whole_model_keeps_one_activation_less_per_block(wide, token_ids):
    def sizes() -> list[int]:
        weights = {tensor.data_ptr() for tensor in [*wide.parameters(), *wide.buffers()]}
        kept = kept_for_backward(lambda: wide(token_ids, labels=token_ids))
        return [tensor.numel() for tensor in kept if tensor.data_ptr() not in weights]

    plain, n_tokens = sizes(), token_ids.numel()
    with training_only(wide, first_of_mlp(wide, 5)):
        inside = sizes()
    assert plain.count(n_tokens * WIDTH) - inside.count(n_tokens * WIDTH) == 2
    assert inside.count(n_tokens * 64) - plain.count(n_tokens * 64) == 2
    assert sum(inside) < sum(plain) - 2 * n_tokens * (WIDTH - 64)  # the attention keeps less, too


def test_no_activation_is_kept_for_frozen_matrices(wide):
    chosen = first_of_mlp(wide, 5)
    chosen["mlp"][0] = False
    values = torch.randn(2, 9, WIDTH, requires_grad=True)
    with training_only(wide, chosen):
        kept = kept_for_backward(lambda: wide.model.layers[0].mlp.down_proj(values))
        assert all(tensor.data_ptr() != values.data_ptr() for tensor in kept)
        with torch.no_grad():
            assert not kept_for_backward(lambda: wide.model.layers[1].mlp.down_proj(values))


def test_there_is_one_copy_of_every_weight(any_model):
    """Trained and frozen entries alike are there once."""
    n_parameters = sum(parameter.numel() for parameter in any_model.parameters())
    with training_only(any_model, scattered(any_model)):
        assert sum(parameter.numel() for parameter in any_model.parameters()) == n_parameters
        tensors = [*any_model.parameters(), *(part.original[0] for part in parts_of(any_model))]
        storages = {one.untyped_storage().data_ptr(): one.untyped_storage() for one in tensors}
        assert sum(storage.nbytes() for storage in storages.values()) == 4 * n_parameters
