"""Keys and stamps: what a notebook's result depends on, and whether the one there was made from it.

A stamp is written last. It holds the key that the result was made by, and hashes of the inputs and
of all that was made. So nothing counts as up to date that was changed, mixed or half written. Knows
files; executes nothing.
"""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ssah_utils import precision
from ssah_utils.files import DATA, PACKAGE, ROOT, sha256_of, sha256_of_file
from ssah_utils.pipeline.runs import notebook_cells, run_folder, versions
from ssah_utils.pipeline.stored import hash_of, stamp_of

RUNNER = (  # what plans, runs, publishes and tells: no notebook imports it
    *("across_judges", "across_machines", "across_models", "cli", "commands", "doctor", "engine"),
    *("execution", "listing", "machine", "memory", "memory_plan", "publish", "redraw", "rejudge"),
    *("report", "result_tables", "run", "schedule", "speed_tables", "status", "summary", "sweep"),
)
NOT_IN_KEYS = (  # no result depends on them
    "data/README.md",
    *(f"ssah_utils/pipeline/{name}.py" for name in RUNNER),
)
# Parameters on which no number depends: the same products are computed wherever a matrix is kept,
# so a result stays up to date when a model moves to other devices. What it was is in the result.
CHANGE_NOTHING = ("device_map",)


@dataclass(frozen=True)
class Stage:
    """One notebook with the parameters it will get."""

    notebook: Path
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    minutes: dict[str, float]
    parameters: dict
    # Files of the package or of data/ that no other stage depends on.
    own_files: tuple[str, ...] = ()
    # Whether it also reads what runs with other seeds have stored.
    every_seed: bool = False
    # Whether it runs only when it is named: nothing follows from it.
    only_named: bool = False
    # What takes memory in it: of ``memory_plan.LOOKING`` and ``memory_plan.TRAINING``.
    work: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.notebook.stem

    @property
    def folder(self) -> Path:
        profile, model, seed = (self.parameters[name] for name in ("profile", "model", "seed"))
        return run_folder(profile, model, seed) / self.name

    @property
    def stamp(self) -> Path:
        return self.folder / "stamp.json"


def stage_key(stage: Stage, stages: list[Stage], as_made: bool = False) -> str:
    """Hash of all that a stage's result depends on: code, package, data, parameters, inputs.

    Inputs count by the keys that are planned for them; with ``as_made``, by those in their stamps.
    """
    inputs = [other for other in stages if other.name in stage.inputs]
    if as_made:
        upstream = [read_stamp(other).get("key") for other in inputs]
    else:
        upstream = [stage_key(other, stages) for other in inputs]
    content = [*_own_content(stage, stages), upstream, versions(), dtype_of(stage)]
    return sha256_of([*content, results_of_other_seeds(stage)] if stage.every_seed else content)


def key_without_seed(stage: Stage, stages: list[Stage], as_made: bool = False) -> str:
    """The same for all seeds that were made by the same code, package, data, and libraries.

    ``stage_key`` without what a seed or a machine has of its own: the seed, what other seeds have
    stored, and the precision that is meant here.
    """
    inputs = [other for other in stages if other.name in stage.inputs]
    if as_made:
        upstream = [read_stamp(other).get("without_seed") for other in inputs]
    else:
        upstream = [key_without_seed(other, stages) for other in inputs]
    return sha256_of([*_own_content(stage, stages, but=("seed",)), upstream, versions()])


def _own_content(stage: Stage, stages: list[Stage], but: tuple[str, ...] = ()) -> list:
    """What a stage depends on beside its inputs and the machine, but for some parameters."""
    foreign = {name for other in stages for name in other.own_files} - set(stage.own_files)
    package = {name: content for name, content in package_source().items() if name not in foreign}
    left_out = (*CHANGE_NOTHING, *but)
    counted = {name: one for name, one in stage.parameters.items() if name not in left_out}
    return [notebook_source(stage.notebook), package, counted, named_files(stage)]


def made_by(stage: Stage, stages: list[Stage], as_made: bool) -> dict[str, str]:
    """What a stamp says that its stage was made by: its key, and the one without the seed."""
    key = stage_key(stage, stages, as_made)
    return {"key": key, "without_seed": key_without_seed(stage, stages, as_made)}


def dtype_of(stage: Stage) -> str:
    """The precision that is meant on this machine, '' where a stage has no say in it.

    ``auto`` may mean another one elsewhere: a run folder taken there is then not up to date.
    """
    if "dtype" not in stage.parameters:
        return ""
    return str(precision.dtype_named(stage.parameters["dtype"], precision.preferred_device()))


