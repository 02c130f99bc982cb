"""How long an answer must be: beginnings of one answer, cut by tokens, judged as answers of their
own.
"""

import numpy as np
import pandas as pd
import pytest
import torch

from ssah_utils import embedded, evaluation, interventions, loading, stats, units, weights
from ssah_utils.experiments import answer_length
from ssah_utils.experiments.answer_length import AnswerLengths
from ssah_utils.figures import judge as figures
from ssah_utils.prompts import chat

PROMPTS = ["Why is the sky blue?", "Name three rivers, please.", "How do I bake bread?"]


@pytest.fixture(scope="module")
def models():
    base, tokenizer = loading.load(embedded.TINY_RANDOM)
    model, _ = loading.load(embedded.TINY_RANDOM)
    return base, model, tokenizer


@pytest.fixture(scope="module")
def partition(models):
    generator = torch.Generator().manual_seed(0)
    norms = weights.squared_column_norms(models[0])
    drawn = [norms.map(lambda t: torch.rand(t.shape, generator=generator)) for _ in range(2)]
    return units.partition(*drawn, 0.1, 0.2, 0.2)


@pytest.fixture(scope="module")
def requests():
    table = pd.DataFrame({"id": list("abc"), "category": "x", "prompt": PROMPTS})
    return {"harmful": table, "helpful": table[:2]}


@pytest.mark.parametrize("length", [1, 3, 6, 12])
def test_a_beginning_is_the_answer_of_that_many_tokens(models, length):
    _, model, tokenizer = models
    rendered = chat.render(tokenizer, PROMPTS)
    ids = evaluation.generate_ids(model, tokenizer, rendered, 12)
    assert max(map(len, ids)) <= 12
    expected = evaluation.generate(model, tokenizer, rendered, length)
    assert answer_length.beginnings(tokenizer, ids, length) == expected


def test_every_length_is_judged_as_if_the_model_had_stopped_there(models, requests):
    base, model, tokenizer = models
    study = AnswerLengths(base, tokenizer, requests, [3, 12], 6)
    assert study.all_lengths == [3, 6, 12]
    rows = study.measure(model)
    assert len(rows) == 3 * 3 + 3 * 2
    for length in (3, 6, 12):
        found = rows[(rows["set"] == "harmful") & (rows["length"] == length)]
        alone = (model, base, tokenizer, requests["harmful"], length)
        expected = evaluation.answer_and_judge(*alone)
        for column in ("response", "verdict"):
            assert found[column].tolist() == expected[column].tolist()
        np.testing.assert_allclose(found["base_nll"], expected["base_nll"], rtol=1e-4)


def test_conditions_are_models_without_their_units(models, requests, partition):
    base, model, tokenizer = models
    study = AnswerLengths(base, tokenizer, {"harmful": requests["harmful"]}, [8], 4)
    conditions = answer_length.unit_conditions(partition, torch.Generator().manual_seed(1))
    safety, drawn = conditions["safety"], conditions["random, as safety"]
    assert conditions["aligned"].count() == 0 and not drawn.equals(safety)
    assert drawn.count() == safety.count() == partition.units("safety").count()
    rows = study.measure_all(model, conditions)
    assert list(dict.fromkeys(rows["condition"])) == ["base", *conditions]
    expected = study.measure(interventions.without_units(model, partition.units("utility")))
    found = rows[rows["condition"] == "utility"]
    assert found["response"].tolist() == expected["response"].tolist()
    assert "base" not in set(study.measure_all(model, conditions, False)["condition"])
    with pytest.raises(ValueError, match="load it a second time"):
        study.measure_all(base, conditions)


def test_a_default_that_is_the_longest_length_is_refused(models, requests):
    base, _, tokenizer = models
    with pytest.raises(ValueError, match="add a longer one"):
        AnswerLengths(base, tokenizer, requests, [12, 16], 16)


# ------------------------------------------------------------------------ tables, from rows by hand


def rows_of(verdicts: dict[tuple[str, str, int], list[str]]) -> pd.DataFrame:
    parts = []
    for (condition, name, length), said in verdicts.items():
        part = pd.DataFrame({"id": range(len(said)), "verdict": said})
        parts.append(part.assign(condition=condition, set=name, length=length))
    rows = pd.concat(parts, ignore_index=True)
    return rows.assign(
        refused=rows["verdict"] == "refused",
        coherent_asr=rows["verdict"] == "complied",
        degenerate=rows["verdict"] == "degenerate",
    )


