"""What is committed of a run: outputs that belong to their code, tables that come from stored
results.
"""

import copy
import json
import os
import shutil

import nbformat
import pandas as pd
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from ssah_utils import embedded
from ssah_utils.files import NOTEBOOKS, REFERENCE, sha256_of_file
from ssah_utils.pipeline import across_models, cli, publish, runs
from ssah_utils.pipeline.across_machines import AGREEMENT, UNITS
from ssah_utils.pipeline.runs import declared_parameters
from ssah_utils.pipeline.stored import find_run


@pytest.fixture
def source() -> nbformat.NotebookNode:
    return new_notebook(
        cells=[new_code_cell("x = 1"), new_markdown_cell("why"), new_code_cell("x")]
    )


@pytest.fixture
def executed(source) -> nbformat.NotebookNode:
    """As papermill leaves it: an injected cell, its own counting, stderr among the outputs."""
    done = copy.deepcopy(source)
    done.cells.insert(1, new_code_cell("x = 2", execution_count=2))
    done.cells[0].execution_count, done.cells[-1].execution_count = 1, 3
    done.cells[-1].outputs = [
        new_output("stream", name="stderr", text="a warning about this machine"),
        new_output("execute_result", {"text/plain": "2"}, execution_count=3),
    ]
    return done


def test_outputs_move_to_the_source_and_are_counted_in_order(source, executed):
    published = publish.with_outputs(source, executed)
    code = [cell for cell in published.cells if cell.cell_type == "code"]
    assert [cell.source for cell in code] == ["x = 1", "x"]
    assert [cell.execution_count for cell in code] == [1, 2]
    assert [output.output_type for output in code[1].outputs] == ["execute_result"]
    assert code[1].outputs[0].execution_count == 2
    assert published.metadata["ssah"]["outputs_of"] == publish.code_hash(published)
    nbformat.validate(published)


def test_outputs_of_other_code_are_refused(source, executed):
    source.cells[-1].source = "x + 1"
    with pytest.raises(ValueError, match="cell 2 has changed since the run"):
        publish.with_outputs(source, executed)


def test_code_hash_follows_code_and_not_prose(source):
    before = publish.code_hash(source)
    source.cells[1].source = "because"
    assert publish.code_hash(source) == before
    source.cells[0].source = "x = 3"
    assert publish.code_hash(source) != before


def test_a_document_without_a_place_for_a_table_is_an_error(monkeypatch):
    monkeypatch.setattr(publish, "DOCUMENTS", {"a.md": {"cost": lambda results: "| a |"}})
    assert publish.filled("a.md", "a <!-- cost -->old<!-- end cost --> b", {}) == (
        "a <!-- cost -->\n| a |\n<!-- end cost --> b",
        [],
    )
    with pytest.raises(ValueError, match=r"a\.md has no place for 'cost'"):
        publish.filled("a.md", "a <!-- cost --> b", {})


def test_no_document_is_written_when_one_lacks_a_place(tmp_path, monkeypatch):
    parts = {"cost": lambda results: "| a |"}
    monkeypatch.setattr(publish, "ROOT", tmp_path)
    monkeypatch.setattr(publish, "DOCUMENTS", {"a.md": parts, "b.md": parts})
    (tmp_path / "a.md").write_text("<!-- cost -->old<!-- end cost -->")
    (tmp_path / "b.md").write_text("nothing")
    with pytest.raises(ValueError, match=r"b\.md has no place"):
        publish.fill_documents({})
    assert (tmp_path / "a.md").read_text() == "<!-- cost -->old<!-- end cost -->"


# -------------------------------------------------------------------------------------------- seeds


