"""What this machine and installation have and lack for the notebooks, in plain words: ``ssah
doctor``.

Every check gives what was found and, where something is missing, what to do. Nothing is fetched and
no model is loaded.
"""

import asyncio
import json
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec

from ssah_utils import assets, embedded, extras, files
from ssah_utils.display import first_line

GIB = 2**30
DISK_NEEDED = 6 * GIB  # two embedded models as float32, trained models and results
SPEED_SECONDS, KERNEL_TIMEOUT = 1.0, 60


@dataclass(frozen=True)
class Finding:
    """One check. ``state``: ok, ``note`` (works, but slower or with less), or ``missing``."""

    what: str
    state: str
    said: str
    to_do: str = ""

    def __str__(self) -> str:
        line = f"{self.state:8} {self.what:10} {self.said}"
        return f"{line}: {self.to_do}" if self.to_do else line


def python() -> Iterator[Finding]:
    """The interpreter, and which copy of the package it imports."""
    said = f"Python {platform.python_version()}, package in {files.PACKAGE.parent}"
    too_old = sys.version_info < (3, 11)
    to_do = "install Python 3.11 or newer" if too_old else ""
    yield Finding("python", "missing" if too_old else "ok", said, to_do)


def libraries() -> Iterator[Finding]:
    """Extras of the package, and what each lacks."""
    for extra in extras.EXTRAS:
        absent = extras.absent(extra)
        if not absent:
            yield Finding("library", "ok", f"[{extra}] is installed")
            continue
        state = "missing" if extra in extras.NEEDED else "note"
        said = f"[{extra}] lacks {', '.join(absent)}"
        yield Finding("library", state, said, extras.how_to_install(extra))


def kernel() -> Iterator[Finding]:
    """Whether a notebook can be executed: the kernel that the runner takes is started and asked."""
    if any(find_spec(name) is None for name in ("ipykernel", "papermill")):
        how = extras.how_to_install("notebooks")
        yield Finding("kernel", "missing", "no Jupyter kernel", how)
        return
    try:
        asyncio.run(_start_kernel())
    except Exception as error:  # whatever keeps a kernel from starting is what is asked for
        said = f"a kernel does not start ({type(error).__name__}: {first_line(error)})"
        yield Finding("kernel", "missing", said, "pip install --force-reinstall ipykernel")
        return
    yield Finding("kernel", "ok", "a Jupyter kernel starts and answers")


async def _start_kernel() -> None:
    from ssah_utils.pipeline.kernel import ThisInterpreter

    manager = ThisInterpreter()
    silent = subprocess.DEVNULL
    await manager.start_kernel(stdout=silent, stderr=silent)
    try:
        client = manager.client()
        client.start_channels()
        await client.wait_for_ready(timeout=KERNEL_TIMEOUT)
        client.stop_channels()
    finally:
        await manager.shutdown_kernel(now=True)


def processor() -> Iterator[Finding]:
    """Cores, precision, speed, and how long the first notebook will take."""
    import torch

    from ssah_utils import precision, room
    from ssah_utils.pipeline import machine, run, sweep

    n_cores, at_a_time = sweep.n_cores(), sweep.at_a_time_by_cores()
    free = room.free_memory()
    if free is not None and free < 2 * measured_peak():
        at_a_time = 1
    device = precision.preferred_device()
    dtype = precision.native_dtype(device)
    name = str(dtype).removeprefix("torch.")
    pipeline = run.read_pipeline()
    speed = machine.gflops(dtype, device, SPEED_SECONDS)
    times = machine.slowdown(pipeline["machine"], dtype, device)
    stages = {stage["name"]: stage for stage in pipeline["stages"]}
    first = stages["00_quickstart"]["minutes"]["laptop"]
    whole = sweep.expected([s for s in stages.values() if not s.get("only_named")], at_a_time)
    said = f"{n_cores} cores, {name} at {speed:.0f} GFLOP/s"
    said += f"; busy as it is now, make quickstart about {times * first:.0f} minutes"
    said += f", make reproduce about {times * whole:.0f}"
    yield Finding("processor", "ok" if times < 2 else "note", said)
    if dtype is torch.float32:
        yield Finding("bf16", "note", "no native bfloat16, so all is computed in float32")


