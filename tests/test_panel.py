"""The panel of measurements is what its parts measure one by one, on the same requests."""

import numpy as np
import pandas as pd
import pytest
import torch

from ssah_utils import benchmarks, embedded, evaluation, loading, stats
from ssah_utils.experiments import panel
from ssah_utils.prompts import chat

N_TOKENS = 5


@pytest.fixture(scope="module")
def models():
    """The tiny random model, and it with every weight of its head turned around."""
    base, tokenizer = loading.load(embedded.TINY_RANDOM)
    other, _ = loading.load(embedded.TINY_RANDOM)
    with torch.no_grad():
        other.model.layers[0].mlp.down_proj.weight.mul_(-30)
    return base, other, tokenizer


@pytest.fixture(scope="module")
def requests():
    def table(name: str, n: int) -> pd.DataFrame:
        prompts = [f"{name} number {row}: what is it?" for row in range(n)]
        return pd.DataFrame({"id": prompts, "category": name, "prompt": prompts})

    return {"harmful": table("harmful", 5), "helpful": table("helpful", 3)}


@pytest.fixture(scope="module")
def whole(models, requests):
    base, _, tokenizer = models
    sums = pd.DataFrame({"id": ["a"], "prompt": ["What is 1 + 1?"], "response": ["It is 2"]})
    kept = {"helpful": ["one two three", "four five", "six"]}
    return panel.Panel(
        base, tokenizer, requests, N_TOKENS, "", kept, ("cloze",), n_items=6, arithmetic=sums
    )


@pytest.fixture(scope="module")
def measured(whole, models):
    return whole.measure(models[1])


def test_answers_and_verdicts_are_those_of_each_set_alone(measured, models, requests):
    base, other, tokenizer = models
    for name, table in requests.items():
        rows = measured[measured["set"] == name].reset_index(drop=True)
        alone = evaluation.answer_and_judge(other, base, tokenizer, table, N_TOKENS)
        for column in ("id", "response", "verdict", "refused", "asr", "coherent_asr"):
            assert rows[column].tolist() == alone[column].tolist(), column


def test_kept_answers_are_followed_in_their_set_only(measured, whole, models, requests):
    _, other, tokenizer = models
    rendered = chat.render(tokenizer, requests["helpful"]["prompt"].tolist())
    kept = whole.kept_answers["helpful"]
    expected = evaluation.response_nll(other, tokenizer, rendered, kept)
    found = measured.set_index("set")["answer_nll"]
    # The whole panel and one set fill their batches differently, which moves the last bits.
    np.testing.assert_allclose(found["helpful"].astype(float), expected, rtol=1e-6)
    assert found.drop("helpful").isna().all()


def test_tasks_and_arithmetic_are_sets_of_their_own(measured, models):
    cloze = benchmarks.cloze(models[1], models[2], 6)
    rows = measured[measured["set"] == "cloze"]
    assert rows["id"].tolist() == cloze["id"].tolist()
    assert rows["accuracy"].tolist() == cloze["correct"].tolist()
    assert measured[measured["set"] == "arithmetic"]["id"].tolist() == ["a"]


def test_tasks_can_be_left_out(whole, models):
    assert set(whole.measure(models[1], with_tasks=False)["set"]) == {"harmful", "helpful"}


def test_rates_have_every_metric_of_a_set_and_no_other(measured):
    table = panel.rates(measured)
    metrics = table.groupby("set")["metric"].apply(list)
    verdicts = ["refused", "asr", "coherent_asr", "degenerate"]
    assert metrics["harmful"] == verdicts
    assert metrics["helpful"] == [*verdicts, "answer_nll"]
    assert metrics["cloze"] == metrics["arithmetic"] == ["accuracy"]
    harmful = measured[measured["set"] == "harmful"]
    asr = table[(table["set"] == "harmful") & (table["metric"] == "asr")].iloc[0]
    assert asr["mean"] == harmful["asr"].astype(float).mean() and asr["n"] == 5
    assert asr["low"] <= asr["mean"] <= asr["high"]


def test_measurements_are_put_side_by_side_request_by_request(measured):
    found = panel.per_request([measured, measured], "helpful", "answer_nll")
    assert found.shape == (2, 3)
    np.testing.assert_array_equal(found[0], found[1])
    shuffled = measured.iloc[::-1]
    with pytest.raises(ValueError, match="different requests in set 'helpful'"):
        panel.per_request([measured, shuffled], "helpful", "answer_nll")


def test_kept_answers_that_miss_a_request_are_refused(models, requests):
    with pytest.raises(ValueError, match="2 kept answers for 3 requests 'helpful'"):
        panel.Panel(models[0], models[2], requests, kept_answers={"helpful": ["a", "b"]})


def test_conditions_are_compared_request_by_request_with_one_correction():
    def rows(refused: list[bool], right: list[bool]) -> pd.DataFrame:
        harmful = pd.DataFrame({"set": "harmful", "id": range(4), "refused": refused})
        sums = pd.DataFrame({"set": "arithmetic", "id": range(3), "accuracy": right})
        return pd.concat([harmful, sums], ignore_index=True)

    base = rows([False] * 4, [True, True, False])
    trained = [
        rows([True] * 4, [True, False, False]),
        rows([True, True, False, False], [False] * 3),
    ]
    table = panel.compare(
        {"before": [base], "after": trained},
        [({"name": "x"}, "after", "before"), ({"name": "none"}, "before", "before")],
        [("harmful", "refused"), ("arithmetic", "accuracy")],
    )
    assert table[["name", "set", "metric"]].to_numpy().tolist() == [
        ["x", "harmful", "refused"],
        ["x", "arithmetic", "accuracy"],
        ["none", "harmful", "refused"],
        ["none", "arithmetic", "accuracy"],
    ]
    expected = [(4 + 2) / 8, (1 + 0) / 6 - 2 / 3, 0, 0]
    assert table["difference"].tolist() == pytest.approx(expected)
    alone = stats.paired_difference(np.array([[1, 1, 1, 1], [1, 1, 0, 0]]), np.zeros((1, 4)))
    assert table.loc[0, ["low", "high", "p"]].tolist() == [alone[c] for c in ("low", "high", "p")]
    assert table["p_holm"].tolist() == stats.holm(table["p"].tolist())
