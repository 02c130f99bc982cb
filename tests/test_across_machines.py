"""Verdicts of one seed on another machine, beside those that are stored."""

import json
import shutil

import pytest

from ssah_utils import unit_files, units
from ssah_utils.files import REFERENCE, sha256_of_file
from ssah_utils.per_unit import PerUnit
from ssah_utils.pipeline import across_machines, publish, verdicts
from ssah_utils.pipeline.across_models import MAIN, StoredResults
from ssah_utils.pipeline.claims import load_claims
from ssah_utils.pipeline.stored import load_result

STAGES = ("03_units", "04_ablation")
CARRIES = "safety-units-carry-safety"


@pytest.fixture
def stored(tmp_path, monkeypatch):
    """Stored results of two notebooks."""
    for stage in STAGES:
        (tmp_path / stage).mkdir()
        shutil.copy(REFERENCE / stage / "result.json", tmp_path / stage)
    monkeypatch.setattr(across_machines, "REFERENCE", tmp_path)
    return tmp_path


def elsewhere(stored, own: tuple[str, ...] = (), **changed) -> None:
    """The stored verdicts as those of a machine, but for what is ``changed``; the results of the
    notebooks ``own`` are of that very run.
    """
    claims = json.loads((REFERENCE / "claims.json").read_text())
    rows = [{name: row[name] for name in across_machines.FIELDS} for row in claims]
    (one,) = (row for row in rows if row["id"] == CARRIES)
    one |= changed
    read = {f"{stage}/result.json": "0" * 64 for stage in STAGES}
    read |= {one: sha256_of_file(stored / one) for one in read if one.split("/")[0] in own}
    commit = load_result(stored / "04_ablation" / "result.json")["commit"]  # no run's identity
    made_by = {"machines": ["AVX9"], "judges": ["a stranger"], "commits": [commit], "inputs": read}
    (stored / "machines").mkdir()
    (stored / "machines" / "other.json").write_text(json.dumps(made_by | {"claims": rows}))


def test_only_claims_that_both_have_measured_are_compared(stored):
    elsewhere(stored, verdict="not replicated", ours=1.5)
    table = across_machines.on_both(stored, "other").set_index("id")
    assert table.loc[CARRIES, "verdict_there"] == "not replicated"
    assert table.loc[CARRIES, "ours_there"] == 1.5
    assert table.loc[CARRIES, "ours"] != 1.5
    assert "freezing-safety" not in table.index  # 06 is not stored there


def test_a_verdict_that_moves_has_a_row_and_one_that_stays_has_none(stored):
    elsewhere(stored, verdict="partly", ours=1.5, ci_low=1.0, ci_high=2.0)
    text = across_machines.machines_table(StoredResults(stored))
    moved = across_machines.on_both(stored, "other").query("verdict != verdict_there")
    assert len(moved) and text.count("\n|") == 2 + len(moved)
    assert "1.5 [1, 2] | partly |" in text and "AVX9" in text
    assert "was judged by another judge" in text


def test_a_result_of_that_very_run_is_no_comparison(stored):
    elsewhere(stored, own=("04_ablation",), verdict="partly")
    assert CARRIES not in set(across_machines.on_both(stored, "other")["id"])


def run_of(folder, model: str = MAIN, seed: int = 0):
    """A run that went as far as ``STAGES``, with the results that are stored."""
    run = folder / model / f"seed-{seed}"
    for stage in STAGES:
        (run / stage).mkdir(parents=True)
        shutil.copy(REFERENCE / stage / "result.json", run / stage)
    return run


def test_a_run_is_stored_as_far_as_it_went_with_what_it_was_made_by(tmp_path):
    run = run_of(tmp_path)
    found = json.loads(across_machines.keep_verdicts(run, "mine", tmp_path).read_text())
    assert set(found) == {"inputs", "machines", "judges", "commits", "claims", "units"}
    assert found["units"] == {}, "no unit file there"
    assert set(found["claims"][0]) == set(across_machines.FIELDS)
    stages = [load_result(REFERENCE / one) for one in found["inputs"]]
    assert sorted(stage["stage"] for stage in stages) == sorted(STAGES)
    assert found["commits"] == sorted({stage["commit"] for stage in stages})
    assert across_machines.of_machines(tmp_path)["mine"] == found


