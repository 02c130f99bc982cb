"""Execute one notebook through papermill: it is finished, with a stamp, or absent.

papermill alone would leave half-executed notebooks behind and take ``sys.exit(0)`` for success.
Here a stage is done only when its stamp exists, which is written last. Knows one stage; does not
know which others are due.
"""

import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import torch

from ssah_utils.files import complete_only, write_json
from ssah_utils.locks import locked
from ssah_utils.pipeline.runs import notebook_cells, stage_lock
from ssah_utils.pipeline.stamps import (
    Stage,
    forget_sources,
    made,
    made_from,
    missing_outputs,
)
from ssah_utils.pipeline.status import log_to, status_line


def execute(
    stage: Stage, made_by: Callable[[], dict[str, str]], left: float, patience: float = math.inf
) -> float:
    """Run one notebook; returns its seconds.

    Nothing is left where a finished notebook is expected unless it finished. The stamp says by
    which keys it was made. Where ``made_by`` gives others afterwards, something that the notebook
    depends on was changed while it ran. Nobody can tell what it was made by: it failed.
    """
    keys, inputs = made_by(), made_from(stage)
    with locked(stage_lock(stage.folder), wait=patience):
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
    if not problem and (made_by() != keys or made_from(stage) != inputs):
        what = "its notebook, the package, its data or its inputs"
        problem = f"was changed while it ran ({what}): run it again"
    if problem:
        raise RuntimeError(f"{stage.name} {problem} (executed notebook: {failed})")
    failed.replace(finished)
    seconds = time.monotonic() - started
    took = {"seconds": round(seconds, 1), "threads": torch.get_num_threads()}
    write_json(stage.stamp, {**keys, **took, "inputs": inputs, "made": made(stage)})
    return seconds


def problem_of(stage: Stage, executed: Path) -> str:
    """Execute a notebook into the file ``executed``; returns what went wrong, '' for nothing."""
    # here, as a run that has nothing to do should not wait for these imports
    import papermill
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    from ssah_utils.pipeline.kernel import ThisInterpreter

    options = {"cwd": str(stage.notebook.parent), "progress_bar": False, "log_output": True}
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
    code = [cell for cell in notebook_cells(executed) if cell["cell_type"] == "code"]
    for number, cell in enumerate(code, 1):
        if cell["source"].strip() and cell["execution_count"] is None:
            return f"stopped before cell {number}"
    return ""
