"""Get a model by its name: one that comes with the project, a folder, or a hub id.

Only here it is decided what may be loaded. Knows files and how transformers reads them. Does not
know where units are; ``models`` is asked whether it does.
"""

import re
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from ssah_utils import (
    checkpoints,
    device_maps,
    embedded,
    hub,
    offloading,
    quantised,
    quantisers,
    room,
    wrappers,
)
from ssah_utils.display import first_line
from ssah_utils.files import cache_dir
from ssah_utils.models import shape_of
from ssah_utils.precision import Precision, Quantised, computed_in, to_dtype
from ssah_utils.prompts.chat import template_tokens

transformers.utils.logging.disable_progress_bar()

# Constants that older versions of transformers saved with the weights; it knows the others itself.
BUFFERS = re.compile(r"\brotary_emb\.inv_freq$|\battn\.masked_bias$")
BELONGS = (
    "take the tokenizer that belongs to the weights,"
    " or resize_token_embeddings, train and save the model"
)


def load(
    name: str, dtype: Precision = torch.float32, device: str = "cpu", device_map: str = ""
) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """Model in evaluation mode and its tokenizer.

    A model that is stored quantised is loaded so; ``dtype`` is then that of all that is no matrix
    of codes. With a ``Quantised`` one, it is quantised as it is loaded, by bitsandbytes. ``name``
    is one of ``embedded.NAMES`` (no hub), a local folder, or a Hugging Face id, with ``@revision``
    for another than the newest. By a ``device_map`` (``device_maps.read_map``) it is spread over
    several devices, memory and disk, to be looked at; ``device`` then means nothing. Never runs
    remote code; reads safetensors only. Raises
    ``ValueError`` for a model that is there but not whole, quantised by a method that is not read,
    or larger than its configuration says, and for a map that does not fit it; ``ConnectionError``
    for one that cannot be had; ``PermissionError`` for one whose terms are not accepted;
    ``OSError`` for too little disk or memory.
    """
    if name == embedded.TINY_RANDOM:
        tokenizer = load_tokenizer(name)
        model = wrappers.unwrapped(embedded.tiny_random(tokenizer, computed_in(dtype)))
        if not isinstance(dtype, Quantised) and not device_map:
            return model.to(device).eval(), tokenizer
        with offloading.folder_for_a_model() as saved:
            model.save_pretrained(saved.path)
            tokenizer.save_pretrained(saved.path)
            model, tokenizer = load(str(saved.path), dtype, device, device_map)
            saved.keep_with(model)
            return model, tokenizer
    is_ours = name in embedded.MODELS
    if is_ours:  # its family is known, and it is made as soon as its configuration is asked for
        check_room(name, dtype, device, device_map)
    config, tokenizer = config_of(name), load_tokenizer(name)
    check_numbers(config, name, dtype)
    if not is_ours:
        check_supported(config, name)
        check_room(name, dtype, device, device_map)
    folder = whole_folder(name)
    where = device_maps.read_map(device_map) or {"": device}
    if device_map and isinstance(where, dict):
        where = device_maps.flat_map(where, without_weights(config))
    try:
        with offloading.folder_for_a_model() as resaved:
            spread = {"device_map": where, "offload_folder": resaved.path} if device_map else {}
            model, found = auto_class(config).from_pretrained(
                folder,
                **quantisers.loading_arguments(config, dtype, where) | spread,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are refused below, by their names
            )
            resaved.keep_with(model)
    except Exception as error:
        if device_map and isinstance(dtype, Quantised):  # of bitsandbytes, at length
            raise ValueError(
                f"'{name}' does not go by device_map {device_map} as {dtype.codes}:"
                f" {_reason(error)}"
            ) from error
        if quantisers.method_of(config):
            raise quantisers.not_run(config, name, _reason(error)) from error
        raise ValueError(f"the weights of '{name}' cannot be loaded: {_reason(error)}") from error
    if mismatched := sorted(found["mismatched_keys"]):
        key, stored, asked = mismatched[0]
        raise ValueError(
            f"the weights of '{name}' do not fit its config.json: {key} is of shape"
            f" {tuple(stored)}, where it asks for {tuple(asked)}"
        )
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
    if quantisers.method_of(config):
        quantised.check_codes(model, name, quantisers.keeps_codes(config))
    shape_of(model)  # raises for a block in which something writes that has no entry
    if hub.is_name(name):  # not the folder in the cache
        model.name_or_path = model.config.name_or_path = hub.split_name(name)[0]
        model.config._commit_hash = hub.commit_of(name)
    if quantisers.keeps_codes(model.config):
        quantised.keep_codes(model)
    else:
        if quantisers.method_of(config):  # what was no matrix of codes is as it was stored
            model = to_dtype(model, computed_in(dtype))
        if not device_map:
            model = model.to(device)
    if device_map:  # it is only looked at, and parameters that are fetched come anew each time
        model.requires_grad_(False)
    return model.eval(), tokenizer


