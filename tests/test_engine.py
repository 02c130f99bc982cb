"""Jobs of a sweep run in the order of their needs, and the end of each is said as it was."""

import getpass
import itertools
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from ssah_utils.files import ROOT
from ssah_utils.pipeline import engine
from ssah_utils.pipeline.engine import Engine, Job, Progress
from tests.conftest import free_ports

needs_snakemake = pytest.mark.skipif(
    find_spec("snakemake") is None, reason="the extra 'sweep' is not installed: no Snakemake"
)
DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch")
needs_slurm = pytest.mark.skipif(
    not all(map(shutil.which, DAEMONS)) or getpass.getuser() != "root",
    reason="Slurm and munge are not installed, or this user cannot start them",
)


def lines_of(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def wait_until(holds: Callable[[], object], seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until, "it did not come to pass"
        time.sleep(0.2)


# ------------------------------------------------------------------------------------- what became


@pytest.fixture
def ended(tmp_path, monkeypatch) -> Callable[..., str]:
    """Why a job is not done that left these lines, on a cluster where Slurm says ``state``."""
    job = Job("0-a/01_x", "a · 01_x", "true")

    def reason(*lines: str, log: str = "", state: str = "") -> str:
        monkeypatch.setattr(engine, "slurm_state", lambda number: state)
        (tmp_path / "0-a").mkdir(exist_ok=True)
        (tmp_path / "0-a" / "01_x.state").write_text("".join(f"{line}\n" for line in lines))
        (tmp_path / "0-a" / "01_x.log").write_text(log)
        progress = Progress(tmp_path, [job])
        list(progress.look())
        return progress.reason(job)

    return reason


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (137, ["signal 9", "SIGKILL", "memory"]),
        (143, ["signal 15", "SIGTERM"]),
        (139, ["signal 11", "SIGSEGV"]),
    ],
)
def test_a_job_that_was_killed_is_said_to_be_by_its_signal(ended, code, words):
    said = ended("here", str(code), log="half a li")
    assert all(word in said for word in ["killed", *words]) and "half" not in said


def test_a_job_that_failed_is_said_to_be_by_the_last_line_in_which_it_says_why(ended):
    log = "preparing\nerror: 03 failed in cell 4: a {reason} (executed notebook: x)\nbye\n"
    assert ended("here", "1", log=log) == "03 failed in cell 4: a {reason} (executed notebook: x)"
    assert ended("here", "1", log="Traceback\nValueError: odd\n\n") == "ValueError: odd"
    assert ended("here", "7") == "ended with exit code 7"


@pytest.mark.parametrize("state", engine.ENDED_BY_SLURM)
@pytest.mark.parametrize("lines", [["node7 31"], ["node7 31", "143"], ["node7 31", "1"]])
def test_what_slurm_ended_is_said_to_be_whatever_the_job_could_still_say(ended, state, lines):
    """A kernel that is killed for memory lets its notebook fail, and says so before Slurm does."""
    said = ended(*lines, log="error: 03 lost its kernel\n", state=state)
    assert said.startswith(f"was ended by Slurm, {state}: ") and "Slurm job 31" in said


def test_a_job_that_failed_by_itself_on_a_cluster_says_why_itself(ended):
    assert ended("node7 31", "1", log="error: odd\n", state="FAILED") == "odd"


@pytest.mark.parametrize(
    ("line", "state"),
    [
        ("slurmstepd-n7: error: StepId=31.0 exceeded memory limit (2 > 1), being killed", True),
        ("slurmstepd: error: Detected 1 oom_kill event in StepId=31.0.", True),
        ("slurmstepd: error: *** STEP 31.0 ON n7 CANCELLED AT now ***", False),
        ("my notebook speaks of an oom_kill", False),
    ],
)
def test_want_of_memory_of_which_slurm_tells_the_log_alone_is_found_there(
    ended, tmp_path, line, state
):
    log = tmp_path / ".snakemake" / "slurm_logs" / "rule_01_x" / "0-a" / "31.log"
    log.parent.mkdir(parents=True)
    log.write_text(f"host: n7\n{line}\n")
    said = ended("node7 31", state="FAILED")
    assert ("was ended by Slurm, OUT_OF_MEMORY" in said) == state
    assert state or said.endswith("(Slurm job 31: FAILED)")


