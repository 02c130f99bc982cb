"""Parameter-efficient baselines: PEFT's methods under the names the paper uses.

Knows models. Does not know how they are trained.
"""

import copy

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ssah_utils import models, wrappers

PEFT_METHODS = {
    "lora": tuple(models.ARCHITECTURES),
    "llama-adapter": ("llama", "mistral", "gpt2"),
    "prefix": tuple(models.ARCHITECTURES),
}
PREFIX_TOKENS = 20
PREFIX_TEXT = (
    "What follows is a conversation between a person and an assistant. The person asks a question"
    " or gives an instruction, and the assistant answers it."
)
# of PEFT's configurations, as its documentation has them; a test holds the tables against the
# fields that there are
EVERY = {"inference_mode": False, "revision": None}
SETTINGS = {
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
# fields that are left to PEFT, each with the reason why no trained adapter depends on it
LEFT = {
    "filled in by PEFT from what is set": (
        "peft_type",
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
    ),
    "read from the model's configuration": ("token_dim", "num_attention_heads", "num_layers"),
    "where computations run, or of what is off": ("runtime_config", "megatron_core"),
}


def with_adapter(
    model: nn.Module, method: str, tokenizer: PreTrainedTokenizerBase, seed: int = 0
) -> nn.Module:
    """The model wrapped by PEFT, its own parameters frozen: ``lora``, ``llama-adapter`` or
    ``prefix``.

    Sizes are those of PEFT's documentation. A prefix starts from the states of real words (Li &
    Liang 2021, section 7.4): a random one makes gibberish of every answer until long training has
    mended it. What starts at random follows ``seed`` alone, not what ran before. Raises
    ``ValueError`` that names what the architecture supports, and for a model that has an adapter
    already.
    """
    import peft  # slow to import

    model = wrappers.unwrapped(model)
    shape = models.shape_of(model)
    model_type = shape.model_type
    supported = [name for name, types in PEFT_METHODS.items() if model_type in types]
    if shape.d_model != shape.n_heads * shape.head_dim and "llama-adapter" in supported:
        supported.remove(
            "llama-adapter"
        )  # PEFT computes the number of key heads from the hidden size
    if method not in supported:
        raise ValueError(
            f"PEFT method '{method}' is not available for architecture '{model_type}' (there:"
            f" {', '.join(supported)})"
        )
    writer = models.architecture_of(model).writers["attention"]
    of_model = {
        "lora": {"fan_in_fan_out": models.is_transposed(models.writers(model, "attention")[0])},
        "llama-adapter": {
            "target_modules": writer.split(".")[0],
            "adapter_layers": max(1, shape.n_layers - 2),
        },
        "prefix": {},
    }[method]
    kind = {
        "lora": peft.LoraConfig,
        "llama-adapter": peft.AdaptionPromptConfig,
        "prefix": peft.PrefixTuningConfig,
    }[method]
    config = kind(
        task_type=peft.TaskType.CAUSAL_LM, **EVERY, **copy.deepcopy(SETTINGS[method]), **of_model
    )
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
