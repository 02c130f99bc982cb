"""The prompt cache against the whole text read at once, in every architecture."""

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from ssah_utils import evaluation, prompt_cache
from tests.conftest import tiny_model
from tests.families import CONFIGS, SIZES, SPECIAL

PROMPTS = [[5, 6, 7, 8], [9], [4, 11, 3]]
CONTINUATIONS = [[3, 4, 5], [6], [3, 9], [7, 8, 3, 4]]
APPENDED = torch.tensor([[12, 13], [14, 15], [16, 17]])


@torch.inference_mode()
def log_p_at_once(model: nn.Module, before: list[int], continuation: list[int]) -> float:
    ids = torch.tensor([before + continuation])
    said = (
        model(input_ids=ids, use_cache=False)
        .logits[0, len(before) - 1 : -1]
        .double()
        .log_softmax(-1)
    )
    return float(said[range(len(continuation)), continuation].sum())


def expected(model: nn.Module, appended: Tensor = APPENDED[:, :0]) -> Tensor:
    texts = [prompt + more for prompt, more in zip(PROMPTS, appended.tolist(), strict=True)]
    return torch.tensor(
        [[log_p_at_once(model, text, ids) for ids in CONTINUATIONS] for text in texts],
        dtype=torch.float64,
    )


def assert_read_as_whole(
    model: nn.Module, cache: prompt_cache.PromptCache, atol: float = 1e-5
) -> None:
    """Continuations are as probable as after whole texts, also after tokens, and without them
    again; and answers are those of whole texts.
    """
    close, at_once = {"atol": atol, "rtol": 0}, [expected(model), expected(model, APPENDED)]
    torch.testing.assert_close(
        cache.log_probabilities(CONTINUATIONS, cache.next_logits), at_once[0], **close
    )
    said = cache.extend(APPENDED)[:, -1]
    assert cache.n_after == 2
    for _ in range(2):  # the second time what the first one read must be forgotten
        torch.testing.assert_close(
            cache.log_probabilities(CONTINUATIONS, said), at_once[1], **close
        )
    torch.testing.assert_close(
        cache.extend(APPENDED[:, :1])[:, -1],
        whole(model, [*APPENDED.T, APPENDED[:, 0]]),
        **close,
    )
    cache.truncate(0)
    torch.testing.assert_close(
        cache.log_probabilities(CONTINUATIONS, cache.next_logits), at_once[0], **close
    )
    found, columns = cache.answer(3, []), []
    for _ in range(3):
        columns.append((whole(model, columns) if columns else cache.next_logits).argmax(1))
    assert found == torch.stack(columns, 1).tolist()


@torch.inference_mode()
def test_continuations_are_as_probable_as_after_the_whole_text(any_model):
    cache = prompt_cache.read_prompts(any_model, PROMPTS)
    assert type(cache) is prompt_cache.PromptCache
    assert_read_as_whole(any_model, cache, atol=1e-4)


@torch.inference_mode()
def whole(model: nn.Module, columns: list[Tensor]) -> Tensor:
    """What the model says after each prompt and the tokens of the columns."""
    after = torch.stack(columns, 1).tolist()
    return torch.stack(
        [
            model(input_ids=torch.tensor([p + a])).logits[0, -1]
            for p, a in zip(PROMPTS, after, strict=True)
        ]
    )


@pytest.mark.parametrize("n_after", [2, 5])
def test_going_back_to_where_one_is_or_beyond_changes_nothing(llama, n_after):
    with torch.inference_mode():
        cache = prompt_cache.PromptCache(llama, PROMPTS)
        said = cache.extend(APPENDED)
        cache.truncate(n_after)
        assert cache.n_after == 2
        found = cache.log_probabilities(CONTINUATIONS, said[:, -1])
    torch.testing.assert_close(found, expected(llama, APPENDED), atol=1e-4, rtol=0)


def test_batches_hold_every_row_once_shortest_first():
    sequences = ["aaaa", "b", "cc", "", "ddd"]
    assert prompt_cache.length_sorted(sequences, 2) == [[3, 1], [2, 4], [0]]
    assert prompt_cache.length_sorted([], 2) == []


# ------------------------------------------------------------------------------------------ windows

