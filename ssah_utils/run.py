"""Execute the notebooks in order through papermill: strict parameters, resume, progress.

    python -m ssah_utils.run --profile laptop
    python -m ssah_utils.run --profile laptop --only 04_ablation --set safety_fraction=0.004
    python -m ssah_utils.run --list

papermill alone would accept unknown parameters, leave half-executed notebooks behind and count ``sys.exit(0)`` as success.
Here everything is checked before a kernel starts, and a stage counts as done only when its stamp, written last, exists.
"""

import argparse
import ast
import difflib
import json
import shutil
import sys
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import nbformat
import papermill
import yaml
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError

from ssah_utils import parameters
from ssah_utils.files import complete_only, require_space, sha256_of, sha256_of_file, write_json
from ssah_utils.results import ROOT, run_folder
from ssah_utils.status import clock, log_to, status_line

NOTEBOOKS = ROOT / "notebooks"
RUNNER = ("run.py", "status.py", "publish.py", "README.md")  # no result depends on them
IDENTITY = {"model", "seed"}  # they name the run folder, so all notebooks get them


@dataclass(frozen=True)
class Stage:
    """One notebook with the parameters it will get."""

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    minutes: dict[str, float]
    parameters: dict
    own_files: tuple[str, ...] = ()  # files of the package or of data/ that no other stage depends on
    every_seed: bool = False  # whether it also reads what runs with other seeds stored

    @property
    def notebook(self) -> Path:
        return NOTEBOOKS / f"{self.name}.ipynb"

    @property
    def folder(self) -> Path:
        return run_folder(self.parameters["profile"], self.parameters["model"], self.parameters["seed"]) / self.name

    @property
    def stamp(self) -> Path:
        return self.folder / "stamp.json"


# --------------------------------------------------------------------------------------------------------- planning


def plan(profile: str, assignments: list[str], only: str = "") -> list[Stage]:
    """All stages with their parameters: notebook defaults, then the profile, then ``name=value`` assignments.

    Assignments go to ``only`` when it is given. Raises ``ValueError`` for anything unknown or ill-typed.
    """
    pipeline = yaml.safe_load((NOTEBOOKS / "pipeline.yaml").read_text(encoding="utf-8"))["stages"]
    names = [stage["name"] for stage in pipeline]
    if only:
        known("notebook", only, names)
    declared = {name: declared_parameters(NOTEBOOKS / f"{name}.ipynb") for name in names}
    settings = read_profile(profile, declared)
    chosen = dict(split_assignment(text) for text in assignments)
    if "profile" in chosen:
        raise ValueError("the profile is chosen by --profile, not by --set")
    accepting = [only] if only else names
    for name in chosen:
        known("parameter", name, sorted({key for stage in accepting for key in declared[stage]}))
    stages = []
    for entry in pipeline:
        defaults = declared[entry["name"]]
        values = dict(defaults) | {"profile": profile}
        values |= {key: typed(key, value, defaults[key]) for key, value in settings[entry["name"]].items()}
        for key in chosen.keys() & (defaults.keys() if entry["name"] in accepting else defaults.keys() & IDENTITY):
            values[key] = typed(key, parse(chosen[key], defaults[key]), defaults[key])
        values = {key: absolute(key, value) for key, value in values.items()}
        parameters.check(values)
        own, every_seed = tuple(entry.get("own_files", ())), entry.get("every_seed", False)
        stages.append(
            Stage(entry["name"], tuple(entry["inputs"]), tuple(entry["outputs"]), entry["minutes"], values, own, every_seed)
        )
    return stages


@cache
def declared_parameters(notebook: Path) -> dict:
    """Names and default values in the cell tagged ``parameters``."""
    found = papermill.inspect_notebook(str(notebook))
    if not found:
        raise ValueError(f"{notebook.name} has no cell tagged 'parameters'")
    return {name: ast.literal_eval(entry["default"]) for name, entry in found.items()}


