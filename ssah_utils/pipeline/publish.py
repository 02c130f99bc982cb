"""Turn a finished run into what is committed: data/reference, claims, figures, notebook outputs,
and the tables in README.md and docs/.

    ssah publish --profile laptop --seed 1        # another seed, into data/reference/seed-1
    ssah publish --profile laptop                 # seed 0, last: all that is committed
    ssah publish                                  # figures and tables again, from what is stored

Knows stored results and the notebooks' structure. Loads no model, and writes no number that a run
did not produce.
"""

import json
import shutil
from pathlib import Path

import nbformat

from ssah_utils.files import (
    IN_WHEEL,
    NOTEBOOKS,
    REFERENCE,
    ROOT,
    complete_only,
    sha256_of,
    write_json,
)
from ssah_utils.pipeline import claims, verdicts
from ssah_utils.pipeline.redraw import redraw
from ssah_utils.pipeline.result_tables import JUDGE_TABLES, RESULT_TABLES
from ssah_utils.pipeline.runs import find_run, load_result
from ssah_utils.pipeline.stamps import changed_since
from ssah_utils.pipeline.summary import GUIDE_PARTS, README_PARTS

RESULT = "result.json"
STORED = (RESULT, "units.safetensors", "frozen_units.safetensors")
CLAIMS = "claims.json"
DOCUMENTS = {  # what is generated in a document: names of its parts, and what makes them
    "README.md": README_PARTS,
    "docs/guide.md": GUIDE_PARTS,
    "docs/judge.md": JUDGE_TABLES,
    "docs/results.md": RESULT_TABLES,
}


def finished_stages(source: Path) -> list[str]:
    return sorted(folder.name for folder in source.iterdir() if (folder / "stamp.json").exists())


def check_intact(source: Path) -> None:
    """``ValueError`` where a result of a run is not as it was when its stamp was written."""
    for stage in finished_stages(source):
        if changed := changed_since(source / stage):
            raise ValueError(
                f"{changed[0]} of {stage} was changed since it was made: run {stage} again before"
                " publishing"
            )


def copy_results(source: Path, target: Path, names: tuple[str, ...] = STORED) -> list[str]:
    """Copy the small result files of every finished stage; returns the stages."""
    check_intact(source)
    stages = finished_stages(source)
    for stage in stages:
        for name in names:
            if (source / stage / name).exists():
                with complete_only(target / stage / name) as partial:
                    shutil.copyfile(source / stage / name, partial)
    return stages


def code_hash(notebook: nbformat.NotebookNode) -> str:
    """Hash of a notebook's code cells: what its outputs belong to."""
    return sha256_of([cell.source for cell in notebook.cells if cell.cell_type == "code"])[:16]


def with_outputs(
    source: nbformat.NotebookNode, executed: nbformat.NotebookNode
) -> nbformat.NotebookNode:
    """The source notebook with the outputs of its execution, cells counted 1..n; the injected
    parameters stay out.

    Raises ``ValueError`` when the execution was of other code.
    """
    by_id = {cell.id: cell for cell in executed.cells}
    count = 0
    for cell in source.cells:
        if cell.cell_type != "code":
            continue
        count += 1
        done = by_id.get(cell.id)
        if done is None or done.source != cell.source:
            raise ValueError(
                f"cell {count} has changed since the run: execute the notebook again before"
                " publishing"
            )
        # what libraries say on stderr is about the machine it ran on, not about the finding
        cell.outputs = [output for output in done.outputs if output.get("name") != "stderr"]
        cell.execution_count = count
        for output in cell.outputs:
            if output.output_type == "execute_result":
                output.execution_count = count
    source.metadata["ssah"] = {"outputs_of": code_hash(source)}
    return source


def renew_verdicts(notebook: nbformat.NotebookNode, run_folder: Path, stage: str) -> None:
    """Put today's verdicts into the cell tagged ``verdicts``.

    They follow from stored results and data/claims.yaml alone, so a rule that changes asks for no
    notebook to be executed again.
    """
    for cell in notebook.cells:
        if "verdicts" not in cell.metadata.get("tags", []):
            continue
        table = verdicts.of_stage(run_folder, stage)
        data = {"text/html": table.to_html(), "text/plain": table.data.to_string(index=False)}
        shown = nbformat.v4.new_output("execute_result", data)
        shown.execution_count = cell.execution_count
        printed = [output for output in cell.outputs if output.output_type == "stream"]
        cell.outputs = [*printed, shown]


