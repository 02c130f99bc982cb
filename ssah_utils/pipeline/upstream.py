"""What a notebook takes over from earlier ones: the models of 01, the partition of 03, the splits.

All of it is asked of the run, so that what was read is in the result, with its hash.
"""

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from weakref import WeakValueDictionary

import pandas as pd
from torch import nn
from transformers import PreTrainedTokenizerBase

from ssah_utils import (
    embedded,
    fingerprints,
    hub,
    loading,
    placement,
    precision,
    quantised,
    unit_files,
    units,
    wrappers,
)
from ssah_utils.files import DATA
from ssah_utils.per_unit import PerUnit
from ssah_utils.pipeline.runs import Run
from ssah_utils.pipeline.stored import judged_by, load_result
from ssah_utils.prompts import chat, datasets


def model_places(run: Run) -> dict[str, str]:
    """Where the models of 01 are: ``base``, ``aligned`` and, where there is one, ``unaligned``."""
    return json.loads(run.upstream("01_alignment", "models.json").read_text(encoding="utf-8"))


def came_aligned(places: Mapping[str, str]) -> bool:
    """Whether the model of ``model_places`` was aligned by others, so that 01 only measured it."""
    return places["aligned"] == places["base"]


# Notebooks that do not build on the models of 01.
WITHOUT_01 = ("00_quickstart", "01_alignment")
PLAIN_TEMPLATE = DATA / "plain_chat.jinja"  # for a base without a chat template

# Models that are in use, by place, precision, device and device map.
_in_use: WeakValueDictionary[tuple, nn.Module] = WeakValueDictionary()


def load_model(run: Run, name: str, dtype: precision.Precision | None = None) -> nn.Module:
    """A model of 01 on the device of choice, in the run's precision unless another is given.

    By the run's ``device_map``, where there is one. Only to look at. Where two names mean the same
    model, as the base and the aligned one of a model that came aligned, both are modules of their
    own over the same weights.

    ``LookupError`` for a name that 01 has not, with the nearest that it has.
    """
    places = model_places(run)
    if name not in places:
        near = difflib.get_close_matches(name, places, n=1, cutoff=0)
        raise LookupError(f"01_alignment has no model '{name}'; nearest is '{near[0]}'")
    return load_from(run, places[name], name, dtype)


def load_from(
    run: Run, place: str, name: str = "model", dtype: precision.Precision | None = None
) -> nn.Module:
    """``load_model`` of what is at a place; ``name`` is what the run calls it."""
    device = precision.preferred_device()
    device_map = run.parameters.get("device_map", "")
    key = (place, dtype or precision.preferred_dtype(device), device, device_map)
    there = _in_use.get(key)
    if there is not None and next(quantised.quantised_modules(there), None) is None:
        return wrappers.over_same_weights(there)
    _in_use[key] = model = loading.load(*key)[0]
    if spread := placement.summary(model):
        print(f"{name}: {spread}")
    return model


def place_to_align(run: Run) -> str:
    """Where the model is that 07 aligns: the one asked for, else the base of 01.

    A model that came aligned is no base; then it is the embedded model that does not refuse.
    """
    if run.parameters["start_model"]:
        return run.parameters["start_model"]
    places = model_places(run)
    return embedded.DEFAULT if came_aligned(places) else places["base"]


def shown_name(place: str) -> str:
    """A model's name as people read it: of a folder, the last part of its path."""
    return Path(place).name if Path(place).is_absolute() else place


def load_tokenizer(run: Run, place: str = "") -> PreTrainedTokenizerBase:
    """The tokenizer of the run's model, or of the one at ``place``, with the run's chat template.

    A base without a template of its own gets that of the run's model, if their words are the same,
    else the project's plain one. Raises what ``chat.set_chat_template`` raises for a template or
    system prompt that cannot work.
    """
    own = run.parameters["model"]
    tokenizer = loading.load_tokenizer(place or own)
    template, system_prompt = run.parameters["chat_template"], run.parameters["system_prompt"]
    if place not in ("", own) and not tokenizer.chat_template:
        of_chat = loading.load_tokenizer(own)
        is_same = of_chat.get_vocab() == tokenizer.get_vocab() and of_chat.chat_template
        template = template or ("" if is_same else str(PLAIN_TEMPLATE))
        tokenizer.chat_template = of_chat.chat_template if is_same else None
    chat.set_chat_template(tokenizer, template, system_prompt)
    return tokenizer


def parameters(run: Run, stage: str) -> dict:
    """The parameters that an earlier notebook was run with, for those that must agree with it."""
    return load_result(run.upstream(stage, "result.json"))["parameters"]


def judge_of(run: Run, stage: str) -> str:
    """The judge whose verdicts an earlier notebook has stored."""
    return judged_by(load_result(run.upstream(stage, "result.json")))


def describe_model(run: Run, model: nn.Module) -> unit_files.ModelInfo:
    """A run's aligned model for a unit file: whose it is, and whether 01 aligned it."""
    place, places = run.parameters["model"], model_places(run)
    name, revision = hub.split_name(place) if hub.is_name(place) else (shown_name(place), "")
    if not came_aligned(places):
        name = f"{name}, aligned by 01_alignment"
    return unit_files.ModelInfo.of(model, name, revision)


def load_partition(run: Run, model: nn.Module) -> tuple[units.UnitPartition, dict[str, PerUnit]]:
    """The partition of 03 and its scores; ``ValueError`` if they belong to another model."""
    path = run.upstream("03_units", "units.safetensors")
    return unit_files.load_partition(path, fingerprints.fingerprint(model))


def study_splits(run: Run) -> dict[str, dict[str, pd.DataFrame]]:
    """Disjoint requests, of evaluation the same for every notebook: ``{part: {set: table}}``.

    Where the model came aligned, the seed draws which of the other requests it is calibrated on in
    all that follows 01. No training of ours makes its seeds differ: with the same requests they
    would find the same units, and count one measurement several times.
    """
    names = ("harmful_data", "other_harmful_data", "helpful_data")
    is_drawn = run.stage not in WITHOUT_01 and came_aligned(model_places(run))
    seed = run.parameters["seed"] if is_drawn else 0
    return datasets.study_splits(*(run.parameters[name] for name in names), seed=seed)
