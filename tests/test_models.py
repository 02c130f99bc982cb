"""What is known about each architecture, held against its weights and its forward pass."""

import copy
import json

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from ssah_utils import models
from ssah_utils.models import KINDS, ModelShape
from tests.conftest import CONFIGS, parameters_of, same_parameters, writers_by_name

GROUPED = ModelShape("", n_layers=3, d_model=42, n_heads=6, n_kv_heads=2, head_dim=10, d_ff=70)


def test_every_supported_architecture_is_tested():
    assert CONFIGS.keys() == models.ARCHITECTURES.keys()


# ---------------------------------------------------------------------------------------------------------------- structure


@pytest.mark.parametrize("name", CONFIGS)
def test_shape(tiny_models, name):
    shape = models.shape_of(tiny_models(name))
    d_attention = 42 if name == "gpt2" else 60
    sizes = {"n_kv_heads": 6, "head_dim": 7} if name == "gpt2" else {"n_kv_heads": 2, "head_dim": 10}
    assert shape == ModelShape(name, n_layers=3, d_model=42, n_heads=6, d_ff=70, **sizes)
    assert {kind: shape.n_channels(kind) for kind in KINDS} == {"attention": d_attention, "mlp": 70}
    assert shape.n_units == 3 * (d_attention + 70)


def test_shape_where_the_configuration_leaves_sizes_out():
    config = transformers.GPT2Config(vocab_size=5, n_embd=12, n_layer=1, n_head=3, n_positions=4)
    assert models.shape_of(AutoModelForCausalLM.from_config(config)).d_ff == 48
    config = transformers.LlamaConfig(
        vocab_size=5, hidden_size=12, intermediate_size=7, num_hidden_layers=1, num_attention_heads=3
    )
    shape = models.shape_of(AutoModelForCausalLM.from_config(config))
    assert (shape.n_kv_heads, shape.head_dim) == (3, 4)


@pytest.mark.parametrize("wrong", [{"intermediate_size": 71}, {"num_attention_heads": 5}, {"head_dim": 8}], ids=str)
def test_weights_that_the_configuration_does_not_explain_are_an_error(llama, wrong):
    for name, value in wrong.items():
        setattr(llama.config, name, value)
    with pytest.raises(ValueError, match="which the configuration does not explain"):
        models.shape_of(llama)


def test_unknown_architecture_is_an_error_that_names_the_known_ones():
    config = transformers.GPTNeoXConfig(
        vocab_size=5, hidden_size=12, intermediate_size=7, num_hidden_layers=1, num_attention_heads=3
    )
    model = AutoModelForCausalLM.from_config(config)
    for question in (models.architecture_of, models.shape_of, models.blocks_of, models.fingerprint):
        with pytest.raises(ValueError, match=r"'gpt_neox' is not in ARCHITECTURES .*llama.*gpt2"):
            question(model)


def test_writers_are_found_block_by_block(any_model):
    for kind in KINDS:
        found = models.writers(any_model, kind)
        assert len(found) == len(models.blocks_of(any_model)) == 3
        assert all(a is b for a, b in zip(found, writers_by_name(any_model, kind), strict=True))


def test_backbone_is_the_model_without_its_head(any_model, token_ids):
    with torch.no_grad():
        hidden = models.backbone_of(any_model)(input_ids=token_ids, output_hidden_states=True)
        expected = any_model(input_ids=token_ids, output_hidden_states=True).hidden_states[-1]
    assert torch.equal(hidden.last_hidden_state, expected)


def test_column_weight_is_a_view_of_what_the_writer_computes(any_model):
    for kind in KINDS:
        for writer in models.writers(any_model, kind):
            weight = models.column_weight(writer)
            assert weight.data_ptr() == writer.weight.data_ptr()
            values = torch.randn(4, weight.shape[1])
            bias = 0 if writer.bias is None else writer.bias
            torch.testing.assert_close(writer(values), values @ weight.T + bias, rtol=1e-4, atol=1e-4)


def test_squared_column_norms_equal_brute_force(any_model):
    found = models.squared_column_norms(any_model)
    for kind in KINDS:
        assert found[kind].dtype == torch.float64
        for layer, writer in enumerate(writers_by_name(any_model, kind)):
            for channel in range(found[kind].shape[1]):
                alone = torch.zeros(found[kind].shape[1])
                alone[channel] = 1
                with torch.no_grad():
                    column = writer(alone[None]) - writer(torch.zeros_like(alone)[None])
                assert found[kind][layer, channel].item() == pytest.approx(column.double().square().sum().item(), rel=1e-4)


# -------------------------------------------------------------------------------------------------------------- reader rows


