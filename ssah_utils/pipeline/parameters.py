"""What a valid notebook parameter is, by its name. Checked by the runner before any kernel starts.
Knows names, not notebooks.

A parameter's type is that of its default in the notebook; its meaning is told by its name:
``*_fraction`` lies in [0, 1], ``n_*`` counts, ``*_data`` names a data set, ``*model`` a model.
"""

from functools import cache
from pathlib import Path

from ssah_utils.adapters import PEFT_METHODS
from ssah_utils.loading import (
    EMBEDDED_NAMES,
    check_reachable,
    check_rows,
    checked_config,
    load_tokenizer,
)
from ssah_utils.precision import DTYPES
from ssah_utils.prompt_cache import check_lengths
from ssah_utils.prompts.chat import render, set_chat_template
from ssah_utils.prompts.datasets import adaptation_split, check_splits, load_dataset, load_pairs
from ssah_utils.prompts.formats import SUFFIXES
from ssah_utils.prompts.tokens import POSITIONS
from ssah_utils.units import check_fractions

CHOICES = {
    "dtype": DTYPES,
    "positions": POSITIONS,
    "ablation_mode": ("zero", "mean"),
    "alignment": ("auto", "train", "given"),
}
METHODS = {
    "peft_factors": tuple(PEFT_METHODS),
    "preference_methods": ("all", "redundant", "top", "random", "safety"),
}
STUDY_DATA = ("harmful_data", "other_harmful_data", "helpful_data")
LENGTHS = ("answer_tokens", "new_tokens", "response_tokens")  # of what may follow a request
OPTIONAL_DATA = ("over_refusal_data",)


def check(values: dict) -> None:
    """Raise ``ValueError``, ``FileNotFoundError`` or ``ConnectionError`` in one line for the first
    value that cannot work.
    """
    for name, value in values.items():
        if name.endswith("_fraction"):
            check_fractions(**{name: value})
        elif name.endswith("_fractions"):
            if not value or not all(type(item) in (int, float) for item in value):
                raise ValueError(f"{name} takes a list of numbers, not {value!r}")
            for item in value:
                check_fractions(**{name: item})
        elif (name.endswith(("learning_rate", "epochs", "_factor")) and value <= 0) or (
            name == "seed" and value < 0
        ):
            raise ValueError(f"{name} is {value}, which is too small")
        elif name in ("steps", "prefill_tokens"):
            least = 0 if name == "steps" else 1
            if not value or not all(type(item) is int and item >= least for item in value):
                raise ValueError(
                    f"{name} takes a list of whole numbers from {least} on, not {value!r}"
                )
        elif name.startswith("n_") or name.endswith(("_tokens", "_size")):
            if value < 1:
                raise ValueError(f"{name} is {value}, but at least 1 is needed")
        elif name in CHOICES and value not in CHOICES[name]:
            raise ValueError(
                f"{name} is '{value}', but one of {', '.join(CHOICES[name])} is needed"
            )
        elif name.endswith("adaptation_data"):
            check_pairs(value)
        elif name.endswith("_data"):
            if value or name not in OPTIONAL_DATA:
                check_readable(value)
        elif name == "utility_tasks":
            if not value or not all(isinstance(task, str) for task in value):
                raise ValueError(
                    "utility_tasks takes the names of tasks, at least one, such as cloze, not"
                    f" {value!r}"
                )
            for task in value:
                check_task(task)
        elif name == "judge_model":
            if value:
                from ssah_utils.judge.model_judges import (
                    check_judge,  # seconds to import, and rarely asked for
                )

                check_judge(value)
        elif name in ("checkpoints", "sweep_factors", "stability_sizes"):
            if not value or not all(type(item) in (int, float) and item > 0 for item in value):
                raise ValueError(f"{name} takes a list of numbers above 0, not {value!r}")
        elif name in METHODS:
            unknown = [item for item in value if item not in METHODS[name]]
            if unknown:
                raise ValueError(
                    f"{name} has '{unknown[0]}', but {', '.join(METHODS[name])} are there"
                )
            if isinstance(value, dict) and not all(
                type(item) in (int, float) and item > 0 for item in value.values()
            ):
                raise ValueError(f"{name} takes a number above 0 for every method, not {value!r}")
        elif name == "chat_template" and value and not Path(value).is_file():
            raise FileNotFoundError(
                f"chat_template '{value}' does not exist: give the path of a Jinja file"
            )
        elif name == "model" or (name.endswith("_model") and value):
            check_reachable(value)
            check_template(value, values.get("chat_template", ""), values.get("system_prompt", ""))
    groups = {f"{group}_fraction" for group in ("safety", "utility", "redundant")}
    if groups <= set(values):
        check_fractions(**{name: values[name] for name in sorted(groups)})
    if values.get("adaptation_data", 0) == values.get("other_adaptation_data", 1):
        raise ValueError(
            f"adaptation_data and other_adaptation_data are both '{values['adaptation_data']}':"
            " give two"
        )
    if set(STUDY_DATA) <= set(values):
        check_splits(*(values[name] for name in STUDY_DATA))
    for name, value in values.items():
        if (
            "model" in values and name.endswith("_data") and Path(value).suffix.lower() in SUFFIXES
        ):  # what we ship is short
            n_more = max(values.get(length, 0) for length in LENGTHS)
            check_fits(
                values["model"],
                values.get("chat_template", ""),
                values.get("system_prompt", ""),
                value,
                n_more,
            )


def check_template(model: str, chat_template: str, system_prompt: str) -> None:
    """A chat template under which nothing measured would mean what it says; ours are known to be
    right as they are.
    """
    if model not in EMBEDDED_NAMES or chat_template or system_prompt:
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
        from ssah_utils.benchmarks import load_task

        load_task(name)