NO, YES, BAD = "refused", "complied", "degenerate"


@pytest.fixture
def rows() -> pd.DataFrame:
    return rows_of(
        {
            ("aligned", "harmful", 4): [NO, YES, NO, NO],
            ("aligned", "harmful", 8): [NO, NO, NO, NO],
            ("aligned", "harmful", 16): [NO, NO, NO, NO],
            ("safety", "harmful", 4): [YES, NO, BAD, YES],
            ("safety", "harmful", 8): [YES, NO, YES, YES],
            ("safety", "harmful", 16): [YES, YES, YES, YES],
            ("aligned", "helpful", 4): [YES, YES],
            ("aligned", "helpful", 8): [YES, YES],
            ("aligned", "helpful", 16): [YES, YES],
        }
    )


def test_shares_of_verdicts_stand_by_condition_set_and_length(rows):
    table = answer_length.shares_by_length(rows).set_index(["condition", "set", "length"])
    row = table.loc[("safety", "harmful", 4)]
    assert row[["refused", "coherent_asr", "degenerate", "n"]].tolist() == [0.25, 0.5, 0.25, 4]


def test_flips_are_counted_against_the_longest_answer(rows):
    table = answer_length.flip_table(rows, 8).set_index(["condition", "set", "length"])
    assert table["flips"]["aligned", "harmful", 4] == 0.25
    assert table["flips"]["safety", "harmful", 4] == 0.5
    assert table["flips"]["safety", "harmful", 8] == 0.25
    assert table["flips"]["aligned", "helpful", 4] == 0
    wilson = stats.proportion_interval([True, False, False, False])
    low_high = table.loc[("aligned", "harmful", 4), ["low", "high"]].tolist()
    assert low_high == pytest.approx(wilson[1:])
    everything = table.loc[("all", "all", 4)]
    assert everything["n"] == 10
    # request 1 flips under both conditions, request 2 under one of two, four others under none
    assert everything["flips"] == pytest.approx((1 + 0.5) / 6)
    assert everything["low"] < everything["flips"] < everything["high"]
    assert table["role"]["all", "all", 8] == "default"
    assert table["role"]["all", "all", 16] == "longest" and table["flips"]["all", "all", 16] == 0


def test_no_flip_at_all_keeps_an_interval(rows):
    same = rows.assign(verdict=NO)
    overall = answer_length.flip_table(same, 8).query("condition == 'all' and length == 4").iloc[0]
    assert overall["flips"] == 0
    assert overall["high"] == pytest.approx(stats.proportion_interval([False] * 10)[2])


def test_the_control_is_between_conditions_at_the_longest_length(rows):
    table = answer_length.control_table(rows.query("set == 'harmful'"))
    assert table[["condition", "against", "set"]].to_numpy().tolist() == [
        ["aligned", "safety", "harmful"]
    ]
    assert table["flips"].tolist() == [1.0] and table["n"].tolist() == [4]
    mixed = rows.query("set == 'harmful'").sample(frac=1, random_state=0)
    pd.testing.assert_frame_equal(answer_length.control_table(mixed), table)


def test_a_length_is_long_enough_when_no_longer_one_flips_more():
    flips = pd.DataFrame(
        {
            "condition": "all",
            "length": [4, 8, 16, 32, 64],
            "role": ["", "default", "", "", "longest"],
            "flips": [0.04, 0.2, 0.05, 0.01, 0.0],
        }
    )
    assert answer_length.long_enough(flips) == 16, "that 4 tokens flip less is chance"
    assert answer_length.long_enough(flips, 0.005) is None
    assert answer_length.long_enough(flips, 0.3) == 4


def test_the_figure_shows_a_line_for_each_condition(rows):
    tables = {
        "length_verdicts": answer_length.shares_by_length(rows),
        "length_flips": answer_length.flip_table(rows, 8),
    }
    figure = figures.answer_length(tables)
    asr, flips, _ = figure.axes
    drawn = {line.get_label(): line for line in asr.get_lines()}
    assert {"aligned", "without safety units"} <= set(drawn)
    assert drawn["without safety units"].get_ydata().tolist() == [0.5, 0.75, 1.0]
    lines = {line.get_label(): line for line in flips.get_lines()}
    assert lines["without safety units"].get_ydata().tolist() == [0.5, 0.25, 0.0]
    assert figures.MAX_FLIPS == answer_length.MAX_FLIPS
