"""A model spread by a device map: everything that looks finds what it finds in the whole model.

On a machine without a GPU, parts of a model go to disk and are fetched as on any other. Several
devices are acted by ``several_devices``.
"""

import copy
import gc
import json
import logging
from collections.abc import Callable

import numpy as np
import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from torch import Tensor, nn

from ssah_utils import (
    activations,
    attribution,
    cache,
    device_maps,
    evaluation,
    fingerprints,
    interventions,
    loading,
    models,
    offloading,
    placement,
    prompt_cache,
    room,
    training,
    unit_training,
    weights,
    wrappers,
)
from ssah_utils.files import cache_dir
from ssah_utils.per_unit import PerUnit
from ssah_utils.precision import Quantised
from ssah_utils.prompts.tokens import token_batches
from tests.conftest import tiny_model
from tests.several_devices import here, several_devices

FAMILIES = ("llama", "gpt2", "mixtral", "qwen2_moe")
BLOCKS = {"gpt2": "transformer.h"}
PROMPTS, OPENINGS = [[3, 4, 5], [6, 7, 8, 9, 10]], [[5, 6, 7], [8, 9], [11]]
EXAMPLES = [
    {"input_ids": [3, 4, 5, 6, 7, 8], "labels": [-100, -100, -100, 6, 7, 8]},
    {"input_ids": [13, 14, 15, 16, 17, 18, 19], "labels": [-100, -100, -100, 16, 17, 18, 19]},
]

logging.getLogger("accelerate.big_modeling").setLevel(logging.ERROR)


def spread(name: str, first: object, others: object) -> dict:
    """A map with the first block on one device and the other two on another."""
    path = BLOCKS.get(name, "model.layers")
    return {"": first, f"{path}.1": others, f"{path}.2": others}


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tokenizer) -> Callable[[str], str]:
    folder = tmp_path_factory.mktemp("models")

    def save(name: str) -> str:
        if not (folder / name).exists():
            tiny_model(name).save_pretrained(folder / name)
            tokenizer.save_pretrained(folder / name)
        return str(folder / name)

    return save


