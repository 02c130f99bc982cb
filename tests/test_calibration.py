"""Calibration data holds the model's own answers, and of harmful requests the refused ones."""

import pandas as pd
import pytest

from ssah_utils import embedded, evaluation, loading
from ssah_utils.experiments import calibration
from ssah_utils.prompts import chat, tokens

REFUSAL = "I'm sorry, but I can't help with that."
ANSWER = "Of course: first take two eggs and some flour."


@pytest.fixture(scope="module")
def tiny():
    return loading.load(embedded.TINY_RANDOM)


def table(name: str, n: int) -> pd.DataFrame:
    prompts = [f"{name} request {row}: what is it?" for row in range(n)]
    category = [f"{name} {row % 2}" for row in range(n)]
    ids = [f"{name}-{row}" for row in range(n)]
    return pd.DataFrame({"id": ids, "category": category, "prompt": prompts, "more": 1})


@pytest.fixture
def answering(monkeypatch, tiny):
    """``collect`` of a model whose answers are given, by set."""

    def collected(answers: dict[str, list[str]], **options) -> dict[str, calibration.Calibration]:
        given = iter(answers.values())
        monkeypatch.setattr(evaluation, "cached_answers", lambda *_, **__: next(given))
        requests = {name: table(name, len(said)) for name, said in answers.items()}
        return calibration.collect(*tiny, requests, **options)

    return collected


def test_answers_are_those_the_model_gives_and_are_encoded_behind_their_requests(tiny):
    model, tokenizer = tiny
    requests = {"helpful": table("helpful", 6)}
    found = calibration.collect(model, tokenizer, requests, n_requests=3, answer_tokens=7)
    rendered = chat.render(tokenizer, requests["helpful"]["prompt"].tolist()[:3])
    expected = evaluation.generate(model, tokenizer, rendered, 7)
    kept = found["helpful"]
    assert kept.n_asked == 3
    assert kept.table["response"].tolist() == expected
    assert kept.table["id"].tolist() == ["helpful-0", "helpful-1", "helpful-2"]
    assert kept.examples == tokens.encode(tokenizer, rendered, expected, 7)


def test_of_harmful_requests_the_refused_are_used_and_keep_their_category(answering):
    said = [REFUSAL, ANSWER, REFUSAL, REFUSAL, ANSWER, REFUSAL]
    found = answering({"harmful": said, "helpful": [ANSWER, REFUSAL]})
    harmful, helpful = found["harmful"], found["helpful"]
    assert harmful.table["id"].tolist() == [f"harmful-{row}" for row in (0, 2, 3, 5)]
    assert harmful.table["category"].tolist() == [f"harmful {row % 2}" for row in (0, 2, 3, 5)]
    assert set(harmful.table["response"]) == {REFUSAL}
    assert len(harmful) == 4 and harmful.n_asked == 6 and harmful.refused_only
    assert len(helpful) == 2 and not helpful.refused_only


def test_with_too_few_refusals_all_answers_are_used_and_that_is_said(answering):
    found = answering({"harmful": [REFUSAL, ANSWER, REFUSAL, REFUSAL, ANSWER]})["harmful"]
    assert len(found) == 5 and not found.refused_only


def test_refusals_are_not_asked_for_where_a_study_wants_every_answer(answering):
    said = [REFUSAL] * 5 + [ANSWER]
    found = answering({"harmful": said}, refused_only=())["harmful"]
    assert found.table["response"].tolist() == said


def test_an_answer_of_one_token_has_no_variance_and_is_left_out(answering):
    found = answering({"helpful": [ANSWER, "yes", "", ANSWER]})["helpful"]
    assert found.table["id"].tolist() == ["helpful-0", "helpful-3"]


def test_a_set_without_any_answer_to_score_is_an_error_that_names_it(answering):
    with pytest.raises(ValueError, match="'helpful' has two tokens"):
        answering({"helpful": ["", "yes"]})


def test_batches_mark_the_positions_asked_for(answering):
    found = answering({"helpful": [ANSWER, REFUSAL]})["helpful"]
    n_response = sum(
        sum(label != tokens.IGNORED for label in example["labels"]) for example in found.examples
    )
    n_all = sum(len(example["input_ids"]) - 1 for example in found.examples)
    n_marked = {
        where: sum(int(batch["positions"].sum()) for batch in found.batches(where))
        for where in tokens.POSITIONS
    }
    assert n_marked == {"response": n_response, "prompt": n_all - n_response, "all": n_all}


def test_halves_share_no_request_and_together_hold_all_of_them(answering):
    said = [f"{ANSWER} Then number {row}." for row in range(5)]
    found = answering({"helpful": said, "harmful": [REFUSAL] * 4})
    parts = calibration.halves(found, "all")
    for name, n_each in (("helpful", [3, 2]), ("harmful", [2, 2])):
        read = []
        for part in parts:
            rows = set()
            for batch in part[name]:
                lengths = batch["attention_mask"].sum(1).tolist()
                ids = batch["input_ids"].tolist()
                rows |= {tuple(row[:n]) for row, n in zip(ids, lengths, strict=True)}
                assert (batch["positions"].sum(1) == batch["attention_mask"].sum(1) - 1).all()
            read.append(rows)
        assert [len(rows) for rows in read] == n_each and not read[0] & read[1]
        assert read[0] | read[1] == {tuple(one["input_ids"]) for one in found[name].examples}
