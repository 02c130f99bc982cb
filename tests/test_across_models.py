"""The same claims on several models: which results count for which, and on how many they hold."""

import json
import re
from pathlib import Path

import pandas as pd
import pytest

from ssah_utils import embedded, paper
from ssah_utils.figures import models
from ssah_utils.pipeline import across_models, publish, redraw
from ssah_utils.pipeline.claims import load_claims
from ssah_utils.pipeline.runs import Run

CARRIES, SPARES = "safety-units-carry-safety", "safety-units-spare-utility"
BUDGET = next(claim for claim in load_claims() if claim.stage == "07_redundant_units")


def ablation(folder: Path, model: str, effect: float, by_chance: float = 0.0) -> None:
    """A stored result of 04 in which the safety units have an effect on coherent ASR."""
    rows = [("safety", effect), ("random, as safety", by_chance)]
    differences = [
        {
            "condition": condition,
            "set": "harmful",
            "metric": "coherent_asr",
            "difference": value,
            "low": value - 0.1,
            "high": value + 0.1,
        }
        for condition, value in rows
    ]
    run = Run("04_ablation", folder / "04_ablation", {"model": model, "seed": 0})
    run.finish(differences=pd.DataFrame(differences))


@pytest.fixture
def stored(tmp_path) -> Path:
    """Results of three models: one with the effect, one without, one with a weak one."""
    ablation(tmp_path, embedded.DEFAULT, 0.7)
    ablation(tmp_path / "models" / "org--small", "org/small", 0.0)
    ablation(tmp_path / "models" / "qwen", "qwen", 0.15)
    return tmp_path


def verdicts_on(stored: Path, claim: str) -> dict[str, str]:
    table = across_models.verdicts_by_model(stored, load_claims())
    return table[table["id"] == claim].set_index("model")["verdict"].to_dict()


def test_every_model_gets_verdicts_of_its_own_by_the_same_rules(stored):
    assert verdicts_on(stored, CARRIES) == {
        embedded.DEFAULT: "replicated",
        "org--small": "not replicated",
        "qwen": "not replicated",
    }
    assert set(verdicts_on(stored, SPARES).values()) == {"not measured"}
    ablation(stored / "models" / "qwen", "qwen", 0.3)
    assert verdicts_on(stored, CARRIES)["qwen"] == "replicated"
    ablation(stored / "models" / "qwen", "qwen", 0.3, by_chance=0.3)
    assert verdicts_on(stored, CARRIES)["qwen"] == "not replicated"


def test_a_claim_counts_on_the_models_that_measured_it(stored):
    table = across_models.verdicts_by_model(stored, load_claims())
    assert across_models.counted(table).loc[CARRIES].to_dict() == {
        "measured": 3,
        "replicated": 1,
        "partly": 0,
    }
    assert across_models.of_models(table)[CARRIES] == "1/3"
    assert across_models.of_models(table)[SPARES] == "0/0"


def test_seeds_of_a_model_make_one_verdict_of_their_mean(stored):
    folder = stored / "models" / "qwen"
    ablation(folder, "qwen", 0.7)
    ablation(folder / "seed-1", "qwen", 0.7)
    assert verdicts_on(stored, CARRIES)["qwen"] == "replicated"
    ablation(folder / "seed-1", "qwen", 0.0)
    assert verdicts_on(stored, CARRIES)["qwen"] == "not replicated", "seeds differ too much"


@pytest.mark.parametrize(
    ("model", "start_model", "counts"),
    [
        ("qwen", embedded.DEFAULT, False),  # what stood in for it
        ("qwen", "org/qwen-base", True),
        (embedded.DEFAULT, embedded.DEFAULT, True),
        (embedded.DEFAULT, "", True),
        ("qwen", "", True),
    ],
)
def test_what_was_aligned_in_place_of_a_model_says_nothing_of_it(
    tmp_path, model, start_model, counts
):
    folder = tmp_path if model == embedded.DEFAULT else tmp_path / "models" / model
    parameters = {"model": model, "start_model": start_model}
    Run("07_redundant_units", folder / "07_redundant_units", parameters).finish()
    table = across_models.verdicts_by_model(tmp_path, [BUDGET])
    assert (model in set(table["model"])) == counts


def test_tables_stand_side_by_side_and_leave_out_what_one_model_measured(stored):
    results = across_models.StoredResults(stored)
    lines = across_models.claims_across(results).splitlines()
    assert lines[0] == f"| claim | {embedded.DEFAULT} | org--small | qwen | replicated on |"
    (row,) = lines[2:]
    assert row.endswith("| **yes** · 70 [60, 80] | no · 0 [-10, 10] | no · 15 [5, 25] | 1/3 |")


def test_a_result_of_any_model_that_cannot_be_read_is_reported(stored):
    (stored / "models" / "qwen" / "04_ablation" / "result.json").write_text("{", encoding="utf-8")
    (problem,) = across_models.StoredResults(stored).problems
    assert "models/qwen/04_ablation/result.json" in problem and "re-run 04_ablation" in problem


@pytest.mark.parametrize(
    ("table", "stage"),
    [
        ("ablation by model", "04_ablation"),
        ("units by model", "04_ablation"),
        ("freezing by model", "06_freezing"),
        ("adapters by model", "06_freezing"),
        ("defences by model", "A4_defences"),
        ("finders by model", "A3_finders"),
        ("values by model", "A3_finders"),
        ("single units by model", "A3_finders"),
    ],
)
def test_tables_of_the_project_name_every_stored_model(table, stage):
    results = across_models.StoredResults(publish.REFERENCE)
    assert not results.problems
    text = across_models.MODEL_TABLES[table](results)
    measured = [name for name, stages in results.models.items() if stage in stages]
    if stage in ("06_freezing", "A4_defences"):
        measured.remove(across_models.MAIN)  # it has a table of its own
    assert measured and all(f"| {name} |" in text for name in measured)


