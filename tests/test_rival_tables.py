"""Tables of finders, interventions and single units, against rows by hand and models that lack
the units.
"""

import numpy as np
import pandas as pd
import pytest
import torch

from ssah_utils import embedded, evaluation, interventions, loading, models, stats, units
from ssah_utils.experiments import rival_tables, rivals
from ssah_utils.experiments.ablation_probe import INTACT, AblationProbe
from ssah_utils.per_unit import PerUnit


@pytest.fixture(scope="module")
def tiny():
    return loading.load(embedded.TINY_RANDOM)


@pytest.fixture(scope="module")
def everything(tiny) -> PerUnit:
    shape = models.shape_of(tiny[0])
    kinds = ("attention", "mlp")
    return PerUnit({kind: torch.ones(shape.n_layers, shape.n_channels(kind)) for kind in kinds}) > 0


def some(everything: PerUnit, share: float, seed: int) -> PerUnit:
    generator = torch.Generator().manual_seed(seed)
    n = round(share * everything.n_units)
    return units.from_flat_indices(
        torch.randperm(everything.n_units, generator=generator)[:n], everything
    )


def table_of(name: str, n: int) -> pd.DataFrame:
    prompts = [f"{name} request {row}: how is it done?" for row in range(n)]
    ids = [f"{name}{row}" for row in range(n)]
    return pd.DataFrame({"id": ids, "category": "", "prompt": prompts})


@pytest.fixture(scope="module")
def probe(tiny):
    kept = table_of("harmless", 2).assign(response=["An animal.", "Red it is."])
    base = loading.load(embedded.TINY_RANDOM)[0]
    how = {"new_tokens": 2, "kept": kept, "n_openings": 1}
    return AblationProbe(tiny[0], base, tiny[1], table_of("harmful", 4), 3, **how)


@pytest.fixture(scope="module")
def selection(tiny, probe):
    return AblationProbe(tiny[0], probe.base, tiny[1], table_of("other", 3), n_openings=1)


def ranking(score: torch.Tensor, everything: PerUnit, seconds: float) -> rivals.Found:
    order = everything.unflatten(score)

    def choose(share: float) -> PerUnit:
        return units.top_units(order, share)

    return rivals.Found(choose, choose(0.1), seconds, 0.25)


@pytest.fixture(scope="module")
def found(everything):
    scores = torch.rand(2, everything.n_units, generator=torch.Generator().manual_seed(5))
    return {
        rivals.PAPER: ranking(scores[0], everything, 3.0),
        "WIFN": ranking(scores[1], everything, 5.0),
    }


# ------------------------------------------------------------------------------- from rows by hand

DROPS = {
    INTACT: [0.0, 0.0, 0.0, 0.0],
    rivals.PAPER: [4.0, 5.0, 6.0, 7.0],
    "WIFN": [5.0, 5.5, 8.0, 7.5],
    "random 0": [0.4, -0.2, 0.0, 0.2],
    "random 1": [0.2, 0.0, -0.2, 0.4],
}
ANSWERED = {INTACT: [0, 0], rivals.PAPER: [1, 1], "WIFN": [1, 0], "random 0": [0, 1]}
NLL = {INTACT: [1.0, 2.0], rivals.PAPER: [1.5, 2.5], "WIFN": [3.0, 4.0], "random 0": [1.0, 2.2]}


@pytest.fixture
def rows() -> pd.DataFrame:
    made = []
    for variant, drops in DROPS.items():
        answers = [*ANSWERED.get(variant, [0, 0]), None, None]
        for number, (drop, answer) in enumerate(zip(drops, answers, strict=True)):
            row = {"variant": variant, "set": "harmful", "id": f"q{number}", "margin_drop": drop}
            made.append(row | {"coherent_asr": None if answer is None else bool(answer)})
        for number, nll in enumerate(NLL.get(variant, [1.2, 2.0])):
            made.append(
                {"variant": variant, "set": "helpful", "id": f"h{number}", "answer_nll": nll}
            )
    return pd.DataFrame(made)


def test_finders_stand_beside_the_papers_and_the_random_sets(rows, found):
    table = rival_tables.finders_table(rows, found, ["random 0", "random 1"]).set_index("finder")
    assert list(table.index) == [rivals.PAPER, "WIFN", "random"]
    assert table["margin_drop"].tolist() == pytest.approx([5.5, 6.5, 0.1])
    assert table["gain"].tolist() == pytest.approx([0, 1.0, -5.4])
    mean, low, high = stats.mean_interval(np.array([1.0, 0.5, 2.0, 0.5]))
    assert table.loc["WIFN", ["gain", "gain_low", "gain_high"]].tolist() == [mean, low, high]
    assert table["coherent_asr"].tolist() == pytest.approx([1, 0.5, 0.25])
    expected = stats.proportion_interval([True, False])
    shown = ["coherent_asr", "coherent_low", "coherent_high"]
    assert table.loc["WIFN", shown].tolist() == list(expected)
    assert table["coherent_gain"].tolist() == pytest.approx([0, -0.5, -0.75])
    assert table["answer_nll"].tolist() == pytest.approx([0.5, 2.0, 0.1])
    assert table["seconds"].tolist()[:2] == [3.0, 5.0] and np.isnan(table.loc["random", "seconds"])
    assert table.loc["WIFN", "agreement_of_halves"] == 0.25
    assert len(set(table["units"])) == 1


