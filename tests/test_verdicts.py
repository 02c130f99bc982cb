"""Verdicts at the end of a notebook: those of its own claims, by the rules of the claims file."""

import copy
import shutil

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output

from ssah_utils.files import REFERENCE, ROOT
from ssah_utils.pipeline import claims, publish, verdicts


@pytest.fixture
def run_folder(tmp_path):
    """The committed results of seed 0, as a run of their own."""
    for path in REFERENCE.glob("*/result.json"):
        target = tmp_path / "seed-0" / path.parent.name
        target.mkdir(parents=True)
        shutil.copy(path, target)
    return tmp_path / "seed-0"


def test_a_notebook_ends_with_the_verdicts_of_its_claims_and_no_others(run_folder):
    shown = verdicts.of_stage(run_folder, "04_ablation").data
    mine = [claim for claim in claims.load_claims() if claim.stage == "04_ablation"]
    assert mine and shown["claim"].tolist() == [claim.claim for claim in mine]
    tables, _ = verdicts.read_tables(run_folder, verdicts.stages_of(mine))
    assert shown["verdict"].tolist() == [verdicts.decide(one, tables)["verdict"] for one in mine]


def test_a_claim_that_needs_another_notebook_says_which(run_folder):
    shutil.rmtree(run_folder / "04_ablation")
    shown = verdicts.of_stage(run_folder, "04_ablation").data
    assert set(shown["verdict"]) == {"not measured"}
    assert shown["note"].str.contains("re-run 04_ablation").all()


def test_a_notebook_without_claims_says_so(run_folder):
    shown = verdicts.of_stage(run_folder, "01_alignment")
    assert shown.data.empty and "No claim rests on this notebook" in shown.to_html()


def test_every_claim_is_shown_by_one_notebook(run_folder):
    stages = {claim.stage for claim in claims.load_claims()}
    shown = [len(verdicts.of_stage(run_folder, stage).data) for stage in stages]
    assert sum(shown) == len(claims.load_claims())


def test_publishing_renews_the_verdicts_and_nothing_else(run_folder, tmp_path, monkeypatch):
    first, last = new_code_cell("x = 1"), new_code_cell("verdicts.of_stage(...)")
    last.metadata["tags"] = ["verdicts"]
    for cell in (first, last):
        cell.outputs = [new_output("stream", text="printed"), new_output("display_data")]
    bare = new_notebook(cells=[copy.deepcopy(last)])  # never published
    bare.cells[0].outputs = []
    for name, notebook in (
        ("04_ablation", new_notebook(cells=[first, last], metadata={"ssah": {}})),
        ("A1_judge", bare),
    ):
        nbformat.write(notebook, tmp_path / f"{name}.ipynb")
    before = (tmp_path / "A1_judge.ipynb").read_bytes()
    monkeypatch.setattr(publish, "NOTEBOOKS", tmp_path)
    publish.renew_verdicts(run_folder)
    notebook = nbformat.read(tmp_path / "04_ablation.ipynb", as_version=4)
    assert notebook.cells[0] == first
    printed, shown = notebook.cells[1].outputs
    assert printed.text == "printed"
    assert "Switching off 1.3% of the units" in shown.data["text/html"]
    nbformat.validate(notebook)
    assert (tmp_path / "A1_judge.ipynb").read_bytes() == before


@pytest.mark.parametrize("path", sorted(ROOT.glob("notebooks/*.ipynb")), ids=lambda path: path.stem)
def test_committed_notebooks_end_with_the_verdicts_of_what_is_stored(path):
    notebook = nbformat.read(path, as_version=4)
    tagged = [cell for cell in notebook.cells if "verdicts" in cell.metadata.get("tags", [])]
    expected = verdicts.of_stage(REFERENCE, path.stem).to_html() if tagged else ""
    for cell in tagged:
        assert cell.outputs[-1].data["text/html"] == expected, "run ssah publish"


def test_the_same_verdicts_are_the_same_text(run_folder):
    first, again = (verdicts.of_stage(run_folder, "04_ablation").to_html() for _ in range(2))
    assert first == again and "sha256" in first
