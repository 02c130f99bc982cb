"""What the probe finds under an ablation is what a model without these units does."""

import numpy as np
import pandas as pd
import pytest
import torch

from ssah_utils import embedded, evaluation, interventions, loading, models, stats, units
from ssah_utils.experiments import ablation_probe
from ssah_utils.experiments.ablation_probe import INTACT, AblationProbe
from ssah_utils.prompts import chat

N_TOKENS = 4


@pytest.fixture(scope="module")
def tiny():
    return loading.load(embedded.TINY_RANDOM)


@pytest.fixture(scope="module")
def base():
    return loading.load(embedded.TINY_RANDOM)[0]


@pytest.fixture(scope="module")
def requests() -> pd.DataFrame:
    prompts = [f"harmful request {row}: how is it done?" for row in range(5)]
    return pd.DataFrame({"id": prompts, "category": list("abaab"), "prompt": prompts})


@pytest.fixture(scope="module")
def kept() -> pd.DataFrame:
    prompts = ["What is a cat?", "Name a colour."]
    return pd.DataFrame(
        {"id": prompts, "category": "", "prompt": prompts, "response": ["An animal.", "Red it is."]}
    )


@pytest.fixture(scope="module")
def chosen(tiny):
    shape = models.shape_of(tiny[0])
    whole = models.check_per_unit(
        tiny[0],
        {
            kind: torch.zeros(shape.n_layers, shape.n_channels(kind), dtype=torch.bool)
            for kind in ("attention", "mlp")
        },
    )
    generator = torch.Generator().manual_seed(1)
    places = torch.randperm(whole.n_units, generator=generator)[: whole.n_units // 3]
    return units.from_flat_indices(places, whole)


@pytest.fixture(scope="module")
def probe(tiny, base, requests, kept):
    return AblationProbe(tiny[0], base, tiny[1], requests, 3, N_TOKENS, kept=kept)


def test_margins_are_those_of_a_model_without_the_units(probe, tiny, requests, chosen):
    small = interventions.without_units(tiny[0], chosen)
    expected = evaluation.refusal_margin(small, tiny[1], requests["prompt"].tolist())
    np.testing.assert_allclose(probe.margins(chosen), expected, rtol=1e-4, atol=1e-4)
    assert not np.allclose(probe.margins(chosen), probe.margins(chosen.empty_set()))


def test_answers_are_those_of_the_first_requests_and_the_rest_are_missing(
    probe, tiny, base, requests, kept, chosen
):
    rows = probe.measure(chosen)
    asked, likely = rows[rows["set"] == "harmful"], rows[rows["set"] == "helpful"]
    small = interventions.without_units(tiny[0], chosen)
    judged = evaluation.answer_and_judge(small, base, tiny[1], requests[:3], N_TOKENS)
    assert asked["id"].tolist() == requests["id"].tolist()
    assert asked["asr"].tolist()[:3] == judged["asr"].tolist()
    assert asked["coherent_asr"].tolist()[:3] == judged["coherent_asr"].tolist()
    assert asked["asr"][3:].isna().all() and asked["answer_nll"].isna().all()
    rendered = chat.render(tiny[1], kept["prompt"].tolist())
    nll = evaluation.response_nll(small, tiny[1], rendered, kept["response"].tolist())
    np.testing.assert_allclose(likely["answer_nll"].astype(float), nll, rtol=1e-4)


def test_what_is_not_asked_for_is_not_measured(tiny, base, requests, chosen):
    rows = AblationProbe(tiny[0], base, tiny[1], requests).measure(chosen)
    assert list(rows) == ["id", "category", "set", "margin"] and len(rows) == 5


def test_a_base_that_would_be_ablated_along_is_refused(tiny, requests):
    with pytest.raises(ValueError, match="load it a second time"):
        AblationProbe(tiny[0], tiny[0], tiny[1], requests)


def test_fewer_openings_give_another_margin(tiny, base, requests, chosen):
    narrow = AblationProbe(tiny[0], base, tiny[1], requests, n_openings=1)
    small = interventions.without_units(tiny[0], chosen)
    expected = evaluation.refusal_margin(small, tiny[1], requests["prompt"].tolist(), n_openings=1)
    np.testing.assert_allclose(narrow.margins(chosen), expected, rtol=1e-4, atol=1e-4)


def test_sets_are_compared_with_the_intact_model(probe, chosen):
    rows = probe.compare({"seed: 0": chosen})
    asked = rows[rows["set"] == "harmful"].set_index("variant")
    assert list(dict.fromkeys(rows["variant"])) == [INTACT, "seed: 0"]
    assert set(asked.loc["seed: 0", "family"]) == {"seed"}
    assert (asked.loc[INTACT, "margin_drop"] == 0).all()
    expected = probe.margins(chosen.empty_set()) - probe.margins(chosen)
    np.testing.assert_allclose(asked.loc["seed: 0", "margin_drop"], expected)


# ----------------------------------------------------------------------- tables, from rows by hand


DROPS = {
    INTACT: [0.0, 0.0, 0.0, 0.0],
    "reference": [4.0, 5.0, 6.0, 7.0],
    "category: a": [2.0, 2.0, 3.0, 4.0],
    "score: bad": [0.2, -0.3, 0.1, 0.0],
    "control: random 0": [0.4, -0.2, 0.0, 0.2],
    "control: random 1": [0.2, 0.0, -0.2, 0.4],
}
RANDOM = ["control: random 0", "control: random 1"]


@pytest.fixture
def rows() -> pd.DataFrame:
    found = []
    for variant, drops in DROPS.items():
        for number, drop in enumerate(drops):
            row = {"variant": variant, "family": variant.partition(":")[0], "set": "harmful"}
            row |= {"id": f"q{number}", "category": "aabb"[number], "margin_drop": drop}
            row["coherent_asr"] = drop > 3 if number < 3 else None
            found.append(row)
    return pd.DataFrame(found)


def test_categories_take_turns_and_none_has_more_than_its_share():
    table = pd.DataFrame({"category": list("aaabcb"), "id": range(6)}, index=range(10, 16))
    assert ablation_probe.in_turns(table, 2)["id"].tolist() == [0, 3, 4, 1, 5]
    assert ablation_probe.in_turns(table, 9)["category"].tolist() == list("abcaba")


def test_margins_are_shares_of_the_reference_and_held_against_random_sets(rows):
    table = ablation_probe.margin_losses(rows, RANDOM).set_index("variant")
    assert list(table.index) == ["reference", "category: a", "score: bad"]
    assert table["margin_drop"].tolist() == pytest.approx([5.5, 2.75, 0.0])
    assert table["share_of_reference"].tolist() == pytest.approx([1, 0.5, 0])
    assert table["above_random"].tolist() == [True, True, False]
    _, low, high = stats.mean_interval(np.array(DROPS["category: a"]))
    assert table.loc["category: a", ["low", "high"]].tolist() == [low, high]


def test_random_sets_are_averaged_request_by_request(rows):
    drop = ablation_probe.mean_over(rows, RANDOM, "margin_drop")
    assert drop.to_dict() == pytest.approx({"q0": 0.3, "q1": -0.1, "q2": -0.1, "q3": 0.3})
    assert list(ablation_probe.mean_over(rows, ["reference"], "coherent_asr").index) == [
        "q0",
        "q1",
        "q2",
    ]


def test_categories_are_measured_one_by_one(rows):
    sources = {"reference": ["reference"], "a": ["category: a"], "random": RANDOM}
    table = ablation_probe.category_table(rows, sources).set_index(["found_on", "measured_on"])
    assert table.loc[("a", "a"), "margin_drop"] == pytest.approx(2.0)
    assert table.loc[("a", "b"), "margin_drop"] == pytest.approx(3.5)
    assert table.loc[("a", "b"), "share_of_reference"] == pytest.approx(3.5 / 6.5)
    assert table.loc[("random", "a"), "margin_drop"] == pytest.approx(0.1)
    assert table.loc[("reference", "a"), "coherent_asr"] == 1
    assert table.loc[("reference", "b"), ["n", "n_judged"]].tolist() == [2, 1]
