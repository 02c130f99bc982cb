"""A sweep leaves what single runs leave, does nothing twice, and finds mistakes beforehand."""

import itertools
import json
import os
import shlex
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import papermill
import pytest
import torch
import yaml

from ssah_utils import extras, hub, room
from ssah_utils.files import ROOT
from ssah_utils.locks import InUse
from ssah_utils.pipeline import cli, engine, memory_plan, run, runs, stored, sweep
from tests import test_run
from tests.test_run import OTHER, Pipeline

MODEL = "tiny-random-llama"


class WithClaims(Pipeline):
    """Beside a <- b and c, a notebook d that reads what all seeds have stored of a and b."""

    names = ("a", "b", "c", "d")

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        stages = yaml.safe_load((self.folder / "pipeline.yaml").read_text())
        stages["stages"][-1] |= {"inputs": ["a", "b"], "every_seed": True}
        (self.folder / "pipeline.yaml").write_text(yaml.safe_dump(stages))

    def sweep(self, *words: str) -> int:
        """``ssah sweep`` with these words; ``executed`` lists what ran."""
        self._executed.clear()
        return cli.main(["sweep", "--profile", "laptop", *words])

    @property
    def executed(self) -> list[str]:
        return list(self._executed)


def call(command: str) -> int:
    """A job's command, in this process."""
    words = shlex.split(command)
    start = words.index("ssah_utils.pipeline.cli")
    places = dict(word.split("=", 1) for word in words[:start] if word.startswith("SSAH_"))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in places.items():
            patch.setenv(name, value)
        return cli.main(words[start + 1 :])


def in_this_process(jobs: list[engine.Job], how: engine.Engine, folder: Path) -> list[str]:
    """The engine's part without Snakemake: in the order of their needs, what can be done."""
    waiting, done = list(jobs), set()
    while ready := [job for job in waiting if done.issuperset(job.needs)]:
        for job in ready:
            waiting.remove(job)
            if call(job.command) == 0:
                done.add(job.name)
    return [f"{job.label} is not done" for job in jobs if job.name not in done]


@pytest.fixture
def several(tmp_path, monkeypatch) -> WithClaims:
    """A pipeline whose notebooks are executed without kernels, and jobs without Snakemake."""
    pipeline = WithClaims(tmp_path)
    monkeypatch.setenv("SSAH_RUNS", str(pipeline.runs))
    monkeypatch.setattr(run, "NOTEBOOKS", pipeline.folder)
    monkeypatch.setattr(papermill, "execute_notebook", pipeline.fake)
    monkeypatch.setattr(hub, "answers", lambda: False)
    monkeypatch.setattr(extras, "require", lambda *names: None)
    monkeypatch.setattr(engine, "run_jobs", in_this_process)
    return pipeline