def read_profile(profile: str, declared: dict[str, dict]) -> dict[str, dict]:
    """Parameters of every stage in a profile file: its ``all`` section where declared, then the stage's own."""
    folder = NOTEBOOKS / "profiles"
    known("profile", profile, sorted(path.stem for path in folder.glob("*.yaml")))
    try:
        content = yaml.safe_load((folder / f"{profile}.yaml").read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"profile '{profile}' is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or not all(isinstance(values or {}, dict) for values in content.values()):
        raise ValueError(f"profile '{profile}' must map 'all' and notebook names to parameters")
    content = {section: values or {} for section, values in content.items()}
    shared = content.pop("all", {})
    for name in shared:
        known(f"parameter of profile '{profile}'", name, sorted({key for keys in declared.values() for key in keys}))
    for stage, values in content.items():
        known(f"notebook in profile '{profile}'", stage, list(declared))
        for name in values:
            known(f"parameter of {stage} in profile '{profile}'", name, list(declared[stage]))
    return {
        stage: {name: value for name, value in shared.items() if name in keys} | content.get(stage, {})
        for stage, keys in declared.items()
    }


def absolute(name: str, value: object) -> object:
    """Paths as seen from here: the notebook runs in another folder."""
    is_path = name == "chat_template" or name.endswith(("_data", "model"))
    return str(Path(value).resolve()) if is_path and value and Path(value).exists() else value


def known(what: str, name: str, valid: list[str]) -> None:
    if name not in valid:
        near = difflib.get_close_matches(name, valid, n=1, cutoff=0)
        everything = f" (all: {', '.join(valid)})" if len(valid) <= 12 else ""
        raise ValueError(f"unknown {what} '{name}'; nearest is '{near[0] if near else ''}'{everything}")


def split_assignment(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--set takes name=value, not '{text}'")
    return name.strip(), value.strip()


def parse(text: str, default: object) -> object:
    """A command-line value in the type of the parameter's default; strings need no quotes."""
    if isinstance(default, str):
        return text
    try:
        return ast.literal_eval(text.capitalize() if text in ("true", "false") else text)
    except (ValueError, SyntaxError):
        return text


def typed(name: str, value: object, default: object) -> object:
    """``value`` if it has the default's type (an integer may stand for a float), else ``ValueError``."""
    if type(default) is float and type(value) is int:
        return float(value)
    if type(value) is not type(default):
        raise ValueError(
            f"parameter '{name}' takes {type(default).__name__} (as in {default!r}), not {type(value).__name__} {value!r}"
        )
    return value


# -------------------------------------------------------------------------------------------------------- execution


def stage_key(stage: Stage, stages: list[Stage], as_made: bool = False) -> str:
    """Hash of everything a stage's result depends on: its code, the package, the data, its parameters, its inputs.

    The inputs as they are planned, or ``as_made``: with what they were made last.
    """
    inputs = [other for other in stages if other.name in stage.inputs]
    upstream = [read_stamp(other)["key"] if as_made else stage_key(other, stages) for other in inputs]
    foreign = {name for other in stages for name in other.own_files} - set(stage.own_files)
    package = {name: content for name, content in package_source().items() if name not in foreign}
    content = [notebook_source(stage.notebook), package, stage.parameters, named_files(stage), upstream]
    return sha256_of([*content, other_seeds(stage)] if stage.every_seed else content)


def other_seeds(stage: Stage) -> dict[str, str]:
    """Hashes of the inputs that runs of the same profile and model with other seeds have stored."""
    run = stage.folder.parent
    found = [path for name in stage.inputs for path in run.parent.glob(f"seed-*/{name}/result.json")]
    return {f"{path.parts[-3]}/{path.parts[-2]}": sha256_of_file(path) for path in sorted(found) if run not in path.parents}


def named_files(stage: Stage) -> dict[str, object]:
    """Content of the files that parameters name, and what tells one model folder from another."""
    found: dict[str, object] = {}
    for value in stage.parameters.values():
        path = Path(value) if isinstance(value, str) and value.startswith("/") else None
        if path and path.is_file():
            found[value] = sha256_of_file(path)
        elif path and path.is_dir():
            found[value] = [(file.name, file.stat().st_size, file.stat().st_mtime) for file in sorted(path.iterdir())]
    return found


@cache
def notebook_source(notebook: Path) -> list[str]:
    return [cell.source for cell in nbformat.read(notebook, as_version=4).cells if cell.cell_type == "code"]


@cache
def package_source() -> dict[str, str]:
    files = [*(ROOT / "ssah_utils").glob("*.py"), *(ROOT / "data").glob("*.*")]
    return {path.name: sha256_of_file(path) for path in sorted(files) if path.name not in RUNNER}


def read_stamp(stage: Stage) -> dict:
    return json.loads(stage.stamp.read_text()) if stage.stamp.exists() else {}


def is_current(stage: Stage, key: str) -> bool:
    if read_stamp(stage).get("key") != key:
        return False
    inputs = [stage.folder.parent / name / stage.stamp.name for name in stage.inputs]
    made_again = any(path.exists() and path.stat().st_mtime_ns > stage.stamp.stat().st_mtime_ns for path in inputs)
    return not made_again and not missing_outputs(stage)


def missing_outputs(stage: Stage) -> list[str]:
    """Outputs that are not there, also trained models that models.json points to in the cache."""
    missing = [name for name in stage.outputs if not (stage.folder / name).exists()]
    if "models.json" in stage.outputs and not missing:
        places = json.loads((stage.folder / "models.json").read_text()).values()
        missing = [place for place in places if Path(place).is_absolute() and not Path(place).exists()]
    return missing


def execute(stage: Stage, key: str, left: float) -> float:
    """Run one notebook; returns its seconds. Nothing is left where a finished notebook is expected unless it finished."""
    stage.folder.mkdir(parents=True, exist_ok=True)
    for workspace in stage.folder.glob(f".{stage.name}.*"):  # left by a run that was killed
        shutil.rmtree(workspace, ignore_errors=True)
    finished, failed = stage.folder / f"{stage.name}.ipynb", stage.folder / f"{stage.name}.failed.ipynb"
    for stale in (stage.stamp, finished, failed, *(stage.folder / name for name in stage.outputs)):
        stale.unlink(missing_ok=True)
    started = time.monotonic()
    with complete_only(failed) as partial, log_to(stage.folder / f"{stage.name}.log"), status_line(stage.name, left):
        try:
            papermill.execute_notebook(
                str(stage.notebook), str(partial), stage.parameters, cwd=str(NOTEBOOKS), progress_bar=False,
                log_output=True, kernel_name="python3", extra_arguments=["--log-level=ERROR"],
            )  # fmt: skip
            problem = skipped_cells(partial)
        except PapermillExecutionError as error:
            said = (error.evalue.strip().splitlines() or ["no message"])[-1]
            problem = f"failed in cell {error.exec_count}: {error.ename}: {said}"
        except DeadKernelError:
            problem = "lost its kernel (out of memory?)"
        if not partial.exists():
            shutil.copyfile(stage.notebook, partial)
    if not problem and (missing := missing_outputs(stage)):
        problem = f"ended without writing {', '.join(missing)}"
    if problem:
        raise RuntimeError(f"{stage.name} {problem} (executed notebook: {failed})")
    failed.replace(finished)
    seconds = time.monotonic() - started
    write_json(stage.stamp, {"key": key, "seconds": round(seconds, 1)})
    return seconds


def skipped_cells(executed: Path) -> str:
    """What went wrong if not every code cell ran: ``sys.exit`` in a cell ends a notebook without an error."""
    code = [cell for cell in nbformat.read(executed, as_version=4).cells if cell.cell_type == "code"]
    for number, cell in enumerate(code, 1):
        if cell.source.strip() and cell.execution_count is None:
            return f"stopped before cell {number}"
    return ""


def expected_seconds(stage: Stage) -> float:
    """What the stage took last time here, else what pipeline.yaml says."""
    planned = 60 * stage.minutes.get(stage.parameters["profile"], stage.minutes["laptop"])
    return read_stamp(stage).get("seconds", planned)


def outdated(selected: list[Stage], keys: dict[str, str]) -> list[Stage]:
    """Stages to execute: what is not up to date, and what follows from it."""
    found: list[Stage] = []
    for stage in selected:
        if not is_current(stage, keys[stage.name]) or any(other.name in stage.inputs for other in found):
            found.append(stage)
    return found


def run(stages: list[Stage], only: str = "", force: bool = False) -> None:
    """Execute what is not up to date, in order; with ``only``, that stage alone, which needs its inputs to be there."""
    keys = {stage.name: stage_key(stage, stages) for stage in stages}
    selected = [stage for stage in stages if only in ("", stage.name)]
    if only:
        absent = [other.name for other in stages if other.name in selected[0].inputs and not other.stamp.exists()]
        if absent:
            raise ValueError(f"{only} needs the results of {', '.join(absent)}: run the whole profile first")
        keys[only] = stage_key(selected[0], stages, as_made=True)
    todo = selected if force else outdated(selected, keys)
    estimates = {stage.name: expected_seconds(stage) for stage in todo}
    require_space(selected[0].folder, 2 * 2**30 if todo else 0)
    began = time.monotonic()
    for stage in selected:
        if stage not in todo:
            print(f"{stage.name}  up to date: {shown(stage.folder)}")
            continue
        left = sum(estimates[other.name] for other in todo[todo.index(stage) :])
        print(f"{stage.name}  started, about {clock(left)} to the end of the run", flush=True)
        seconds = execute(stage, keys[stage.name], left)
        print(f"{stage.name}  done in {clock(seconds)}: {shown(stage.folder)}", flush=True)
    if todo:
        print(f"{len(todo)} of {len(selected)} notebooks executed in {clock(time.monotonic() - began)}")


def shown(path: Path) -> str:
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def list_pipeline(stages: list[Stage]) -> None:
    todo = outdated(stages, {stage.name: stage_key(stage, stages) for stage in stages})
    for stage in stages:
        state = "to run" if stage in todo else "up to date"
        print(f"{stage.name:14} {state:11} needs {', '.join(stage.inputs) or 'nothing':28} writes {', '.join(stage.outputs)}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m ssah_utils.run", description="Execute the notebooks in order.")
    parser.add_argument("--profile", default="laptop", help="a file in notebooks/profiles (default: laptop)")
    parser.add_argument("--only", default="", metavar="NOTEBOOK", help="execute one notebook, e.g. 04_ablation")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="change one parameter (repeatable)")
    parser.add_argument("--force", action="store_true", help="execute also what is up to date")
    parser.add_argument("--list", action="store_true", help="show the pipeline and what is up to date")
    options = parser.parse_args(arguments)
    try:  # everything a user can get wrong is found here, before a kernel starts
        stages = plan(options.profile, options.set, options.only)
        if options.list:
            list_pipeline(stages)
            return 0
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        run(stages, options.only, options.force)
    except (RuntimeError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: the same command continues with the notebook that was running", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
