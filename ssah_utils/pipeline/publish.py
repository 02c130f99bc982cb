"""Turn a finished run into what is committed.

That is data/reference, claims, figures, notebook outputs, and the tables in README.md and docs/.

    ssah publish --profile laptop --seeds 0:3     # others than 0 go to data/reference/seed-K
    ssah publish --profile laptop --models a,b    # others than the main one to models/ in there
    ssah publish --profile laptop --machine amx   # verdicts of a run elsewhere, to compare
    ssah publish                                  # figures and tables again, from what is stored

Knows stored results and the notebooks' structure. Loads no model, and writes no number that a run
did not produce.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import nbformat

from ssah_utils import embedded
from ssah_utils.files import (
    IN_WHEEL,
    NOTEBOOKS,
    REFERENCE,
    ROOT,
    complete_only,
    sha256_of,
    write_json,
)
from ssah_utils.pipeline import across_judges, across_machines, across_models, claims, verdicts
from ssah_utils.pipeline.redraw import redraw
from ssah_utils.pipeline.result_tables import JUDGE_TABLES, RESULT_TABLES
from ssah_utils.pipeline.run import plan
from ssah_utils.pipeline.speed_tables import SPEED_TABLES
from ssah_utils.pipeline.stored import amiss, find_run, load_result
from ssah_utils.pipeline.summary import GUIDE_PARTS, README_PARTS

RESULT = "result.json"
STORED = (RESULT, "units.safetensors", "frozen_units.safetensors")
CLAIMS = "claims.json"
BY_MODEL = "claims_by_model.json"
DOCUMENTS = {  # what is generated in a document: names of its parts, and what makes them
    "README.md": README_PARTS,
    "docs/guide.md": GUIDE_PARTS,
    "docs/judge.md": JUDGE_TABLES,
    "docs/results.md": RESULT_TABLES
    | across_models.MODEL_TABLES
    | {"machines": across_machines.machines_table, "runs": across_machines.runs_table}
    | {"judges": across_judges.judges_table},
    "docs/speed.md": SPEED_TABLES,
}


def finished_stages(source: Path) -> list[str]:
    """Stages of a run that have their stamp, in order."""
    return sorted(folder.name for folder in source.iterdir() if (folder / "stamp.json").exists())


def check_intact(source: Path) -> None:
    """``ValueError`` where a result of a run is not as it was when its stamp was written, or was
    made from other results than are there.
    """
    for stage in finished_stages(source):
        if what := amiss(source / stage):
            raise ValueError(f"{what} before publishing")


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
    """The source notebook with the outputs of its execution, code cells counted from 1.

    The cell of parameters that papermill added is left out. Raises ``ValueError`` when the
    execution was of other code.
    """
    by_id = {cell.id: cell for cell in executed.cells}
    count = 0
    for cell in source.cells:
        if cell.cell_type != "code":
            continue
        count += 1
        done = by_id.get(cell.id)
        if done is None or done.source != cell.source:
            what = f"cell {count} has changed since the run"
            raise ValueError(f"{what}: execute the notebook again before publishing")
        # What libraries say on stderr is about the machine, not about the finding.
        cell.outputs = [output for output in done.outputs if output.get("name") != "stderr"]
        cell.execution_count = count
        for output in cell.outputs:
            if output.output_type == "execute_result":
                output.execution_count = count
    source.metadata["ssah"] = {"outputs_of": code_hash(source)}
    return source


def published_notebooks(source: Path) -> dict[Path, nbformat.NotebookNode]:
    """Every finished stage's notebook with its outputs, by where it belongs.

    Of those that are committed with what they show of this run's model. ``ValueError`` names the
    first that cannot be published.
    """
    notebooks, model = {}, source.parent.name
    for stage in finished_stages(source):
        if across_models.SHOWN_WITH.get(stage, across_models.MAIN) != model:
            continue
        path = NOTEBOOKS / f"{stage}.ipynb"
        executed = nbformat.read(source / stage / f"{stage}.ipynb", as_version=4)
        try:
            notebooks[path] = with_outputs(nbformat.read(path, as_version=4), executed)
        except ValueError as error:
            raise ValueError(f"{stage}: {error}") from error
    return notebooks


def renew_verdicts(stored: Path) -> None:
    """Put today's verdicts into the cells tagged ``verdicts`` of the committed notebooks.

    They follow from stored results and data/claims.yaml alone, so a rule that changes asks for no
    notebook to be executed again.
    """
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        model = across_models.SHOWN_WITH.get(path.stem, across_models.MAIN)
        folder = across_models.model_folder(stored, model)
        notebook = nbformat.read(path, as_version=4)
        tagged = [cell for cell in notebook.cells if "verdicts" in cell.metadata.get("tags", [])]
        if "ssah" not in notebook.metadata or not tagged:  # committed without outputs
            continue
        table = verdicts.of_stage(folder, path.stem)
        data = {"text/html": table.to_html(), "text/plain": table.data.to_string(index=False)}
        for cell in tagged:
            shown = nbformat.v4.new_output("execute_result", data)
            shown.execution_count = cell.execution_count
            printed = [output for output in cell.outputs if output.output_type == "stream"]
            cell.outputs = [*printed, shown]
        with complete_only(path) as partial:
            nbformat.write(notebook, partial)


# ---------------------------------------------------------------------------------------- documents


def filled(document: str, text: str, results: dict[str, dict]) -> tuple[str, list[str]]:
    """A document's text with its generated parts made anew, and what could not be made.

    A part stands between ``<!-- NAME -->`` and ``<!-- end NAME -->``. Where results lack something
    for it, it stays as it was, and the list has one line on it. Raises ``ValueError`` for a part
    that has no place in the text.
    """
    problems = []
    for name, make in DOCUMENTS[document].items():
        opening, closing = f"<!-- {name} -->", f"<!-- end {name} -->"
        before, found, rest = text.partition(opening)
        _, ended, after = rest.partition(closing)
        if not found or not ended:
            places = f"put {opening} and {closing} where it belongs"
            raise ValueError(f"{document} has no place for '{name}': {places}")
        try:
            text = f"{before}{opening}\n{make(results)}\n{closing}{after}"
        except (LookupError, TypeError, ValueError) as error:
            kept = f"'{name}' in {document} stays as it was"
            problems.append(f"{kept}, stored results lack {error}: re-run the stage")
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


def refill_documents() -> list[str]:
    """Fill the documents from what is stored; one line for each result or part that failed."""
    results = across_models.StoredResults(REFERENCE)
    return [*results.problems, *fill_documents(results)]


def publish_claims(folder: Path) -> list[str]:
    """Write claims.json from the stored results; one line for each reason to doubt it."""
    stated = claims.load_claims()
    table, problems = verdicts.stored_verdicts(folder, stated)
    write_json(folder / CLAIMS, verdicts.to_records(table))
    by_model = across_models.verdicts_by_model(folder, stated)
    write_json(folder / BY_MODEL, verdicts.to_records(by_model))
    seeds = [path.name for path in verdicts.runs_of_other_seeds(folder)]
    try:
        shown = load_result(folder / "08_claims" / RESULT)["tables"]["claims"]
        said = verdicts.to_records(shown)
    except (OSError, ValueError, LookupError) as error:
        return [*problems, f"08_claims: {error}"]
    if said != json.loads((folder / CLAIMS).read_text(encoding="utf-8")):
        stored = f"what is stored now (seed 0, {', '.join(seeds) or 'no other seed'})"
        again = "re-run 08_claims beside runs with these seeds and publish"
        others = "or remove the others from data/reference"
        problems.append(f"08_claims does not follow from {stored}: {again}, {others}")
    return problems


def sources(profile: str, seeds: list[int], models: list[str]) -> list[Path]:
    """The runs to store, of every model its seed 0 last.

    Without ``models``, of that of the newest run with the first seed. ``FileNotFoundError`` for the
    first run that is not there, in one line that says how to make it.
    """
    planned = [plan(profile, [f"model={model}"], checked=False)[0] for model in models]
    folders = [stage.folder.parents[1] for stage in planned]
    found = []
    for folder in folders or [find_run(profile, seeds[0]).parent]:
        for seed in sorted(seeds, reverse=True):
            source = folder / f"seed-{seed}"
            if not source.is_dir() or not finished_stages(source):
                what = f"no finished run of {folder.name}, profile '{profile}', with seed {seed}"
                again = f"ssah sweep --profile {profile} --seeds {seed}"
                raise FileNotFoundError(f"{what}: run {again} with --models for this one")
            found.append(source)
    return found


def reference_folder_of(source: Path) -> Path:
    """Where the results of a run are stored; those of the main model with seed 0 on top."""
    model, seed = source.parent.name, source.name
    place = across_models.model_folder(REFERENCE, model)
    return place if seed == "seed-0" else place / seed


def store(source: Path) -> None:
    """Store the small results of a run: of another seed than 0, in place of those stored before."""
    place, is_first = reference_folder_of(source), source.name == "seed-0"
    stages = copy_results(source, place, STORED if is_first else (RESULT,))
    if across_judges.STAGE in stages:
        across_judges.keep(source, place)
    if not is_first:
        for stale in set(place.iterdir()) - {place / stage for stage in stages}:
            shutil.rmtree(stale)
    print(f"{source.parent.name}, {source.name}: stored {', '.join(stages)}")


def publish(
    profile: str, seeds: Sequence[int] = (0,), models: Sequence[str] = (), machine: str = ""
) -> list[str]:
    """Store runs and write what follows from them; one line for each thing that is amiss.

    Without ``profile``, only what follows from the results that are stored. With ``machine``, only
    the verdicts of the run, under that name, to be held against what is stored.
    """
    if IN_WHEEL:
        raise ValueError("publishing writes into a clone of the project: run it there")
    if not profile and (models or list(seeds) != [0]):
        raise ValueError("--seeds and --models need --profile: whose runs?")
    if machine and (not profile or len(seeds) > 1 or len(models) > 1):
        raise ValueError("--machine stores one run: name its --profile, and one seed and model")
    found = sources(profile, list(seeds), list(models)) if profile else []
    if machine:
        check_intact(found[0])
        across_machines.keep_verdicts(found[0], machine)
        return refill_documents()  # figures show nothing of it
    notebooks: dict[Path, nbformat.NotebookNode] = {}
    for source in found:  # all of them before anything is written
        if source.parent.name == embedded.TINY_RANDOM:
            what = f"'{embedded.TINY_RANDOM}' has random weights, for tests"
            raise ValueError(f"{what}: no claim is measured on it")
        check_intact(source)
        if source.name == "seed-0":
            notebooks |= published_notebooks(source)
    for source in found:
        store(source)
    for source in found:  # now that seed 0, which others are held against, is stored
        across_machines.keep_agreement(source, reference_folder_of(source))
    for path, notebook in notebooks.items():
        with complete_only(path) as partial:
            nbformat.write(notebook, partial)
    if found and 0 not in seeds:
        print("publish seed 0, too, after its 08_claims has run again")
        return []
    renew_verdicts(REFERENCE)
    problems = publish_claims(REFERENCE) + redraw(REFERENCE, ROOT / "figures") + refill_documents()
    return list(dict.fromkeys(problems))