def results_of_other_seeds(stage: Stage) -> dict[str, str]:
    """Hashes of the results of its inputs that runs with other seeds have finished.

    These runs are of the same profile and model.
    """
    run, found = stage.folder.parent, {}
    for name in stage.inputs:
        for path in run.parent.glob(f"seed-*/{name}/result.json"):
            if run not in path.parents and path.with_name("stamp.json").exists():
                found[f"{path.parts[-3]}/{name}"] = sha256_of_file(path)
    return found


def is_path(name: str) -> bool:
    """Whether a parameter may name a file or folder."""
    return name == "chat_template" or name.endswith(("_data", "model"))


def named_files(stage: Stage) -> dict[str, object]:
    """Content of the files that parameters name, and what tells one model folder from another."""
    found: dict[str, object] = {}
    for name, value in stage.parameters.items():
        path = Path(value) if is_path(name) and value.startswith("/") else None
        if path and path.is_file():
            found[value] = sha256_of_file(path)
        elif path and path.is_dir():
            found[value] = signature(path)
    return found


@cache
def notebook_source(notebook: Path) -> list[str]:
    """What stands in a notebook's code cells."""
    cells = notebook_cells(notebook)
    return [cell["source"] for cell in cells if cell["cell_type"] == "code"]


@cache
def package_source() -> dict[str, str]:
    """Hashes of all files of the package and of data/ that a result may depend on.

    By their places in a clone, also where a wheel is installed.
    """
    code = {path.relative_to(PACKAGE.parent).as_posix(): path for path in PACKAGE.rglob("*.py")}
    data = {path.relative_to(ROOT).as_posix(): path for path in DATA.glob("*.*")}
    places = code | data
    in_keys = sorted(places.keys() - set(NOT_IN_KEYS))
    return {place: sha256_of_file(places[place]) for place in in_keys}


def forget_sources() -> None:
    """Read notebooks, package and data anew the next time."""
    for read in (notebook_source, package_source):
        read.cache_clear()


def read_stamp(stage: Stage) -> dict:
    """What a finished stage left, else nothing."""
    return stamp_of(stage.folder)


def made_from(stage: Stage) -> dict[str, str]:
    """A hash for each of a stage's inputs as it is now: of its key and of what came out."""
    found = {}
    for name in stage.inputs:
        folder = stage.folder.parent / name
        stamp = stamp_of(folder)
        outputs = stamp.get("made", {}).get("outputs", {})
        found[name] = sha256_of([stamp.get("key"), {one: hash_of(folder / one) for one in outputs}])
    return found


def made(stage: Stage) -> dict[str, object]:
    """What a finished stage's stamp stands for: its outputs, its notebook, its trained models."""
    outputs = {name: sha256_of_file(stage.folder / name) for name in stage.outputs}
    notebook = sha256_of_file(stage.folder / f"{stage.name}.ipynb")
    trained = {place: signature(Path(place)) for place in trained_models(stage)}
    return {"outputs": outputs, "notebook": notebook, "models": trained}


def is_current(stage: Stage, key: str) -> bool:
    """Whether a stage was made by ``key``, and neither its inputs nor what it made have changed."""
    stamp = read_stamp(stage)
    if stamp.get("key") != key or stamp.get("inputs") != made_from(stage):
        return False
    try:
        return stamp.get("made") == made(stage)
    except (OSError, ValueError):
        return False


def missing_outputs(stage: Stage) -> list[str]:
    """Outputs that are not there; also trained models that models.json points to in the cache."""
    missing = [name for name in stage.outputs if not (stage.folder / name).exists()]
    return missing or [place for place in trained_models(stage) if not Path(place).exists()]


def trained_models(stage: Stage) -> list[str]:
    """Folders in the cache that a stage's models.json points to."""
    if "models.json" not in stage.outputs:
        return []
    places = json.loads((stage.folder / "models.json").read_text(encoding="utf-8")).values()
    return [place for place in places if Path(place).is_absolute()]


def signature(folder: Path) -> list[list[str | int]]:
    """Names, sizes and times of the files in a folder.

    They show that a large file was changed without reading it.
    """
    found: list[list[str | int]] = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        about = path.stat()
        found.append([str(path.relative_to(folder)), about.st_size, about.st_mtime_ns])
    return found


def outdated(selected: list[Stage], keys: dict[str, str]) -> list[Stage]:
    """Stages to execute: what is not up to date, and what follows from it."""
    found: list[Stage] = []
    for stage in selected:
        follows = any(other.name in stage.inputs for other in found)
        if follows or not is_current(stage, keys[stage.name]):
            found.append(stage)
    return found