def auto_class(config: PretrainedConfig) -> Any:
    """The class of transformers that loads a model which writes text, whatever else it reads.

    ``ValueError`` for a model of another kind.
    """
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForCausalLM
    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return AutoModelForImageTextToText
    raise ValueError(
        f"a '{config.model_type}' is no causal language model, which goes on with the text it reads"
    )


def without_weights(config: PretrainedConfig) -> nn.Module:
    """The model of a configuration, of which no weight has a value: made in no time and memory."""
    with torch.device("meta"):
        return auto_class(config).from_config(config, dtype=torch.float32)


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, without its weights, as ``with_padding_token`` leaves it.

    Raises ``ValueError`` for one that is missing or does not belong to the weights, and what
    ``resolve`` raises.
    """
    folder, config = resolve(name), config_of(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # a broken file can break any library at any place
        raise ValueError(f"model '{name}' has no usable tokenizer: {_reason(error)}") from error
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise ValueError(
            f"model '{name}' has a {type(tokenizer).__name__}, which is program code: results could"
            " not be kept under all that they depend on; give the model a tokenizer.json"
        )
    if hub.is_name(name):
        tokenizer.name_or_path = hub.split_name(name)[0]
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


def resolve(name: str) -> Path:
    """Folder of a model with all but, perhaps, its weights.

    Fetches an embedded model, or what a model on the hub has beside its weights. Raises
    ``ValueError`` for a name that is neither embedded, nor a folder with a model, nor one of the
    hub, and ``ConnectionError`` where the hub is needed and does not answer, or not to this user.
    """
    if name in embedded.NAMES:
        own = embedded.DEFAULT if name == embedded.TINY_RANDOM else name  # it borrows a tokenizer
        return embedded.folder_of(own)
    if Path(name).is_dir():
        checkpoints.check_files(Path(name), f"folder '{name}'")
        return Path(name)
    if not hub.is_name(name):
        raise ValueError(
            f"unknown model '{name}': give one that is embedded ({', '.join(embedded.MODELS)}),"
            " an existing folder, or a hub id such as 'meta-llama/Llama-2-7b-chat-hf'"
        )
    try:
        folder = hub.folder(name)
    except ConnectionError as error:
        raise ConnectionError(f"{error}; without a hub: {', '.join(embedded.MODELS)}") from error
    checkpoints.check_files(folder, f"model '{hub.split_name(name)[0]}'")
    return folder


def whole_folder(name: str) -> Path:
    """``resolve``, with the weights: fetched where they are absent, and checked."""
    folder = hub.fetch(name) if hub.is_name(name) else resolve(name)
    try:
        check_folder(folder)
    except ValueError as error:
        if name in embedded.NAMES:
            raise ValueError(f"{error}; delete that folder: it will be made again") from error
        raise
    return folder


def check_room(name: str, dtype: Precision, device: str = "cpu", device_map: str = "") -> None:
    """``OSError``, before anything large is fetched, for weights that do not fit into memory.

    What is stored as codes is kept as it is stored. By a ``device_map``, each place has to hold its
    part; ``ValueError`` for a map that does not fit the model.
    """
    if device_map:
        check_placement(name, dtype, device_map)
        return
    if name == embedded.TINY_RANDOM:
        return
    is_folder = name not in embedded.MODELS
    if is_folder and quantisers.keeps_codes(config_of(name)):
        n_bytes = hub.n_bytes(name) if hub.is_name(name) else _size_of(resolve(name))
        room.require_memory(name, n_bytes, torch.uint8, device)
    else:
        room.require_memory(name, _n_parameters(name), dtype, device)


@cache
def check_placement(name: str, dtype: Precision, device_map: str) -> None:
    """``ValueError`` for a device map that does not fit a model, ``OSError`` where it has no room.

    Reads no weights.
    """
    found = device_maps.read_map(device_map)
    if isinstance(found, str):
        n_bytes = _n_parameters(name) * dtype.itemsize if name != embedded.TINY_RANDOM else 0
        room.require_anywhere(name, int(n_bytes), cache_dir())
        return
    if name == embedded.TINY_RANDOM:
        model, has_codes = embedded.tiny_random(load_tokenizer(name), computed_in(dtype)), False
    else:
        config = AutoConfig.from_pretrained(resolve(name), trust_remote_code=False)
        model, has_codes = without_weights(config), quantisers.keeps_codes(config)
    device_maps.check_map(found, model, name, dtype, has_codes)
    if not has_codes:
        room.require_places(name, device_maps.bytes_by_place(found, model, dtype), dtype)


def check_room_to_train(stage: str, name: str, device: str = "cpu") -> None:
    """``OSError`` for a model that a notebook cannot train all of in a device's memory.

    Weights, gradients and AdamW's two moments, in float32: where the model is in bfloat16, too,
    what units own is trained so (``unit_training``), and that is most of it.
    """
    needed = 16 * (0 if name == embedded.TINY_RANDOM else _n_parameters(name))
    free = room.free_on(device)
    if free is not None and needed > free:
        place, larger = ("GPU memory", "larger GPU") if device != "cpu" else ("memory", "GPU")
        raise OSError(
            f"{stage} trains '{name}', which takes {needed / room.GIB:.1f} GiB of {place}, and"
            f" {free / room.GIB:.1f} GiB are free: run the notebooks that do not train by --only,"
            f" or take a smaller model or a {larger}"
        )


def _n_parameters(name: str) -> int:
    if name in embedded.MODELS:
        return embedded.MODELS[name].n_bytes_float32 // torch.float32.itemsize
    if quantisers.method_of(config := config_of(name)):  # several codes may be in one number
        return sum(parameter.numel() for parameter in without_weights(config).parameters())
    if hub.is_name(name):
        return hub.n_parameters(name)
    return room.n_parameters_in(check_folder(resolve(name)))


def _size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in check_folder(folder))


# ------------------------------------------------------------------------------------ what is there


def checked_config(name: str) -> PretrainedConfig:
    """Configuration of a model that can be loaded, as far as one can tell without reading weights.

    ``ValueError`` says what it lacks, ``ConnectionError`` that it cannot be had, ``OSError`` that
    the disk is too small for it.
    """
    config = config_of(name)
    quantisers.check_method(config, name)
    if hub.is_name(name):
        hub.check_weights(name)
    else:
        check_folder(resolve(name))
    return config


def config_of(name: str) -> PretrainedConfig:
    """Configuration of a model, as transformers reads it.

    ``ValueError`` for one that it cannot read, and what ``resolve`` raises.
    """
    folder = resolve(name)
    checkpoints.read_json(folder / "config.json")
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # a field of another kind can break it at any place
        raise ValueError(f"model '{name}' cannot be used: {_reason(error)}") from error


def check_numbers(config: PretrainedConfig, name: str, dtype: Precision) -> None:
    """``ValueError`` for a model that cannot be loaded in these numbers; reads no weights.

    ``ModuleNotFoundError`` where that takes an extra that is not installed.
    """
    quantisers.check_method(config, name)
    if isinstance(dtype, Quantised):
        quantisers.check_quantises(config, name, dtype)


def check_folder(folder: Path) -> list[Path]:
    """A folder's files of weights; ``ValueError`` unless all are there, safetensors and whole."""
    index = folder / checkpoints.INDEX
    if not (folder / checkpoints.SINGLE).exists() and not index.exists():
        why = checkpoints.why_no_safetensors(path.name for path in folder.iterdir())
        raise ValueError(f"model folder '{folder}' has no safetensors: {why}")
    # transformers reads the single file where there are both
    is_single = (folder / checkpoints.SINGLE).exists()
    names = [checkpoints.SINGLE] if is_single else checkpoints.files_in_index(index)
    missing = [name for name in names if not (folder / name).exists()]
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
    return [folder / name for name in names]


def _reason(error: Exception) -> str:
    """One line of what a library says at length."""
    if "trust_remote_code" in str(error):
        return "it needs program code of its own, which is never run here"
    return first_line(error)


def check_reachable(name: str) -> None:
    """Raise before any compute when a model cannot be had or its architecture is not supported.

    Raises as ``checked_config`` does.
    """
    if name in embedded.NAMES:
        if name in embedded.MODELS:
            embedded.check_terms(name)
        return
    check_supported(checked_config(name), name)


def check_supported(config: PretrainedConfig, name: str) -> None:
    """``ValueError``, by a configuration alone, for a model that writes no text, or whose blocks no
    entry of ``ARCHITECTURES`` covers.
    """
    checkpoints.check_writes(config, name)
    try:
        shape_of(without_weights(config))
    except Exception as error:  # sizes that make no sense break a model at any place
        raise ValueError(f"model '{name}' is not supported: {_reason(error)}") from error