def test_a_job_of_which_no_end_is_known_is_said_to_be_killed_or_running(ended):
    assert "killed" in ended("here") and "still running" in ended("here")


def test_half_a_line_is_not_read(tmp_path):
    job = Job("0-a/01_x", "a · 01_x", "true")
    (tmp_path / "0-a").mkdir()
    (tmp_path / "0-a" / "01_x.state").write_text("here\n13")
    progress = Progress(tmp_path, [job])
    assert list(progress.look()) == [job] and progress.codes == {}


def test_a_job_that_is_tried_again_counts_by_its_last_end(tmp_path, capsys):
    """As a profile of Snakemake asks for with ``retries``."""
    job = Job("0-a/01_x", "a · 01_x", "true")
    (tmp_path / "0-a").mkdir()
    progress = Progress(tmp_path, [job])

    def told(text: str) -> list[str]:
        (tmp_path / "0-a" / "01_x.state").write_text(text)
        engine.tell(progress)
        return [line.split("  ")[1].split()[0] for line in capsys.readouterr().out.splitlines()]

    assert told("here\n1\n") == ["started", "failed"] and progress.codes == {job.name: 1}
    assert told("") == [] and progress.running == [], "it is being written anew"
    assert told("there\n") == ["started"] and progress.running == [job]
    assert told("there\n2\n") == ["failed"] and len(engine.failures(progress, 1)) == 1
    assert told("there\n0\n") == ["started", "done"], "between two looks"
    assert engine.failures(progress, 0) == []


@pytest.mark.parametrize(
    ("executor", "words"),
    [
        ("slrum", ["'slrum' is not installed", "nearest is 'slurm'", "local, slurm"]),
        ("kubernetes", ["'kubernetes' is not installed", "snakemake-executor-plugin-"]),
        ("slurm", ["needs sbatch"]),
    ],
)
def test_an_executor_that_cannot_be_had_is_one_line(monkeypatch, executor, words):
    monkeypatch.setattr(engine, "installed_executors", lambda: ["local", "slurm"])
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ValueError) as caught:
        engine.check_executor(executor)
    text = str(caught.value)
    assert "\n" not in text and all(word in text for word in words), text


def test_executors_are_found_by_their_plugins_and_inner_ones_are_left_out(tmp_path, monkeypatch):
    for name in ("slurm", "slurm_jobstep", "aws_batch"):
        (tmp_path / f"snakemake_executor_plugin_{name}").mkdir()
    (tmp_path / "snakemake_executor_plugin_slurm-2.8.0.dist-info").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path), str(tmp_path / "absent")])
    assert engine.installed_executors() == ["local", "aws-batch", "slurm"]


# ----------------------------------------------------------------------------------------- locally


@needs_snakemake
def test_jobs_run_in_the_order_of_their_needs_and_each_failure_is_one_line(tmp_path, capsys):
    order = tmp_path / "order"
    jobs = [
        Job("1-b/02_y", "b · 02_y", f"echo b2 $OMP_NUM_THREADS >> {order}", ("0-a/01_x",)),
        Job("0-a/01_x", "a · 01_x", f"sleep 1; echo 'a1 {{}} {{run}}' >> {order}"),
        Job("0-a/02_y", "a · 02_y", "echo 'error: no {luck}'; exit 3", ("0-a/01_x",)),
        Job("0-a/03_z", "a · 03_z", f"echo a3 >> {order}", ("0-a/02_y",)),
        Job("2-c/01_x", "c · 01_x", "kill -9 $BASHPID"),
    ]
    found = engine.run_jobs(jobs, Engine(jobs=2, threads=1), tmp_path / "sweep")
    assert lines_of(order) == ["a1 {} {run}", "b2 1"], "what failed is nothing to other runs"
    assert found == [
        "a · 02_y no {luck}",
        "c · 01_x was killed by signal 9, SIGKILL (for want of memory?)",
        "1 of 5 notebooks have not run",
    ]
    said = capsys.readouterr().out
    assert said.count("  started\n") == 4 and said.count("  failed (") == 2
    assert "b · 02_y  done in 0:00 (" in said


