"""The Python that executes a notebook: this interpreter with this copy of the package, whatever
kernels are installed.

A kernel is looked up by name on JUPYTER_PATH, where any ``python3`` may stand first: a notebook
would then run another interpreter, or another copy of the project, than the one its stamp speaks
of. Knows interpreters and folders, no notebook.
"""

import os
import sys
from pathlib import Path

from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager

from ssah_utils.files import IN_WHEEL, PACKAGE

EXPECTED = "SSAH_PYTHON"  # what the runner tells its kernels: interpreter and package folder


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
    return os.pathsep.join([sys.executable, str(PACKAGE)])


def environment() -> dict[str, str]:
    """What a kernel needs besides its parent's environment to import this copy of the package, and
    to prove it.

    An installed wheel is found anyway; site-packages put first would stand before the standard
    library.
    """
    inherited = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    path = [*inherited] if IN_WHEEL else [str(PACKAGE.parent), *inherited]
    return {EXPECTED: identity(), "PYTHONPATH": os.pathsep.join(dict.fromkeys(path))}


def check_kernel() -> None:
    """``RuntimeError`` when a notebook runs in another Python than its runner, or beside another
    copy of the package.
    """
    expected = os.environ.get(EXPECTED, identity())
    if expected != identity():
        raise RuntimeError(
            f"this kernel is {identity()}, but the runner is {expected}: it was not started by the"
            " runner"
        )
    beside = Path.cwd().parent / PACKAGE.name
    if Path.cwd().name == "notebooks" and beside.is_dir() and not beside.samefile(PACKAGE):
        raise RuntimeError(
            f"this kernel imports the package from {PACKAGE.parent}, but the notebook belongs to"
            f" {Path.cwd().parent}: start JupyterLab with `make lab`"
        )
