"""What a valid notebook parameter is, by its name; checked before any kernel starts.

A parameter's type is that of its default in the notebook. Its meaning is told by its name:
``*_fraction`` lies in [0, 1], ``n_*`` counts, ``*_data`` names a data set, ``*model`` a model.
The table ``RULES`` has them all.
"""

import dataclasses
from collections.abc import Callable
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

from ssah_utils import embedded, extras
from ssah_utils.adapters import PEFT_METHODS
from ssah_utils.device_maps import read_map
from ssah_utils.experiments.defence_names import NAMED, mixed_names
from ssah_utils.experiments.recipe import Recipe
from ssah_utils.loading import (
    check_numbers,
    check_reachable,
    check_room,
    check_room_to_train,
    check_rows,
    checked_config,
    load_tokenizer,
)
from ssah_utils.precision import CODES, DTYPES, dtype_named, preferred_device
from ssah_utils.prompt_cache import check_lengths
from ssah_utils.prompts.chat import render, set_chat_template
from ssah_utils.prompts.datasets import adaptation_split, check_splits, load_dataset, load_pairs
from ssah_utils.prompts.formats import SUFFIXES
from ssah_utils.prompts.tokens import POSITIONS
from ssah_utils.quantised import DEQUANTISE
from ssah_utils.quantisers import keeps_codes
from ssah_utils.units import check_fractions

Check = Callable[[str, object, dict], None]  # (name, value, all values): raises in one line

STUDY_DATA = ("harmful_data", "other_harmful_data", "helpful_data")
GROUP_FRACTIONS = tuple(f"{group}_fraction" for group in ("safety", "utility", "redundant"))
LENGTHS = ("answer_tokens", "new_tokens", "response_tokens")  # of what may follow a request

# ------------------------------------------------------------------------------------ single values


def one_of(*choices: str) -> Check:
    def check_choice(name: str, value: str, values: dict) -> None:
        if value not in choices:
            raise ValueError(f"{name} is '{value}', but one of {', '.join(choices)} is needed")

    return check_choice


def at_least(least: float) -> Check:
    def check_least(name: str, value: float, values: dict) -> None:
        if value < least:
            raise ValueError(f"{name} is {value}, but at least {least} is needed")

    return check_least


def above_zero(name: str, value: float, values: dict) -> None:
    if value <= 0:
        raise ValueError(f"{name} is {value}, which is too small")


def fraction(name: str, value: float, values: dict) -> None:
    check_fractions(**{name: value})


def below_one(name: str, value: float, values: dict) -> None:
    if not 0 <= value < 1:
        raise ValueError(f"{name} is {value}, but a number from 0 to below 1 is needed")


def list_of(what: str, is_valid: Callable[[object], bool]) -> Check:
    """A list with at least one item, all of them valid; ``what`` says in words which are."""

    def check_list(name: str, value: list, values: dict) -> None:
        if not value or not all(is_valid(item) for item in value):
            raise ValueError(f"{name} takes a list of {what}, not {value!r}")

    return check_list


def is_number(item: object) -> bool:
    return type(item) in (int, float)


def is_positive(item: object) -> bool:
    return is_number(item) and item > 0


def whole_from(least: int) -> Check:
    what = f"whole numbers from {least} on"
    return list_of(what, lambda item: type(item) is int and item >= least)


def fractions(name: str, value: list, values: dict) -> None:
    list_of("numbers", is_number)(name, value, values)
    for item in value:
        fraction(name, item, values)


def among(*methods: str) -> Check:
    """A list of methods, or a mapping of methods to numbers above 0."""

    def check_methods(name: str, value: list | dict, values: dict) -> None:
        unknown = [item for item in value if item not in methods]
        if unknown:
            raise ValueError(f"{name} has '{unknown[0]}', but {', '.join(methods)} are there")
        if isinstance(value, dict) and not all(map(is_positive, value.values())):
            raise ValueError(f"{name} takes a number above 0 for every method, not {value!r}")

    return check_methods


def defences(name: str, value: list, values: dict) -> None:
    """A list of ids of ``defence_names``; their controls come by themselves."""
    mixed = [name for share in values.get("mixed_fractions", ()) for name in mixed_names(share)]
    among(*NAMED, *mixed)(name, value, values)


def by_recipe(name: str, value: dict, values: dict) -> None:
    """A mapping of names to what each recipe changes, at least one."""
    known = {field.name for field in dataclasses.fields(Recipe)}
    if not value:
        raise ValueError(f"{name} takes at least one recipe, such as {{'short': {{'steps': 60}}}}")
    for recipe, changes in value.items():
        if not isinstance(changes, dict) or not known.issuperset(changes):
            what = f"{name} has {changes!r} under '{recipe}'"
            raise ValueError(f"{what}, but a recipe changes {', '.join(sorted(known))}")


def free(name: str, value: object, values: dict) -> None:
    """Any value of the right type will do."""


# ----------------------------------------------------------------------------- what has to be there


