"""Plan the notebooks and execute them in order: strict parameters, resume, progress.

    ssah run --profile laptop
    ssah run --profile laptop --set safety_fraction=0.004
    ssah run --profile laptop --only 04_ablation --set n_random=10
    ssah run --profile qwen-1.5b --only 01_alignment,03_units,04_ablation

papermill alone would accept unknown parameters. Here everything is checked before a kernel starts.
"""

import ast
import difflib
import math
import time
from contextlib import ExitStack
from pathlib import Path

import yaml

from ssah_utils import embedded, precision
from ssah_utils.device_maps import NAMED, is_inline
from ssah_utils.files import NOTEBOOKS, require_space, workplace
from ssah_utils.locks import InUse, Lock
from ssah_utils.pipeline import machine, parameters
from ssah_utils.pipeline.execution import execute
from ssah_utils.pipeline.runs import declared_parameters, run_lock, turn_lock, with_commits
from ssah_utils.pipeline.stamps import (
    Stage,
    is_path,
    made_by,
    outdated,
    read_stamp,
    stage_key,
)
from ssah_utils.pipeline.status import clock
from ssah_utils.pipeline.stored import amiss
from ssah_utils.prompts.datasets import DATASETS

PATIENCE = 5  # seconds that the kernel of a killed run has to end
EVERY = "all"  # as a list of notebooks
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


def plan(
    profile: str,
    assignments: list[str],
    only: str = "",
    checked: bool = True,
    as_in: str = "",
    here: bool = True,
) -> list[Stage]:
    """All stages with their parameters.

    An assignment ``name=value`` comes before the profile, the profile before the notebook's
    default. Assignments go to the notebooks ``only``, separated by commas, when they are given;
    with ``as_in``, to those notebooks, of which ``only`` are then some, or to ``EVERY`` one.
    Raises ``ValueError`` for anything unknown or ill-typed. Where ``checked``, also for what no
    notebook could work with: then data sets and the configurations of models are read, and
    ``OSError`` says what memory does not hold of those that are to be executed, if that is
    ``here``. A model on the hub is named with its commit, so that all notebooks, keys and results
    mean the same one.
    """
    pipeline = read_pipeline()["stages"]
    names = [stage["name"] for stage in pipeline]
    asked = named(only)
    wanted = named(as_in.replace(EVERY, "")) if as_in else asked
    for name in (*asked, *wanted):
        known("notebook", name, names)
    if wanted and (others := set(asked) - set(wanted)):
        raise ValueError(f"--only has {min(others)}, which is none of --as-in {as_in}")
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
            work=tuple(entry.get("work", ())),
        )
        stages.append(stage)
    if checked and here:
        for stage in selected_of(stages, only):
            if stage.work:
                parameters.check_room_for(stage.name, stage.parameters)
    return stages


def named(text: str) -> list[str]:
    """The names in a list with commas; of ``--only``, none means all notebooks."""
    return [name.strip() for name in text.split(",") if name.strip()]


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
    """A command-line value in the type of the parameter's default; strings need no quotes, nor do
    those in a list, as in ``[cloze, boolq]``.
    """
    if isinstance(default, str):
        return text
    try:
        return ast.literal_eval(text.capitalize() if text in ("true", "false") else text)
    except (ValueError, SyntaxError):
        is_of_strings = isinstance(default, list) and default and isinstance(default[0], str)
        return _listed(text) if is_of_strings else text


def _listed(text: str) -> object:
    """A list as a profile writes it, of strings; any other text as it is."""
    try:
        value = yaml.load(text, yaml.BaseLoader)  # which makes no number or date of any of them
    except yaml.YAMLError:
        return text
    return value if isinstance(value, list) else text


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


def expected_seconds(
    stages: list[Stage], last: list[float | None], here: bool = True
) -> list[float]:
    """What every stage took the ``last`` time.

    Where one never ran, what pipeline.yaml says, scaled to the speed of this machine if it is
    ``here`` that it will run.
    """
    if None not in last:
        return last
    reference = read_pipeline().get("machine") if here else None
    device = precision.preferred_device()
    asked = (stage.parameters["dtype"] for stage in stages if "dtype" in stage.parameters)
    dtype = precision.dtype_named(next(asked, "auto"), device)
    times = machine.slowdown(reference, precision.computed_in(dtype), device) if reference else 1.0
    if reference:
        beside = "the one whose minutes are in pipeline.yaml"
        print(f"this machine takes about {times:.1f} times as long as {beside}", flush=True)
    planned = [
        stage.minutes.get(stage.parameters["profile"], stage.minutes["laptop"]) for stage in stages
    ]
    return [took or 60 * times * minutes for took, minutes in zip(last, planned, strict=True)]