@pytest.fixture
def own_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("SSAH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def some_units(model: nn.Module) -> PerUnit:
    generator = torch.Generator().manual_seed(3)
    norms = weights.squared_column_norms(model)
    return norms.map(lambda values: torch.rand(values.shape, generator=generator) < 0.2)


@torch.no_grad()
def looked_at(model: nn.Module, units: PerUnit) -> dict[str, object]:
    """What is found in a model by everything that looks."""
    batches = token_batches(EXAMPLES)
    moments = activations.channel_moments(model, batches)
    found: dict[str, object] = {
        "norms": weights.squared_column_norms(model),
        "absolute": weights.mean_absolute_columns(model),
        "mean": moments.mean,
        "variance": moments.variance,
        "states": activations.last_token_states(model, batches),
        "unit": activations.unit_values(model, batches[0], "mlp", 2, 1),
    }
    for name, held in {"intact": None, "ablated": units}.items():
        with interventions.ablated(model, held or units.empty_set()):
            found[f"fingerprint, {name}"] = fingerprints.fingerprint(model)
            with torch.inference_mode():
                read = prompt_cache.read_prompts(model, PROMPTS)
                openings = read.log_probabilities(OPENINGS, read.next_logits)
                found[f"openings, {name}"] = here(openings).clone()
                found[f"answers, {name}"] = read.answer(5, [2])
    return found


def assert_same(
    found: dict[str, object], expected: dict[str, object], is_exact: bool = True
) -> None:
    """Bit for bit; else up to rounding, where values come from products."""
    for name, value in expected.items():
        one = found[name]
        if isinstance(value, PerUnit):
            one, value = one.flatten(), value.flatten()
        if not isinstance(value, Tensor):
            assert one == value, name
        elif is_exact or name in ("norms", "absolute"):
            assert torch.equal(one, value), name
        else:
            assert torch.allclose(one, value, rtol=1e-4, atol=1e-6), name


# ----------------------------------------------------------------------------------------- the same


@pytest.mark.parametrize("name", FAMILIES)
def test_with_parts_on_disk_everything_is_as_in_the_whole_model(name, saved, own_folder):
    whole, _ = loading.load(saved(name))
    units = some_units(whole)
    asked = json.dumps(spread(name, "cpu", "disk"))
    model, _ = loading.load(saved(name), device_map=asked)
    assert placement.is_dispatched(model) and not placement.is_dispatched(whole)
    assert any(parameter.is_meta for parameter in model.parameters())
    assert placement.input_device(model) == torch.device("cpu")
    assert placement.summary(model) == "5 parts on cpu, 2 on disk"
    # what is mapped from a file lies otherwise in memory, by which products are rounded on a CPU
    assert_same(looked_at(model, units), looked_at(whole, units), is_exact=False)
    batches = token_batches(EXAMPLES)
    gradient = activations.gradient_activation(model, batches).flatten()
    expected = activations.gradient_activation(whole, batches).flatten()
    assert torch.allclose(gradient, expected, rtol=1e-4, atol=1e-6)
    assert any(parameter.is_meta for parameter in model.parameters())  # nothing stays fetched


@pytest.mark.parametrize("name", FAMILIES)
def test_with_weights_in_memory_for_another_device_everything_is_the_same(name):
    """As with a GPU that fetches from the computer's memory; the embedding is offloaded, too."""
    whole = tiny_model(name).requires_grad_(False)
    model = cpu_offload(copy.deepcopy(whole), execution_device=torch.device("cpu"))
    assert all(parameter.is_meta for parameter in model.parameters())
    units = some_units(whole)
    assert_same(looked_at(model, units), looked_at(whole, units))
    identity, expected = (cache.identity_of(one) for one in (model, whole))
    assert identity == expected


@pytest.mark.parametrize("name", FAMILIES)
def test_over_several_devices_everything_is_the_same(name):
    whole = tiny_model(name).requires_grad_(False)
    whole.set_attn_implementation("eager")  # of the fused ones, each device has its own
    whole.set_experts_implementation("eager")
    units = some_units(whole)
    expected = looked_at(whole, units)
    with several_devices():
        asked = spread(name, "cuda:1", "cuda:0") | {BLOCKS.get(name, "model.layers") + ".2": "cpu"}
        flat = device_maps.flat_map(asked, whole)
        model = dispatch_model(copy.deepcopy(whole), flat, main_device="cuda:1")
        assert placement.input_device(model) == torch.device("cuda:1")
        assert placement.kinds_of_devices(model) == "cuda"
        assert_same(looked_at(model, units), expected)


def test_two_devices_that_meet_are_found():
    """The control of the tests above: a mask of the wrong device fails."""
    with several_devices(), pytest.raises(RuntimeError, match="tensors on cuda:0, cuda:1"):
        torch.ones(2, device="cuda:0") + torch.ones(2, device="cuda:1")


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_two_models_share_what_is_fetched_but_no_hooks(name, saved, own_folder):
    model, _ = loading.load(saved(name), device_map=json.dumps(spread(name, "cpu", "disk")))
    other = wrappers.over_same_weights(model)
    assert placement.stores(other)[0] is placement.stores(model)[0]
    units, ids = some_units(model), torch.tensor(PROMPTS[1:])
    intact = model(ids).logits
    with interventions.ablated(other, units):
        assert torch.equal(model(ids).logits, intact)
        assert not torch.equal(other(ids).logits, intact)
    del model
    gc.collect()
    assert torch.equal(other(ids).logits, intact)


def test_answers_and_margins_of_text_are_the_same(saved, own_folder, tokenizer):
    prompts, answers = ["w3 w4 w5", "w6 w7 w8 w9"], ["w10 w11", "w12"]
    asked = json.dumps(spread("llama", "cpu", "disk"))
    whole, model = (loading.load(saved("llama"), device_map=one)[0] for one in ("", asked))
    for question in (
        lambda one: evaluation.generate(one, tokenizer, prompts, 4),
        lambda one: evaluation.response_nll(one, tokenizer, prompts, answers).tolist(),
        lambda one: evaluation.opening_log_probabilities(one, tokenizer, prompts, answers).tolist(),
    ):
        expected = question(whole)
        is_text = isinstance(expected[0], str)
        assert question(model) == (expected if is_text else pytest.approx(np.array(expected)))


# ------------------------------------------------------------------------------------------- a file


def test_a_map_is_a_name_a_file_or_json(tmp_path):
    file = tmp_path / "map.json"
    file.write_text('{"": "cpu", "lm_head": "disk"}', encoding="utf-8")
    assert device_maps.read_map(str(file)) == {"": "cpu", "lm_head": "disk"}
    assert device_maps.read_map('{"": "cpu"}') == {"": "cpu"}
    assert device_maps.read_map("auto") == "auto" and device_maps.read_map("") == ""
    assert device_maps.describe_map(str(file)) == "cpu: all else; disk: lm_head"


def test_what_is_saved_anew_is_gone_with_the_model(saved, own_folder):
    """Experts are, as transformers makes other tensors of them."""
    asked = json.dumps(spread("mixtral", "cpu", "disk"))
    model, _ = loading.load(saved("mixtral"), device_map=asked)
    (folder,) = [path for path in (own_folder / "offloaded").iterdir() if path.is_dir()]
    assert list(folder.glob("*down_proj*"))
    other = wrappers.over_same_weights(model)
    del model
    gc.collect()
    assert folder.exists()
    del other
    gc.collect()
    assert not list((own_folder / "offloaded").iterdir())


def test_where_nothing_is_saved_anew_no_folder_stays(saved, own_folder):
    asked = json.dumps(spread("llama", "cpu", "disk"))
    model, _ = loading.load(saved("llama"), device_map=asked)
    assert placement.stores(model) and not list((own_folder / "offloaded").iterdir())


def test_what_a_killed_process_left_is_removed_and_what_is_in_use_is_not(own_folder):
    left = cache_dir() / "offloaded" / "left"
    left.mkdir(parents=True)
    left.with_suffix(".lock").touch()
    with offloading.folder_for_a_model() as used:
        assert not left.exists() and not left.with_suffix(".lock").exists()
        with offloading.folder_for_a_model():
            assert used.path.exists()
    assert not list((cache_dir() / "offloaded").iterdir())


def test_a_broken_load_leaves_no_folder(saved, own_folder, monkeypatch):
    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", lambda *a, **k: 1 / 0)
    with pytest.raises(ValueError, match="cannot be loaded: division by zero"):
        loading.load(saved("mixtral"), device_map=json.dumps(spread("mixtral", "cpu", "disk")))
    assert not list((own_folder / "offloaded").iterdir())


# ---------------------------------------------------------------------------------------- bad input

MIXED = '{"": "cpu", "model.layers.1": "disk"}'
BAD = {
    "a name nearly": ("aut", "device_map 'aut' is no file; nearest is 'auto': device_map takes"),
    "no JSON": ("{'': 0}", "device_map is not JSON"),
    "nothing": ("{}", "device_map gives no module to a device"),
    "a device that is not there": ('{"": 9}', r"puts '' on 9, but there are cpu, disk"),
    "a device of no kind": ('{"": "gpu"}', r"puts '' on 'gpu', but there are cpu, disk"),
    "true": ('{"": true}', "puts '' on True"),
    "a module that is not there": (
        '{"": "cpu", "model.layer.1": "disk"}',
        r"names 'model\.layer\.1', which '.*' has not; nearest is 'model\.layers\.1'",
    ),
    "not all": (
        '{"model.embed_tokens": "cpu", "lm_head": "cpu"}',
        r"gives no device to 'model\.layers\.0\.self_attn\.q_proj\.weight' of '.*', and to 29 more",
    ),
    "a split block": (
        '{"": "cpu", "model.layers.1.mlp": "disk"}',
        r"splits block 1 of '.*': '.*' on cpu, 'mlp.*' on disk: give 'model\.layers\.1' to one",
    ),
}


@pytest.mark.parametrize(("asked", "said"), BAD.values(), ids=BAD)
def test_a_map_that_cannot_work_is_one_line_before_weights_are_read(
    asked, said, saved, own_folder, monkeypatch
):
    monkeypatch.setattr(
        loading.AutoModelForCausalLM, "from_pretrained", lambda *a, **k: pytest.fail("read")
    )
    for ask in (
        lambda: loading.load(saved("llama"), device_map=asked),
        lambda: loading.check_room(saved("llama"), torch.float32, "cpu", asked),
    ):
        with pytest.raises(ValueError, match=said) as raised:
            ask()
        assert "\n" not in str(raised.value)


def test_codes_cannot_be_fetched(saved, own_folder):
    with pytest.raises(ValueError, match=r"keeps parts of '.*' on cpu, disk, and nf4 in .*") as why:
        loading.check_room(saved("llama"), Quantised("nf4", torch.float32), "cpu", MIXED)
    assert "use GPUs alone, or dtype bfloat16" in str(why.value)


def test_each_place_has_to_hold_its_part(saved, own_folder, monkeypatch):
    path, whole = saved("llama"), tiny_model("llama")
    block = sum(parameter.numel() for parameter in whole.model.layers[1].parameters())
    n_bytes = 4 * sum(parameter.numel() for parameter in whole.parameters())
    found = device_maps.bytes_by_place(json.loads(MIXED), whole, torch.float32)
    assert found == {"cpu": n_bytes - 4 * block, "disk": 4 * block}
    loading.check_placement.cache_clear()
    monkeypatch.setattr(room, "free_memory", lambda: n_bytes - 4 * block)
    loading.check_room(path, torch.float32, "cpu", MIXED)
    loading.check_placement.cache_clear()
    monkeypatch.setattr(room, "free_memory", lambda: n_bytes - 4 * block - 1)
    with pytest.raises(OSError, match=r"puts .* GiB of '.*' on cpu, in float32.* fewer blocks"):
        loading.check_room(path, torch.float32, "cpu", MIXED)
    monkeypatch.setattr(room, "free_space", lambda folder: 0)
    with pytest.raises(OSError, match="free on 0 GPUs, in memory and on disk"):
        loading.check_room(path, torch.float32, "cpu", "auto")
    loading.check_placement.cache_clear()


def test_what_changes_weights_is_refused_in_one_line(saved, own_folder, tokenizer):
    model, _ = loading.load(saved("llama"), device_map=MIXED)
    units = some_units(model)
    examples = token_batches(EXAMPLES)
    for change in (
        lambda: training.train_sft(model, tokenizer, EXAMPLES, training.SFTConfig(max_steps=1)),
        lambda: unit_training.training_only(model, units).__enter__(),
        lambda: unit_training.freezing(model, units).__enter__(),
        lambda: interventions.without_units(model, units),
        lambda: attribution.unit_gradients(model, examples),
        lambda: weights.squared_gradients(model),
    ):
        with pytest.raises(ValueError, match="but a device map keeps this model on several") as why:
            change()
        assert "\n" not in str(why.value) and "load it without device_map" in str(why.value)


def test_weights_that_are_nowhere_are_still_refused(llama):
    llama.model.layers[1].mlp.to("meta")
    name = placement.lacks_values(llama)
    assert name.startswith("model.layers.1.mlp") and models.shape_of(llama)
    with pytest.raises(ValueError, match=name):
        weights.gathered(llama)
