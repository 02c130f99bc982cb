"""Values that cannot work are refused by their names, before anything runs."""

import pytest

from ssah_utils.parameters import check


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
        ({"peft_factors": {"adapters": 1}}, "peft_factors has 'adapters', but lora, llama-adapter, prefix are there"),
        ({"peft_factors": {"lora": 0}}, "peft_factors takes a number above 0 for every method"),
        ({"peft_factors": {"lora": "ten"}}, "peft_factors takes a number above 0 for every method"),
        ({"preference_methods": ["none"]}, "preference_methods has 'none', but all, redundant"),
        ({"adaptation_data": "advbench"}, "data set 'advbench', line 1: no column 'response'"),
        ({"other_adaptation_data": "arithmetics"}, "nearest is 'arithmetic'"),
        ({"utility_tasks": []}, "utility_tasks takes the names of tasks"),
        ({"utility_tasks": [1]}, "utility_tasks takes the names of tasks"),
        ({"utility_tasks": ["cloze", "hellaswagg"]}, "unknown utility task 'hellaswagg'; nearest are hellaswag"),
        ({"over_refusal_data": "xtest"}, "nearest is 'xstest'"),
        ({"harmful_data": ""}, "unknown data set ''"),
    ],
)
def test_refused(values, message):
    with pytest.raises(ValueError, match=message):
        check(values)


def test_accepted():
    check({"checkpoints": [5, 10], "sweep_factors": [1.0, 3.0], "peft_factors": {}, "preference_methods": ["all", "random"],
           "utility_tasks": ["cloze"], "over_refusal_data": "", "judge_model": "", "steps": [0, 4], "prefill_tokens": [1],
           "answer_tokens": 8, "adaptation_data": "adaptation", "other_adaptation_data": "identity-shift",
           "n_seeds": 3})  # fmt: skip


def test_pairs_of_a_user(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"prompt": "a", "response": "b"}\n{"prompt": "c", "response": ""}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"mine\.jsonl, line 2: column 'response' is missing or empty"):
        check({"adaptation_data": str(path)})