LONG = [[5, 6, 7, 8, 20, 21, 22, 23, 24, 25], [9, 30, 31], [4, 11, 3, 40, 41, 42, 43]]
MIXED = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
WINDOWED = {
    "mistral": (transformers.MistralConfig, {}),
    "phi3": (transformers.Phi3Config, {}),
    "gemma2": (transformers.Gemma2Config, {}),
    "gemma3_text": (transformers.Gemma3TextConfig, MIXED),
    "qwen2": (transformers.Qwen2Config, {"use_sliding_window": True, "max_window_layers": 2}),
    "qwen2, all layers": (
        transformers.Qwen2Config,
        {"use_sliding_window": True, "max_window_layers": 0},
    ),
    "qwen3": (transformers.Qwen3Config, {"use_sliding_window": True, "max_window_layers": 1}),
    "cohere2": (transformers.Cohere2Config, MIXED),
    "ministral": (transformers.MinistralConfig, MIXED),
    "olmo3": (transformers.Olmo3Config, MIXED),
    "starcoder2": (transformers.Starcoder2Config, {}),
}


def windowed(name: str, window: int, **more) -> nn.Module:
    """A tiny model whose matrices are enlarged, so that it matters what is seen."""
    kind, settings = WINDOWED[name]
    sizes = (
        SIZES | SPECIAL | settings | {"sliding_window": window, "hidden_size": 48, "head_dim": 8}
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(kind(**sizes), dtype=torch.float32, **more).eval()
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.data.normal_(0, 0.15)
    return model


@torch.inference_mode()
def scores_at_once(model: nn.Module, prompts: list[list[int]]) -> Tensor:
    return torch.tensor(
        [[log_p_at_once(model, ids, more) for more in CONTINUATIONS] for ids in prompts],
        dtype=torch.float64,
    )


@pytest.mark.parametrize(
    ("window", "attention"), [(3, {}), (10, {}), (10, {"attn_implementation": "eager"}), (13, {})]
)
@pytest.mark.parametrize("name", WINDOWED)
def test_what_leaves_a_window_is_neither_seen_nor_lost(name, window, attention):
    """Prompts below, at and beyond the window, tokens after them that cross it, and back."""
    model, close = windowed(name, window, **attention), {"atol": 2e-5, "rtol": 0}
    with torch.inference_mode():
        cache = prompt_cache.PromptCache(model, LONG)
        torch.testing.assert_close(
            cache.log_probabilities(CONTINUATIONS, cache.next_logits),
            scores_at_once(model, LONG),
            **close,
        )
        after = [prompt + more for prompt, more in zip(LONG, APPENDED.tolist(), strict=True)]
        said = cache.extend(APPENDED)[:, -1]
        torch.testing.assert_close(
            cache.log_probabilities(CONTINUATIONS, said), scores_at_once(model, after), **close
        )
        cache.truncate(0)
        torch.testing.assert_close(
            cache.log_probabilities(CONTINUATIONS, cache.next_logits),
            scores_at_once(model, LONG),
            **close,
        )
        unseen = windowed(name, 64, **attention)
        assert (
            window > 12
            or (scores_at_once(unseen, LONG) - scores_at_once(model, LONG)).abs().max() > 1e-3
        )


# ---------------------------------------------------------------------------------- without a cache

SMALL = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2}
NOT_CACHEABLE = {
    "mamba": lambda: transformers.MambaConfig(**SMALL, state_size=4),
    "rwkv": lambda: transformers.RwkvConfig(**SMALL),
    "lfm2": lambda: transformers.Lfm2Config(**SIZES, full_attn_idxs=[1]),
    "bloom": lambda: transformers.BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4),
    "falcon": lambda: transformers.FalconConfig(**SMALL, num_attention_heads=4, alibi=True),
    "gpt_neo": lambda: transformers.GPTNeoConfig(
        vocab_size=97,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        window_size=4,
        attention_types=[[["global", "local"], 1]],
    ),
    "llama4_text": lambda: transformers.Llama4TextConfig(
        **SIZES | {"num_attention_heads": 4},
        attention_chunk_size=8,
        num_local_experts=2,
        intermediate_size_mlp=48,
    ),
}


@torch.inference_mode()
@pytest.mark.parametrize("name", NOT_CACHEABLE)
def test_models_that_remember_otherwise_read_whole_texts(name):
    model = AutoModelForCausalLM.from_config(NOT_CACHEABLE[name](), dtype=torch.float32).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(0, 0.15)
    cache = prompt_cache.read_prompts(model, PROMPTS)
    assert type(cache) is prompt_cache.WholePasses
    assert_read_as_whole(model, cache)


# ---------------------------------------------------------------------------------- what is refused