@pytest.fixture
def finished_runs(tmp_path, monkeypatch):
    """Two seeds that ran, one stage each finished and one not, and an empty folder of stored
    results.
    """
    monkeypatch.setenv("SSAH_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(publish, "REFERENCE", tmp_path / "stored")
    for seed in (0, 1):
        folder = tmp_path / "runs" / "reference" / across_models.MAIN / f"seed-{seed}"
        for stage in ("03_units", "04_ablation"):
            runs.Run(stage, folder / stage, {"seed": seed}).finish()
        shutil.copy(REFERENCE / UNITS, folder / UNITS)
        (folder / "03_units" / "stamp.json").write_text("{}")
        os.utime(folder / "03_units" / "stamp.json", (1000, 1000 + seed))
    return tmp_path


def test_run_is_found_by_profile_and_seed(finished_runs):
    assert [find_run("reference", seed).name for seed in (0, 1)] == ["seed-0", "seed-1"]
    with pytest.raises(FileNotFoundError, match="--profile reference --set seed=7"):
        find_run("reference", 7)


def test_another_seed_is_stored_beside_the_first(finished_runs, capsys):
    # of an earlier run with this seed
    (finished_runs / "stored" / "seed-1" / "02_probing").mkdir(parents=True)
    assert cli.main(["publish", "--profile", "reference", "--seeds", "1"]) == 0
    stored = [
        path.relative_to(finished_runs / "stored").as_posix()
        for path in (finished_runs / "stored").rglob("*")
        if path.is_file()
    ]
    assert stored == ["seed-1/03_units/result.json"], "small results only, of finished stages only"
    assert "publish seed 0" in capsys.readouterr().out


def test_another_model_is_stored_beside_the_main_one_and_leaves_the_notebooks(project, capsys):
    other = project / "runs" / "reference" / "org--other"
    shutil.copytree(find_run("reference", 0).parent, other)
    for seed in (0, 1):
        os.utime(other / f"seed-{seed}" / "03_units" / "stamp.json", (2000, 2000 + seed))
    notebook = (project / "notebooks" / "03_units.ipynb").read_bytes()
    cli.main(["publish", "--profile", "reference", "--seeds", "0:2"])
    said = capsys.readouterr().out
    assert all(f"org--other, seed-{seed}: stored 03_units" in said for seed in (0, 1))
    place = project / "stored" / "models" / "org--other"
    assert (place / UNITS).read_bytes() == (REFERENCE / UNITS).read_bytes()
    assert (place / "seed-1" / "03_units" / "result.json").exists()
    assert not (project / "stored" / "03_units").exists()
    assert (project / "notebooks" / "03_units.ipynb").read_bytes() == notebook


def test_one_command_stores_all_of_a_sweep_each_where_it_belongs(project, monkeypatch, capsys):
    """Two models with two seeds each; the notebooks show the main model's."""
    main = find_run("reference", 0).parent
    shutil.copytree(main, main.parent / embedded.VENDOR_ALIGNED)
    names = f"{embedded.VENDOR_ALIGNED},{across_models.MAIN}"
    seen = []
    monkeypatch.setattr(publish, "publish_claims", lambda folder: seen.append(stored()) or [])

    def stored() -> list[str]:
        files = (project / "stored").rglob("result.json")
        return sorted(path.relative_to(project / "stored").as_posix() for path in files)

    cli.main(["publish", "--profile", "reference", "--seeds", "0:2", "--models", names])
    (there,) = seen
    assert there == [
        "03_units/result.json",
        f"models/{embedded.VENDOR_ALIGNED}/03_units/result.json",
        f"models/{embedded.VENDOR_ALIGNED}/seed-1/03_units/result.json",
        "seed-1/03_units/result.json",
    ], "what follows from the results is written once, when all of them are there"
    held = json.loads((project / "stored" / "seed-1" / "03_units" / AGREEMENT).read_text())
    assert held == {"agree": 1.0, "with": sha256_of_file(project / "stored" / UNITS)}
    shown = nbformat.read(project / "notebooks" / "03_units.ipynb", 4)
    assert shown.metadata["ssah"]["outputs_of"]


def test_nothing_is_stored_where_one_of_several_runs_was_changed(project, capsys):
    made = {"outputs": {"result.json": "another hash"}}
    stamp = find_run("reference", 1) / "03_units" / "stamp.json"
    stamp.write_text(json.dumps({"made": made}))
    assert cli.main(["publish", "--profile", "reference", "--seeds", "0:2"]) == 1
    assert "result.json of 03_units was changed since it was made" in capsys.readouterr().err
    assert not (project / "stored").exists()


@pytest.mark.parametrize("words", [[], ["--machine", "elsewhere"]])
def test_a_run_that_is_mixed_of_two_is_not_stored(project, monkeypatch, capsys, words):
    """As after 03 was run alone with other parameters: what stands beside it is of the first."""
    monkeypatch.setattr(publish.across_machines, "keep_verdicts", None)  # it would write into data/
    run = find_run("reference", 0)
    read = {UNITS.as_posix(): "the hash of another one", "02_probing/result.json": "not there"}
    runs.Run("04_ablation", run / "04_ablation", {}, inputs=read).finish()
    (run / "04_ablation" / "stamp.json").write_text("{}")
    assert cli.main(["publish", "--profile", "reference", *words]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    said = f"04_ablation was made from another {UNITS} than is there: run 04_ablation again"
    assert line == f"error: {said} before publishing"
    assert not (project / "stored").exists()


@pytest.mark.parametrize(
    "words",
    [
        ["--seeds", "1"],
        ["--models", across_models.MAIN],
        ["--profile", "reference", "--seeds", "7"],
        ["--profile", "reference", "--seeds", "0:3"],
        ["--profile", "reference", "--seeds", "0:0"],
        ["--profile", "reference", "--models", f"{across_models.MAIN},tiny-random-llama"],
        ["--profile", "nowhere"],
    ],
)
def test_what_cannot_be_published_is_said_in_one_line(finished_runs, capsys, words):
    assert cli.main(["publish", *words]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and not (finished_runs / "stored").exists()


def test_a_model_of_random_weights_is_not_published(finished_runs, capsys):
    """Else claims would count as measured on one model more."""
    profile = finished_runs / "runs" / "smoke"
    shutil.copytree(find_run("reference", 0).parent, profile / embedded.TINY_RANDOM)
    for words in (["--profile", "smoke"], ["--profile", "smoke", "--seeds", "1"]):
        assert cli.main(["publish", *words]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert "'tiny-random-llama' has random weights" in line
    assert not (finished_runs / "stored").exists()


def test_claims_of_other_results_are_reported(finished_runs, monkeypatch):
    """The stored table of 08_claims must follow from what is stored beside it."""
    stored = finished_runs / "stored"
    rows = pd.DataFrame([{"id": "one", "n_seeds": 1.0, "verdict": "replicated"}])
    monkeypatch.setattr(publish.claims, "load_claims", list)
    monkeypatch.setattr(publish.verdicts, "stored_verdicts", lambda folder, stated: (rows, []))
    monkeypatch.setattr(across_models, "verdicts_by_model", lambda folder, stated: rows)
    runs.Run("08_claims", stored / "08_claims", {}).finish(claims=rows)
    assert publish.publish_claims(stored) == []
    runs.Run("08_claims", stored / "08_claims", {}).finish(claims=rows.assign(verdict="partly"))
    (problem,) = publish.publish_claims(stored)
    assert "re-run 08_claims" in problem


# ------------------------------------------------------------------------------------- all of a run


@pytest.fixture
def project(finished_runs, monkeypatch, source, executed):
    """A project of one notebook, 03_units, that ran with seed 0, and a README with one table."""
    parts = {"cost": lambda found: f"| {found['03_units']['parameters']['seed']} |"}
    monkeypatch.setattr(publish, "ROOT", finished_runs)
    monkeypatch.setattr(publish, "NOTEBOOKS", finished_runs / "notebooks")
    monkeypatch.setattr(publish, "DOCUMENTS", {"README.md": parts})
    monkeypatch.setattr(publish.claims, "load_claims", list)
    monkeypatch.setattr(
        publish, "redraw", lambda folder, target: ["05_transfer: re-run 05_transfer"]
    )
    (finished_runs / "README.md").write_text("<!-- cost -->\nold\n<!-- end cost -->\n")
    (finished_runs / "notebooks").mkdir()
    nbformat.write(source, finished_runs / "notebooks" / "03_units.ipynb")
    nbformat.write(
        executed,
        find_run("reference") / "03_units" / "03_units.ipynb",
    )
    return finished_runs


def test_publishing_stores_results_notebook_claims_and_tables_and_says_what_is_amiss(
    project, capsys
):
    assert cli.main(["publish", "--profile", "reference"]) == 1
    said = capsys.readouterr().err
    assert "05_transfer: re-run 05_transfer" in said and "re-run 08_claims" in said, (
        "and yet all else is written"
    )
    assert (project / "stored" / UNITS).read_bytes() == (REFERENCE / UNITS).read_bytes()
    assert nbformat.read(project / "notebooks" / "03_units.ipynb", 4).metadata["ssah"]["outputs_of"]
    assert (project / "stored" / "claims.json").exists()
    assert (project / "README.md").read_text() == "<!-- cost -->\n| 0 |\n<!-- end cost -->\n"


def test_a_notebook_is_committed_with_what_it_shows_of_its_own_model(project, monkeypatch):
    other = project / "runs" / "reference" / "org--other"
    shutil.copytree(find_run("reference", 0).parent, other)
    before = (project / "notebooks" / "03_units.ipynb").read_bytes()
    for model, stays in (("org--another", True), ("org--other", False)):
        monkeypatch.setattr(across_models, "SHOWN_WITH", {"03_units": model})
        publish.publish("reference", models=["org--other"])
        assert (before == (project / "notebooks" / "03_units.ipynb").read_bytes()) == stays
    assert (project / "stored" / "models" / "org--other" / "03_units" / "result.json").exists()


def test_notebooks_are_committed_with_the_model_that_they_name():
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        named = declared_parameters(path)["model"]
        assert across_models.SHOWN_WITH.get(path.stem, across_models.MAIN) == named, path.stem


def test_nothing_is_stored_when_one_notebook_has_changed_since_the_run(project, source, capsys):
    source.cells[0].source = "x = 3"
    nbformat.write(source, project / "notebooks" / "03_units.ipynb")
    assert cli.main(["publish", "--profile", "reference"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert (
        line.startswith("error: 03_units: cell 1 has changed since the run")
        and not (project / "stored").exists()
    )


def test_a_table_that_cannot_be_made_stays_as_it_was(project, capsys):
    cli.main(["publish", "--profile", "reference"])
    written = (project / "README.md").read_text()
    (project / "stored" / "03_units" / "result.json").write_text('{"format": "ssah-res')
    capsys.readouterr()
    assert cli.main(["publish"]) == 1
    said = capsys.readouterr().err
    assert (
        "03_units" in said
        and "'cost' in README.md stays as it was" in said
        and (project / "README.md").read_text() == written
    )
