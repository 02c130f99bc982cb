"""Turn a finished run into what is committed: data/reference, claims, figures, notebook outputs, README tables.

    python -m ssah_utils.publish --profile laptop --seed 1        # stores the results of another seed, in data/reference/seed-1
    python -m ssah_utils.publish --profile laptop                 # the run with seed 0, last: all that is committed
    python -m ssah_utils.publish                                  # writes figures and README again from what is stored

Knows stored results and the notebooks' structure. Loads no model, and writes no number that a run did not produce.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

import nbformat

from ssah_utils import claims
from ssah_utils.figures import redraw
from ssah_utils.files import complete_only, sha256_of, write_json
from ssah_utils.readme_tables import TABLES
from ssah_utils.results import REFERENCE, ROOT, load_result, runs_root, set_style

STORED = ("result.json", "units.safetensors", "frozen_units.safetensors")
README = ROOT / "README.md"
CLAIMS = "claims.json"


def find_run(profile: str, seed: int) -> Path:
    """The newest run of a profile with this seed on this machine; ``FileNotFoundError`` says how to make one."""
    stamps = sorted((runs_root() / profile).glob(f"*/seed-{seed}/*/stamp.json"), key=lambda stamp: stamp.stat().st_mtime)
    if not stamps:
        raise FileNotFoundError(
            f"no finished run of profile '{profile}' with seed {seed}: "
            f"run python -m ssah_utils.run --profile {profile} --set seed={seed}"
        )
    return stamps[-1].parents[1]


def copy_results(source: Path, target: Path, names: tuple[str, ...] = STORED) -> list[str]:
    """Copy the small result files of every stage; returns the stages found."""
    stages = sorted(folder.name for folder in source.iterdir() if (folder / "stamp.json").exists())
    for stage in stages:
        for name in names:
            if (source / stage / name).exists():
                with complete_only(target / stage / name) as partial:
                    shutil.copyfile(source / stage / name, partial)
    return stages


def code_hash(notebook: nbformat.NotebookNode) -> str:
    """Hash of a notebook's code cells: what its outputs belong to."""
    return sha256_of([cell.source for cell in notebook.cells if cell.cell_type == "code"])[:16]


def with_outputs(source: nbformat.NotebookNode, executed: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The source notebook with the outputs of its execution, cells counted 1..n; the injected parameters stay out.

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
            raise ValueError(f"cell {count} has changed since the run: execute the notebook again before publishing")
        # what libraries say on stderr is about the machine it ran on, not about the finding
        cell.outputs = [output for output in done.outputs if output.get("name") != "stderr"]
        cell.execution_count = count
        for output in cell.outputs:
            if output.output_type == "execute_result":
                output.execution_count = count
    source.metadata["ssah"] = {"outputs_of": code_hash(source)}
    return source


def publish_notebook(stage: str, source: Path) -> None:
    path = ROOT / "notebooks" / f"{stage}.ipynb"
    notebook = with_outputs(nbformat.read(path, as_version=4), nbformat.read(source / stage / f"{stage}.ipynb", as_version=4))
    with complete_only(path) as partial:
        nbformat.write(notebook, partial)


# ------------------------------------------------------------------------------------------------------------ README


def fill_readme(text: str, results: dict[str, dict]) -> str:
    """README with everything between ``<!-- NAME -->`` and ``<!-- end NAME -->`` replaced by the table of that name."""
    for name, make in TABLES.items():
        opening, closing = f"<!-- {name} -->", f"<!-- end {name} -->"
        before, found, rest = text.partition(opening)
        _, ended, after = rest.partition(closing)
        if not found or not ended:
            raise ValueError(f"README.md has no place for the table '{name}': put {opening} and {closing} where it belongs")
        text = f"{before}{opening}\n{make(results)}\n{closing}{after}"
    return text


def reference_results() -> dict[str, dict]:
    return {path.parent.name: load_result(path) for path in sorted(REFERENCE.glob("*/result.json"))}


def publish_claims(folder: Path) -> list[str]:
    """Write claims.json from the stored results; one line if the stored stage 08_claims says otherwise."""
    table, problems = claims.judge_stored(folder, claims.load_claims())
    write_json(folder / CLAIMS, claims.to_records(table))
    said = claims.to_records(load_result(folder / "08_claims" / "result.json")["tables"]["claims"])
    if said != json.loads((folder / CLAIMS).read_text(encoding="utf-8")):
        problems.append("08_claims does not follow from the results and seeds stored now: re-run 08_claims and publish it")
    return problems


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m ssah_utils.publish", description="Make a finished run the committed one.")
    parser.add_argument("--profile", default="", help="whose run to store (default: none, only write again what follows)")
    parser.add_argument("--seed", type=int, default=0, help="other seeds than 0 are stored beside it, as data/reference/seed-K")
    options = parser.parse_args(arguments)
    set_style()
    try:
        source = find_run(options.profile, options.seed) if options.profile else None
        if options.seed:
            if not source:
                raise ValueError("--seed needs --profile: whose run with that seed?")
            stages = copy_results(source, REFERENCE / f"seed-{options.seed}", ("result.json",))
            print(f"seed {options.seed}: stored {', '.join(stages)}; publish seed 0 after running its 08_claims again")
            return 0
        for stage in copy_results(source, REFERENCE) if source else []:
            publish_notebook(stage, source)
        problems = publish_claims(REFERENCE) + redraw(REFERENCE, ROOT / "figures")
        text = fill_readme(README.read_text(encoding="utf-8"), reference_results())
        with complete_only(README) as partial:
            partial.write_text(text, encoding="utf-8")
    except (OSError, ValueError) as error:
        problems = str(error).splitlines()
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
