"""Parameter-efficient baselines: PEFT's methods under the names the paper uses.

Does not know how they are trained.
"""

import copy
import re

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ssah_utils import extras, models, wrappers
from ssah_utils.architectures import ARCHITECTURES, MIXTURES

PEFT_METHODS = {
    # experts are no linear maps, so it would leave out most of a mixture
    "lora": tuple(name for name in ARCHITECTURES if name not in MIXTURES),
    "llama-adapter": ("llama", "mistral", "gpt2"),
    "prefix": tuple(ARCHITECTURES),
}
PREFIX_TOKENS = 20
PREFIX_TEXT = (
    "What follows is a conversation between a person and an assistant. The person asks a question"
    " or gives an instruction, and the assistant answers it."
)
# Every field of PEFT's configurations on which a trained adapter depends, with the values of its
# documentation; a test holds these tables against the fields of the installed version.
PEFT_COMMON = {"inference_mode": False, "revision": None}
PEFT_SETTINGS = {
    "lora": {
        "r": 8,
        "lora_alpha": 16,
        "target_modules": "all-linear",
        "exclude_modules": None,
        "target_parameters": None,
        "lora_dropout": 0.0,
        "bias": "none",
        "lora_bias": False,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "use_qalora": False,
        "qalora_group_size": 16,
        "use_bdlora": None,
        "modules_to_save": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "layer_replication": None,
        "trainable_token_indices": None,
        "ensure_weight_tying": False,
        "loftq_config": {},
        "eva_config": None,
        "corda_config": None,
        "lora_ga_config": None,
        "velora_config": None,
        "monteclora_config": None,
        "arrow_config": None,
        "kasa_config": None,
        "alora_invocation_tokens": None,
        "megatron_config": None,
    },
    "llama-adapter": {"adapter_len": 10},
    "prefix": {
        "num_virtual_tokens": PREFIX_TOKENS,
        "prefix_projection": False,
        "encoder_hidden_size": None,
        "init_weights": None,
        "modules_to_save": None,
        "num_transformer_submodules": 1,
    },
}
# Fields that are left to PEFT, each with the reason why no trained adapter depends on it.
LEFT_TO_PEFT = {
    "filled in by PEFT from what is set": (
        "peft_type",
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
    ),
    "where computations run, or of what is off": ("runtime_config", "megatron_core"),
}


def with_adapter(
    model: nn.Module, method: str, tokenizer: PreTrainedTokenizerBase, seed: int = 0
) -> nn.Module:
    """The model wrapped by PEFT with one of ``PEFT_METHODS``, its own parameters frozen.

    Sizes are those of PEFT's documentation. A prefix starts from the states of real words (Li &
    Liang 2021, section 7.4): after a random one, every answer is gibberish until long training has
    mended it. What starts at random follows ``seed`` alone, not what ran before. Raises
    ``ValueError`` for a method that the architecture does not support, and for a model that has an
    adapter already.
    """
    with extras.needed("train"):
        import peft  # slow to import

    model = wrappers.unwrapped(model)
    shape = models.shape_of(model)
    model_type = shape.model_type
    supported = [name for name, types in PEFT_METHODS.items() if model_type in types]
    sees_too = model.config.get_text_config(decoder=True) is not model.config
    # PEFT computes the number of key heads of an adapter from the hidden size
    is_square = shape.d_model == shape.n_heads * shape.head_dim
    if (sees_too or not is_square) and "llama-adapter" in supported:
        supported.remove("llama-adapter")
    if method not in supported:
        raise ValueError(
            f"PEFT method '{method}' is not available for architecture '{model_type}'"
            f" (there: {', '.join(supported)})"
        )
    if method == "lora":
        writer = models.writers(model, "attention")[0].module
        of_model = {"fan_in_fan_out": models.is_transposed(writer)}
        if sees_too:  # nothing is learned there from text
            of_model["exclude_modules"] = rf"(?!{re.escape(models.backbone_path(model))}\.).*"
    elif method == "llama-adapter":
        of_model = {
            "target_modules": models.architecture_of(model).attention.split(".")[0],
            "adapter_layers": max(1, shape.n_layers - 2),
        }
    else:
        of_model = _sizes_in_cache(model)
    configurations = {
        "lora": peft.LoraConfig,
        "llama-adapter": peft.AdaptionPromptConfig,
        "prefix": peft.PrefixTuningConfig,
    }
    settings = PEFT_COMMON | copy.deepcopy(PEFT_SETTINGS[method]) | of_model
    config = configurations[method](task_type=peft.TaskType.CAUSAL_LM, **settings)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        wrapped = peft.get_peft_model(
            model, config, autocast_adapter_dtype=True, low_cpu_mem_usage=False
        )
    if method == "prefix":
        peft.initialize_kv_prefix_from_text(
            wrapped,
            tokenizer,
            text=PREFIX_TEXT,
            num_virtual_tokens=PREFIX_TOKENS,
            use_chat_template=False,
            max_length=None,
        )
    return wrapped


@torch.no_grad()
def _sizes_in_cache(model: nn.Module) -> dict[str, int]:
    """What PEFT has to know of keys and values, from a cache: some models hold other numbers of
    heads there than their configuration says.
    """
    ids = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    with wrappers.evaluating(model):
        layers = model(input_ids=ids, use_cache=True).past_key_values.layers
    n_heads, head_dim = layers[0].keys.shape[1], layers[0].keys.shape[3]
    return {
        "num_layers": len(layers),
        "num_attention_heads": n_heads,
        "token_dim": n_heads * head_dim,
    }
