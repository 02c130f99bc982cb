"""Mixtures of experts: what holds for the units of dense models holds for theirs.

Many tests are those of dense models, on other models: they are imported, and take the fixture
``any_model`` of this file.
"""

import copy

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.integrations import moe

from ssah_utils import adapters, architectures, experts, fingerprints, models, unit_tables, weights
from ssah_utils.activations import channel_moments, unit_values
from ssah_utils.architectures import ModelShape
from ssah_utils.interventions import ablated, without_units
from ssah_utils.partial_experts import PartialExperts
from ssah_utils.per_unit import KINDS, PerUnit
from ssah_utils.unit_files import ModelInfo, SetInfo, UnitFileInfo, load_units, save_units
from ssah_utils.unit_training import training_only
from tests import mixtures
from tests.conftest import (
    COMPILED,
    n_hooks,
    parameters_of,
    same_parameters,
    tiny_model,
    writers_by_name,
)
from tests.test_activations import (  # noqa: F401
    batches_of,
    marked_before_the_end,
    sequences,
    test_gradient_activation_equals_the_gradient_by_hand,
    test_last_token_states_equal_those_of_each_sequence_alone,
    test_left_padding_changes_no_moments,
    test_moments_of_every_architecture,
    writer_inputs,
)
from tests.test_interventions import (  # noqa: F401
    assert_close,
    edited,
    logits,
    random_means,
    scattered,
    test_a_smaller_copy_leaves_the_original_alone,
    test_an_exception_inside_restores_the_model_too,
    test_generate_under_ablation,
    test_hooks_equal_zeroed_columns_equal_a_smaller_model,
    test_leaving_the_block_restores_the_model_bit_for_bit,
    test_means_too,
)
from tests.test_models import (  # noqa: F401
    test_fingerprint_of_a_bfloat16_copy_is_the_same,
    test_fingerprint_survives_saving,
)
from tests.test_prompt_cache import (  # noqa: F401
    test_continuations_are_as_probable_as_after_the_whole_text,
)
from tests.test_unit_training import (  # noqa: F401
    SHARES,
    adamw,
    test_ablation_inside,
    test_ablation_outside,
    test_accumulated_gradients_too,
    test_channel_moments_inside,
    test_freezing_is_the_complement,
    test_frozen_entries_have_no_gradient_and_no_state,
    test_frozen_entries_of_a_bfloat16_model,
    test_frozen_entries_stay_bit_for_bit,
    test_leaving_restores_everything_but_the_trained_entries,
    test_load_state_dict_inside,
    test_nothing_is_changed_by_entering_and_leaving,
    test_one_block_after_the_other,
    test_one_unit_and_all_units,
    test_outputs_are_the_same_inside,
    test_outputs_inside_and_after_are_the_same_once_trained,
    test_rest_is_trained_around_frozen_units,
    test_saved_inside_is_an_ordinary_folder,
    test_state_dict_inside_a_bfloat16_model_is_exact,
    test_state_dict_inside_is_the_plain_models,
)
from tests.test_unit_training import (
    test_training_equals_full_training_with_masked_gradients as training_equals_masked_gradients,
)
from tests.test_unit_training import test_under_autocast_too as equals_under_autocast

IMPLEMENTATIONS = ["eager", "batched_mm", "grouped_mm"]


@pytest.fixture(params=mixtures.LAYOUTS)
def any_model(request: pytest.FixtureRequest) -> nn.Module:
    return tiny_model(request.param)


@pytest.fixture(params=mixtures.CONFIGS)
def mixture(request: pytest.FixtureRequest) -> nn.Module:
    return tiny_model(request.param)


@pytest.fixture
def qwen() -> nn.Module:
    """With a shared expert behind a gate."""
    return tiny_model("qwen2_moe")


def every_unit(model: nn.Module) -> PerUnit:
    return ~scattered(model).empty_set()


# ---------------------------------------------------------------------------------------- structure