def test_attention_that_takes_no_mask_is_refused_in_one_line(llama):
    cache = prompt_cache.PromptCache(llama, PROMPTS)
    llama.config._attn_implementation = "flash_attention_2"
    with pytest.raises(
        ValueError,
        match=r"attention 'flash_attention_2' takes no mask .* attn_implementation='sdpa'",
    ):
        cache.log_probabilities(CONTINUATIONS, cache.next_logits)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_a_text_may_fill_the_positions_of_a_model_and_no_more(name):
    config = CONFIGS[name]()
    assert prompt_cache.n_positions(config) == 64
    model = tiny_model(name)
    with torch.inference_mode():
        cache = prompt_cache.PromptCache(model, [[5] * 60, [6] * 3])
        assert cache.log_probabilities([[3, 4, 5]], cache.next_logits).shape == (2, 1)
        cache.extend(torch.full((2, 4), 7))
        for attempt in (
            lambda: cache.extend(torch.full((2, 1), 7)),
            lambda: cache.log_probabilities([[3, 4]], cache.next_logits),
            lambda: prompt_cache.PromptCache(model, [[5] * 65]),
        ):
            with pytest.raises(
                ValueError, match="a text of 65 tokens is longer than the 64 positions"
            ) as error:
                attempt()
            assert "\n" not in str(error.value)


def test_prompts_beyond_the_positions_are_named_in_one_line_by_their_beginning(llama, tokenizer):
    prompts = ["w5 w6", " ".join(f"w{index}" for index in range(5, 66))]
    prompt_cache.check_lengths(tokenizer, llama.config, prompts, 3)
    prompt_cache.check_lengths(tokenizer, llama.config, prompts, [62, 3])
    for more in (4, [0, 4]):
        with pytest.raises(
            ValueError,
            match=r"prompt 2 of 2 \('w5 w6 w7 w8 \.\.\.'\) has 61 tokens, with 4 after it 65",
        ) as error:
            prompt_cache.check_lengths(tokenizer, llama.config, prompts, more)
        assert (
            "\n" not in str(error.value)
            and "w9" not in str(error.value)
            and "64 positions" in str(error.value)
        )


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        (
            {
                "rope_type": "dynamic",
                "factor": 4.0,
                "rope_theta": 1e4,
                "original_max_position_embeddings": 16,
            },
            16,
        ),
        (
            {
                "rope_type": "yarn",
                "factor": 4.0,
                "rope_theta": 1e4,
                "original_max_position_embeddings": 16,
            },
            64,
        ),
    ],
)
def test_rotary_positions_that_stretch_with_the_batch_are_used_as_far_as_they_do_not(
    rope, expected
):
    assert (
        prompt_cache.n_positions(transformers.LlamaConfig(**SIZES, rope_parameters=rope))
        == expected
    )


def test_a_model_without_positions_has_no_limit(tokenizer):
    config = transformers.BloomConfig(vocab_size=97)
    assert prompt_cache.n_positions(config) is None
    prompt_cache.check_lengths(tokenizer, config, ["w3"], 10**9)


@pytest.mark.parametrize("empty", ["", " ", "\n"])
def test_a_prompt_without_a_token_is_refused_in_one_line(llama, tokenizer, empty):
    for attempt in (
        lambda: prompt_cache.check_lengths(tokenizer, llama.config, ["w3", empty], 3),
        lambda: prompt_cache.check_lengths(
            tokenizer, transformers.BloomConfig(vocab_size=97), ["w3", empty], 3
        ),
        lambda: evaluation.generate(llama, tokenizer, ["w3", empty], 3),
        lambda: evaluation.response_nll(llama, tokenizer, ["w3", empty], ["w4", "w5"]),
        lambda: evaluation.opening_log_probabilities(llama, tokenizer, ["w3", empty], ["w4"]),
    ):
        with pytest.raises(ValueError, match="prompt 2 of 2 has no token") as error:
            attempt()
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="a prompt has no token"):
        prompt_cache.PromptCache(llama, [[3], []])


@pytest.mark.parametrize("at", [0, 1])
def test_an_empty_continuation_is_refused_in_one_line(llama, at):
    continuations = [[3, 4], [5]]
    continuations.insert(at, [])
    cache = prompt_cache.PromptCache(llama, PROMPTS)
    with pytest.raises(ValueError, match=f"continuation {at + 1} of 3 has no token") as error:
        cache.log_probabilities(continuations, cache.next_logits)
    assert "\n" not in str(error.value)


def test_the_log_of_a_mean_probability_is_taken_over_the_openings_and_does_not_underflow():
    log_p = np.log([[0.1, 0.3], [0.5, 0.5]])
    np.testing.assert_allclose(prompt_cache.log_mean_probability(log_p), np.log([0.2, 0.5]))
    found = prompt_cache.log_mean_probability(log_p - 2000)  # below any float64
    np.testing.assert_allclose(found, np.log([0.2, 0.5]) - 2000)
