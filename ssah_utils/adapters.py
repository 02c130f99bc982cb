"""Parameter-efficient baselines: PEFT's methods under the names the paper uses.

Knows models. Does not know how they are trained.
"""

from torch import nn
from transformers import PreTrainedTokenizerBase

from ssah_utils import models

PEFT_METHODS = {"lora": tuple(models.ARCHITECTURES), "llama-adapter": ("llama", "mistral", "gpt2"),
                "prefix": tuple(models.ARCHITECTURES)}  # fmt: skip
PREFIX_TOKENS = 20
PREFIX_TEXT = (
    "What follows is a conversation between a person and an assistant. The person asks a question or gives an instruction, "
    "and the assistant answers it."
)


def with_adapter(model: nn.Module, method: str, tokenizer: PreTrainedTokenizerBase) -> nn.Module:
    """The model wrapped by PEFT, its own parameters frozen: ``lora``, ``llama-adapter`` or ``prefix``.

    Sizes are those of PEFT's documentation. A prefix starts from the states of real words (Li & Liang 2021, section 7.4): a
    random one makes gibberish of every answer until long training has mended it. Raises ``ValueError`` that names what
    the architecture supports.
    """
    import peft  # slow to import

    shape = models.shape_of(model)
    model_type = shape.model_type
    supported = [name for name, types in PEFT_METHODS.items() if model_type in types]
    if shape.d_model != shape.n_heads * shape.head_dim and "llama-adapter" in supported:
        supported.remove("llama-adapter")  # PEFT computes the number of key heads from the hidden size
    if method not in supported:
        raise ValueError(
            f"PEFT method '{method}' is not available for architecture '{model_type}' (there: {', '.join(supported)})"
        )
    task = peft.TaskType.CAUSAL_LM
    n_layers = model.config.num_hidden_layers
    config = {
        "lora": lambda: peft.LoraConfig(task_type=task, r=8, lora_alpha=16, target_modules="all-linear"),
        "llama-adapter": lambda: peft.AdaptionPromptConfig(task_type=task, adapter_len=10, adapter_layers=max(1, n_layers - 2)),
        "prefix": lambda: peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=PREFIX_TOKENS),
    }[method]()
    wrapped = peft.get_peft_model(model, config)
    if method == "prefix":
        peft.initialize_kv_prefix_from_text(wrapped, tokenizer, text=PREFIX_TEXT, use_chat_template=False)
    return wrapped
