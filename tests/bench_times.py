"""How long what people wait for takes here: ``python -m tests.bench_times`` writes times.json.

The minutes of a finished run (``make reproduce``) are read: in all, and of each notebook, beside
which another may have run. The other commands are run and timed once, as whole processes;
``--test`` also runs the tests. Nothing else should run meanwhile. A column for each kind of
machine, as in bench.json; what is not measured now stays.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ssah_utils.files import REFERENCE, ROOT, write_json
from ssah_utils.pipeline import run
from ssah_utils.pipeline.stored import find_run
from tests import bench

PAUSE = 60  # seconds between two notebooks after which a run was not one
SSAH = (sys.executable, "-m", "ssah_utils.pipeline.cli")


def seconds(*command: str, **environment: str) -> float:
    """Wall-clock seconds of a command in the project's folder; it must succeed."""
    started = time.perf_counter()
    outcome = subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    if outcome.returncode:
        said = (outcome.stdout + outcome.stderr).strip()  # pytest names what failed on the first
        raise RuntimeError(f"{' '.join(command)} failed: {said[-2000:]}")
    return time.perf_counter() - started


def notebook_minutes(folder: Path) -> dict[str, float]:
    """Minutes of every finished notebook of a run, from its stamps."""
    stamps = sorted(folder.glob("*/stamp.json"))
    return {
        path.parent.name: round(json.loads(path.read_text("utf-8"))["seconds"] / 60, 2)
        for path in stamps
    }


def wall_minutes(folder: Path, names: list[str]) -> float | None:
    """Minutes from the start of the first of these notebooks to the end of the last.

    Two may have run at a time. None where there was a pause in which none ran: then the run was
    interrupted, or a part of it was done again.
    """
    spans = []
    for name in names:
        stamp = folder / name / "stamp.json"
        end = stamp.stat().st_mtime
        spans.append((end - json.loads(stamp.read_text("utf-8"))["seconds"], end))
    first, last = sorted(spans)[0]
    for start, end in sorted(spans):
        if start > last + PAUSE:
            return None
        last = max(last, end)
    return (last - first) / 60


def unfinished(profile: str) -> str:
    """The first notebook that running the profile again would execute; else it is a no-op."""
    stages = run.plan(profile, [])
    late = run.due(stages, run.selected_of(stages, ""), alone=False, force=False)
    return late[0].name if late else ""


def measured(profile: str, with_tests: bool) -> dict:
    """``<profile>_minutes`` in all and by notebook, where it has run, and what every other command
    takes.
    """
    found = {"help_seconds": seconds(*SSAH, "--help")}
    if late := unfinished(profile):
        print(f"{late} is not up to date: make reproduce PROFILE={profile}, then this again")
    else:
        folder = find_run(profile, 0)
        names = [stage.name for stage in run.selected_of(run.plan(profile, []), "")]
        if minutes := wall_minutes(folder, names):
            found[f"{profile}_minutes"] = round(minutes, 1)
        found[f"{profile}_notebooks"] = notebook_minutes(folder)
        found["noop_seconds"] = seconds(*SSAH, "sweep", "--profile", profile)
    quick = (*SSAH, "run", "--profile", "qwen-0.5b", "--only", "00_quickstart")
    with tempfile.TemporaryDirectory() as folder:
        found["figures_seconds"] = seconds(*SSAH, "figures", "--to", folder)
        found["quickstart_seconds"] = seconds(*quick, SSAH_RUNS=folder)
    if with_tests:
        tests = (sys.executable, "-m", "pytest", "-q", "-n", "2", "--dist", "loadfile")
        found["test_minutes"] = round(seconds(*tests) / 60, 1)
    rounded = {name: round(value, 1) for name, value in found.items() if isinstance(value, float)}
    return found | rounded | {"machine": bench.processor()}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench_times")
    parser.add_argument("--profile", default="brief", help="whose finished run is read")
    parser.add_argument("--test", action="store_true", help="time the tests, too")
    options = parser.parse_args()
    path, kind = REFERENCE / "times.json", bench.kind_of_machine()
    stored = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    column = stored.get(kind, {}) | measured(options.profile, options.test)
    print(json.dumps(column, indent=1))
    write_json(path, stored | {kind: column})


if __name__ == "__main__":
    main()
