"""Models whose matrices are codes: what they mean, what can be asked of them, what is refused.

Oracles are the public definitions of the formats, written out here, and an ordinary model with the
numbers that the codes stand for.
"""

import copy
import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, TorchAoConfig

from ssah_utils import (
    activations,
    adapters,
    attribution,
    embedded,
    evaluation,
    fingerprints,
    interventions,
    loading,
    models,
    precision,
    quantised,
    quantisers,
    training,
    unit_training,
    weights,
)
from ssah_utils.files import LIBRARIES, installed_versions
from ssah_utils.per_unit import KINDS, PerUnit
from ssah_utils.pipeline import parameters, upstream
from ssah_utils.pipeline.runs import Run
from ssah_utils.precision import Quantised
from ssah_utils.settings import SFTConfig
from tests.conftest import VOCABULARY, n_hooks, tiny_model
from tests.families import SPECIAL
from tests.test_loading import change_json, one_line

GROUP = 32  # inputs that share a scale in GPTQ and AWQ
NF4 = (
    "-1.0 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453 -0.28444138169288635"
    " -0.18477343022823334 -0.09105003625154495 0.0 0.07958029955625534 0.16093020141124725"
    " 0.24611230194568634 0.33791524171829224 0.44070982933044434 0.5626170039176941"
    " 0.7229568362236023 1.0"
)  # Dettmers et al. (2023), appendix E


def needs(*libraries: str) -> pytest.MarkDecorator:
    """Skips where one of them is not installed."""
    lacking = [library for library in libraries if find_spec(library) is None]
    return pytest.mark.skipif(bool(lacking), reason=f"{', '.join(lacking)} not installed")


def test_results_depend_on_the_version_of_whatever_reads_codes():
    libraries = {one for method in quantisers.METHODS.values() for one in method.libraries}
    assert libraries <= set(LIBRARIES)
    versions = installed_versions(libraries)  # by the names that are imported
    assert all(versions[name] for name in libraries if find_spec(name))


BITSANDBYTES = needs("accelerate", "bitsandbytes")


def wide_llama() -> nn.Module:
    """Sizes that every method can pack; random biases, so that none is trivially zero."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        **sizes,
        **heads,
        **SPECIAL,
        attention_bias=True,
        mlp_bias=True,
        max_position_embeddings=64,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn_like(parameter)
                parameter.copy_(parameter + 0.3 * noise if parameter.ndim == 1 else 0.1 * noise)
    return model.eval()


@pytest.fixture
def folder(tmp_path, tokenizer) -> Path:
    """The wide Llama, saved."""
    place = tmp_path / "wide"
    wide_llama().save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


def matrices(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_modules() if name.endswith("_proj")]


def with_weights(numbers: dict[str, Tensor]) -> nn.Module:
    """An ordinary wide Llama, in float32, with these matrices."""
    model = wide_llama()
    for name, weight in numbers.items():
        model.get_submodule(name).weight.data = weight.float()
    return model


def some_units(model: nn.Module, share: float = 0.2) -> PerUnit:
    shape, generator = models.shape_of(model), torch.Generator().manual_seed(5)
    sizes = {kind: (shape.n_layers, shape.n_channels(kind)) for kind in KINDS}
    return (
        PerUnit({kind: torch.rand(size, generator=generator) for kind, size in sizes.items()})
        < share
    )


# ------------------------------------------------------------- definitions of formats, written out


def of_nf4(state: dict[str, Tensor], name: str) -> Tensor:
    """Two codes a byte, the first one in the upper half; a scale for 64 of them."""
    n_outputs = len(state[f"{name}.bias"])
    table = torch.tensor([float(value) for value in NF4.split()])
    packed = state[f"{name}.weight"].flatten()
    codes = torch.stack([packed >> 4, packed & 15], 1).flatten().long()
    scales = state[f"{name}.weight.absmax"].float()
    return (table[codes].view(-1, 64) * scales[:, None]).view(n_outputs, -1)


def of_int8(state: dict[str, Tensor], name: str) -> Tensor:
    """Whole numbers up to 127, which is the largest magnitude of a row."""
    return state[f"{name}.weight"].float() * state[f"{name}.SCB"].float()[:, None] / 127


def grouped(weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four-bit codes with a zero point: codes, zeros, scales, and the numbers that they mean."""
    groups = weight.unflatten(1, (-1, GROUP))
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scales = ((high - low) / 15).half().float()
    zeros = (-low / scales).round().clamp(1, 15)
    codes = (groups / scales[..., None] + zeros[..., None]).round().clamp(0, 15)
    numbers = ((codes - zeros[..., None]) * scales[..., None]).flatten(1)
    return codes.flatten(1).long(), zeros.long(), scales, numbers


