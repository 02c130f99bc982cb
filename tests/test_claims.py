"""Claims: what the file may say, which row a selector finds, which verdict follows from made-up
numbers.
"""

import json
import math

import pandas as pd
import pytest
import yaml

from ssah_utils.crossed import CrossedMean
from ssah_utils.files import REFERENCE, ROOT
from ssah_utils.pipeline import claims, run, runs, selecting, verdicts
from ssah_utils.pipeline.stored import load_result, made_from_another

RATES = pd.DataFrame(
    [
        {"group": "safety", "draw": 0, "step": 5, "mean": 0.5, "low": 0.4, "high": 0.6},
        {"group": "safety", "draw": 0, "step": 9, "mean": 0.7, "low": 0.6, "high": 0.8},
        {"group": "random", "draw": 0, "step": 9, "mean": 0.1, "low": 0.0, "high": 0.2},
        {"group": "random", "draw": 1, "step": 9, "mean": 0.3, "low": 0.1, "high": 0.5},
        {
            "group": "empty",
            "draw": 0,
            "step": 9,
            "mean": math.nan,
            "low": math.nan,
            "high": math.nan,
        },
    ]
)
TABLES = {"04_ablation": {"rates": RATES}}


def number(group: str = "safety", **changes) -> dict:
    start = {
        "stage": "04_ablation",
        "table": "rates",
        "value": "mean",
        "low": "low",
        "high": "high",
    }
    return start | {"where": {"group": group}, "last": "step"} | changes


def entry(**changes) -> dict:
    start = {
        "id": "one",
        "experiment": "2",
        "claim": "It is so.",
        "source": "table 1",
        "paper": "+1",
        "ours": number(),
    }
    control = number("random", aggregate="mean", last="")
    return (
        start
        | {"control": control, "replicated": "low > control_high", "partly": "ours > control"}
        | changes
    )


def claim(**changes) -> claims.Claim:
    return claims.read_claim(entry(**changes))


def write(tmp_path, *entries) -> str:
    path = tmp_path / "claims.yaml"
    path.write_text(yaml.safe_dump(list(entries)), encoding="utf-8")
    return path


# ------------------------------------------------------------------------------------------ reading


@pytest.mark.parametrize(
    ("changes", "field", "said"),
    [
        ({"replicatd": "ours > 1"}, "replicatd", "nearest is 'replicated'"),
        (
            {"replicated": "ours > contrl"},
            "replicated",
            "unknown number 'contrl'; nearest is 'control'",
        ),
        ({"control": None, "partly": ""}, "replicated", "unknown number 'control_high'"),
        ({"ours": number(low="", high="")}, "replicated", "unknown number 'low'"),
        ({"partly": "ours >"}, "partly", "is not an expression"),
        ({"partly": "ours.__class__ == 1"}, "partly", "neither a number nor arithmetic"),
        ({"partly": "__import__('os') == 1"}, "partly", "neither a number nor arithmetic"),
        ({"partly": "ours == 'a'"}, "partly", "neither a number nor arithmetic"),
        ({"partly": "ours + 1"}, "partly", "compares nothing"),
        ({"ours": number(wher={})}, "ours.wher", "nearest is 'where'"),
        ({"ours": number(aggregate="mode")}, "ours.aggregate", "one of mean"),
        ({"ours": number(high="")}, "ours", "belong together"),
        ({"ours": 3}, "ours", "a mapping"),
        ({"paper": 5.3}, "paper", "put it in quotes"),
        ({"control": "random"}, "control", "a selector or a number"),
        ({"numbers": {"full": {"stage": "04_ablation"}}}, "numbers.full.table", "missing"),
        ({"only_if": "works <= 20"}, "only_if", "unknown number 'works'"),
        ({"added": "yesterday"}, "added", "a date such as 2026-11-26"),
        ({"added": 20261126}, "added", "a date such as 2026-11-26"),
        ({"changed": {"date": "2026-11-26"}}, "changed", "a list is needed"),
        ({"changed": ["stricter"]}, "changed", "mappings with date and reason"),
        ({"changed": [{"date": "2026-11-26"}]}, "changed", "mappings with date and reason"),
        ({"changed": [{"date": "26.11.", "reason": "x"}]}, "changed.date", "2026-11-26"),
        ({"changed": [{"date": "2026-11-31", "reason": "x"}]}, "changed.date", "2026-11-26"),
        ({"changed": [{"date": "2026-11-26", "reason": " "}]}, "changed.reason", "text is needed"),
        ({"changed": [{"date": "2026-11-26", "reason": 3}]}, "changed.reason", "text is needed"),
    ],
)
def test_schema_errors_name_file_claim_and_field(tmp_path, changes, field, said):
    with pytest.raises(ValueError) as caught:
        claims.load_claims(write(tmp_path, entry(**changes)))
    line = str(caught.value)
    assert (
        line.startswith("claims.yaml, claim 'one', field ")
        and f"'{field}'" in line
        and said in line
        and "\n" not in line
    )


