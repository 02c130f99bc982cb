"""Execute the notebooks in order through papermill: strict parameters, resume, progress.

    ssah run --profile laptop
    ssah run --profile laptop --set safety_fraction=0.004
    ssah run --profile laptop --only 04_ablation --set n_random=10

papermill alone would accept unknown parameters, leave half-executed notebooks behind and count
``sys.exit(0)`` as success. Here everything is checked before a kernel starts, and a stage counts as
done only when its stamp, written last, exists.
"""

import ast
import difflib
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import nbformat
import papermill
import yaml
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError

from ssah_utils import loading, precision
from ssah_utils.files import NOTEBOOKS, complete_only, require_space, workplace, write_json
from ssah_utils.locks import locked
from ssah_utils.pipeline import machine, parameters
from ssah_utils.pipeline.kernel import ThisInterpreter
from ssah_utils.pipeline.runs import declared_parameters, run_lock, stage_lock
from ssah_utils.pipeline.stamps import (
    Stage,
    changed_since,
    forget_sources,
    is_path,
    made,
    made_from,
    missing_outputs,
    outdated,
    read_stamp,
    stage_key,
)
from ssah_utils.pipeline.status import clock, log_to, status_line
from ssah_utils.prompts.datasets import DATASETS

PATIENCE = 5  # seconds
SPACE = 2 * 2**30  # bytes that a run should find free
SHARED = {
    "harmful_data",
    "other_harmful_data",
    "helpful_data",
    "chat_template",
    "system_prompt",
    "dtype",
}
IDENTITY = {"model", "seed"}  # they name the run folder, so all notebooks get them


# ----------------------------------------------------------------------------------------- planning


def plan(profile: str, assignments: list[str], only: str = "", checked: bool = True) -> list[Stage]:
    """All stages with their parameters: notebook defaults, then the profile, then ``name=value``
    assignments.

    Assignments go to ``only`` when it is given. Raises ``ValueError`` for anything unknown or
    ill-typed; where ``checked``, also for what no notebook could work with, for which data sets and
    the configurations of models are read.
    """
    pipeline = read_pipeline()["stages"]
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
        owners = [stage for stage in names if name in declared[stage]]
        if only and owners and only not in owners:
            raise ValueError(
                f"parameter '{name}' is not one of {only}, but of {', '.join(owners)}: leave --only"
                " away"
            )
        if only and name in SHARED and upstream_of(only, pipeline):
            raise ValueError(
                f"'{name}' is what the inputs of {only} were made with, too: leave --only away"
            )
        known("parameter", name, sorted({key for stage in accepting for key in declared[stage]}))
    stages = []
    for entry in pipeline:
        defaults = declared[entry["name"]]
        values = dict(defaults) | {"profile": profile}
        values |= {
            key: typed(key, value, defaults[key]) for key, value in settings[entry["name"]].items()
        }
        for key in chosen.keys() & (
            defaults.keys() if entry["name"] in accepting else defaults.keys() & IDENTITY
        ):
            values[key] = typed(key, parse(chosen[key], defaults[key]), defaults[key])
        values = {key: absolute(key, value) for key, value in values.items()}
        if checked:
            parameters.check(values)
        own, every_seed = tuple(entry.get("own_files", ())), entry.get("every_seed", False)
        files = tuple(entry["inputs"]), tuple(entry["outputs"])
        stages.append(
            Stage(
                NOTEBOOKS / f"{entry['name']}.ipynb",
                *files,
                entry["minutes"],
                values,
                own,
                every_seed,
            )
        )
    return stages


def read_pipeline() -> dict:
    return yaml.safe_load((NOTEBOOKS / "pipeline.yaml").read_text(encoding="utf-8"))


def profiles() -> list[str]:
    """Names that ``--profile`` takes."""
    return sorted(path.stem for path in (NOTEBOOKS / "profiles").glob("*.yaml"))


def upstream_of(name: str, pipeline: list[dict]) -> list[str]:
    return next(stage["inputs"] for stage in pipeline if stage["name"] == name)