def run(
    stages: list[Stage], only: str = "", force: bool = False, as_in: str = "", wait: bool = False
) -> None:
    """Execute what is not up to date, in order.

    With ``only``, these stages alone: their inputs have to be there, and where stages were planned
    ``as_in`` a run of more, as they were planned. Without, all but those that run only when they
    are named. Raises ``InUse`` when another run is at work in the same folder, unless told to
    ``wait``. Runs of other stages alone may be at work there.
    """
    alone, selected = bool(only), selected_of(stages, only)

    def todo() -> list[Stage]:
        if alone and as_in:
            check_planned(stages, selected, as_in)
        return due(stages, selected, alone, force)

    if todo():  # a full disk could not even hold the lock
        require_space(selected[0].folder, SPACE)
    locks = [run_lock(selected[0].folder.parent, shared=alone)]
    locks += [turn_lock(stage.folder) for stage in selected if alone]
    with ExitStack() as held:
        for lock in locks:  # in the order of the stages: two never wait for each other
            _take(lock, wait)
            held.callback(lock.release)
        # what is due, once more: another run may have finished meanwhile
        _run(stages, selected, todo(), alone, math.inf if wait else PATIENCE)


def _take(lock: Lock, wait: bool) -> None:
    try:
        lock.acquire()
    except InUse as error:
        if not wait:
            raise
        print(f"waiting: {error}", flush=True)
        lock.acquire(math.inf)


def selected_of(stages: list[Stage], only: str) -> list[Stage]:
    """The stages that ``only`` names; all that need not be named where it is empty."""
    wanted = named(only)
    return [stage for stage in stages if (stage.name in wanted if only else not stage.only_named)]


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
    """``ValueError`` where inputs of a stage are not there, or not as they were made.

    Nor may they be made from others than are there now: no run would have left both.
    """
    inputs = [other for other in stages if other.name in stage.inputs]
    absent = [other.name for other in inputs if not other.stamp.exists()]
    if absent:
        what = f"{stage.name} needs the results of {', '.join(absent)}"
        raise ValueError(f"{what}: run the whole profile first")
    for other in inputs:
        if what := amiss(other.folder):
            raise ValueError(f"{what} first")


def check_planned(stages: list[Stage], selected: list[Stage], as_in: str) -> None:
    """``ValueError`` where inputs of the selected stages are there, but not as they are planned.

    ``as_in``: the stages that were planned together, or ``EVERY`` one.
    """
    every = as_in == EVERY
    together = {stage.name for stage in stages} if every else set(named(as_in))
    needed = {name for stage in selected for name in stage.inputs} & together
    needed -= {stage.name for stage in selected}
    for other in [stage for stage in stages if stage.name in needed]:
        if read_stamp(other).get("key") != stage_key(other, stages, as_made=not every):
            what = f"{other.name} was not made as it is planned here, or is not there"
            raise ValueError(f"{what}: run {other.name} first")


def _run(
    stages: list[Stage], selected: list[Stage], todo: list[Stage], alone: bool, patience: float
) -> None:
    last = [read_stamp(stage).get("seconds") for stage in todo]
    seconds = expected_seconds(todo, last)
    expected = {stage.name: took for stage, took in zip(todo, seconds, strict=True)}
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

        def keys(stage: Stage = stage) -> dict[str, str]:
            return made_by(stage, stages, as_made=alone)

        seconds = execute(stage, keys, left, patience)
        done += expected[stage.name]
        print(f"{stage.name}  done in {clock(seconds)}: {shown(stage.folder)}", flush=True)
    if todo:
        print(f"{share} executed in {clock(time.monotonic() - began)}")


def shown(path: Path) -> str:
    """A path as seen from the clone or folder that is worked in."""
    here = workplace()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)