@pytest.mark.parametrize(
    ("rule", "wanted"),
    [
        ("ours >= 0.5", "more"),
        ("ours <= 1.02 * control", "less"),
        ("0.5 < low", "more"),
        ("control - ours >= 0.5 and ours <= 0.5", "less"),
        ("control_low > 3 and high < control_low", "less"),
        ("-ours < 3 * control", "more"),
        ("0.7 < low < 0.9", ""),
        ("control > 1", ""),
    ],
)
def test_a_rule_says_whether_its_claim_wants_more_or_less(rule, wanted):
    assert claims.toward(claim(replicated=rule)) == wanted


def test_changes_are_read_with_their_dates(tmp_path):
    entries = [{"date": day, "reason": "stricter"} for day in ("2026-11-22", "2026-11-26")]
    path = write(tmp_path, entry(changed=entries, added="2026-11-22"))
    quoted = path.read_text()
    path.write_text(quoted.replace("'2026-11-22'", "2026-11-22"))  # a date of YAML
    assert path.read_text() != quoted
    (one,) = claims.load_claims(path)
    assert one.changed == ("2026-11-22: stricter", "2026-11-26: stricter")
    assert one.added == "2026-11-22"


def test_every_committed_claim_wants_more_or_less():
    assert {claims.toward(one) for one in claims.load_claims()} == {"more", "less"}


def test_every_wrong_claim_has_its_line(tmp_path):
    path = write(
        tmp_path,
        entry(id="a", replicated="x > 1"),
        entry(id="b"),
        entry(id="c", source=1),
        entry(id="b"),
    )
    with pytest.raises(ValueError) as caught:
        claims.load_claims(path)
    assert [line.split("'")[1] for line in str(caught.value).splitlines()] == ["a", "c", "b"]


@pytest.mark.parametrize("content", ["", "a: [", "- just text", "{a: 1}"])
def test_files_that_are_no_claims_are_refused(tmp_path, content):
    path = tmp_path / "claims.yaml"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=r"claims\.yaml"):
        claims.load_claims(path)


# ---------------------------------------------------------------------------------------- selecting


def test_selection_of_one_row_several_rows_and_a_factor():
    assert selecting.select(claim().ours, TABLES) == pytest.approx((0.7, 0.6, 0.8))
    of_draws = CrossedMean.of([0.1, 0.3], [0.0, 0.1], [0.2, 0.5])
    assert selecting.select(claim().control, TABLES) == pytest.approx(
        (0.2, *of_draws.interval())
    ), "draws: the interval of their mean"
    spread = claim(control=number("random", aggregate="mean", low="", high="", scale=100)).control
    half = 12.7062047 * 10 * math.sqrt(2) / math.sqrt(2)  # t, one degree of freedom
    assert selecting.select(spread, TABLES) == pytest.approx((20, 20 - half, 20 + half)), (
        "without intervals: the spread of the draws"
    )
    value, low, high = selecting.select(
        claim(ours=number(aggregate="mean", low="", high=""), replicated="ours > 1").ours, TABLES
    )
    assert value == 0.7 and math.isnan(low) and math.isnan(high), "one value has no range"


def test_different_things_are_averaged_as_independent_within_each_draw():
    rows = [
        {"set": name, "seed": seed, "mean": mean, "low": mean - half, "high": mean + 2 * half}
        for name, half in (("a", 3.0), ("b", 4.0))
        for seed, mean in ((0, 10.0), (1, 20.0))
    ]
    chosen = claim(ours=number(where={}, last="", aggregate="mean")).ours
    one_seed = pd.DataFrame(rows[::2])
    found = selecting.estimate(one_seed, chosen)
    assert found == pytest.approx((10.0, 10 - 5 / 2, 10 + 10 / 2)), "squares add; two things"
    both = CrossedMean.of([10.0, 20.0], [7.5, 17.5], [15.0, 25.0])
    found = selecting.estimate(pd.DataFrame(rows), chosen)
    assert found == pytest.approx((15.0, *both.interval()))