def test_every_mixture_with_an_entry_is_tested():
    assert mixtures.CONFIGS.keys() == architectures.MIXTURES.keys()


def test_the_oracle_computes_what_the_model_does(mixture, token_ids):
    found, expected = logits(mixtures.plain(mixture), token_ids), logits(mixture, token_ids)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


def test_the_units_of_a_block_are_those_of_its_experts_then_those_of_the_shared_one(mixture):
    shape, name = models.shape_of(mixture), mixture.config.model_type
    assert shape.n_channels("mlp") == mixtures.N_UNITS[name]
    assert (shape.n_experts, shape.d_expert) == (mixtures.N_EXPERTS, mixtures.D_EXPERT)
    assert shape.d_ff == mixtures.SHARED.get(name, 0)
    columns = [writer.weight for writer in writers_by_name(mixtures.plain(mixture), "mlp")]
    found = weights.squared_column_norms(mixture)["mlp"]
    expected = torch.stack([column.double().square().sum(0) for column in columns])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    found = weights.mean_absolute_columns(mixture)["mlp"]
    expected = torch.stack([column.double().abs().mean(0) for column in columns])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_a_channel_has_an_expert_and_a_number_there():
    shape = ModelShape("", 2, 8, 2, 2, 4, d_ff=3, n_experts=4, d_expert=5)
    assert [shape.expert_of(channel) for channel in (0, 4, 5, 19)] == [
        (0, 0),
        (0, 4),
        (1, 0),
        (3, 4),
    ]
    assert shape.expert_of(20) is None  # the first of the shared expert
    assert shape.n_channels("mlp") == 23
    assert shape.n_units == 2 * (8 + 23)
    assert ModelShape("", 2, 8, 2, 2, 4, d_ff=3).expert_of(0) is None


DENSE_BETWEEN = {
    "qwen3_moe": {"mlp_only_layers": [1]},
    "qwen2_moe": {"mlp_only_layers": [1]},
    "glm4_moe": {"first_k_dense_replace": 2},
    "ernie4_5_moe": {"moe_layer_start_index": 2},
}


@pytest.mark.parametrize("name", DENSE_BETWEEN)
def test_a_dense_block_among_mixtures_is_refused_in_one_line_that_names_it(name, sequences):  # noqa: F811
    config = mixtures.CONFIGS[name]()
    for key, value in DENSE_BETWEEN[name].items():
        setattr(config, key, value)
    model = AutoModelForCausalLM.from_config(config)
    which = 1 if "mlp_only_layers" in DENSE_BETWEEN[name] else 0
    for question in (
        models.shape_of,
        weights.squared_column_norms,
        lambda model: channel_moments(model, batches_of(sequences, [7])),
    ):
        with pytest.raises(ValueError, match=rf"block {which} has no 'mlp\.experts'") as raised:
            question(model)
        assert "\n" not in str(raised.value)


def test_a_mixture_without_an_entry_is_refused_in_one_line_that_names_its_experts():
    sizes = mixtures.SIZES | {"intermediate_size": 70, "moe_intermediate_size": 24}
    config = transformers.DeepseekV3Config(
        **(sizes | {"head_dim": 8, "num_key_value_heads": 6}),
        n_routed_experts=4,
        first_k_dense_replace=0,
        n_group=1,
        topk_group=1,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
        kv_lora_rank=8,
        q_lora_rank=8,
    )
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match=r"'deepseek_v3' is not in ARCHITECTURES.*mlp\.experts"):
        models.shape_of(model)


def test_experts_that_no_function_of_transformers_runs_are_refused_by_name():
    model = tiny_model("mixtral")
    block = model.model.layers[1].mlp
    block.experts = nn.ModuleList([nn.Linear(40, 24)])
    with pytest.raises(ValueError, match=r"block 1.*mlp\.experts.*is not fused experts"):
        models.shape_of(model)


def test_experts_whose_output_is_normalised_one_by_one_are_refused():
    model = tiny_model("mixtral")
    model.model.layers[2].mlp.experts.has_post_expert_norm = True
    with pytest.raises(ValueError, match=r"block 2.*normalises what each expert gives"):
        weights.squared_column_norms(model)