def read_profile(profile: str, declared: dict[str, dict]) -> dict[str, dict]:
    """Parameters of every stage in a profile file: its ``all`` section where declared, then the
    stage's own.
    """
    known("profile", profile, profiles())
    path = NOTEBOOKS / "profiles" / f"{profile}.yaml"
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(
            f"profile '{profile}' is not YAML: {' '.join(str(error).split())}"
        ) from error
    if not isinstance(content, dict) or not all(
        isinstance(values or {}, dict) for values in content.values()
    ):
        raise ValueError(f"profile '{profile}' must map 'all' and notebook names to parameters")
    content = {section: values or {} for section, values in content.items()}
    shared = content.pop("all", {})
    for name in shared:
        known(
            f"parameter of profile '{profile}'",
            name,
            sorted({key for keys in declared.values() for key in keys}),
        )
    for stage, values in content.items():
        known(f"notebook in profile '{profile}'", stage, list(declared))
        for name in values:
            known(f"parameter of {stage} in profile '{profile}'", name, list(declared[stage]))
    return {
        stage: (
            {name: value for name, value in shared.items() if name in keys} | content.get(stage, {})
        )
        for stage, keys in declared.items()
    }


def absolute(name: str, value: object) -> object:
    """Paths as seen from here: the notebook runs in another folder."""
    if not is_path(name) or not value or value in DATASETS or value in loading.EMBEDDED_NAMES:
        return value  # a folder that happens to be called as one of ours is not meant
    return str(Path(value).resolve()) if Path(value).exists() else value


def known(what: str, name: str, valid: list[str]) -> None:
    if name not in valid:
        near = difflib.get_close_matches(name, valid, n=1, cutoff=0)
        everything = f" (all: {', '.join(valid)})" if len(valid) <= 12 else ""
        raise ValueError(
            f"unknown {what} '{name}'; nearest is '{near[0] if near else ''}'{everything}"
        )


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
    """``value`` if it has the default's type (an integer may stand for a float), else
    ``ValueError``.
    """
    if type(default) is float and type(value) is int:
        return float(value)
    if type(value) is not type(default):
        raise ValueError(
            f"parameter '{name}' takes {type(default).__name__} (as in {default!r}), not"
            f" {type(value).__name__} {value!r}"
        )
    return value


# ---------------------------------------------------------------------------------------- execution


def execute(stage: Stage, make_key: Callable[[], str], left: float) -> float:
    """Run one notebook; returns its seconds. Nothing is left where a finished notebook is expected
    unless it finished.

    The stamp says by which key it was made. Where ``make_key`` gives another one afterwards,
    something it depends on was changed while it ran, and nobody can tell what it was made by: it
    has failed.
    """
    key, inputs = make_key(), made_from(stage)
    with locked(stage_lock(stage.folder), wait=PATIENCE):
        # a notebook started by hand may be at work there; the kernel of a killed run needs a moment
        # to end
        pass
    stage.folder.mkdir(parents=True, exist_ok=True)
    for workspace in stage.folder.glob(f".{stage.name}.*"):  # left by a run that was killed
        shutil.rmtree(workspace, ignore_errors=True)
    finished, failed = (
        stage.folder / f"{stage.name}.ipynb",
        stage.folder / f"{stage.name}.failed.ipynb",
    )
    for stale in (stage.stamp, finished, failed, *(stage.folder / name for name in stage.outputs)):
        stale.unlink(missing_ok=True)
    started = time.monotonic()
    with (
        complete_only(failed) as partial,
        log_to(stage.folder / f"{stage.name}.log"),
        status_line(stage.name, left),
    ):
        try:
            papermill.execute_notebook(
                literal(stage.notebook),
                literal(partial),
                stage.parameters,
                cwd=str(NOTEBOOKS),
                progress_bar=False,
                log_output=True,
                kernel_name="python3",
                kernel_manager_class=ThisInterpreter,
                extra_arguments=["--log-level=ERROR"],
            )
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
    forget_sources()
    if not problem and (make_key() != key or made_from(stage) != inputs):
        problem = (
            "was changed while it ran (its notebook, the package, its data or its inputs): run it"
            " again"
        )
    if problem:
        raise RuntimeError(f"{stage.name} {problem} (executed notebook: {failed})")
    failed.replace(finished)
    seconds = time.monotonic() - started
    write_json(
        stage.stamp,
        {"key": key, "seconds": round(seconds, 1), "inputs": inputs, "made": made(stage)},
    )
    return seconds


def literal(path: Path) -> str:
    """A path as papermill takes it for itself: it formats paths, so braces are doubled."""
    return str(path).replace("{", "{{").replace("}", "}}")


