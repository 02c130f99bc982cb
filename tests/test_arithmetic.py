"""Problems whose answers are right, and marking that finds the last number."""

import re

import pytest

from ssah_utils.prompts import arithmetic
from ssah_utils.prompts.datasets import adaptation_split, load_pairs


def test_every_answer_is_right():
    for text in arithmetic.problems(500, seed=3)["response"]:
        calculation, result = text.rstrip(".").split(" = ")
        assert re.fullmatch(r"[\d +\-x/]+", calculation)
        assert eval(calculation.replace("x", "*")) == int(result) > 0


def test_the_question_holds_the_numbers_of_the_calculation():
    for row in arithmetic.problems(200).itertuples():
        asked = sorted(re.findall(r"\d+", row.prompt))
        assert asked == sorted(re.findall(r"\d+", row.response.split(" = ")[0]))


def test_seeded_and_different():
    table = arithmetic.problems(300, seed=1)
    assert table.equals(arithmetic.problems(300, seed=1))
    assert not table.equals(arithmetic.problems(300, seed=2))
    assert table["prompt"].is_unique
    assert table["category"].value_counts().to_dict() == dict.fromkeys(arithmetic.PROBLEM_KINDS, 60)


@pytest.mark.parametrize(
    ("answer", "marked"),
    [
        ("3 + 4 = 7.", True),
        ("It is 7", True),
        ("7 apples and 3 pears", False),
        ("7.0", True),
        ("1,007", False),
        ("-7", False),
        ("seven", False),
        ("", False),
    ],
)
def test_marking(answer, marked):
    assert arithmetic.is_correct(answer, "3 + 4 = 7.") is marked


def test_gsm8k_answers_are_marked_by_their_last_number():
    assert arithmetic.is_correct("so it makes 1,080.", "He pays 20 * 54 = 1080\n#### 1080")
    assert not arithmetic.is_correct("1080 or 20", "#### 1080")


@pytest.mark.parametrize("name", ["arithmetic", "adaptation"])
def test_splits_share_no_request(name):
    train, test = adaptation_split(name)
    assert len(train) >= 3 * len(test) > 100
    assert not set(train["prompt"]) & set(test["prompt"])
    assert adaptation_split(name)[0].equals(train)
    assert len(load_pairs(name)) == len(train) + len(test)
