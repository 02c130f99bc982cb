"""Every family that has an entry, and every layout of it, on a tiny random model: what is written
down about it, held against what the model computes.
"""

import copy
import re

import pytest
import torch
import transformers
from torch import Tensor, nn

from ssah_utils import (
    activations,
    adapters,
    architectures,
    evaluation,
    fingerprints,
    interventions,
    loading,
    models,
    prompt_cache,
)
from ssah_utils.architectures import Architecture, ModelShape
from ssah_utils.per_unit import KINDS, PerUnit
from ssah_utils.unit_training import freezing, training_only
from tests.conftest import VOCABULARY, parameters_of, tiny_model
from tests.families import CONFIGS, VARIANTS
from tests.test_prompt_cache import PROMPTS, assert_read_as_whole

FAMILIES = [*CONFIGS, *VARIANTS]
LAYER = 1  # the block that is looked at
# What differs from 42 wide, with 6 heads of 10 in 2 groups, and 70 feed-forward units.
ALONE = {"n_kv_heads": 6, "head_dim": 7}
WIDER = {"d_model": 60}
SIZES = {
    **dict.fromkeys(("opt", "biogpt", "xglm", "gpt2", "gptj", "gpt_neo"), ALONE),
    **dict.fromkeys("helium stablelm falcon".split(), WIDER),
    **dict.fromkeys("qwen2_vl_text qwen2_5_vl_text qwen3_vl_text glm4v_text".split(), WIDER),
    "phi": {"d_model": 48, "head_dim": 8},
    "persimmon": {"d_model": 48, "n_kv_heads": 6, "head_dim": 8},
    "gpt_neox": {"d_model": 60, "n_kv_heads": 6},
    "gpt_bigcode": {"n_kv_heads": 1, "head_dim": 7},
    "codegen": {"d_model": 40, "n_heads": 8, "n_kv_heads": 8, "head_dim": 5},
    "bloom": ALONE | {"d_ff": 168},
    "mpt": ALONE | {"d_ff": 168},
    "falcon of one group": {"d_model": 60, "n_kv_heads": 1},
    "falcon without groups": {"d_model": 60, "n_kv_heads": 6, "d_ff": 240},
    "gpt_bigcode without groups": ALONE | {"d_ff": 168},
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> tuple[str, nn.Module]:
    """Its name and a model, which no test may change."""
    return request.param, tiny_model(request.param)


@pytest.fixture
def model(family: tuple[str, nn.Module]) -> nn.Module:
    return family[1]


@pytest.fixture
def fresh(model: nn.Module) -> nn.Module:
    """A copy, to be changed."""
    return copy.deepcopy(model)


def scattered(model: nn.Module, share: float = 0.3) -> PerUnit:
    """Random units; in the first block also all channels that read the last head of values, in the
    second every feed-forward unit.
    """
    shape, generator = models.shape_of(model), torch.Generator().manual_seed(0)
    sizes = {kind: (shape.n_layers, shape.n_channels(kind)) for kind in KINDS}
    drawn = {kind: torch.rand(size, generator=generator) for kind, size in sizes.items()}
    chosen = PerUnit(drawn) < share
    chosen["attention"][0, -(shape.n_channels("attention") // shape.n_kv_heads) :] = True
    chosen["mlp"][1] = True
    return chosen


@torch.no_grad()
def writer_inputs(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """What the writers of one block read: {kind: (B, T, n_channels)}."""
    seen: dict[str, Tensor] = {}
    block, writers = models.blocks_of(model)[LAYER], models.architecture_of(model).writers
    handles = [
        block.get_submodule(path).register_forward_pre_hook(
            lambda module, args, kind=kind: seen.update({kind: args[0].clone()})
        )
        for kind, path in writers.items()
    ]
    model(input_ids=ids)
    for handle in handles:
        handle.remove()
    return seen


# ---------------------------------------------------------------------------------------- structure


def test_shape(family):
    name, model = family
    config = model.config.get_text_config()
    sizes = {"d_model": 42, "n_heads": 6, "n_kv_heads": 2, "head_dim": 10, "d_ff": 70}
    shape = models.shape_of(model)
    sizes |= SIZES.get(name, {})
    assert shape == ModelShape(config.model_type, n_layers=3, blocks=shape.blocks, **sizes)
    for kind in KINDS:
        for layer, writer in enumerate(models.writers(model, kind)):
            path = architectures.writer_path(shape, kind).format(layer=layer)
            assert model.get_submodule(path) is writer.module
            size = (shape.d_model, shape.n_channels(kind))
            assert models.column_weight(writer.module).shape == size


def test_a_model_without_weights_has_the_same_shape(family):
    name, model = family
    empty = loading.without_weights((CONFIGS | VARIANTS)[name]())
    assert all(parameter.is_meta for parameter in empty.parameters())
    assert models.shape_of(empty) == models.shape_of(model)


def test_writers_and_readers_are_those_of_tensor_parallelism(family):
    """transformers cuts the matrices that write to the residual stream along their columns."""
    name, model = family
    plan = getattr(model.config.get_text_config(), "base_model_tp_plan", None)
    if not plan:
        pytest.skip(f"transformers has no plan for {name}")
    matrices = {name for name, one in models.blocks_of(model)[0].named_parameters() if one.ndim > 1}
    of_block = {key.partition(".*.")[2]: how for key, how in plan.items() if ".*." in key}
    of_block = {path: how for path, how in of_block.items() if f"{path}.weight" in matrices}
    entry = models.architecture_of(model)
    cut = {how: {path for path in of_block if how in of_block[path]} for how in ("row", "col")}
    assert cut["row"] == set(entry.writers.values())
    readers = {reader.path for own in entry.readers.values() for reader in own}
    assert cut["col"] == readers | (cut["col"] & set(entry.others))


def test_without_its_writers_a_block_adds_nothing_that_depends_on_its_input(fresh, token_ids):
    block, change = models.blocks_of(fresh)[LAYER], []

    def keep(module: nn.Module, args: tuple, kwargs: dict, output: Tensor | tuple) -> None:
        before = args[0] if args else kwargs["hidden_states"]
        change.append((output[0] if isinstance(output, tuple) else output) - before)

    with torch.no_grad():
        block.register_forward_hook(keep, with_kwargs=True)
        fresh(input_ids=token_ids)
        for kind in KINDS:
            models.column_weight(models.writers(fresh, kind)[LAYER].module).zero_()
            fresh(input_ids=token_ids)
    spread = [float((one - one[:1, :1]).abs().max()) for one in change]
    assert spread[0] > 0.1 and spread[1] > 0.1 and spread[2] < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_a_reader_row_feeds_exactly_the_channels_that_map_to_it(model, kind):
    """Of one token, which attends to itself alone: row r is moved in the r-th text of a batch."""
    shape, block = models.shape_of(model), models.blocks_of(model)[LAYER]
    readers = models.architecture_of(model).readers[kind]
    for path in {reader.path for reader in readers}:
        module = block.get_submodule(path)
        n_rows = len(models.column_weight(module))
        ids = torch.full((n_rows, 1), 5)
        before, change = writer_inputs(model, ids)[kind], torch.zeros(())
        for far in (10, -10):  # some functions are flat on one side
            one_each = far * torch.eye(n_rows)
            moved = module.register_forward_hook(
                lambda module, args, output, by=one_each: output + by.reshape(output.shape)
            )
            change = change + (writer_inputs(model, ids)[kind] - before).abs().reshape(n_rows, -1)
            moved.remove()
        expected = torch.zeros_like(change, dtype=torch.bool)
        for reader in readers:
            if reader.path == path:
                expected[reader.rows(shape), torch.arange(change.shape[1])] = True
        assert torch.equal(change > 1e-4, expected), path


def test_logits_of_states_are_those_of_the_model(model, token_ids):
    with torch.no_grad():
        expected = model(input_ids=token_ids).logits
        hidden = models.backbone_of(model)(input_ids=token_ids).last_hidden_state
        assert torch.equal(models.logits_of(model, hidden), expected)
        some = models.logits_of(model, hidden[1, 3:5])
        torch.testing.assert_close(some, expected[1, 3:5], rtol=1e-4, atol=1e-4)


# ----------------------------------------------------------------------------- what no entry covers

# Families whose blocks are not all alike, or write in a third way, and what has to be named then.
HYBRIDS = {
    "olmo_hybrid": "block 0 has 'linear_attn.o_proj'",
    "gemma4_text": "block 0 has 'per_layer_projection'",
    "flint": "block 2 has 'mlp.experts.down_proj'",
    "zamba2": "block 0 has 'mamba.out_proj'",
    "mllama": "block 0 has 'cross_attn.",
}


def hybrid(name: str) -> nn.Module:
    """A model of five blocks without weights."""
    config = transformers.AutoConfig.for_model(name)
    text = config.get_text_config(decoder=True)
    if name == "mllama":
        text.cross_attention_layers = [0]
    text.num_hidden_layers = 5
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:5]
    return loading.without_weights(config)


@pytest.mark.parametrize("name", HYBRIDS)
def test_what_writes_and_is_covered_by_no_entry_is_named_in_one_line(name, monkeypatch):
    model = hybrid(name)
    with pytest.raises(ValueError, match=r"is not in ARCHITECTURES") as raised:
        models.shape_of(model)
    assert "\n" not in str(raised.value)
    model_type = models.text_config(model).model_type
    # the backbone of this one is a whole language model
    entry = Architecture(blocks="model.layers" if name == "mllama" else "layers")
    monkeypatch.setitem(architectures.ARCHITECTURES, model_type, entry)
    with pytest.raises(ValueError, match=HYBRIDS[name]) as raised:
        models.shape_of(model)
    assert re.fullmatch(
        rf"architecture '{model_type}': .*, which may write to the residual stream and is covered"
        r" by no entry of ARCHITECTURES in ssah_utils/architectures.py",
        str(raised.value),
    )


def with_a_wider_block(model: nn.Module) -> None:
    model.model.layers[2].mlp.down_proj = nn.Linear(71, 42)


def with_a_narrower_reader(model: nn.Module) -> None:
    model.model.layers[2].self_attn.v_proj = nn.Linear(42, 19)


def without_a_reader(model: nn.Module) -> None:
    del model.model.layers[1].mlp.up_proj


def with_a_third_writer(model: nn.Module) -> None:
    model.model.layers[1].adapter = nn.Linear(7, 42)


def with_a_block_less(model: nn.Module) -> None:
    del model.model.layers[2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_a_wider_block, r"block 2 has 'mlp.down_proj' of shape \(42, 71\), .* explain"),
        (with_a_narrower_reader, r"block 2 has 'self_attn.v_proj' of .*: it asks for 20 rows"),
        (without_a_reader, "block 1 has no 'mlp.up_proj'"),
        (with_a_third_writer, "block 1 has 'adapter', which may write"),
        (with_a_block_less, "the model has 2 blocks, its configuration says 3"),
    ],
)
def test_a_block_that_is_not_as_its_entry_says_is_an_error(llama, change, message):
    change(llama)
    with pytest.raises(ValueError, match=message):
        models.shape_of(llama)


BOTH_WAYS = {
    "llama": {"is_causal": False},
    "gemma": {"use_bidirectional_attention": True},
    "gemma3_text": {"use_bidirectional_attention": True},
}


@pytest.mark.parametrize("name", BOTH_WAYS)
def test_a_model_that_reads_what_follows_a_token_is_refused_in_one_line(name):
    config = CONFIGS[name]()
    for key, value in BOTH_WAYS[name].items():
        setattr(config, key, value)
    with pytest.raises(ValueError, match=f"'{name}': .* so it is no causal language") as raised:
        models.shape_of(loading.without_weights(config))
    assert "\n" not in str(raised.value)


def test_the_text_part_of_a_model_that_reads_its_prompt_both_ways_is_refused():
    """PaliGemma's is a Gemma, and nothing but its configuration says so."""
    config = transformers.AutoConfig.for_model("paligemma")
    config.text_config.num_hidden_layers = config.vision_config.num_hidden_layers = 2
    with pytest.raises(ValueError, match=r"'gemma': .* also reads what follows a token"):
        models.shape_of(loading.without_weights(config))


def test_writers_that_are_multiplied_past_their_modules_are_refused():
    config = transformers.BloomConfig(vocab_size=97, hidden_size=42, n_layer=3, n_head=6)
    config.slow_but_exact = True
    assert models.shape_of(loading.without_weights(config)).n_layers == 3
    config.pretraining_tp = 2
    with pytest.raises(ValueError, match="where no hook sees a unit: set slow_but_exact to false"):
        models.shape_of(loading.without_weights(config))


def test_a_model_without_blocks_is_an_error():
    config = CONFIGS["llama"]()
    config.num_hidden_layers = 0
    with pytest.raises(ValueError, match="the model has 0 blocks"):
        models.shape_of(loading.without_weights(config))


def test_blocks_whose_sizes_differ_are_an_error_in_one_line(monkeypatch):
    entry = Architecture()
    monkeypatch.setitem(architectures.ARCHITECTURES, "gemma4_unified_text", entry)
    config = transformers.AutoConfig.for_model("gemma4_unified_text")
    with pytest.raises(ValueError, match=r"does not say its sizes: .* is a per-layer") as raised:
        models.shape_of(loading.without_weights(config))
    assert "\n" not in str(raised.value)


def test_an_entry_that_names_no_blocks_is_an_error(llama, monkeypatch):
    monkeypatch.setitem(architectures.ARCHITECTURES, "llama", Architecture(blocks="h"))
    with pytest.raises(ValueError, match="its backbone, 'model', has no 'h', which its entry"):
        models.shape_of(llama)


@pytest.mark.parametrize("name", ["gemma3 that sees", "llama that sees", "qwen2_5_vl_text", "opt"])
def test_a_saved_model_is_loaded_with_its_text_part_in_sight(tmp_path, tokenizer, name):
    model = tiny_model(name)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loading.check_reachable(str(tmp_path))
    loaded, _ = loading.load(str(tmp_path))
    assert type(loaded) is type(model)
    assert models.shape_of(loaded) == models.shape_of(model)
    assert fingerprints.fingerprint(loaded) == fingerprints.fingerprint(model)


# ----------------------------------------------------------------------------------------- ablation


@torch.no_grad()
def test_ablated_is_zeroed_columns_is_a_smaller_model(model, token_ids):
    chosen, edited = scattered(model), copy.deepcopy(model)
    for kind in KINDS:
        for dropped, writer in zip(chosen[kind], models.writers(edited, kind), strict=True):
            models.column_weight(writer.module)[:, dropped] = 0
    expected = edited(input_ids=token_ids).logits
    close = {"rtol": 0, "atol": 1e-5 * max(1.0, float(expected.abs().max()))}
    with interventions.ablated(model, chosen):
        torch.testing.assert_close(model(input_ids=token_ids).logits, expected, **close)
    small = interventions.without_units(model, chosen)
    torch.testing.assert_close(small(input_ids=token_ids).logits, expected, **close)
    n_parameters = [sum(one.numel() for one in each.parameters()) for each in (small, model)]
    assert n_parameters[0] < n_parameters[1]
    assert (model(input_ids=token_ids).logits - expected).abs().max() > 1e-3


# -------------------------------------------------------------------------------------- activations


def test_moments_are_those_of_each_text_alone_in_float64(model):
    """Padding on the left changes no activation, however positions are counted."""
    texts = [[5, 6, 7, 8, 20, 21, 22], [9, 30, 31], [4, 11, 3, 40, 41]]
    width = max(map(len, texts))
    padded = torch.tensor([[0] * (width - len(text)) + text for text in texts])
    mask = torch.tensor([[0] * (width - len(text)) + [1] * len(text) for text in texts])
    batch = {"input_ids": padded, "attention_mask": mask, "positions": mask.bool()}
    found = activations.channel_moments(model, [batch])
    is_broken = model.config.model_type == "xglm"  # its masks overflow in float64
    exact = model if is_broken else copy.deepcopy(model).double()
    alone = [writer_inputs(exact, torch.tensor([text])) for text in texts]
    assert found.count == sum(map(len, texts))
    for kind in KINDS:
        values = torch.cat([one[kind].flatten(0, -2) for one in alone]).double()
        close = {"rtol": 1e-3, "atol": 1e-5 * float(values.abs().max()) ** 2}
        torch.testing.assert_close(found.variance[kind][LAYER], values.var(0), **close)
        close = {"rtol": 1e-3, "atol": 1e-5 * float(values.abs().max())}
        torch.testing.assert_close(found.mean[kind][LAYER], values.mean(0), **close)


# ----------------------------------------------------------------------------------------- training


def entries_of(model: nn.Module, chosen: PerUnit, rest: bool) -> dict[str, Tensor]:
    """Which entries of every parameter may change when the given units are trained."""
    shape, entry = models.shape_of(model), models.architecture_of(model)
    masks = {name: torch.full(one.shape, rest) for name, one in model.named_parameters()}
    for layer in range(shape.n_layers):
        for kind in KINDS:
            units = chosen[kind][layer]
            path = architectures.writer_path(shape, kind).format(layer=layer)
            is_conv = type(model.get_submodule(path)).__name__ == "Conv1D"
            masks[f"{path}.weight"][:] = units[:, None] if is_conv else units
            for reader in entry.readers[kind]:
                path = f"{shape.blocks}.{layer}.{reader.path}"
                rows = reader.rows(shape)
                own = torch.tensor([bool(units[rows == row].all()) for row in rows])
                weight = masks[f"{path}.weight"]
                (weight.T if is_conv else weight)[rows] = own[:, None].expand(-1, shape.d_model)
                if f"{path}.bias" in masks:
                    masks[f"{path}.bias"][rows] = own
    return masks


@pytest.mark.parametrize("rest", [False, True])
def test_frozen_entries_stay_bit_for_bit_and_trained_ones_move(fresh, rest):
    chosen, before = scattered(fresh), parameters_of(fresh)
    masks = entries_of(fresh, chosen, rest)
    ids = torch.randint(3, VOCABULARY, (4, 9), generator=torch.Generator().manual_seed(11))
    with training_only(fresh, chosen) if not rest else freezing(fresh, ~chosen):
        optimizer = torch.optim.AdamW(fresh.parameters(), lr=1e-2, weight_decay=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            fresh(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
    after = dict(fresh.named_parameters())
    assert after.keys() == before.keys()
    own = [name for name, mask in masks.items() if not (mask.all() or not mask.any())]
    assert len(own) >= 3 * len(KINDS)
    for name, mask in masks.items():
        assert torch.equal(after[name][~mask], before[name][~mask]), f"{name} is not frozen"
    for name in own:
        moved = (after[name] != before[name])[masks[name]]
        assert moved.float().mean() > (0.9 if moved.ndim == 2 else 0.4), f"{name} is hardly trained"


# ------------------------------------------------------------------------------------------ margins


def log_p_of(model: nn.Module, text: list[int], after: list[int]) -> Tensor:
    """Log-probability of each token after a text, in one pass of the model alone."""
    ids = torch.tensor([text + after])
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
    return logits[len(text) - 1 : -1].log_softmax(-1)[range(len(after)), after]


# They count distances or positions in the memory itself.
READ_ANEW = {"bloom", "mpt", "gpt_neo", "falcon without groups"}


@torch.inference_mode()
def test_openings_are_as_probable_as_in_whole_passes(family):
    name, model = family
    cache = prompt_cache.read_prompts(model, PROMPTS)
    is_anew = type(cache) is prompt_cache.WholePasses
    assert is_anew == (name in READ_ANEW)
    assert_read_as_whole(model, cache)


@torch.inference_mode()
def test_surprise_at_a_response_is_that_of_the_whole_text(model, tokenizer):
    """By padded batches, of which only the last logits are computed."""
    found = evaluation.response_nll(model, tokenizer, ["w5 w6 w7", "w9"], ["w8", "w3 w4 w5"])
    expected = [
        -float(log_p_of(model, text, after).mean())
        for text, after in (([5, 6, 7], [8]), ([9], [3, 4, 5]))
    ]
    assert found == pytest.approx(expected, abs=1e-5)


# --------------------------------------------------------------------------------------- gradients


def test_gradients_by_activations_are_those_of_the_whole_model(model, token_ids):
    """The sum over texts of |activation * gradient|, from one backward pass of the whole model."""
    mask = torch.ones_like(token_ids)
    positions = mask.bool()
    positions[:, -1] = False
    batch = {"input_ids": token_ids, "attention_mask": mask, "positions": positions}
    found, seen = activations.gradient_activation(model, [batch]), {}
    handles = []
    for kind in KINDS:
        writer = models.writers(model, kind)[LAYER].module

        def keep(module: nn.Module, args: tuple[Tensor], kind: str = kind) -> None:
            args[0].retain_grad()
            seen[kind] = args[0]

        handles.append(writer.register_forward_pre_hook(keep))
    loss = model(input_ids=token_ids).logits[:, :-1].flatten(0, 1)
    nn.functional.cross_entropy(loss, token_ids[:, 1:].flatten(), reduction="sum").backward()
    for handle in handles:
        handle.remove()
    for kind, values in seen.items():
        products = (values * values.grad).detach().reshape(*token_ids.shape, -1)
        expected = products[positions].abs().mean(0).double()
        close = {"rtol": 1e-3, "atol": 1e-5 * float(expected.max())}
        torch.testing.assert_close(found[kind][LAYER], expected, **close)
    model.zero_grad()


@pytest.mark.parametrize("method", ["lora", "prefix"])
def test_an_adapter_has_parameters_that_all_learn(fresh, tokenizer, token_ids, method):
    wrapped = adapters.with_adapter(fresh, method, tokenizer)
    mask = torch.ones_like(token_ids)
    wrapped(input_ids=token_ids, attention_mask=mask, labels=token_ids).loss.backward()
    added = [one for one in wrapped.parameters() if one.requires_grad]
    assert added and all(one.grad is not None for one in added)
    with torch.inference_mode():
        cache, openings = prompt_cache.read_prompts(wrapped, PROMPTS[:2]), [[3, 4], [6]]
        found = cache.log_probabilities(openings, cache.next_logits)
        expected = [
            [log_p_of(wrapped, text, ids).sum() for ids in openings] for text in PROMPTS[:2]
        ]
    torch.testing.assert_close(found.float(), torch.tensor(expected), atol=2e-5, rtol=0)
