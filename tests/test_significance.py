"""Tests of claims: which comparison is tested, its p-value, corrections over the table, power."""

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from scipy import stats as reference

from ssah_utils import stats
from ssah_utils.crossed import CrossedMean
from ssah_utils.experiments.frontier import LossPath
from ssah_utils.files import NOTEBOOKS, REFERENCE
from ssah_utils.pipeline import claims, significance, verdicts
from ssah_utils.pipeline.runs import declared_parameters
from ssah_utils.pipeline.stored import Stored, load_result
from ssah_utils.prompts.datasets import study_splits
from tests.test_claims import claim, number

ERROR = 0.1  # standard error of every number below


def tables(safety: float = 0.7, random: float = 0.2) -> dict:
    """A run: the two groups' rates with intervals of the same width."""
    rows = [
        {"group": name, "draw": 0, "step": 9, "set": "harmful", "metric": "margin"}
        | {"mean": mean, "low": mean - 1.959964 * ERROR, "high": mean + 1.959964 * ERROR, "n": 50}
        for name, mean in (("safety", safety), ("random", random))
    ]
    return {"04_ablation": Stored({"rates": pd.DataFrame(rows)}, {"n_queries": 32})}


def outcome(one: claims.Claim, *runs: dict) -> significance.Tested:
    found, _ = significance.measured(one, list(runs))
    return significance.tested(one, found)


# ----------------------------------------------------------------------------------- what is tested


@pytest.mark.parametrize(
    ("rule", "what"),
    [
        ("low > control_high and ours >= 0.5", ["low > control_high"]),
        ("ours >= -5 and low >= -10", ["low >= -10"]),
        ("ours >= 0.5 and control <= 0.1", ["ours >= 0.5"]),
        ("control_low > 0.1 and low > control_high", ["control_low > 0.1", "low > control_high"]),
        ("0.1 < low < 0.9", ["0.1 < low", "low < 0.9"]),
        ("ours <= 1.02 * control", ["ours <= 1.02 * control"]),
        ("low > 0 or ours > 1", []),
    ],
)
def test_comparisons_with_ends_of_intervals_are_tested_else_those_of_our_value(rule, what):
    assert [part.what for part in significance.deciding(claim(replicated=rule))] == what


def test_the_p_value_is_that_of_two_independent_means():
    test = outcome(claim(), tables())
    z = (0.7 - 0.2) / (math.sqrt(2) * ERROR)
    assert test.p == pytest.approx(2 * reference.norm.sf(z), rel=1e-3)
    less = claim(replicated="high < control_low", partly="")
    assert outcome(less, tables(0.2, 0.7)).p == pytest.approx(test.p)
    assert outcome(less, tables()).p == 1, "the wrong side"


def test_a_factor_and_a_bound_move_the_null():
    test = outcome(claim(replicated="low > 2 * control_high + 0.1", partly=""), tables())
    assert test.excess.mean == pytest.approx(0.7 - 2 * 0.2 - 0.1)
    assert test.excess.of_requests == pytest.approx(math.hypot(1, 2) * ERROR, rel=1e-4)


def test_a_rule_of_several_comparisons_has_the_largest_of_their_p_values():
    weak, strong = "low > control_high + 0.4", "low > 0"
    alone = [outcome(claim(replicated=rule, partly=""), tables()).p for rule in (weak, strong)]
    both = outcome(claim(replicated=f"{strong} and {weak}", partly=""), tables())
    assert both.p == max(alone) > min(alone) and both.comparison.what == weak


def test_a_number_and_its_control_stay_paired_over_runs():
    """Runs that differ much, but always by as much as their control, show the difference well."""
    runs = [tables(0.7 + by, 0.2 + by) for by in (-3.0, 0.0, 3.0)]
    test = outcome(claim(), *runs)
    assert test.excess.sd == pytest.approx(0, abs=1e-12) and test.p < 0.001