def test_its_verdicts_are_those_of_the_rules_on_what_it_measured(tmp_path):
    found = json.loads(
        across_machines.keep_verdicts(run_of(tmp_path), "mine", tmp_path).read_text()
    )
    by_id = {row["id"]: row for row in found["claims"]}
    stated = {claim.id: claim for claim in load_claims()}
    tables, _ = verdicts.read_tables(REFERENCE, STAGES)
    for name, row in by_id.items():
        alone = verdicts.decide(stated[name], tables)
        assert (row["verdict"], row["ours"]) == (alone["verdict"], pytest.approx(alone["ours"]))
    assert CARRIES in by_id and "freezing-safety" not in by_id, "06 has not run there"


def test_a_run_without_results_is_refused_in_a_line(tmp_path):
    with pytest.raises(ValueError, match="no result on which a claim rests"):
        across_machines.keep_verdicts(tmp_path / MAIN / "seed-0", "mine", tmp_path)


def test_a_run_of_another_stored_model_is_held_against_its_own_results(tmp_path, monkeypatch):
    monkeypatch.setattr(across_machines, "REFERENCE", tmp_path)
    model = "org--name@0123456789ab"  # as folders are called for org/name and a commit
    place = tmp_path / "models" / model
    for stage in STAGES:
        (place / stage).mkdir(parents=True)
        shutil.copy(REFERENCE / stage / "result.json", place / stage)
    run = run_of(tmp_path, model)
    shutil.copy(REFERENCE / across_machines.UNITS, place / across_machines.UNITS)
    shift(place / across_machines.UNITS, run / across_machines.UNITS)
    kept = across_machines.keep_verdicts(run, "mine", tmp_path)
    assert kept == place / "machines" / "mine.json"
    found = json.loads(kept.read_text())
    kept.write_text(json.dumps(found | {"inputs": {}}))  # results of its own
    shown = f"Safety units agree to {found['units']['agree']:.2f} "
    text = across_machines.machines_table(StoredResults(tmp_path))
    assert f"`mine`, {model} (" in text and shown in text
    shift(place / across_machines.UNITS, place / across_machines.UNITS)  # published anew
    assert shown not in across_machines.machines_table(StoredResults(tmp_path))


def shift(path, to) -> tuple[PerUnit, PerUnit]:
    """Write the safety units of a unit file, each one channel further; both sets."""
    file = unit_files.load_units(path)
    before = file.sets["safety"]
    after = before.map(lambda chosen: chosen.roll(1, dims=1))
    unit_files.save_set(to, after, file.info.model, "their neighbours", "safety")
    return before, after


def test_agreement_of_safety_units_is_that_of_their_sets(tmp_path):
    stored, other = REFERENCE / across_machines.UNITS, tmp_path / "other.safetensors"
    before, after = shift(stored, other)
    found = across_machines.safety_units_agree(stored, other)
    a, b = before.flatten(), after.flatten()
    shared, chance = float((a & b).sum() / (a | b).sum()), units.chance_jaccard(before, after)
    assert found["agree"] == pytest.approx((shared - chance) / (1 - chance), abs=1e-6)
    assert found["with"] == sha256_of_file(stored)
    assert across_machines.safety_units_agree(stored, stored)["agree"] == 1
    assert across_machines.safety_units_agree(stored, tmp_path / "none") == {}


def test_the_very_run_that_is_stored_says_nothing_of_agreement(tmp_path):
    run, place = run_of(tmp_path / "runs"), tmp_path / "stored"
    for folder in (run, place):
        (folder / "03_units").mkdir(parents=True, exist_ok=True)
        shutil.copy(REFERENCE / across_machines.UNITS, folder / across_machines.UNITS)
    found = json.loads(across_machines.keep_verdicts(run, "mine", place).read_text())
    assert found["units"] == {}
    shift(place / across_machines.UNITS, run / across_machines.UNITS)
    found = json.loads(across_machines.keep_verdicts(run, "mine", place).read_text())
    assert found["units"]["agree"] < 1


