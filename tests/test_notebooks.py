"""Every notebook under profile smoke, executed by nbval in reading order, and what is committed of
them.
"""

import os
import re
import subprocess
import sys

import nbformat
import pytest
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

from ssah_utils.display import REDACTED_LENGTH
from ssah_utils.files import REFERENCE, ROOT
from ssah_utils.pipeline import redraw, run
from ssah_utils.pipeline.publish import code_hash
from ssah_utils.pipeline.stored import load_result

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.slow
def test_notebooks_run_in_order_under_profile_smoke(tmp_path):
    """nbval cannot inject parameters, so it is given copies that carry the profile's."""
    for stage in run.plan("smoke", []):
        notebook = parameterize_notebook(load_notebook_node(str(stage.notebook)), stage.parameters)
        # lax mode compares no output, but stale ones would be shown on failure
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.outputs, cell.execution_count = [], None
        nbformat.write(notebook, tmp_path / f"{stage.name}.ipynb")
    outcome = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            "--nbval-lax",
            "--nbval-current-env",
            "--nbval-cell-timeout=600",
            "-p",
            "no:cacheprovider",
            *(str(tmp_path / f"{stage.name}.ipynb") for stage in run.plan("smoke", [])),
        ],
        cwd=tmp_path,
        env=os.environ | {"SSAH_RUNS": str(tmp_path / "runs")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert outcome.returncode == 0, outcome.stdout[-4000:]
    for stage in run.plan("smoke", []):
        folder = tmp_path / "runs" / "smoke" / stage.parameters["model"] / "seed-0" / stage.name
        assert all((folder / name).exists() for name in stage.outputs), stage.name


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_outputs_belong_to_the_committed_source(path):
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    if not any(cell.outputs for cell in code):
        pytest.skip(
            f"{path.stem} has not been run yet since its code changed: it is committed without"
            " outputs"
        )
    assert notebook.metadata["ssah"]["outputs_of"] == code_hash(notebook), (
        "execute and publish the notebook again"
    )
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not any(output.output_type == "error" for cell in code for output in cell.outputs)


def test_stored_completions_are_redacted():
    for path in REFERENCE.rglob("01_alignment/result.json"):
        requests = load_result(path)["tables"]["requests"]
        words = requests["response"].str.removesuffix(" [...]").str.split().str.len()
        assert words.max() <= 4 and requests["response"].str.len().max() <= REDACTED_LENGTH + len(
            " [...]"
        ), path


def test_reference_results_are_complete():
    stored = {path.parent.name for path in REFERENCE.glob("*/result.json")}
    assert stored | redraw.ONLY_NAMED == {path.stem for path in NOTEBOOKS}


def test_figures_that_may_be_missing_are_of_what_runs_only_by_name():
    by_name = {stage["name"] for stage in run.read_pipeline()["stages"] if "only_named" in stage}
    assert by_name == redraw.ONLY_NAMED


def test_minutes_that_notebooks_promise_are_those_of_the_pipeline():
    found = 0
    for stage in run.read_pipeline()["stages"]:
        notebook = nbformat.read(ROOT / "notebooks" / f"{stage['name']}.ipynb", as_version=4)
        text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
        for minutes in re.findall(r"Takes about (\d+) minutes? on 2 cores \(laptop", text):
            assert int(minutes) == round(stage["minutes"]["laptop"]), stage["name"]
            found += 1
    assert found >= 10