@needs_snakemake
def test_the_most_urgent_is_first_and_cores_are_shared_as_told(tmp_path, capsys):
    order = tmp_path / "order"

    def job(name: str, *needs: str, threads: int = 1, seconds: float = 0.0) -> Job:
        # longer than the start of a process takes, so that what starts beside it has begun, too
        work = f"echo {name} $OMP_NUM_THREADS >> {order}; sleep 0.7"
        return Job(
            f"0-a/{name}", name, work, tuple(f"0-a/{one}" for one in needs), threads, seconds
        )

    jobs = [
        job("01_all", threads=2, seconds=5),
        job("02_short", "01_all", seconds=1),
        job("03_long", "01_all", seconds=60),
        job("04_chain", "01_all", seconds=2),
        job("05_end", "04_chain", seconds=90),
    ]
    assert engine.run_jobs(jobs, Engine(jobs=1, threads=2), tmp_path / "sweep") == []
    found = [line.split() for line in lines_of(order)]
    assert found[0] == ["01_all", "2"] and {threads for _, threads in found[1:]} == {"1"}
    assert {name for name, _ in found[1:3]} == {"04_chain", "03_long"}
    said = capsys.readouterr().out
    assert re.search(r"01_all  started, about 2:3\d to the end of all", said), said


@needs_snakemake
@pytest.mark.parametrize("alone", [1, 2])
def test_no_more_run_at_a_time_than_there_are_cores_for(tmp_path, alone):
    """Also after a job that ran alone, whatever cores it had."""
    count = tmp_path / "count"
    work = f"echo + >> {count}; sleep 0.5; echo - >> {count}"
    first = Job("0-a/01_x", "x", work, threads=alone)
    others = [Job(f"0-a/{k:02d}_y", f"y {k}", work, ("0-a/01_x",)) for k in range(2, 8)]
    assert engine.run_jobs([first, *others], Engine(jobs=2, threads=1), tmp_path / "sweep") == []
    at_a_time = list(itertools.accumulate(1 if line == "+" else -1 for line in lines_of(count)))
    assert len(at_a_time) == 14 and max(at_a_time) == 2


def test_a_line_says_what_runs_how_far_it_is_and_how_long_is_left(tmp_path, monkeypatch):
    jobs = [
        Job("0-a/01_x", "a · 01_x", "", seconds=60),
        Job("0-a/02_y", "a · 02_y", "", seconds=120),
    ]
    progress = Progress(tmp_path, jobs, at_a_time=2)
    away = Progress(tmp_path, jobs, at_a_time=0)
    (tmp_path / "0-a").mkdir()
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    for job in jobs:
        (tmp_path / f"{job.name}.state").write_text("here\n")
    assert list(progress.look()) == jobs == list(away.look())
    now += 30
    assert away.line() == "a · 01_x 0:30, a · 02_y 0:30", "nobody knows how long"
    (tmp_path / "0-a" / "01_x.log").write_text("x  started\nx  0:29 elapsed, ... · methods 3/12\n")
    assert progress.line() == "a · 01_x 0:30 (methods 3/12), a · 02_y 0:30; about 1:30 left in all"
    (tmp_path / "0-a/01_x.state").write_text("here\n0\n")
    list(progress.look())
    assert progress.line() == "a · 02_y 0:30; about 0:30 left in all", "twice as fast as expected"
    (tmp_path / "0-a/02_y.state").write_text("here\n1\n")
    list(progress.look())
    assert progress.left() == 0


