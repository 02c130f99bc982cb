"""A run as one page: whole, self-contained, and silent about what a run must not show."""

import json
import re

import nbformat
import pytest

from ssah_utils import files
from ssah_utils.pipeline import cli, report

SOURCE = files.REFERENCE / "04_ablation" / "result.json"
PICTURE = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk"

pytestmark = pytest.mark.usefixtures("drawn_in_our_style")


def executed() -> nbformat.NotebookNode:
    """As a kernel leaves it: code, progress, a sentence, a table and a figure."""
    new = nbformat.v4
    shown = [
        new.new_output("stream", name="stdout", text="answers 3/4\n"),
        new.new_output("display_data", {"text/markdown": "It answers **75%** & more."}),
        new.new_output("execute_result", {"text/html": "<table><tr><td>0.5</td></tr></table>"}),
        new.new_output("display_data", {"image/png": PICTURE}),
    ]
    prose = new.new_markdown_cell("# 04 · Ablation & safety\n\nWhat is **lost**?")
    return new.new_notebook(cells=[prose, new.new_code_cell("secret = 'code'", outputs=shown)])


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("SSAH_RUNS", str(tmp_path))
    folder = tmp_path / "laptop" / "a-model" / "seed-0" / "04_ablation"
    folder.mkdir(parents=True)
    machine = {"cpu": "AVX2", "cores": 2}
    result = json.loads(SOURCE.read_text(encoding="utf-8")) | {"machine": machine, "commit": "abc"}
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")
    nbformat.write(executed(), folder / "04_ablation.ipynb")
    (folder / "stamp.json").write_text("{}")
    unfinished = folder.parent / "06_freezing"
    unfinished.mkdir()
    nbformat.write(executed(), unfinished / "06_freezing.ipynb")
    return folder.parent


def test_a_page_has_claims_prose_sentences_tables_and_figures_and_no_code(run, tmp_path):
    assert report.write_report(run, tmp_path / "page.html") == ["04_ablation"]
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "What is <strong>lost</strong>?" in page and "<td>0.5</td>" in page
    assert "<strong>75%</strong> &amp; more" in page
    assert "secret" not in page and "answers 3/4" not in page
    assert f"data:image/png;base64,{PICTURE}" in page.replace("\n", "")
    assert '<a href="#04_ablation">04 · Ablation &amp; safety</a>' in page
    assert "06_freezing" not in re.sub("<summary>.*?</details>", "", page, flags=re.DOTALL)


def test_its_verdicts_are_those_of_the_rules_on_its_own_results(run, tmp_path):
    report.write_report(run, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    claims, _ = report.stored_verdicts(run, report.load_claims())
    measured = claims[claims["verdict"] != "not measured"]
    assert len(measured) > 3 and set(measured["verdict"]) > {"replicated"}
    body, rest = page.split("<summary>", 1)
    for row in measured.itertuples():
        assert row.claim.replace("'", "&#39;") in body, row.id
    assert rest.startswith(f"{len(claims) - len(measured)} claims that this run has not measured")
    for name, n in measured["verdict"].value_counts().items():
        assert f"{n} {name}</span>" in page
        assert body.count(f'<td class="verdict {name.replace(" ", "-")}">') == n


def test_a_page_asks_no_other_host_and_runs_nothing(run, tmp_path):
    report.write_report(run, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert not re.findall(r'(?:src|href)="(?!data:|#)', page)
    assert "<script" not in page and "@import" not in page and "url(" not in page


def test_the_command_writes_into_the_run_or_where_it_is_told(run, tmp_path, capsys):
    assert cli.main(["report"]) == 0 and (run / "report.html").is_file()
    assert cli.main(["report", "--to", str(tmp_path / "other.html")]) == 0
    assert "1 notebooks of" in capsys.readouterr().out and (tmp_path / "other.html").is_file()


def test_what_cannot_be_reported_is_one_line_and_leaves_no_page(run, tmp_path, capsys):
    assert cli.main(["report", "--seed", "4"]) == 1
    result = json.loads(SOURCE.read_text(encoding="utf-8"))
    (run / "04_ablation" / "result.json").write_text(json.dumps(result)[:1000])
    assert cli.main(["report", "--to", str(tmp_path / "page.html")]) == 1
    (run / "04_ablation" / "stamp.json").unlink()
    with pytest.raises(FileNotFoundError, match="no finished notebook"):
        report.write_report(run, tmp_path / "page.html")
    first, second = capsys.readouterr().err.splitlines()
    assert "seed 4" in first and "re-run 04_ablation" in second
    assert not (tmp_path / "page.html").exists()


def test_a_run_that_is_mixed_of_two_is_not_reported(run, tmp_path):
    content = json.loads((run / "04_ablation" / "result.json").read_text(encoding="utf-8"))
    (units,) = (name for name in content["inputs"] if name.startswith("03_units/"))
    (run / units).parent.mkdir()
    (run / units).write_text("of another run")
    with pytest.raises(ValueError, match=f"04_ablation was made from another {units} than"):
        report.write_report(run, tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_a_run_without_a_claim_has_a_page_still(run, tmp_path):
    content = json.loads((run / "04_ablation" / "result.json").read_text(encoding="utf-8"))
    content["tables"] = {"other": [{"x": 1}]}
    (run / "04_ablation" / "result.json").write_text(json.dumps(content))
    report.write_report(run, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "0 replicated" in page and "data:image/png" in page