def contents(folder: Path) -> dict[str, str]:
    """What runs have left: names of files, and content where it is the same each time."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and ".lock" not in path.name:
            name = path.relative_to(folder).as_posix()
            kept = (
                stored.stamp_of(path.parent).get("key")
                if path.name == "stamp.json"
                else path.read_text()
            )
            found[name] = str(kept) if path.suffix == ".json" else ""
    return found


# ----------------------------------------------------------------------------------------- results


def test_a_sweep_leaves_what_single_runs_leave(several, tmp_path, monkeypatch):
    assert several.sweep("--seeds", "0:2", "--set", "n_items=5") == 0
    assert sorted(several.executed) == sorted([*several.names, *several.names])
    swept = contents(several.runs)
    monkeypatch.setenv("SSAH_RUNS", str(tmp_path / "single"))
    for seed in (0, 1, 0):  # seed 0 once more, as it reads what seed 1 has stored
        several.run(f"seed={seed}", "n_items=5")
    assert swept == contents(tmp_path / "single")
    assert len([name for name in swept if name.endswith("stamp.json")]) == 8


def test_a_single_run_finds_nothing_to_do_after_a_sweep_and_a_sweep_nothing_after_runs(several):
    assert several.run("seed=0") == ["a", "b", "c", "d"]
    assert several.sweep("--seeds", "0:2") == 0
    assert sorted(several.executed) == ["a", "b", "c", "d", "d"], "seed 1, and what reads all"
    assert [several.run(f"seed={seed}") for seed in (0, 1)] == [[], []]
    assert several.sweep("--seeds", "0:2") == 0 and several.executed == []


def test_what_reads_all_seeds_waits_for_all_of_them(several):
    found = sweep.members("laptop", [0, 1, 2], [], [])
    jobs = {job.name: job for job in sweep.jobs_of(found, "local")}
    assert len(jobs) == 12
    (last,) = (job for name, job in jobs.items() if name.endswith("seed-1/d"))
    assert sorted(last.needs) == sorted(name for name in jobs if name[-2:] in ("/a", "/b"))
    (second,) = (job for name, job in jobs.items() if name.endswith("seed-1/b"))
    assert [name[-8:] for name in second.needs] == ["seed-1/a"]


def test_models_and_values_have_folders_side_by_side(several, tmp_path, monkeypatch):
    """A folder whose name a shell would not take as it is, and values of a parameter."""
    other = tmp_path / "mine 'x' $y; z"
    other.mkdir()
    in_place = "from ssah_utils.pipeline.runs import run_folder\n"
    in_place += "place = run_folder(profile, model, seed) / 'a'\nplace.mkdir(exist_ok=True)\n"
    in_place += "(place / 'result.json').write_text(str(n_items))"
    monkeypatch.setattr(test_run, "WRITE", in_place)
    several.write("a")
    values = ["n_items=3", "n_items=4", "harmful_data=advbench"]
    words = itertools.chain.from_iterable(("--set", value) for value in values)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run.parameters, "check", lambda values: None)
        patch.setattr(run.parameters, "check_trainable", lambda name, values: None)
        assert several.sweep("--models", f"{MODEL},{other}", *words, "--only", "a") == 0
    for value in (3, 4):
        folders = list((several.runs / f"n_items={value}" / "laptop").iterdir())
        assert len(folders) == 2
        for folder in folders:
            assert (folder / "seed-0" / "a" / "result.json").read_text() == str(value)


@pytest.mark.parametrize("text", ["a=1/2", "a=" + "x" * 200, "a=b c", "a=ä{}"])
def test_a_folder_is_named_by_a_value_whatever_it_is(text):
    name = sweep.folder_name(text)
    assert "/" not in name and len(name) < 100 and name != sweep.folder_name(text + " ")
    assert sweep.folder_name("safety_fraction=0.02") == "safety_fraction=0.02"


def test_what_notebooks_must_agree_on_reaches_all_jobs_of_a_run(several):
    """``ssah run --only b --set harmful_data=...`` alone is refused."""
    assert several.sweep("--set", "harmful_data=helpful", "--only", "a,b") == 0
    assert several.executed == ["a", "b"]
    for name in ("a", "b"):
        executed = several.stage_folder(name) / f"{name}.ipynb"
        assert executed.exists() and several.run("harmful_data=helpful", only="a,b") == []


def test_a_failed_notebook_stays_as_the_log_of_its_failure_and_the_rest_is_done(several, capsys):
    several.write("b", "assert seed == 1, 'bad {luck}'")
    execute = several.fake

    def fail(source, target, parameters, **options):
        try:
            execute(source, target, parameters)
        except AssertionError as error:
            raise papermill.exceptions.PapermillExecutionError(
                1, 3, "", "AssertionError", str(error), []
            ) from error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(papermill, "execute_notebook", fail)
        assert several.sweep("--seeds", "0:2") == 1
    assert (several.stage_folder("b") / "b.failed.ipynb").exists()
    assert sorted(several.executed) == ["a", "a", "b", "b", "c", "c"]
    said = capsys.readouterr()
    assert "the same command continues" in said.out and "seed 0 · b is not done" in said.err
    several.write("b")
    assert several.sweep("--seeds", "0:2") == 0
    assert sorted(several.executed) == ["b", "b", "d", "d"]


# ------------------------------------------------------------------------------------ side by side


def test_notebooks_of_one_run_that_are_executed_alone_may_be_side_by_side(several):
    several.run()
    folder = several.stage_folder("a").parent
    with sweep.locked(runs.run_lock(folder, shared=True)):
        assert several.run("n_items=4", only="c") == ["c"]
        with pytest.raises(InUse, match="seed-0 is in use by"):
            several.run("n_items=5")
    with sweep.locked(runs.run_lock(folder)), pytest.raises(InUse, match="is in use by process"):
        several.run("n_items=5", only="c")
    with (
        sweep.locked(runs.turn_lock(several.stage_folder("c"))),
        pytest.raises(InUse, match="is in use by process"),
    ):
        several.run("n_items=5", only="c")


def test_who_waits_finds_done_what_the_other_did(several, capsys):
    """As the job of a sweep whose predecessor was killed while its own job went on."""
    lock = runs.run_lock(several.stage_folder("a").parent)
    lock.acquire()

    def finish() -> None:
        lock.release()

    timer = threading.Timer(1.0, finish)
    timer.start()
    stages = run.plan("laptop", [], "a")
    run.run(stages, "a", wait=True)
    timer.join()
    said = capsys.readouterr().out
    assert "waiting: " in said and f"process {os.getpid()}" in said
    assert several.stage_folder("a").joinpath("stamp.json").exists()


def test_a_lock_that_is_shared_keeps_the_name_of_the_other_holder(tmp_path):
    first, second = (runs.run_lock(tmp_path, shared=True) for _ in range(2))
    command = [sys.executable, "-c", OTHER.replace('"the other run"', "'it', True")]
    other = subprocess.Popen(
        [*command, str(first.path)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    try:
        second.acquire()
        assert other.stdout.readline() == "held\n", "beside the one that is held"
        second.release()
        with pytest.raises(InUse, match=f"process {other.pid} "):
            runs.run_lock(tmp_path).acquire()
    finally:
        other.kill()
        other.communicate()


def test_a_job_refuses_inputs_that_are_not_as_the_run_is_planned(several):
    several.run()
    planned = run.plan("laptop", ["n_items=4"], "b", as_in=run.EVERY)
    with pytest.raises(ValueError, match=r"a was not made as it is planned here.*: run a first"):
        run.run(planned, "b", as_in=run.EVERY)
    run.run(run.plan("laptop", ["n_items=4"], "a", as_in="a,b"), "a", as_in="a,b")
    several._executed.clear()
    run.run(run.plan("laptop", ["n_items=4"], "b", as_in="a,b"), "b", as_in="a,b")
    assert several.executed == ["b"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--as-in", "all"], "--as-in needs --only"),
        (["--only", "a", "--as-in", "b"], "--only has a, which is none of --as-in b"),
        (["--only", "a", "--as-in", "aa"], "unknown notebook 'aa'; nearest is 'a'"),
    ],
)
def test_a_mistake_in_what_a_run_is_planned_with_is_one_line(several, capsys, words, message):
    assert cli.main(["run", "--profile", "laptop", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


# ---------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("text", "seeds"),
    [("0:3", [0, 1, 2]), ("7", [7]), ("4, 0:2,1", [4, 0, 1]), ("2:3", [2])],
)
def test_seeds_are_numbers_and_ranges_without_their_end(text, seeds):
    assert sweep.seeds_of(text) == seeds


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seeds", "3:3"], "'3:3' holds no seed"),
        (["--seeds", "5:2"], "'5:2' holds no seed"),
        (["--seeds", "0-3"], "'0-3' is no range of seeds: 0:10 means 0 to 9"),
        (["--seeds", "-1:2"], "--seeds: expected one argument"),
        (["--seeds", "0:3:2"], "'0:3:2' is no range"),
        (["--seeds", ""], "'' is no range"),
        (["--seeds", "one"], "'one' is no range"),
        (["--models", f"{MODEL},smolm2-135m-instruct"], "'smolm2-135m-instruct'"),
        (["--models", "gemma-3-270m"], "has terms of its own"),
        (["--models", "some/where"], "'some/where' is not in the local cache"),
        (["--set", "n_itms=3"], "unknown parameter 'n_itms'; nearest is 'n_items'"),
        (["--set", "n_items=3", "--set", "n_items=many"], "'n_items' takes int"),
        (["--set", "n_items=0"], "n_items is 0"),
        (["--set", "seed=3"], "the seed of a sweep is chosen by --seeds"),
        (["--set", f"model={MODEL}"], "the model of a sweep is chosen by --models"),
        (["--set", "profile=smoke"], "the profile of a sweep is chosen by --profile"),
        (["--only", "aa"], "unknown notebook 'aa'; nearest is 'a'"),
        (["--profile", "laptp"], "unknown profile 'laptp'; nearest is 'laptop'"),
        (["--executor", "slrum"], "executor 'slrum' is not installed; nearest is 'slurm'"),
        (["--jobs", "-2"], "--jobs is -2"),
        (["--threads", "-2"], "--threads -2"),
        (["--workflow-profile", "nowhere"], "nowhere is no profile of Snakemake"),
        (["--dry-rn"], "nearest is '--dry-run'"),
    ],
)
def test_a_mistake_is_one_line_before_anything_starts(several, monkeypatch, capsys, words, message):
    monkeypatch.setattr(engine, "installed_executors", lambda: ["local", "slurm"])
    assert several.sweep(*words) == 2
    said = capsys.readouterr()
    assert len(said.err.splitlines()) == 1 and message in said.err, said.err
    assert said.out == "" and not several.executed and not several.runs.exists()


def test_notebooks_alone_need_their_inputs_as_in_a_single_run(several, capsys):
    assert several.sweep("--only", "b") == 1 and not several.executed
    (line,) = capsys.readouterr().err.splitlines()
    assert "b needs the results of a" in line


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("executor: slrum\n", "executor 'slrum' is not installed"),
        ("jobs: many\n", "--jobs is many"),
        ("- a\n", "must map options of Snakemake to values"),
        ("a: [\n", "is not YAML"),
    ],
)
def test_a_mistake_in_a_profile_of_snakemake_is_one_line(tmp_path, content, message):
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        sweep.engine_for("", 0, 0, tmp_path)
    assert "\n" not in str(caught.value)


def test_of_several_files_in_a_profile_the_one_counts_that_snakemake_takes(tmp_path, monkeypatch):
    for name in ("config.yaml", "config.v8+.yaml", "config.v9+.yaml", "config.v10+.yaml"):
        (tmp_path / name).write_text(f"jobs: {name}\n")
    (tmp_path / "config-of-mine.yaml").write_text("jobs: none\n")
    for version, name in (
        ("7.32.4", "config.yaml"),
        ("8.30.0", "config.v8+.yaml"),
        ("9.9.0", "config.v9+.yaml"),
        ("11.0", "config.v10+.yaml"),
        ("", "config.yaml"),  # not installed
    ):
        with monkeypatch.context() as patch:
            patch.setattr(sweep, "installed_versions", lambda names, v=version: {"snakemake": v})
            assert sweep.read_workflow_profile(tmp_path) == {"jobs": name}
    if find_spec("snakemake"):
        from snakemake.cli import get_profile_dir

        chosen = get_profile_dir(str(tmp_path))[1]
        assert sweep.read_workflow_profile(tmp_path) == {"jobs": chosen.name}


def test_what_is_asked_for_comes_before_the_profile_of_snakemake(tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "check_executor", lambda name: None)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    (tmp_path / "config.yaml").write_text("executor: slurm\njobs: 20\n")
    asked = [("", 0, 0), ("local", 3, 0), ("", 5, 4)]
    found = [sweep.engine_for(*words, tmp_path) for words in asked]
    assert [(one.executor, one.jobs, one.threads) for one in found] == [
        ("slurm", 20, 1),
        ("local", 3, 2),
        ("slurm", 5, 4),
    ]
    assert sweep.engine_for("", 0, 0, None) == engine.Engine("local", 1, 8, None)


def test_two_at_a_time_where_cores_and_memory_are_enough(several, monkeypatch, capsys):
    found = sweep.members("laptop", [0, 1], [], [])
    cores, free = set(range(8)), 12.0
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: cores, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(room, "free_memory", lambda: int(free * room.GIB))
    monkeypatch.setattr(memory_plan, "largest_process", lambda stages, machine: 5 * room.GIB)

    def how(jobs: int = 0) -> tuple[int, int]:
        one = sweep.engine_for("", jobs, 0, None, partial(sweep.at_a_time, found))
        return one.jobs, one.threads

    assert how() == (2, 4) and how(jobs=2) == (2, 4) and not capsys.readouterr().out
    assert how(jobs=3) == (3, 2), "what is asked for comes first"
    said = "3 at a time may take 17.2 GiB, 12.0 GiB of memory are free\n"
    assert capsys.readouterr().out == said
    assert how(jobs=8) == (8, 1)
    assert capsys.readouterr().out.startswith(f"{len(found) * len(found[0].stages)} at a time")
    free = 11.0
    assert how() == (1, 8), "memory for one, and for what runs it"
    assert capsys.readouterr().out == "one notebook at a time: 11.0 GiB of memory are free\n"
    free, cores = 12.0, {3}
    assert how() == (1, 1), "one core"
    cores = {3, 4}
    assert how() == (2, 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert how() == (1, 2), "they would share the GPU"
    assert how(jobs=8) == (8, 1) and not capsys.readouterr().out, "its memory is not planned"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert several.run("seed=0") and several.run("seed=1")
    monkeypatch.setattr(memory_plan, "largest_process", None)
    assert how() == (1, 2), "nothing to do, nothing to plan"


def test_a_job_is_given_all_cores_where_no_other_can_run_beside_it(several):
    """b needs a, d needs a and b: without c all are alone, with it or of two seeds none is."""
    for seeds, only, alone in (
        ([0], "a,b,d", {"a", "b", "d"}),
        ([0], "", set()),
        ([0, 1], "", set()),
    ):
        jobs = sweep.jobs_of(sweep.members("laptop", seeds, [], [], only), "local", only)
        shared = sweep.with_shares(jobs, engine.Engine("local", 2, 3))
        assert {job.notebook for job in shared if job.threads == 6} == alone
        assert {job.threads for job in shared if job.notebook not in alone} <= {3}
        for before, after in zip(jobs, shared, strict=True):
            slower = after.seconds / before.seconds
            assert slower == pytest.approx(1 if after.notebook in alone else 2**sweep.SHARING)
    away = sweep.with_shares(jobs, engine.Engine("slurm", 20, 3))
    assert {job.threads for job in away} == {3}
    assert [job.seconds for job in away] == [job.seconds for job in jobs]


def test_what_a_notebook_took_with_a_share_of_the_cores_is_known_for_all_of_them(
    several, monkeypatch
):
    """Else each sweep would expect more than the last."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert several.run("seed=0")
    stamp = several.stage_folder("a") / "stamp.json"
    left = json.loads(stamp.read_text()) | {"seconds": 100.0}
    assert left["threads"] == 4 and sweep.with_all_cores(left) == 100
    shared = sweep.with_all_cores(left | {"threads": 2})
    assert shared * 2**sweep.SHARING == pytest.approx(100)
    assert sweep.with_all_cores({"seconds": 100.0}) == 100, "stamps that do not say it"
    assert sweep.with_all_cores({}) is None