def test_a_claim_without_an_interval_anywhere_has_no_p_value():
    bare = claim(ours=number(low="", high=""), replicated="ours > 1", partly="", control=0.0)
    assert outcome(bare, tables()) is None
    table = verdicts.verdict_table([bare, claim()], [tables()])
    assert table["p"].isna().tolist() == [True, False] and table["tested"].tolist()[0] == ""


def test_p_values_are_corrected_over_those_that_there_are():
    p = [0.01, np.nan, 0.04, 0.03]
    table = significance.adjusted(pd.DataFrame({"p": p}))
    assert table["p_holm"].tolist() == pytest.approx([0.03, np.nan, 0.06, 0.06], nan_ok=True)
    assert table["p_bh"].tolist() == pytest.approx([0.03, np.nan, 0.04, 0.04], nan_ok=True)


@pytest.mark.parametrize("p", [[], [0.3], [0.2, 0.2], [0.001, 0.9, 0.01, 0.04, 0.04]])
def test_benjamini_hochberg_is_that_of_scipy(p):
    expected = reference.false_discovery_control(p) if p else []
    assert stats.benjamini_hochberg(p) == pytest.approx(list(expected))


def test_the_sentence_names_what_a_correction_takes():
    table = pd.DataFrame({"id": ["a", "b", "c", "d"], "p": [0.001, 0.03, 0.5, np.nan]})
    table["verdict"] = ["replicated", "replicated", "partly", "replicated"]
    said = significance.said_of_correction(significance.adjusted(table))
    assert "3 have a p-value" in said and "lost: b. By Benjamini-Hochberg, lost: none" in said
    assert said.endswith("without a p-value: d.")


# -------------------------------------------------------------------------------------------- power


def test_the_power_table_has_sizes_effect_and_what_is_needed():
    one = claim(id="seen")
    (row,) = significance.power_table([one], [tables(0.5)]).to_dict("records")
    mean = CrossedMean.of([0.3], [0.3 - 1.959964 * ERROR * math.sqrt(2)], [math.nan])
    assert row["effect"] == pytest.approx(0.3) and row["tested"] == "low > control_high"
    assert row["power"] == pytest.approx(mean.power(), abs=1e-6)
    assert (row["seeds"], row["parameter"]) == (1, "") and math.isnan(row["requests"])
    assert row["times_requests"] == pytest.approx(mean.requests_needed(), rel=1e-3)
    assert math.isnan(row["seeds_needed"])


def test_the_requests_are_those_that_the_claim_names_or_of_its_set():
    where = {"group": "safety", "set": "harmful", "metric": "margin"}
    of_set = claim(ours=number(where=where), replicated="low > 0", partly="")
    named = claim(requests="n_queries", replicated="low > 0", partly="")
    table = significance.power_table([of_set, named], [tables()])
    assert table["parameter"].tolist() == ["n_harmful", "n_queries"]
    assert table["requests"].tolist() == [50, 32]
    times = table["times_requests"]
    assert table["requests_needed"].tolist() == np.ceil(table["requests"] * times).tolist()


def test_nothing_is_needed_of_an_effect_on_the_wrong_side():
    (row,) = significance.power_table([claim()], [tables(0.1)] * 2).to_dict("records")
    assert math.isnan(row["requests_needed"]) and math.isnan(row["seeds_needed"])
    assert row["smallest_effect"] == pytest.approx(2.8016 * math.sqrt(2) * ERROR, rel=1e-3)