def test_without_answers_and_harmless_requests_their_columns_are_missing(rows, found):
    few = rows[rows["set"] == "harmful"].assign(coherent_asr=None, answer_nll=np.nan)
    table = rival_tables.finders_table(few, found, ["random 0", "random 1"])
    assert table["coherent_asr"].isna().all() and table["answer_nll"].isna().all()
    assert table["margin_drop"].notna().all()


# ------------------------------------------------------------------------- on models that lack them


def lost(probe: AblationProbe, model) -> np.ndarray:
    """Margin lost by a model in which units are changed for good."""
    prompts = probe.requests["prompt"].tolist()
    before, after = (
        evaluation.refusal_margin(one, probe.tokenizer, prompts, n_openings=1)
        for one in (probe.model, model)
    )
    return before - after


def test_the_curve_is_the_margin_lost_at_every_size(probe, found, everything):
    generator = torch.Generator().manual_seed(0)
    table = rival_tables.curve_table(probe, found, [0.05, 0.2], 2, generator)
    assert table["finder"].tolist() == 2 * [rivals.PAPER, "WIFN", "random"]
    n = everything.n_units
    assert table["units"].tolist() == 3 * [round(0.05 * n)] + 3 * [round(0.2 * n)]
    small = interventions.without_units(probe.model, found["WIFN"].choose(0.2))
    expected = lost(probe, small).mean()
    (row,) = table.query("finder == 'WIFN' and fraction == 0.2").to_dict("records")
    assert row["margin_drop"] == pytest.approx(expected, abs=1e-4)
    assert row["low"] <= row["margin_drop"] <= row["high"]


def test_interventions_are_those_of_changed_models(probe, everything):
    safety, random = some(everything, 0.3, 0), some(everything, 0.3, 1)
    generator = torch.Generator().manual_seed(2)
    means = everything.map(lambda mask: torch.randn(mask.shape, generator=generator))
    sets, ways = {"safety": safety, "random": random}, {"mean": means}
    table = rival_tables.interventions_table(probe, sets, ways, [-1.0], n_judged=2)
    index = table.set_index(["intervention", "set"])
    assert list(index.index) == [
        (way, name) for way in ("zero", "mean", "times -1") for name in sets
    ]
    for way, held in (("zero", None), ("mean", means)):
        small = interventions.without_units(probe.model, safety, held)
        expected = lost(probe, small).mean()
        assert index.loc[(way, "safety"), "margin_drop"] == pytest.approx(expected, abs=1e-4)
    shares = table["margin_drop"] / [*index["margin_drop"].loc["zero"].tolist() * 3]
    assert table["share_of_zero"].tolist() == pytest.approx(shares.tolist())
    assert table["answer_nll"].notna().all() and table["coherent_asr"].isin([0, 0.5, 1]).all()
    turned = index.loc[("times -1", "safety"), "margin_drop"]
    assert turned != pytest.approx(index.loc[("zero", "safety"), "margin_drop"], abs=1e-3)


def test_single_units_are_judged_under_the_factor_that_is_strongest_elsewhere(
    probe, selection, everything
):
    one, other = (units.from_flat_indices([place], everything) for place in (3, -5))
    alone = {"a": one, "b": other, "c": one}
    generator = torch.Generator().manual_seed(0)
    ways = [-20.0, -60.0]
    table = rival_tables.single_units(probe, selection, alone, ways, 2, generator)
    assert table["finder"].tolist() == 3 * ["a"] + 3 * ["b"] + 3 * ["c"]
    assert table["factor"].tolist() == 3 * [0.0, -20.0, -60.0]
    shared = ["unit", "factor", "margin_drop", "coherent_asr"]
    a, c = (table[table["finder"] == name][shared].reset_index(drop=True) for name in "ac")
    pd.testing.assert_frame_equal(a, c)
    for name, unit in alone.items():
        rows = table[table["finder"] == name]
        assert rows["is_strongest"].sum() == 1
        means = []
        for factor in (0.0, *ways):
            prompts = selection.requests["prompt"].tolist()
            with interventions.multiplied(selection.model, unit, factor):
                margins = evaluation.refusal_margin(
                    selection.model, selection.tokenizer, prompts, n_openings=1
                )
            means.append(margins.mean())
        assert rows["is_strongest"].tolist().index(True) == int(np.argmin(means))
        assert rows["coherent_asr"].notna().tolist() == rows["is_strongest"].tolist()
        assert rows["random_coherent_asr"].notna().tolist() == rows["is_strongest"].tolist()
        assert set(rows["unit"]) == set(unit.names())
    gone = interventions.without_units(probe.model, other)
    zero = table.query("finder == 'b' and factor == 0.0")["margin_drop"].item()
    assert zero == pytest.approx(lost(probe, gone).mean(), abs=1e-4)


def test_a_probe_multiplies_or_holds_but_not_both(probe, everything):
    means = everything.map(lambda mask: mask.float())
    with pytest.raises(ValueError, match="not both"):
        AblationProbe(
            probe.model, probe.base, probe.tokenizer, probe.requests, means=means, factor=-1.0
        )