def test_a_cluster_is_not_judged_by_the_machine_that_jobs_are_submitted_from(several, monkeypatch):
    monkeypatch.setattr(run.machine, "slowdown", None)
    pipeline = yaml.safe_load((several.folder / "pipeline.yaml").read_text())
    pipeline["machine"] = {"gflops": 100, "dtype": "float32", "beside": 0.0}
    (several.folder / "pipeline.yaml").write_text(yaml.safe_dump(pipeline))
    found = sweep.members("laptop", [0], [], [])
    assert {job.seconds for job in sweep.jobs_of(found, "slurm")} == {6.0}
    with pytest.raises(TypeError):
        sweep.jobs_of(found, "local")


@pytest.mark.parametrize(
    ("words", "is_here"),
    [
        ([], True),
        (["--executor", "slurm"], False),
        (["--workflow-profile", "cluster"], False),
        (["--workflow-profile", "cluster", "--executor", "local"], True),
    ],
)
def test_memory_is_that_of_the_machine_that_runs_the_jobs(
    several, tmp_path, monkeypatch, words, is_here
):
    pipeline = yaml.safe_load((several.folder / "pipeline.yaml").read_text())
    pipeline["stages"][0]["work"] = ["answers"]
    (several.folder / "pipeline.yaml").write_text(yaml.safe_dump(pipeline))
    (tmp_path / "cluster").mkdir()
    (tmp_path / "cluster" / "config.yaml").write_text("executor: slurm\njobs: 20\n")
    monkeypatch.chdir(tmp_path)
    asked = []
    check_room_for = lambda stage, values: asked.append(stage)  # noqa: E731
    monkeypatch.setattr(run.parameters, "check_room_for", check_room_for)
    monkeypatch.setattr(engine, "check_executor", lambda name: None)
    assert several.sweep("--dry-run", "--jobs", "1", *words) == 0
    assert asked == (["a"] if is_here else [])


