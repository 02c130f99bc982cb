"""Where results go and what is stored with them: run folders, locks, provenance.

Knows paths and tables. Does not know models or data sets.
"""

import ast
import gc
import hashlib
import json
import os
import platform
import random
import re
import resource
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from ssah_utils import device_maps, extras, hub, precision
from ssah_utils.files import (
    IN_WHEEL,
    LIBRARIES,
    NOTEBOOKS,
    ROOT,
    installed_versions,
    sha256_of_file,
    write_json,
)
from ssah_utils.judge.decisions import JUDGE
from ssah_utils.locks import Lock
from ssah_utils.pipeline import kernel
from ssah_utils.pipeline.parameters import check_room_for_training, check_trainable
from ssah_utils.pipeline.stored import runs_root

with extras.needed("notebooks"):
    from matplotlib.figure import Figure

PACKAGES = (*LIBRARIES, "datasets", "papermill", "scipy", "pandas", "scikit-learn")


def run_folder(profile: str, model: str, seed: int) -> Path:
    """Where the results of one profile, model and seed go.

    A model in a folder is told by its whole path: two folders may have the same name. One on the
    hub is told by its commit, shortened.
    """
    repository, commit = hub.split_name(model)
    is_pinned = bool(hub.COMMIT.fullmatch(commit))
    name = (f"{repository}@{commit[:12]}" if is_pinned else model).replace("/", "--")
    if Path(model).is_absolute():
        name = f"{Path(model).name}-{hashlib.sha256(model.encode()).hexdigest()[:8]}"
    return runs_root() / profile / name / f"seed-{seed}"


def with_commits(values: dict, asks: bool = True) -> dict:
    """Parameters in which each model and task of the hub is named with the commit that it means.

    ``asks``: the hub; else what is known on this machine has to do.
    """
    from ssah_utils.benchmarks import pinned_task, pinned_task_here  # slow to import

    model, task = (hub.pinned, pinned_task) if asks else (hub.pinned_here, pinned_task_here)
    found = {}
    for name, value in values.items():
        if name.endswith("model") and isinstance(value, str) and hub.is_name(value):
            found[name] = model(value)
        elif name == "utility_tasks":
            found[name] = [task(one) for one in value]
    return values | found


@dataclass(frozen=True)
class Run:
    """One execution of one notebook: its folder, its parameters, its clock."""

    stage: str
    folder: Path
    parameters: dict
    started: float = field(default_factory=time.monotonic)
    inputs: dict[str, str] = field(default_factory=dict)  # hashes of what earlier stages wrote

    def path(self, name: str) -> Path:
        """Where this stage writes a file."""
        return self.folder / name

    def upstream(self, stage: str, name: str) -> Path:
        """A file an earlier stage wrote; ``FileNotFoundError`` says which stage to run."""
        path = self.folder.parent / stage / name
        if not path.exists():
            command = f"ssah run --profile {self.folder.parents[2].name} --only {stage}"
            raise FileNotFoundError(f"{path} is missing: run {command} first")
        self.inputs[f"{stage}/{name}"] = sha256_of_file(path)
        return path

    def show(self, figure: Figure, name: str) -> Figure:
        """Save a figure as NAME.png and NAME.pdf, and return it for the cell to show."""
        from ssah_utils.figures.style import save_figure

        save_figure(figure, self.folder, name)
        return figure

    def finish(self, **tables: pd.DataFrame) -> None:
        """Write result.json: tidy tables, and how they came about.

        That is parameters, versions, machine, judge, commit, hashes of inputs, time and memory.
        """
        records = {}
        for name, table in tables.items():
            if not isinstance(table, pd.DataFrame):
                found = type(table).__name__
                raise TypeError(f"{self.stage}: '{name}' is no table, but a {found}")
            records[name] = json.loads(table.to_json(orient="records", double_precision=8))
        result = {
            "format": "ssah-result-1",
            "stage": self.stage,
            "parameters": self.parameters,
            "versions": versions(),
            "machine": machine(self.parameters),
            "judge": JUDGE,
            "commit": commit(),
            "inputs": self.inputs,
            "seconds": round(time.monotonic() - self.started, 1),
            "peak_memory_gib": peak_memory_gib(),
            "tables": records,
        }
        write_json(self.path("result.json"), result)
        if self.folder in _held:
            _held.pop(self.folder).release()
        print(f"{self.stage}: {', '.join(tables)} saved in {time.monotonic() - self.started:.0f} s")


def notebook_cells(notebook: Path) -> list[dict]:
    """The cells of a notebook of format 4, the source of each as one string.

    Read as JSON: importing nbformat takes seconds, also where nothing is to be executed.
    """
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return [cell | {"source": "".join(cell["source"])} for cell in cells]


def declared_parameters(notebook: Path) -> dict:
    """Names and defaults in the cell tagged ``parameters``; ``ValueError`` where there is none."""
    cells = notebook_cells(notebook)
    tagged = [cell for cell in cells if "parameters" in cell["metadata"].get("tags", [])]
    if not tagged:
        raise ValueError(f"{notebook.name} has no cell tagged 'parameters'")
    found = {}
    for node in ast.parse(tagged[0]["source"]).body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        try:
            found[target.id] = ast.literal_eval(node.value)
        except (AttributeError, ValueError):
            what = "the cell tagged 'parameters' holds more than names and values"
            raise ValueError(f"{notebook.name}: {what}") from None
    return found