@pytest.mark.parametrize(
    ("where", "value", "bounds"),
    [
        ({"metric": "asr"}, "mean", (0, 100)),
        ({"metric": "coherent_asr"}, "difference", (-100, 100)),
        ({"metric": "answer_nll"}, "mean", (-math.inf, math.inf)),
        ({}, "gain", (-math.inf, math.inf)),
    ],
)
def test_the_interval_of_a_share_ends_where_shares_end(where, value, bounds):
    one = claim(ours=number(where=where, value=value, scale=100)).ours
    assert one.bounds == bounds
    _, low, high = selecting.mean_of_draws([(90.0, 80.0, 99.0), (10.0, 1.0, 20.0)], one.bounds)
    assert (low, high) == (
        bounds
        if math.isfinite(bounds[0])
        else (pytest.approx(-458.4, abs=0.1), pytest.approx(558.4, abs=0.1))
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"stage": "05_transfer"}, "no readable result of 05_transfer: re-run 05_transfer"),
        ({"table": "rate"}, "no table 'rate'; nearest is 'rates'"),
        ({"value": "men"}, "no column 'men'; nearest is 'mean'"),
        ({"where": {"grup": "safety"}}, "no column 'grup'; nearest is 'group'"),
        ({"where": {"group": "safty"}}, "no row with group 'safty'; nearest is 'safety'"),
        ({"last": ""}, "2 rows match; choose by step"),
        ({"where": {"group": "empty"}}, "'mean' is empty"),
        ({"value": "group"}, "holds no numbers"),
    ],
)
def test_what_is_not_found_is_not_measured_and_said_in_one_line(changes, said):
    row = verdicts.decide(claim(ours=number(**changes)), TABLES)
    assert row["verdict"] == "not measured" and said in row["note"] and "\n" not in row["note"]
    assert math.isnan(row["ours"])


# ----------------------------------------------------------------------------------------- deciding


@pytest.mark.parametrize(
    ("replicated", "partly", "verdict"),
    [
        ("low > control", "ours > 1", "replicated"),
        ("low > control and ours > 1", "ours > 0.65", "partly"),
        ("high < control_low or 0.7 < low < 0.9", "-ours > control / 2", "not replicated"),
        ("ours - control >= 0.4", "", "replicated"),
    ],
)
def test_first_true_rule_decides(replicated, partly, verdict):
    row = verdicts.decide(claim(replicated=replicated, partly=partly), TABLES)
    assert (row["verdict"], row["ours"], row["ci_low"], row["control"]) == (
        verdict,
        0.7,
        0.6,
        pytest.approx(0.2),
    )


def test_a_rule_on_a_missing_interval_is_false():
    alone = number("safety", aggregate="mean", low="", high="")
    for rule in ("low > -9", "low < 9", "low >= -9 and ours > 0"):
        assert (
            verdicts.decide(claim(ours=alone, replicated=rule, partly=""), TABLES)["verdict"]
            == "not replicated"
        )


def test_the_extreme_of_several_rows_comes_with_its_own_interval():
    for aggregate, group, expected in (
        ("min", "random", (0.1, 0.0, 0.2)),
        ("max", "random", (0.3, 0.1, 0.5)),
    ):
        chosen = claim(ours=number(group, aggregate=aggregate, last="")).ours
        assert selecting.select(chosen, TABLES) == pytest.approx(expected)
    bare = claim(
        ours=number("random", aggregate="min", last="", low="", high=""), replicated="ours > 1"
    ).ours
    value, low, high = selecting.select(bare, TABLES)
    assert value == pytest.approx(0.1) and math.isnan(low) and math.isnan(high)


def test_a_search_that_reached_no_end_is_a_result():
    one = claim(
        ours=number("empty", otherwise=math.inf, low="", high=""),
        control=None,
        replicated="ours <= 64",
        partly="",
    )
    table = verdicts.verdict_table([one], [TABLES])
    assert (
        table["verdict"].item() == "not replicated"
        and verdicts.to_records(table)[0]["ours"] is None
    )
    assert table["note"].item() == "not reached in 1 of 1 runs"