def requests(name: str, value: str, values: dict) -> None:
    check_readable(value)


def pairs(name: str, value: str, values: dict) -> None:
    check_pairs(value)


def tasks(name: str, value: list, values: dict) -> None:
    what = "the names of tasks, at least one, such as cloze"
    if not value or not all(isinstance(task, str) for task in value):
        raise ValueError(f"{name} takes {what}, not {value!r}")
    for task in value:
        check_task(task)


def judge(name: str, value: str, values: dict) -> None:
    from ssah_utils.judge.model_judges import check_judge  # seconds to import, rarely asked for

    check_judge(value)


def device_map(name: str, value: str, values: dict) -> None:
    read_map(value)


def template(name: str, value: str, values: dict) -> None:
    if not Path(value).is_file():
        raise FileNotFoundError(f"{name} '{value}' does not exist: give the path of a Jinja file")


def model(name: str, value: str, values: dict) -> None:
    check_reachable(value)
    check_template(value, values.get("chat_template", ""), values.get("system_prompt", ""))


def if_given(check_value: Check) -> Check:
    """Empty means: none."""
    return lambda name, value, values: check_value(name, value, values) if value else None


# The first pattern that matches a name says what its value has to be.
RULES: tuple[tuple[str, Check], ...] = (
    ("profile", free),
    ("seed", at_least(0)),
    ("dtype", one_of(*DTYPES)),
    ("device_map", device_map),
    ("alignment", one_of("auto", "train", "given")),
    ("positions", one_of(*POSITIONS)),
    ("ablation_mode", one_of("zero", "mean")),
    ("system_prompt", free),
    ("neutral_opening", free),
    ("chat_template", if_given(template)),
    ("model", model),
    ("judge_model", if_given(judge)),
    ("*_model", if_given(model)),
    ("over_refusal_data", if_given(requests)),
    ("*adaptation_data", pairs),
    ("*_data", requests),
    ("utility_tasks", tasks),
    ("peft_factors", among(*PEFT_METHODS)),
    ("preference_methods", among("all", "redundant", "top", "random", "safety")),
    ("steps", whole_from(0)),
    ("path_steps", whole_from(0)),
    ("twin_steps", at_least(0)),
    ("recovery_steps", at_least(0)),
    ("preference_beta", above_zero),
    ("preference_ratio", above_zero),
    ("preference_sft_weight", at_least(0)),
    ("recipes", by_recipe),
    ("*defences", defences),
    ("dropped_fraction", below_one),
    ("cosine_threshold", free),
    ("*_strength", at_least(0)),
    ("lengths", whole_from(1)),
    ("prefill_tokens", whole_from(1)),
    ("recovery_prefills", whole_from(1)),
    ("checkpoints", list_of("numbers above 0", is_positive)),
    ("factors", list_of("numbers", is_number)),
    ("unit_factors", list_of("numbers", is_number)),
    ("*_factors", list_of("numbers above 0", is_positive)),
    ("*_sizes", list_of("numbers above 0", is_positive)),
    ("*_fractions", fractions),
    ("*_fraction", fraction),
    ("*_factor", above_zero),
    ("*learning_rate", above_zero),
    ("epochs", above_zero),
    ("n_*", at_least(1)),
    ("*_tokens", at_least(1)),
    ("*_size", at_least(1)),
)


def rule_of(name: str) -> Check | None:
    """What a parameter of this name is checked by; None where no pattern matches."""
    return next((rule for pattern, rule in RULES if fnmatchcase(name, pattern)), None)


def check(values: dict) -> None:
    """``ValueError`` or ``OSError`` in one line for the first value that cannot work."""
    for name, value in values.items():
        rule = rule_of(name)
        if rule is not None:
            rule(name, value, values)
    check_together(values)


def check_together(values: dict) -> None:
    """What no value shows alone: sums, pairs that must differ, requests that must fit the model."""
    if set(GROUP_FRACTIONS) <= set(values):
        check_fractions(**{name: values[name] for name in sorted(GROUP_FRACTIONS)})
    if values.get("adaptation_data", 0) == values.get("other_adaptation_data", 1):
        same = values["adaptation_data"]
        raise ValueError(f"adaptation_data and other_adaptation_data are both '{same}': give two")
    tested, prefilled = (values.get(name, []) for name in ("recovery_prefills", "prefill_tokens"))
    if unknown := sorted(set(tested) - set(prefilled)):
        raise ValueError(
            f"recovery_prefills has {unknown[0]}, which is not among prefill_tokens {prefilled}"
        )
    if set(STUDY_DATA) <= set(values):
        check_splits(*(values[name] for name in STUDY_DATA))
    if "model" not in values:
        return
    check_numbers_of(values["model"], values.get("dtype", "auto"))
    n_more = max(values.get(length, 0) for length in LENGTHS)
    in_chat = (values["model"], values.get("chat_template", ""), values.get("system_prompt", ""))
    for name, value in values.items():
        is_users = name.endswith("_data") and Path(value).suffix.lower() in SUFFIXES
        if is_users:  # what we ship is short
            check_fits(*in_chat, value, n_more)


