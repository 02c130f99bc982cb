"""Execute the notebooks in order through papermill: strict parameters, resume, progress.

    ssah run --profile laptop
    ssah run --profile laptop --set safety_fraction=0.004
    ssah run --profile laptop --only 04_ablation --set n_random=10
    ssah run --profile qwen-1.5b --only 01_alignment,03_units,04_ablation

papermill alone would accept unknown parameters, leave half-executed notebooks behind and take
``sys.exit(0)`` for success. Here everything is checked before a kernel starts, and a stage is done
only when its stamp exists, which is written last.
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

from ssah_utils import embedded, precision
from ssah_utils.device_maps import NAMED, is_inline
from ssah_utils.files import NOTEBOOKS, complete_only, require_space, workplace, write_json
from ssah_utils.locks import locked
from ssah_utils.pipeline import machine, parameters
from ssah_utils.pipeline.kernel import ThisInterpreter
from ssah_utils.pipeline.runs import declared_parameters, run_lock, stage_lock, with_commits
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

PATIENCE = 5  # seconds that the kernel of a killed run has to end
SPACE = 2 * 2**30  # bytes that a run should find free
# Parameters that notebooks must agree on.
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
    """All stages with their parameters.

    An assignment ``name=value`` comes before the profile, the profile before the notebook's
    default. Assignments go to the notebooks ``only``, separated by commas, when they are given.
    Raises ``ValueError`` for anything unknown or ill-typed. Where ``checked``, also for what no
    notebook could work with: then data sets and the configurations of models are read. A model on
    the hub is named with its commit, so that all notebooks, keys and results mean the same one.
    """
    pipeline = read_pipeline()["stages"]
    names = [stage["name"] for stage in pipeline]
    wanted = named(only)
    for name in wanted:
        known("notebook", name, names)
    declared = {name: declared_parameters(NOTEBOOKS / f"{name}.ipynb") for name in names}
    settings = read_profile(profile, declared)
    chosen = dict(split_assignment(text) for text in assignments)
    check_assigned(list(chosen), wanted, declared, pipeline)
    stages = []
    for entry in pipeline:
        name = entry["name"]
        defaults = declared[name] | {"profile": profile}
        is_wanted = not wanted or name in wanted
        values = assigned(defaults, settings[name], chosen, is_wanted)
        if checked:
            parameters.check(values)
            if is_wanted:  # the others are not executed
                parameters.check_trainable(name, values)
        values = with_commits(values, asks=checked)
        stage = Stage(
            notebook=NOTEBOOKS / f"{name}.ipynb",
            inputs=tuple(entry["inputs"]),
            outputs=tuple(entry["outputs"]),
            minutes=entry["minutes"],
            parameters=values,
            own_files=tuple(entry.get("own_files", ())),
            every_seed=entry.get("every_seed", False),
            only_named=entry.get("only_named", False),
        )
        stages.append(stage)
    return stages


def named(only: str) -> list[str]:
    """The notebooks that ``--only`` names; none: all."""
    return [name.strip() for name in only.split(",") if name.strip()]


def check_assigned(
    chosen: list[str], wanted: list[str], declared: dict[str, dict], pipeline: list[dict]
) -> None:
    """``ValueError`` for the first parameter that may not be assigned, or not to these notebooks.

    What notebooks must agree on is assigned to all of them: to the inputs of a notebook, too.
    """
    if "profile" in chosen:
        raise ValueError("the profile is chosen by --profile, not by --set")
    accepting = {name: declared[name] for name in wanted} if wanted else declared
    inputs = {name for one in wanted for name in upstream_of(one, pipeline)} - set(wanted)
    asked = ", ".join(wanted)
    for name in chosen:
        owners = [stage for stage in declared if name in declared[stage]]
        if wanted and owners and not set(wanted) & set(owners):
            what = f"parameter '{name}' is not one of {asked}, but of {', '.join(owners)}"
            raise ValueError(f"{what}: leave --only away")
        if name in SHARED and inputs:
            what = f"'{name}' is what the inputs of {asked} were made with, too"
            raise ValueError(f"{what}: leave --only away, or name {', '.join(sorted(inputs))}")
        known("parameter", name, names_in(accepting))


def assigned(defaults: dict, settings: dict, chosen: dict[str, str], accepting: bool) -> dict:
    """A notebook's parameters: its defaults, then what its profile sets, then what was chosen.

    A notebook that is not ``accepting`` takes what names the run folder, and nothing else.
    """
    values = dict(defaults)
    for name, value in settings.items():
        values[name] = typed(name, value, defaults[name])
    taken = defaults.keys() if accepting else defaults.keys() & IDENTITY
    for name in chosen.keys() & taken:
        values[name] = typed(name, parse(chosen[name], defaults[name]), defaults[name])
    return {name: absolute(name, value) for name, value in values.items()}


def names_in(declared: dict[str, dict]) -> list[str]:
    """All parameters that notebooks declare, in alphabetical order."""
    return sorted({name for of_stage in declared.values() for name in of_stage})


def read_pipeline() -> dict:
    """The content of pipeline.yaml: the notebooks in order, and the machine of their minutes."""
    return yaml.safe_load((NOTEBOOKS / "pipeline.yaml").read_text(encoding="utf-8"))


def profiles() -> list[str]:
    """Names that ``--profile`` takes."""
    return sorted(path.stem for path in (NOTEBOOKS / "profiles").glob("*.yaml"))


def upstream_of(name: str, pipeline: list[dict]) -> list[str]:
    """The notebooks whose results a notebook reads."""
    return next(stage["inputs"] for stage in pipeline if stage["name"] == name)


def read_profile(profile: str, declared: dict[str, dict]) -> dict[str, dict]:
    """What a profile sets for every stage: what its ``all`` section says, then the stage's own.

    ``all`` sets a parameter wherever it is declared. Raises ``ValueError`` for a file that is not
    of this form, or names anything unknown.
    """
    known("profile", profile, profiles())
    path = NOTEBOOKS / "profiles" / f"{profile}.yaml"
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        said = " ".join(str(error).split())
        raise ValueError(f"profile '{profile}' is not YAML: {said}") from error
    sections = content.values() if isinstance(content, dict) else [content]
    if not all(isinstance(values or {}, dict) for values in sections):
        raise ValueError(f"profile '{profile}' must map 'all' and notebook names to parameters")
    content = {section: values or {} for section, values in content.items()}
    shared = content.pop("all", {})
    for name in shared:
        known(f"parameter of profile '{profile}'", name, names_in(declared))
    for stage, values in content.items():
        known(f"notebook in profile '{profile}'", stage, list(declared))
        for name in values:
            known(f"parameter of {stage} in profile '{profile}'", name, list(declared[stage]))
    settings = {}
    for stage, names in declared.items():
        settings[stage] = {name: value for name, value in shared.items() if name in names}
        settings[stage] |= content.get(stage, {})
    return settings


def absolute(name: str, value: object) -> object:
    """Paths as seen from here: the notebook runs in another folder."""
    is_file = name == "device_map" and value not in NAMED and not is_inline(value)
    if not (is_path(name) or is_file) or not value:
        return value
    if value in DATASETS or value in embedded.NAMES:
        return value  # ours is meant, not a folder that happens to have its name
    return str(Path(value).resolve()) if Path(value).exists() else value


def known(what: str, name: str, valid: list[str]) -> None:
    """``ValueError`` for a name that is not valid, with the nearest that is."""
    if name not in valid:
        near = difflib.get_close_matches(name, valid, n=1, cutoff=0)
        nearest = f"nearest is '{near[0] if near else ''}'"
        everything = f" (all: {', '.join(valid)})" if len(valid) <= 12 else ""
        raise ValueError(f"unknown {what} '{name}'; {nearest}{everything}")


def split_assignment(text: str) -> tuple[str, str]:
    """Name and value of ``name=value``."""
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
    """``value`` in the default's type, else ``ValueError``; an integer may stand for a float."""
    if type(default) is float and type(value) is int:
        return float(value)
    if type(value) is not type(default):
        wanted, found = type(default).__name__, type(value).__name__
        example = f"takes {wanted} (as in {default!r})"
        raise ValueError(f"parameter '{name}' {example}, not {found} {value!r}")
    return value