def shifted(by: float) -> dict:
    """The stored tables of a run in which everything came out lower."""
    return {
        "04_ablation": {
            "rates": RATES.assign(**{name: RATES[name] - by for name in ("mean", "low", "high")})
        }
    }


def test_runs_are_averaged_with_the_interval_of_their_mean():
    row = verdicts.verdict_table([claim(n_seeds=2)], [TABLES, shifted(0.1)]).iloc[0]
    low, high = CrossedMean.of([0.7, 0.6], [0.6, 0.5], [0.8, 0.7]).interval()
    assert (row["ours"], row["ci_low"], row["ci_high"]) == pytest.approx((0.65, low, high))
    assert row["n_seeds"] == 4 and row["ours_seeds"] == pytest.approx([0.7, 0.6])
    lacking = verdicts.verdict_table([claim(n_seeds=2)], [{}, TABLES]).iloc[0]
    assert lacking["n_seeds"] == 2, "a seed that measured nothing says nothing"
    alone = verdicts.decide(claim(n_seeds=2), TABLES)
    assert (lacking["verdict"], lacking["ci_low"]) == (alone["verdict"], alone["ci_low"])
    assert lacking["note"] == "measured in 1 of 2 runs"


@pytest.mark.parametrize(
    ("shifts", "verdict", "agree"),
    [
        ([0, 0, 0], "replicated", 3),
        ([0, 0.3, -0.6], "replicated", 2),
        ([0.9, 0, -0.9], "replicated", 2),
        ([0, 0.3], "partly", 1),
        ([0, 0.9], "not replicated", 1),
        ([-0.6, 0.6], "replicated", 1),
    ],
)
def test_the_mean_over_runs_decides_and_how_many_runs_alone_agree_is_said(shifts, verdict, agree):
    one = claim(replicated="ours > 0.65", partly="ours > 0.3", control=None)
    row = verdicts.verdict_table([one], [shifted(by) for by in shifts]).iloc[0]
    assert (row["verdict"], row["runs_agree"], row["runs"]) == (verdict, agree, len(shifts))
    alone = [verdicts.decide(one, shifted(by))["verdict"] for by in shifts]
    assert row["note"] == ("" if agree == len(shifts) else f"by run: {', '.join(alone)}")


def test_one_verdict_may_be_that_of_no_run_alone():
    """Two halves that fail in different ways, or three runs too small to see what they agree on."""
    one = claim(replicated="low > 0", partly="", control=None)
    wide = RATES.assign(low=RATES["mean"] - 0.8, high=RATES["mean"] + 0.8)
    runs = [{"04_ablation": {"rates": wide.assign(mean=wide["mean"] + by)}} for by in (-0.1, 0.1)]
    assert verdicts.decide(one, runs[0])["verdict"] == "not replicated"
    row = verdicts.verdict_table([one], runs).iloc[0]
    assert row["verdict"] == "not replicated" and row["runs_agree"] == 2
    assert row["ci_high"] - row["ci_low"] > 1.6, "shared requests: two runs are no larger sample"


def test_a_claim_is_measured_only_where_its_positive_control_works():
    works = {"works": number("random", aggregate="mean", last="")}
    rule = "works <= 0.15 and control >= 0"
    one = claim(numbers=works, only_if=rule, replicated="low > control")
    row = verdicts.decide(one, TABLES)
    assert row["verdict"] == "not measured" and math.isnan(row["ours"])
    assert row["note"] == (
        "measured only if works <= 0.15 and control >= 0, but control 0.2, works 0.2"
    )
    assert verdicts.decide(one, shifted(0.1))["verdict"] == "replicated"
    table = verdicts.verdict_table([one], [TABLES, shifted(0.1)])
    assert table["runs"].item() == 2, "the mean over runs decides here, too"
    assert math.isnan(verdicts.verdict_table([one], [TABLES])["p"].item())


def test_verdict_of_the_control_in_the_place_of_ours():
    (other,) = verdicts.swapped([claim(), claim(control=0.5, replicated="low > control")])
    assert verdicts.decide(other, TABLES)["verdict"] == "not replicated"


