"""Get a model by its name: one that comes with the project, a folder, or a hub id.

Only here it is decided what may be loaded. Knows files and how transformers reads them. Does not
know where units are; ``models`` is asked whether it does.
"""

import json
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from ssah_utils import assets, embedded
from ssah_utils.models import DEQUANTISE, shape_of
from ssah_utils.prompts.chat import template_tokens

# Constants that older versions of transformers saved with the weights; it knows the others itself.
BUFFERS = re.compile(r"\brotary_emb\.inv_freq$|\battn\.masked_bias$")
BELONGS = (
    "take the tokenizer that belongs to the weights,"
    " or resize_token_embeddings, train and save the model"
)


def load(
    name: str, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """Model in evaluation mode and its tokenizer.

    ``name`` is one of ``embedded.NAMES`` (no hub), a local folder, or a Hugging Face id. Never runs
    remote code; reads safetensors only. Raises ``ValueError`` for a model that is there but not
    whole, quantised, or larger than its configuration says; ``ConnectionError`` for one that cannot
    be had; ``PermissionError`` for one whose terms are not accepted.
    """
    if name == embedded.TINY_RANDOM:
        tokenizer = load_tokenizer(name)
        return embedded.tiny_random(tokenizer, dtype).to(device).eval(), tokenizer
    folder = resolve(name)
    if Path(folder).is_dir():
        check_folder(Path(folder))
    tokenizer = load_tokenizer(name)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        refuse_quantised(config, name)
        model, found = auto_class(config).from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=False,
        )
    except OSError as error:
        raise ConnectionError(_not_loadable(name)) from error
    except RuntimeError as error:  # sizes that do not fit
        raise ValueError(
            f"the weights of '{name}' do not fit its config.json: {_reason(error)}"
        ) from error
    if missing := sorted(found["missing_keys"]):  # transformers would fill them with random numbers
        raise ValueError(
            f"'{name}' lacks {len(missing)} of its weights, such as {missing[0]}:"
            " download or save it again"
        )
    # transformers would leave these out: blocks or biases that the configuration does not mention
    if unused := sorted(key for key in found["unexpected_keys"] if not BUFFERS.search(key)):
        raise ValueError(
            f"'{name}' has {len(unused)} weights that its config.json does not use,"
            f" such as {unused[0]}: give it the config.json that it was saved with"
        )
    shape_of(model)  # raises for a block in which something writes that has no entry
    return model.to(device).eval(), tokenizer


def auto_class(config: PretrainedConfig) -> type:
    """The class of transformers that loads a model which writes text, whatever else it reads."""
    is_known = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    return AutoModelForCausalLM if is_known else AutoModelForImageTextToText