# ---------------------------------------------------------------------------------------- execution


def execute(stage: Stage, make_key: Callable[[], str], left: float) -> float:
    """Run one notebook; returns its seconds.

    Nothing is left where a finished notebook is expected unless it finished. The stamp says by
    which key it was made. Where ``make_key`` gives another one afterwards, something that the
    notebook depends on was changed while it ran. Nobody can tell what it was made by: it failed.
    """
    key, inputs = make_key(), made_from(stage)
    with locked(stage_lock(stage.folder), wait=PATIENCE):
        pass  # nobody is at work there: no notebook started by hand, no kernel of a killed run
    finished = stage.folder / f"{stage.name}.ipynb"
    failed = stage.folder / f"{stage.name}.failed.ipynb"
    stage.folder.mkdir(parents=True, exist_ok=True)
    for workspace in stage.folder.glob(f".{stage.name}.*"):  # left by a run that was killed
        shutil.rmtree(workspace, ignore_errors=True)
    for stale in (stage.stamp, finished, failed, *(stage.folder / name for name in stage.outputs)):
        stale.unlink(missing_ok=True)
    started = time.monotonic()
    log = stage.folder / f"{stage.name}.log"
    with complete_only(failed) as partial, log_to(log), status_line(stage.name, left):
        problem = problem_of(stage, partial)
        if not partial.exists():
            shutil.copyfile(stage.notebook, partial)
    if not problem and (missing := missing_outputs(stage)):
        problem = f"ended without writing {', '.join(missing)}"
    forget_sources()
    if not problem and (make_key() != key or made_from(stage) != inputs):
        what = "its notebook, the package, its data or its inputs"
        problem = f"was changed while it ran ({what}): run it again"
    if problem:
        raise RuntimeError(f"{stage.name} {problem} (executed notebook: {failed})")
    failed.replace(finished)
    seconds = time.monotonic() - started
    stamp = {"key": key, "seconds": round(seconds, 1), "inputs": inputs, "made": made(stage)}
    write_json(stage.stamp, stamp)
    return seconds