def test_defences_stand_under_what_full_fine_tuning_leaves():
    results = across_models.StoredResults(publish.REFERENCE)
    tables = results.models[embedded.VENDOR_ALIGNED]["A4_defences"]["tables"]
    rows = across_models.defences_across(results).splitlines()
    first, *others = [row for row in rows if row.startswith(f"| {embedded.VENDOR_ALIGNED} |")]
    rates = tables["rates"].set_index(["task", "method", "set", "metric"])["mean"]
    asked = (tables["gains"]["task"].iloc[0], "nothing", "harmful", "coherent_asr")
    left = rates.loc[[asked]].mean()
    cells = [cell.strip() for cell in first.split("|")]
    assert cells[2] == "full fine-tuning" and cells[7] == f"{100 * left:.0f}"
    assert len(others) == len(tables["cards"])


def test_freezing_on_other_models_has_a_row_for_every_task_and_frozen_set():
    results = across_models.StoredResults(publish.REFERENCE)
    stored = results.models[embedded.VENDOR_ALIGNED]["06_freezing"]["tables"]["equal"]
    lines = across_models.freezing_across(results).splitlines()[2:]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert [row[:3] for row in rows] == [
        [embedded.VENDOR_ALIGNED, *names]
        for names in stored[["task", "title"]].itertuples(index=False)
    ]
    gains = [row[3] for row in rows if row[3] != "-"]
    frozen = stored[stored["condition"] != "nothing"]["gain"]
    assert [gain.split()[0] for gain in gains] == [f"{gain:+.2f}" for gain in frozen]


def test_sets_of_finders_stand_beside_random_ones_of_their_size():
    results = across_models.StoredResults(publish.REFERENCE)
    stored = results.models[across_models.MAIN]["A3_finders"]["tables"]["finders"]
    lines = across_models.finders_across(results).splitlines()[2:]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    mine = {cells[1]: cells[2:] for cells in rows if cells[0] == across_models.MAIN}
    assert list(mine) == stored["finder"].tolist()
    assert len({cells[0] for cells in mine.values()}) == 1, "of one size"
    asr = stored.set_index("finder")["coherent_asr"]
    assert all(cells[2].startswith(f"{100 * asr[name]:.0f} [") for name, cells in mine.items())
    assert mine["random"][-2:] == ["", ""] and all(mine["learned mask"])


def test_the_first_unit_of_every_finder_has_one_row():
    results = across_models.StoredResults(publish.REFERENCE)
    stored = results.models[across_models.MAIN]["A3_finders"]["tables"]["single_units"]
    lines = across_models.single_units_across(results).splitlines()
    mine = [line for line in lines if line.startswith(f"| {across_models.MAIN} |")]
    assert len(mine) == stored["finder"].nunique()


def test_stored_verdicts_by_model_follow_from_stored_results():
    stated = load_claims()
    table = across_models.verdicts_by_model(publish.REFERENCE, stated)
    stored = json.loads((publish.REFERENCE / publish.BY_MODEL).read_text(encoding="utf-8"))
    assert stored == publish.verdicts.to_records(table)
    main = table[table["model"] == across_models.MAIN].set_index("id")["verdict"].to_dict()
    claims = json.loads((publish.REFERENCE / publish.CLAIMS).read_text(encoding="utf-8"))
    assert main == {row["id"]: row["verdict"] for row in claims}


def test_the_central_experiment_is_drawn_for_every_model(tmp_path):
    rows = [
        {
            "model": model,
            "seed": 0,
            "condition": condition,
            "metric": metric,
            "mean": value,
            "low": value / 2,
            "high": (1 + value) / 2,
        }
        for model, effect in (("one", 0.9), ("two", 0.1))
        for condition, value in (
            ("nothing", 0.05),
            ("safety", effect),
            ("random, as safety", 0.0),
            ("random, as safety", 0.1),
        )
        for metric in models.COUNTED
    ]
    figure = models.ablation_by_model(pd.DataFrame(rows))
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["two", "one"]
    drawn = sorted(x for line in figure.axes[0].get_lines() for x in line.get_xdata())
    assert drawn == pytest.approx([0, 0, 5, 5, 10, 10, 10, 90])


def test_across_models_what_is_stored_of_judges_is_drawn(tmp_path):
    ablation(tmp_path, embedded.DEFAULT, 0.7)
    assert redraw.redraw_across_models(tmp_path, tmp_path) == []
    assert not list(tmp_path.glob("*.png")), "a run is no stored result: nothing was counted"
    (tmp_path / "04_ablation" / "judges.json").write_text('[{"condition": "nothing"}]')
    (problem,) = redraw.redraw_across_models(tmp_path, tmp_path)
    assert problem.startswith("figure ablation_by_model fails") and "\n" not in problem


def test_every_claim_on_an_open_question_answers_it():
    asked = paper.table("open_questions").set_index("number")["claims"]
    assert asked.index.tolist() == list(range(1, len(asked) + 1))
    stated = {one.id: one.source for one in load_claims()}
    for one, source in stated.items():
        for number in re.findall(r"open question (\d+)", source):
            assert one in asked[int(number)], one
    assert {one for some in asked for one in some} <= stated.keys()