def test_other_seeds_stand_beside_a_run_and_inside_the_stored_results(tmp_path):
    for name in ("run/seed-0", "run/seed-2", "stored/seed-1", "stored/04_ablation"):
        (tmp_path / name).mkdir(parents=True)
    assert [path.name for path in verdicts.runs_of_other_seeds(tmp_path / "run" / "seed-0")] == [
        "seed-2"
    ]
    assert [path.name for path in verdicts.runs_of_other_seeds(tmp_path / "stored")] == ["seed-1"]


def test_damaged_results_are_reported_and_their_claims_not_measured(tmp_path):
    (tmp_path / "04_ablation").mkdir()
    (tmp_path / "04_ablation" / "result.json").write_text('{"format": "ssah-res')
    table, (problem,) = verdicts.stored_verdicts(tmp_path, [claim()])
    assert problem.startswith("04_ablation: ") and "re-run 04_ablation" in problem
    assert list(table["verdict"]) == ["not measured"]
    assert "re-run 04_ablation" in table["note"].item()
    assert json.loads(json.dumps(verdicts.to_records(table), allow_nan=False))[0]["ours"] is None


def test_a_result_made_from_others_than_are_there_is_reported_and_its_claims_not_measured(tmp_path):
    read = {"03_units/units.safetensors": "of another one", "01_alignment/models.json": "not there"}
    runs.Run("04_ablation", tmp_path / "04_ablation", {}, inputs=read).finish(rates=RATES)
    assert verdicts.stored_verdicts(tmp_path, [claim()])[1] == [], "what is not there"
    (tmp_path / "03_units").mkdir()
    (tmp_path / "03_units" / "units.safetensors").write_bytes(b"units")
    table, problems = verdicts.stored_verdicts(tmp_path, [claim()])
    said = "was made from another 03_units/units.safetensors than is there: re-run 04_ablation"
    assert problems == [f"04_ablation: {said}"]
    assert table["verdict"].item() == "not measured"


def test_a_damaged_result_of_another_seed_is_reported_and_an_absent_one_is_not(tmp_path):
    runs.Run("04_ablation", tmp_path / "04_ablation", {}).finish(rates=RATES)
    (tmp_path / "seed-2").mkdir()
    damaged = tmp_path / "seed-1" / "04_ablation" / "result.json"
    damaged.parent.mkdir(parents=True)
    damaged.write_text('{"format": "ssah-res')
    one = claim(replicated="low > control")
    table, (problem,) = verdicts.stored_verdicts(tmp_path, [one])
    assert problem.startswith("seed-1/04_ablation: ") and "re-run 04_ablation" in problem
    assert (
        table["verdict"].item() == "replicated"
        and table["note"].item() == "measured in 1 of 3 runs"
    )


# -------------------------------------------------------------------------------- what is committed


def test_claims_cover_every_table_experiment_and_the_open_questions():
    stated = claims.load_claims()
    sources = " ".join(one.source for one in stated)
    assert len(stated) >= 14 and len({one.experiment for one in stated}) == 7
    for place in (
        "figures 2-4",
        "figure 5",
        *(f"table {n}" for n in range(1, 6)),
        *(f"open question {n}" for n in (2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 13)),
    ):
        assert place in sources, place


def test_committed_results_were_made_from_those_that_are_committed_beside_them():
    paths = sorted(REFERENCE.rglob("result.json"))
    assert len(paths) > 50
    for path in paths:
        assert made_from_another(path.parent, load_result(path)) == "", path
    amended = load_result(REFERENCE / "04_ablation" / "result.json")
    amended["inputs"]["03_units/units.safetensors"] = "of another one"
    assert made_from_another(REFERENCE / "04_ablation", amended)


def test_committed_claims_follow_from_the_committed_results():
    table, problems = verdicts.stored_verdicts(REFERENCE, claims.load_claims())
    stored = json.loads((REFERENCE / "claims.json").read_text(encoding="utf-8"))
    assert problems == [] and stored == verdicts.to_records(table), "run ssah publish"
    named = {
        "id",
        "claim",
        "source",
        "paper",
        "ours",
        "ci_low",
        "ci_high",
        "control",
        "n_seeds",
        "verdict",
    }
    assert all(named <= row.keys() and row["verdict"] in claims.CLAIM_VERDICTS for row in stored)


