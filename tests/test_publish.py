"""What is committed of a run: outputs that belong to their code, tables that come from stored results."""

import copy

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from ssah_utils import publish


@pytest.fixture
def source() -> nbformat.NotebookNode:
    return new_notebook(cells=[new_code_cell("x = 1"), new_markdown_cell("why"), new_code_cell("x")])


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


def test_readme_without_a_place_for_a_table_is_an_error(monkeypatch):
    monkeypatch.setattr(publish, "TABLES", {"cost": lambda results: "| a |"})
    assert publish.fill_readme("a <!-- cost -->old<!-- end cost --> b", {}) == "a <!-- cost -->\n| a |\n<!-- end cost --> b"
    with pytest.raises(ValueError, match="no place for the table 'cost'"):
        publish.fill_readme("a <!-- cost --> b", {})
