"""Values that cannot work are refused by their names, before anything runs."""

from itertools import product

import pytest

from ssah_utils import embedded, room
from ssah_utils.files import ROOT
from ssah_utils.pipeline import parameters
from ssah_utils.pipeline.parameters import check, rule_of
from ssah_utils.pipeline.runs import declared_parameters


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"complex_fraction": 1.5}, r"complex_fraction is 1\.5, but a fraction lies in \[0, 1\]"),
        ({"sweep_fractions": [0.3, -0.1]}, "fraction lies in"),
        ({"checkpoints": []}, "checkpoints takes a list of numbers above 0"),
        ({"checkpoints": [0, 5]}, "checkpoints takes a list of numbers above 0"),
        ({"stability_sizes": [16, 0]}, "stability_sizes takes a list of numbers above 0"),
        ({"sweep_factors": ["two"]}, "sweep_factors takes a list of numbers above 0"),
        ({"steps": [0, -1]}, r"steps takes a list of whole numbers from 0 on, not \[0, -1\]"),
        ({"prefill_tokens": [0, 2]}, "prefill_tokens takes a list of whole numbers from 1 on"),
        ({"prefill_tokens": []}, "prefill_tokens takes a list of whole numbers from 1 on"),
        ({"full_learning_rate": 0.0}, "full_learning_rate is 0.0, which is too small"),
        ({"peft_factor": -1.0}, "peft_factor is -1.0, which is too small"),
        ({"n_seeds": 0}, "n_seeds is 0, but at least 1 is needed"),
        (
            {"peft_factors": {"adapters": 1}},
            "peft_factors has 'adapters', but lora, llama-adapter, prefix are there",
        ),
        ({"peft_factors": {"lora": 0}}, "peft_factors takes a number above 0 for every method"),
        ({"peft_factors": {"lora": "ten"}}, "peft_factors takes a number above 0 for every method"),
        ({"preference_methods": ["none"]}, "preference_methods has 'none', but all, redundant"),
        ({"adaptation_data": "advbench"}, "data set 'advbench', line 1: no column 'response'"),
        ({"other_adaptation_data": "arithmetics"}, "nearest is 'arithmetic'"),
        ({"utility_tasks": []}, "utility_tasks takes the names of tasks"),
        ({"utility_tasks": [1]}, "utility_tasks takes the names of tasks"),
        (
            {"utility_tasks": ["cloze", "hellaswagg"]},
            "unknown utility task 'hellaswagg'; nearest are hellaswag",
        ),
        ({"over_refusal_data": "xtest"}, "nearest is 'xstest'"),
        ({"harmful_data": ""}, "unknown data set ''"),
    ],
)
def test_refused(values, message):
    with pytest.raises(ValueError, match=message):
        check(values)


def test_accepted():
    check(
        {
            "checkpoints": [5, 10],
            "sweep_factors": [1.0, 3.0],
            "peft_factors": {},
            "preference_methods": ["all", "random"],
            "utility_tasks": ["cloze"],
            "over_refusal_data": "",
            "judge_model": "",
            "steps": [0, 4],
            "prefill_tokens": [1],
            "answer_tokens": 8,
            "adaptation_data": "adaptation",
            "other_adaptation_data": "identity-shift",
            "n_seeds": 3,
        }
    )