def problem_of(stage: Stage, executed: Path) -> str:
    """Execute a notebook into the file ``executed``; returns what went wrong, '' for nothing."""
    options = {"cwd": str(NOTEBOOKS), "progress_bar": False, "log_output": True}
    options |= {"kernel_name": "python3", "kernel_manager_class": ThisInterpreter}
    options |= {"extra_arguments": ["--log-level=ERROR"]}
    paths = literal(stage.notebook), literal(executed)
    try:
        papermill.execute_notebook(*paths, stage.parameters, **options)
        return skipped_cells(executed)
    except PapermillExecutionError as error:
        said = (error.evalue.strip().splitlines() or ["no message"])[-1]
        return f"failed in cell {error.exec_count}: {error.ename}: {said}"
    except DeadKernelError:
        return "lost its kernel (out of memory?)"


def literal(path: Path) -> str:
    """A path as papermill takes it for itself: it formats paths, so braces are doubled."""
    return str(path).replace("{", "{{").replace("}", "}}")


def skipped_cells(executed: Path) -> str:
    """What went wrong where not every code cell ran, '' where all did.

    ``sys.exit`` in a cell ends a notebook without an error.
    """
    cells = nbformat.read(executed, as_version=4).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    for number, cell in enumerate(code, 1):
        if cell.source.strip() and cell.execution_count is None:
            return f"stopped before cell {number}"
    return ""


