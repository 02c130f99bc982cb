"""What a notebook takes over from earlier ones: the models of 01, the partition of 03, the splits.

All of it is asked of the run, so that what was read is in the result, with its hash.
"""

import difflib
import json
from pathlib import Path

import pandas as pd
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ssah_utils import fingerprints, loading, precision, unit_files, units
from ssah_utils.per_unit import PerUnit
from ssah_utils.pipeline.runs import Run, load_result
from ssah_utils.prompts import chat, datasets


def model_places(run: Run) -> dict[str, str]:
    """Where the models of 01 are: ``base``, ``aligned`` and, where there is one, ``unaligned``."""
    return json.loads(run.upstream("01_alignment", "models.json").read_text(encoding="utf-8"))


def load_model(run: Run, name: str, dtype: torch.dtype | None = None) -> nn.Module:
    """A model of 01 on the device of choice, in the run's precision unless another is given.

    ``LookupError`` for a name that 01 has not, with the nearest that it has.
    """
    places = model_places(run)
    if name not in places:
        near = difflib.get_close_matches(name, places, n=1, cutoff=0)
        raise LookupError(f"01_alignment has no model '{name}'; nearest is '{near[0]}'")
    device = precision.preferred_device()
    return loading.load(places[name], dtype or precision.preferred_dtype(device), device)[0]


def load_tokenizer(run: Run) -> PreTrainedTokenizerBase:
    """The tokenizer of the run's model, with the run's chat template.

    Raises what ``chat.set_chat_template`` raises for a template or system prompt that cannot work.
    """
    tokenizer = loading.load_tokenizer(run.parameters["model"])
    template, system_prompt = run.parameters["chat_template"], run.parameters["system_prompt"]
    chat.set_chat_template(tokenizer, template, system_prompt)
    return tokenizer


def parameters(run: Run, stage: str) -> dict:
    """The parameters that an earlier notebook was run with, for those that must agree with it."""
    return load_result(run.upstream(stage, "result.json"))["parameters"]


def describe_model(run: Run, model: nn.Module) -> unit_files.ModelInfo:
    """A run's aligned model for a unit file: whose it is, and whether 01 aligned it."""
    name, places = run.parameters["model"], model_places(run)
    name = Path(name).name if Path(name).is_absolute() else name
    if places["aligned"] != places["base"]:
        name = f"{name}, aligned by 01_alignment"
    return unit_files.ModelInfo.of(model, name)


def load_partition(run: Run, model: nn.Module) -> tuple[units.UnitPartition, dict[str, PerUnit]]:
    """The partition of 03 and its scores; ``ValueError`` if they belong to another model."""
    path = run.upstream("03_units", "units.safetensors")
    return unit_files.load_partition(path, fingerprints.fingerprint(model))


def study_splits(run: Run) -> dict[str, dict[str, pd.DataFrame]]:
    """The same disjoint requests for every notebook: ``{part: {set: table}}``."""
    names = ("harmful_data", "other_harmful_data", "helpful_data")
    return datasets.study_splits(*(run.parameters[name] for name in names))