def test_on_a_terminal_one_line_is_written_over_and_over(tmp_path, monkeypatch, capsys):
    """It is no wider than the terminal: else what wraps would stay."""
    progress = Progress(tmp_path, [Job("0-a/01_x", "a · " + 40 * "x", "", seconds=60)])
    (tmp_path / "0-a").mkdir()
    (tmp_path / "0-a/01_x.state").write_text("here\n")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "30")
    engine.tell(progress)
    progress.told -= 2
    engine.tell(progress)
    started, shown = capsys.readouterr().out.split("\n")
    clear = "\r\033[K"
    assert started.startswith(f"{clear}a · ") and "started" in started
    assert shown.startswith(clear) and len(shown.removeprefix(clear)) == 29


CALL = """
import sys
from pathlib import Path
from ssah_utils.pipeline.engine import Engine, Job, run_jobs
folder = Path(sys.argv[1])
long = f"echo $$ > {folder}/pid; sleep {sys.argv[2]}; touch {folder}/first"
jobs = [Job("0-a/01_x", "a", long), Job("0-a/02_y", "b", f"touch {folder}/second", ("0-a/01_x",))]
try:
    print(run_jobs(jobs, Engine(), folder / "sweep"))
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.fixture
def sweeping(tmp_path) -> Iterator[Callable[[float], subprocess.Popen]]:
    """A process with a job that takes so many seconds, once the job is running, and one after."""
    started = []

    def start(seconds: float) -> subprocess.Popen:
        command = [sys.executable, "-c", CALL, str(tmp_path), str(seconds)]
        started.append(subprocess.Popen(command, cwd=ROOT, start_new_session=True))
        wait_until(lambda: lines_of(tmp_path / "pid"))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def is_alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return not status.exists() or status.read_text().rpartition(")")[2].split()[0] != "Z"


@needs_snakemake
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_what_is_running(sweeping, tmp_path, number):
    process = sweeping(300)
    process.send_signal(number)
    assert process.wait(60) == 130
    (pid,) = lines_of(tmp_path / "pid")
    wait_until(lambda: not is_alive(int(pid)), 20)
    assert not (tmp_path / "first").exists() and not (tmp_path / "second").exists()


@needs_snakemake
def test_without_the_process_that_started_them_jobs_end_and_no_more_are_started(sweeping, tmp_path):
    process = sweeping(5)
    process.kill()
    wait_until((tmp_path / "first").exists)
    log = tmp_path / "sweep" / "snakemake.log"
    wait_until(lambda: "Will exit after finishing" in log.read_text())
    wait_until(lambda: "Shutting down" in log.read_text())
    time.sleep(2)
    assert not (tmp_path / "second").exists()


@needs_snakemake
def test_a_profile_that_snakemake_refuses_is_said_in_one_line(tmp_path):
    profile = tmp_path / "profile"
    profile.mkdir()
    (profile / "config.yaml").write_text("nonsense: 3\n")
    jobs = [Job("0-a/01_x", "a · 01_x", "true")]
    (line,) = engine.run_jobs(jobs, Engine(profile=profile), tmp_path / "sweep")[:1]
    assert line.startswith("a · 01_x did not start: ") and "nonsense" in line and "\n" not in line


# ------------------------------------------------------------------------------------------- Slurm

CONFIGURATION = """
ClusterName=one
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
SlurmUser=root
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU=500
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=1
JobAcctGatherParams=OverMemoryKill
ReturnToService=2
KillWait=2
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 RealMemory=2000 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES State=UP
"""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory) -> Iterator[Path]:
    """A Slurm of one node and two processors on this machine, for these tests alone."""
    folder = tmp_path_factory.mktemp("slurm")
    munge = folder / "munge"
    for place in (munge, folder / "state", folder / "spool"):
        place.mkdir(mode=0o700)
    (munge / "key").write_bytes(os.urandom(1024))
    (munge / "key").chmod(0o400)
    names = {"key-file": "key", "socket": "socket", "pid-file": "pid"}
    names |= {"log-file": "log", "seed-file": "seed"}
    words = [f"--{option}={munge / name}" for option, name in names.items()]
    content = CONFIGURATION.format(folder=folder, host=socket.gethostname(), ports=free_ports(2))
    (folder / "slurm.conf").write_text(content)
    srun = folder / "bin" / "srun"  # Snakemake's jobs call it without the variable
    srun.parent.mkdir()
    call = f'SLURM_CONF={folder}/slurm.conf exec {shutil.which("srun")} "$@"'
    srun.write_text(f"#!/bin/sh\n{call}\n")
    srun.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        patch.setenv("PATH", str(srun.parent), prepend=os.pathsep)
        started = []
        for command in (["munged", "--foreground", "--force", *words], ["slurmctld", "-D", "-c"]):
            started.append(subprocess.Popen(command, stderr=subprocess.DEVNULL))
            time.sleep(1)
        started.append(subprocess.Popen(["slurmd", "-D"], stderr=subprocess.DEVNULL))
        ask = ["sinfo", "--noheader", "--format", "%T"]
        try:
            wait_until(lambda: "idle" in subprocess.run(ask, capture_output=True, text=True).stdout)
            yield folder
        finally:
            for process in reversed(started):
                process.terminate()
                process.wait()


@pytest.fixture
def on_slurm(slurm, tmp_path) -> Engine:
    profile = tmp_path / "profile"
    profile.mkdir()
    (profile / "config.yaml").write_text(
        "slurm-status-command: squeue\nslurm-init-seconds-before-status-checks: 2\n"
        "default-resources: {slurm_account: none, slurm_partition: main, runtime: 5, mem_mb: 400}\n"
    )
    return Engine("slurm", jobs=2, profile=profile)


@needs_snakemake
@needs_slurm
def test_on_slurm_killed_jobs_are_said_to_be_and_only_they_run_again(on_slurm, tmp_path):
    """One is cancelled, one takes too much memory; a third is done and one waits for the first."""
    done = tmp_path / "done"
    done.mkdir()
    greedy = f"{sys.executable} -c 'import time; x = bytearray(700 << 20); time.sleep(120)'"

    def jobs(first: str, second: str) -> list[Job]:
        def once(name: str, command: str) -> str:  # as ssah run: what is done is left as it is
            return f"test -e {done / name} || {{ {command}; echo {name} >> {done / name}; }}"

        return [
            Job("0-a/01_x", "a · 01_x", once("a1", first)),
            Job("0-a/02_y", "a · 02_y", once("a2", "true"), ("0-a/01_x",)),
            Job("1-b/01_x", "b · 01_x", once("b1", second)),
            Job("2-c/01_x", "c · 01_x", once("c1", "true")),
        ]

    cancelled = "scancel $SLURM_JOB_ID; sleep 120"
    found = engine.run_jobs(jobs(cancelled, greedy), on_slurm, tmp_path / "first")
    assert len(found) == 3 and found[2] == "1 of 4 notebooks have not run", found
    assert found[0].startswith("a · 01_x was ended by Slurm, CANCELLED: ")
    assert found[1].startswith("b · 01_x was ended by Slurm, OUT_OF_MEMORY: ")
    assert [path.name for path in done.iterdir()] == ["c1"]
    assert engine.run_jobs(jobs("true", "true"), on_slurm, tmp_path / "second") == []
    for name in ("a1", "a2", "b1", "c1"):
        assert lines_of(done / name) == [name], "each once"


@needs_snakemake
@needs_slurm
def test_what_slurm_refuses_is_said_in_its_words(on_slurm, tmp_path):
    path = on_slurm.profile / "config.yaml"
    path.write_text(path.read_text().replace("slurm_partition: main", "slurm_partition: nowhere"))
    found = engine.run_jobs([Job("0-a/01_x", "a · 01_x", "true")], on_slurm, tmp_path / "sweep")
    assert "did not start" in found[0] and "partition" in found[0] and "\n" not in found[0]