def test_reader_rows_by_hand():
    rows = models.reader_rows(GROUPED, "attention")
    assert rows.tolist() == [*range(10)] * 3 + [*range(10, 20)] * 3
    assert models.reader_rows(GROUPED, "mlp").tolist() == list(range(70))


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
    rows = models.reader_rows(shape, kind)
    before = writer_inputs(any_model, token_ids, layer)[kind]
    for reader in models.architecture_of(any_model).readers[kind]:
        for row in (0, shape.head_dim - 1, shape.head_dim, int(rows.max()) // 2, int(rows.max())):
            perturbed = copy.deepcopy(any_model)
            weight = models.column_weight(models.blocks_of(perturbed)[layer].get_submodule(reader.path))
            with torch.no_grad():
                weight[reader.offset(shape) + row] += torch.randn(shape.d_model, generator=torch.Generator().manual_seed(row))
            change = (writer_inputs(perturbed, token_ids, layer)[kind] - before).abs().amax((0, 1))
            assert torch.equal(change > 1e-4, rows == row), f"row {row} of {reader.path}"


def test_readers_of_fused_matrices_end_where_the_matrix_ends(any_model):
    shape = models.shape_of(any_model)
    for kind, readers in models.architecture_of(any_model).readers.items():
        last = max(readers, key=lambda reader: reader.offset(shape))
        matrix = models.column_weight(models.blocks_of(any_model)[0].get_submodule(last.path))
        assert last.offset(shape) + int(models.reader_rows(shape, kind).max()) + 1 == len(matrix)


# -------------------------------------------------------------------------------------------------------------- fingerprint


def test_fingerprint_of_a_bfloat16_copy_is_the_same(any_model):
    found = models.fingerprint(any_model)
    assert found == models.fingerprint(copy.deepcopy(any_model).bfloat16())
    assert found == models.fingerprint(copy.deepcopy(any_model).double())
    assert len(found) == 16


def test_fingerprint_changes_with_a_small_step_of_any_tensor(llama):
    original = models.fingerprint(llama)
    for name, parameter in llama.named_parameters():
        before = parameter.detach().clone()
        step = 1e-3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)).sign()
        with torch.no_grad():
            parameter += step
            assert models.fingerprint(llama) != original, name
            parameter.copy_(before)
    assert models.fingerprint(llama) == original


@pytest.mark.parametrize("part", ["first", "last"])
def test_fingerprint_looks_at_all_parts_of_a_tensor(llama, part):
    weight = llama.model.layers[0].mlp.up_proj.weight  # 70 x 42 = 2940 entries
    original = models.fingerprint(llama)
    with torch.no_grad():
        weight[slice(0, 20) if part == "first" else slice(50, 70)] += 1
    assert models.fingerprint(llama) != original


def test_fingerprints_of_different_architectures_differ(tiny_models):
    assert len({models.fingerprint(tiny_models(name)) for name in CONFIGS}) == len(CONFIGS)  # mistral has llama's weights


# ------------------------------------------------------------------------------------------------------------------ loading


def test_load_reads_a_folder(saved_llama, llama, token_ids):
    model, tokenizer = models.load(str(saved_llama))
    assert not model.training
    assert same_parameters(model, parameters_of(llama))
    assert models.fingerprint(model) == models.fingerprint(llama)
    assert tokenizer("w3 w50").input_ids == [3, 50]
    assert models.load_tokenizer(str(saved_llama))("w3").input_ids == [3]
    half, _ = models.load(str(saved_llama), dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert models.fingerprint(half) == models.fingerprint(llama)


def test_folder_without_weights_is_an_error_that_names_it(saved_llama):
    (saved_llama / "model.safetensors").unlink()
    with pytest.raises(ConnectionError, match=f"cannot load '{saved_llama}'"):
        models.load(str(saved_llama))


def test_weights_as_pickles_are_not_read(saved_llama, llama):
    (saved_llama / "model.safetensors").unlink()
    torch.save(llama.state_dict(), saved_llama / "pytorch_model.bin")
    with pytest.raises(ConnectionError, match="no safetensors"):
        models.load(str(saved_llama))


def test_resolve_folder_and_hub_id(saved_llama):
    assert models.resolve(str(saved_llama)) == str(saved_llama)
    assert models.resolve("meta-llama/Llama-2-7b-chat-hf") == "meta-llama/Llama-2-7b-chat-hf"


@pytest.mark.parametrize("name", ["nonsense", "a/b/c", "a/", "/b", "/no/where", "./a", "../a", "~/a", "a//b"])
def test_resolve_refuses_what_cannot_be_a_model(name):
    with pytest.raises(ValueError, match=f"unknown model '{name}': give 'smollm2-135m-instruct'") as raised:
        models.resolve(name)
    assert "\n" not in str(raised.value)


def test_resolve_refuses_a_folder_without_a_model(tmp_path):
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        models.resolve(str(tmp_path))


def test_unsupported_architecture_is_refused_before_it_is_loaded(saved_llama):
    models.check_reachable(str(saved_llama))
    config = json.loads((saved_llama / "config.json").read_text()) | {"model_type": "gpt_neox", "architectures": ["X"]}
    (saved_llama / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"'gpt_neox' of .* is not supported .*llama"):
        models.check_reachable(str(saved_llama))


def test_the_tiny_random_model_is_the_same_every_time(own_cache):
    random_state = torch.get_rng_state()
    (a, tokenizer), (b, _) = models.load("tiny-random-llama"), models.load("tiny-random-llama")
    assert torch.equal(torch.get_rng_state(), random_state)
    assert same_parameters(a, parameters_of(b))
    assert not a.training
    assert models.shape_of(a) == ModelShape("llama", 3, 42, 6, 2, 10, 70)
    assert len(tokenizer) == a.get_input_embeddings().weight.shape[0]
