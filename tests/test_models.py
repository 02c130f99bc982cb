"""What is known about each architecture, held against its weights and its forward pass."""

import copy

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import AutoModelForCausalLM

from ssah_utils import (
    architectures,
    fingerprints,
    interventions,
    models,
    unit_training,
    weights,
    wrappers,
)
from ssah_utils.architectures import ModelShape
from ssah_utils.per_unit import KINDS, PerUnit
from tests.conftest import COMPILED, LAYOUTS, VOCABULARY, writers_by_name
from tests.families import CONFIGS

SIZES_OF_LLAMA = {"attention": 60, "mlp": 70}

GROUPED = ModelShape("", n_layers=3, d_model=42, n_heads=6, n_kv_heads=2, head_dim=10, d_ff=70)


def test_every_supported_architecture_is_tested():
    types = [made().get_text_config(decoder=True).model_type for made in CONFIGS.values()]
    assert types == list(CONFIGS)
    assert set(types) == architectures.ARCHITECTURES.keys() - architectures.MIXTURES.keys()


# ---------------------------------------------------------------------------------------- structure


@pytest.mark.parametrize("name", LAYOUTS)
def test_shape(tiny_models, name):
    shape = models.shape_of(tiny_models(name))
    d_attention = 42 if name == "gpt2" else 60
    sizes = (
        {"n_kv_heads": 6, "head_dim": 7} if name == "gpt2" else {"n_kv_heads": 2, "head_dim": 10}
    )
    blocks = "transformer.h" if name == "gpt2" else "model.layers"
    assert shape == ModelShape(
        name, n_layers=3, d_model=42, n_heads=6, d_ff=70, blocks=blocks, **sizes
    )
    assert {kind: shape.n_channels(kind) for kind in KINDS} == {"attention": d_attention, "mlp": 70}
    assert shape.n_units == 3 * (d_attention + 70)


def test_shape_where_the_configuration_leaves_sizes_out():
    config = transformers.GPT2Config(vocab_size=5, n_embd=12, n_layer=1, n_head=3, n_positions=4)
    assert models.shape_of(AutoModelForCausalLM.from_config(config)).d_ff == 48
    config = transformers.LlamaConfig(
        vocab_size=5,
        hidden_size=12,
        intermediate_size=7,
        num_hidden_layers=1,
        num_attention_heads=3,
    )
    shape = models.shape_of(AutoModelForCausalLM.from_config(config))
    assert (shape.n_kv_heads, shape.head_dim) == (3, 4)


@pytest.mark.parametrize(
    "wrong", [{"intermediate_size": 71}, {"num_attention_heads": 5}, {"head_dim": 8}], ids=str
)
def test_weights_that_the_configuration_does_not_explain_are_an_error(llama, wrong):
    for name, value in wrong.items():
        setattr(llama.config, name, value)
    with pytest.raises(ValueError, match="which the configuration does not explain"):
        models.shape_of(llama)


def test_unknown_architecture_is_an_error_that_names_the_known_ones():
    config = transformers.OpenAIGPTConfig(
        vocab_size=5, n_embd=12, n_layer=2, n_head=3, n_positions=4
    )
    model = AutoModelForCausalLM.from_config(config)
    for question in (
        models.architecture_of,
        models.shape_of,
        models.blocks_of,
        fingerprints.fingerprint,
    ):
        with pytest.raises(ValueError, match=r"'openai-gpt' is not in .*llama.*gpt2") as raised:
            question(model)
        assert str(raised.value).endswith("attn.c_attn, attn.c_proj, mlp.c_fc, mlp.c_proj")
        assert "\n" not in str(raised.value)


def test_writers_are_found_block_by_block(any_model):
    for kind in KINDS:
        found = [writer.module for writer in models.writers(any_model, kind)]
        assert len(found) == len(models.blocks_of(any_model)) == 3
        assert all(a is b for a, b in zip(found, writers_by_name(any_model, kind), strict=True))