def test_every_stored_run_has_a_row_that_says_where_it_was_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(across_machines, "REFERENCE", tmp_path)
    stored, first, second = (tmp_path / name for name in ("", "seed-1", "seed-2"))
    for folder in (stored, first, second):
        for stage in STAGES:
            (folder / stage).mkdir(parents=True)
            shutil.copy(REFERENCE / stage / "result.json", folder / stage)
    shutil.copy(REFERENCE / across_machines.UNITS, stored / across_machines.UNITS)
    for folder in (first, second):
        run = tmp_path / "runs" / folder.name
        (run / "03_units").mkdir(parents=True)
        shift(stored / across_machines.UNITS, run / across_machines.UNITS)
        across_machines.keep_agreement(run, folder)
    path = first / "04_ablation" / "result.json"
    result = json.loads(path.read_text())
    path.write_text(json.dumps(result | {"machine": {"cpu": "AVX9", "dtype": "float32"}}))
    agree = json.loads((first / "03_units" / across_machines.AGREEMENT).read_text())["agree"]
    place = load_result(stored / "03_units" / "result.json")["machine"]
    where = f"| {place['cpu']} | {place['dtype']} | {place['threads']} |"
    rows = across_machines.runs_table(StoredResults(tmp_path)).splitlines()[2:]
    assert rows == [
        f"| {MAIN} | 0 | 03, 04 {where}  |",
        f"| {MAIN} | 1 | 03 {where} {agree:.2f} |",
        f"| {MAIN} | 1 | 04 | AVX9 | float32 |  |  |",
        f"| {MAIN} | 2 | 03, 04 {where} {agree:.2f} |",
    ]
    shift(stored / across_machines.UNITS, stored / across_machines.UNITS)  # published anew
    rows = across_machines.runs_table(StoredResults(tmp_path)).splitlines()[2:]
    assert rows[:2] == [f"| {MAIN} | 0, 2 | 03, 04 {where}  |", f"| {MAIN} | 1 | 03 {where}  |"]


@pytest.mark.parametrize(("model", "seed"), [(MAIN, 1), ("qwen2.5-coder-0.5b-instruct", 0)])
def test_a_run_of_another_model_or_seed_is_not_held_against_the_stored_one(tmp_path, model, seed):
    run = run_of(tmp_path, model, seed)
    with pytest.raises(ValueError, match=f"is of {model}, seed {seed}: stored is seed 0 of {MAIN}"):
        across_machines.keep_verdicts(run, "mine", tmp_path)


def test_it_is_said_who_measured_and_judged(tmp_path):
    run = run_of(tmp_path)
    for path in run.glob("*/result.json"):
        result = json.loads(path.read_text())
        result |= {"machine": {"cpu": "AVX9", "dtype": "float32"}, "judge": "a judge"}
        path.write_text(json.dumps(result))
    first = run / "03_units" / "result.json"
    result = json.loads(first.read_text())
    del result["machine"], result["judge"]  # as of old ones
    first.write_text(json.dumps(result))
    found = json.loads(across_machines.keep_verdicts(run, "mine", tmp_path).read_text())
    assert found["machines"] == ["AVX9 float32", across_machines.UNTOLD]
    assert found["judges"] == ["a judge", "rules"]


def test_a_machine_needs_one_run():
    with pytest.raises(ValueError, match="one seed and model"):
        publish.publish("", machine="mine")
    with pytest.raises(ValueError, match="one seed and model"):
        publish.publish("laptop", seeds=(0, 1), machine="mine")


def test_a_machine_is_stored_without_drawing_figures(tmp_path, monkeypatch):
    """They show none, and are drawn by forks, which hang once torch has computed with threads."""
    run = run_of(tmp_path / "runs")
    monkeypatch.setattr(publish, "sources", lambda *asked: [run])
    monkeypatch.setattr(publish, "redraw", None)
    monkeypatch.setattr(publish, "refill_documents", lambda: ["filled"])
    keep = across_machines.keep_verdicts
    kept = []
    monkeypatch.setattr(
        across_machines, "keep_verdicts", lambda *asked: kept.append(keep(*asked, tmp_path))
    )
    assert publish.publish("laptop", machine="mine") == ["filled"]
    assert kept == [tmp_path / "machines" / "mine.json"]