def without_weights(config: PretrainedConfig) -> nn.Module:
    """The model of a configuration, of which no weight has a value: made in no time and memory."""
    with torch.device("meta"):
        return auto_class(config).from_config(config)


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, without its weights, as ``with_padding_token`` leaves it.

    Raises ``ValueError`` for one that does not belong to the weights or is missing in a folder,
    ``ConnectionError`` for one that cannot be had.
    """
    folder = resolve(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        if Path(name).is_dir():
            raise ValueError(
                f"model folder '{name}' has no usable tokenizer: {_reason(error)}"
            ) from error
        raise ConnectionError(_not_loadable(name)) from error
    n_rows = config.get_text_config().vocab_size
    try:
        tokenizer = with_padding_token(tokenizer, n_rows)
        check_rows(tokenizer, n_rows)
    except ValueError as error:
        raise ValueError(f"model '{name}': {error}") from error
    return tokenizer


def with_padding_token(tokenizer: PreTrainedTokenizerBase, n_rows: int) -> PreTrainedTokenizerBase:
    """The tokenizer; it pads with its end token if its padding token is no row of the embedding.

    Which token it is changes no result, as padding is masked everywhere. Raises ``ValueError`` when
    the end token is none of the ``n_rows`` rows either.
    """
    end, padding = tokenizer.eos_token_id, tokenizer.pad_token_id
    if end is not None and end >= n_rows:
        raise ValueError(
            f"the tokenizer's end token {tokenizer.eos_token!r} is {end}, but the embedding has"
            f" {n_rows} rows: {BELONGS}"
        )
    if padding is None or padding >= n_rows:
        if end is None:
            raise ValueError(
                "the tokenizer has no padding token that the model knows,"
                " and no end token to pad with: set one"
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_rows(tokenizer: PreTrainedTokenizerBase, n_rows: int) -> None:
    """``ValueError`` for a tokenizer whose prompts can hold tokens beyond an embedding's rows.

    Those are its words, which any request may hold, and what it or its chat template puts around a
    request. Added tokens that neither uses may be beyond the ``n_rows`` rows.
    """
    words = set(tokenizer.get_vocab().values()) - set(tokenizer.get_added_vocab().values())
    used = {
        "vocabulary": words,
        "chat template or the tokenizer itself": template_tokens(tokenizer),
    }
    for what, ids in used.items():
        if beyond := sorted(token for token in ids if token >= n_rows):
            token = tokenizer.convert_ids_to_tokens(beyond[0])
            raise ValueError(
                f"the {what} uses {token!r}, which is token {beyond[0]},"
                f" but the embedding has {n_rows} rows: {BELONGS}"
            )


def resolve(name: str) -> str:
    """What ``from_pretrained`` should be given for a model's name.

    Fetches nothing but an embedded model. Raises ``ValueError`` for a name that is neither
    embedded, nor a folder with a model, nor shaped like a hub id.
    """
    if name in embedded.NAMES:
        own = embedded.DEFAULT if name == embedded.TINY_RANDOM else name  # it borrows a tokenizer
        return str(embedded.folder_of(own))
    if Path(name).is_dir():
        if (Path(name) / "adapter_config.json").exists():
            base = _json(Path(name) / "adapter_config.json").get("base_model_name_or_path")
            raise ValueError(
                f"folder '{name}' holds an adapter of '{base}', not a model: load it with PEFT,"
                " merge_and_unload(), and give the folder to which the merged model is saved"
            )
        if not (Path(name) / "config.json").exists():
            raise ValueError(f"folder '{name}' holds no config.json, so no Hugging Face model")
        return name
    parts = name.split("/")
    if len(parts) != 2 or not all(parts) or name[0] in "./~":
        raise ValueError(
            f"unknown model '{name}': give one that is embedded ({', '.join(embedded.MODELS)}),"
            " an existing folder, or a hub id such as 'meta-llama/Llama-2-7b-chat-hf'"
        )
    return name


# ------------------------------------------------------------------------------------ what is there


def checked_config(name: str) -> PretrainedConfig:
    """Configuration of a model that can be loaded, as far as one can tell without reading weights.

    ``ValueError`` says what a folder lacks, ``ConnectionError`` that a hub id cannot be had.
    """
    folder = resolve(name)
    is_local = Path(folder).is_dir()
    if is_local:
        check_folder(Path(folder))
    try:
        local_only = is_local or not assets.hub_answers()
        config = AutoConfig.from_pretrained(
            folder, local_files_only=local_only, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        if is_local or not isinstance(error, OSError):
            raise ValueError(f"model '{name}' cannot be used: {_reason(error)}") from error
        raise ConnectionError(_not_loadable(name)) from error
    refuse_quantised(config, name)
    return config


def refuse_quantised(config: PretrainedConfig, name: str) -> None:
    """``ValueError`` for weights that are codes, whether or not what reads them is installed."""
    quantised = getattr(config, "quantization_config", None)
    if not quantised:
        return
    is_dict = isinstance(quantised, dict)
    method = quantised.get("quant_method") if is_dict else quantised.quant_method
    method = getattr(method, "value", method)
    raise ValueError(
        f"model '{name}' is quantised ({method}), so its units cannot be read: {DEQUANTISE}"
    )


def check_folder(folder: Path) -> None:
    """``ValueError`` unless a folder's weights are safetensors, all there and none cut short."""
    _json(folder / "config.json")
    index = folder / "model.safetensors.index.json"
    is_split = index.exists()
    shards = set(_json(index).get("weight_map", {}).values()) if is_split else set()
    names = sorted(shards) if is_split else ["model.safetensors"]
    missing = [name for name in names if not (folder / name).exists()]
    if missing and not is_split:
        pickles = any(next(folder.glob(f"*{suffix}"), None) for suffix in (".bin", ".pt", ".pth"))
        why = (
            "its weights are pickles, which can run code: save_pretrained it where you trust it"
            if pickles
            else "it holds no weights"
        )
        raise ValueError(f"model folder '{folder}' has no safetensors: {why}")
    if missing:
        raise ValueError(
            f"model folder '{folder}' lacks {len(missing)} of {len(names)} files of weights:"
            f" {', '.join(missing)}"
        )
    for name in names:
        try:
            with safe_open(folder / name, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"'{folder / name}' is not whole (a download broken off, or a Git LFS pointer):"
                f" {_reason(error)}"
            ) from error


def _json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {_reason(error)}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object")
    return content


def _reason(error: Exception) -> str:
    """One line of what a library says at length."""
    if "trust_remote_code" in str(error):
        return "it needs program code of its own, which is never run here"
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _not_loadable(name: str) -> str:
    return (
        f"cannot load '{name}' from the Hugging Face hub or its cache"
        " (no network, no such id, no access, or no safetensors);"
        f" without a hub use an embedded model: '{embedded.DEFAULT}'"
    )


def check_reachable(name: str) -> None:
    """Raise before any compute when a model cannot be had or its architecture is not supported.

    ``ValueError`` or ``ConnectionError``, as ``checked_config`` has them.
    """
    if name in embedded.NAMES:
        if name in embedded.MODELS:
            embedded.check_terms(name)
        return
    config = checked_config(name)
    try:
        shape_of(without_weights(config))
    except (AttributeError, ImportError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"model '{name}' is not supported: {_reason(error)}") from error