@pytest.mark.parametrize("wrong", [{"num_local_experts": 5}, {"intermediate_size": 23}], ids=str)
def test_experts_that_the_configuration_does_not_explain_are_an_error(wrong):
    model = tiny_model("mixtral")
    for name, value in wrong.items():
        setattr(model.config, name, value)
    with pytest.raises(ValueError, match=r"block 0 has 'mlp\.experts'.*does not explain"):
        models.shape_of(model)


def test_a_second_writer_beside_the_experts_is_not_skipped():
    model = tiny_model("mixtral")
    model.model.layers[1].mlp.down_proj = nn.Linear(24, 40)
    with pytest.raises(ValueError, match=r"block 1 has 'mlp\.down_proj'.*covered by no entry"):
        models.shape_of(model)


# ------------------------------------------------------------------------------------- activations


def test_moments_equal_those_of_every_unit_of_the_oracle(mixture, sequences):  # noqa: F811
    """Over all marked positions, also those at which the router did not choose the expert."""
    batches = batches_of(sequences, [3, 4])
    exact = writer_inputs(copy.deepcopy(mixture).double(), batches)
    found = channel_moments(mixture, batches)
    assert found.count == sum(int(batch["positions"].sum()) for batch in batches)
    for kind in KINDS:
        values = torch.stack(exact[kind])  # (n_layers, n_positions, n_channels)
        size = values.abs().max().item()
        torch.testing.assert_close(found.mean[kind], values.mean(1), rtol=0, atol=1e-5 * size)
        torch.testing.assert_close(found.variance[kind], values.var(1), rtol=0, atol=1e-5 * size**2)
    routed = torch.stack(exact["mlp"])[..., : mixtures.N_EXPERTS * mixtures.D_EXPERT]
    assert 0.4 < (routed == 0).float().mean() < 0.6  # two of four experts


def test_values_of_a_unit_are_those_of_the_oracle(any_model, sequences):  # noqa: F811
    (batch,) = batches_of(sequences, [7])
    everywhere = batch | {"positions": torch.ones_like(batch["positions"])}
    expected = writer_inputs(any_model, [everywhere])
    for layer, channel in ((0, 3), (1, 95), (2, mixtures.N_UNITS[any_model.config.model_type] - 1)):
        found = unit_values(any_model, batch, "mlp", layer, channel)
        assert found.shape == batch["input_ids"].shape
        attended = batch["attention_mask"].bool()
        wanted = expected["mlp"][layer][:, channel].view_as(found).float()
        torch.testing.assert_close(found[attended], wanted[attended], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="no unit mlp/3/0"):
        unit_values(any_model, batch, "mlp", 3, 0)


def test_moments_under_ablation_are_those_of_what_is_held(qwen, sequences):  # noqa: F811
    batches, means = batches_of(sequences, [7]), random_means(qwen)
    chosen = scattered(qwen)
    with ablated(qwen, chosen, means):
        found = channel_moments(qwen, batches)
    for kind in KINDS:
        held = chosen[kind]
        torch.testing.assert_close(found.mean[kind][held], means[kind][held], rtol=1e-6, atol=1e-6)
        assert found.variance[kind][held].max() < 1e-10
    assert n_hooks(qwen) == 0


def test_units_that_no_hook_sees_are_an_error(qwen, sequences):  # noqa: F811
    """As under a kernel that computes a whole block of experts in its own way."""
    own, plain = qwen.model.layers[1], mixtures.plain(qwen).model.layers[1]
    own.mlp.forward = plain.mlp.forward
    with pytest.raises(ValueError, match="0 were seen at the mlp units of block 1"):
        channel_moments(qwen, batches_of(sequences, [7]))