def test_the_sentence_on_power_does_not_say_what_one_run_cannot():
    columns = ("effect", "power", "seeds_needed", "times_requests")
    rows = [
        *((0.3, 0.9, 2.0, 0.5), (-0.1, 0.1, np.nan, np.nan)),  # seen; not toward its claim
        *((0.3, 0.5, np.nan, 2.0), (0.3, 0.5, np.nan, np.inf)),  # of one run
        *((0.3, 0.5, 5.0, np.inf), (0.3, 0.5, np.inf, np.inf), (0.3, 0.5, np.inf, 3.0)),
    ]
    said = significance.said_of_power(pd.DataFrame(rows, columns=columns))
    assert said.startswith("Of 6 effects toward their claim, 1 are seen")
    assert "Of the 5 others, more requests would do for 2." in said
    assert "3 of them were measured by more than one run: more seeds would do for 1" in said
    assert said.endswith("neither alone for 1.")
    alone = significance.said_of_power(pd.DataFrame(rows[:4], columns=columns))
    assert alone.endswith("cannot be told: one run alone has measured each.")


# ------------------------------------------------------------------------------- what is committed


def means_of_draws() -> dict[tuple, tuple[list[float], dict]]:
    """Every stored difference over several draws within a run: the draws' means, and its row."""
    found = {}
    for path in REFERENCE.glob("**/04_ablation/result.json"):
        tables = load_result(path)["tables"]
        groups = tables["rates"].query("part == 'groups'")
        rates = groups.set_index(["condition", "set", "metric"]).sort_index()["mean"]
        for row in tables["differences"].to_dict("records"):
            intact = rates.loc["nothing", row["set"], row["metric"]].item()
            means = rates.loc[row["condition"], row["set"], row["metric"]] - intact
            key = (str(path), row["condition"], row["set"], row["metric"])
            found[key] = (np.atleast_1d(means).tolist(), row)
    for path in REFERENCE.glob("**/06_freezing/result.json"):
        tables = load_result(path)["tables"]
        rows = tables["paths"].groupby(["task", "condition", "seed"], sort=False)
        paths = {
            key: LossPath(run["task_loss"].to_numpy(), run[["margin"]].to_numpy())
            for key, run in rows
        }
        for row in tables["equal"].to_dict("records"):
            task, condition, loss = row["task"], row["condition"], row["task_loss"]
            means = [
                path.margins_at(loss).item() - paths[task, "nothing", k].margins_at(loss).item()
                for (where, what, k), path in paths.items()
                if (where, what) == (task, condition)
            ]
            found[str(path), task, condition] = (means, row | {"difference": row["gain"]})
    return {key: (means, row) for key, (means, row) in found.items() if np.ptp(means) > 1e-6}


def test_a_stored_interval_over_several_draws_is_as_wide_as_they_alone_make_it():
    found = means_of_draws()
    assert {Path(key[0]).parent.name for key in found} == {"04_ablation", "06_freezing"}
    for key, (means, row) in found.items():
        assert row["difference"] == pytest.approx(np.mean(means), abs=1e-6), key
        n = len(means)
        half = reference.t(n - 1).ppf(0.975) * np.std(means, ddof=1) / math.sqrt(n) - 1e-6
        assert row["difference"] - row["low"] >= half <= row["high"] - row["difference"], key


def test_every_committed_claim_that_names_its_requests_names_a_parameter_of_its_notebook():
    for one in claims.load_claims():
        declared = declared_parameters(NOTEBOOKS / f"{one.stage}.ipynb")
        assert not one.requests or one.requests in declared, one.id


def test_the_reference_profile_has_the_requests_that_the_stored_effects_need():
    """Where the stored seeds with more requests reach 80%, and the data hold so many."""
    power = load_result(REFERENCE / "08_claims" / "result.json")["tables"]["power"]
    profile = yaml.safe_load((NOTEBOOKS / "profiles" / "reference.yaml").read_text())
    held = len(study_splits("advbench", "harmbench", "helpful")["evaluation"]["harmful"])
    reached = power[(power["requests_needed"] <= held) & (power["parameter"] != "")]
    assert len(reached) >= 5
    for row in reached.itertuples():
        sizes = profile["all"] | profile.get(row.stage, {})
        assert sizes[row.parameter] >= row.requests_needed, row.id