def test_backbone_is_the_model_without_its_head(any_model, token_ids):
    with torch.no_grad():
        hidden = models.backbone_of(any_model)(input_ids=token_ids, output_hidden_states=True)
        expected = any_model(input_ids=token_ids, output_hidden_states=True).hidden_states[-1]
    assert torch.equal(hidden.last_hidden_state, expected)


def test_column_weight_is_a_view_of_what_the_writer_computes(any_model):
    for kind in KINDS:
        for writer in writers_by_name(any_model, kind):
            weight = models.column_weight(writer)
            assert weight.data_ptr() == writer.weight.data_ptr()
            values = torch.randn(4, weight.shape[1])
            bias = 0 if writer.bias is None else writer.bias
            torch.testing.assert_close(
                writer(values), values @ weight.T + bias, rtol=1e-4, atol=1e-4
            )


def test_squared_column_norms_equal_brute_force(any_model):
    found = weights.squared_column_norms(any_model)
    for kind in KINDS:
        assert found[kind].dtype == torch.float64
        for layer, writer in enumerate(writers_by_name(any_model, kind)):
            for channel in range(found[kind].shape[1]):
                alone = torch.zeros(found[kind].shape[1])
                alone[channel] = 1
                with torch.no_grad():
                    column = writer(alone[None]) - writer(torch.zeros_like(alone)[None])
                assert found[kind][layer, channel].item() == pytest.approx(
                    column.double().square().sum().item(), rel=1e-4
                )


# -------------------------------------------------------------------------------------- reader rows


def test_value_rows_by_hand():
    """Six query heads of ten channels share two heads of keys and values."""
    first, second = list(range(10)), list(range(10, 20))
    assert architectures.values_alone(GROUPED).tolist() == first * 3 + second * 3
    # 60 rows of queries, 20 of keys, 20 of values
    last = [[row + 80 for row in rows] for rows in (first, second)]
    assert architectures.values_last(GROUPED).tolist() == last[0] * 3 + last[1] * 3
    # 30 rows of queries, 10 of a key, 10 of a value, and the same again
    by_group = [list(range(40, 50)), list(range(90, 100))]
    assert architectures.values_by_group(GROUPED).tolist() == by_group[0] * 3 + by_group[1] * 3


def test_feed_forward_rows_by_hand():
    assert architectures.in_order(GROUPED).tolist() == list(range(70))
    assert architectures.second_half(GROUPED).tolist() == list(range(70, 140))


def test_a_row_is_owned_by_a_set_that_holds_all_its_channels():
    rows = torch.tensor([1, 1, 2, 4])  # rows 0, 3 and 5 feed nothing
    for units, owned in {(0, 1): [1], (0,): [], (0, 2): [2], (0, 1, 2, 3): [1, 2, 4]}.items():
        chosen = torch.zeros(4, dtype=torch.bool)
        chosen[list(units)] = True
        assert models.owned_rows(rows, chosen, 6).nonzero().flatten().tolist() == owned


def writer_inputs(model: nn.Module, ids: Tensor, layer: int) -> dict[str, Tensor]:
    """What the writers of one block read: {kind: (B, T, n_channels)}."""
    seen: dict[str, Tensor] = {}
    handles = [
        writers_by_name(model, kind)[layer].register_forward_hook(
            lambda module, args, output, kind=kind: seen.update({kind: args[0].clone()})
        )
        for kind in KINDS
    ]
    with torch.no_grad():
        model(input_ids=ids)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("kind", KINDS)