def published_notebooks(source: Path) -> dict[Path, nbformat.NotebookNode]:
    """Every finished stage's notebook with its outputs, by where it belongs; ``ValueError`` names
    the first that cannot be.
    """
    notebooks = {}
    for stage in finished_stages(source):
        path = NOTEBOOKS / f"{stage}.ipynb"
        executed = nbformat.read(source / stage / f"{stage}.ipynb", as_version=4)
        try:
            notebooks[path] = with_outputs(nbformat.read(path, as_version=4), executed)
            renew_verdicts(notebooks[path], source, stage)
        except ValueError as error:
            raise ValueError(f"{stage}: {error}") from error
    return notebooks


# ---------------------------------------------------------------------------------------- documents


def filled(document: str, text: str, results: dict[str, dict]) -> tuple[str, list[str]]:
    """A document's text with what stands between ``<!-- NAME -->`` and ``<!-- end NAME -->`` made
    anew.

    A part whose results lack something stays as it was; the list has one line for each. Raises
    ``ValueError`` for a part that has no place in the text.
    """
    problems = []
    for name, make in DOCUMENTS[document].items():
        opening, closing = f"<!-- {name} -->", f"<!-- end {name} -->"
        before, found, rest = text.partition(opening)
        _, ended, after = rest.partition(closing)
        if not found or not ended:
            raise ValueError(
                f"{document} has no place for '{name}': put {opening} and {closing} where it"
                " belongs"
            )
        try:
            text = f"{before}{opening}\n{make(results)}\n{closing}{after}"
        except (LookupError, TypeError, ValueError) as error:
            problems.append(
                f"'{name}' in {document} stays as it was, stored results lack {error}: re-run the"
                " stage"
            )
    return text, problems


def fill_documents(results: dict[str, dict]) -> list[str]:
    """Write the generated parts of all documents; one line for each that could not be made."""
    texts, problems = {}, []
    for document in DOCUMENTS:  # all of them before anything is written
        text = (ROOT / document).read_text(encoding="utf-8")
        texts[document], unfilled = filled(document, text, results)
        problems += unfilled
    for document, text in texts.items():
        with complete_only(ROOT / document) as partial:
            partial.write_text(text, encoding="utf-8")
    return problems


def reference_results(folder: Path) -> tuple[dict[str, dict], list[str]]:
    """Stored results by stage, and one line for each that could not be read."""
    results, problems = {}, []
    for path in sorted(folder.glob("*/result.json")):
        try:
            results[path.parent.name] = load_result(path)
        except ValueError as error:
            problems.append(str(error))
    return results, problems


def publish_claims(folder: Path) -> list[str]:
    """Write claims.json from the stored results; one line for each reason to doubt it."""
    table, problems = verdicts.stored_verdicts(folder, claims.load_claims())
    write_json(folder / CLAIMS, verdicts.to_records(table))
    seeds = [path.name for path in verdicts.runs_of_other_seeds(folder)]
    try:
        said = verdicts.to_records(
            load_result(folder / "08_claims" / "result.json")["tables"]["claims"]
        )
    except (OSError, ValueError, LookupError) as error:
        return [*problems, f"08_claims: {error}"]
    if said != json.loads((folder / CLAIMS).read_text(encoding="utf-8")):
        problems.append(
            "08_claims does not follow from what is stored now (seed 0,"
            f" {', '.join(seeds) or 'no other seed'}): re-run 08_claims beside runs with these"
            " seeds and publish, or remove the others from data/reference"
        )
    return problems


def publish(profile: str, seed: int) -> list[str]:
    """Store a run (none without ``profile``) and write what follows from it; one line for each
    thing that is amiss.
    """
    if IN_WHEEL:
        raise ValueError("publishing writes into a clone of the project: run it there")
    if seed:
        if not profile:
            raise ValueError("--seed needs --profile: whose run with that seed?")
        target = REFERENCE / f"seed-{seed}"
        stages = copy_results(find_run(profile, seed), target, (RESULT,))
        for stale in set(target.iterdir()) - {target / stage for stage in stages}:
            shutil.rmtree(stale)
        print(
            f"seed {seed}: stored {', '.join(stages)}; publish seed 0 after its 08_claims has run"
            " again"
        )
        return []
    if profile:
        source = find_run(profile, seed)
        notebooks = published_notebooks(source)  # all of them before anything is written
        copy_results(source, REFERENCE)
        for path, notebook in notebooks.items():
            with complete_only(path) as partial:
                nbformat.write(notebook, partial)
    problems = publish_claims(REFERENCE) + redraw(REFERENCE, ROOT / "figures")
    results, unreadable = reference_results(REFERENCE)
    problems += [*unreadable, *fill_documents(results)]
    return list(dict.fromkeys(problems))