def start(stage: str, values: dict) -> Run:
    """Begin a notebook: check its Python, lock its folder, seed every generator, set the style.

    What is there then, which is libraries, is not looked through for garbage any more.

    ``values``: the notebook's ``globals()``, from which every parameter that it declares is stored
    with the result, a model on the hub with its commit. Raises ``RuntimeError`` when another
    process is at work in the same folder.
    """
    kernel.check_kernel()
    declared = declared_parameters(NOTEBOOKS / f"{stage}.ipynb")
    if missing := [name for name in declared if name not in values]:
        what = f"{stage} declares '{missing[0]}', which has no value"
        raise ValueError(f"{what}: run the cell tagged 'parameters' first")
    parameters = with_commits({name: values[name] for name in declared})
    profile, model, seed = (parameters[name] for name in ("profile", "model", "seed"))
    check_trainable(stage, parameters)
    check_room_for_training(stage, parameters)
    from ssah_utils.figures.style import set_style  # imports seaborn, which planning does not need

    set_dtype(parameters.get("dtype", "auto"))
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    set_style()
    if not gc.get_freeze_count():  # a cell that is run again would keep what was loaded since
        gc.freeze()  # after every training garbage is collected, twice: half a second each else
    folder = run_folder(profile, model, seed) / stage
    folder.mkdir(parents=True, exist_ok=True)
    lock_stage(folder)
    device = f"{platform.machine()}, {torch.get_num_threads()} threads"
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    print(f"{stage} · profile {profile} · model {model} · seed {seed}")
    print(f"python {platform.python_version()} · torch {torch.__version__} · {device}")
    if asked := parameters.get("device_map"):
        print(f"device_map {device_maps.describe_map(asked)}")
    return Run(stage, folder, parameters)


# What the environment said of the precision before a notebook asked for another, and what it asked
# for.
_dtype_around: list[tuple[str, str]] = []


def set_dtype(asked: str) -> None:
    """Measure in the precision asked for.

    ``auto`` is what the environment says, also where an earlier notebook asked for another.
    """
    now = os.environ.get("SSAH_DTYPE", "")
    around = next((before for before, ours in _dtype_around if ours == now), now)
    _dtype_around[:] = [] if asked == "auto" else [(around, asked)]
    os.environ["SSAH_DTYPE"] = around if asked == "auto" else asked


# Locks of this process by folder, so that a cell can be run again. The system releases them when
# the process ends.
_held: dict[Path, Lock] = {}


def run_lock(folder: Path, shared: bool = False) -> Lock:
    """The lock of a run (one profile, model and seed), which the runner holds while it works.

    ``shared`` by runners that execute some of its notebooks alone, each under its ``turn_lock``.
    """
    return Lock(folder / ".lock", shared=shared)


def turn_lock(folder: Path) -> Lock:
    """The lock of one notebook's folder that a runner holds which executes it alone."""
    return Lock(folder.parent / f".{folder.name}.turn.lock")


def stage_lock(folder: Path) -> Lock:
    """The lock of one notebook's folder, which its kernel holds until it is finished."""
    return Lock(folder.parent / f".{folder.name}.lock", f"notebook {folder.name}")


def lock_stage(folder: Path) -> None:
    """Hold a notebook's folder for this process.

    Raises ``InUse`` when a run, or another kernel, is at work there.
    """
    if kernel.EXPECTED not in os.environ:  # started by hand: a runner may be at work
        whole = run_lock(folder.parent)
        whole.acquire()
        whole.release()
        # What the stamp stands for is about to be replaced.
        (folder / "stamp.json").unlink(missing_ok=True)
    lock = _held.setdefault(folder, stage_lock(folder))
    lock.acquire()


def peak_memory_gib() -> float:
    """Largest resident memory of this process so far, in GiB.

    From /proc where there is one (Linux): ``getrusage`` begins with the size of the process that
    started this one. It counts in KiB, on macOS in bytes.
    """
    status = Path("/proc/self/status")
    high = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    if high:
        return round(int(high[1]) / 2**20, 2)
    unit = 2**30 if sys.platform == "darwin" else 2**20
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 2)


def versions() -> dict[str, str]:
    """Of Python and of the libraries that results depend on."""
    return {"python": platform.python_version()} | installed_versions(PACKAGES)


def machine(parameters: dict) -> dict[str, object]:
    """What a number's last digits depend on: instruction set, threads, device and precision."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    found = {
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "device": device,
    }
    if "dtype" in parameters:
        dtype = precision.preferred_dtype(precision.preferred_device())
        found["dtype"] = str(dtype).removeprefix("torch.")
    if asked := parameters.get("device_map"):
        gpus = range(torch.cuda.device_count())
        found["devices"] = [*map(torch.cuda.get_device_name, gpus), "cpu", "disk"]
        found["device_map"] = device_maps.read_map(asked)
    return found


def commit() -> str:
    """Short commit of the clone, with '+' where it has changes; '' outside git.

    Also '' from a wheel, which may be installed inside of another project's repository.
    """
    if IN_WHEEL:
        return ""

    def git(*words: str) -> str:
        options = {"cwd": ROOT, "capture_output": True, "text": True, "check": True}
        return subprocess.run(["git", *words], **options).stdout.strip()

    try:
        changed = "+" if git("status", "--porcelain", "-uno") else ""
        return git("rev-parse", "--short", "HEAD") + changed
    except (OSError, subprocess.CalledProcessError):
        return ""