def test_pairs_of_a_user(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text(
        '{"prompt": "a", "response": "b"}\n{"prompt": "c", "response": ""}\n', encoding="utf-8"
    )
    with pytest.raises(
        ValueError, match=r"mine\.jsonl, line 2: column 'response' is missing or empty"
    ):
        check({"adaptation_data": str(path)})


ANIMALS = ("cats", "dogs", "owls", "bees", "ants", "frogs")
PLACES = ("barn", "river", "attic", "meadow", "cellar")
ROWS = [
    f'{{"prompt": "tell {n} {animal} about a {place}{n}"}}'
    for n, (animal, place) in enumerate(product(ANIMALS, PLACES))
]


def test_a_request_beyond_the_models_positions_is_found_before_a_kernel_starts(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text(
        "\n".join([*ROWS, '{"prompt": "' + "far too long a request " * 2000 + '"}']),
        encoding="utf-8",
    )
    values = {"model": embedded.DEFAULT, "helpful_data": str(path), "new_tokens": 8}
    with pytest.raises(
        ValueError,
        match=r"mine\.jsonl': prompt 31 of 31 \('.*'\) has \d+ tokens.* has 8192 positions",
    ):
        check(values)


def test_data_that_cannot_be_split_are_found_before_a_kernel_starts(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text(
        "\n".join(f'{{"prompt": "Describe the big red barn near river {n}"}}' for n in range(40)),
        encoding="utf-8",
    )
    values = {
        "harmful_data": str(path),
        "other_harmful_data": "harmbench",
        "helpful_data": "helpful",
        "model": embedded.TINY_RANDOM,
    }
    with pytest.raises(ValueError, match=r"40 requests are 1 group.*near duplicates"):
        check(values)


def test_pairs_too_alike_to_hold_some_back_are_found_too(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text(
        "\n".join(
            f'{{"prompt": "Add the big red number {n} to it", "response": "{n}"}}' for n in range(9)
        ),
        encoding="utf-8",
    )
    with pytest.raises(ValueError, match=r"mine.*near duplicates"):
        check({"adaptation_data": str(path)})


@pytest.mark.parametrize("model", [embedded.DEFAULT, embedded.TINY_RANDOM])
def test_templates_and_system_prompts_are_probed_for_the_embedded_models_too(tmp_path, model):
    check({"model": model, "system_prompt": "Answer in one line."})
    template = tmp_path / "no-system.jinja"
    turn = "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    loop = "{% for m in messages if m['role'] != 'system' %}" + turn + "{% endfor %}"
    template.write_text(loop + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
    check({"model": model, "chat_template": str(template)})
    with pytest.raises(ValueError, match="system prompt"):
        check(
            {"model": model, "chat_template": str(template), "system_prompt": "Answer in one line."}
        )
    template.write_text(loop)
    with pytest.raises(ValueError, match="does not open the assistant's turn"):
        check({"model": model, "chat_template": str(template)})


def test_every_parameter_of_every_notebook_has_a_rule():
    """A name that no pattern knows would be taken whatever its value is."""
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        unknown = [name for name in declared_parameters(path) if rule_of(name) is None]
        assert not unknown, (path.stem, unknown)


def test_the_defaults_of_every_notebook_are_valid():
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        check(declared_parameters(path))


# ---------------------------------------------------------------------------------- what is trained

ALIGNED, MINE = embedded.VENDOR_ALIGNED, embedded.DEFAULT
OF_01 = {"learning_rate": 1.0e-4, "twin_steps": 0, "alignment": "auto", "dtype": "auto"}
OF_05 = {"learning_rate": 1.0e-4, "dtype": "auto"}
OF_07 = OF_05 | {"start_model": ""}


@pytest.mark.parametrize(
    ("values", "trained"),
    [
        (OF_01 | {"model": MINE}, MINE),
        (OF_01 | {"model": ALIGNED}, ""),
        (OF_01 | {"model": ALIGNED, "twin_steps": 4}, ALIGNED),
        (OF_01 | {"model": ALIGNED, "alignment": "train"}, ALIGNED),
        (OF_01 | {"model": MINE, "alignment": "given"}, ""),
        (OF_05 | {"model": ALIGNED}, ALIGNED),
        (OF_07 | {"model": ALIGNED}, MINE),
        (OF_07 | {"model": ALIGNED, "start_model": "org/base"}, "org/base"),
        (OF_07 | {"model": MINE}, MINE),
        ({"model": ALIGNED, "dtype": "auto"}, ""),
        (OF_05 | {"model": ALIGNED, "recovery_steps": 4}, ALIGNED),
        (OF_05 | {"model": ALIGNED, "recovery_steps": 0}, ""),
    ],
)
def test_what_a_notebook_trains_follows_from_its_parameters(values, trained):
    assert parameters.trained_model(values) == trained


def test_a_training_that_does_not_fit_is_refused_before_it_starts(monkeypatch):
    monkeypatch.setattr(parameters, "preferred_device", lambda: "cpu")
    half = embedded.MODELS[ALIGNED].n_bytes_float32
    for n_free, fits in ((4 * half, True), (4 * half - 1, False)):
        monkeypatch.setattr(room, "free_memory", lambda free=n_free: free)
        if fits:
            parameters.check_room_for_training("05_transfer", OF_05 | {"model": ALIGNED})
            continue
        with pytest.raises(OSError, match=f"05_transfer trains '{ALIGNED}'.*by --only") as raised:
            parameters.check_room_for_training("05_transfer", OF_05 | {"model": ALIGNED})
        assert "\n" not in str(raised.value)
    for stage, values, model in (
        ("01_alignment", OF_01, ALIGNED),  # it trains nothing
        ("07_redundant_units", OF_07, embedded.TINY_RANDOM),
    ):
        parameters.check_room_for_training(stage, values | {"model": model})


def test_a_training_that_does_not_fit_on_a_gpu_is_refused_before_it_starts(monkeypatch):
    """In bfloat16, too, what is trained of units is held in float32."""
    monkeypatch.setattr(parameters, "preferred_device", lambda: "cuda")
    needed, values = 4 * embedded.MODELS[ALIGNED].n_bytes_float32, OF_05 | {"model": ALIGNED}
    for n_free, fits in ((needed, True), (needed - 1, False)):
        monkeypatch.setattr(room, "_free_on_gpu", lambda device, free=n_free: free)
        if fits:
            parameters.check_room_for_training("05_transfer", values)
            continue
        with pytest.raises(OSError, match=r"GiB of GPU memory, and .* a larger GPU$"):
            parameters.check_room_for_training("05_transfer", values)


def test_what_is_tested_after_training_once_more_was_prefilled_before():
    parameters.check({"prefill_tokens": [1, 4], "recovery_prefills": [4]})
    with pytest.raises(
        ValueError, match=r"^recovery_prefills has 8, .* among prefill_tokens \[1, 4\]"
    ):
        parameters.check({"prefill_tokens": [1, 4], "recovery_prefills": [4, 8]})