def test_squared_gradients_are_those_of_the_entries_that_a_unit_owns(any_model, token_ids):
    any_model(token_ids, labels=token_ids).loss.backward()
    found = weights.squared_gradients(any_model)["mlp"]
    is_gpt_oss = any_model.config.model_type == "gpt_oss"
    for layer, block in enumerate(any_model.model.layers):
        holder = getattr(block, "block_sparse_moe", None) or block.mlp
        own = holder.experts
        for expert in range(mixtures.N_EXPERTS):
            up, down = own.gate_up_proj.grad[expert], own.down_proj.grad[expert]
            up, down = (up.T, down.T) if is_gpt_oss else (up, down)
            for j in range(mixtures.D_EXPERT):
                rows = [2 * j, 2 * j + 1] if is_gpt_oss else [j, mixtures.D_EXPERT + j]
                expected = down[:, j].double().square().sum() + up[rows].double().square().sum()
                if is_gpt_oss:
                    expected += own.gate_up_proj_bias.grad[expert, rows].double().square().sum()
                value = found[layer, expert * mixtures.D_EXPERT + j]
                torch.testing.assert_close(value, expected, rtol=1e-9, atol=0)
        name = any_model.config.model_type
        if name == "qwen2_moe":
            shared = holder.shared_expert
            grads = [shared.down_proj.weight.grad.T, shared.gate_proj.weight.grad]
            grads.append(shared.up_proj.weight.grad)
        elif name == "granitemoeshared":
            both = block.shared_mlp.input_linear.weight.grad
            grads = [block.shared_mlp.output_linear.weight.grad.T, *both.tensor_split(2)]
        else:
            continue
        expected = sum(grad.double().square().sum(1) for grad in grads)
        torch.testing.assert_close(found[layer, 96:], expected, rtol=1e-9, atol=0)


# ---------------------------------------------------------------------------------------- functions


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_models_own_function_is_back_and_ours_computes_the_same(
    any_model, token_ids, implementation
):
    any_model.set_experts_implementation(implementation)
    own = [block for block in any_model.modules() if experts.is_fused(block)]
    known = set(moe.ALL_EXPERTS_FUNCTIONS)
    before = logits(any_model, token_ids)
    names = [name for name, _ in any_model.named_modules()]
    handles = [
        writer.module.register_forward_pre_hook(lambda module, args: None)
        for writer in models.writers(any_model, "mlp")
    ]
    assert any_model.config._experts_implementation == implementation  # others see no change
    assert_close(logits(any_model, token_ids), before)
    for handle in [*handles, *handles]:  # a second time does nothing
        handle.remove()
    assert [name for name, _ in any_model.named_modules()] == names
    assert all(one.config is any_model.config for one in own)
    assert any_model.config._experts_implementation == implementation
    assert torch.equal(logits(any_model, token_ids), before)
    assert set(moe.ALL_EXPERTS_FUNCTIONS) == known


def test_nested_ablations_add_up_in_whatever_order_they_end(qwen, token_ids):
    first, second = scattered(qwen, seed=0), scattered(qwen, seed=1)
    before = logits(qwen, token_ids)
    outer, inner = ablated(qwen, first), ablated(qwen, second)
    outer.__enter__(), inner.__enter__()
    assert_close(logits(qwen, token_ids), logits(edited(qwen, first | second), token_ids))
    outer.__exit__(None, None, None)
    assert_close(logits(qwen, token_ids), logits(edited(qwen, second), token_ids))
    inner.__exit__(None, None, None)
    assert torch.equal(logits(qwen, token_ids), before)
    assert n_hooks(qwen) == 0


def test_a_copy_made_under_ablation_stays_ablated(qwen, token_ids):
    chosen = scattered(qwen)
    with ablated(qwen, chosen):
        clone, expected = copy.deepcopy(qwen), logits(qwen, token_ids)
    for parameter in qwen.parameters():
        parameter.data.zero_()  # the copy does not look at it
    assert torch.equal(logits(clone, token_ids), expected)


