"""The Python that executes a notebook: this interpreter, with this copy of the package.

Jupyter looks a kernel up by name on JUPYTER_PATH, where any ``python3`` may stand first. A notebook
could then run in another interpreter, or with another copy of the project, than its stamp says.
Knows interpreters and folders, no notebook.
"""

import os
import sys
from pathlib import Path

from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager

from ssah_utils.files import IN_WHEEL, PACKAGE

EXPECTED = "SSAH_PYTHON"  # what the runner tells its kernels: interpreter and package folder
# How often a thread of GNU's OpenMP looks whether the others are done before it sleeps. Its own
# 300,000 last for milliseconds, in each of a thousand operations of a training step: two trainings
# on the same two cores took thirty times as long as one. With this, less than three times, and one
# alone hardly longer.
SPINS = ("GOMP_SPINCOUNT", "10000")


class ThisInterpreter(AsyncKernelManager):
    """Starts ipykernel in the interpreter that is running now; no kernel is looked up."""

    @property
    def kernel_spec(self) -> KernelSpec:
        return KernelSpec(
            argv=[sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
            display_name="this interpreter",
            language="python",
            env=environment(),
        )


def identity() -> str:
    """Which Python this is: its interpreter and its copy of the package."""
    return os.pathsep.join([sys.executable, str(PACKAGE)])


def environment() -> dict[str, str]:
    """What a kernel needs to import this copy of the package, to prove that it did, and to share
    cores with others.

    An installed wheel is found without help. Its folder must not be put on the path: packages that
    are installed there would then come before the standard library.
    """
    path = [place for place in os.environ.get("PYTHONPATH", "").split(os.pathsep) if place]
    if not IN_WHEEL:
        path.insert(0, str(PACKAGE.parent))
    name, number = SPINS
    return {
        EXPECTED: identity(),
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(path)),
        name: os.environ.get(name, number),
    }


def check_kernel() -> None:
    """``RuntimeError`` where this is not the Python, or the copy of the package, that is meant."""
    expected = os.environ.get(EXPECTED, identity())
    if expected != identity():
        differing = f"this kernel is {identity()}, but the runner is {expected}"
        raise RuntimeError(f"{differing}: it was not started by the runner")
    beside = Path.cwd().parent / PACKAGE.name
    if Path.cwd().name == "notebooks" and beside.is_dir() and not beside.samefile(PACKAGE):
        imported = f"this kernel imports the package from {PACKAGE.parent}"
        belongs = f"the notebook belongs to {Path.cwd().parent}"
        raise RuntimeError(f"{imported}, but {belongs}: start JupyterLab with `make lab`")