def test_results_show_the_verdicts_and_numbers_of_the_committed_claims():
    text = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    lines = (
        text.partition("<!-- claims -->")[2]
        .partition("<!-- end claims -->")[0]
        .strip()
        .splitlines()[2:]
    )
    stored = json.loads((REFERENCE / "claims.json").read_text(encoding="utf-8"))
    assert len(lines) == len(stored)
    for line, row in zip(lines, stored, strict=True):
        cells = [cell.strip(" *") for cell in line.strip("|").split("|")]
        assert (cells[0], cells[-1].partition(" ")[0]) == (
            row["claim"],
            row["verdict"].partition(" ")[0],
        )
        shown, exact = cells[2].partition(" ")[0], row["ours"]
        assert (
            (shown == "")
            if exact is None
            else float(shown) == pytest.approx(exact, rel=0.051, abs=1e-6)
        )


def test_a_claim_about_a_share_is_not_measured_by_a_run_with_another():
    (claim,) = [claim for claim in claims.load_claims() if claim.id == "safety-units-carry-safety"]
    tables, _ = verdicts.read_tables(REFERENCE, verdicts.stages_of([claim]))
    assert verdicts.decide(claim, tables)["verdict"] == "not replicated"
    tables["03_units"].parameters["safety_fraction"] = 0.004
    row = verdicts.decide(claim, tables)
    assert row["verdict"] == "not measured"
    assert row["note"] == "03_units was run with safety_fraction 0.004, the claim speaks of 0.013"


@pytest.mark.parametrize("other", ["ablation_mode", "judge", "a_parameter_that_one_has"])
def test_a_seed_run_with_other_parameters_or_another_judge_is_left_out_and_said(tmp_path, other):
    (claim,) = [claim for claim in claims.load_claims() if claim.id == "safety-units-carry-safety"]
    for name in ("seed-0", "seed-1"):
        for stage in verdicts.stages_of([claim]):
            result = json.loads((REFERENCE / stage / "result.json").read_text())
            if (name, stage) == ("seed-1", "04_ablation"):
                (result if other == "judge" else result["parameters"])[other] = "mean"
            (tmp_path / name / stage).mkdir(parents=True)
            (tmp_path / name / stage / "result.json").write_text(json.dumps(result))
    table, problems = verdicts.stored_verdicts(tmp_path / "seed-0", [claim])
    assert table["n_seeds"].tolist() == [1] and len(table["ours_seeds"][0]) == 1
    assert problems == [f"seed-1/04_ablation was run with another {other}, so it is left out"]


@pytest.mark.parametrize(
    ("ours", "theirs", "said"),
    [
        (None, None, ""),  # stored results
        (None, {"without_seed": "a"}, ""),
        ({"without_seed": "a"}, {"without_seed": "a"}, ""),
        ({}, {"without_seed": "a"}, ""),  # a stamp that is older than what is compared
        ({"without_seed": "a"}, None, "has not finished, so it is left out"),
        (
            {"without_seed": "a"},
            {"without_seed": "b"},
            "was made by other code, data or libraries, so it is left out: re-run it",
        ),
    ],
)
def test_a_seed_that_is_out_of_date_beside_a_run_is_left_out_and_said(tmp_path, ours, theirs, said):
    for name, stamp in (("seed-0", ours), ("seed-1", theirs)):
        runs.Run("04_ablation", tmp_path / name / "04_ablation", {}).finish(rates=RATES)
        if stamp is not None:
            (tmp_path / name / "04_ablation" / "stamp.json").write_text(json.dumps(stamp))
    table, problems = verdicts.stored_verdicts(tmp_path / "seed-0", [claim()])
    assert problems == ([f"seed-1/04_ablation {said}"] if said else [])
    assert len(table["ours_seeds"].item()) == (1 if said else 2)


@pytest.mark.parametrize("profile", ["brief", "laptop", "reference"])
def test_profiles_of_the_main_model_measure_the_shares_that_claims_speak_of(profile):
    lists = {"04_ablation": "curve_fractions", "06_freezing": "sweep_fractions"}
    stages = {stage.name: stage.parameters for stage in run.plan(profile, [], checked=False)}
    asked = {
        (one.stage, one.where["fraction"])
        for claim in claims.load_claims()
        for one in claim.selectors.values()
        if isinstance(one, claims.Selector) and one.stage in lists and "fraction" in one.where
    }
    assert len(asked) >= 3
    for stage, fraction in asked:
        assert fraction in stages[stage][lists[stage]], (stage, fraction)
