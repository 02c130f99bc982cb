"""The doctor says what is missing, in one line each with what to do, and finds it where it is."""

import pytest

from ssah_utils import extras, files, room
from ssah_utils.pipeline import cli, doctor, machine, run, sweep


def found(check) -> list[doctor.Finding]:
    return list(check())


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(doctor, "SPEED_SECONDS", 0.01)


def test_everything_is_here_where_the_tests_run(capsys, monkeypatch):
    # Room is what the machine has today, not what was installed: a full disk is the next tests'.
    monkeypatch.setattr(room, "free_memory", lambda: 900 * doctor.GIB)
    monkeypatch.setattr(files, "free_space", lambda folder: 900 * doctor.GIB)
    assert cli.main(["doctor"]) == 0
    *findings, last = capsys.readouterr().out.splitlines()
    assert last == "everything that the notebooks need is here"
    assert {line.split()[0] for line in findings} <= {"ok", "note"}
    for name in ("python", "library", "kernel", "processor", "gpu", "memory", "disk", "hub"):
        assert any(line.split()[1] == name for line in findings), name


@pytest.mark.parametrize(
    ("extra", "library", "state"),
    [
        ("notebooks", "papermill", "missing"),
        ("train", "trl", "missing"),
        ("quantised", "bitsandbytes", "note"),
        ("sweep", "snakemake", "note"),
    ],
)
def test_an_extra_that_is_not_there_is_named_with_the_way_to_get_it(
    extra, library, state, monkeypatch
):
    there = extras.find_spec
    monkeypatch.setattr(extras, "find_spec", lambda name: None if name == library else there(name))
    (lacking,) = (one for one in found(doctor.libraries) if one.to_do)
    assert lacking.state == state and library in lacking.said
    assert lacking.to_do == f'pip install "ssah-utils[{extra}]"'
    assert len(found(doctor.libraries)) == len(extras.EXTRAS)


@pytest.mark.parametrize("extra", extras.EXTRAS)
def test_what_is_missing_is_what_a_run_refuses_to_start_without(extra, monkeypatch, capsys):
    (library, *_) = sorted(
        extras.EXTRAS[extra],
        key=lambda name: sum(name in of_one for of_one in extras.EXTRAS.values()),
    )
    there = extras.find_spec
    monkeypatch.setattr(extras, "find_spec", lambda name: None if name == library else there(name))
    is_missing = "missing" in {one.state for one in found(doctor.libraries)}
    monkeypatch.setattr(run, "plan", lambda *words, **options: [])
    monkeypatch.setattr(run, "run", lambda *words: None)
    assert cli.main(["run", "--profile", "smoke"]) == is_missing
    assert (f"{library} is not installed" in capsys.readouterr().err) == is_missing


def test_a_kernel_that_does_not_start_is_said(monkeypatch):
    from ssah_utils.pipeline import kernel

    class Broken(kernel.ThisInterpreter):
        async def start_kernel(self, **how):
            raise RuntimeError("no such file\nin line 3")

    monkeypatch.setattr(kernel, "ThisInterpreter", Broken)
    (finding,) = found(doctor.kernel)
    assert finding.state == "missing" and "RuntimeError: no such file)" in finding.said
    assert "ipykernel" in finding.to_do and "\n" not in str(finding)


@pytest.mark.parametrize(
    ("free", "state"), [(doctor.GIB, "missing"), (900 * doctor.GIB, "ok"), (None, "note")]
)
def test_memory_is_held_against_what_the_stored_run_took(free, state, monkeypatch):
    monkeypatch.setattr(room, "free_memory", lambda: free)
    (finding,) = found(doctor.memory)
    assert finding.state == state and bool(finding.to_do) == (state == "missing")
    assert 2 * doctor.GIB < doctor.measured_peak() < 24 * doctor.GIB


def test_a_full_disk_is_named_by_the_variable_that_moves_it(monkeypatch, tmp_path):
    monkeypatch.setenv("SSAH_RUNS", str(tmp_path))
    monkeypatch.setattr(
        files, "free_space", lambda folder: 0 if folder == tmp_path else 900 * doctor.GIB
    )
    cache, runs = found(doctor.disk)
    assert cache.state == "ok" and runs.state == "missing"
    assert "SSAH_RUNS" in runs.to_do and str(tmp_path) in runs.said


def test_data_that_were_never_fetched_are_said_and_none_is_fetched(monkeypatch, tmp_path):
    monkeypatch.setenv("SSAH_CACHE", str(tmp_path))
    data, model = found(doctor.downloads)
    assert data.state == model.state == "note" and "0 of" in data.said
    assert "ssah download" in data.to_do and not list(tmp_path.rglob("*.whl"))


def test_one_check_that_fails_hides_no_other(monkeypatch, capsys):
    def broken():
        raise OSError("the disk is on fire\nand so on")
        yield

    monkeypatch.setattr(doctor, "CHECKS", (broken, doctor.python))
    assert cli.main(["doctor"]) == 1
    first, second, last = capsys.readouterr().out.splitlines()
    assert first.startswith("missing  broken") and "OSError: the disk is on fire)" in first
    assert second.startswith("ok       python") and last == "1 missing"


def test_reproduce_is_expected_to_take_as_long_as_a_sweep_says(monkeypatch):
    """With one core all notebooks one after the other; with two in less, but not in half of it."""
    stages = [one for one in run.read_pipeline()["stages"] if not one.get("only_named")]
    in_turn = sum(one["minutes"]["brief"] for one in stages)
    assert sweep.expected(stages, 1) == pytest.approx(in_turn)
    assert in_turn / 2 < sweep.expected(stages, 2) < in_turn
    monkeypatch.setattr(machine, "slowdown", lambda *about: 3.0)

    def minutes() -> str:
        said = next(one.said for one in found(doctor.processor) if one.what == "processor")
        return said.rpartition(" ")[2]

    monkeypatch.setattr(sweep, "n_cores", lambda: 2)
    monkeypatch.setattr(room, "free_memory", lambda: 900 * doctor.GIB)
    assert minutes() == f"{3 * sweep.expected(stages, 2):.0f}"
    monkeypatch.setattr(room, "free_memory", lambda: 8 * doctor.GIB)
    assert minutes() == f"{3 * in_turn:.0f}", "memory for one"
    monkeypatch.setattr(sweep, "n_cores", lambda: 1)
    assert minutes() == f"{3 * in_turn:.0f}"
