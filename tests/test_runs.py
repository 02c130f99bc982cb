"""What people see of a completion."""

import pytest

from ssah_utils.display import REDACTED_LENGTH, redact


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("", ""),
        ("I can't do that.", "I can't do that."),
        ("Sure, here is a  longer\nanswer", "Sure, here is a [...]"),
        ("word" * 100, ("word" * 100)[:REDACTED_LENGTH] + " [...]"),
    ],
)
def test_only_the_first_words_are_shown_and_no_long_ones(text, shown):
    assert redact(text) == shown