def test_all_units_off_leave_the_biases_of_the_experts(token_ids):
    """They belong to no unit: gpt-oss writes them still, by their routing weights."""
    model = tiny_model("gpt_oss")
    off = every_unit(model).only("mlp")
    with ablated(model, off):
        found = logits(model, token_ids)
    clone = copy.deepcopy(model)
    for block in clone.model.layers:
        block.mlp.experts.down_proj.data.zero_()
    assert_close(found, logits(clone, token_ids))
    for block in clone.model.layers:
        block.mlp.experts.down_proj_bias.data.zero_()
    assert (found - logits(clone, token_ids)).abs().max() > 0.1


@pytest.mark.parametrize("means", [False, True])
def test_every_family_is_ablated_as_its_oracle(mixture, token_ids, means):
    chosen, held = scattered(mixture), random_means(mixture) if means else None
    expected = logits(edited(mixture, chosen, held), token_ids)
    with ablated(mixture, chosen, held):
        assert_close(logits(mixture, token_ids), expected)
    assert_close(logits(without_units(mixture, chosen, held), token_ids), expected)


def test_a_bfloat16_mixture_is_ablated_too(any_model, token_ids):
    exact, chosen = copy.deepcopy(any_model), scattered(any_model)
    any_model.bfloat16()
    with ablated(any_model, chosen):
        found = logits(any_model, token_ids).float()
    expected = logits(edited(exact, chosen), token_ids)
    plain = logits(exact, token_ids)
    # routing may differ where two experts are as good as each other, so not by the largest
    error = (found - expected).abs().median()
    assert error < 0.02 * (expected - plain).abs().max()


def test_the_fingerprint_sees_which_unit_of_which_expert_is_held(qwen):
    seen = [fingerprints.fingerprint(qwen)]
    for layer, channel in ((0, 3), (0, 27), (1, 3), (1, 100)):
        one = scattered(qwen).empty_set()
        one["mlp"][layer, channel] = True
        for means in (None, every_unit(qwen).map(Tensor.float)):
            with ablated(qwen, one, means):
                seen.append(fingerprints.fingerprint(qwen))
    assert len(set(seen)) == len(seen)
    assert fingerprints.fingerprint(qwen) == seen[0]


@pytest.mark.parametrize("how", ["whole", "blocks"])
def test_a_compiled_mixture_is_ablated_and_measured_too(sequences, token_ids, how):  # noqa: F811
    model = tiny_model("mixtral")
    model.model.layers, model.config.num_hidden_layers = model.model.layers[:1], 1
    chosen, batches = scattered(model), batches_of(sequences, [7])
    with ablated(model, chosen):
        expected, before = logits(model, token_ids), channel_moments(model, batches)
    plain = logits(model, token_ids)
    compiled = COMPILED[how](model)
    assert_close(logits(compiled, token_ids), plain)
    with ablated(compiled, chosen):
        assert_close(logits(compiled, token_ids), expected)
        found = channel_moments(compiled, batches)
    torch.testing.assert_close(found.variance["mlp"], before.variance["mlp"], rtol=1e-5, atol=1e-8)
    assert_close(logits(compiled, token_ids), plain)


# ----------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_units_are_trained_whatever_function_runs_the_experts(any_model, token_ids, implementation):
    """Gradients of the trained entries are those of the plain model, also with checkpointing."""
    reference = copy.deepcopy(any_model)
    reference(token_ids, labels=token_ids).loss.backward()
    any_model.set_experts_implementation(implementation)
    chosen = scattered(any_model)
    for checkpointing in (False, True):
        with training_only(any_model, chosen):
            if checkpointing:
                any_model.train().activation_checkpointing_enable()
            any_model(token_ids, labels=token_ids, use_cache=False).loss.backward()
            n_checked = 0
            for name, module in any_model.named_modules():
                if not isinstance(module, PartialExperts):
                    continue
                for own, part in module.parts().items():
                    whole = reference.get_parameter(f"{name}.{own}").grad
                    expected = part.rows_of(whole)[part.trained]
                    torch.testing.assert_close(part.block.grad, expected, rtol=1e-4, atol=1e-5)
                    n_checked += 1
            assert n_checked == 3 * (3 if any_model.config.model_type == "gpt_oss" else 2)
        any_model.eval().activation_checkpointing_disable()