def trained_model(values: dict) -> str:
    """The model that a notebook with these parameters trains all of; empty: none."""
    model = values.get("model", "")
    if "learning_rate" not in values or values.get("recovery_steps") == 0:
        return ""
    if "alignment" in values:  # 01 trains what it aligns, or an unaligned twin
        is_ours = values["alignment"] == "auto" and model in embedded.UNALIGNED
        trains = is_ours or values["alignment"] == "train" or values.get("twin_steps")
        return model if trains else ""
    came_aligned = model in embedded.NAMES and model not in embedded.UNALIGNED
    if "start_model" in values and came_aligned:  # of others, 01 alone knows whether they did
        return values["start_model"] or embedded.DEFAULT
    return values.get("start_model") or model


def check_trainable(stage: str, values: dict) -> None:
    """``ValueError`` for a notebook that trains a model whose weights are codes, or are to be.

    Also for one that a device map would spread over several places.
    """
    trained = trained_model(values)
    if not trained:
        return
    if values.get("device_map"):
        raise ValueError(
            f"{stage} trains the model, but device_map is '{values['device_map']}', and what is"
            " trained has to be whole on one device: leave device_map empty (ssah plan says what"
            " fits), or name the notebooks that do not train by --only NAME,NAME"
        )
    if values["dtype"] in CODES:
        raise ValueError(
            f"{stage} trains the model, but dtype is '{values['dtype']}', and codes cannot be"
            " trained: take auto, float32 or bfloat16, or name the notebooks that do not train by"
            " --only NAME,NAME"
        )
    if trained not in embedded.NAMES and keeps_codes(checked_config(trained)):
        raise ValueError(
            f"{stage} trains the model, but '{trained}' is quantised, and codes cannot be trained:"
            f" {DEQUANTISE}; notebooks that do not train run by --only"
        )


# ------------------------------------------------------------------------------ memory of a machine


def check_room_for(stage: str, values: dict) -> None:
    """``OSError`` for a notebook whose models do not fit into the memory that is free here.

    Neither to look at nor, where it trains one, to train it. ``ValueError`` for a device map that
    does not fit its model.
    """
    device = preferred_device()
    dtype = dtype_named(values.get("dtype", "auto"), device)
    for name, place in values.items():
        if place and fnmatchcase(name, "*model") and name != "judge_model":
            check_room(place, dtype, device, values.get("device_map", ""))
    check_room_for_training(stage, values)


def check_room_for_training(stage: str, values: dict) -> None:
    """``OSError`` where training what a notebook trains does not fit into the memory here."""
    trained = trained_model(values)
    if trained:
        check_room_to_train(stage, trained, preferred_device())


# ----------------------------------------------------------------------------------- once a process


@cache
def check_numbers_of(model: str, dtype: str) -> None:
    """A model that cannot be loaded in the numbers asked for."""
    if dtype in CODES:
        extras.require("quantised")
        if model not in embedded.NAMES:
            check_numbers(checked_config(model), model, dtype_named(dtype, "cpu"))


def check_template(model: str, chat_template: str, system_prompt: str) -> None:
    """A chat template under which nothing measured would mean what it says; ours are known to be
    right as they are.
    """
    if model not in embedded.NAMES or chat_template or system_prompt:
        tokenizer = load_tokenizer(model)
        set_chat_template(tokenizer, chat_template, system_prompt)
        if chat_template:  # the one that came with it is held against the embedding as it is loaded
            check_rows(tokenizer, checked_config(model).get_text_config().vocab_size)


@cache
def check_fits(model: str, chat_template: str, system_prompt: str, data: str, n_more: int) -> None:
    """A request of a user's file that is longer, with what is to follow it, than the model reads at
    once.
    """
    tokenizer = load_tokenizer(model)
    set_chat_template(tokenizer, chat_template, system_prompt)
    rendered = render(tokenizer, load_dataset(data)["prompt"].tolist(), system_prompt)
    try:
        check_lengths(tokenizer, checked_config(model), rendered, n_more)
    except ValueError as error:
        raise ValueError(f"data file '{data}': {error}") from error


@cache
def check_readable(name: str) -> None:
    """A data set that is unknown, malformed or out of reach is reported before anything runs."""
    load_dataset(name)


@cache
def check_pairs(name: str) -> None:
    """What is fine-tuned on needs responses, too, and enough different requests to hold some
    back.
    """
    load_pairs(name)
    adaptation_split(name)


@cache
def check_task(name: str) -> None:
    """A task of lm-evaluation-harness that is unknown or whose data are out of reach; the shipped
    one always works.
    """
    if name != "cloze":
        from ssah_utils.benchmarks import load_task, pinned_task

        if pinned_task(name) == name:  # else it was loaded to find its commits
            load_task(name)