def expected_seconds(stages: list[Stage]) -> dict[str, float]:
    """What every stage took here last time.

    Where one never ran here, what pipeline.yaml says, scaled to the speed of this machine.
    """
    found = {stage.name: read_stamp(stage).get("seconds") for stage in stages}
    if None not in found.values():
        return found
    reference, device = read_pipeline().get("machine"), precision.preferred_device()
    asked = (stage.parameters["dtype"] for stage in stages if "dtype" in stage.parameters)
    dtype = precision.dtype_named(next(asked, "auto"), device)
    times = machine.slowdown(reference, precision.computed_in(dtype), device) if reference else 1.0
    if reference:
        beside = "the one whose minutes are in pipeline.yaml"
        print(f"this machine takes about {times:.1f} times as long as {beside}", flush=True)
    for stage in stages:
        planned = 60 * stage.minutes.get(stage.parameters["profile"], stage.minutes["laptop"])
        found[stage.name] = found[stage.name] or times * planned
    return found


def run(stages: list[Stage], only: str = "", force: bool = False) -> None:
    """Execute what is not up to date, in order.

    With ``only``, these stages alone: their inputs have to be there. Without, all but those that
    run only when they are named. Raises ``InUse`` when another run is at work in the same folder.
    """
    wanted, alone = named(only), bool(only)
    selected = [
        stage for stage in stages if (stage.name in wanted if alone else not stage.only_named)
    ]
    if due(stages, selected, alone, force):  # a full disk could not even hold the lock
        require_space(selected[0].folder, SPACE)
    with locked(run_lock(selected[0].folder.parent)):
        todo = due(stages, selected, alone, force)  # again: another run may have finished meanwhile
        _run(stages, selected, todo, alone)


def due(stages: list[Stage], selected: list[Stage], alone: bool, force: bool) -> list[Stage]:
    """Those of the selected stages that are to be executed.

    ``ValueError`` when some that are run ``alone`` lack their inputs, or when these were changed.
    """
    if alone:
        for stage in selected:
            check_inputs(stage, [other for other in stages if other not in selected])
    keys = {stage.name: stage_key(stage, stages, as_made=alone) for stage in selected}
    return selected if force else outdated(selected, keys)


def check_inputs(stage: Stage, stages: list[Stage]) -> None:
    """``ValueError`` where inputs of a stage are not there, or not as they were made."""
    inputs = [other for other in stages if other.name in stage.inputs]
    absent = [other.name for other in inputs if not other.stamp.exists()]
    if absent:
        what = f"{stage.name} needs the results of {', '.join(absent)}"
        raise ValueError(f"{what}: run the whole profile first")
    for other in inputs:
        if changed := changed_since(other.folder):
            what = f"{changed[0]} of {other.name} was changed since it was made"
            raise ValueError(f"{what}: run {other.name} again first")


def _run(stages: list[Stage], selected: list[Stage], todo: list[Stage], alone: bool) -> None:
    expected = expected_seconds(todo)
    share = f"{len(todo)} of {len(selected)} notebooks"
    if todo:
        print(f"{share} to execute, about {clock(sum(expected.values()))}", flush=True)
    began, done = time.monotonic(), 0.0
    for stage in selected:
        if stage not in todo:
            print(f"{stage.name}  up to date: {shown(stage.folder)}")
            continue
        # The others will miss what is expected of them as the finished ones did.
        pace = (time.monotonic() - began) / done if done else 1.0
        left = pace * sum(expected[other.name] for other in todo[todo.index(stage) :])
        print(f"{stage.name}  started, about {clock(left)} to the end of the run", flush=True)
        seconds = execute(stage, lambda stage=stage: stage_key(stage, stages, as_made=alone), left)
        done += expected[stage.name]
        print(f"{stage.name}  done in {clock(seconds)}: {shown(stage.folder)}", flush=True)
    if todo:
        print(f"{share} executed in {clock(time.monotonic() - began)}")


def shown(path: Path) -> str:
    """A path as seen from the clone or folder that is worked in."""
    here = workplace()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)