def gpu() -> Iterator[Finding]:
    import torch

    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            about = torch.cuda.get_device_properties(number)
            yield Finding("gpu", "ok", f"{about.name}, {about.total_memory / GIB:.0f} GiB")
    elif shutil.which("nvidia-smi"):
        built = torch.version.cuda or "no CUDA"
        said = f"there is a GPU, but torch {torch.__version__} ({built}) does not see it"
        yield Finding("gpu", "note", said, "install a torch build for your CUDA version")
    else:
        yield Finding("gpu", "note", "none; ssah plan says what of a larger model fits here")


def memory() -> Iterator[Finding]:
    from ssah_utils import room

    free = room.free_memory()
    if free is None:
        yield Finding("memory", "note", "cannot be told on this system")
        return
    needed = measured_peak()
    enough = free >= needed
    said = f"{free / GIB:.1f} GiB free, the laptop profile takes up to {needed / GIB:.1f}"
    to_do = "" if enough else "close other programs; ssah plan says what each notebook needs"
    yield Finding("memory", "ok" if enough else "missing", said, to_do)


def measured_peak() -> float:
    """Bytes that the hungriest notebook of the stored laptop run has taken."""
    stored = (
        json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(files.REFERENCE.glob("*/result.json"))
    )
    return GIB * max((result.get("peak_memory_gib") or 0.0 for result in stored), default=0.0)


def disk() -> Iterator[Finding]:
    """Where downloads and results go, and the room there."""
    from ssah_utils.pipeline.stored import runs_root

    places = {"SSAH_CACHE": files.cache_dir(), "SSAH_RUNS": runs_root()}
    for variable, folder in places.items():
        free = files.free_space(folder)
        enough = free >= DISK_NEEDED
        said = f"{free / GIB:.1f} GiB free for {folder} ({variable})"
        to_do = "" if enough else f"free some, or point {variable} to another disk"
        yield Finding("disk", "ok" if enough else "missing", said, to_do)


def downloads() -> Iterator[Finding]:
    """What is here already of data sets and embedded models."""
    of_models = {
        package: model.name for model in embedded.MODELS.values() for package, _ in model.parts
    }
    data = [package for package in assets.WHEELS if package not in of_models]
    absent = [package for package in data if not assets.path_of(package).exists()]
    said = f"{len(data) - len(absent)} of {len(data)} data sets are here"
    to_do = "ssah download fetches them" if absent else ""
    yield Finding("data", "note" if absent else "ok", said, to_do)
    for model in embedded.MODELS.values():
        if all(assets.path_of(package).exists() for package, _ in model.parts):
            yield Finding("model", "ok", f"{model.name} is here")
    if not assets.path_of(embedded.MODELS[embedded.DEFAULT].parts[0][0]).exists():
        yield Finding(
            "model", "note", f"{embedded.DEFAULT} is not here", "ssah download fetches it"
        )


def hub() -> Iterator[Finding]:
    from ssah_utils import hub

    if hub.answers():
        yield Finding("hub", "ok", "the Hugging Face hub answers")
    else:
        said = "no Hugging Face hub: embedded models, folders and what was fetched before work"
        yield Finding("hub", "note", said)


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    *(python, libraries, kernel, processor, gpu, memory, disk, downloads, hub),
)


def examine() -> Iterator[Finding]:
    """All findings, as they come; a check that fails itself is a finding, too."""
    for check in CHECKS:
        try:
            yield from check()
        except Exception as error:  # one broken part must not hide the others
            name = check.__name__
            yield Finding(
                name, "missing", f"cannot be examined ({type(error).__name__}: {first_line(error)})"
            )