@pytest.mark.parametrize("rest", [False, True])
@pytest.mark.parametrize("share", SHARES.values(), ids=SHARES)
def test_training_equals_full_training_with_masked_gradients(any_model, share, rest):
    """In float64, which only the eager function takes."""
    any_model.set_experts_implementation("eager")
    training_equals_masked_gradients(any_model, adamw(decay=0.0), torch.float64, share, rest)


@pytest.mark.parametrize("rest", [False, True])
@pytest.mark.parametrize("share", SHARES.values(), ids=SHARES)
@pytest.mark.parametrize("name", sorted({*mixtures.LAYOUTS} - {"gpt_oss"}))
def test_under_autocast_too(name, share, rest):
    """Not gpt-oss: its activations have kinks, on another side of which bfloat16 may come down."""
    equals_under_autocast(tiny_model(name), share, rest)


def test_experts_that_share_their_weights_are_refused():
    model = tiny_model("mixtral")
    model.model.layers[1].mlp.experts.down_proj = model.model.layers[0].mlp.experts.down_proj
    before = parameters_of(model)
    with (
        pytest.raises(ValueError, match="'down_proj' of a MixtralExperts is shared"),
        training_only(model, scattered(model)),
    ):
        pass
    assert same_parameters(model, before)


def test_the_router_belongs_to_no_unit(any_model, token_ids):
    with training_only(any_model, every_unit(any_model)):
        trained = {name for name, one in any_model.named_parameters() if one.requires_grad}
    assert not [name for name in trained if "router" in name or name.endswith("gate.weight")]
    assert [name for name in trained if "experts.gate_up_proj" in name]
    with training_only(any_model, scattered(any_model).empty_set(), train_rest=True):
        rest = {name for name, one in any_model.named_parameters() if one.requires_grad}
    assert [name for name in rest if "router" in name or name.endswith("gate.weight")]
    assert not [name for name in rest if "experts.gate_up_proj" in name]


def test_an_adapter_that_would_leave_the_experts_out_is_refused(any_model, tokenizer, token_ids):
    with pytest.raises(ValueError, match="'lora' is not available for architecture") as raised:
        adapters.with_adapter(any_model, "lora", tokenizer)
    assert "\n" not in str(raised.value)
    if any_model.config.model_type == "gpt_oss":
        return  # a window of 8 tokens holds no prefix of 20
    wrapped = adapters.with_adapter(any_model, "prefix", tokenizer)
    mask = torch.ones_like(token_ids)
    wrapped(input_ids=token_ids, attention_mask=mask, labels=token_ids).loss.backward()
    assert all(one.grad.any() for one in wrapped.parameters() if one.requires_grad)


# -------------------------------------------------------------------------------------------- files


def test_a_unit_file_and_its_table_say_from_where_a_channel_is_written(qwen, tmp_path):
    about = UnitFileInfo(ModelInfo.of(qwen), {"safety": SetInfo("some units")}, {})
    chosen = scattered(qwen)
    save_units(tmp_path / "units.safetensors", {"safety": chosen}, about=about)
    file = load_units(tmp_path / "units.safetensors", fingerprints.fingerprint(qwen))
    assert file.sets["safety"].equals(chosen)
    assert file.info.model.shape == models.shape_of(qwen)
    table = unit_tables.unit_table(file)
    mlp = table[table["kind"] == "mlp"]
    routed, shared = (mlp[mlp["channel"] == channel]["module"].tolist() for channel in (95, 96))
    assert routed == [f"model.layers.{layer}.mlp.experts" for layer in range(3)]
    assert mlp["hook"].isna().all() and not table["hook"].isna().all()
    assert shared == [f"model.layers.{layer}.mlp.shared_expert.down_proj" for layer in range(3)]
    assert experts.is_fused(qwen.get_submodule(routed[0]))
