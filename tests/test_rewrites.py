"""Past tense: the rule on requests of every form, and pairs with published rewrites."""

import pandas as pd
import pytest

from ssah_utils.prompts import rewrites


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        ("Write a poem about rain", "How did people write a poem about rain in the past?"),
        ("Please plan a picnic.", "How did people plan a picnic in the past?"),
        ("Give a tutorial on how to bake bread", "How did people bake bread in the past?"),
        ("Teach me how to write a sonnet!", "How did people write a sonnet in the past?"),
        ("Describe in detail how to fold a crane", "How did people fold a crane in the past?"),
        ("Explain how a kite flies", "How did people explain how a kite flies in the past?"),
        # too late to be what is asked for: only the opening words count
        (
            "Invent a new dance move for two and explain how to do it",
            "How did people invent a new dance move for two and explain how to do it in the past?",
        ),
    ],
)
def test_imperatives_become_questions_about_the_past(request_, expected):
    assert rewrites.past_tense(request_) == expected


@pytest.mark.parametrize(
    "request_",
    ["How do I bake bread?", "What is a kite?", "I need a slogan", "Write", "", "Writer wanted"],
)
def test_other_forms_are_left_out(request_):
    assert rewrites.past_tense(request_) is None


def test_table_keeps_originals_and_drops_other_forms():
    table = pd.DataFrame(
        {"id": ["a", "b", "c"], "prompt": ["Write a song", "Why?", "Give tips"], "category": "x"}
    )
    found = rewrites.in_past_tense(table)
    assert found["id"].tolist() == ["a", "c"]
    assert found["present"].tolist() == ["Write a song", "Give tips"]
    assert found["prompt"].tolist() == [
        "How did people write a song in the past?",
        "How did people give tips in the past?",
    ]


def test_published_rewrites_are_paired_by_their_words(monkeypatch):
    listed = [
        "How were kites folded from newspaper in the past?",
        "How was bread baked in the early 2000s?",
    ]
    monkeypatch.setattr(rewrites, "load_dataset", lambda name: pd.DataFrame({"prompt": listed}))
    table = pd.DataFrame(
        {
            "id": ["a", "b"],
            "prompt": ["Explain how to fold kites from newspaper", "Write a song about the sea"],
        }
    )
    found = rewrites.published_pairs(table)
    assert found["id"].tolist() == ["a"] and found["past"].tolist() == listed[:1]
    assert rewrites.published_pairs(table.iloc[1:])["past"].tolist() == []


def test_published_list_is_read_from_its_wheel():
    table = rewrites.load_dataset("past-tense")
    assert len(table) == 729 and table["prompt"].is_unique
    assert table["prompt"].str.contains(r"\b(?:was|were|did|past)\b", case=False).mean() > 0.95
