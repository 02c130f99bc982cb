"""The package as a user has it: a built wheel in a fresh environment, outside of the clone.

Libraries are taken from the environment that runs the tests, so nothing is fetched.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from ssah_utils import unit_files
from ssah_utils.files import REFERENCE, ROOT
from ssah_utils.pipeline import redraw, stamps
from ssah_utils.pipeline.stored import load_result
from tests.test_door import ABLATE_AND_FREEZE

pytestmark = pytest.mark.wheel


def tracked(*folders: str) -> list[str]:
    command = ["git", "ls-files", "-z", *folders]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return [name for name in listed.stdout.split("\0") if name and (ROOT / name).exists()]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from what is committed alone: setuptools would leave its build folder in the clone."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("built")
    for name in tracked():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, source / name)
    pip("wheel", "--no-build-isolation", "--wheel-dir", str(built), str(source))
    (path,) = built.glob("*.whl")
    return path


def pip(command: str, *words: str, python: str = sys.executable) -> None:
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "--python", python, command),
            *("--quiet", "--disable-pip-version-check", "--no-deps", "--no-index", *words),
        ],
        check=True,
    )


class Installed:
    """An environment that holds the wheel, and an empty folder to work in."""

    def __init__(self, folder: Path, wheel: Path) -> None:
        self.bin, self.work = folder / "venv" / "bin", folder / "work"
        self.work.mkdir()
        command = [sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")]
        subprocess.run(command, check=True)
        # as a path on a line of its own: the link to the clone that lies there takes no effect
        (packages,) = (folder / "venv" / "lib").glob("*/site-packages")
        (packages / "libraries.pth").write_text(sysconfig.get_path("purelib"))
        pip("install", str(wheel), python=str(self.bin / "python"))

    def run(self, command: str, *words: str) -> subprocess.CompletedProcess:
        kept = {
            name: value
            for name, value in os.environ.items()
            if name not in ("PYTHONPATH", "SSAH_RUNS")
        }
        return subprocess.run(
            [str(self.bin / command), *words],
            cwd=self.work,
            env=kept | {"HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            check=False,
        )

    def python(self, code: str, *words: str) -> str:
        outcome = self.run("python", "-c", code, *words)
        assert outcome.returncode == 0, outcome.stderr
        return outcome.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory, wheel) -> Installed:
    return Installed(tmp_path_factory.mktemp("installed"), wheel)


def test_a_wheel_holds_all_that_is_committed_of_package_data_and_notebooks_and_is_small(wheel):
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    places = {
        name if name.startswith("ssah_utils/") else f"ssah_utils/project/{name}"
        for name in tracked("ssah_utils", "data", "notebooks")
    }
    assert held == places
    # scores of all units of three models are half of it, and notebooks come with their figures
    assert wheel.stat().st_size < 8 * 2**20


def test_the_installed_package_knows_its_files_and_works_in_the_current_folder(installed):
    code = (
        "import json\nfrom ssah_utils import files\n"
        "from ssah_utils.pipeline import runs, stamps, stored\n"
        "print(json.dumps([str(files.PACKAGE), str(stored.runs_root()), runs.commit(),"
        " stamps.package_source()]))"
    )
    package, root, commit, source = json.loads(installed.python(code))
    assert Path(package).is_relative_to(installed.bin.parent)
    assert root == str(installed.work / "runs") and commit == ""
    assert source == stamps.package_source(), "results of a clone are up to date, and vice versa"


def test_help_and_list_tell_what_there_is(installed):
    assert "publish" in installed.run("ssah", "--help").stdout
    outcome = installed.run("ssah", "list", "--profile", "smoke")
    assert outcome.returncode == 0, outcome.stderr
    assert "01_alignment" in outcome.stdout and "advbench" in outcome.stdout


def test_figures_are_drawn_from_the_results_that_come_with_it(installed):
    outcome = installed.run("ssah", "figures")
    assert outcome.returncode == 0, outcome.stderr
    drawn = {path.stem for path in (installed.work / "figures").glob("*.png")}
    stages = [one for one in redraw.FIGURES if (REFERENCE / one / "result.json").exists()]
    expected = set()
    for stage in stages:
        tables = load_result(REFERENCE / stage / "result.json")["tables"]
        there = [name for name, table in tables.items() if len(table)]
        for name in redraw.FIGURES[stage]:
            if redraw.MAY_LACK.get(name, there[0]) in there:
                expected.add(name)
    quick = set(redraw.FIGURES["00_quickstart"])  # of another model's results
    assert drawn == expected | quick | {"ablation_by_model", "cost_growth"}


def test_units_are_ablated_frozen_saved_and_read(installed):
    said = installed.python(f"import sys\nHIDDEN = set()\n{ABLATE_AND_FREEZE}", "-", "set")
    assert said == "done []\n"
    code = (
        "from ssah_utils import files, unit_files\n"
        "place = files.REFERENCE / '03_units' / 'units.safetensors'\n"
        "parted, _ = unit_files.load_partition(place)\n"
        "print(parted.units('safety').count())"
    )
    parted, _ = unit_files.load_partition(REFERENCE / "03_units" / "units.safetensors")
    assert int(installed.python(code)) == parted.units("safety").count() > 0


def test_a_notebook_runs_and_leaves_its_results_in_the_current_folder(installed):
    outcome = installed.run("ssah", "run", "--profile", "smoke", "--only", "01_alignment")
    assert outcome.returncode == 0, outcome.stderr
    assert list((installed.work / "runs" / "smoke").glob("*/seed-0/01_alignment/result.json"))


def test_publishing_needs_a_clone(installed):
    outcome = installed.run("ssah", "publish", "--profile", "smoke")
    assert outcome.returncode == 1
    assert outcome.stderr == (
        "error: publishing writes into a clone of the project: run it there\n"
    )
