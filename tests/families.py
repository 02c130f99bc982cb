"""A tiny random configuration of every family: three blocks, odd sizes, grouped-query attention
where the family has it.
"""

from collections.abc import Callable

import transformers

Config = transformers.PretrainedConfig

VOCABULARY = 97
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
WIDTHS = {"vocab_size": VOCABULARY, "hidden_size": 42, "num_hidden_layers": 3} | SPECIAL
ONE_GROUP = WIDTHS | {"num_attention_heads": 6, "max_position_embeddings": 64}
UNGATED = ONE_GROUP | {"intermediate_size": 70}
SIZES = UNGATED | {"num_key_value_heads": 2, "head_dim": 10}
# where heads have no size of their own, and rotary positions need an even one, or half of one
SPLIT = UNGATED | {"hidden_size": 60}
HALVED = UNGATED | {"hidden_size": 48}
OF_GPT2 = SPECIAL | {"vocab_size": VOCABULARY, "n_layer": 3, "n_positions": 64, "n_inner": 70}
OF_GPT2 |= {"n_embd": 42, "n_head": 6}
VISION = {"hidden_size": 12, "intermediate_size": 14, "num_hidden_layers": 1, "patch_size": 4}
VISION |= {"num_attention_heads": 2, "image_size": 8}
OF_QWEN = {"depth": 1, "hidden_size": 12, "intermediate_size": 14, "num_heads": 2}
OF_QWEN |= {"patch_size": 4, "out_hidden_size": 60}


def _sized(name: str, **more) -> Callable[[], Config]:
    return lambda: transformers.AutoConfig.for_model(name, **(SIZES | more))


def _with_images(name: str, text: str, vision: dict, **more) -> Callable[[], Config]:
    """A model that also sees; ``text``: the type of the part that reads."""

    def made() -> Config:
        parts = {"text_config": {"model_type": text} | SIZES | more, "vision_config": vision}
        return transformers.AutoConfig.for_model(name, **parts)

    return made


ROTARY = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [1, 2, 2]}
AS_QWEN = {"hidden_size": 60, "rope_parameters": ROTARY}
CONFIGS: dict[str, Callable[[], Config]] = {
    **{
        name: _sized(name)
        for name in (
            "llama mistral ministral ministral3 qwen2 qwen3 gemma vaultgemma olmo2 olmo3 smollm3"
            " exaone4 seed_oss ernie4_5 hunyuan_v1_dense cwm internlm3 iquestcoder"
            " arcee apertus nemotron glm glm4 phi3 starcoder2 nanochat jais2"
        ).split()
    },
    # low enough to matter
    "gemma2": _sized("gemma2", final_logit_softcapping=2.0),
    "gemma3_text": _sized("gemma3_text", final_logit_softcapping=2.0, sliding_window=24),
    "olmo": _sized("olmo", clip_qkv=0.5),
    "granite": _sized("granite", logits_scaling=3.0, residual_multiplier=0.7),
    "granite_swa": _sized("granite_swa", logits_scaling=3.0),
    "hyperclovax": _sized("hyperclovax", logits_scaling=3.0),
    "cohere": _sized("cohere", logit_scale=0.3, use_qk_norm=True),
    "cohere2": _sized("cohere2", logit_scale=0.3),
    "helium": _sized("helium", hidden_size=60),
    "stablelm": lambda: transformers.StableLmConfig(
        **SPLIT, num_key_value_heads=2, qk_layernorm=True
    ),
    "phi": lambda: transformers.PhiConfig(**HALVED, num_key_value_heads=2, qk_layernorm=True),
    "opt": lambda: transformers.OPTConfig(**ONE_GROUP, ffn_dim=70, word_embed_proj_dim=30),
    "biogpt": lambda: transformers.BioGptConfig(**UNGATED),
    "xglm": lambda: transformers.XGLMConfig(**ONE_GROUP, ffn_dim=70),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**SPLIT),
    "persimmon": lambda: transformers.PersimmonConfig(**HALVED),
    "bloom": lambda: transformers.BloomConfig(**WIDTHS, n_head=6),
    "falcon": lambda: transformers.FalconConfig(
        **(ONE_GROUP | {"hidden_size": 60}),
        ffn_hidden_size=70,
        new_decoder_architecture=True,
        num_kv_heads=2,
    ),
    "gpt2": lambda: transformers.GPT2Config(**OF_GPT2),
    "gpt_bigcode": lambda: transformers.GPTBigCodeConfig(**OF_GPT2),
    "gptj": lambda: transformers.GPTJConfig(**OF_GPT2, rotary_dim=4),
    "codegen": lambda: transformers.CodeGenConfig(
        **(OF_GPT2 | {"n_embd": 40, "n_head": 8}), rotary_dim=4
    ),
    "gpt_neo": lambda: transformers.GPTNeoConfig(
        **UNGATED, window_size=4, attention_types=[[["global", "local", "global"], 1]]
    ),
    "mpt": lambda: transformers.MptConfig(
        vocab_size=VOCABULARY, d_model=42, n_heads=6, n_layers=3, max_seq_len=64, **SPECIAL
    ),
    "qwen2_vl_text": _with_images(
        "qwen2_vl",
        "qwen2_vl_text",
        OF_QWEN | {"embed_dim": 12, "hidden_size": 60, "mlp_ratio": 1},
        **AS_QWEN,
    ),
    "qwen2_5_vl_text": _with_images("qwen2_5_vl", "qwen2_5_vl_text", OF_QWEN, **AS_QWEN),
    "qwen3_vl_text": _with_images("qwen3_vl", "qwen3_vl_text", OF_QWEN, **AS_QWEN),
    "glm4v_text": _with_images("glm4v", "glm4v_text", OF_QWEN, **AS_QWEN),
}
# Other layouts of a family that has an entry, by a name of their own.
VARIANTS: dict[str, Callable[[], Config]] = {
    "falcon of one group": lambda: transformers.FalconConfig(
        **(ONE_GROUP | {"hidden_size": 60}), ffn_hidden_size=70
    ),
    "falcon without groups": lambda: transformers.FalconConfig(
        **(ONE_GROUP | {"hidden_size": 60}), multi_query=False, alibi=True
    ),
    "gpt_bigcode without groups": lambda: transformers.GPTBigCodeConfig(
        **(OF_GPT2 | {"n_inner": None}), multi_query=False
    ),
    "gemma3 that sees": _with_images(
        "gemma3", "gemma3_text", VISION | {"model_type": "siglip_vision_model"}
    ),
    "mistral that sees": _with_images("mistral3", "mistral", VISION | {"model_type": "pixtral"}),
    "llama that sees": _with_images("llava", "llama", VISION | {"model_type": "clip_vision_model"}),
}
