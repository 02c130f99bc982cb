"""What a model's folder holds, told by its names and its small files: no weight is read.

Knows the files that transformers saves, and what else is published beside or instead of them. Does
not know architectures, or where a model comes from.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from transformers import PretrainedConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ssah_utils.display import first_line

SINGLE, INDEX = SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME
WRITES = ("ForCausalLM", "ForConditionalGeneration", "LMHeadModel")  # ends of classes' names


def check_files(folder: Path, what: str) -> None:
    """``ValueError`` for a folder whose small files are not those of a whole model."""
    if (folder / "adapter_config.json").exists():  # transformers would load its base instead
        base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
        raise ValueError(
            f"{what} holds an adapter of '{base}', not a model: load it with PEFT,"
            " merge_and_unload(), and give the folder to which the merged model is saved"
        )
    if not (folder / "config.json").exists():
        raise ValueError(f"{what} holds no config.json, so no Hugging Face model")
    if not (folder / "generation_config.json").exists():
        return
    # transformers passes over one that it cannot read, and answers would not end
    ends = read_json(folder / "generation_config.json").get("eos_token_id")
    if not all(type(end) is int for end in (ends if isinstance(ends, list) else [ends or 0])):
        raise ValueError(f"{what}: eos_token_id in its generation_config.json is no number: {ends}")


def check_writes(config: PretrainedConfig, name: str) -> None:
    """``ValueError`` for weights that were saved with a head which does not write text."""
    given = config.architectures or []
    saved_as = [given] if isinstance(given, str) else given
    heads = [own for own in saved_as if "For" in own]  # a name without one leaves it open
    if heads and not any(own.endswith(WRITES) for own in saved_as):
        raise ValueError(
            f"model '{name}' is a {heads[0]}, which does not write text:"
            " give the language model of which it was made"
        )


def files_in_index(index: Path) -> list[str]:
    """Names of the files of weights that an index lists; ``ValueError`` where it lists none."""
    listed = read_json(index).get("weight_map")
    names = set(listed.values()) if isinstance(listed, dict) else set()
    if not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{index} does not say which file holds which weight: save the model anew")
    return sorted(names)


def why_no_safetensors(files: Iterable[str]) -> str:
    """What a folder of these files has in place of ``model.safetensors`` and of an index."""
    files = sorted(files)
    if others := [file for file in files if file.endswith(".safetensors")]:
        return f"it has '{others[0]}', but neither '{SINGLE}' nor '{INDEX}', which are read"
    if any(file.endswith((".bin", ".pt", ".pth")) for file in files):
        return "its weights are pickles, which can run code: save_pretrained it where you trust it"
    if any(file.endswith(".gguf") for file in files):
        return "its weights are GGUF files: give the model of which they were made"
    return "it holds no weights"


def read_json(path: Path) -> dict:
    """The object in a JSON file; ``ValueError`` in one line where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {first_line(error)}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object")
    return content