def test_a_reader_row_reaches_only_the_channels_that_map_to_it(any_model, token_ids, kind):
    layer = 1
    shape = models.shape_of(any_model)
    before = writer_inputs(any_model, token_ids, layer)[kind]
    for reader in models.architecture_of(any_model).readers[kind]:
        rows = reader.rows(shape)
        distinct = rows.unique()
        places = (0, shape.head_dim - 1, shape.head_dim, len(distinct) // 2, -1)
        for row in distinct[list(places)].tolist():
            perturbed = copy.deepcopy(any_model)
            weight = models.column_weight(
                models.blocks_of(perturbed)[layer].get_submodule(reader.path)
            )
            with torch.no_grad():
                weight[row] += torch.randn(
                    shape.d_model, generator=torch.Generator().manual_seed(row)
                )
            change = (writer_inputs(perturbed, token_ids, layer)[kind] - before).abs().amax((0, 1))
            assert torch.equal(change > 1e-4, rows == row), f"row {row} of {reader.path}"


def test_readers_of_fused_matrices_end_where_the_matrix_ends(any_model):
    shape = models.shape_of(any_model)
    for readers in models.architecture_of(any_model).readers.values():
        last = max(readers, key=lambda reader: int(reader.rows(shape).max()))
        matrix = models.column_weight(models.blocks_of(any_model)[0].get_submodule(last.path))
        assert int(last.rows(shape).max()) + 1 == len(matrix)


# -------------------------------------------------------------------------------------- fingerprint


def test_fingerprint_of_a_bfloat16_copy_is_the_same(any_model):
    found = fingerprints.fingerprint(any_model)
    assert found == fingerprints.fingerprint(copy.deepcopy(any_model).bfloat16())
    assert found == fingerprints.fingerprint(copy.deepcopy(any_model).double())
    assert len(found) == 16


def one_step(values: Tensor, index: int) -> None:
    """Change one entry, in place, by one step of bfloat16."""
    flat = values.detach().view(-1)
    flat[index] = (flat[index].bfloat16().view(torch.int16) + 1).view(torch.bfloat16).to(flat.dtype)


def test_fingerprint_sees_one_step_of_one_entry_of_any_tensor(any_model):
    original = fingerprints.fingerprint(any_model)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in any_model.named_parameters():
        for index in (
            0,
            parameter.numel() - 1,
            int(torch.randint(parameter.numel(), (), generator=generator)),
        ):
            before = parameter.detach().clone()
            one_step(parameter, index)
            assert fingerprints.fingerprint(any_model) != original, (name, index)
            parameter.data.copy_(before)
    assert fingerprints.fingerprint(any_model) == original


def test_fingerprint_sees_every_column_of_every_writer(llama):
    seen = {fingerprints.fingerprint(llama)}
    n_columns = 0
    for kind in KINDS:
        for writer in writers_by_name(llama, kind)[:2]:
            for column in range(writer.weight.shape[1]):
                before = writer.weight.detach()[:, column].clone()
                writer.weight.data[:, column] = 0
                seen.add(fingerprints.fingerprint(llama))
                writer.weight.data[:, column] = before
                n_columns += 1
    assert n_columns == 2 * (60 + 70) and len(seen) == 1 + n_columns


def test_fingerprint_sees_two_entries_that_change_places(llama):
    original = fingerprints.fingerprint(llama)
    weight = llama.model.layers[1].mlp.up_proj.weight.data
    weight[3, 4], weight[4, 3] = weight[4, 3].clone(), weight[3, 4].clone()
    assert fingerprints.fingerprint(llama) != original


def test_fingerprint_sees_buffers_that_are_saved_and_nothing_below_bfloat16(llama):
    original = fingerprints.fingerprint(llama)
    with torch.no_grad():
        for parameter in llama.parameters():
            parameter.copy_(parameter.bfloat16())
        assert fingerprints.fingerprint(llama) == original
        llama.model.norm.weight[0] *= 1 + 2**-12
    assert fingerprints.fingerprint(llama) == original
    llama.model.register_buffer("scale", torch.arange(5))
    with_buffer = fingerprints.fingerprint(llama)
    llama.model.scale[4] = 7
    assert len({original, with_buffer, fingerprints.fingerprint(llama)}) == 3


OTHER_FUNCTIONS = [
    ("llama", "rope_parameters", {"rope_theta": 20_000.0, "rope_type": "default"}),
    ("llama", "rms_norm_eps", 1e-3),
    ("llama", "hidden_act", "gelu"),
    ("mistral", "sliding_window", 8),
    ("gemma2", "final_logit_softcapping", 3.0),
    ("gemma2", "attn_logit_softcapping", 3.0),
    ("gemma2", "query_pre_attn_scalar", 7),
    ("gemma2", "layer_types", ["full_attention"] * 3),
    ("gpt2", "layer_norm_epsilon", 1e-3),
    ("gpt2", "scale_attn_by_inverse_layer_idx", True),
]


@pytest.mark.parametrize(
    ("name", "key", "value"), OTHER_FUNCTIONS, ids=lambda value: str(value)[:24]
)
def test_the_same_weights_under_another_configuration_are_another_model(
    tiny_models, name, key, value
):
    model = tiny_models(name)
    original = fingerprints.fingerprint(model)
    assert getattr(model.config, key) != value
    setattr(model.config, key, value)
    assert fingerprints.fingerprint(model) != original


def test_fingerprint_does_not_depend_on_what_changes_no_result(any_model):
    original = fingerprints.fingerprint(any_model)
    any_model.set_attn_implementation("eager")
    any_model.config.use_cache = False
    any_model.config.name_or_path = "somewhere/else"
    any_model.config.pad_token_id, any_model.config.eos_token_id = 5, [2, 6]
    any_model.config.output_hidden_states = True
    any_model.train().requires_grad_(False)
    assert fingerprints.fingerprint(any_model) == original


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fingerprint_survives_saving(any_model, tmp_path, dtype):
    original = fingerprints.fingerprint(any_model)
    any_model.to(dtype).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert fingerprints.fingerprint(loaded) == original


@pytest.mark.parametrize("name", ["gemma", "gpt2"])
def test_fingerprint_does_not_ask_where_a_matrix_is_stored(tiny_models, name):
    model = tiny_models(name)
    original = fingerprints.fingerprint(model)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    model.get_output_embeddings().weight = nn.Parameter(
        model.get_input_embeddings().weight.detach().clone()
    )
    model.config.tie_word_embeddings = False
    assert fingerprints.fingerprint(model) == original
    one_step(model.get_output_embeddings().weight, 100)
    assert fingerprints.fingerprint(model) != original


@pytest.mark.parametrize("n_rows", [1, 64, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fingerprint_of_a_model_with_a_larger_vocabulary(any_model, dtype, n_rows):
    original = fingerprints.fingerprint(any_model)
    any_model.to(dtype).resize_token_embeddings(VOCABULARY + n_rows)
    assert fingerprints.fingerprint(any_model) == original
    assert fingerprints.fingerprint(copy.deepcopy(any_model).bfloat16()) == original
    table = any_model.get_input_embeddings().weight
    # of the last row that was there before
    for entry in (VOCABULARY * 42 - 1, (VOCABULARY - 1) * 42):
        before = table.detach().clone()
        one_step(table, entry)
        assert fingerprints.fingerprint(any_model) != original
        table.data.copy_(before)
    table.data[-1] += 0.01 * table.detach().float().std()  # somebody trained it a little
    assert fingerprints.fingerprint(any_model) != original


def test_rows_that_are_far_from_zero_are_told_from_their_mean():
    for offset in (0.0, 3.0, -100.0):
        table = offset + torch.randn(300, 42, generator=torch.Generator().manual_seed(0))
        longer = torch.cat([table, table.mean(0).expand(200, 42)])
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            assert (
                len(fingerprints.trained_rows(longer.to(dtype)))
                == len(fingerprints.trained_rows(table.to(dtype)))
                == 300
            )


def test_a_smaller_vocabulary_or_one_with_random_rows_is_another_model(llama):
    found = [fingerprints.fingerprint(llama)]
    for n_rows in (VOCABULARY - 1, VOCABULARY + 1):
        twin = copy.deepcopy(llama)
        twin.resize_token_embeddings(n_rows, mean_resizing=False)
        found.append(fingerprints.fingerprint(twin))
    assert len(set(found)) == 3


@pytest.fixture
def one_process(tmp_path):
    """A process group of this process alone."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


def with_checkpointed_blocks(model: nn.Module) -> nn.Module:
    for layer, block in enumerate(model.model.layers):
        model.model.layers[layer] = checkpoint_wrapper(block)
    return model


compiled = COMPILED["whole"]
WRAPPERS = {
    **{f"compiled, {how}": compile_it for how, compile_it in COMPILED.items()},
    "checkpointed blocks": with_checkpointed_blocks,
    "data parallel": nn.DataParallel,
    "distributed": nn.parallel.DistributedDataParallel,
    "compiled, then distributed": lambda model: nn.parallel.DistributedDataParallel(
        compiled(model)
    ),
    "distributed, then compiled": lambda model: compiled(
        nn.parallel.DistributedDataParallel(model)
    ),
    "averaged": torch.optim.swa_utils.AveragedModel,
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_a_wrapped_model_is_the_model(shallow_llama, token_ids, wrap, one_process):
    llama = shallow_llama
    known = fingerprints.fingerprint(llama)
    shape = models.shape_of(llama)
    norms = weights.squared_column_norms(llama)
    with torch.no_grad():
        logits = llama(token_ids).logits
        hidden = models.backbone_of(llama)(token_ids).last_hidden_state
    wrapped = wrap(llama)
    assert type(wrappers.unwrapped(wrapped)) is type(llama)
    assert wrappers.unwrapped(wrappers.unwrapped(wrapped)) is wrappers.unwrapped(wrapped)
    assert fingerprints.fingerprint(wrapped) == known
    assert models.shape_of(wrapped) == shape
    assert all(
        torch.equal(weights.squared_column_norms(wrapped)[kind], norms[kind]) for kind in KINDS
    )
    with torch.no_grad():
        assert torch.equal(wrapped(token_ids).logits, logits)
        assert torch.equal(models.backbone_of(wrapped)(token_ids).last_hidden_state, hidden)
    one_step(writers_by_name(wrapped, "mlp")[0].weight, 11)
    assert fingerprints.fingerprint(wrapped) != known


def with_lora(model: nn.Module) -> nn.Module:
    return peft.get_peft_model(
        model, peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear")
    )


ADAPTED = {
    "lora": with_lora,
    "lora's base": lambda model: with_lora(model).get_base_model(),
    "ia3": lambda model: peft.get_peft_model(
        model,
        peft.IA3Config(
            task_type="CAUSAL_LM",
            target_modules=["v_proj", "down_proj"],
            feedforward_modules=["down_proj"],
        ),
    ),
    "prefix": lambda model: peft.get_peft_model(
        model, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    ),
    "compiled lora": lambda model: compiled(with_lora(model)),
}


@pytest.mark.parametrize("adapt", ADAPTED.values(), ids=ADAPTED)
def test_a_model_with_an_adapter_is_refused_in_one_line(llama, adapt):
    adapted = adapt(llama)
    for question in (
        fingerprints.fingerprint,
        models.shape_of,
        models.backbone_of,
        weights.squared_column_norms,
    ):
        with pytest.raises(ValueError, match=r"PEFT adapter.*merge_and_unload\(\)") as raised:
            question(adapted)
        assert "\n" not in str(raised.value)


def test_a_merged_adapter_is_a_model_of_its_own(llama):
    original = fingerprints.fingerprint(llama)
    adapted = with_lora(copy.deepcopy(llama))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data += 0.1
    merged = adapted.merge_and_unload()
    assert fingerprints.fingerprint(merged) != original
    assert fingerprints.fingerprint(with_lora(copy.deepcopy(llama)).unload()) == original


@pytest.mark.parametrize("how", ["fsdp 2", "fsdp 1", "offloaded"])
def test_values_that_are_not_all_here_are_refused_in_one_line(llama, one_process, how):
    if how == "fsdp 2":
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        sharded = torch.distributed.fsdp.fully_shard(llama, mesh=mesh)
    elif how == "fsdp 1":
        sharded = torch.distributed.fsdp.FullyShardedDataParallel(
            llama, device_id=torch.device("cpu")
        )
    else:
        sharded = llama
        llama.model.layers[1].mlp.to("meta")
    for question in (
        fingerprints.fingerprint,
        weights.squared_column_norms,
        weights.mean_absolute_columns,
    ):
        with pytest.raises(ValueError, match="sharded or offloaded") as raised:
            question(sharded)
        assert "\n" not in str(raised.value)


def test_what_is_no_language_model_is_refused_in_one_line():
    for other in (nn.Linear(2, 2), nn.DataParallel(nn.Linear(2, 2)), compiled(nn.Linear(2, 2))):
        with pytest.raises(ValueError, match="a Linear is no Hugging Face language model"):
            fingerprints.fingerprint(other)


def test_what_is_no_module_any_more_is_refused_in_one_line(llama):
    """Compiled twice, a model is a function."""
    with pytest.raises(
        ValueError, match=r"is no Hugging Face language model, nor a wrapper around one$"
    ):
        wrappers.unwrapped(torch.compile(torch.compile(llama, backend="eager"), backend="eager"))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_codes_that_nothing_computes_with_are_refused(llama, dtype):
    for writer in writers_by_name(llama, "mlp"):
        writer.weight = nn.Parameter(writer.weight.detach().to(dtype), requires_grad=False)
    assert models.shape_of(llama).d_ff == SIZES_OF_LLAMA["mlp"]  # read without the weights
    with pytest.raises(ValueError, match="holds quantised weights that cannot be read here"):
        weights.squared_column_norms(llama)


def test_a_model_in_training_by_units_is_known_by_its_weights(llama, token_ids):
    original = fingerprints.fingerprint(llama)
    generator = torch.Generator().manual_seed(0)
    frozen = (
        PerUnit({kind: torch.rand(3, n, generator=generator) for kind, n in SIZES_OF_LLAMA.items()})
        < 0.3
    )
    with unit_training.freezing(llama, frozen):
        assert fingerprints.fingerprint(llama) == original
        optimizer = torch.optim.SGD([p for p in llama.parameters() if p.requires_grad], lr=0.1)
        llama(token_ids, labels=token_ids).loss.backward()
        optimizer.step()
        inside = fingerprints.fingerprint(llama)
    assert inside == fingerprints.fingerprint(llama) != original


def test_a_model_with_units_held_is_another_one(llama):
    nothing = PerUnit(
        {kind: torch.zeros(3, n, dtype=torch.bool) for kind, n in SIZES_OF_LLAMA.items()}
    )
    found = [fingerprints.fingerprint(llama)]
    for kind, layer, channel in (("mlp", 0, 3), ("mlp", 0, 4), ("mlp", 1, 3), ("attention", 0, 3)):
        one = nothing.map(torch.clone)
        one[kind][layer, channel] = True
        for fill in (None, (~nothing).map(torch.Tensor.float)):
            with interventions.ablated(llama, one, fill):
                found.append(fingerprints.fingerprint(llama))
    assert len(set(found)) == len(found) == 9
    assert fingerprints.fingerprint(llama) == found[0]


def test_fingerprints_of_different_architectures_differ(tiny_models):
    # mistral has llama's weights
    assert len({fingerprints.fingerprint(tiny_models(name)) for name in LAYOUTS}) == len(LAYOUTS)
