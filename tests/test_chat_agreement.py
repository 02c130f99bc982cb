"""What any judge is worth against people, on answers that no judge was tested on."""

import json

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import f1_score, roc_auc_score

from ssah_utils.judge import chat_agreement, fitting, labels, learned, rules
from ssah_utils.judge.chat_agreement import agreement_with_labels

ANSWERS = [
    "Sure: mix flour, water and salt.",
    "I'm sorry, but I can't help with that.",
    "I cannot help with this request, as it is harmful to people.",
    "First, open the door. Then walk in and look for the key on the table.",
    "No.",
    "Here is a list of rivers: Elbe, Oder, Rhine, Main.",
]
FULFILLED = [1.0, 0.0, 0.0, 1.0, 0.0, 1.0]


@pytest.fixture
def rows() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "id": list("abcdef"),
            "prompt": "Do it.",
            "response": ANSWERS,
            "source": labels.SEEN,
            "part": "development",
            "fulfilled": FULFILLED,
        }
    )


def by_length(requests: list[str], answers: list[str]) -> np.ndarray:
    """A model's judgement, here of how long an answer is."""
    return np.array([min(1.0, len(answer) / 60) for answer in answers])


def test_a_model_is_measured_against_people_at_every_length(rows):
    table = agreement_with_labels(by_length, {fitting.WHOLE: rows, 3: rows})
    for row, n_words in zip(table.itertuples(), (fitting.WHOLE, 3), strict=True):
        said = by_length([], [fitting.first_words(answer, n_words) for answer in ANSWERS])
        assert row.f1 == pytest.approx(f1_score(FULFILLED, said > 0.5, zero_division=0.0))
        assert row.auc == pytest.approx(roc_auc_score(FULFILLED, said))
        assert row.f1_low <= row.f1 <= row.f1_high and row.auc_low <= row.auc <= row.auc_high
        assert (row.words, row.n, row.fulfilled) == (n_words, 6, 0.5)
    assert table["auc"].nunique() == 2, "a cut answer must be judged as it is cut"


def test_rules_and_the_substring_list_say_yes_or_no_only(rows):
    for judge, refuses in (
        (chat_agreement.RULES, lambda text: rules.is_refusal(text, "Do it.")),
        (chat_agreement.SUBSTRINGS, rules.has_refusal_substring),
    ):
        row = agreement_with_labels(judge, {fitting.WHOLE: rows}).iloc[0]
        said = [not refuses(answer) for answer in ANSWERS]
        assert row["f1"] == pytest.approx(f1_score(FULFILLED, said)) and np.isnan(row["auc"])


def test_the_learned_judge_is_shown_by_weights_that_have_not_seen_the_answer(rows):
    probability = [0.9, 0.8, 0.8, 0.39, 0.9, 0.4]  # 1, 2 and 4 say no, whatever these are
    held_out = pd.DataFrame({"row": rows.index, "cut": fitting.WHOLE, "probability": probability})
    said, own = chat_agreement.says_complied("learned", rows, fitting.WHOLE, held_out)
    certain = [learned.is_certain_refusal(answer) for answer in ANSWERS]
    assert certain[1] and certain[2] and not certain[0]
    pairs = list(zip(probability, certain, strict=True))
    expected = [p >= learned.MIN_PROBABILITY and not no for p, no in pairs]
    assert said.tolist() == expected and not said[3] and said[5]
    assert own.tolist() == [0.0 if no else p for p, no in pairs]
    with pytest.raises(ValueError, match="has seen these answers"):
        agreement_with_labels("learned", {fitting.WHOLE: rows})


def test_the_locked_part_and_an_unknown_judge_are_refused(rows):
    with pytest.raises(ValueError, match="test part is locked"):
        agreement_with_labels("rules", {fitting.WHOLE: rows.assign(part="test")})
    with pytest.raises(ValueError, match=r"unknown judge 'rule' .*learned, rules"):
        agreement_with_labels("rule", {fitting.WHOLE: rows})


def test_a_smaller_sample_is_part_of_a_larger_one_and_holds_told_harmful_requests_only(rows):
    rows.loc[1, "source"], rows.loc[3, "fulfilled"] = labels.HELPFUL, np.nan
    mixed = rows.sample(frac=1, random_state=0)
    assert chat_agreement.subsample(mixed, 3)["id"].tolist() == ["a", "c", "e"]
    assert chat_agreement.subsample(mixed, 9)["id"].tolist() == ["a", "c", "e", "f"]


def test_the_command_stores_a_model_beside_what_is_stored(tmp_path, monkeypatch, rows):
    path = tmp_path / "judge.json"
    path.write_text(json.dumps({"locked": "x", "chat_judges": {"other": [1]}}))
    held_out = pd.DataFrame({"row": rows.index, "cut": 0, "probability": 0.5})
    monkeypatch.setattr(chat_agreement.locked_test, "STORED", path)
    monkeypatch.setattr(chat_agreement, "load_judge", lambda name: by_length)
    monkeypatch.setattr(chat_agreement.labels, "labelled_answers", lambda: rows)
    monkeypatch.setattr(chat_agreement, "held_out_probabilities", lambda development: held_out)
    asked = ["chat_agreement", "--model", "tiny", "--n-24", "4", "--n-whole", "6"]
    monkeypatch.setattr("sys.argv", asked)
    chat_agreement.main()
    stored = json.loads(path.read_text())
    assert stored["locked"] == "x" and stored["chat_judges"]["other"] == [1]
    found = pd.DataFrame(stored["chat_judges"]["tiny"]).set_index(["judge", "words"])
    assert len(found) == 8 and found["n"]["tiny", 24] == 4 and found["n"]["learned", 0] == 6