def test_a_dry_run_shows_what_would_be_executed_and_does_not(several, capsys):
    several.run("seed=1")
    assert several.sweep("--seeds", "1:3", "--jobs", "2", "--dry-run") == 0
    assert not several.executed
    first, second, total = capsys.readouterr().out.splitlines()[-3:]
    assert first.endswith("seed-1  d") and second.endswith("seed-2  a, b, c, d")
    assert total.startswith("5 notebooks to execute in 2 runs, 2 at a time (local), about 0:")


def test_a_second_sweep_of_a_model_is_refused_in_one_line_that_says_who_is_there(several, capsys):
    path = several.runs / "laptop" / MODEL / ".sweep.lock"
    command = [sys.executable, "-c", OTHER, str(path)]
    other = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert other.stdout.readline() == "held\n"
        assert several.sweep("--seeds", "4") == 3 and not several.executed
        (line,) = capsys.readouterr().err.splitlines()
        assert f"process {other.pid} " in line and "the other run" in line
    finally:
        other.kill()
        other.communicate()
    assert several.sweep("--seeds", "4") == 0, "a lock dies with its process"


def test_a_run_that_is_at_work_is_said_to_be_waited_for(several, capsys):
    with sweep.locked(runs.run_lock(several.stage_folder("a").parent)):
        sweep.tell_of_others(sweep.members("laptop", [0, 1], [], []))
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{MODEL} · seed 0  waits: ") and f"process {os.getpid()}" in line