def packed(codes: Tensor, order: tuple[int, ...] = tuple(range(8))) -> Tensor:
    """Eight four-bit codes of a row in one 32-bit number, the first in the lowest bits."""
    eights = codes.unflatten(1, (-1, 8))
    total = sum(eights[..., place] << (4 * bits) for bits, place in enumerate(order))
    return torch.where(total >= 2**31, total - 2**32, total).to(torch.int32)


def as_gptq(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Packed along the inputs; zero points are stored less one."""
    codes, zeros, scales, numbers = grouped(weight)
    return {
        "qweight": packed(codes).T,
        "qzeros": packed(zeros.T - 1),
        "scales": scales.T.half(),
        "g_idx": (torch.arange(weight.shape[1]) // GROUP).int(),
    }, numbers


def as_awq(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Packed along the outputs, in an order that suits the kernel."""
    codes, zeros, scales, numbers = grouped(weight)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    return {
        "qweight": packed(codes.T, order),
        "qzeros": packed(zeros.T, order),
        "scales": scales.T.half(),
    }, numbers


def as_fp8(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Eight-bit floats; a scale for 64 x 128 of them."""
    blocks = weight.unflatten(1, (-1, 128)).unflatten(0, (-1, 64))
    scales = blocks.abs().amax((1, 3)) / 448
    codes = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn)
    numbers = (codes.float() * scales[:, None, :, None]).reshape(weight.shape)
    return {"weight": codes.reshape(weight.shape), "weight_scale_inv": scales}, numbers


def as_compressed(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """compressed-tensors, packed: four bits around zero, a scale for 32 inputs."""
    groups = weight.unflatten(1, (-1, GROUP))
    scales = groups.abs().amax(-1) / 7
    codes = (groups / scales[..., None]).round().clamp(-8, 7)
    stored = {
        "weight_packed": packed(codes.flatten(1).long() + 8),
        "weight_scale": scales,
        "weight_shape": torch.tensor(weight.shape),
    }
    return stored, (codes * scales[..., None]).flatten(1)


OF_COMPRESSED = {
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": 4,
                "type": "int",
                "symmetric": True,
                "strategy": "group",
                "group_size": GROUP,
                "dynamic": False,
            },
        }
    },
}
STORED = {  # method: how a matrix is stored, what the configuration says, what reads it
    "gptq": (
        as_gptq,
        {"bits": 4, "group_size": GROUP, "desc_act": False, "sym": False},
        needs("gptqmodel", "optimum"),
    ),
    "awq": (
        as_awq,
        {"bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True},
        needs("gptqmodel"),
    ),
    "fp8": (as_fp8, {"activation_scheme": "dynamic", "weight_block_size": [64, 128]}, needs()),
    "compressed-tensors": (as_compressed, OF_COMPRESSED, needs("compressed_tensors")),
}


def store_as(folder: Path, method: str) -> nn.Module:
    """Rewrite a saved model in a method's own format; the ordinary model with what that means."""
    store, says, _ = STORED[method]
    tensors, numbers = load_file(folder / "model.safetensors"), {}
    for name in matrices(wide_llama()):
        codes, numbers[name] = store(tensors.pop(f"{name}.weight"))
        tensors |= {f"{name}.{part}": value.contiguous() for part, value in codes.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    change_json(folder / "config.json", quantization_config={"quant_method": method, **says})
    return with_weights(numbers)


KEPT = [pytest.param(method, marks=STORED[method][2]) for method in ("gptq", "awq")]
MADE = [pytest.param(method, marks=STORED[method][2]) for method in ("fp8", "compressed-tensors")]
CODES = {"nf4": of_nf4, "int8": of_int8}
IN_CODES = [pytest.param(codes, marks=BITSANDBYTES) for codes in CODES]


def as_codes(folder: Path, codes: str, dtype: torch.dtype = torch.float32):
    """A saved model loaded as codes, and the ordinary one with the numbers they stand for."""
    model, _ = loading.load(str(folder), Quantised(codes, dtype))
    state = model.state_dict()
    return model, with_weights({name: CODES[codes](state, name) for name in matrices(model)})


# ------------------------------------------------------------------------ what the codes stand for


@pytest.mark.parametrize("codes", IN_CODES)
def test_columns_are_the_numbers_that_the_codes_stand_for(folder, codes):
    model, reference = as_codes(folder, codes)
    for name in matrices(model):
        found = models.column_weight(model.get_submodule(name))
        expected = reference.get_submodule(name).weight
        # int8 is computed by bitsandbytes with a constant of seven digits
        assert torch.allclose(found, expected, rtol=3e-5, atol=0), name
    original = models.column_weight(wide_llama().model.layers[0].mlp.down_proj)
    assert not torch.equal(original, models.column_weight(model.model.layers[0].mlp.down_proj))


@BITSANDBYTES
def test_codes_stay_as_they_were_stored_whatever_the_processor_has(folder, monkeypatch):
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    model, _ = loading.load(str(folder), Quantised("nf4", torch.float32))
    before = fingerprints.fingerprint(model)
    with torch.no_grad():
        model(input_ids=torch.arange(3, 9)[None])
    assert fingerprints.fingerprint(model) == before


@pytest.mark.parametrize("codes", IN_CODES)
def test_columns_are_those_of_the_librarys_own_function(folder, codes):
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    model, _ = as_codes(folder, codes)
    for name in matrices(model):
        module = model.get_submodule(name)
        expected = dequantize_bnb_weight(module.weight, getattr(module, "state", None))
        assert torch.allclose(models.column_weight(module), expected, rtol=3e-5, atol=0), name


@BITSANDBYTES
def test_codes_whose_scales_are_codes_are_read_too(folder, tmp_path):
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    twice = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_use_double_quant=True)
    stored = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=twice, device_map={"": "cpu"}
    )
    stored.save_pretrained(tmp_path / "twice")
    loading.load_tokenizer(str(folder)).save_pretrained(tmp_path / "twice")
    loading.check_reachable(str(tmp_path / "twice"))
    model, _ = loading.load(str(tmp_path / "twice"))
    assert fingerprints.fingerprint(model) == fingerprints.fingerprint(stored)
    for name in matrices(model):
        module = model.get_submodule(name)
        expected = dequantize_bnb_weight(module.weight)
        assert torch.equal(models.column_weight(module), expected), name


@BITSANDBYTES
def test_a_matrix_of_gpt2_is_read_as_it_stands_afterwards(tmp_path, tokenizer):
    """GPT-2 stores (in, out), its codes are of (out, in)."""
    tiny_model("gpt2").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, _ = loading.load(str(tmp_path), Quantised("int8", torch.float32))
    original = tiny_model("gpt2")
    for kind in KINDS:
        pairs = zip(models.writers(model, kind), models.writers(original, kind), strict=True)
        for writer, writer_before in pairs:
            module, before = writer.module, writer_before.module
            found, expected = models.column_weight(module), models.column_weight(before)
            assert type(module) is not type(before)
            assert models.matrix_size(module) == tuple(found.shape) == tuple(expected.shape)
            assert (found - expected).abs().max() <= 0.006 * expected.abs().max()


@pytest.mark.parametrize("method", KEPT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stored_codes_are_read_before_and_after_kernels_repack_them(folder, method, dtype):
    reference = store_as(folder, method)
    loading.check_reachable(str(folder))
    model, _ = loading.load(str(folder), dtype)
    known, ids = fingerprints.fingerprint(model), torch.tensor([[5, 6, 7]])
    rounding = {torch.float32: 2**-10, torch.bfloat16: 2**-7}[dtype]
    norms = weights.squared_column_norms(reference)
    for _ in range(2):
        for name in matrices(model):
            found = models.column_weight(model.get_submodule(name), dtype).float()
            error = (found - reference.get_submodule(name).weight).abs().max()
            assert error <= rounding * found.abs().max(), name
        relative = (weights.squared_column_norms(model) - norms) / norms
        assert all(relative[kind].abs().max() < rounding for kind in KINDS)
        assert fingerprints.fingerprint(model) == known != fingerprints.fingerprint(reference)
        with torch.no_grad():
            found, expected = model(ids).logits, reference(ids).logits
        assert (found - expected).abs().max() < 4 * rounding * expected.abs().max()


@pytest.mark.parametrize("method", MADE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_some_methods_ordinary_weights_are_made(folder, method, dtype, token_ids):
    reference = store_as(folder, method)
    loading.check_reachable(str(folder))
    model, _ = loading.load(str(folder), dtype)
    assert not list(quantised.quantised_modules(model))
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    same = {name: one.to(dtype) for name, one in reference.named_parameters()}
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, same[name]), name
    with torch.no_grad():
        model(token_ids)
    with unit_training.freezing(model, some_units(model)):
        pass
    interventions.without_units(model, some_units(model))


TENSORS = {
    "quanto": ("optimum.quanto", lambda model: of_quanto(model)),
    "torchao": ("torchao", lambda model: of_torchao(model)),
    "torchao, inputs rounded too": ("torchao", lambda model: of_torchao(model, dynamic=True)),
}


def of_quanto(model: nn.Module) -> None:
    from optimum import quanto

    quanto.quantize(model.model, weights=quanto.qint8)
    quanto.freeze(model.model)


def of_torchao(model: nn.Module, dynamic: bool = False) -> None:
    from torchao import quantization as ao

    config = ao.Int8DynamicActivationInt8WeightConfig if dynamic else ao.Int8WeightOnlyConfig
    ao.quantize_(model.model, config())


@pytest.mark.parametrize(("library", "quantise"), TENSORS.values(), ids=TENSORS)
def test_weights_that_are_tensors_of_their_own_kind_are_read(library, quantise, token_ids):
    pytest.importorskip(library)
    model, original = wide_llama(), wide_llama()
    quantise(model)
    known = fingerprints.fingerprint(model)
    numbers = {name: models.column_weight(model.get_submodule(name)) for name in matrices(model)}
    for name, found in numbers.items():
        expected = original.get_submodule(name).weight
        assert 0 < (found - expected).abs().max() < 0.006 * expected.abs().max(), name
    reference = with_weights(numbers)
    same = weights.squared_column_norms(model)
    assert all(
        torch.equal(same[kind], of) for kind, of in weights.squared_column_norms(reference).items()
    )
    units = some_units(model)
    with (
        torch.no_grad(),
        interventions.ablated(model, units),
        interventions.ablated(reference, units),
    ):
        found, expected = model(token_ids).logits, reference(token_ids).logits
    assert (found - expected).abs().max() < 0.05 * expected.abs().max()
    assert fingerprints.fingerprint(model) == known != fingerprints.fingerprint(original)
    for attempt in REFUSED.values():
        with pytest.raises(ValueError, match="quantised"):
            attempt(model)


@needs("torchao")
def test_a_checkpoint_of_torchao_is_read(folder, tmp_path, tokenizer):
    from torchao import quantization as ao

    as_bytes = TorchAoConfig(ao.Int8WeightOnlyConfig())
    stored = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=as_bytes
    )
    stored.save_pretrained(tmp_path / "stored")
    tokenizer.save_pretrained(tmp_path / "stored")
    loading.check_reachable(str(tmp_path / "stored"))
    model, _ = loading.load(str(tmp_path / "stored"))
    assert [name for name, _ in quantised.quantised_modules(model)] == matrices(model)
    assert fingerprints.fingerprint(model) == fingerprints.fingerprint(stored)


class Rounding(nn.Module):
    """Rounds its inputs to a scale that was fixed before; its codes are ordinary."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias, self.scale = 8, 4, None, scale
        self.register_buffer("codes", torch.randint(-9, 9, (4, 8), dtype=torch.int8))

    def forward(self, values: Tensor) -> Tensor:
        rounded = (values / self.scale).round().clamp(-127, 127) * self.scale
        return rounded @ self.codes.T.to(values.dtype)


@pytest.mark.parametrize("scale", [0.4, 0.005])
def test_a_map_that_rounds_its_inputs_to_a_fixed_scale_is_refused(scale):
    with pytest.raises(ValueError, match="rounds its inputs to a fixed scale") as raised:
        models.column_weight(Rounding(scale))
    one_line(raised.value)
    exact = Rounding(0.01)  # of which 0.75 and 1 are multiples within its range
    assert torch.allclose(models.column_weight(exact), exact.codes.float())


def test_codes_in_what_is_no_linear_map_are_refused():
    experts = nn.Module()
    experts.register_buffer("codes", torch.zeros(2, 4, 4, dtype=torch.uint8))
    for question in (models.column_weight, models.matrix_size):
        with pytest.raises(ValueError, match="no linear map, so no column can be read") as raised:
            question(experts)
        one_line(raised.value)


def test_masks_and_positions_are_no_codes(any_model):
    assert not list(quantised.quantised_modules(any_model))


# -------------------------------------------------------------------------------- what can be asked


@pytest.fixture(params=IN_CODES)
def pair(request, folder) -> tuple[str, nn.Module, nn.Module]:
    return request.param, *as_codes(folder, request.param)


# nf4 is multiplied as the numbers that it stands for; int8 rounds its inputs, too
ROUNDING = {"nf4": 1e-5, "int8": 0.05}


def is_close(codes: str, found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).abs().max() <= ROUNDING[codes] * expected.abs().max())


def test_scores_are_those_of_the_numbers(pair, token_ids):
    codes, model, reference = pair
    batch = {"input_ids": token_ids, "attention_mask": torch.ones_like(token_ids)}
    batch["positions"] = batch["attention_mask"].bool()
    found, expected = (activations.channel_moments(one, [batch]) for one in (model, reference))
    slopes = [activations.gradient_activation(one, [batch]) for one in (model, reference)]
    norms = [weights.squared_column_norms(one) for one in (model, reference)]
    sizes = [weights.mean_absolute_columns(one) for one in (model, reference)]
    for kind in KINDS:
        assert is_close(codes, found.variance[kind].sqrt(), expected.variance[kind].sqrt())
        assert is_close(codes, slopes[0][kind], slopes[1][kind])
        assert torch.allclose(norms[0][kind], norms[1][kind], rtol=1e-4)
        assert torch.allclose(sizes[0][kind], sizes[1][kind], rtol=1e-4)
    assert n_hooks(model) == 0
    assert not any(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("with_means", [False, True])
def test_ablation_is_that_of_the_numbers(pair, token_ids, with_means):
    codes, model, reference = pair
    units = some_units(model)
    means = units.map(torch.Tensor.float) * 0.3 if with_means else None
    smaller = interventions.without_units(reference, units, means)
    with torch.no_grad():
        whole = model(token_ids).logits
        with interventions.ablated(model, units, means):
            found = model(token_ids).logits
        assert is_close(codes, found, smaller(token_ids).logits)
        assert not is_close(codes, found, whole)
        assert torch.equal(model(token_ids).logits, whole)


def test_answers_and_margins_are_those_of_the_numbers(pair, tokenizer):
    codes, model, reference = pair
    prompts = ["w3 w50 w9", "w7 w8", "w11 w12 w13 w14"]
    asked = copy.deepcopy(tokenizer)
    asked.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    log_p = [
        evaluation.opening_log_probabilities(one, asked, prompts, ["w5 w6", "w20 w21 w22"])
        for one in (model, reference)
    ]
    assert is_close(codes, *(torch.as_tensor(np.asarray(one)) for one in log_p))
    answers = evaluation.generate(model, asked, prompts, max_new_tokens=6)
    again = evaluation.generate(model, asked, prompts, max_new_tokens=6)
    assert answers == again and len(answers) == 3
    if codes == "nf4":
        assert answers == evaluation.generate(reference, asked, prompts, max_new_tokens=6)


@BITSANDBYTES
def test_a_rounded_input_depends_on_the_others_so_int8_is_ablated_but_not_cut(folder, token_ids):
    """What is zeroed no longer sets the scale to which a token's other channels are rounded."""
    model, reference = as_codes(folder, "int8")
    writer, exact = (one.model.layers[0].mlp.down_proj for one in (model, reference))
    values = torch.full((1, 256), 0.01)
    values[0, 0] = 5.0
    errors = {}
    for case in ("with", "without"):
        error = (writer.forward(values) - exact(values)).abs().max()
        errors[case] = float(error / values[0, 1:].norm())
        values[0, 0] = 0.0
    assert errors["with"] > 20 * errors["without"]


@BITSANDBYTES
def test_an_adapter_of_a_quantised_model_is_trained(folder, tokenizer):
    model, _ = as_codes(folder, "nf4")
    before = fingerprints.fingerprint(model)
    examples = [{"input_ids": [5, 6, 7, 8], "labels": [-100, 6, 7, 8]}] * 4
    config = SFTConfig(learning_rate=0.01, max_steps=4, batch_size=2)
    wrapped = adapters.with_adapter(model, "lora", tokenizer)
    losses = training.train_sft(wrapped, tokenizer, examples, config)
    assert losses[-1] < losses[0]
    assert fingerprints.fingerprint(wrapped.unload()) == before


# -------------------------------------------------------------------------------- which model it is


def test_a_quantised_model_is_known_by_its_codes_and_scales(pair, tmp_path, tokenizer, token_ids):
    codes, model, reference = pair
    known = fingerprints.fingerprint(model)
    with torch.no_grad():
        model(token_ids)
    assert fingerprints.fingerprint(model) == known != fingerprints.fingerprint(reference)
    assert fingerprints.fingerprint(copy.deepcopy(model)) == known
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    assert fingerprints.fingerprint(loading.load(str(tmp_path / "saved"))[0]) == known
    module = model.model.layers[1].mlp.down_proj
    part = module.weight.data
    part[3, 0] += 1
    assert fingerprints.fingerprint(model) != known
    part[3, 0] -= 1
    assert fingerprints.fingerprint(model) == known
    scales = module.state.SCB if codes == "int8" else module.weight.quant_state.absmax
    scales[2] *= 1.01
    assert fingerprints.fingerprint(model) != known


# ---------------------------------------------------------------------------------- what is refused


def train(model: nn.Module) -> None:
    training.train_sft(model, None, [], SFTConfig())


def prefer(model: nn.Module) -> None:
    training.train_dpo(model, None, [], SFTConfig())


def enter(block) -> None:
    with block:
        pytest.fail("entered")


REFUSED = {
    "training some units": lambda model: enter(
        unit_training.training_only(model, some_units(model))
    ),
    "freezing some units": lambda model: enter(unit_training.freezing(model, some_units(model))),
    "training": train,
    "training by preference": prefer,
    "gradients of weights": lambda model: attribution.unit_gradients(model, []),
    "removal": lambda model: interventions.without_units(model, some_units(model)),
    "another precision": lambda model: precision.to_dtype(model, torch.bfloat16),
}


@pytest.mark.parametrize("attempt", REFUSED.values(), ids=REFUSED)
def test_what_would_change_codes_is_refused_in_one_line_and_changes_nothing(pair, attempt):
    _, model, _ = pair
    known = fingerprints.fingerprint(model)
    with pytest.raises(ValueError, match="quantised") as raised:
        attempt(model)
    one_line(raised.value)
    assert fingerprints.fingerprint(model) == known
    assert not any(one.grad is not None for one in model.parameters())


@BITSANDBYTES
def test_training_from_a_stored_quantised_model_is_refused(folder, tmp_path, tokenizer, own_cache):
    model, _ = as_codes(folder, "nf4")
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    place = str(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"is quantised: codes cannot be moved") as raised:
        training.load_or_train(place, tokenizer, [], SFTConfig())
    one_line(raised.value)
    assert not (own_cache / "trained").exists()
    again = Quantised("int8", torch.float32)
    with pytest.raises(ValueError, match=r"quantised already \(bitsandbytes\)") as raised:
        loading.load(place, again)
    one_line(raised.value)
    for stage, values in TRAINS.items():
        with pytest.raises(ValueError, match=f"^{stage} trains the model, but '.*' is quantised"):
            parameters.check_trainable(stage, values | {"model": place})
    parameters.check_trainable("04_ablation", {"model": place, "dtype": "auto"})


@pytest.mark.parametrize("method", STORED)
def test_a_library_that_is_not_installed_is_named_before_anything_is_loaded(
    folder, method, monkeypatch
):
    store_as(folder, method)
    monkeypatch.setattr(quantisers, "find_spec", lambda name: None)
    libraries = quantisers.METHODS[method].libraries
    if not libraries:
        return loading.check_reachable(str(folder))
    for attempt in (loading.check_reachable, loading.load):
        with pytest.raises(
            ValueError, match=f"with {method}, which {libraries[0]} reads: pip install"
        ) as raised:
            attempt(str(folder))
        one_line(raised.value)


@pytest.mark.parametrize("method", ["aqlm", "hqq", "quanto", "eetq", "of-next-year"])
def test_a_method_that_is_not_read_is_refused_with_those_that_are(folder, method):
    change_json(folder / "config.json", quantization_config={"quant_method": method})
    for attempt in (loading.check_reachable, loading.load):
        with pytest.raises(ValueError, match=f"{method}, which is not read .*bitsandbytes, gptq"):
            attempt(str(folder))


@BITSANDBYTES
@pytest.mark.parametrize("asked", ["load_in_4bit", "load_in_8bit"])
def test_numbers_where_codes_are_promised_are_one_line(folder, asked):
    """As of a model that was dequantised and saved with its old configuration."""
    says = {"quant_method": "bitsandbytes", asked: True}
    change_json(folder / "config.json", quantization_config=says)
    said = "is stored as numbers: take quantization_config out of it"
    with pytest.raises(ValueError, match=said) as raised:
        loading.load(str(folder))
    one_line(raised.value)


def test_codes_without_scales_are_one_line(folder):
    store_as(folder, "fp8")
    tensors = load_file(folder / "model.safetensors")
    kept = {name: one for name, one in tensors.items() if not name.endswith("_scale_inv")}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks the scales of 'model\.layers\.0\.") as raised:
        loading.load(str(folder))
    one_line(raised.value)


@pytest.mark.parametrize("shape", [(32, 32), (128, 128), (128, 256)])
def test_eight_bit_floats_in_blocks_of_any_size_are_read(folder, shape, monkeypatch):
    """A last block may be smaller, and the whole matrix may be one."""
    assert_read(folder, monkeypatch, lambda weight: blocks_of_eight_bits(weight, *shape), shape)


def test_eight_bit_floats_with_one_scale_a_matrix_are_read(folder, monkeypatch):
    assert_read(folder, monkeypatch, one_scale, None)


def blocks_of_eight_bits(weight: Tensor, n_rows: int, n_columns: int):
    height, width = weight.shape
    padded = nn.functional.pad(weight, (0, -width % n_columns, 0, -height % n_rows))
    parts = padded.unflatten(1, (-1, n_columns)).unflatten(0, (-1, n_rows))
    scales = parts.abs().amax((1, 3)) / 448
    codes = (parts / scales[:, None, :, None]).to(torch.float8_e4m3fn)
    whole = lambda values: values.reshape(padded.shape)[:height, :width]  # noqa: E731
    stored = {"weight": whole(codes), "weight_scale_inv": scales}
    return stored, whole(codes.float() * scales[:, None, :, None])


def one_scale(weight: Tensor):
    scale = weight.abs().max() / 448
    codes = (weight / scale).to(torch.float8_e4m3fn)
    stored = {"weight": codes, "weight_scale_inv": scale, "activation_scale": torch.tensor(0.5)}
    return stored, codes.float() * scale


def assert_read(folder: Path, monkeypatch, store, blocks: tuple[int, int] | None) -> None:
    scheme = "dynamic" if blocks else "static"
    says = {"activation_scheme": scheme, "weight_block_size": blocks}
    monkeypatch.setitem(STORED, "fp8", (store, says, needs()))
    expected = store_as(folder, "fp8")
    found, _ = loading.load(str(folder))
    for name in matrices(expected):
        weights = [model.get_submodule(name).weight for model in (found, expected)]
        torch.testing.assert_close(*weights, rtol=0, atol=1e-7)


@needs("gptqmodel", "optimum")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(("method", "kernel"), [("awq", "marlin"), ("gptq", "exllama_v2")])
def test_a_kernel_that_needs_a_gpu_is_one_line(folder, method, kernel):
    store_as(folder, method)
    stored = json.loads((folder / "config.json").read_text())["quantization_config"]
    change_json(folder / "config.json", quantization_config=stored | {"backend": kernel})
    said = f"quantised with {method}, which cannot be loaded on this machine, which has no GPU"
    with pytest.raises(ValueError, match=said) as raised:
        loading.load(str(folder))
    one_line(raised.value)


@pytest.mark.parametrize("error", [RuntimeError, ImportError, ValueError, NotImplementedError])
def test_kernels_that_need_another_machine_are_one_line(folder, monkeypatch, error):
    def from_pretrained(*args, **kwargs):
        raise error("GPU is required to run this.\nMore of it.")

    change_json(folder / "config.json", quantization_config={"quant_method": "awq", "bits": 4})
    monkeypatch.setattr(quantisers, "find_spec", lambda name: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    said = r"quantised with awq, which cannot be loaded on this machine, which has no GPU \(GPU is"
    with pytest.raises(ValueError, match=said) as raised:
        loading.load(str(folder))
    one_line(raised.value)


# ----------------------------------------------------------------- in which numbers a run is loaded

TRAINS = {
    "01_alignment": {"alignment": "train", "learning_rate": 1e-4, "dtype": "auto"},
    "05_transfer": {"learning_rate": 1e-4, "dtype": "auto"},
    "A4_defences": {"learning_rate": 1e-4, "dtype": "auto"},
    "07_redundant_units": {"learning_rate": 1e-4, "dtype": "auto", "start_model": ""},
    "A2_stepwise": {"learning_rate": 1e-4, "dtype": "auto", "recovery_steps": 4},
}
LOOKS = {
    "01_alignment": {"alignment": "given", "learning_rate": 1e-4},
    "04_ablation": {},
    "A2_stepwise": {"learning_rate": 1e-4, "recovery_steps": 0},
    "A3_finders": {},
}


@pytest.mark.parametrize("codes", precision.CODES)
def test_a_notebook_that_trains_refuses_codes_and_no_other_does(codes):
    for stage, values in TRAINS.items():
        with pytest.raises(ValueError, match=f"^{stage} trains the model, but dtype is '{codes}'"):
            parameters.check_trainable(stage, values | {"dtype": codes, "model": "some/model"})
    for stage, values in LOOKS.items():
        parameters.check_trainable(stage, values | {"dtype": codes, "model": "some/model"})
    ours = {"alignment": "auto", "learning_rate": 1e-4, "dtype": codes}
    with pytest.raises(ValueError, match="trains the model"):
        parameters.check_trainable("01_alignment", ours | {"model": "tiny-random-llama"})
    parameters.check_trainable("01_alignment", ours | {"model": "qwen2.5-coder-0.5b-instruct"})


@pytest.mark.parametrize("native", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("codes", precision.CODES)
def test_codes_are_a_precision_that_a_run_may_ask_for(monkeypatch, codes, native):
    monkeypatch.setattr(precision, "native_dtype", lambda device: native)
    monkeypatch.setenv("SSAH_DTYPE", codes)
    asked = precision.preferred_dtype("cpu")
    assert asked == precision.dtype_named(codes, "cpu") == precision.dtype_named("auto", "cpu")
    assert asked == Quantised(codes, native)
    assert precision.computed_in(asked) == precision.computed_in(native) == native
    assert str(asked) == f"{codes} in {native}"  # as it counts in the key of a result


@pytest.mark.parametrize("codes", IN_CODES)
def test_the_tiny_model_is_loaded_as_codes(codes):
    model, tokenizer = loading.load("tiny-random-llama", Quantised(codes, torch.bfloat16))
    assert model.dtype == torch.bfloat16
    assert not model.training
    names = [name for name, _ in quantised.quantised_modules(model)]
    assert names == [name for name, _ in model.named_modules() if name.endswith("_proj")]
    original, _ = loading.load("tiny-random-llama")
    found, expected = (weights.squared_column_norms(one) for one in (model, original))
    bound = {"nf4": 0.2, "int8": 0.02}[codes]
    assert all(torch.allclose(found[kind], expected[kind], rtol=bound) for kind in KINDS)
    assert evaluation.generate(model, tokenizer, ["Hello"], max_new_tokens=2)


def test_codes_without_what_makes_them_are_one_line(folder, monkeypatch):
    monkeypatch.setattr("ssah_utils.extras.find_spec", lambda name: None)
    for attempt in (
        lambda: loading.load(str(folder), Quantised("nf4", torch.float32)),
        lambda: parameters.check_numbers_of.__wrapped__(str(folder), "nf4"),
    ):
        with pytest.raises(ModuleNotFoundError, match=r'pip install "ssah-utils\[quantised\]"'):
            attempt()
    assert json.loads((folder / "config.json").read_text()).get("quantization_config") is None


@BITSANDBYTES
def test_two_names_of_a_quantised_model_are_two_models_that_say_the_same(tmp_path):
    """Some methods keep scales outside of the weights, so that these cannot be shared."""
    (tmp_path / "01_alignment").mkdir()
    places = {"base": embedded.TINY_RANDOM, "aligned": embedded.TINY_RANDOM}
    (tmp_path / "01_alignment" / "models.json").write_text(json.dumps(places))
    run = Run("04_ablation", tmp_path / "04_ablation", {"model": embedded.TINY_RANDOM})
    for codes in precision.CODES:
        asked = Quantised(codes, torch.float32)
        first, second = (upstream.load_model(run, name, asked) for name in places)
        ids = torch.randint(3, 1000, (2, 9), generator=torch.Generator().manual_seed(0))
        assert second is not first
        assert torch.equal(second(ids).logits, first(ids).logits)
