"""Claims: what the file may say, which row a selector finds, which verdict follows from made-up
numbers.
"""

import json
import math

import pandas as pd
import pytest
import yaml

from ssah_utils.files import REFERENCE, ROOT
from ssah_utils.pipeline import claims, runs, verdicts

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
    assert verdicts.select(claim().ours, TABLES) == pytest.approx((0.7, 0.6, 0.8))
    assert verdicts.select(claim().control, TABLES) == pytest.approx((0.2, 0.0, 0.5)), (
        "mean, and the envelope of the intervals"
    )
    spread = claim(control=number("random", aggregate="mean", low="", high="", scale=100)).control
    assert verdicts.select(spread, TABLES) == pytest.approx((20, 10, 30)), (
        "without intervals: the range of the values"
    )
    value, low, high = verdicts.select(
        claim(ours=number(aggregate="mean", low="", high=""), replicated="ours > 1").ours, TABLES
    )
    assert value == 0.7 and math.isnan(low) and math.isnan(high), "one value has no range"


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
        ("low > control_high", "ours > 1", "replicated"),
        ("low > control_high and ours > 1", "ours > 0.65", "partly"),
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


@pytest.mark.parametrize(
    ("only_if", "verdict"), [("control <= 0.2", "replicated"), ("control < 0.1", "not measured")]
)
def test_a_claim_is_not_measured_where_its_positive_control_fails(only_if, verdict):
    row = verdicts.decide(claim(only_if=only_if), TABLES)
    assert row["verdict"] == verdict
    fails = "its positive control fails: control < 0.1 (control is 0.2)"
    assert row["note"] == (fails if verdict == "not measured" else "")
    assert math.isnan(row["ours"]) == (verdict == "not measured")


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
        assert verdicts.select(chosen, TABLES) == pytest.approx(expected)
    bare = claim(
        ours=number("random", aggregate="min", last="", low="", high=""), replicated="ours > 1"
    ).ours
    value, low, high = verdicts.select(bare, TABLES)
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


def test_runs_are_averaged_within_the_envelope_of_their_intervals():
    row = verdicts.verdict_table([claim(n_seeds=2)], [TABLES, shifted(0.1)]).iloc[0]
    assert (row["ours"], row["ci_low"], row["n_seeds"]) == (
        pytest.approx(0.65),
        pytest.approx(0.5),
        4,
    )
    assert row["ci_high"] == verdicts.decide(claim(), TABLES)["ci_high"] and row[
        "ours_seeds"
    ] == pytest.approx([0.7, 0.6])
    lacking = verdicts.verdict_table([claim(n_seeds=2)], [{}, TABLES]).iloc[0]
    assert (lacking["verdict"], lacking["n_seeds"]) == ("replicated", 2), (
        "a seed that measured nothing says nothing"
    )
    assert lacking["note"] == "measured in 1 of 2 runs"


@pytest.mark.parametrize(
    ("shifts", "verdict"),
    [
        ([0, 0, 0], "replicated"),
        ([0, 0, 0.9], "partly"),
        ([0.9, 0, 0], "partly"),
        ([0.9, 0, 0.9], "not replicated"),
        ([0, 0.9], "partly"),
        ([0, 0.3], "partly"),
        ([0.3, 0.9, 0.9], "not replicated"),
    ],
)
def test_replicated_has_to_hold_in_every_run_and_its_contrary_in_most(shifts, verdict):
    one = claim(replicated="ours > 0.65", partly="ours > 0.3", control=None)
    row = verdicts.verdict_table([one], [shifted(by) for by in shifts]).iloc[0]
    assert row["verdict"] == verdict
    assert (row["note"] == "") == (len(set(shifts)) == 1) and row["note"].count(",") == (
        len(shifts) - 1
    ) * (row["note"] != "")


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


def test_a_damaged_result_of_another_seed_is_reported_and_an_absent_one_is_not(tmp_path):
    runs.Run("04_ablation", tmp_path / "04_ablation", {}).finish(rates=RATES)
    (tmp_path / "seed-2").mkdir()
    damaged = tmp_path / "seed-1" / "04_ablation" / "result.json"
    damaged.parent.mkdir(parents=True)
    damaged.write_text('{"format": "ssah-res')
    table, (problem,) = verdicts.stored_verdicts(tmp_path, [claim()])
    assert problem.startswith("seed-1/04_ablation: ") and "re-run 04_ablation" in problem
    assert (
        table["verdict"].item() == "replicated"
        and table["note"].item() == "measured in 1 of 3 runs"
    )


# -------------------------------------------------------------------------------- what is committed


def test_claims_cover_every_table_experiment_and_the_open_questions():
    stated = claims.load_claims()
    sources = " ".join(one.source for one in stated)
    assert len(stated) >= 14 and len({one.experiment for one in stated}) == 5
    for place in (
        "figures 2-4",
        "figure 5",
        *(f"table {n}" for n in range(1, 6)),
        *(f"open question {n}" for n in (2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 13)),
    ):
        assert place in sources, place


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
        assert (cells[0], cells[-1]) == (row["claim"], row["verdict"])
        shown, exact = cells[2].partition(" ")[0], row["ours"]
        assert (
            (shown == "")
            if exact is None
            else float(shown) == pytest.approx(exact, rel=0.051, abs=1e-6)
        )


def test_a_claim_about_a_share_is_not_measured_by_a_run_with_another():
    (claim,) = [claim for claim in claims.load_claims() if claim.id == "safety-units-carry-safety"]
    tables, _ = verdicts.read_tables(REFERENCE, verdicts.stages_of([claim]))
    assert verdicts.decide(claim, tables)["verdict"] == "replicated"
    tables["03_units"].parameters["safety_fraction"] = 0.004
    row = verdicts.decide(claim, tables)
    assert row["verdict"] == "not measured"
    assert row["note"] == "03_units was run with safety_fraction 0.004, the claim speaks of 0.013"


def test_a_seed_run_with_other_parameters_is_left_out_and_said(tmp_path):
    (claim,) = [claim for claim in claims.load_claims() if claim.id == "safety-units-carry-safety"]
    for name in ("seed-0", "seed-1"):
        for stage in verdicts.stages_of([claim]):
            result = json.loads((REFERENCE / stage / "result.json").read_text())
            if (name, stage) == ("seed-1", "04_ablation"):
                result["parameters"]["ablation_mode"] = "mean"
            (tmp_path / name / stage).mkdir(parents=True)
            (tmp_path / name / stage / "result.json").write_text(json.dumps(result))
    table, problems = verdicts.stored_verdicts(tmp_path / "seed-0", [claim])
    assert table["n_seeds"].tolist() == [1] and len(table["ours_seeds"][0]) == 1
    assert problems == ["seed-1/04_ablation was run with another ablation_mode, so it is left out"]