def skipped_cells(executed: Path) -> str:
    """What went wrong if not every code cell ran: ``sys.exit`` in a cell ends a notebook without an
    error.
    """
    code = [
        cell for cell in nbformat.read(executed, as_version=4).cells if cell.cell_type == "code"
    ]
    for number, cell in enumerate(code, 1):
        if cell.source.strip() and cell.execution_count is None:
            return f"stopped before cell {number}"
    return ""


def expected_seconds(stages: list[Stage]) -> dict[str, float]:
    """What every stage took last time here, else what pipeline.yaml says, scaled to the speed of
    this machine.
    """
    found = {stage.name: read_stamp(stage).get("seconds") for stage in stages}
    if None not in found.values():
        return found
    reference, device = read_pipeline().get("machine"), precision.preferred_device()
    asked = (stage.parameters["dtype"] for stage in stages if "dtype" in stage.parameters)
    dtype = precision.dtype_named(next(asked, "auto"), device)
    times = machine.slowdown(reference, dtype, device) if reference else 1.0
    if reference:
        print(
            f"this machine takes about {times:.1f} times as long as the one whose minutes are in"
            " pipeline.yaml",
            flush=True,
        )
    for stage in stages:
        planned = 60 * stage.minutes.get(stage.parameters["profile"], stage.minutes["laptop"])
        found[stage.name] = found[stage.name] or times * planned
    return found


def run(stages: list[Stage], only: str = "", force: bool = False) -> None:
    """Execute what is not up to date, in order; with ``only``, that stage alone, which needs its
    inputs to be there.

    Raises ``InUse`` when another run is at work in the same folder.
    """
    selected, alone = [stage for stage in stages if only in ("", stage.name)], bool(only)
    if due(stages, selected, alone, force):  # a full disk could not even hold the lock
        require_space(selected[0].folder, SPACE)
    with locked(run_lock(selected[0].folder.parent)):
        # another run may have finished meanwhile
        _run(stages, selected, due(stages, selected, alone, force), alone)


def due(stages: list[Stage], selected: list[Stage], alone: bool, force: bool) -> list[Stage]:
    """Those of the selected stages that are to be executed.

    ``ValueError`` when one that is run ``alone`` lacks its inputs, or when these were changed.
    """
    if alone:
        check_inputs(selected[0], stages)
    keys = {stage.name: stage_key(stage, stages, as_made=alone) for stage in selected}
    return selected if force else outdated(selected, keys)


def check_inputs(stage: Stage, stages: list[Stage]) -> None:
    inputs = [other for other in stages if other.name in stage.inputs]
    absent = [other.name for other in inputs if not other.stamp.exists()]
    if absent:
        raise ValueError(
            f"{stage.name} needs the results of {', '.join(absent)}: run the whole profile first"
        )
    for other in inputs:
        if changed := changed_since(other.folder):
            raise ValueError(
                f"{changed[0]} of {other.name} was changed since it was made: run {other.name}"
                " again first"
            )


def _run(stages: list[Stage], selected: list[Stage], todo: list[Stage], alone: bool) -> None:
    expected = expected_seconds(todo)
    if todo:
        print(
            f"{len(todo)} of {len(selected)} notebooks to execute, about"
            f" {clock(sum(expected.values()))}",
            flush=True,
        )
    began, done = time.monotonic(), 0.0
    for stage in selected:
        if stage not in todo:
            print(f"{stage.name}  up to date: {shown(stage.folder)}")
            continue
        # what the finished ones took, beside what was expected of them, says how long the others
        # will take
        pace = (time.monotonic() - began) / done if done else 1.0
        left = pace * sum(expected[other.name] for other in todo[todo.index(stage) :])
        print(f"{stage.name}  started, about {clock(left)} to the end of the run", flush=True)
        seconds = execute(stage, lambda stage=stage: stage_key(stage, stages, as_made=alone), left)
        done += expected[stage.name]
        print(f"{stage.name}  done in {clock(seconds)}: {shown(stage.folder)}", flush=True)
    if todo:
        print(
            f"{len(todo)} of {len(selected)} notebooks executed in"
            f" {clock(time.monotonic() - began)}"
        )


def shown(path: Path) -> str:
    here = workplace()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)
