"""The paper's numbers stand in one place and are found there, or not at all."""

import pytest

from ssah_utils import paper
from ssah_utils.pipeline import claims


def test_numbers_are_found_by_the_values_of_their_row():
    assert paper.number("table1", "Llama2-7B-Chat", "safety", "asr") == 56.0
    assert paper.number("table5", "frozen", "Dolly") == 1.48


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (("table1", "safety", "asr"), "is 2 numbers of the paper, not one"),
        (("table1", "Llama2-7B-Chat", "safety", "rouge"), "1 numbers of the paper, not one"),
        (("table9", "asr"), "no table 'table9' here"),
    ],
)
def test_what_the_paper_does_not_say_is_refused(path, message):
    with pytest.raises(LookupError, match=message):
        paper.number(*path)


def test_text_is_filled_with_numbers_in_the_form_that_is_asked_for():
    text = "{table1/Llama2-7B-Chat/safety/asr:+.1f} points, {table4/before/gsm8k} before"
    assert paper.fill(text) == "+56.0 points, 9.24 before"
    assert paper.fill("all {blocks}") == "all {blocks}", "what is no placeholder stays"


def test_claims_carry_the_numbers_and_no_placeholder():
    assert not any("{" in claim.paper for claim in claims.load_claims())


def test_a_table_that_is_changed_by_a_reader_stays_as_it_was():
    paper.table("table1").loc[0, "asr"] = 0.0
    assert paper.table("table1").loc[0, "asr"] == 56.0