def test_the_command_names_the_extra_where_snakemake_is_missing(several, monkeypatch, capsys):
    monkeypatch.undo()
    monkeypatch.setattr(extras, "find_spec", lambda name: None if "snakemake" in name else name)
    assert cli.main(["sweep", "--profile", "smoke"]) == 1
    expected = 'error: snakemake is not installed: pip install "ssah-utils[sweep]"\n'
    assert capsys.readouterr().err == expected


# ------------------------------------------------------------------------------------ as it is used


@pytest.mark.skipif(
    find_spec("snakemake") is None, reason="the extra 'sweep' is not installed: no Snakemake"
)
def test_a_sweep_of_real_runs_fails_says_so_and_continues(tmp_path):
    """In a folder laid out as a clone, whose notebooks take no time."""
    clone = tmp_path / "clone"
    pipeline = WithClaims(clone)
    for name in ("ssah_utils", "data"):
        os.symlink(ROOT / name, clone / name)
    counted = f"with open(f'{tmp_path}/{{seed}}-NAME', 'a') as file: file.write('x')"
    for name in pipeline.names:
        more = [f"from pathlib import Path\nassert seed == 0 or Path('{tmp_path}/mended').exists()"]
        pipeline.write(name, counted.replace("NAME", name), *(more if name == "b" else []))

    def ssah_sweep() -> subprocess.CompletedProcess:
        words = ["sweep", "--profile", "laptop", "--seeds", "0:2", "--only", "a,b", "--jobs", "2"]
        return subprocess.run(
            [sys.executable, "-m", "ssah_utils.pipeline.cli", *words],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(clone), "SSAH_RUNS": str(pipeline.runs)},
            capture_output=True,
            text=True,
        )

    outcome = ssah_sweep()
    assert outcome.returncode == 1, outcome.stderr
    failed = pipeline.stage_folder("b", 1) / "b.failed.ipynb"
    (line,) = outcome.stderr.splitlines()
    assert line.startswith(f"error: {MODEL} · seed 1 · b b failed in cell") and str(failed) in line
    assert failed.exists()
    (tmp_path / "mended").touch()
    outcome = ssah_sweep()
    assert outcome.returncode == 0, outcome.stderr
    assert "1 notebooks to execute" in outcome.stdout
    counts: Callable = lambda seed, name: len((tmp_path / f"{seed}-{name}").read_text())  # noqa: E731
    assert [counts(seed, name) for seed in (0, 1) for name in "ab"] == [1, 1, 1, 2]
    assert [path.name for path in (pipeline.runs / ".sweeps").iterdir()] != [], "of the failure"
    for seed, name in itertools.product((0, 1), "ab"):
        assert (pipeline.stage_folder(name, seed) / "stamp.json").exists()
