"""Cases on which the judge of gibberish is measured: what they are made of, and what it sees."""

import numpy as np
import pandas as pd
import pytest
import torch

from ssah_utils import embedded, evaluation, interventions, loading, models
from ssah_utils.judge import rules, validation
from ssah_utils.judge.labels import answer_id
from ssah_utils.per_unit import KINDS
from ssah_utils.prompts import chat
from tests.conftest import writers_by_name

N_TOKENS = 6
REAL = ["the tea is hot and the cup is old", "one two three four five six seven", "so it goes on"]


@pytest.fixture(scope="module")
def model():
    return loading.load(embedded.TINY_RANDOM)


@pytest.fixture(scope="module")
def rendered(model):
    return chat.render(model[1], [f"Request number {row}?" for row in range(5)])


@pytest.fixture(scope="module")
def ablated(model, rendered):
    return validation.ablated_answers(*model, rendered[:2], N_TOKENS)


@pytest.fixture(scope="module")
def cases(model, rendered, ablated):
    real = pd.DataFrame({"prompt": rendered[:3], "text": REAL})
    limit = pd.DataFrame({"prompt": rendered[3:], "text": ["all good", "no rain"]})
    return validation.gibberish_cases(*model, real, ablated, limit)


def test_every_real_answer_has_its_gibberish_and_keeps_its_request(cases, rendered):
    counts = cases["kind"].value_counts()
    assert counts[["real", *validation.CORRUPTIONS]].eq(3).all()
    assert counts[["ablated 15%", "ablated 25%", "ablated 40%", "telegram style"]].eq(2).all()
    shuffled = cases[cases["kind"] == "words shuffled"]
    for row, text in zip(shuffled["row"], shuffled["text"], strict=True):
        assert sorted(text.split()) == sorted(REAL[row].split())
    of_requests = cases[cases["kind"] != "telegram style"]
    assert of_requests["prompt"].tolist() == [rendered[row] for row in of_requests["row"]]


def test_what_is_made_of_one_answer_stands_in_one_part(cases):
    assert (cases.groupby("row")["part"].nunique() == 1).all()
    assert set(cases["part"]) == {*validation.PARTS, "limit"}
    limit = cases[cases["part"] == "limit"]
    assert set(limit["kind"]) == {"telegram style"} and not limit["gibberish"].any()


def test_a_case_is_rated_as_it_would_be_alone(cases, model):
    for case in cases[::4].itertuples():
        alone = evaluation.response_nll(*model, [case.prompt], [case.text])
        assert case.base_nll == pytest.approx(alone[0], abs=1e-4)
        assert case.repetition == rules.repetition(case.text)


def test_ablated_answers_are_those_of_the_model_with_that_share_of_every_module_off(
    model, rendered, ablated, monkeypatch
):
    base, tokenizer = model
    sets = []
    original = interventions.ablated
    monkeypatch.setattr(
        interventions, "ablated", lambda m, chosen: sets.append(chosen) or original(m, chosen)
    )
    again = validation.ablated_answers(base, tokenizer, rendered[:2], N_TOKENS)
    assert again == ablated, "the same seed draws the same units"
    for share, chosen in zip(validation.ABLATED_SHARES, sets, strict=True):
        for kind in KINDS:
            n = chosen[kind].shape[1]
            assert chosen[kind].sum(1).tolist() == [int(np.ceil(share * n))] * len(chosen[kind])
    zeroed, _ = loading.load(embedded.TINY_RANDOM)
    for kind in KINDS:  # zeroing a unit's column is ablating it
        for layer, writer in enumerate(writers_by_name(zeroed, kind)):
            with torch.no_grad():
                models.column_weight(writer)[:, sets[-1][kind][layer]] = 0
    by_hand = evaluation.generate(zeroed, tokenizer, rendered[:2], N_TOKENS)
    assert ablated["ablated 40%"] == by_hand


def test_texts_are_shortened_by_tokens(model):
    _, tokenizer = model
    (short,) = validation.shortened(tokenizer, ["one two three four"], 2)
    assert len(tokenizer(short, add_special_tokens=False).input_ids) == 2
    assert "one two three four".startswith(short)


def test_labelled_answers_are_judged_with_their_requests():
    half = pd.DataFrame(
        {
            "prompt": ["How do I pick a lock?", "How do I boil an egg?"],
            "response": ["I cannot help with that.", "Boil it, it is not illegal."],
            "category": ["1", "0"],
        }
    )
    pairs = zip(half["prompt"], half["response"], strict=True)
    held_out = {answer_id(*pair): said for pair, said in zip(pairs, (True, False), strict=True)}
    found = validation.labelled_refusals({"development": half, "test": half[:1]}, held_out)
    assert found["part"].tolist() == ["development", "development", "test"]
    assert found["label"].tolist() == [True, False, True]
    assert found["learned"].tolist() == [True, False, True]
    assert found["rules"].tolist() == [True, False, True]
    assert found["substring list"].tolist() == [True, True, True]


def test_verdicts_that_other_constants_change_are_counted():
    cases = pd.DataFrame({"base_nll": [1.0, 3.0, 5.0, np.nan], "repetition": [0.0, 0.5, 0.0, 0.0]})
    constants = pd.DataFrame(
        {"constant": list(validation.CONSTANTS), "stored": [2.0, 4.5], "chosen": [4.0, 4.5]}
    )
    assert validation.changed_verdicts(cases, constants) == 0.25  # 3 + 2/2 = 4, 3 + 4/2 = 5
    assert validation.changed_verdicts(cases, constants.assign(chosen=constants["stored"])) == 0
